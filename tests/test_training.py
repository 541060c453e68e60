"""Training on real images (scikit-learn's scanned digits), by the calls of timm's train.py and by train.py itself."""

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from timm.data import create_dataset, create_loader
from timm.models import resume_checkpoint
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import CheckpointSaver, ModelEmaV3, random_seed
from torch import multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

import timm_convmix  # noqa: F401  (a spawned process imports this file, and no conftest)

VARIANT = "convmix_test_resnet"
SCRIPTS = os.environ.get("TIMM_SCRIPTS")  # a folder with timm's train.py and validate.py, which are not in its wheel


def loader(root, split, batch_size=64, **kwargs):
    dataset = create_dataset("", root=root, split=split, is_training=split == "train")
    return create_loader(
        dataset,
        input_size=(3, 32, 32),
        batch_size=batch_size,
        is_training=split == "train",
        hflip=0,
        scale=(0.8, 1.0),
        color_jitter=0,
        crop_pct=1.0,
        num_workers=0,
        use_prefetcher=False,
        **kwargs,
    )


def train_one_epoch(model, images, optimizer, scheduler=None, updates=0):
    model.train()
    loss_of = nn.CrossEntropyLoss()
    for x, y in images:
        optimizer.zero_grad()
        loss_of(model(x), y).backward()
        optimizer.step()
        updates += 1
        if scheduler:
            scheduler.step_update(updates)
    return updates


@torch.no_grad()
def evaluate(model, images):
    model.eval()
    outputs = [(model(x), y) for x, y in images]
    logits, labels = (torch.cat(part) for part in zip(*outputs, strict=True))
    return (logits.argmax(1) == labels).float().mean().item(), nn.functional.cross_entropy(logits, labels).item()


def train_py_model(pretrained=False, **factory):
    """create_model as train.py calls it: whatever the user did not say is None."""
    return timm.create_model(
        VARIANT,
        pretrained=pretrained,
        in_chans=3,
        num_classes=10,
        drop_rate=0.0,
        drop_path_rate=None,
        drop_block_rate=None,
        global_pool=None,
        bn_momentum=None,
        bn_eps=None,
        scriptable=False,
        checkpoint_path="",
        **factory,
    )


@pytest.fixture(scope="module")
def run(digits, tmp_path_factory):
    """Two epochs of train.py's calls, with EMA and checkpoints."""
    random_seed(0)
    folder = tmp_path_factory.mktemp("run")
    model = train_py_model()
    images, validation = loader(digits, "train"), loader(digits, "validation")
    optimizer = create_optimizer_v2(model, opt="sgd", lr=0.05, momentum=0.9, weight_decay=5e-4)
    scheduler, epochs = create_scheduler_v2(
        optimizer, sched="cosine", num_epochs=2, warmup_epochs=0, step_on_epochs=False, updates_per_epoch=len(images)
    )
    ema = ModelEmaV3(model, decay=0.9)
    saver = CheckpointSaver(model, optimizer, model_ema=ema, checkpoint_dir=str(folder), recovery_dir=str(folder))
    scores, updates = [], 0
    for epoch in range(epochs):
        updates = train_one_epoch(model, images, optimizer, scheduler, updates)
        ema.update(model)
        scores.append(evaluate(model, validation))
        saver.save_checkpoint(epoch, metric=scores[-1][0])
    return model, optimizer, folder, scores


def test_it_learns(run):
    accuracies = [accuracy for accuracy, _ in run[3]]
    assert accuracies[-1] > 0.9
    assert accuracies == sorted(accuracies)


def test_it_resumes(run, digits):
    _, optimizer, folder, scores = run
    again = train_py_model()
    fresh = create_optimizer_v2(again, opt="sgd", lr=0.05, momentum=0.9, weight_decay=5e-4)
    assert resume_checkpoint(again, str(folder / "last.pth.tar"), fresh) == 2
    assert evaluate(again, loader(digits, "validation")) == pytest.approx(scores[-1], abs=1e-5)
    assert fresh.state_dict()["state"].keys() == optimizer.state_dict()["state"].keys()


@pytest.mark.parametrize("num_classes", [10, 4])
def test_a_checkpoint_goes_back_into_train_py(run, num_classes):
    """--pretrained --pretrained-path FILE"""
    overlay = dict(file=str(run[2] / "last.pth.tar"), num_classes=-1)
    model = timm.create_model(VARIANT, pretrained=True, num_classes=num_classes, pretrained_cfg_overlay=overlay)
    ema = torch.load(run[2] / "last.pth.tar", weights_only=False)["state_dict_ema"]
    own = model.state_dict()
    assert [name for name in ema if not torch.equal(ema[name], own[name])] == ["backbone.fc.weight", "backbone.fc.bias"]


def test_a_warm_start_learns_to_mix_at_fine_tuning_rates(run, digits, tmp_path):
    """AdamW at 5e-5 with layer decay 0.7, one epoch of 90 steps: the mix is no longer nothing, and lowers the loss."""
    save_file(run[0].backbone.state_dict(), tmp_path / "plain.safetensors")
    model = train_py_model(True, pretrained_cfg_overlay=dict(file=str(tmp_path / "plain.safetensors"), num_classes=-1))
    validation = loader(digits, "validation")
    optimizer = create_optimizer_v2(model, opt="adamw", lr=5e-5, weight_decay=0.05, layer_decay=0.7)
    for group in optimizer.param_groups:
        group["lr"] *= group["lr_scale"]
    train_one_epoch(model, loader(digits, "train", batch_size=16), optimizer)
    _, mixed_loss = evaluate(model, validation)

    x, _ = next(iter(validation))
    with torch.no_grad():
        final, mixed = model.backbone.forward_features(x), model.forward_features(x)
    share = ((mixed - final).mean((2, 3)).norm() / final.mean((2, 3)).norm()).item()
    model.mixer.start_as_identity()
    _, plain_loss = evaluate(model, validation)
    assert share > 0.005  # 0.001 where the warm start does not widen what the gain multiplies
    assert mixed_loss < plain_loss


def join(rank, world, store):
    torch.set_num_threads(1)
    random_seed(0, rank)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)


def ddp_worker(rank, world, store, root, results):
    join(rank, world, store)
    model = DistributedDataParallel(train_py_model())
    images = loader(root, "train", batch_size=16, distributed=True)
    optimizer = create_optimizer_v2(model, opt="sgd", lr=0.05, momentum=0.9)
    for epoch in range(3):
        images.sampler.set_epoch(epoch)
        train_one_epoch(model, images, optimizer)
    vector = torch.cat([p.detach().flatten() for p in model.parameters()])
    others = [torch.empty_like(vector) for _ in range(world)]
    dist.all_gather(others, vector)
    if rank == 0:
        accuracy, _ = evaluate(model.module, loader(root, "validation"))
        results.put((accuracy, max((vector - other).abs().max().item() for other in others)))
    dist.destroy_process_group()


def test_two_processes_train_one_model(digits, tmp_path):
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    multiprocessing.spawn(ddp_worker, (2, str(tmp_path / "store"), str(digits), results), nprocs=2)
    accuracy, difference = results.get(timeout=10)
    assert accuracy > 0.7
    assert difference == 0


def one_step(model, x, y):
    """A step on these images, the statistics of batch norm frozen; returns all parameters after it."""
    optimizer = create_optimizer_v2(model.eval(), opt="sgd", lr=0.1, momentum=0.9)
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def one_step_worker(rank, world, store, start, x, y):
    join(rank, world, store)
    model = train_py_model()
    if rank == 0:
        model.load_state_dict(torch.load(start, weights_only=True))
    torch.save(one_step(DistributedDataParallel(model), x.chunk(world)[rank], y.chunk(world)[rank]), f"{store}-{rank}")
    dist.destroy_process_group()


def test_two_processes_step_as_one_with_the_doubled_batch(digits, tmp_path):
    x, y = next(iter(loader(digits, "validation", batch_size=200)))
    model = train_py_model()
    train_one_epoch(model, [(x, y)], create_optimizer_v2(model, opt="sgd", lr=0.01))  # statistics other than 0 and 1
    start, store = tmp_path / "start.pt", tmp_path / "store"
    torch.save(model.state_dict(), start)
    multiprocessing.spawn(one_step_worker, (2, str(store), str(start), x, y), nprocs=2)

    def alone(*batch):
        model.load_state_dict(torch.load(start, weights_only=True))
        return one_step(model, *batch)

    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    whole, half = alone(x, y), alone(x[:100], y[:100])
    both = [torch.load(f"{store}-{rank}", weights_only=True) for rank in (0, 1)]
    assert torch.equal(*both)
    assert (both[0] - whole).abs().max() < 1e-6
    assert min((whole - before).abs().max(), (whole - half).abs().max()) > 1e-3


needs_scripts = pytest.mark.skipif(
    not SCRIPTS, reason="set TIMM_SCRIPTS to a folder with timm's train.py and validate.py (they are not in its wheel)"
)


def script(folder, name, *arguments):
    """Run a copy of one of timm's scripts, so that it imports the installed timm and not the checkout beside it."""
    copy = shutil.copy(Path(SCRIPTS) / name, folder)
    return subprocess.run([sys.executable, copy, *map(str, arguments)], check=True, capture_output=True, text=True)


@needs_scripts
def test_options_of_the_real_train_py(digits, tmp_path):
    """An epoch with them and one that resumes it, at a learning rate of nearly 0: the head stays as it starts."""
    common = ["--device-modules", "timm_convmix", "--data-dir", digits, "--model", VARIANT, "--num-classes", 10]
    common += ["--img-size", 32, "--batch-size", 64, "--workers", 0, "--no-prefetcher", "--device", "cpu"]
    common += ["--opt", "adamw", "--lr", 1e-8, "--layer-decay", 0.75, "--grad-accum-steps", 2, "--model-ema"]
    common += ["--model-ema-decay", 0.9, "--head-init-scale", 0.001, "--head-init-bias", -2.5, "--drop-path", 0.1]
    common += ["--mixup", 0.2, "--cutmix", 1.0, "--bce-loss", "--warmup-epochs", 0, "--cooldown-epochs", 0]
    common += ["--sched", "step", "--decay-epochs", 9, "--output", tmp_path]

    def run(experiment, *more):
        script(tmp_path, "train.py", *common, "--experiment", experiment, *more)
        return torch.load(tmp_path / experiment / "last.pth.tar", weights_only=False)

    first = run("first", "--epochs", 1)
    second = run("second", "--epochs", 2, "--resume", tmp_path / "first" / "last.pth.tar")
    assert (first["epoch"], second["epoch"]) == (0, 1)
    head = first["state_dict"]["backbone.fc.weight"]
    assert head.abs().max() < 0.001
    torch.testing.assert_close(first["state_dict"]["backbone.fc.bias"], torch.full((10,), -2.5))

    # 1,437 images in batches of 64: an update for each two
    steps = [{int(state["step"]) for state in saved["optimizer"]["state"].values()} for saved in (first, second)]
    assert steps == [{11}, {22}]

    scales = [group["lr_scale"] for group in first["optimizer"]["param_groups"]]
    model = train_py_model()
    groups = create_optimizer_v2(model, opt="adamw", lr=1, weight_decay=0.05, layer_decay=0.75).param_groups
    assert scales == [group["lr_scale"] for group in groups]
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    assert {scale[id(p)] for p in [*model.mixer.parameters(), *model.get_classifier().parameters()]} == {1}
    assert max(scale[id(p)] for p in model.backbone.layer1.parameters()) < 0.75

    statistics = "backbone.bn1.running_mean"
    for saved in (first, second):
        assert not torch.equal(saved["state_dict"][statistics], saved["state_dict_ema"][statistics])
    loaded = timm.create_model(
        VARIANT,
        pretrained=True,
        num_classes=10,
        pretrained_cfg_overlay=dict(file=str(tmp_path / "second" / "last.pth.tar"), num_classes=-1),
    )
    assert torch.equal(loaded.state_dict()[statistics], second["state_dict_ema"][statistics])


@needs_scripts
def test_the_real_train_py(digits, tmp_path):
    common = ["--device-modules", "timm_convmix", "--data-dir", digits, "--model", VARIANT, "--num-classes", 10]
    common += ["--img-size", 32, "--batch-size", 64, "--workers", 0, "--no-prefetcher", "--opt", "sgd", "--lr", 0.05]
    common += [
        "--warmup-epochs",
        0,
        "--cooldown-epochs",
        0,
        "--hflip",
        0,
        "--color-jitter",
        0,
        "--scale",
        0.8,
        1.0,
        "--output",
        tmp_path,
        "--device",
        "cpu",
    ]
    script(tmp_path, "train.py", *common, "--epochs", 2, "--experiment", "first")
    last = tmp_path / "first" / "last.pth.tar"
    script(tmp_path, "train.py", *common, "--epochs", 3, "--experiment", "more", "--resume", last)
    script(
        tmp_path, "train.py", *common, "--epochs", 1, "--experiment", "tuned", "--pretrained", "--pretrained-path", last
    )
    script(tmp_path, "train.py", *common, "--epochs", 1, "--experiment", "none", "--model-kwargs", "mixer=none")

    def scores(name):
        with (tmp_path / name / "summary.csv").open() as file:
            return {int(row["epoch"]): float(row["eval_top1"]) for row in csv.DictReader(file)}

    assert scores("first").keys() == {0, 1}
    assert scores("more").keys() == {2}
    assert scores("more")[2] > 70
    assert scores("tuned")[0] > 50  # one epoch under a fresh head
    assert scores("none")[0] > 20

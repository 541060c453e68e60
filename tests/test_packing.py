"""A real training, packed: what is written proves itself, and what does not prove itself is not written."""

import argparse
import csv
import dataclasses
import importlib.util
import json
import os
import pickle
import re
import sys
import warnings
from collections import Counter
from datetime import date
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image
from records import record
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.data import create_dataset, create_loader, resolve_model_data_config
from timm.models import clean_state_dict, get_pretrained_cfg, register_model
from timm.utils import CheckpointSaver, ModelEmaV3, random_seed, update_summary

import timm_convmix
from timm_convmix import ChecksumError, ManifestError, PackingError, WeightsError
from timm_convmix import convmix as registry
from timm_convmix.mixers import DEFAULT_MIXER
from timm_convmix.weights import manifest as manifests
from timm_convmix.weights import packing
from timm_convmix.weights.card import BEGIN, END, format_card
from timm_convmix.weights.manifest import read_manifest
from timm_convmix.weights.measuring import dataset_checksum, open_dataset, probe_input
from timm_convmix.weights.packing import Checkpoint, Images, origin_of, pack, read_checkpoint

ARCH = "convmix_test_resnet"
NAME, PLAIN = f"{ARCH}.digits", f"{ARCH}.digits_baseline"
SCRIPTS = os.environ.get("TIMM_SCRIPTS")
FILES = {"README.md", "config.json", "model.safetensors", "recipe.yaml"}
ARGS = dict(
    aa=None,
    batch_size=64,
    class_map="",
    config="",
    crop_pct=1.0,
    data=None,
    device_modules=["timm_convmix"],
    epochs=2,
    experiment="run",
    gp=None,
    img_size=32,
    in_chans=None,
    initial_checkpoint="",
    input_size=None,
    interpolation="",
    local_rank=0,
    lr=0.05,
    mean=None,
    model=ARCH,
    model_ema=False,
    model_ema_force_cpu=False,
    model_kwargs={"stages": [0, 2]},
    momentum=0.9,
    num_classes=10,
    opt="sgd",
    opt_kwargs={},
    pretrained=False,
    pretrained_path=None,
    resume="",
    scale=[0.8, 1.0],
    seed=3,
    std=None,
    val_split="validation",
    weight_decay=5e-4,
)
"""As train.py has them, with the machine's own places added by the fixture."""


def pixels(digits, split, size=32):
    """An independent reader: images as timm's test_resnet takes them (mean and std 0.5), labels, paths."""
    paths = sorted(Path(digits, split).glob("*/*.png"))
    images = np.stack([np.asarray(Image.open(path).convert("RGB"), dtype=np.float32) for path in paths])
    x = (torch.from_numpy(images) / 255 - 0.5) / 0.5
    return x.permute(0, 3, 1, 2), torch.tensor([int(path.parent.name) for path in paths]), paths


@torch.no_grad()
def measured(model, digits):
    """Top-1, top-5 in percent, mean cross-entropy, count: by the definition, without timm's loader."""
    x, y, _ = pixels(digits, "validation")
    logits = torch.cat([model.eval()(part) for part in x.split(100)])
    order = logits.argsort(1, descending=True)
    hits = (order == y[:, None]).float()
    loss = -(logits - logits.exp().sum(1, keepdim=True).log())[torch.arange(len(y)), y].mean()
    return 100 * hits[:, 0].mean().item(), 100 * hits[:, :5].sum(1).mean().item(), loss.item(), len(y)


@pytest.fixture(scope="module")
def run(digits, tmp_path_factory):
    """An output folder of train.py: one epoch of 45 steps, with EMA, then what the run says it measured."""
    random_seed(3)
    folder = tmp_path_factory.mktemp("output") / "run"
    folder.mkdir()
    args = argparse.Namespace(**ARGS, data_dir=str(digits), output=str(folder.parent))
    model = timm.create_model(ARCH, num_classes=10, **ARGS["model_kwargs"])
    x, y, _ = pixels(digits, "train")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    ema = ModelEmaV3(model, decay=0.8)
    for part in torch.randperm(len(x)).split(32):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x[part]), y[part]).backward()
        optimizer.step()
        ema.update(model)
    saver = CheckpointSaver(model, optimizer, args, model_ema=ema, checkpoint_dir=str(folder), recovery_dir=str(folder))
    model.eval()
    top1, top5, loss, _ = measured(model, digits)
    saver.save_checkpoint(0, metric=top1)
    update_summary(0, dict(loss=1.0), dict(loss=loss, top1=top1, top5=top5), folder / "summary.csv", lr=0.05)
    assert 25 < top1 < 99, "neither chance nor perfect, whatever the version draws"
    return argparse.Namespace(folder=folder, model=model, ema=ema.module.eval(), args=args, top1=top1)


def changed(run, folder, summary=None, **args):
    """A copy of the run whose arguments are others."""
    folder.mkdir(exist_ok=True)
    with torch.serialization.safe_globals([argparse.Namespace]):
        saved = torch.load(run.folder / "last.pth.tar", weights_only=True)
    saved["args"] = argparse.Namespace(**(vars(saved["args"]) | args))
    torch.save(saved, folder / "last.pth.tar")
    if summary is not None:
        update_summary(0, {}, dict(top1=summary), folder / "summary.csv")
    return folder


@pytest.fixture
def packer(few, tmp_path):
    """Pack into folders of the test's own; on few images what the run claims of all of them is left out."""

    def call(saved, name=NAME, data=None, **kwargs):
        if data is None:
            saved = dataclasses.replace(saved, top1=None)
        images = kwargs.pop("images", None) or Images(data_dir=data or few)
        kwargs = dict(output=tmp_path / "packed", manifest=tmp_path / "manifest.json", quiet=True) | kwargs
        return pack(saved, name=name, images=images, **kwargs)

    call.folder = tmp_path / "packed" / NAME
    call.manifest = tmp_path / "manifest.json"
    return call


def refused(packer, match, saved, error=PackingError, **kwargs):
    """Packing fails with a message of one line, and leaves nothing behind."""
    before = packer.manifest.read_bytes() if packer.manifest.exists() else None
    with pytest.raises(error, match=match) as raised:
        packer(saved, **kwargs)
    assert "\n" not in str(raised.value)
    assert not packer.folder.parent.exists() or not list(packer.folder.parent.iterdir())
    assert (packer.manifest.read_bytes() if packer.manifest.exists() else None) == before
    assert [path for path in packer.manifest.parent.iterdir() if path.name.startswith(".")] == []


def load(folder, **kwargs):
    return timm.create_model(f"local-dir:{folder}", pretrained=True, **kwargs).eval()


def logits(model, x):
    with torch.no_grad():
        return model.eval()(x)


# What is written ------------------------------------------------------------------------------------------------------


def test_a_run_is_packed(run, packer):
    made = packer(read_checkpoint(run.folder))
    assert {path.name for path in packer.folder.iterdir()} == FILES
    assert [path.name for path in packer.folder.parent.iterdir()] == [NAME]
    assert read_manifest(packer.manifest) == {NAME: made}

    model, x = load(packer.folder), torch.randn(4, 3, 32, 32)
    assert torch.equal(logits(model, x), logits(run.model, x))
    assert model.stages == (0, 2)

    data = (packer.folder / "model.safetensors").read_bytes()
    assert (made.sha256, made.bytes) == (sha256(data).hexdigest(), len(data))
    assert made.state == "packed"
    assert (made.hub_id, made.revision, made.embedded, made.base, made.baseline) == (None,) * 5
    assert (made.num_classes, made.label_names) == (10, tuple("0123456789"))
    assert (made.input_size, made.mean, made.std, made.crop_pct) == ((3, 32, 32), (0.5,) * 3, (0.5,) * 3, 1.0)
    assert (made.seeds, made.epochs, made.license, made.date) == ((3,), 1, "apache-2.0", date.today().isoformat())
    assert made.versions == {
        "timm": timm.__version__,
        "torch": str(torch.__version__),
        "timm_convmix": timm_convmix.__version__,
    }
    assert made.hardware
    assert made.model_args == run_args(run.model)


def run_args(model):
    settings = dict(mixer=DEFAULT_MIXER, mixer_args=model.mixer.settings, stages=[0, 2])
    return json.loads(json.dumps(dict(in_chans=3, global_pool="avg") | settings))


def test_the_metrics_are_those_of_the_definition(run, packer, digits):
    metrics = packer(read_checkpoint(run.folder), data=digits).metrics
    expected = measured(run.model, digits)
    assert dataclasses.astuple(metrics) == pytest.approx(expected, abs=1e-4)
    assert metrics.count == len(list(Path(digits, "validation").glob("*/*.png"))) == 360


def test_the_probe_is_of_a_fixed_input(run, packer):
    probe = packer(read_checkpoint(run.folder)).probe
    k = np.arange(3 * 32 * 32, dtype=np.float64) + 1
    x = torch.from_numpy(np.sin(k * k / 1000).reshape(1, 3, 32, 32).astype(np.float32))
    torch.testing.assert_close(probe_input((3, 32, 32)), x)
    expected = logits(run.model, x)[0].sort(descending=True)
    assert list(probe.classes) == expected.indices[:5].tolist()
    assert probe.logits == pytest.approx(expected.values[:5].tolist(), abs=1e-4)
    assert probe.tolerance == pytest.approx(max(1e-3, expected.values.abs().max().item() / 1000), abs=1e-5)


def test_the_images_are_told_by_their_checksum(run, packer, digits, tmp_path):
    dataset = packer(read_checkpoint(run.folder), data=digits).dataset
    paths = pixels(digits, "validation")[2]
    lines = sorted(f"{path.parent.name}/{path.name} {sha256(path.read_bytes()).hexdigest()}\n" for path in paths)
    assert dataset.checksum == sha256("".join(lines).encode()).hexdigest()
    assert (dataset.name, dataset.split, dataset.source, dataset.revision) == (digits.name, "validation", None, None)
    named = Images(data_dir=digits, name="digits", source="scikit-learn", revision="1.4")
    dataset = packer(read_checkpoint(run.folder), images=named).dataset
    assert (dataset.name, dataset.source, dataset.revision) == ("digits", "scikit-learn", "1.4")


def test_no_file_tells_of_the_machine(run, packer, digits):
    """Neither folders nor the names of runs, in the folder or the manifest."""
    packer(read_checkpoint(run.folder))
    for path in [packer.manifest, *packer.folder.glob("*[!s]")]:
        text = path.read_text(encoding="utf-8")
        assert str(digits.parent) not in text, path
        assert str(run.folder.parent) not in text, path
    assert not packing.PLACES & read_manifest(packer.manifest)[NAME].recipe.keys()


def test_config_json_is_what_timm_and_transformers_read(run, packer):
    made = packer(read_checkpoint(run.folder), license="mit")
    config = json.loads((packer.folder / "config.json").read_text())
    assert config["architecture"] == ARCH
    assert (config["num_classes"], config["num_features"], config["label_names"]) == (
        10,
        run.model.num_features,
        list("0123456789"),
    )
    assert "num_classes" not in config["model_args"], "transformers passes it itself"
    assert config["model_args"] == made.model_args
    assert config["timm_convmix"] == {"sha256": made.sha256, "bytes": made.bytes}
    cfg = config["pretrained_cfg"]
    assert (cfg["input_size"], cfg["crop_pct"], cfg["num_classes"]) == ([3, 32, 32], 1.0, 10)
    assert cfg["pool_size"] is None, "that of the default size is no longer true"
    assert not {"url", "hf_hub_id", "file", "source", "license", "description", "test_input_size"} & cfg.keys()
    loaded = load(packer.folder)
    assert loaded.pretrained_cfg["label_names"] == list("0123456789")
    wanted = dict(input_size=(3, 32, 32), crop_pct=1.0, mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bilinear")
    assert {key: tuple_of(value) for key, value in resolve_model_data_config(loaded).items()} == wanted | {
        "crop_mode": "center"
    }


def tuple_of(value):
    return tuple(value) if isinstance(value, list) else value


def test_what_the_base_says_of_its_own_images_is_not_kept(run, packer):
    """resnet50.a1_in1k is tested at 288 px; what was fine-tuned from it at 32 px is not."""
    model = timm.create_model("convmix_resnet50", device="meta")
    assert model.pretrained_cfg["test_input_size"] == (3, 288, 288)
    config = dict(input_size=(3, 32, 32), crop_pct=0.9, mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bilinear")
    cfg = packing.config_of(model, config, ["a"] * 1000, packing.Digest("0" * 64, 1))["pretrained_cfg"]
    assert not {"test_input_size", "test_crop_pct", "test_pool_size", "label_offset"} & cfg.keys()
    same = packing.config_of(model, dict(config, input_size=(3, 224, 224)), ["a"], packing.Digest("0" * 64, 1))
    assert same["pretrained_cfg"]["pool_size"] == (7, 7)


def test_transformers_loads_the_folder(run, packer):
    transformers = pytest.importorskip("transformers")
    packer(read_checkpoint(run.folder))
    model = transformers.TimmWrapperForImageClassification.from_pretrained(packer.folder).eval()
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model(x).logits, logits(run.model, x))


def test_a_flipped_bit_of_a_packed_folder_is_found(run, packer):
    packer(read_checkpoint(run.folder))
    path = packer.folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ChecksumError, match=rf"^{re.escape(str(path))}: expected sha256 \w+, found \w+\.$"):
        load(packer.folder)


def test_packing_again_replaces(run, packer):
    packer(read_checkpoint(run.folder))
    (packer.folder / "stale.bin").write_text("of an earlier version")
    again = packer(read_checkpoint(run.folder), dtype="bfloat16", license="mit", tolerance=5)
    assert {path.name for path in packer.folder.iterdir()} == FILES
    assert read_manifest(packer.manifest) == {NAME: again}
    assert "license: mit" in (packer.folder / "README.md").read_text()
    assert [path.name for path in packer.folder.parent.iterdir()] == [NAME]
    load(packer.folder)


def test_an_interrupted_replacement_gives_the_old_folder_back(tmp_path, monkeypatch):
    place, new = tmp_path / "net", tmp_path / ".net" / "folder"
    for folder, text in ((place, "old"), (new, "new")):
        folder.mkdir(parents=True)
        (folder / "README.md").write_text(text)
    move = Path.replace

    def interrupted(path, target):
        if path == new:
            raise KeyboardInterrupt
        return move(path, target)

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        packing.replace_folder(new, place)
    assert (place / "README.md").read_text() == "old"
    monkeypatch.undo()
    packing.replace_folder(new, place)
    assert (place / "README.md").read_text() == "new"


# Where the tensors come from, and how they are stored -----------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_storage_is_measured_as_stored(run, packer, digits, dtype):
    """The independent reference: the trained weights rounded by torch, batch norm's counters as they are."""
    made = packer(read_checkpoint(run.folder), data=digits, dtype=dtype, tolerance=5)
    torch_dtype = getattr(torch, dtype)
    stored = load_file(packer.folder / "model.safetensors")
    trained = run.model.state_dict()
    for name, tensor in trained.items():
        expected = tensor.to(torch_dtype) if tensor.is_floating_point() else tensor
        assert stored[name].dtype == expected.dtype
        assert torch.equal(stored[name], expected), name
    size = sum(tensor.numel() * tensor.element_size() for tensor in stored.values())
    assert size < made.bytes < size + 20_000
    rounded = timm.create_model(ARCH, num_classes=10, stages=(0, 2))
    rounded.load_state_dict(stored)
    x = torch.randn(4, 3, 32, 32)
    assert torch.equal(logits(load(packer.folder), x), logits(rounded, x))
    assert dataclasses.astuple(made.metrics) == pytest.approx(measured(rounded, digits), abs=1e-4)
    with safe_open(packer.folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def in_one_storage(tensors):
    """Every floating tensor a view of one, as foreach optimizers and flattening wrappers leave them."""
    floating = [t for t in tensors.values() if t.is_floating_point()]
    parts = iter(torch.cat([t.flatten() for t in floating]).split([t.numel() for t in floating]))
    return {k: next(parts).view(t.shape) if t.is_floating_point() else t for k, t in tensors.items()}


def each(function, ndim=None):
    def convert(tensors):
        chosen = {k for k, t in tensors.items() if t.is_floating_point() and ndim in (None, t.ndim)}
        return {k: function(t) if k in chosen else t for k, t in tensors.items()}

    return convert


MEMORY = {  # the same numbers elsewhere, as trainings leave them
    "channels_last": each(lambda t: t.to(memory_format=torch.channels_last), 4),
    "transposed": each(lambda t: t.t().contiguous().t(), 2),
    "in one storage": in_one_storage,
    "expanded": lambda tensors: tensors | {"backbone.fc.bias": torch.ones(()).expand(10)},
    "tied": lambda tensors: tensors | {"mixer.norms.0_avgmax.bias": tensors["mixer.norms.0_avgmax.weight"]},
    "parameters": each(torch.nn.Parameter),
    "bfloat16": each(torch.Tensor.bfloat16),
}


@pytest.mark.parametrize("kind", MEMORY)
def test_tensors_may_lie_in_any_memory(run, packer, kind):
    saved = read_checkpoint(run.folder)
    tensors = MEMORY[kind](saved.tensors)
    made = packer(dataclasses.replace(saved, tensors=tensors, top1=None))
    stored = load_file(packer.folder / "model.safetensors")
    for name, tensor in tensors.items():
        assert torch.equal(stored[name], tensor.detach().float() if tensor.is_floating_point() else tensor), name
    assert made.bytes < sum(tensor.numel() * 4 for tensor in tensors.values()) + 20_000
    load(packer.folder)


@pytest.mark.parametrize(("value", "dtype"), [(float("nan"), "float32"), (float("inf"), "bfloat16"), (1e5, "float16")])
def test_what_a_type_cannot_hold_is_refused(run, packer, value, dtype):
    saved = read_checkpoint(run.folder)
    tensors = saved.tensors | {"mixer.expand.weight": torch.full_like(saved.tensors["mixer.expand.weight"], value)}
    saved = dataclasses.replace(saved, tensors=tensors)
    refused(packer, rf"^mixer\.expand\.weight has values that are not finite in {dtype}\.$", saved, dtype=dtype)


def test_a_checkpoint_of_ddp_and_of_the_compiler_is_read(run, tmp_path):
    saved = torch.load(run.folder / "last.pth.tar", weights_only=False)
    for prefix in ("module.", "_orig_mod.", "_orig_mod.module."):
        tensors = {prefix + name: tensor for name, tensor in saved["state_dict"].items()}
        torch.save(saved | {"state_dict": tensors}, tmp_path / "last.pth.tar")
        assert read_checkpoint(tmp_path).tensors.keys() == run.model.state_dict().keys()
    assert clean_state_dict(tensors).keys() == run.model.state_dict().keys()


def test_ema_weights_are_taken_on_request(run, packer):
    packer(read_checkpoint(run.folder, use_ema=True))
    x = torch.randn(4, 3, 32, 32)
    assert torch.equal(logits(load(packer.folder), x), logits(run.ema, x))
    assert not torch.equal(logits(run.ema, x), logits(run.model, x))


def test_what_the_run_claims_is_claimed_of_the_weights_that_it_validated(run, tmp_path):
    """With --model-ema train.py validates the EMA weights last, and writes that into summary.csv."""
    claims = {}
    for label, args in {
        "plain": {},
        "ema": {"model_ema": True},
        "ema on the cpu": {"model_ema": True, "model_ema_force_cpu": True},
    }.items():
        folder = changed(run, tmp_path / label, summary=77.5, **args)
        claims[label] = [read_checkpoint(folder, use_ema=ema).top1 for ema in (False, True)]
    assert claims == {"plain": [77.5, None], "ema": [None, 77.5], "ema on the cpu": [77.5, None]}


def test_a_run_without_ema_says_so(run, tmp_path):
    saved = torch.load(run.folder / "last.pth.tar", weights_only=False)
    del saved["state_dict_ema"]
    torch.save(saved, tmp_path / "last.pth.tar")
    with pytest.raises(PackingError, match=r"last\.pth\.tar holds no 'state_dict_ema': is it a checkpoint of timm's"):
        read_checkpoint(tmp_path, use_ema=True)
    with pytest.raises(PackingError, match=r"net\.safetensors holds one set of weights: give it without EMA"):
        read_checkpoint(tmp_path / "net.safetensors", use_ema=True)


def test_a_folder_stands_for_its_last_epoch(run, tmp_path):
    assert read_checkpoint(run.folder).path == run.folder / "last.pth.tar"
    assert read_checkpoint(run.folder / "model_best.pth.tar").top1 == pytest.approx(run.top1)
    assert read_checkpoint(run.folder).epochs == 1
    folder = changed(run, tmp_path / "more")
    (folder / "summary.csv").write_text("epoch,eval_top1\n0,1\n1,2\nepoch,eval_top1\n0,3\n")
    assert read_checkpoint(folder).top1 == 3.0, "the last row of this epoch, after a resume"
    for text in ("", "epoch,train_loss\n0,1\n", "epoch,eval_top1\n9,1\n", "loss\n1\n"):
        (folder / "summary.csv").write_text(text)
        assert read_checkpoint(folder).top1 is None


def test_a_safetensors_file_needs_to_be_told(run, packer, tmp_path):
    path = tmp_path / "trained.safetensors"
    save_file(run.model.state_dict(), path)
    mix, named = {"stages": [0, 2], "input_size": None}, {"mixer": DEFAULT_MIXER}
    for told in ({}, {"seed": 1}, {"epochs": 2}):
        saved = read_checkpoint(path, model_kwargs={"stages": [0, 2]}, **told)
        refused(packer, r"trained\.safetensors does not say how it was trained: state epochs and seed\.$", saved)
    made = packer(read_checkpoint(path, model_kwargs={"stages": [0, 2]}, seed=1, epochs=2))
    assert (made.seeds, made.epochs, made.recipe) == ((1,), 2, {"model_kwargs": named | {"stages": [0, 2]}, "seed": 1})
    assert mix["stages"] == made.model_args["stages"]
    wrong = read_checkpoint(path, seed=1, epochs=2)
    with pytest.raises(WeightsError, match=r"trained\.safetensors is not a checkpoint of convmix_test_resnet: "):
        packer(wrong, name=f"{ARCH}.other")


# What is refused ------------------------------------------------------------------------------------------------------


class Malice:
    """An object whose unpickling runs a command."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("where", ["file", "args", "tensor"])
def test_a_pickle_that_runs_code_is_refused(run, tmp_path, where):
    marker, path = tmp_path / "it_ran", tmp_path / "last.pth.tar"
    saved = torch.load(run.folder / "last.pth.tar", weights_only=False)
    if where == "file":
        path.write_bytes(pickle.dumps(Malice(marker)))
    elif where == "args":
        torch.save(saved | {"args": argparse.Namespace(**vars(saved["args"]), more=Malice(marker))}, path)
    else:
        torch.save(saved | {"state_dict": {"mixer.expand.weight": Malice(marker)}}, path)
    with pytest.raises(PackingError, match=r"last\.pth\.tar cannot be read as a checkpoint \(") as error:
        read_checkpoint(tmp_path)
    assert "\n" not in str(error.value)
    assert not marker.exists()
    os.system(f"touch {marker}")  # noqa: S605  (it would have worked)
    assert marker.exists()


def test_what_is_no_checkpoint_is_refused(tmp_path):
    path = tmp_path / "last.pth.tar"
    with pytest.raises(PackingError, match=r"last\.pth\.tar: no such file; give a train\.py output folder, or a file"):
        read_checkpoint(tmp_path)
    with pytest.raises(PackingError, match=r"x\.safetensors: no such file"):
        read_checkpoint(tmp_path / "x.safetensors")
    for bad in (b"", b"text", b"\x80\x02}."):
        path.write_bytes(bad)
        with pytest.raises(PackingError, match=r"last\.pth\.tar (cannot be read as a checkpoint|holds no) "):
            read_checkpoint(tmp_path)
    (tmp_path / "x.safetensors").write_bytes(b"{}")
    with pytest.raises(PackingError, match=r"x\.safetensors cannot be read as a checkpoint \("):
        read_checkpoint(tmp_path / "x.safetensors")
    torch.save({"state_dict": {}, "epoch": 3}, path)
    with pytest.raises(PackingError, match=r"holds no 'args': is it a checkpoint of timm's train\.py\?"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("off", [-0.2, 0.2, 40])
def test_a_claim_that_does_not_hold_is_refused(run, packer, digits, off):
    saved = dataclasses.replace(read_checkpoint(run.folder), top1=run.top1 + off)
    refused(
        packer, rf"^{NAME}: top-1 is {run.top1:.2f} % of 360 images, but the training run measured", saved, data=digits
    )
    packer(dataclasses.replace(saved, top1=run.top1 + off / 1000), data=digits)


def test_another_preprocessing_is_noticed(run, packer, digits, tmp_path):
    """The same weights measured on images of another range: the claim gives it away."""
    folder = changed(run, tmp_path / "other", summary=run.top1, mean=[0.9, 0.9, 0.9], std=[0.1, 0.1, 0.1])
    refused(
        packer,
        r"but the training run measured .* another preprocessing\? Nothing was packed\.$",
        read_checkpoint(folder),
        data=digits,
    )


def test_a_model_that_loads_otherwise_is_refused(run, packer, monkeypatch):
    """What the folder gives is compared with the checkpoint, bit by bit."""
    real = timm.create_model

    def create(name, **kwargs):
        model = real(name, **kwargs)
        if name.startswith("local-dir:"):
            with torch.no_grad():
                model.get_classifier().bias[3] += 1e-6
        return model

    monkeypatch.setattr(timm, "create_model", create)
    refused(
        packer,
        rf"^{NAME}: the reloaded model gives other logits than the checkpoint; nothing was packed\.$",
        read_checkpoint(run.folder),
    )


def test_another_architecture_is_refused(run, packer, tmp_path):
    saved = read_checkpoint(run.folder)
    refused(packer, rf"was trained as {ARCH}, not as convmix_resnet18:", saved, name="convmix_resnet18.x")
    refused(packer, r"convmix_nonsense\.x: timm knows no convmix_nonsense; see", saved, name="convmix_nonsense.x")
    for name in ("test_resnet.x", ARCH, f"{ARCH}.", f"{ARCH}.a/b", f"{ARCH}/../x.y", ""):
        refused(packer, r"^name: '.*' is not convmix_<arch>\.<tag>$", saved, name=name, error=ManifestError)
    other = dataclasses.replace(saved, args=saved.args | {"model": "convmix_test_convnext"})
    refused(
        packer,
        "is not a checkpoint of convmix_test_convnext: ",
        other,
        name="convmix_test_convnext.x",
        error=WeightsError,
    )
    half = {name: tensor for name, tensor in saved.tensors.items() if "mixer" not in name}
    half = dataclasses.replace(saved, tensors=half)
    refused(packer, r"last\.pth\.tar is not a checkpoint of .*: \d+ missing \(mixer\.", half, error=WeightsError)


def test_a_class_count_that_differs_is_refused(run, packer, digits, tmp_path):
    three = tmp_path / "three" / "validation"
    three.mkdir(parents=True)
    for label in "012":
        (three / label).symlink_to(Path(digits, "validation", label))
    refused(
        packer, r"of another shape \(backbone\.fc", read_checkpoint(run.folder), data=three.parent, error=WeightsError
    )


def test_no_images_are_refused(run, packer, digits, tmp_path):
    saved = read_checkpoint(run.folder)
    (tmp_path / "empty" / "validation" / "0").mkdir(parents=True)
    for data, split in [(tmp_path / "absent", "validation"), (tmp_path / "empty", "validation"), (digits, "test")]:
        images = Images(data_dir=data, split=split)
        refused(packer, rf"no images of the split '{split}' as {split}/CLASS/\* \(", saved, images=images)
    inside = Images(data_dir=Path(digits) / "validation")
    refused(packer, r"validation: no images of the split 'validation' as ", saved, images=inside)


def test_a_split_goes_by_timms_other_names_too(digits, tmp_path):
    (tmp_path / "val").symlink_to(Path(digits, "validation"))
    dataset = open_dataset(tmp_path, "validation")
    assert dataset_checksum(dataset) == dataset_checksum(open_dataset(digits, "validation"))


@pytest.mark.parametrize("damage", ["{", '{"schema": 2, "weights": {}}'])
def test_a_manifest_that_cannot_be_read_stays(run, packer, damage):
    packer.manifest.write_text(damage)
    refused(packer, r"manifest\.json: ", read_checkpoint(run.folder), error=ManifestError)
    assert packer.manifest.read_text() == damage


def test_a_disk_that_is_full_leaves_the_old_folder(run, packer, monkeypatch):
    first = packer(read_checkpoint(run.folder))
    monkeypatch.setattr(packing, "format_recipe", lambda recipe: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space left"):
        packer(read_checkpoint(run.folder), dtype="float16")
    assert read_manifest(packer.manifest) == {NAME: first}
    assert [path.name for path in packer.folder.parent.iterdir()] == [NAME]
    assert sha256((packer.folder / "model.safetensors").read_bytes()).hexdigest() == first.sha256


# What train.py built --------------------------------------------------------------------------------------------------


def test_a_pooling_that_train_py_was_given_is_kept(run, packer, tmp_path):
    """--gp is no part of --model-kwargs, and changes what the model computes."""
    made = packer(read_checkpoint(changed(run, tmp_path / "max", gp="max")))
    assert made.model_args["global_pool"] == "max"
    x = torch.randn(4, 3, 32, 32)
    expected = run.model.get_classifier()(run.model.forward_features(x).amax((2, 3)))
    torch.testing.assert_close(logits(load(packer.folder), x), expected.detach())


def test_an_epsilon_that_train_py_was_given_is_kept(packer):
    """--bn-eps, of the families that know it."""
    arch = "convmix_test_efficientnet"
    model = timm.create_model(arch, num_classes=10, bn_eps=0.1).eval()
    args = ARGS | {"model": arch, "model_kwargs": {}, "bn_eps": 0.1}
    made = packer(Checkpoint(Path("eps"), model.state_dict(), args, epochs=1), name=f"{arch}.x")
    assert made.model_args["bn_eps"] == 0.1
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(logits(load(packer.folder.with_name(f"{arch}.x")), x), logits(model, x))


@pytest.mark.parametrize("args", [{"in_chans": 1}, {"input_size": [1, 32, 32], "img_size": None}])
def test_grey_images_are_measured_in_grey(digits, packer, args):
    """As train.py reads them for a model of one channel."""
    model = timm.create_model(ARCH, num_classes=10, in_chans=1).eval()
    saved = Checkpoint(Path("grey"), model.state_dict(), ARGS | {"model_kwargs": {}} | args, epochs=1)
    made = packer(saved, data=digits)
    assert (made.input_size, made.mean, made.std) == ((1, 32, 32), (0.5,), (0.5,))
    x, y, _ = pixels(digits, "validation")
    top1 = 100 * (logits(model, x[:, :1]).argmax(1) == y).float().mean().item()
    assert made.metrics.top1 == pytest.approx(top1, abs=1e-4)
    assert torch.equal(logits(load(packer.folder), x[:4, :1]), logits(model, x[:4, :1]))


# The recipe -----------------------------------------------------------------------------------------------------------


def test_the_recipe_is_what_train_py_was_given(run, packer):
    recipe = packer(read_checkpoint(run.folder)).recipe
    assert yaml.safe_load((packer.folder / "recipe.yaml").read_text()) == recipe
    given = {key: value for key, value in ARGS.items() if value not in (None, "", [], {})}
    places = {"experiment", "local_rank"}
    given["model_kwargs"] = {"mixer": DEFAULT_MIXER} | ARGS["model_kwargs"]  # which may be another later
    assert recipe == {key: value for key, value in given.items() if key not in places}
    assert recipe["model_ema"] is False


@pytest.mark.parametrize(
    "text", ["yes", "null", "1e-3", "a: b # c", "\u00e9\u2028\U0001f600", "2026-11-24", "'", "- x", ""]
)
def test_the_recipe_keeps_every_text(text):
    for recipe in ({"opt": text}, {"opt_kwargs": {text: [text, 1e-7, True, None]}}, {"lr": 1e-5, "n": 10**15}):
        assert yaml.safe_load(packing.format_recipe(recipe)) == recipe


@pytest.mark.skipif(not SCRIPTS, reason="set TIMM_SCRIPTS to a folder with timm's train.py (it is not in its wheel)")
def test_train_py_reads_the_recipe(run, packer, monkeypatch):
    """Its own parser: every value arrives as it was, the rest is the default, no name is unknown."""
    made = packer(read_checkpoint(run.folder))
    spec = importlib.util.spec_from_file_location("train_py", Path(SCRIPTS) / "train.py")
    train_py = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(train_py)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    defaults = vars(train_py._parse_args()[0])
    monkeypatch.setattr(sys, "argv", ["train.py", "-c", str(packer.folder / "recipe.yaml"), "--data-dir", "DATA"])
    args = vars(train_py._parse_args()[0])
    assert args == defaults | made.recipe | {"data_dir": "DATA"}
    assert made.recipe.keys() <= defaults.keys()
    assert not packing.PLACES - defaults.keys() - {"config"}


# The baseline ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def plain(packer):
    """A packed baseline, and the checkpoint it is made of: the same arguments, no mixer."""
    model = timm.create_model(ARCH, num_classes=10, mixer="none").eval()
    args = ARGS | {"model_kwargs": {"mixer": "none"}}
    saved = Checkpoint(Path("plain"), model.state_dict(), args, epochs=1)
    return saved, packer(saved, name=PLAIN)


def test_a_paired_baseline_is_recorded(run, packer, plain):
    made = packer(read_checkpoint(run.folder), baseline=PLAIN)
    assert made.baseline == manifests.Baseline(name=PLAIN, metrics=plain[1].metrics)
    assert read_manifest(packer.manifest) == {NAME: made, PLAIN: plain[1]}
    card = (packer.folder / "README.md").read_text()
    assert f"| paired baseline without mixer, {PLAIN} | {plain[1].metrics.top1:.2f} |" in card
    assert "trained as the baseline" in (packer.folder.with_name(PLAIN) / "README.md").read_text()


@pytest.mark.parametrize(
    ("named", "changes"),
    [
        ("lr", {"lr": 0.1}),
        ("seed", {"seed": 4}),
        ("img_size, lr", {"lr": 0.1, "img_size": 64}),
        ("mixup", {"mixup": 0.2}),
        ("model_kwargs", {"model_kwargs": {"mixer": "none", "drop_rate": 0.5}}),
    ],
)
def test_a_baseline_of_another_recipe_is_refused(run, packer, plain, named, changes):
    saved = read_checkpoint(run.folder)
    packer(dataclasses.replace(plain[0], args=plain[0].args | changes), name=PLAIN)
    with pytest.raises(PackingError) as error:
        packer(saved, baseline=PLAIN)
    assert str(error.value) == f"{PLAIN} was trained otherwise ({named}): that is no paired baseline."
    assert not packer.folder.exists()


def test_a_baseline_that_was_cut_short_is_refused(run, packer, plain):
    """Its recipe says two epochs, like ours, but it was stopped after another number of them."""
    packer(dataclasses.replace(plain[0], epochs=2), name=PLAIN)
    with pytest.raises(PackingError, match=rf"^{PLAIN} was trained otherwise \(epochs_trained\)"):
        packer(read_checkpoint(run.folder), baseline=PLAIN)


def test_a_baseline_on_other_images_is_refused(run, packer, plain, few):
    packer(plain[0], name=PLAIN, images=Images(data_dir=few, split="train"))
    with pytest.raises(PackingError, match=rf"^{PLAIN} was trained otherwise \(images\)"):
        packer(read_checkpoint(run.folder), baseline=PLAIN)


def test_a_baseline_of_another_architecture_is_refused(run, packer, plain):
    """A safetensors file says nothing of its architecture: the name does."""
    other = "convmix_test_convnext.plain"
    args = {key: value for key, value in plain[0].args.items() if key not in ("model", "model_kwargs")}
    model = timm.create_model("convmix_test_convnext", num_classes=10, mixer="none")
    packer(Checkpoint(Path("c"), model.state_dict(), args | {"model_kwargs": {"mixer": "none"}}, epochs=1), name=other)
    saved = read_checkpoint(run.folder)
    mine = {key: value for key, value in saved.args.items() if key in args} | {"model_kwargs": {"stages": [0, 2]}}
    with pytest.raises(PackingError, match=rf"^{other} was trained otherwise \(.*architecture"):
        packer(dataclasses.replace(saved, args=mine), baseline=other)


def test_what_is_no_baseline_is_refused(run, packer, plain):
    packer(read_checkpoint(run.folder), name=f"{ARCH}.mixed")
    for name in (f"{ARCH}.absent", f"{ARCH}.mixed", "nonsense"):
        with pytest.raises(PackingError, match=rf"^{name} is no packed plain backbone \(mixer 'none'\): pack it first"):
            packer(read_checkpoint(run.folder), baseline=name)
    assert not packer.folder.exists()


# The licence ----------------------------------------------------------------------------------------------------------


def of_licence(words):
    """A warm start whose own licence is one of these."""
    return next(row["name"] for row in timm_convmix.list_weights() if row["license"] in words)


def test_a_base_that_forbids_something_asks_for_a_licence(run, packer):
    name = of_licence({"cc-by-nc-4.0"})
    arch = name.partition(".")[0]
    terms = get_pretrained_cfg(name).license
    args = {"model": name, "pretrained": True}
    plain = name.removeprefix("convmix_")
    message = rf"was trained from {plain}, whose licence is {terms}: state under which one .* with --license\.$"
    saved = dataclasses.replace(read_checkpoint(run.folder), args=ARGS | args)
    refused(packer, message, saved, name=f"{arch}.mine")
    base, licence = origin_of(args, None, "cc-by-nc-4.0", "x")
    assert (base.name, base.license, licence) == (plain, terms, "cc-by-nc-4.0")


@pytest.mark.parametrize("args", [{"pretrained_path": "/data/best.pth"}, {"initial_checkpoint": "/data/best.pth"}])
def test_a_base_of_unknown_licence_asks_for_one(run, packer, args):
    saved = dataclasses.replace(read_checkpoint(run.folder), args=ARGS | {"pretrained": True} | args)
    refused(packer, r"was trained from best\.pth, whose licence is unknown: state under which one", saved)
    made = packer(saved, license="mit")
    assert (made.base, made.license) == (manifests.Base(name="best.pth", license="unknown"), "mit")
    card = (packer.folder / "README.md").read_text()
    assert "Fine-tuned from best.pth (unknown)." in card
    assert "base_model" not in ModelCard(card).data.to_dict(), "a file of one's own is no repository of timm's"


def test_an_open_base_passes_its_licence_on(run, packer):
    saved = dataclasses.replace(read_checkpoint(run.folder), args=ARGS | {"pretrained": True})
    made = packer(saved)
    assert (made.base, made.license) == (
        manifests.Base(name="test_resnet.r160_in1k", license="apache-2.0"),
        "apache-2.0",
    )
    card = ModelCard((packer.folder / "README.md").read_text())
    assert card.data.base_model == "timm/test_resnet.r160_in1k"
    assert "Fine-tuned from test_resnet.r160_in1k (apache-2.0)." in card.text
    assert packer(saved, license="mit").license == "mit"
    assert packer(saved, base="theirs", license="mit").base.name == "theirs"


def test_a_base_of_this_packages_own_keeps_its_name(monkeypatch):
    own = dataclasses.replace(get_pretrained_cfg(ARCH), tag="digits", license="mit")
    monkeypatch.setattr(packing, "get_pretrained_cfg", lambda name: own)
    base, licence = origin_of({"model": ARCH, "pretrained": True}, None, None, NAME)
    assert (base.name, licence) == (NAME, "mit")


def test_a_training_from_scratch_is_apache(run, packer):
    assert origin_of({"model": ARCH, "pretrained": False}, None, None, NAME) == (None, "apache-2.0")
    assert origin_of({}, None, "mit", NAME) == (None, "mit")
    with pytest.raises(PackingError, match=r"was trained from theirs\.x, whose licence is unknown"):
        origin_of({}, "theirs.x", None, NAME)


# Inside the package ---------------------------------------------------------------------------------------------------


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of the test's own to embed into."""
    folder = tmp_path / "package"
    folder.mkdir()
    monkeypatch.setattr(packing, "PACKAGE", folder)
    monkeypatch.setattr(manifests, "PACKAGE", folder)
    return folder


def test_an_embedded_weight_loads_by_its_tag(run, packer, package, monkeypatch):
    made = packer(read_checkpoint(run.folder), embed=True, dtype="bfloat16", tolerance=5)
    assert made.embedded == f"{NAME}.safetensors"
    embedded = package / "embedded" / f"{NAME}.safetensors"
    assert embedded.read_bytes() == (packer.folder / "model.safetensors").read_bytes()
    monkeypatch.setattr(registry, "read_manifest", lambda: read_manifest(packer.manifest))
    try:
        tell_timm()
        x = torch.randn(2, 3, 32, 32)
        model = timm.create_model(ARCH, pretrained=True)
        assert torch.equal(logits(model, x), logits(load(packer.folder), x))
        assert model.pretrained_cfg["label_names"] == tuple("0123456789")
    finally:
        monkeypatch.undo()
        tell_timm()


def tell_timm():
    registry.register_variants()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # timm warns of a name that is taken
        setattr(registry, ARCH, register_model(registry.entrypoint(ARCH.removeprefix("convmix_"))))


def test_what_is_too_large_for_a_wheel_is_refused(run, packer, package, monkeypatch):
    monkeypatch.setattr(packing, "EMBEDDED_LIMIT", 1000)
    refused(
        packer,
        rf"^{NAME}\.safetensors has \d+ bytes; only files of up to 1000 travel in the package\.$",
        read_checkpoint(run.folder),
        embed=True,
    )
    assert not list(package.iterdir())


# The card -------------------------------------------------------------------------------------------------------------


def test_the_card_has_what_the_hub_reads(run, packer):
    made = packer(read_checkpoint(run.folder))
    card = ModelCard((packer.folder / "README.md").read_text(encoding="utf-8"))
    data = card.data.to_dict()
    assert (data["license"], data["library_name"], data["pipeline_tag"]) == (
        "apache-2.0",
        "timm_convmix",
        "image-classification",
    )
    assert {"timm", "timm_convmix"} <= set(data["tags"])
    assert data["datasets"] == [made.dataset.name]
    (index,) = data["model-index"]
    assert index["name"] == NAME
    metrics = {m["name"]: m["value"] for result in index["results"] for m in result["metrics"]}
    assert metrics == pytest.approx(
        {"top-1 accuracy, %": made.metrics.top1, "top-5 accuracy, %": made.metrics.top5}, abs=1e-3
    )
    assert {result["dataset"]["split"] for result in index["results"]} == {"validation"}


def test_the_card_tells_how_to_load_it(run, packer):
    made = packer(read_checkpoint(run.folder))
    text = (packer.folder / "README.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    lines = snippet.splitlines()
    assert lines[0] == "import timm"
    assert lines[1].startswith("import timm_convmix"), "without it timm knows no such model"
    assert f'timm.create_model("{NAME}", pretrained=True)' in snippet
    assert 'timm.create_model("hf-hub:me/net", pretrained=True)' in format_card(NAME, made, repo="me/net")
    compile(snippet, "card", "exec")
    assert f"| this model | {made.metrics.top1:.2f} | {made.metrics.top5:.2f} | {made.metrics.loss:.4f} |" in text
    for fact in (made.sha256, str(made.bytes), "20 images", "seed 3", "1 epochs", "Trained from scratch", "32x32"):
        assert fact in text, fact


HAND = "# My notes\n\nWritten by hand, with a line\n---\nand ``code``."


@pytest.mark.parametrize(
    "existing",
    [
        f"---\nlicense: mit\nlanguage: de\n---\n{HAND}",
        f"---\r\nlicense: mit\r\nlanguage: de\r\n---\r\n{HAND}".replace("\r\n", "\n").replace("\n", "\r\n"),
        f"\n---\nlanguage: de\nmodel-index: broken\n---\n\n{HAND}\n",
        f"---\nlanguage: de\n---\nfirst\n{BEGIN}\nstale\n{END}\n{HAND}\n",
        f"---\nlanguage: de\n---\n{END}\n{HAND}\n{BEGIN} opened and not closed",
    ],
    ids=["plain", "CRLF", "broken index", "ours", "marks astray"],
)
def test_what_is_written_by_hand_is_kept(existing):
    text = format_card(NAME, record(), existing=existing)
    again = format_card(NAME, record(), existing=text)
    assert again == text, "a second time changes nothing"
    assert HAND in text
    assert "stale" not in text
    assert text.count("sha256") == 1 + text.count("its sha256")
    assert ("first" in text) == ("first" in existing)
    data = ModelCard(text).data.to_dict()
    assert (data["language"], data["license"]) == ("de", "apache-2.0")
    assert text.startswith("---\n")
    assert text.count("language: de") == 1, "the old header is no part of the text"
    assert Counter(re.findall(r"^# convmix.*$", text, flags=re.MULTILINE)) == {f"# {NAME}": 1}


def test_a_card_from_nothing_is_the_same_for_an_empty_one():
    assert format_card(NAME, record()) == format_card(NAME, record(), existing="")
    assert format_card(NAME, record(license="mit")) != format_card(NAME, record())
    newer = format_card(NAME, record(license="mit"), existing=format_card(NAME, record()))
    assert newer == format_card(NAME, record(license="mit"))


# timm's loader --------------------------------------------------------------------------------------------------------


def test_timms_loader_gives_what_the_reader_here_gives(digits):
    """The independent reader is itself compared, so that it cannot drift from what train.py validates on."""
    loader = create_loader(
        create_dataset("", root=str(digits), split="validation"),
        input_size=(3, 32, 32),
        batch_size=360,
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        crop_pct=1.0,
        num_workers=0,
        use_prefetcher=False,
        persistent_workers=False,
    )
    x, y = next(iter(loader))
    expected, labels, paths = pixels(digits, "validation")
    order = sorted(range(len(paths)), key=lambda i: str(paths[i]))
    torch.testing.assert_close(x, expected[order], atol=1e-6, rtol=0)
    assert torch.equal(y, labels[order])


def test_the_summary_is_as_train_py_writes_it(run):
    with (run.folder / "summary.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert float(row["eval_top1"]) == run.top1

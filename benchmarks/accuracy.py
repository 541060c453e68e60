"""What the schemes score: data set x backbone x scheme x seed, one row of benchmarks/results/accuracy.csv a run.

    python -m benchmarks.accuracy --data DIR --dataset-name cifar100 --arch resnet18_cifar --epochs 30
                                                        last, control and ConvMix on the test images, seeds 3 to 10
    python -m benchmarks.accuracy ... --select --schemes convmix grid norm_batch
                                                        on a tenth of the training images, held out, seeds 0 to 2
    python -m benchmarks.accuracy ... --device cuda     bfloat16; images, augmentation and model on the GPU
    python -m benchmarks.accuracy ... --save MODELS     keep the models
    python -m benchmarks.accuracy ... --init 'MODELS/{arch}-{scheme}-{seed}.safetensors'
                                                        start from them, with --freeze as linear probes; ConvMix starts
                                                        warm from {arch}-last

Runs of a seed are paired: the backbone and its classifier start alike, and data order and augmentation are the same
for every scheme. The score is that of the last epoch. A row that exists is not run again, unless its net is asked for
and absent, so a stopped command goes on when it is repeated; several processes may share a GPU, each with seeds or
schemes of its own.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import safetensors
import timm
import torch
from huggingface_hub.utils.tqdm import tqdm
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import schemes
from benchmarks.cost import count_macs, count_params
from benchmarks.images import (
    Epoch,
    Images,
    crop_and_flip,
    digest_of,
    first_classes,
    load_split,
    mean_and_std,
    normalise,
    split_hold_out,
    subset,
)
from benchmarks.timing import RESULTS, append_rows, conditions, read_rows_of
from timm_convmix import ConvMixError, ConvMixNet, PackingError, __version__
from timm_convmix.weights.loading import load_local, load_strictly

SELECTION_SEEDS, PROOF_SEEDS = range(3), range(3, 11)
"""Apart, so that no claim rests on a seed that helped to choose."""
EVALUATION_BATCH = 500
ECE_BINS = 15


# Rows -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a run's result depends on; a run of the same settings is not repeated.

    Args:
        dataset: Name, as it is shown.
        data: sha256 of the decoded images of both splits, its first 16 digits.
        split: 'test', or 'holdout': a tenth of the training images, not trained on.
        classes: The first ones of the data set.
        images: Trained on.
        fraction: The same, of those there are of these classes.
        size: Height and width in pixels.
        arch: Backbone, of timm.
        scheme: See ``benchmarks.schemes``.
        seed: Of the backbone, data order and augmentation.
        epochs: Over ``images``; the last batch of each is dropped where it is not full.
        batch: Images a step.
        opt: Optimizer, of timm.
        lr: Peak learning rate; it falls to zero along a cosine.
        momentum: Of the optimizer.
        weight_decay: Of everything but biases and norms.
        warmup: Share of the steps in which the learning rate rises.
        smoothing: Of the labels.
        padding: Pixels on each side before the random crop; 0 crops nothing. Half of the images are mirrored.
        init: Template of the file whose weights a run starts from, with its folder, or ''.
        init_sha256: Of that file, its first 16 digits.
        freeze: 1 where only the classifier is trained.
        mode: Number format, 'compiled' where it was.
    """

    dataset: str
    data: str
    split: str
    classes: int
    images: int
    fraction: float
    size: int
    arch: str
    scheme: str
    seed: int
    epochs: int
    batch: int
    opt: str
    lr: float
    momentum: float
    weight_decay: float
    warmup: float
    smoothing: float
    padding: int
    init: str
    init_sha256: str
    freeze: int
    mode: str


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What a classifier scores on a set of images.

    Args:
        top1: Percent.
        top5: Percent.
        loss: Mean cross-entropy, nats.
        ece: Expected calibration error, percent: mean gap of confidence and accuracy over 15 equal bins of confidence
            (Guo et al. 2017, arXiv:1706.04599).
        correct: Images of which the first guess is right.
        count: Images.
    """

    top1: float
    top5: float
    loss: float
    ece: float
    correct: int
    count: int


@dataclass(frozen=True, kw_only=True)
class Run(Scores, Settings):
    """A line of accuracy.csv: settings, scores, and the conditions.

    Args:
        train_loss: Mean of the last epoch, with smoothing and the side classifiers' losses.
        diverged: Epoch after which the loss was no number any more and the training stopped; 0 if it never was.
        seconds: Of training and scoring.
        params: Of the model.
        macs: Of an inference, an image.
        form: JSON: stages, mixer and its settings.
        device: Name of the processor that computed.
        threads: Of torch, on the CPU.
        load: Processes that ran or waited, mean of the minute before.
        torch: Version.
        timm: Version.
        timm_convmix: Version.
        python: Version.
        date: Day.
        argv: The command, of paths the last part only.
    """

    train_loss: float
    diverged: int
    seconds: float
    params: int
    macs: int
    form: str
    device: str
    threads: int
    load: float
    torch: str
    timm: str
    timm_convmix: str
    python: str
    date: str
    argv: str

    @property
    def key(self) -> tuple[object, ...]:
        """The settings."""
        return key_of(self)

    @property
    def gap(self) -> float:
        """From the training loss to that of the images it is scored on."""
        return self.loss - self.train_loss


def key_of(settings: Settings) -> tuple[object, ...]:
    """The values of the settings, in order."""
    return tuple(getattr(settings, field.name) for field in fields(Settings))


# Training and scoring -------------------------------------------------------------------------------------------------


def train(
    model: nn.Module,
    images: Images,
    settings: Settings,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    device: str = "cpu",
) -> tuple[float, int]:
    """Train in place.

    Args:
        model: Of ``schemes.build``, on the device.
        images: On the device.
        settings: Of which those from ``epochs`` on, and the seed, are read.
        mean: Per channel, in 0 to 1.
        std: The same.
        device: Of torch.

    Returns:
        The mean loss of the last epoch, and the epoch after which it was no number (0: never).
    """
    torch.manual_seed(settings.seed)  # for dropout, whatever the scheme drew before
    generator = torch.Generator().manual_seed(settings.seed)
    batch = min(settings.batch, len(images))
    steps = len(images) // batch
    optimizer = create_optimizer_v2(
        model, settings.opt, lr=settings.lr, weight_decay=settings.weight_decay, momentum=settings.momentum
    )
    total = settings.epochs * steps
    scheduler = CosineLRScheduler(optimizer, total, warmup_t=round(settings.warmup * total), t_in_epochs=False)
    criterion = LabelSmoothingCrossEntropy(settings.smoothing)
    model.train(not settings.freeze)
    if "compiled" in settings.mode:
        torch.compiler.reset()  # what was compiled for the run before counts against a limit
    run = torch.compile(model, mode="reduce-overhead") if "compiled" in settings.mode else model
    mean_loss = math.nan
    for epoch in (bar := tqdm(range(1, settings.epochs + 1), desc=settings.scheme, unit="epoch", leave=False)):
        plan = Epoch.draw(len(images), padding=settings.padding, generator=generator).to(device)
        losses = []
        for step in range(steps):
            chosen = slice(step * batch, (step + 1) * batch)
            pixels = images.pixels[plan.order[chosen]]
            x = normalise(
                crop_and_flip(pixels, plan.shift[chosen], plan.flip[chosen], padding=settings.padding), mean, std
            )
            scheduler.step_update((epoch - 1) * steps + step)
            with autocast(settings.mode, device):
                outputs = run(x)
            outputs = [logits.float() for logits in schemes.as_list(outputs)]
            loss = schemes.total_loss(outputs, images.labels[plan.order[chosen]], criterion)
            torch.autograd.backward(loss)
            optimizer.step()
            optimizer.zero_grad()  # before the next step, whose CUDA graph reuses the gradients' memory
            losses.append(loss.detach())
        mean_loss = float(torch.stack(losses).mean())  # the only wait for a GPU in an epoch
        bar.set_postfix(loss=f"{mean_loss:.3f}")
        if not math.isfinite(mean_loss):
            return mean_loss, epoch
    return mean_loss, 0


def autocast(mode: str, device: str) -> torch.autocast:
    """Half precision where the mode says so."""
    return torch.autocast(device.partition(":")[0], torch.bfloat16, enabled="bfloat16" in mode)


@torch.no_grad()
def score(
    model: nn.Module,
    images: Images,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    mode: str = "",
    device: str = "cpu",
) -> Scores:
    """Score a model on images, all on the device; other arguments as of ``train``."""
    model.eval()
    logits = []
    for pixels in torch.split(images.pixels, EVALUATION_BATCH):
        x = normalise(pixels.contiguous(memory_format=torch.channels_last), mean, std)
        with autocast(mode, device):
            logits.append(model(x).float())
    return score_logits(torch.cat(logits), images.labels)


def score_logits(logits: Tensor, labels: Tensor) -> Scores:
    """Score logits (N, K) against labels (N,)."""
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    confidence = logits.softmax(1).amax(1)
    bins = (confidence * ECE_BINS).ceil().long().clamp(1, ECE_BINS) - 1  # (0, 1/15], (1/15, 2/15], ...
    gaps = torch.zeros(ECE_BINS, device=logits.device).index_add(0, bins, best[:, 0].float() - confidence)
    return Scores(
        top1=100 * int(best[:, 0].sum()) / len(labels),
        top5=100 * int(best.sum()) / len(labels),
        loss=float(F.cross_entropy(logits, labels)),
        ece=100 * float(gaps.abs().sum()) / len(labels),
        correct=int(best[:, 0].sum()),
        count=len(labels),
    )


# Models ---------------------------------------------------------------------------------------------------------------


def start_from(model: Any, file: Path, *, num_classes: int, seed: int) -> None:
    """Load a saved run's weights and draw a new classifier, the same for every scheme.

    A plain backbone's weights warm-start a mixing scheme: it computes what the backbone does until it has learned.

    Args:
        model: A timm model or a ``ConvMixNet``.
        file: Safetensors, of a plain backbone or of the same scheme.
        num_classes: Of the new classifier.
        seed: Of the new classifier.

    Raises:
        WeightsError: The file does not fit.
        ValueError: It was saved while the scheme's name stood for something else.
    """
    tensors = load_local(file)
    check_form(model, file)
    mixed = any(name.startswith("mixer.") for name in tensors)
    if isinstance(model, ConvMixNet) and not mixed:
        model.mixer.start_as_identity()
        load_strictly(model.backbone, tensors, source=str(file), fresh_head=True)
    else:
        load_strictly(model, tensors, source=str(file), fresh_head=True)
    torch.manual_seed(seed)
    model.reset_classifier(num_classes)


def save_model(model: nn.Module, path: Path, settings: Settings, mean: Sequence[float], std: Sequence[float]) -> None:
    """Save a trained model with what rebuilds it; ``last`` is a checkpoint of timm, ConvMix one of this package."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    known = dict(settings=asdict(settings), form=schemes.describe(model), mean=mean, std=std)
    save_file(tensors, path, {key: json.dumps(value) for key, value in known.items()})


def read_metadata(path: Path) -> dict[str, Any]:
    """What ``save_model`` says of a model: settings, form, mean, std; {} for a file of something else.

    Raises:
        ValueError: The file is damaged.
    """
    if path.suffix != ".safetensors":
        return {}
    try:
        with safetensors.safe_open(path, "pt") as file:
            found = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path.name} cannot be read ({error}): train it again.") from error
    known = {key: json.loads(found[key]) for key in ("settings", "form", "mean", "std") if key in found}
    return known if len(known) == 4 else {}


def saved_file(folder: Path, settings: Settings) -> Path:
    """Where ``--save`` keeps a model.

    Raises:
        ValueError: A model of another training is there.
    """
    path = folder / f"{settings.arch}-{settings.scheme}-{settings.seed}.safetensors"
    own = asdict(settings)
    if path.is_file() and (other := read_metadata(path).get("settings")) != own:
        differing = [name for name in own if not other or own[name] != other.get(name)]
        raise ValueError(f"{path} is of another training ({', '.join(differing)}): give another --save.")
    return path


def check_form(model: nn.Module, path: Path) -> None:
    """Refuse a saved mixing scheme whose form is not the model's: a scheme's name may have stood for another then.

    Raises:
        ValueError: It is not.
    """
    own, saved = json.loads(json.dumps(schemes.describe(model))), read_metadata(path).get("form")
    if own and saved and own != saved:
        raise ValueError(f"{path.name} was saved with {saved}, and its scheme is {own} now: train it again.")


@dataclass(frozen=True)
class Saved:
    """A saved model.

    Args:
        model: In evaluation mode.
        settings: Of its run.
        mean: Per channel, in 0 to 1.
        std: The same.
        sha256: Of the file, its first 16 digits.
    """

    model: Any
    settings: Settings
    mean: list[float]
    std: list[float]
    sha256: str


def load_model(path: Path, device: str = "cpu") -> Saved:
    """Rebuild a model that ``save_model`` saved.

    Raises:
        ValueError: The file is none of those, or see ``check_form``.
    """
    known = read_metadata(path)
    if not known:
        raise ValueError(f"{path.name} does not say how it was trained: use a file of benchmarks.accuracy --save.")
    settings = Settings(**known["settings"])
    model = schemes.build(settings.arch, settings.scheme, num_classes=settings.classes, seed=settings.seed)
    check_form(model, path)
    model.load_state_dict(load_file(path))
    return Saved(model.to(device).eval(), settings, known["mean"], known["std"], short_sha256(path))


def short_sha256(path: Path) -> str:
    """The first 16 digits of a file's sha256."""
    return sha256(path.read_bytes()).hexdigest()[:16]


# From the command line to rows ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Data:
    """The images of a command.

    Args:
        train: Trained on.
        scored: Scored on.
        mean: Of those trained on, per channel, in 0 to 1.
        std: The same.
        settings: The fields of ``Settings`` that describe them.
    """

    train: Images
    scored: Images
    mean: list[float]
    std: list[float]
    settings: dict[str, Any]

    def to(self, device: str) -> "Data":
        """The same with the images on a device."""
        return replace(self, train=self.train.to(device), scored=self.scored.to(device))


def load_data(args: argparse.Namespace) -> Data:
    """Read and choose the images that the options ask for.

    Raises:
        ValueError: They ask for what there is not.
    """
    sets = [load_split(args.data, split, args.size) for split in ("train", "validation")]
    digest = digest_of(*sets)[:16]
    whole, scored = (first_classes(images, args.classes) for images in sets)
    if args.select:
        whole, scored = split_hold_out(whole)
    count = args.images or round(args.fraction * len(whole))
    chosen = subset(whole, count) if count != len(whole) else whole
    return Data(
        chosen,
        scored,
        *mean_and_std(chosen.pixels),
        dict(
            dataset=args.dataset_name,
            data=digest,
            split="holdout" if args.select else "test",
            classes=int(whole.labels.max()) + 1,
            images=len(chosen),
            fraction=round(len(chosen) / len(whole), 4),
            size=chosen.size,
        ),
    )


def list_settings(args: argparse.Namespace, data: dict[str, Any]) -> Iterator[tuple[Settings, Path | None]]:
    """What is to be run, and the file it starts from: all schemes of a seed before the next seed.

    Raises:
        FileNotFoundError: There is no file to start from.
    """
    recipe = {name: getattr(args, name) for name in ("epochs", "batch", "opt", "lr", "momentum", "weight_decay")}
    recipe |= dict(warmup=args.warmup, smoothing=args.smoothing, freeze=int(args.freeze), mode=name_mode(args))
    recipe["padding"] = data["size"] // 8 if args.padding is None else args.padding
    for seed in args.seeds:
        for arch in args.arch:
            for scheme in args.schemes:
                init = Path(args.init.format(arch=arch, scheme=scheme, seed=seed)) if args.init else None
                if init and not init.is_file():
                    raise FileNotFoundError(f"--init: there is no {init}; train it first, with --save.")
                yield (
                    Settings(
                        **data,
                        **recipe,
                        arch=arch,
                        scheme=scheme,
                        seed=seed,
                        init="/".join(Path(args.init).parts[-2:]),
                        init_sha256=short_sha256(init) if init else "",
                    ),
                    init,
                )


def name_mode(args: argparse.Namespace) -> str:
    """The number format, and whether the model is compiled."""
    words = [args.dtype or ("bfloat16" if args.device.startswith("cuda") else "float32")]
    return ", ".join(words + ["compiled"] * args.compile)


def run(settings: Settings, init: Path | None, data: Data, args: argparse.Namespace, command: Sequence[str]) -> Run:
    """Build, train and score one model, and save it where that is asked for.

    Args:
        settings: Of the run.
        init: The file whose weights it starts from.
        data: On the device.
        args: The options of the command line.
        command: Its words, for the record.
    """
    model: Any = schemes.build(settings.arch, settings.scheme, num_classes=settings.classes, seed=settings.seed)
    if init:
        start_from(model, init, num_classes=settings.classes, seed=settings.seed)
    params = count_params(model, torch.empty(0))
    macs = count_macs(model, torch.zeros(1, 3, settings.size, settings.size))
    if settings.freeze:
        model.requires_grad_(False)
        model.get_classifier().requires_grad_(True)
    model.to(args.device, memory_format=torch.channels_last)
    where: dict[str, Any] = dict(mean=data.mean, std=data.std, device=args.device)
    start = time.perf_counter()
    train_loss, diverged = train(model, data.train, settings, **where)
    scores = score(model, data.scored, mode=settings.mode, **where)
    seconds = time.perf_counter() - start
    if args.save:
        save_model(model, saved_file(args.save, settings), settings, data.mean, data.std)
    at = conditions(device=args.device, threads=args.threads, clock="wall", seed=settings.seed, argv=command)
    return Run(
        **asdict(settings),
        **asdict(scores),
        train_loss=train_loss,
        diverged=diverged,
        seconds=round(seconds, 1),
        params=params,
        macs=macs,
        form=json.dumps(schemes.describe(model)),
        timm_convmix=__version__,
        **{key: at[key] for key in ("device", "threads", "load", "torch", "timm", "python", "date", "argv")},
    )


def seeds(text: str) -> list[int]:
    """``3..5`` as [3, 4, 5], ``3`` as [3]."""
    first, _, last = text.partition("..")
    return list(range(int(first), int(last or first) + 1))


def fill_in(args: argparse.Namespace) -> None:
    """Put seeds and schemes in the place of what stands for them."""
    default = SELECTION_SEEDS if args.select else PROOF_SEEDS
    args.seeds = [seed for part in args.seeds for seed in part] if args.seeds else default
    args.schemes = schemes.ALL if args.schemes == ["all"] else args.schemes


def check_options(args: argparse.Namespace) -> None:
    """Refuse what cannot be run before anything is read.

    Raises:
        ValueError: A scheme or an architecture is unknown, or options do not go together.
    """
    for arch in args.arch:
        if not timm.is_model(arch):
            raise ValueError(f"Unknown architecture {arch!r}: choose one of timm.list_models().")
    for scheme in args.schemes:
        schemes.check_name(scheme)
        if args.init and scheme in schemes.OWN_CLASSIFIERS:
            raise ValueError(f"--init cannot start {scheme}, which has classifiers of its own: leave it out.")
    if args.freeze and not args.init:
        raise ValueError("--freeze trains a classifier on features that were learned before: add --init.")
    if args.epochs < 1:
        raise ValueError(f"--epochs {args.epochs} trains nothing: give 1 or more.")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_argument_group("what is run")
    what.add_argument("--data", type=Path, required=True, help="holds train/CLASS/* and validation/CLASS/*")
    what.add_argument("--dataset-name", required=True, help="as it is shown: cifar10, cifar100, tiny, ...")
    what.add_argument("--arch", nargs="+", default=["resnet18_cifar"], help="of timm, without the prefix")
    what.add_argument("--schemes", nargs="+", default=["last", "control", "convmix"], help="'all', or names")
    what.add_argument("--seeds", type=seeds, nargs="+", metavar="N|N..M", help="0..2 with --select, else 3..10")
    what.add_argument("--select", action="store_true", help="score on a tenth of the training images, held out")
    what.add_argument("--classes", type=int, metavar="K", help="the first K classes only")
    amount = what.add_mutually_exclusive_group()
    amount.add_argument("--images", type=int, metavar="N", help="train on N images only, stratified")
    amount.add_argument("--fraction", type=float, default=1.0, help="train on a part of the images, stratified")
    what.add_argument("--size", type=int, metavar="PX", help="resize the images")
    what.add_argument("--init", default="", metavar="FILE", help="start from these weights; {arch} {scheme} {seed}")
    what.add_argument("--freeze", action="store_true", help="train the classifier only")

    recipe = parser.add_argument_group("recipe")
    recipe.add_argument("--epochs", type=int, required=True)
    recipe.add_argument("--batch", type=int, default=128)
    recipe.add_argument("--opt", default="sgd", help="of timm; its sgd is Nesterov's")
    recipe.add_argument("--lr", type=float, default=0.1)
    recipe.add_argument("--momentum", type=float, default=0.9)
    recipe.add_argument("--weight-decay", type=float, default=5e-4)
    recipe.add_argument("--warmup", type=float, default=0.05, help="share of the steps")
    recipe.add_argument("--smoothing", type=float, default=0.0)
    recipe.add_argument("--padding", type=int, help="of the random crop (an eighth of the size)")

    how = parser.add_argument_group("how")
    how.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    how.add_argument("--dtype", choices=["bfloat16", "float32"], help="of autocast (bfloat16 on a GPU, else float32)")
    how.add_argument("--compile", action="store_true", help="train through torch.compile")
    how.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch, on the CPU")
    how.add_argument("--save", type=Path, metavar="DIR", help="keep each model as DIR/ARCH-SCHEME-SEED.safetensors")
    how.add_argument("--results", type=Path, default=RESULTS, help="folder of accuracy.csv")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run what has no row yet; the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    parser = build_parser()
    args = parser.parse_args(argv)
    fill_in(args)
    torch.set_num_threads(args.threads)
    torch.backends.cudnn.benchmark = True  # all batches have one shape
    command = ["python", "-m", "benchmarks.accuracy", *argv]
    path = args.results / "accuracy.csv"
    try:
        check_options(args)
        data = load_data(args)
        todo = list(list_settings(args, data.settings))
        files = [saved_file(args.save, settings) if args.save else None for settings, _ in todo]
    except (ValueError, OSError, PackingError) as error:
        parser.error(str(error))
    data = data.to(args.device)
    for (settings, init), file in zip(tqdm(todo, desc=args.dataset_name, unit="run"), files, strict=True):
        recorded = key_of(settings) in {row.key for row in read_rows_of(Run, path)}  # by another process, perhaps
        if recorded and (file is None or file.is_file()):
            continue
        try:
            row = run(settings, init, data, args, command)
        except (ConvMixError, ValueError) as error:
            parser.error(str(error))
        append_rows(path, [row])
    return 0


if __name__ == "__main__":
    sys.exit(main())

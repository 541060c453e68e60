"""What ConvMix costs: ratios of ``convmix_<arch>`` to its plain backbone.

    python -m benchmarks.cost                       the models below: counts, training step, inference
    python -m benchmarks.cost --compile --archs resnet18
    python -m benchmarks.cost --device cuda --batch 1 128
    python -m benchmarks.cost larger                the next larger backbone of the family instead of the twin
    python -m benchmarks.cost scaling               resolution and depth
    python -m benchmarks.cost schemes               every scheme of benchmarks.schemes on a small backbone
    python -m benchmarks.cost census                parameters and MACs of every registered architecture, in minutes
    python -m benchmarks.cost table --write         the tables of README and docs/cost.md, from benchmarks/results

``--check`` exits 1 where a bar fails. On a machine that does other work too, ``--threads 1 --clock process`` counts
only the time that the processor gave to this process; ``--keep-heap`` starts over with an allocator that hands nothing
back to the kernel.
"""

import argparse
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub.utils.tqdm import tqdm
from timm.models import get_pretrained_cfg
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import schemes
from benchmarks.timing import (
    CLOCKS,
    COST,
    README,
    RESULTS,
    Figures,
    Row,
    append_rows,
    compare,
    conditions,
    exact,
    markdown,
    provenance,
    read_rows,
    show_tables,
)
from timm_convmix.inspection import count_mixing
from timm_convmix.model import ConvMixNet

# What is compared, and what it may cost -------------------------------------------------------------------------------

LARGE = ("resnet18", "resnet50", "convnext_atto")
MOBILE = ("mobilenetv3_small_100", "efficientnet_b0")
SMALL_IMAGES = ("resnet18_cifar", "mobilenetv3_small_100_cifar", "tiny_cifar", "nano_cifar")
NEXT_LARGER = {
    "resnet18": "resnet34",
    "resnet50": "resnet101",
    "convnext_atto": "convnext_femto",
    "mobilenetv3_small_100": "mobilenetv3_large_100",
    "efficientnet_b0": "efficientnet_b1",
}
SCALING = [("resnet18", size) for size in (64, 128, 224, 288)] + [
    (arch, 224) for arch in ("resnet34", "resnet50", "resnet101")
]

STEADY = "eager, heap kept"
"""The mode that page faults do not disturb."""

BARS = {  # highest ratio at 224 px: of LARGE, of MOBILE
    "macs": (1.005, 1.005),
    "params": (1.08, 1.08),
    "saved_bytes": (1.02, 1.02),
    "training_ms": (1.02, 1.03),
    "inference_ms": (1.01, 1.02),
}
CENSUS_BAR = 1.10  # of every architecture but those of timm's own tests

KEEP_HEAP = {"MALLOC_TRIM_THRESHOLD_": "4294967296", "MALLOC_MMAP_THRESHOLD_": "4294967296"}
"""Environment that makes glibc keep what torch frees. By default it hands large blocks back to the kernel, and maps
and clears them anew in the next forward pass: a third of MobileNetV3-Small's time at batch 8, by luck more or less of
it for either model."""

TITLES = {
    "macs": "MACs",
    "params": "parameters",
    "saved_bytes": "bytes saved for backward",
    "cuda_peak_bytes": "CUDA peak of training",
    "training_ms": "training step",
    "inference_ms": "inference",
}


def bar_of(row: Row) -> float | None:
    """The highest ratio a row may have, if it has a bar."""
    if row.part == "census":
        return None if row.base.startswith("test_") else CENSUS_BAR
    if (row.part, row.input) != ("measure", "3x224x224") or row.base not in LARGE + MOBILE or row.metric not in BARS:
        return None
    return BARS[row.metric][row.base in MOBILE]


def fails(row: Row) -> bool:
    """Whether the whole interval lies above the bar."""
    bar = bar_of(row)
    return bar is not None and row.low > bar


# How one model is measured --------------------------------------------------------------------------------------------

Forward = Callable[[Tensor], Tensor]


def count_macs(model: nn.Module, images: Tensor) -> int:
    """Multiplications of an inference, an image: convolutions, matrix products and attention, as torch counts them."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(images)
    return counter.get_total_flops() // 2 // len(images)


def split_macs(model: ConvMixNet, images: Tensor) -> tuple[int, int]:
    """What ``count_macs`` counts of a twin, without its mixer and with it, in one pass instead of two."""
    mixing, total = count_mixing(model.eval(), images)
    return (total - mixing) // len(images), total // len(images)


def count_params(model: nn.Module, _images: Tensor) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in model.parameters())


def count_saved_bytes(model: nn.Module, images: Tensor) -> int:
    """Bytes that a training step keeps from the forward pass for the backward pass.

    Each storage counts once, the images' too; the model's own parameters and buffers do not.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        # while the loss lives the graph does, and no address is used again
        loss = torch.cat(schemes.as_list(model.train()(images))).sum()
    del loss
    return sum(kept.values())


def count_cuda_peak_bytes(model: nn.Module, images: Tensor) -> int:
    """Most bytes that torch held at once during a training step: the model's, gradients, momentum, activations."""
    own = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    model.zero_grad()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step = training_step(model, model, images)
    step(), step()  # the momentum lives from the second on
    return torch.cuda.max_memory_allocated() - before + own


def training_step(model: nn.Module, run: Forward, images: Tensor) -> Callable[[], object]:
    """Forward, backward and SGD with momentum; at rate 0, so that every step computes the same.

    Args:
        model: Whose parameters are trained.
        run: Images to logits: the model, or what the compiler made of it.
        images: (B, C, H, W).
    """
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    labels = torch.zeros(len(images), dtype=torch.long, device=images.device)

    def step() -> None:
        optimizer.zero_grad()
        torch.autograd.backward(schemes.total_loss(run(images), labels, F.cross_entropy))
        optimizer.step()

    return step


def inference(model: nn.Module, run: Forward, images: Tensor) -> Callable[[], object]:
    """Images to logits in evaluation mode; arguments as of ``training_step``."""
    model.eval()

    def infer() -> None:
        with torch.inference_mode():
            run(images)

    return infer


COUNTS: dict[str, Callable[[nn.Module, Tensor], int]] = {
    "macs": count_macs,
    "params": count_params,
    "saved_bytes": count_saved_bytes,
    "cuda_peak_bytes": count_cuda_peak_bytes,
}
TIMES: dict[str, Callable[[nn.Module, Forward, Tensor], Callable[[], object]]] = {
    "training_ms": training_step,
    "inference_ms": inference,
}


# How two are compared -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """Two architectures and what to measure of them.

    Args:
        part: The command.
        base: The architecture in the denominator.
        other: The one in the numerator.
        size: Height and width of the images, in pixels.
        batches: Times are measured at each, counts at the last.
        metrics: Keys of ``COUNTS`` and ``TIMES``.
    """

    part: str
    base: str
    other: str
    size: int
    batches: Sequence[int]
    metrics: Sequence[str]


def build_pair(base: str, other: str, device: str) -> tuple[nn.Module, Any]:
    """Two models; a twin's base is its own backbone, so that the same weights lie at the same place in memory.

    Args:
        base: An architecture of timm.
        other: Another, or ``BASE:SCHEME``.
        device: Of torch.
    """
    if other.startswith(f"{base}:"):
        scheme = other.removeprefix(f"{base}:")
        plain, model = (schemes.build(base, name, num_classes=100, seed=0).to(device) for name in ("last", scheme))
        return plain, model
    model = timm.create_model(other, device=device)
    return (model.backbone if other == f"convmix_{base}" else timm.create_model(base, device=device)), model


def run(task: Task, args: argparse.Namespace, command: Sequence[str]) -> Iterator[Row]:
    """Measure; a row at a time, so that an interrupted run loses nothing.

    Args:
        task: What.
        args: How: the options of the command line.
        command: The words of the command line, for the record.
    """
    torch.manual_seed(args.seed)
    pair = build_pair(task.base, task.other, args.device)
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    for model in pair:
        model.to(memory_format=layout)
    mode = name_mode(args)

    def row(metric: str, batch: int, figures: Figures) -> Row:
        return Row(
            part=task.part,
            base=task.base,
            other=task.other,
            metric=metric,
            mode=mode,
            batch=batch,
            input=f"3x{task.size}x{task.size}",
            **asdict(figures),
            **conditions(device=args.device, threads=args.threads, clock=args.clock, seed=args.seed, argv=command),
        )

    for batch in task.batches:
        images = torch.randn(batch, 3, task.size, task.size, device=args.device).to(memory_format=layout)
        for metric in task.metrics:
            if metric in COUNTS and batch != task.batches[-1]:
                continue
            try:
                figures = compare_models(metric, pair, images, args)
            except ValueError as error:  # batch norm cannot learn from one value a channel
                if batch > 1:
                    raise
                print(f"{task.base}, {TITLES[metric]} at batch 1: {error}", file=sys.stderr)
            else:
                yield row(metric, batch, figures)


def name_mode(args: argparse.Namespace) -> str:
    """What differs from run to run on one machine: eager or compiled, the layout, whether freed memory is kept."""
    words = ["compiled" if args.compile else "eager"]
    if args.channels_last:
        words.append("channels_last")
    if args.keep_heap:
        words.append("heap kept")
    return ", ".join(words)


def compare_models(metric: str, pair: tuple[nn.Module, nn.Module], images: Tensor, args: argparse.Namespace) -> Figures:
    """One metric of two models, (base, other)."""
    if metric in COUNTS:
        return exact(*(COUNTS[metric](model, images) for model in pair))
    torch.compiler.reset()
    runs = [torch.compile(model, dynamic=False) if args.compile else model for model in pair]
    functions = [TIMES[metric](model, run, images) for model, run in zip(pair, runs, strict=True)]
    return compare(*functions, seconds=args.seconds, clock=CLOCKS[args.clock])


def choose_tasks(args: argparse.Namespace) -> list[Task]:
    """What a command measures, by its defaults and options."""
    if args.what == "scaling":
        return [
            Task("scaling", arch, f"convmix_{arch}", size, (1,), ("macs", "inference_ms")) for arch, size in SCALING
        ]
    metrics = [metric for metric in (*COUNTS, *TIMES) if metric != "cuda_peak_bytes" or args.device.startswith("cuda")]
    if args.what == "schemes":
        return [
            Task("schemes", arch, f"{arch}:{scheme}", args.size or 32, args.batch or (128,), metrics)
            for arch in args.archs or ("resnet18_cifar",)
            for scheme in schemes.ALL
            if scheme != "last"
        ]
    if args.what == "larger":
        metrics = [metric for metric in metrics if not metric.endswith("bytes")]
        return [Task("larger", arch, NEXT_LARGER[arch], 224, (1,), metrics) for arch in NEXT_LARGER]
    tasks = []
    for arch in args.archs or LARGE + MOBILE + SMALL_IMAGES:
        size = args.size or get_pretrained_cfg(arch).input_size[-1]
        batches = args.batch or ((1, 8) if size > 64 else (1, 32))
        tasks.append(Task("measure", arch, f"convmix_{arch}", size, batches, metrics))
    return tasks


def take_census(pattern: str, args: argparse.Namespace, command: Sequence[str]) -> Iterator[Row]:
    """Parameters and MACs of the variants that fit a wildcard, each at its own input size, on the meta device."""
    at = conditions(device="meta", threads=args.threads, clock=args.clock, seed=args.seed, argv=command)
    for name in tqdm(timm.list_models(pattern, module="convmix"), unit="architecture"):
        base = name.removeprefix("convmix_")
        shape = get_pretrained_cfg(base).input_size
        plain, twin = build_pair(base, name, "meta")
        images = torch.zeros(1, *shape, device="meta")
        params = exact(count_params(plain, images), count_params(twin, images))
        for metric, figures in ("params", params), ("macs", exact(*split_macs(twin, images))):
            shown = "x".join(map(str, shape))
            yield Row(
                part="census", base=base, other=name, metric=metric, batch=1, input=shown, **asdict(figures), **at
            )


# Tables ---------------------------------------------------------------------------------------------------------------


def render(rows: Sequence[Row], census: Sequence[Row], *, brief: bool = False) -> str:
    """The tables, as Markdown.

    Args:
        rows: Of cost.csv.
        census: Of census.csv.
        brief: Only the twins that ``measure`` timed as torch comes, in the steadiest way there is, and the census.
    """
    if brief:
        measured = [row for row in rows if row.part == "measure"]
        steady = {(row.device, row.input) for row in measured if row.mode == STEADY}
        rows = [row for row in measured if row.mode == (STEADY if (row.device, row.input) in steady else "eager")]
    blocks: list[tuple[str, str, Sequence[Row]]] = []
    devices = dict.fromkeys(row.device for row in rows)
    for device in devices:
        here = [row for row in rows if row.device == device]
        where = f", {device}" if len(devices) > 1 else ""
        shapes = {row.input for row in here if row.part == "measure"}
        for shape in sorted(shapes, key=lambda shape: int(shape.rpartition("x")[2]), reverse=True):
            chosen = [row for row in here if (row.part, row.input) == ("measure", shape)]
            title = f"The twin to its plain backbone, {shape}{where}"
            blocks.append((title, pivot(chosen, label=lambda row: f"{row.base}, {row.mode}"), chosen))
        larger = [row for row in here if row.part == "larger"]
        title = f"The next larger backbone to the plain one{where}"
        blocks.append((title, pivot(larger, label=lambda row: f"{row.other} to {row.base}"), larger))
        scaling = [row for row in here if row.part == "scaling"]
        title = f"The twin to its plain backbone, as resolution and depth grow{where}"
        blocks.append((title, pivot(scaling, label=lambda row: f"{row.base}, {row.input}"), scaling))
        compared = [row for row in here if row.part == "schemes"]
        title = f"Every scheme to its plain backbone, 100 classes{where}"
        blocks.append((title, pivot(compared, label=lambda row: f"{row.other}, {row.input}"), compared))
    if census:
        title = f"The twin to its plain backbone, over all {len({row.base for row in census})} architectures"
        blocks.append((title, distribution(census), census))
    return "\n\n".join(f"{title}:\n\n{table}\n\n{provenance(used)}" for title, table, used in blocks if used)


def pivot(rows: Sequence[Row], *, label: Callable[[Row], str]) -> str:
    """A line a label and a column a metric, times a column a batch; what fails its bar is bold."""

    def column(row: Row) -> tuple[str, int]:
        return row.metric, row.batch if row.metric in TIMES else 0

    columns = sorted({column(row) for row in rows}, key=lambda key: (list(TITLES).index(key[0]), key[1]))
    header = ["", *(TITLES[metric] + (f", batch {batch}" if batch else "") for metric, batch in columns)]
    lines: dict[str, dict[tuple[str, int], str]] = {}
    for row in rows:
        lines.setdefault(label(row), {})[column(row)] = f"**{show(row)}**" if fails(row) else show(row)
    if any(bar_of(row) for row in rows):
        lines["bar (mobile nets)"] = {key: "{} ({})".format(*BARS[key[0]]) for key in columns if key[0] in BARS}
    return markdown(header, [[name, *(cells.get(key, "") for key in columns)] for name, cells in lines.items()])


def show(row: Row) -> str:
    """A ratio with its interval, or to one digit more where it is exact."""
    return f"{row.ratio:.3f} ({row.low:.3f} to {row.high:.3f})" if row.pairs else f"{row.ratio:.4f}"


def distribution(rows: Sequence[Row]) -> str:
    """Quantiles (nearest rank) of the ratios of each metric, the highest with its name."""
    shares = {"lowest": 0.0, "median": 0.5, "90 %": 0.9, "99 %": 0.99}
    lines = []
    for metric in ("params", "macs"):
        ordered = sorted((row for row in rows if row.metric == metric), key=lambda row: row.ratio)
        ranked = [ordered[max(0, math.ceil(share * len(ordered)) - 1)] for share in shares.values()]
        over = sum(row.ratio > CENSUS_BAR for row in ordered)  # those without a bar too
        lines.append(
            [
                TITLES[metric],
                *map(show, ranked),
                f"{show(ordered[-1])} ({ordered[-1].base})",
                f"{over} of {len(ordered)}",
            ]
        )
    return markdown(["", *shares, "highest", f"over {CENSUS_BAR:.2f}"], lines)


# Command line ---------------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cost", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = ("measure", "larger", "scaling", "schemes", "census", "table")
    parser.add_argument("what", nargs="?", default="measure", choices=commands)
    parser.add_argument(
        "--archs", nargs="+", metavar="ARCH", help="of measure and schemes: timm's names, without the prefix"
    )
    parser.add_argument("--size", type=int, metavar="PX", help="of measure and schemes: images' height and width")
    parser.add_argument(
        "--batch", type=int, nargs="+", help="(measure: 1 8, and 1 32 at 64 px and below; schemes: 128)"
    )
    parser.add_argument("--pattern", default="convmix_*", help="of census: wildcards")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch, on the CPU")
    parser.add_argument("--compile", action="store_true", help="both models by torch.compile")
    parser.add_argument("--channels-last", action="store_true", help="both models and the images in that layout")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="'process' for one thread on a busy machine")
    parser.add_argument("--keep-heap", action="store_true", help="on Linux: reuse freed memory, without page faults")
    parser.add_argument("--seconds", type=float, default=10.0, help="about how long each ratio of times is measured")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of cost.csv and census.csv")
    parser.add_argument("--readme", type=Path, default=README, help="of table: the file that gets the short form")
    parser.add_argument("--page", type=Path, default=COST, help="of table: the file that gets all of it")
    parser.add_argument("--write", action="store_true", help="of table: between the markers of both files")
    parser.add_argument("--check", action="store_true", help="exit 1 where a bar fails or a file's table differs")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, or show what was measured; the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.clock == "process" and (args.device != "cpu" or args.threads > 1):
        parser.error("--clock process measures one thread of the CPU: add --threads 1.")
    cost, census = args.results / "cost.csv", args.results / "census.csv"
    if args.what == "table":
        measured = read_rows(cost), read_rows(census)
        texts = [(args.readme, render(*measured, brief=True)), (args.page, render(*measured))]
        return show_tables(texts, name="cost", write=args.write, check=args.check)

    if args.keep_heap and not KEEP_HEAP.items() <= os.environ.items():  # read once, when a process starts
        command = [sys.executable, "-m", "benchmarks.cost", *argv]
        return subprocess.run(command, env=os.environ | KEEP_HEAP, check=False).returncode  # noqa: S603
    torch.set_num_threads(args.threads)
    if args.device.startswith("cuda"):  # timers and memory counters look at the current one
        torch.cuda.set_device(torch.device(args.device).index or 0)
    command = ["python", "-m", "benchmarks.cost", *argv]
    rows = []
    if args.what == "census":
        census.unlink(missing_ok=True)  # it holds one census, which leaves nothing of another release of timm
        for row in take_census(args.pattern, args, command):
            append_rows(census, [row])
            rows.append(row)
    else:
        for task in tqdm(choose_tasks(args), unit="pair"):
            for row in run(task, args, command):
                append_rows(cost, [row])
                rows.append(row)
    for row in filter(fails, rows):
        print(f"{row.other}, {TITLES[row.metric]}, batch {row.batch}: {show(row)} is over {bar_of(row)}")
    return int(args.check and any(map(fails, rows)))


if __name__ == "__main__":
    sys.exit(main())

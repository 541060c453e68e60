"""What importing timm_convmix costs beside timm, and creating a twin beside its plain backbone.

    python -m benchmarks.startup                    imports, each in a fresh process; then models, in turn
    python -m benchmarks.startup table --write      the table of docs/cost.md, from benchmarks/results

``--check`` exits 1 where a model takes longer than its bar. ``--clock process`` counts only the time that the processor
gave to the process, for a machine that does other work too.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import timm
import torch
from huggingface_hub.utils.tqdm import tqdm

import timm_convmix  # noqa: F401  (registers the variants)
from benchmarks.timing import (
    CLOCKS,
    COST,
    RESULTS,
    Figures,
    Row,
    append_rows,
    compare,
    conditions,
    markdown,
    provenance,
    read_rows,
    show_tables,
    summarise,
)

ARCHS = ("resnet18", "resnet50", "convnext_atto", "mobilenetv3_small_100", "efficientnet_b0")
CREATE_BAR = 1.10

TITLES = {
    "import_s": "import, s",
    "import_mib": "memory after import, MiB",
    "list_models_ms": "timm.list_models(), ms",
    "create_ms": "create_model, ms",
}

CHILD = """
import json, os, sys, time

clock = {"wall": time.perf_counter, "process": time.process_time}[sys.argv[1]]

def state(seconds):
    start = clock()
    timm.list_models()
    listing = clock() - start
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[1])
    return dict(import_s=seconds, import_mib=pages * os.sysconf("SC_PAGE_SIZE") / 2**20, list_models_ms=1000 * listing)

start = clock()
import timm
plain = state(clock() - start)
start = clock()
import timm_convmix
both = state(plain["import_s"] + clock() - start)
print(json.dumps([plain, both]))
"""
"""What a fresh process does; the resident memory is read where Linux shows it."""


def fails(row: Row) -> bool:
    """Whether the whole interval lies above the bar, which creation alone has."""
    return row.metric == "create_ms" and row.low > CREATE_BAR


def time_imports(*, runs: int, clock: str) -> Iterator[tuple[str, Figures]]:
    """The metrics of an import, each with its figures: timm alone, and timm with timm_convmix.

    Args:
        runs: Fresh processes; each gives one pair.
        clock: A key of ``CLOCKS``.
    """
    samples = []
    for _ in tqdm(range(runs), unit="process"):
        child = subprocess.run([sys.executable, "-c", CHILD, clock], stdout=subprocess.PIPE, text=True, check=True)  # noqa: S603
        samples.append(json.loads(child.stdout))
    for metric in samples[0][0]:
        yield metric, summarise([(plain[metric], both[metric]) for plain, both in samples])


def measure(args: argparse.Namespace, command: Sequence[str]) -> Iterator[Row]:
    """Everything; ``command`` is the command line's words, for the record."""

    def row(base: str, other: str, metric: str, figures: Figures) -> Row:
        at = conditions(device="cpu", threads=args.threads, clock=args.clock, seed=args.seed, argv=command)
        return Row(part="startup", base=base, other=other, metric=metric, **asdict(figures), **at)

    for metric, figures in time_imports(runs=args.runs, clock=args.clock):
        yield row("timm", "timm_convmix", metric, figures)
    for arch in tqdm(args.archs, unit="pair"):
        torch.manual_seed(args.seed)
        names = arch, f"convmix_{arch}"
        creations = [partial(timm.create_model, name) for name in names]
        yield row(*names, "create_ms", compare(*creations, seconds=args.seconds, clock=CLOCKS[args.clock]))


def render(rows: Sequence[Row]) -> str:
    """The table, as Markdown; what fails its bar is bold."""
    lines = []
    for row in rows:
        name = TITLES[row.metric] + ("" if row.base == "timm" else f" ({row.base})")
        ratio = f"{row.ratio:.3f} ({row.low:.3f} to {row.high:.3f})"
        values = f"{row.base_value:.4g}", f"{row.other_value:.4g}"
        lines.append([name, *values, f"**{ratio}**" if fails(row) else ratio])
    return f"{markdown(['', 'timm', 'with timm_convmix', 'ratio'], lines)}\n\n{provenance(rows)}"


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.startup", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="?", default="measure", choices=("measure", "table"))
    parser.add_argument("--archs", nargs="+", default=ARCHS, metavar="ARCH", help="timm's names, without the prefix")
    parser.add_argument("--runs", type=int, default=15, help="fresh processes")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="'process' on a busy machine")
    parser.add_argument("--seconds", type=float, default=10.0, help="about how long each creation is measured")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of startup.csv")
    parser.add_argument("--page", type=Path, default=COST, help="of table: the file with the markers")
    parser.add_argument("--write", action="store_true", help="of table: between the markers")
    parser.add_argument("--check", action="store_true", help="exit 1 where a bar fails or the file's table differs")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, or show what was measured; the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    args = build_parser().parse_args(argv)
    path = args.results / "startup.csv"
    if args.what == "table":
        text = render(read_rows(path))
        return show_tables([(args.page, text)], name="startup", write=args.write, check=args.check)

    torch.set_num_threads(args.threads)
    failed = False
    for row in measure(args, ["python", "-m", "benchmarks.startup", *argv]):
        append_rows(path, [row])
        if fails(row):
            failed = True
            print(f"{row.other}: {row.ratio:.3f} ({row.low:.3f} to {row.high:.3f}) is over {CREATE_BAR}")
    return int(args.check and failed)


if __name__ == "__main__":
    sys.exit(main())

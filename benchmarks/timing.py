"""Two things timed in turn, the conditions they were timed under, and the CSV and Markdown that keep both."""

import csv
import os
import platform
import shlex
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import date
from math import comb
from pathlib import Path
from timeit import Timer
from typing import Any, ClassVar, Protocol, TypeVar

import timm
import torch
from torch.utils import benchmark

from timm_convmix.weights.manifest import take_turns

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
README = ROOT / "README.md"
COST = ROOT / "docs" / "cost.md"

CLOCKS: dict[str, Callable[[], float]] = {"wall": benchmark.timer, "process": time.process_time}
"""Seconds: of the wall, the accelerator synchronised; or of this process alone, for one thread on a busy machine."""

WARMUP = 2
SAMPLE_S = 0.005
"""Shortest time a sample may take; faster functions are called several times for one."""
MIN_PAIRS, MAX_PAIRS = 10, 500
"""Of samples, whatever time they take; even."""


@dataclass(frozen=True)
class Figures:
    """A ratio and what it was made from.

    Args:
        ratio: Other by base: median over pairs, or exact.
        low: Lower end of the median's 95 % interval, ``ratio`` where it is exact.
        high: Upper end.
        pairs: Number of pairs, 0 where the ratio is exact.
        base_value: Median, in the unit that the metric's name ends with.
        other_value: The same of the other.
    """

    ratio: float
    low: float
    high: float
    pairs: int
    base_value: float
    other_value: float


@dataclass(frozen=True, kw_only=True)
class Row(Figures):
    """A line of the CSV: one metric of one pair, with the conditions it was measured under.

    Args:
        part: Which command measured it.
        base: The architecture in the denominator.
        other: The one in the numerator.
        metric: Its name, the unit last.
        mode: 'eager' or 'compiled', with what else differs from torch's defaults.
        batch: Images.
        input: Shape of an image.
        device: Name of the processor that computed.
        threads: Of torch, on the CPU.
        clock: A key of ``CLOCKS``.
        load: Processes that ran or waited, mean of the minute before.
        torch: Version.
        timm: Version.
        python: Version.
        seed: Of weights and images.
        date: Day of the measurement.
        argv: The command.
    """

    part: str
    base: str
    other: str
    metric: str
    mode: str = ""
    batch: int = 0
    input: str = ""
    device: str
    threads: int
    clock: str
    load: float
    torch: str
    timm: str
    python: str
    seed: int
    date: str
    argv: str

    @property
    def key(self) -> tuple[object, ...]:
        """What a later measurement replaces."""
        return self.part, self.base, self.other, self.metric, self.mode, self.batch, self.input, self.device


# Measuring ------------------------------------------------------------------------------------------------------------


def interleave(
    base: Callable[[], object], other: Callable[[], object], *, pairs: int, number: int, clock: Callable[[], float]
) -> list[tuple[float, float]]:
    """Time two functions in turn, the base first in every second pair, so that no drift of the machine favours one.

    Args:
        base: Called without arguments.
        other: The same.
        pairs: How many times each is sampled.
        number: Calls a sample.
        clock: Returns seconds.

    Returns:
        Seconds a call, (base, other), one tuple a pair.
    """
    first, second = Timer(base, timer=clock), Timer(other, timer=clock)
    samples = []
    for pair in range(pairs):
        if pair % 2 == 0:
            a, b = first.timeit(number), second.timeit(number)
        else:
            b, a = second.timeit(number), first.timeit(number)
        samples.append((a / number, b / number))
    return samples


def compare(
    base: Callable[[], object], other: Callable[[], object], *, seconds: float, clock: Callable[[], float]
) -> Figures:
    """Warm two functions up and compare their times.

    Args:
        base: Called without arguments.
        other: The same.
        seconds: About how long to measure, by ``clock``.
        clock: Returns seconds.

    Returns:
        The ratio, and values in milliseconds a call.
    """
    for _ in range(WARMUP):
        base(), other()
    ((a, b),) = interleave(base, other, pairs=1, number=1, clock=clock)
    number = max(1, round(2 * SAMPLE_S / (a + b)))
    pairs = 2 * round(seconds / (2 * number * (a + b)))  # even: each is first as often as the other
    pairs = min(max(pairs, MIN_PAIRS), MAX_PAIRS)
    return summarise(interleave(base, other, pairs=pairs, number=number, clock=clock), scale=1000)


def summarise(samples: Sequence[tuple[float, float]], *, scale: float = 1.0) -> Figures:
    """The median of the paired ratios with its interval, and the median of each side times ``scale``."""
    ratios = [other / base for base, other in samples]
    base, other = (round(statistics.median(side) * scale, 4) for side in zip(*samples, strict=True))
    ratio, low, high = (round(value, 5) for value in (statistics.median(ratios), *median_interval(ratios)))
    return Figures(ratio, low, high, len(ratios), base, other)


def exact(base: float, other: float) -> Figures:
    """The ratio of two numbers that no repetition would change."""
    ratio = round(other / base, 6)
    return Figures(ratio, ratio, ratio, 0, base, other)


def median_interval(samples: Sequence[float], *, confidence: float = 0.95) -> tuple[float, float]:
    """Interval of the median that needs no distribution: two order statistics (the sign test, inverted).

    Args:
        samples: Independent, in any order; below 6 of them the interval is their range, and holds less often.
        confidence: How often at least the interval holds the true median.
    """
    ordered = sorted(samples)
    count = len(ordered)
    rank, below = 0, 1 / 2**count  # below: the chance that at most `rank` samples lie under the true median
    while below <= (1 - confidence) / 2:
        rank += 1
        below += comb(count, rank) / 2**count
    rank = max(rank, 1)
    return ordered[rank - 1], ordered[count - rank]


def conditions(*, device: str, threads: int, clock: str, seed: int, argv: Sequence[str]) -> dict[str, Any]:
    """The fields of a ``Row`` that say where and how it was measured.

    Args:
        device: Of torch, such as 'cpu', 'cuda:0' or 'meta'.
        threads: As asked for; this function sets nothing.
        clock: A key of ``CLOCKS``.
        seed: Of weights and images.
        argv: The command's words, of whose paths the last part is kept: where things lay says nothing about a result.
    """
    return dict(
        device=device_name(device),
        threads=threads,
        clock=clock,
        load=round(os.getloadavg()[0], 1),
        torch=torch.__version__.partition("+")[0],
        timm=timm.__version__,
        python=platform.python_version(),
        seed=seed,
        date=date.today().isoformat(),
        argv=shlex.join(map(without_folders, argv)),
    )


def without_folders(word: str) -> str:
    """A word of a command line, of a path only its last part: ``--save=my/nets`` as ``--save=nets``."""
    option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    return option + equals + (Path(value).name if "/" in value else value)


def device_name(device: str) -> str:
    """Name of a GPU, or of the CPU with the vector instructions that torch uses; 'meta' computes nothing."""
    if device == "meta":
        return device
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{(names or [platform.processor()])[0]} ({torch.backends.cpu.get_cpu_capability()})"


# Keeping --------------------------------------------------------------------------------------------------------------


class Keyed(Protocol):
    """A dataclass of strings and numbers, one line of a CSV."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def key(self) -> tuple[object, ...]:
        """What a later row replaces."""


AnyRow = TypeVar("AnyRow", bound=Keyed)


def append_rows(path: Path, rows: Iterable[Keyed]) -> None:
    """Add rows of one kind to a CSV, in one piece, one process at a time; a new file gets its header first."""
    lines = [asdict(row) for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    with take_turns(path), path.open("a", newline="") as file:
        for line in lines[:1]:
            writer = csv.DictWriter(file, line, lineterminator="\n")
            if file.tell() == 0:
                writer.writeheader()
            writer.writerows(lines)


def read_rows(path: Path) -> list[Row]:
    """The rows of a CSV of timings, of each key the last; none where there is no file."""
    return read_rows_of(Row, path)


def read_rows_of(kind: type[AnyRow], path: Path) -> list[AnyRow]:
    """The rows of a CSV of any kind, of each key the last; none where there is no file."""
    if not path.exists():
        return []
    kinds: dict[str, Any] = {field.name: field.type for field in fields(kind)}
    with path.open(newline="") as file:
        rows = [kind(**{name: kinds[name](text) for name, text in line.items()}) for line in csv.DictReader(file)]
    return list({row.key: row for row in rows}.values())


# Showing --------------------------------------------------------------------------------------------------------------


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table, the first column to the left and the others to the right; '' without lines."""
    table = [header, ["---"] + ["---:"] * (len(header) - 1), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in table) if len(table) > 2 else ""


def provenance(rows: Sequence[Row]) -> str:
    """One sentence of conditions for a table; what differs between its rows is listed."""

    def values(name: str) -> str:
        return ", ".join(sorted({str(getattr(row, name)) for row in rows}))

    timed = [row for row in rows if row.pairs]
    text = f"torch {values('torch')}, timm {values('timm')}, Python {values('python')}, {values('date')}"
    if timed:
        pairs, loads = [row.pairs for row in timed], [row.load for row in timed]
        text = (
            f"{values('device')}, {values('threads')} thread(s), {values('clock')} clock,"
            f" load {min(loads)} to {max(loads)}, {text}; median of {min(pairs)} to {max(pairs)} pairs"
            " with its 95 % interval"
        )
    commands = sorted({row.argv for row in rows})
    return f"{text}. {', '.join(f'`{command}`' for command in commands)}"


def update_between(path: Path, name: str, text: str, *, write: bool) -> bool:
    """Compare, and with ``write`` replace, what stands between ``<!-- name:begin -->`` and ``<!-- name:end -->``.

    Returns:
        Whether it was ``text`` already.

    Raises:
        ValueError: The file has not exactly one such pair of markers.
    """
    begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->"
    content = path.read_text()
    if content.count(begin) != 1 or content.count(end) != 1:
        raise ValueError(f"{path.name} needs one line {begin.strip()} and one {end}.")
    before, _, rest = content.partition(begin)
    _, _, after = rest.partition(end)
    new = f"{before}{begin}{text}\n{end}{after}"
    if write:
        path.write_text(new)
    return new == content


def show_tables(
    texts: Sequence[tuple[Path, str]], *, name: str, write: bool, check: bool, command: str | None = None
) -> int:
    """What every command's ``table`` does: print the last text, or write all into their files, or compare with them.

    Args:
        texts: File and Markdown; a file has a pair of markers.
        name: Of the markers, and of the module in ``benchmarks``.
        write: Replace what stands between the markers.
        check: Compare with it.
        command: What writes it, where that is not ``benchmarks.<name> table --write``.

    Returns:
        The exit status: 1 where ``check`` finds a difference.
    """
    if not write and not check:
        print(texts[-1][1])
        return 0
    differing = [path for path, text in texts if not update_between(path, name, text, write=False)]
    for path, text in texts if write else ():  # all of them, now that each was seen to have its markers
        update_between(path, name, text, write=True)
    if not check:
        return 0
    for path in differing:
        print(f"{path.name} differs: python -m {command or f'benchmarks.{name} table --write'}")
    return int(bool(differing))

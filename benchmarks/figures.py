"""The figures of README and docs, drawn from the runs; each carries a fingerprint of what it shows."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from statistics import mean
from textwrap import fill
from typing import Any

from benchmarks.comparisons import (
    CONTROL,
    CONVMIX,
    LAST,
    NAMES,
    Condition,
    Series,
    all_runs,
    backbones,
    name_of,
    named,
    proofs,
    series_of,
    standard_error,
)
from benchmarks.timing import ROOT

FIGURES = ROOT / "docs" / "figures"
DIFFERENCES = "differences.svg"
FINGERPRINT = re.compile(r"runs [0-9a-f]{64}")
FIGURE = "Differences of top-1 to the last stage and to the control: a bar a seed, their mean and its 95 % interval"


@dataclass(frozen=True)
class Drawing:
    """A figure that can be drawn.

    Args:
        text: What it shows.
        size: In inches.
        draw: Draws it on matplotlib's axes.
    """

    text: str
    size: tuple[float, float]
    draw: Callable[[Any], None]


def list_drawings(proof: Sequence[Condition]) -> dict[str, Drawing]:
    """File name -> drawing.

    The differences that were tested, the gain along each series, and accuracy against cost where settings differ in the
    backbone only.
    """
    drawings: dict[str, Drawing] = {}
    if tested := [c for c in proof if c.difference(LAST, CONVMIX) or c.difference(CONTROL, CONVMIX)]:
        size = 7, 1.3 + 0.6 * len(tested)
        drawings[DIFFERENCES] = Drawing(FIGURE, size, partial(draw_differences, tested=tested))
    series = series_of(proof)
    for what in dict.fromkeys(one.what for one in series):
        draw = partial(draw_series, series=[one for one in series if one.what == what], what=what)
        drawings[f"gain-{what.replace(' ', '-')}.svg"] = Drawing(
            f"Reduction of the error along: {what}", (5, 3.5), draw
        )
    for number, group in enumerate(backbones(proof), start=1):
        settings = group[0].settings
        dataset = name_of(settings)
        draw = partial(draw_cost, conditions=group, dataset=dataset)
        drawings[f"cost-{settings.dataset}-{number}.svg"] = Drawing(
            f"Accuracy against MACs on {dataset}", (5, 3.5), draw
        )
    return drawings


def figures(proof: Sequence[Condition], folder: str | None, start: str) -> str:
    """Those of a folder whose names start alike, as markdown; '' where there are none, or no folder."""
    found = list_drawings(proof).items() if folder else ()
    return "\n".join(f"![{drawing.text}]({folder}/{name})" for name, drawing in found if name.startswith(start))


def fingerprint(conditions: Sequence[Condition]) -> str:
    """Of the scores that the figures show; each figure carries it."""
    shown = sorted((*run.key, run.top1, run.macs) for run in all_runs(conditions))
    return f"runs {sha256(repr(shown).encode()).hexdigest()}"


def stale_figures(conditions: Sequence[Condition], folder: Path) -> list[str]:
    """Names of the figures that are missing in a folder, or were drawn from other runs, or are no longer drawn."""
    proof = proofs(conditions)
    current = fingerprint(proof)
    paths = {folder / name for name in list_drawings(proof)} | drawn(folder)
    return sorted(path.name for path in paths if not path.is_file() or current not in path.read_text())


def drawn(folder: Path) -> set[Path]:
    """The figures of any runs that are in a folder."""
    return {path for path in folder.glob("*.svg") if FINGERPRINT.search(path.read_text())}


def plot(conditions: Sequence[Condition], folder: Path) -> list[Path]:
    """Draw what ``list_drawings`` lists, and delete the other figures of runs in the folder.

    Returns:
        The files written: none where there is nothing to draw.
    """
    import matplotlib as mpl  # noqa: PLC0415  (of the extra 'benchmarks'; only plots need it)

    mpl.use("agg")
    mpl.rcParams["svg.hashsalt"] = "timm-convmix"  # the same file from the same numbers
    from matplotlib import pyplot as plt  # noqa: PLC0415

    proof = proofs(conditions)
    drawings = list_drawings(proof)
    folder.mkdir(parents=True, exist_ok=True)
    for path in drawn(folder) - {folder / name for name in drawings}:
        path.unlink()
    for name, drawing in drawings.items():
        figure, axes = plt.subplots(figsize=drawing.size)
        drawing.draw(axes)
        figure.tight_layout()
        figure.savefig(folder / name, metadata={"Date": None, "Description": fingerprint(proof)})
        plt.close(figure)
    return [folder / name for name in drawings]


def draw_differences(axes: Any, tested: Sequence[Condition]) -> None:
    """A line a setting, a tick a seed, and the mean with its interval: to the last stage and to the control."""
    for base, offset, color in ((LAST, -0.15, "tab:blue"), (CONTROL, 0.15, "tab:orange")):
        found = [(row + offset, d) for row, c in enumerate(tested) if (d := c.difference(base, CONVMIX))]
        for height, difference in found:
            axes.plot(difference.values, [height] * len(difference.values), "|", color=color, alpha=0.6)
        means = [difference.mean for _, difference in found]
        ends = [difference.interval() or (difference.mean,) * 2 for _, difference in found]
        spread = [[m - low for m, (low, _) in zip(means, ends, strict=True)]]
        spread += [[high - m for m, (_, high) in zip(means, ends, strict=True)]]
        heights = [height for height, _ in found]
        axes.errorbar(means, heights, xerr=spread, fmt="o", capsize=3, color=color, label=f"to the {NAMES[base]}")
    axes.axvline(0, color="grey", linewidth=0.8)
    axes.set(xlabel="top-1 of ConvMix minus theirs, points", ylim=(len(tested) - 0.5, -0.5))
    axes.set_yticks(range(len(tested)), [fill(named(c.settings), 34) for c in tested], fontsize="small")
    axes.legend(fontsize="small", ncols=2, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1))


def draw_series(axes: Any, series: Sequence[Series], what: str) -> None:
    """The gain along what grows, a line a series."""
    for one in series:
        points = [(position, list(reductions.values())) for position, reductions in one.table()]
        x, y = [position for position, _ in points], [mean(values) for _, values in points]
        errors = [standard_error(values) or 0 for _, values in points]
        axes.errorbar(x, y, errors, marker="o", capsize=3, label=fill(one.images, 30))
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set(xlabel=what, ylabel="error reduction, % (± standard error)", xscale="log")
    ticks = sorted({position for one in series for position, _ in one.table()})
    axes.set_xticks(ticks, [f"{tick / 1e6:.3g} M" if tick >= 1e6 else f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.legend(fontsize="small", ncols=2, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1))


def draw_cost(axes: Any, conditions: Sequence[Condition], dataset: str) -> None:
    """Accuracy against MACs, a point a backbone and scheme."""
    for scheme in (LAST, CONTROL, CONVMIX):
        if not (chosen := [c for c in conditions if scheme in c.runs]):
            continue
        x = [mean(c.values(scheme, "macs")) / 1e6 for c in chosen]
        errors = [standard_error(c.values(scheme)) or 0 for c in chosen]
        axes.errorbar(x, [mean(c.values(scheme)) for c in chosen], errors, fmt="o", capsize=3, label=NAMES[scheme])
    for c in conditions:
        at = mean(c.values(LAST, "macs")) / 1e6, mean(c.values(LAST))
        axes.annotate(c.settings.arch, at, xytext=(0, -18), textcoords="offset points", ha="center", fontsize="small")
    axes.margins(x=0.3, y=0.2)
    axes.set(xlabel="million MACs", ylabel="top-1, % (± standard error)", xscale="log", title=dataset)
    axes.legend(fontsize="small")

"""What the site's pages include: tables from the registry, the manifest and the benchmarks' CSVs, and the diagram.

Everything goes to docs/generated, which is not kept under version control.
"""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from timm_convmix.convmix import list_weights, manifest

DOCS = Path(__file__).parent
CENSUS = DOCS.parent / "benchmarks" / "results" / "census.csv"
GENERATED = DOCS / "generated"


def write_table(name: str, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A CSV for a ``csv-table`` directive."""
    with (GENERATED / name).open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])


def models() -> Iterable[Sequence[Any]]:
    """A row an architecture: what it costs, counted by ``benchmarks.cost census``, and the weights that exist."""
    with CENSUS.open(newline="") as file:
        counted = {(row["other"], row["metric"]): row for row in csv.DictReader(file)}
    tags: dict[str, list[dict[str, str | None]]] = {}
    for row in list_weights():
        tags.setdefault(str(row["name"]).partition(".")[0], []).append(row)
    for arch, rows in tags.items():
        weights = [row for row in rows if row["weights"]]
        params, macs = (counted.get((arch, metric)) for metric in ("params", "macs"))
        if params and macs:  # a newer timm may have what the census does not
            size = params["input"].rpartition("x")[2]
            added = f"{(float(params['ratio']) - 1):.1%}"
            cost = [f"{int(params['other_value']) / 1e6:.2f}", added, f"{int(macs['other_value']) / 1e9:.2f}", size]
        else:
            cost = [""] * 4
        licences = ", ".join(sorted({str(row["license"] or "not stated") for row in weights}))
        yield [f"``{arch}``", *cost, ", ".join(str(row["name"]).partition(".")[2] for row in weights), licences]


def trained() -> Iterable[Sequence[Any]]:
    """A row an entry of the manifest."""
    for name, record in manifest.items():
        baseline = f"{record.baseline.metrics.top1:.2f}" if record.baseline else ""
        where = "inside the package" if record.embedded else record.hub_id or "packed, on no Hub yet"
        size = f"{record.bytes / 1e6:.2f}"
        yield [f"``{name}``", record.dataset.name, f"{record.metrics.top1:.2f}", baseline, size, where, record.license]


def draw_mixing() -> None:
    """The diagram of the module: the pooled stages are projected, averaged, and added to the final map."""
    mpl.rcParams["svg.hashsalt"] = "timm-convmix"  # the same file from the same code
    figure, axes = plt.subplots(figsize=(10, 4.2))
    axes.set(xlim=(0, 96), ylim=(0, 39))
    axes.axis("off")

    def box(x: float, y: float, width: float, text: str, colour: str) -> None:
        style: dict[str, Any] = dict(boxstyle="round,pad=0.3", facecolor=colour, edgecolor="#334155", linewidth=1)
        axes.add_patch(FancyBboxPatch((x, y), width, 7, **style))
        axes.text(x + width / 2, y + 3.5, text, ha="center", va="center", fontsize=8)

    def arrow(*points: tuple[float, float]) -> None:
        *bends, end = points
        axes.plot(*zip(*bends, strict=True), color="#334155", linewidth=1)
        head: dict[str, Any] = dict(arrowstyle="-|>", mutation_scale=11, shrinkA=0, color="#334155", linewidth=1)
        axes.add_patch(FancyArrowPatch(bends[-1], end, **head))

    maps = [("stage 1\n64 x 56 x 56", 13), ("stage 2\n128 x 28 x 28", 28), ("stage 3\n256 x 14 x 14", 43)]
    box(1, 30, 8, "image", "#f1f5f9")
    for (text, x), before in zip(maps, (9, 23, 38), strict=True):
        box(x, 30, 10, text, "#bfdbfe")
        arrow((before + 0.4, 33.5), (x - 0.4, 33.5))
        box(x, 16, 10, "average and\nmaximum,\nlayer norm", "#fde68a")
        arrow((x + 5, 29.6), (x + 5, 23.4))
        arrow((x + 5, 15.6), (x + 5, 9.4))
    box(60, 30, 10, "final map\n512 x 7 x 7", "#bfdbfe")
    arrow((53.4, 33.5), (59.6, 33.5))
    box(13, 2, 40, "concatenate 64 + 128 + 256 numbers; linear", "#fde68a")
    axes.text(79, 33.5, "+", fontsize=15, ha="center", va="center")
    axes.plot(79, 33.5, "o", markersize=21, markerfacecolor="none", markeredgecolor="#334155")
    arrow((70.4, 33.5), (76.7, 33.5))
    box(62, 2, 8, "x 1/3", "#fde68a")
    arrow((53.4, 5.5), (61.6, 5.5))
    arrow((70.4, 5.5), (79, 5.5), (79, 30.3))
    axes.text(80, 18, "the same number\nfor every cell\nof a channel", fontsize=8, va="center")
    arrow((81.3, 33.5), (84.6, 33.5))
    box(85, 30, 10, "timm's head", "#f1f5f9")
    figure.savefig(GENERATED / "mixing.svg", bbox_inches="tight", metadata={"Date": None})
    figure.savefig(GENERATED / "mixing.png", bbox_inches="tight", dpi=110)
    plt.close(figure)


def main() -> None:
    """Write all of it."""
    GENERATED.mkdir(exist_ok=True)
    header = ["architecture", "parameters, M", "of them added by mixing", "MACs, G", "at, px"]
    write_table("models.csv", [*header, "tags with weights", "licences"], models())
    header = ["name", "data set", "top-1, %", "paired baseline, %", "MB", "where", "licence"]
    write_table("trained.csv", header, trained())
    draw_mixing()


if __name__ == "__main__":
    main()

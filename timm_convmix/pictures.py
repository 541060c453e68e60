"""Pictures of what ``inspection`` finds, drawn with matplotlib (the extra ``cam``), without a display."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from timm_convmix.errors import ExtraError, InputError
from timm_convmix.inspection import Cam
from timm_convmix.model import MODULE_PREFIX

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANEL = 2.1
"""Side of a panel, in inches."""
DPI = 150
COLOURS = "inferno"
"""Of heat: as light as it is high, so that it reads in grey too."""
CHARACTERS = 15
"""Of the small font, an inch: where a line of a caption breaks."""


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure of a size in inches.

    Raises:
        ExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415  (an extra: everything else works without it)
    except ImportError as error:
        raise ExtraError("pictures need matplotlib: pip install 'timm-convmix[cam]'.") from error
    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def save(figure: "Figure", path: str | Path) -> None:
    """Write a figure in the format of the file's suffix; a file of that name is replaced.

    Raises:
        InputError: matplotlib does not know the format.
        OSError: The file cannot be written.
    """
    known = figure.canvas.get_supported_filetypes()
    if Path(path).suffix.removeprefix(".").lower() not in known:
        raise InputError(f"{path}: no such kind of picture; end its name with .png, .svg or .pdf.")
    figure.savefig(path)


def draw_cams(cams: Sequence[Cam]) -> "Figure":
    """An image's maps over the photograph, a row a model: what the model saw, its stages, what its head reads.

    Args:
        cams: Of one image and one class.

    Raises:
        ExtraError: matplotlib is not installed.
    """
    columns = 1 + max(len(each.maps) for each in cams)
    figure = new_figure((columns + 0.3) * PANEL, len(cams) * (PANEL + 0.75) + 0.35)
    lines = [f"Grad-CAM for {cams[0].label!r}: where the evidence is, not why. Each map is divided by its own maximum."]
    if any(each.mixes for each in cams):
        lines.append("A mix that is the same in every cell, as ConvMix's is, widens the mixed map by construction.")
    add_caption(figure, *lines)
    for part, each in zip(figure.subfigures(len(cams), 1, squeeze=False)[:, 0], cams, strict=True):
        title = f"{short(each.model, 60)}: {short(each.label, 30)} {each.probability:.3f}"
        part.suptitle(title, x=0.01, ha="left", fontsize=10, parse_math=False)
        axes = part.subplots(1, columns, squeeze=False)[0]
        height, width = each.maps[0].heat.shape
        titles = [f"input\n{height}x{width}"]
        for stage in each.maps:
            name = ("mixed map" if each.mixes else "final map") if stage.name == "mixer" else short(stage.name)
            titles.append(f"{name}\n{stage.grid[0]}x{stage.grid[1]}, reduction {stage.reduction}")
        for axis in axes:
            axis.set_axis_off()
        for axis, title in zip(axes, titles, strict=False):
            axis.set_title(title, fontsize=8)
            axis.imshow(each.photo.numpy())
        extent = (-0.5, each.photo.shape[1] - 0.5, each.photo.shape[0] - 0.5, -0.5)
        for axis, stage in zip(axes[1:], each.maps, strict=False):
            heat = axis.imshow(
                stage.heat.cpu().numpy(), COLOURS, alpha=0.6, vmin=0, vmax=1, extent=extent, interpolation="bilinear"
            )
            if not stage.heat.any():
                where: dict[str, Any] = dict(transform=axis.transAxes, ha="center", va="center")
                axis.text(0.5, 0.5, "nothing in favour", color="white", fontsize=8, **where)
        bar = part.colorbar(heat, ax=axes, fraction=0.015, shrink=0.8, ticks=(0, 0.5, 1))
        bar.set_label("share of the maximum", fontsize=7)
        bar.ax.tick_params(labelsize=7)
    return figure


def draw_stages(rows: Sequence[Mapping[str, Any]], drops: Mapping[int, float] | None = None) -> "Figure":
    """A model's stages as squares, and what flows from them through the mixer into the final map.

    Args:
        rows: Of ``inspection.describe``.
        drops: Position of a tap -> by how much the logit falls without it, in the mean.

    Raises:
        ExtraError: matplotlib is not installed.
    """
    *stages, whole = rows
    final, tapped = stages[-1], [row for row in stages if row["tapped"]]
    figure = new_figure(1.7 * len(stages) + 0.3, 3.6)
    axis = figure.subplots()
    axis.set(xlim=(-0.55, len(stages) - 0.45), ylim=(-0.75, 1.3), aspect="equal")
    axis.set_axis_off()
    axis.set_title(f"input {whole['shape']}, {whole['params']:,} parameters, {whole['macs']:,} MACs", fontsize=9)

    def arrow(start: tuple[float, float], end: tuple[float, float]) -> None:
        axis.annotate("", xy=end, xytext=start, arrowprops=dict(arrowstyle="-|>", color="black"))

    sides = [min(map(int, row["shape"].split("x")[1:])) for row in stages]
    sides_drawn = [0.12 + 0.4 * math.log2(1 + side) / math.log2(1 + max(sides)) for side in sides]
    for at, (row, side) in enumerate(zip(stages, sides_drawn, strict=True)):
        name = ("mixed map" if tapped else "final map") if row is final else short(row["module"])
        axis.bar(at, side, width=side, bottom=-side / 2, color="tab:orange" if row["tapped"] else "lightgrey")
        axis.text(at, -0.35, f"{name}\n{row['shape']}\nreduction {row['reduction']}", fontsize=8, ha="center", va="top")
        if row is not final:
            arrow((at + side / 2, 0), (at + 1 - sides_drawn[at + 1] / 2, 0))
    if not tapped:
        return figure
    first, last = tapped[0]["position"], final["position"]
    axis.bar((first + last) / 2, 0.3, width=last - first + 0.5, bottom=0.9, color="tab:blue")
    axis.text(
        (first + last) / 2,
        1.05,
        f"mixer: {final['params']:,} parameters ({final['params_share']:.2%})\n"
        f"{final['macs']:,} MACs ({final['macs_share']:.3%})",
        fontsize=8,
        color="white",
        ha="center",
        va="center",
    )
    for row in tapped:
        at = row["position"]
        arrow((at - 0.1, sides_drawn[at] / 2), (at - 0.1, 0.9))
        if drops:
            axis.text(at - 0.05, 0.6, f"{drops[at]:+.3f}", fontsize=8)
    arrow((last + 0.1, 0.9), (last + 0.1, sides_drawn[last] / 2))
    if drops:
        add_caption(figure, "At a tap: how far the predicted class's logit falls if the mixer gets zeros instead.")
    return figure


def add_caption(figure: "Figure", *lines: str) -> None:
    """Write below a figure; what it has no room for goes on in the next line."""
    room = int(figure.get_figwidth() * CHARACTERS)
    figure.supxlabel("\n".join(textwrap.fill(line, room) for line in lines), fontsize=8, parse_math=False)


def short(name: str, longest: int = 28) -> str:
    """A name, of a backbone's module as the backbone knows it; where it is long, its end."""
    name = name.removeprefix(MODULE_PREFIX)
    return name if len(name) <= longest else f"...{name[3 - longest :]}"

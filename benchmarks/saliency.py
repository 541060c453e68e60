"""Whether class activation maps rest on the object: boxes of Tiny-ImageNet's validation images, saved models.

    python -m benchmarks.saliency --data DIR --boxes DIR/boxes/val_annotations.txt MODELS/*-{last,convmix}-*.safetensors

MODELS are what ``python -m benchmarks.accuracy --save`` kept; rows go to benchmarks/results/saliency.csv, one a model
and layer. Every model is asked for the true class. Layers are the stages that ConvMix taps, by the names of their
modules, and 'mixer', the map that the head reads. The mix adds the same to all cells of that map, which widens its
Grad-CAM by construction: a larger area or recall there says nothing unless the energy in the box rises too.
"""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.utils.tqdm import tqdm
from scipy import stats
from torch import Tensor

from benchmarks import schemes
from benchmarks.accuracy import Saved, Settings, load_model
from benchmarks.images import SUBSET_SEED, Images, digest_of, load_split, normalise, read_names, stratified_order
from benchmarks.timing import RESULTS, append_rows, conditions, read_rows_of
from timm_convmix import PackingError
from timm_convmix.model import MODULE_PREFIX
from timm_convmix.saliency import grad_cam

TOLERANCE = 15 / 224
"""Of the pointing game, of the image's size: 15 pixels in the usual code (Zhang et al. 2016, arXiv:1608.00507)."""
BATCH = 100
MIXED = "mixer"
"""The layer whose output the head reads: the module's name."""
MEASURES = {
    "energy": "energy in the box",
    "pointing": "pointing",
    "area": "area above half",
    "recall": "box recall",
}

Cams = Callable[[Any, Tensor, Tensor], dict[str, Tensor]]
"""Model, normalised images (B, 3, S, S) and classes (B,) -> layer -> maps (B, S, S), not negative."""


@dataclass(frozen=True, kw_only=True)
class Saliency(Settings):
    """A line of saliency.csv: the settings of the training, and means over images in 0 to 1 with standard errors.

    Args:
        scored: sha256 of the decoded validation images, its first 16 digits.
        weights: sha256 of the model's file, its first 16 digits.
        layer: Whose output the maps are of.
        count: Images.
        empty: Of which the map is zero everywhere; they enter no mean.
        chance: Mean share of the image that the box takes, which a uniform map has in it.
        energy: Share of the map's sum inside the box (Wang et al. 2020, arXiv:1910.01279).
        energy_se: Its standard error.
        pointing: How often the maximum lies in the box, within the tolerance.
        pointing_se: Its standard error.
        area: Share of the image at half of the maximum or above.
        area_se: Its standard error.
        recall: Share of the box at half of the maximum or above.
        recall_se: Its standard error.
        randomised: Rank correlation with the maps of the same model, untrained (Adebayo et al. 2018,
            arXiv:1810.03292): near zero where the maps depend on what was learned.
        device: Name of the processor that computed.
        torch: Version.
        timm: Version.
        python: Version.
        date: Day.
        argv: The command, of paths the last part only.
    """

    scored: str
    weights: str
    layer: str
    count: int
    empty: int
    chance: float
    energy: float
    energy_se: float
    pointing: float
    pointing_se: float
    area: float
    area_se: float
    recall: float
    recall_se: float
    randomised: float
    device: str
    torch: str
    timm: str
    python: str
    date: str
    argv: str

    @property
    def key(self) -> tuple[object, ...]:
        """What is measured once."""
        return self.scored, self.weights, self.layer, self.count


# Measures -------------------------------------------------------------------------------------------------------------


def box_masks(boxes: Tensor, size: int) -> Tensor:
    """Boxes (N, 4), first and last column and row as x0, y0, x1, y1, as (N, size, size) of bool."""
    x0, y0, x1, y1 = boxes[:, :, None].unbind(1)  # (N, 1) each
    at = torch.arange(size)
    return ((at >= y0) & (at <= y1))[:, :, None] & ((at >= x0) & (at <= x1))[:, None, :]


def measure_maps(maps: Tensor, boxes: Tensor) -> dict[str, Tensor]:
    """The measures of each image; NaN where its map is zero everywhere.

    Args:
        maps: (N, S, S), not negative, of the images' size.
        boxes: (N, 4), as of ``box_masks``.

    Returns:
        A key of ``MEASURES`` -> (N,) in 0 to 1.
    """
    size = maps.shape[-1]
    inside = box_masks(boxes, size)
    peak = maps.flatten(1).amax(1)
    high = maps >= peak[:, None, None] / 2
    row, column = maps.flatten(1).argmax(1).div(size, rounding_mode="floor"), maps.flatten(1).argmax(1) % size
    x0, y0, x1, y1 = boxes.unbind(1)
    away = torch.stack(
        [(x0 - column).clamp(min=0) + (column - x1).clamp(min=0), (y0 - row).clamp(min=0) + (row - y1).clamp(min=0)]
    )
    measures = {
        "energy": (maps * inside).sum((1, 2)) / maps.sum((1, 2)),
        "pointing": (away.float().norm(dim=0) <= TOLERANCE * size).float(),
        "area": high.float().mean((1, 2)),
        "recall": (high & inside).sum((1, 2)) / inside.sum((1, 2)),
    }
    return {name: torch.where(peak > 0, values, torch.nan) for name, values in measures.items()}


def rank_correlations(maps: Tensor, others: Tensor) -> Tensor:
    """Spearman's correlation of two maps, equal values at their mean rank; NaN where one is constant.

    Args:
        maps: (N, H, W).
        others: The same.

    Returns:
        (N,).
    """
    ranks = [stats.rankdata(m.flatten(1).numpy(), axis=1) for m in (maps, others)]
    a, b = (rank - rank.mean(axis=1, keepdims=True) for rank in ranks)
    with np.errstate(invalid="ignore"):
        return torch.from_numpy((a * b).sum(1) / np.sqrt((a**2).sum(1) * (b**2).sum(1)))


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Mean of (N,) without its NaNs, and the standard error; NaN where too few are left."""
    known = values[~values.isnan()].double()
    error = float(known.std()) / len(known) ** 0.5 if len(known) > 1 else math.nan
    return round(float(known.mean()), 6), round(error, 6)


# Maps -----------------------------------------------------------------------------------------------------------------


def package_cams(model: Any, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """The package's Grad-CAM: the one place where it is called; see ``Cams``."""
    return {stage.name.removeprefix(MODULE_PREFIX): stage.heat for stage in grad_cam(model, x, labels).maps}


def all_maps(cams: Cams, saved: Saved, images: Images, device: str) -> dict[str, Tensor]:
    """Maps of the true class: layer -> (N, S, S), on the CPU."""
    parts: dict[str, list[Tensor]] = {}
    for chosen in torch.split(torch.arange(len(images)), BATCH):
        batch = images.take(chosen).to(device)
        found = cams(saved.model, normalise(batch.pixels, saved.mean, saved.std), batch.labels)
        for layer, maps in found.items():
            parts.setdefault(layer, []).append(maps.float().cpu())
    return {layer: torch.cat(maps) for layer, maps in parts.items()}


def untrained(saved: Saved, device: str) -> Saved:
    """The same model as it would be before a training of another seed."""
    s = saved.settings
    model = schemes.build(s.arch, s.scheme, num_classes=s.classes, seed=s.seed + 1).to(device).eval()
    return Saved(model, s, saved.mean, saved.std, saved.sha256)


# Rows -----------------------------------------------------------------------------------------------------------------


def read_boxes(path: Path, names: Sequence[str]) -> Tensor:
    """Boxes (N, 4) of images, from lines of file, class, x0, y0, x1, y1.

    Args:
        path: ``val_annotations.txt``.
        names: ``CLASS/FILE`` of each image.

    Raises:
        ValueError: An image has no box.
    """
    lines = [line.split() for line in path.read_text().splitlines() if line.strip()]
    boxes = {f"{label}/{file}": list(map(int, box)) for file, label, *box in lines}
    if missing := [name for name in names if name not in boxes]:
        raise ValueError(f"{path.name} has no box for {missing[0]} and {len(missing) - 1} more images.")
    return torch.tensor([boxes[name] for name in names])


def measure(
    saved: Saved, images: Images, boxes: Tensor, *, cams: Cams, device: str, record: dict[str, Any]
) -> list[Saliency]:
    """The rows of one model.

    Args:
        saved: On the device.
        images: On the CPU.
        boxes: (N, 4).
        cams: How maps are made.
        device: Of torch.
        record: The fields that every row of the command shares.
    """
    trained = all_maps(cams, saved, images, device)
    random = all_maps(cams, untrained(saved, device), images, device)
    chance = box_masks(boxes, images.size).float().mean()
    rows = []
    for layer, maps in trained.items():
        measures = measure_maps(maps, boxes)
        values: dict[str, Any] = {}
        for name in MEASURES:
            values[name], values[f"{name}_se"] = mean_and_error(measures[name])
        rows.append(
            Saliency(
                **asdict(saved.settings),
                weights=saved.sha256,
                layer=layer,
                count=len(images),
                empty=int(measures["energy"].isnan().sum()),
                chance=round(float(chance), 6),
                **values,
                randomised=mean_and_error(rank_correlations(maps, random[layer]))[0],
                **record,
            )
        )
    return rows


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.saliency", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", type=Path, nargs="+", help="files of benchmarks.accuracy --save, of one data set")
    parser.add_argument("--data", type=Path, required=True, help="holds validation/CLASS/*")
    parser.add_argument("--boxes", type=Path, required=True, help="val_annotations.txt")
    parser.add_argument("--images", type=int, default=2000, help="of the models' classes, stratified")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch, on the CPU")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of saliency.csv")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what has no row yet; the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    parser = build_parser()
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    try:
        models = [load_model(file, args.device) for file in args.models]
        (shared, *more) = {(s.dataset, s.classes, s.size) for s in (saved.settings for saved in models)}
        if more:
            raise ValueError("The models were trained on several data sets, classes or sizes: give those of one.")
        whole = load_split(args.data, "validation")
        if whole.size != shared[2]:
            raise ValueError(
                f"The models were trained on images of {shared[2]} px, and the boxes are for the data's own"
                f" {whole.size} px: train without --size."
            )
        names = read_names(args.data, "validation")
        known = (whole.labels < shared[1]).nonzero()[:, 0]
        chosen = known[stratified_order(whole.labels[known], SUBSET_SEED)[: args.images]]
        boxes = read_boxes(args.boxes, [names[index] for index in chosen.tolist()])
    except (ValueError, OSError, PackingError) as error:
        parser.error(str(error))
    images = whole.take(chosen)
    command = ["python", "-m", "benchmarks.saliency", *argv]
    at = conditions(device=args.device, threads=args.threads, clock="wall", seed=SUBSET_SEED, argv=command)
    record = {key: at[key] for key in ("device", "torch", "timm", "python", "date", "argv")}
    record["scored"] = digest_of(whole)[:16]
    path = args.results / "saliency.csv"
    done = {(row.scored, row.weights, row.count) for row in read_rows_of(Saliency, path)}
    for saved in tqdm(models, unit="model"):
        if (record["scored"], saved.sha256, len(images)) not in done:
            append_rows(path, measure(saved, images, boxes, cams=package_cams, device=args.device, record=record))
    return 0


if __name__ == "__main__":
    sys.exit(main())

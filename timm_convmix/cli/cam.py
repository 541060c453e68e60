"""Verbs that look into a model, with pictures."""

import argparse
import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from timm_convmix.cli.arguments import add_model, add_size
from timm_convmix.cli.output import skipping
from timm_convmix.inspection import cam, describe, weigh_taps
from timm_convmix.pictures import draw_cams, draw_stages, new_figure, save
from timm_convmix.prediction import default_model, find_images


def add_verbs(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add ``cam`` and ``info``."""
    default = default_model()
    parser = verbs.add_parser(
        "cam",
        help="where in an image the evidence for its class is (Grad-CAM)",
        description="Grad-CAM of each tapped stage and of the map that the head reads, beside that of the plain\n"
        "baseline: where the evidence is, not why. One picture an image, IMAGE_cam.png; an older one is replaced,\n"
        "an image that is looked at never. A file that is no image is named on stderr and skipped, and the exit\n"
        "code is 1. Needs matplotlib: pip install 'timm-convmix[cam]'.",
        epilog="examples:\n"
        "  timm-convmix cam photo.jpg\n"
        "  timm-convmix cam photos/ --model convmix_resnet50.a1_in1k --class 'tabby, tabby cat' --output maps/\n"
        "  timm-convmix cam photos/ --model RUN/model_best.pth.tar --compare PLAIN_RUN/model_best.pth.tar\n",
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE_OR_FOLDER", help="of a folder the subfolders too")
    add_model(parser, "--model", default=default, required=default is None)
    parser.add_argument(
        "--compare",
        metavar="OTHER|off",
        help="another model, or 'off': the same weights with the mixer off, an ablation (default: the baseline that\n"
        "was trained with these weights where there is one, else off)",
    )
    parser.add_argument("--class", dest="class_name", metavar="C", help="label or index (default: what MODEL predicts)")
    parser.add_argument("--output", type=Path, default=Path(), metavar="DIR", help="for the pictures (default: here)")
    parser.set_defaults(run=run_cam)

    parser = verbs.add_parser(
        "info",
        help="which stages are tapped, what the mixer costs, how much each tap counts",
        description="Which stages of a model are tapped, and the mixer's share of its parameters and MACs. With\n"
        "images: by how much the logit of the predicted class falls when the mixer gets zeros instead of a tap; the\n"
        "last rows, of no file, are the means.",
        epilog="examples:\n"
        "  timm-convmix info convmix_resnet50 --size 288\n"
        "  timm-convmix info convmix_tiny_cifar.cifar10 --image photos/ --picture taps.png\n",
    )
    add_model(parser, "model")
    add_size(parser)
    parser.add_argument("--image", nargs="+", metavar="IMAGE_OR_FOLDER", help="of a folder the subfolders too")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw it (.png, .svg, .pdf); needs matplotlib")
    parser.set_defaults(run=run_info)


def run_cam(args: argparse.Namespace) -> tuple[list[dict[str, Any]], int]:
    """Draw; a row an image and model, and 1 if a file was skipped."""
    new_figure(1, 1)  # before anything is computed in vain
    args.output.mkdir(parents=True, exist_ok=True)
    files = list(find_images(args.images))
    skipped, skip = skipping(args.verb)
    seen = cam(files, model=args.model, compare=args.compare, class_name=args.class_name, arch=args.arch, on_skip=skip)
    names = name_pictures(args.output, files)
    rows = []
    for image, cams in seen:
        save(draw_cams(cams), names[image])
        rows += [
            dict(image=image, model=each.model, label=each.label, probability=each.probability, file=str(names[image]))
            for each in cams
        ]
    return rows, int(bool(skipped))


def name_pictures(folder: Path, images: Iterable[Path]) -> dict[str, Path]:
    """``<stem>_cam.png``, or ``<stem>_cam2.png`` and so on: none twice, and none that of an image itself."""
    images = list(dict.fromkeys(images))
    taken = {image.resolve() for image in images}
    names = {}
    for image in images:
        numbered = (f"{image.stem}_cam{number if number > 1 else ''}.png" for number in itertools.count(1))
        path = next(path for name in numbered if (path := folder / name).resolve() not in taken)
        taken.add(path.resolve())
        names[str(image)] = path
    return names


def run_info(args: argparse.Namespace) -> tuple[list[dict[str, Any]], int]:
    """A row a stage, or with images a row an image and tap, and 1 if a file was skipped."""
    if args.picture:
        new_figure(1, 1)  # before anything is computed in vain
    stages = describe(args.model, size=args.size, arch=args.arch)
    taps: list[dict[str, Any]] = []
    skipped, skip = skipping(args.verb)
    if args.image:
        taps = weigh_taps(args.image, model=args.model, size=args.size, arch=args.arch, on_skip=skip)
    if args.picture:
        means = {row["position"]: row["logit_drop"] for row in taps if row["file"] is None}
        save(draw_stages(stages, means), args.picture)
    return taps or stages, int(bool(skipped))

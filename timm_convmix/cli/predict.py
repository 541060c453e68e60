"""Verb that classifies images."""

import argparse
from typing import Any

from timm_convmix.cli.arguments import add_model, positive
from timm_convmix.cli.output import skipping
from timm_convmix.prediction import default_model, predict


def add_verbs(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add ``predict``."""
    default = default_model()
    parser = verbs.add_parser(
        "predict",
        help="the most probable classes of image files",
        description="Classify image files, and those in folders. A file that is no image is named on stderr and\n"
        "skipped, and the exit code is 1. Where a model does not say what a class is called, the label is its index.",
        epilog="examples:\n"
        f"  timm-convmix predict photo.jpg{'' if default else ' --model convmix_resnet18'}\n"
        "  timm-convmix predict photos/ --model convmix_resnet50.a1_in1k --topk 1 --format csv > classes.csv\n"
        "  timm-convmix predict photos/ --model output/train/RUN/model_best.pth.tar --json\n"
        "  timm-convmix predict photos/ --model weights.safetensors --arch convmix_resnet18\n",
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE_OR_FOLDER", help="of a folder the subfolders too")
    add_model(parser, "--model", default=default, required=default is None)
    parser.add_argument("--topk", type=positive, default=5, metavar="K", help="classes an image (default: 5)")
    parser.add_argument("--batch-size", type=positive, default=32, metavar="N", help="images a step (default: 32)")
    parser.add_argument("--device", help="such as cpu, cuda:1 or mps (default: cuda if there is one, else cpu)")
    parser.set_defaults(run=run_predict)


def run_predict(args: argparse.Namespace) -> tuple[list[dict[str, Any]], int]:
    """Predict; a row an image and class, and 1 if a file was skipped."""
    skipped, skip = skipping(args.verb)
    rows = predict(
        args.images,
        model=args.model,
        arch=args.arch,
        topk=args.topk,
        batch_size=args.batch_size,
        device=args.device,
        on_skip=skip,
        quiet=args.quiet,
    )
    return rows, int(bool(skipped))

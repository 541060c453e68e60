"""Verb that writes a model for deployment."""

import argparse
from typing import Any

from timm_convmix.cli.arguments import add_model, add_size
from timm_convmix.exporting import CALIBRATION, SUFFIXES, export


def add_verbs(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add ``export``."""
    parser = verbs.add_parser(
        "export",
        help="one file for deployment, proved against eager: ONNX or torch.export, int8",
        description="Write a model as one file that takes batches of any size, with labels, preprocessing and the\n"
        "digest of its weights inside. The file is opened again and kept only if it gives the model's logits, on\n"
        "random input and on real images; as int8 only if it is as accurate. An older file is replaced.\n"
        "ONNX needs pip install 'timm-convmix[export]'.",
        epilog="examples:\n"
        "  timm-convmix export convmix_tiny_cifar.cifar10 --to onnx --images photos/\n"
        "  timm-convmix export convmix_resnet50.a1_in1k --to torch-export --images photos/ --output net.pt2\n"
        "  timm-convmix export RUN/model_best.pth.tar --to onnx --int8 --data DATA --max-loss 0.5\n",
    )
    add_model(parser, "model", metavar="NAME")
    parser.add_argument("--to", required=True, choices=SUFFIXES, help="format")
    parser.add_argument(
        "--images",
        nargs="+",
        default=(),
        metavar="IMAGE_OR_FOLDER",
        help=f"real images to compare on, and to calibrate int8 with (default: {CALIBRATION} of DATA/train)",
    )
    parser.add_argument("--data", metavar="DIR", help="images as train/CLASS/* and, for int8, validation/CLASS/*")
    parser.add_argument(
        "--output", metavar="FILE_OR_DIR", help="(default: NAME.onnx, NAME.int8.onnx or NAME.pt2, here)"
    )
    parser.add_argument("--int8", action="store_true", help="quantise it; measured on DATA/validation, in full")
    parser.add_argument(
        "--max-loss", type=float, default=1.0, metavar="POINTS", help="of top-1 that int8 may cost (default: 1.0)"
    )
    add_size(parser)
    parser.set_defaults(run=run_export)


def run_export(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Export; the row says what was compared."""
    row = export(
        args.model,
        to=args.to,
        images=args.images,
        data_dir=args.data,
        output=args.output,
        int8=args.int8,
        max_loss=args.max_loss,
        size=args.size,
        arch=args.arch,
        quiet=args.quiet,
    )
    return [row]

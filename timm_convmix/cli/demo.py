"""Verb that shows a model in the browser."""

import argparse
import sys
from typing import Any

from timm_convmix.cli.arguments import MODEL, positive
from timm_convmix.demo import HOST, MAX_MEGABYTES, PORT, build, serve
from timm_convmix.prediction import default_model


def add_verbs(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add ``demo``."""
    default = default_model()
    parser = verbs.add_parser(
        "demo",
        help="a page in the browser: classes, maps and what each stage contributes",
        description="Serve a page on this machine: upload an image, see its most probable classes, Grad-CAM of the\n"
        "model beside that of its plain baseline, and how much each tapped stage counts. Needs no network. Ctrl-C\n"
        "ends it. Needs Gradio: pip install 'timm-convmix[demo]'.",
        epilog="examples:\n"
        "  timm-convmix demo --examples photos/\n"
        "  timm-convmix demo --model convmix_resnet50.a1_in1k RUN/model_best.pth.tar --port 8080\n",
    )
    parser.add_argument(
        "--model",
        nargs="+",
        action="extend",
        required=default is None,
        help=f"{MODEL}; several to choose from" + (f" (default: {default})" if default else ""),
    )
    parser.add_argument("--examples", metavar="IMAGE_OR_FOLDER", help="images that the page offers")
    parser.add_argument(
        "--host", default=HOST, help=f"address to listen at, such as 0.0.0.0 to let others in (default: {HOST})"
    )
    parser.add_argument("--port", type=positive, default=PORT, metavar="N", help=f"to listen at (default: {PORT})")
    parser.add_argument(
        "--max-megabytes",
        type=positive,
        default=MAX_MEGABYTES,
        metavar="N",
        help=f"of an uploaded file (default: {MAX_MEGABYTES})",
    )
    parser.set_defaults(run=run_demo)


def run_demo(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Serve until Ctrl-C; no rows."""

    def announce(address: str) -> None:
        sys.stderr.write(f"timm-convmix demo: {address} (Ctrl-C ends it)\n")

    serve(
        build(args.model or (), examples=args.examples),
        host=args.host,
        port=args.port,
        max_megabytes=args.max_megabytes,
        on_ready=None if args.quiet else announce,
    )
    return []

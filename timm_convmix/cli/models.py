"""Verbs about what there is."""

import argparse
from fnmatch import fnmatch
from typing import Any

from timm_convmix.convmix import list_weights


def add_verbs(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add ``list``."""
    parser = verbs.add_parser(
        "list",
        help="architectures, their weights and licences",
        description="Architectures and tags, what pretrained=True loads for them, and under which licence.",
        epilog="examples:\n"
        "  timm-convmix list 'resnet50*'\n"
        "  timm-convmix list --pretrained --license 'apache-2.0' --json\n",
    )
    parser.add_argument("pattern", nargs="?", default="*", help="wildcards over arch or arch.tag (default: all)")
    parser.add_argument("--pretrained", action="store_true", help="only those that have weights")
    parser.add_argument("--license", metavar="PATTERN", help="only licences that match, such as 'apache-2.0' or 'cc-*'")
    parser.set_defaults(run=run_list)


def run_list(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of ``list_weights`` that pass the filters."""
    return [
        row
        for row in list_weights(args.pattern)
        if (row["weights"] or not args.pretrained)
        and (args.license is None or fnmatch(row["license"] or "unknown", args.license))
    ]

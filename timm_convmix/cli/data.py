"""Verb that lists data sets and lays them out."""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

from timm_convmix.datasets import DATASETS, lay_out, list_datasets


def add_verbs(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add ``data``."""
    parser = verbs.add_parser(
        "data",
        help="data sets laid out for timm, and a training recipe for each",
        description="Without arguments: the data sets, their sources and licences, and for each a recipe: a config\n"
        "for timm's train.py. With NAME and DIR: lay one out as DIR/train/CLASS/* and DIR/validation/CLASS/*,\n"
        "whole or not at all, from its official source or from files that you have. Beside the recipes lies\n"
        "finetune.yaml, for an image folder of your own.",
        epilog="examples:\n"
        "  timm-convmix data\n"
        "  timm-convmix data cifar10 data/cifar10\n"
        "  timm-convmix data tiny_imagenet data/tiny --from tiny-imagenet-200.zip\n"
        "  timm-convmix data svhn data/svhn --from Downloads/svhn/\n",
    )
    parser.add_argument("name", nargs="?", choices=list(DATASETS), metavar="NAME", help=", ".join(DATASETS))
    parser.add_argument("folder", nargs="?", metavar="DIR", help="to be made; may exist if it is empty")
    parser.add_argument(
        "--from",
        dest="source",
        metavar="ARCHIVE_OR_FOLDER",
        help="the official archive, or a folder with the official files, instead of a download",
    )
    parser.set_defaults(run=partial(run_data, parser.error))


def run_data(wrong_usage: Callable[[str], NoReturn], args: argparse.Namespace) -> list[dict[str, Any]]:
    """List, or lay one out; the row says what there is now."""
    if args.name is None:
        if args.source is not None:
            wrong_usage("--from needs NAME and DIR")
        return list_datasets()
    if args.folder is None:
        wrong_usage(f"{args.name} needs a DIR to be laid out in")
    dataset = lay_out(args.name, args.folder, source=args.source, quiet=args.quiet)
    row = dict(name=dataset.name, folder=args.folder, classes=dataset.classes)
    return [row | dict(train=dataset.train, validation=dataset.validation, recipe=str(dataset.recipe))]

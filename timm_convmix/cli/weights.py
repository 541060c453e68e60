"""Verbs that make, publish and check weights."""

import argparse
import sys
from typing import Any

from timm.utils import ParseKwargs

from timm_convmix.errors import ConvMixError
from timm_convmix.weights.manifest import read_manifest
from timm_convmix.weights.packing import DTYPES, Images, pack, read_checkpoint
from timm_convmix.weights.publishing import publish
from timm_convmix.weights.rebuilding import rebuild
from timm_convmix.weights.verifying import pull, select, verify


def add_verbs(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add ``pack``, ``publish``, ``verify``, ``pull`` and ``rebuild``."""
    _add_pack(verbs)
    _add_publish(verbs)
    _add_verify(verbs)
    _add_pull(verbs)
    _add_rebuild(verbs)


def _add_manifest(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--manifest", metavar="FILE", help="weights_manifest.json (default: this package's own)")


def _add_packed(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--packed", metavar="DIR", default="packed", help="folder of packed weights (default: packed)")


def _add_pack(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = verbs.add_parser(
        "pack",
        help="a trained checkpoint to a verified folder and a manifest entry",
        description="Turn what train.py left into a folder that timm and transformers load, load it again to compare,\n"
        "measure it on real images, and record all of it in the manifest.",
        epilog="examples:\n"
        "  timm-convmix pack output/train/RUN --name convmix_resnet18_cifar.cifar10 --data DATA\n"
        "  timm-convmix pack RUN/model_best.pth.tar --name convmix_resnet50.mine --data DATA --dtype bfloat16 \\\n"
        "      --baseline convmix_resnet50.mine_baseline --manifest my_manifest.json\n",
    )
    parser.add_argument("checkpoint", help="output folder of train.py, a checkpoint in one, or a safetensors file")
    parser.add_argument("--name", required=True, help="convmix_ARCH.TAG to be")
    parser.add_argument("--data", required=True, metavar="DIR", help="images as SPLIT/CLASS/*")
    parser.add_argument("--split", default="validation", help="the part to measure on (default: validation)")
    parser.add_argument("--dataset", metavar="NAME", help="name of the data set (default: that of its folder)")
    parser.add_argument("--dataset-source", metavar="URL", help="where the images come from")
    parser.add_argument("--dataset-revision", metavar="REV", help="of the source")
    parser.add_argument("--output", metavar="DIR", default="packed", help="DIR/NAME is written (default: packed)")
    parser.add_argument("--ema", action="store_true", help="take the EMA weights")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the stored tensors (default: float32)")
    parser.add_argument("--tolerance", type=float, default=0.1, help="points between measured and claimed top-1 (0.1)")
    parser.add_argument("--baseline", metavar="NAME", help="packed plain backbone of the same recipe")
    parser.add_argument("--base", metavar="NAME", help="weights that the training started from")
    parser.add_argument("--license", help="of the weights (default: that of the base weights, or apache-2.0)")
    parser.add_argument("--model-kwargs", nargs="*", action=ParseKwargs, help="KEY=VALUE of a safetensors file's model")
    parser.add_argument("--seed", type=int, help="of the training, where the checkpoint does not say")
    parser.add_argument("--epochs", type=int, help="trained, where the checkpoint does not say")
    parser.add_argument("--embed", action="store_true", help="copy the weights into this package (a checkout)")
    parser.add_argument("--workers", type=int, default=0, help="processes that read images (default: 0)")
    _add_manifest(parser)
    parser.set_defaults(run=run_pack)


def run_pack(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Pack; the row says what was measured."""
    saved = read_checkpoint(
        args.checkpoint, use_ema=args.ema, model_kwargs=args.model_kwargs, seed=args.seed, epochs=args.epochs
    )
    record = pack(
        saved,
        name=args.name,
        images=Images(
            data_dir=args.data,
            split=args.split,
            name=args.dataset,
            source=args.dataset_source,
            revision=args.dataset_revision,
            workers=args.workers,
        ),
        output=args.output,
        manifest=args.manifest,
        dtype=args.dtype,
        tolerance=args.tolerance,
        baseline=args.baseline,
        base=args.base,
        license=args.license,
        embed=args.embed,
        quiet=args.quiet,
    )
    top1, top5 = round(record.metrics.top1, 4), round(record.metrics.top5, 4)
    row = dict(name=args.name, folder=f"{args.output}/{args.name}", bytes=record.bytes, sha256=record.sha256)
    return [row | dict(top1=top1, top5=top5, images=record.metrics.count)]


def _add_publish(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = verbs.add_parser(
        "publish",
        help="packed weights to the Hugging Face Hub",
        description="Publish packed weights, one commit each, load them back in a fresh process with an empty cache,\n"
        "and only then write repository and commit into the manifest. Run it again after any failure.\n"
        "The token is the one of `hf auth login`, or HF_TOKEN.",
        epilog="examples:\n"
        "  timm-convmix publish convmix_resnet18_cifar.cifar10 --dry-run\n"
        "  timm-convmix publish convmix_resnet18_cifar.cifar10 --namespace my-team --yes\n",
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("names", nargs="*", default=[], metavar="NAME", help="convmix_ARCH.TAG of the manifest")
    which.add_argument("--all", action="store_true", help="every entry of the manifest")
    parser.add_argument("--namespace", help="user or organisation (default: the token's user)")
    parser.add_argument("--revision", help="branch (default: main)")
    parser.add_argument("--private", action="store_true", help="make new repositories private")
    parser.add_argument(
        "--create-pr", action="store_true", help="open a pull request instead of committing to the branch"
    )
    parser.add_argument("--dry-run", action="store_true", help="show what would be done; nothing is written")
    parser.add_argument("--yes", action="store_true", help="do it; without this it is a dry run that asks for --yes")
    _add_packed(parser)
    _add_manifest(parser)
    parser.set_defaults(run=run_publish)


def run_publish(args: argparse.Namespace) -> tuple[list[dict[str, Any]], int]:
    """Publish; a row an entry that was, a line on stderr for one that was not, and then 1."""
    if not (args.yes or args.dry_run):
        sys.stderr.write("Nothing is written without --yes; this is what would be done:\n")
    rows, status = [], 0
    for name in select(args.names, args.manifest):
        try:
            row = publish(
                name,
                packed=args.packed,
                manifest=args.manifest,
                namespace=args.namespace,
                revision=args.revision,
                private=args.private,
                create_pr=args.create_pr,
                dry_run=args.dry_run or not args.yes,
            )
            rows.append(row)
        except (ConvMixError, OSError) as error:  # noqa: PERF203  (the others go on)
            sys.stderr.write(f"timm-convmix publish: {error}\n")
            status = 1
    return rows, status


def _add_verify(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = verbs.add_parser(
        "verify",
        help="weights of the manifest: reachable, unchanged, the same logits, the same accuracy",
        description="Try every claim of the manifest again. Exit code 1 if one does not hold.",
        epilog="examples:\n  timm-convmix verify\n  timm-convmix verify convmix_resnet18_cifar.cifar10 --data DATA\n",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="convmix_ARCH.TAG of the manifest (default: all)")
    parser.add_argument("--data", metavar="DIR", help="images as SPLIT/CLASS/*, to measure the accuracy again")
    parser.add_argument("--cache-dir", metavar="DIR", help="cache of huggingface_hub")
    parser.add_argument("--workers", type=int, default=0, help="processes that read images (default: 0)")
    _add_packed(parser)
    _add_manifest(parser)
    parser.set_defaults(run=run_verify)


def run_verify(args: argparse.Namespace) -> tuple[list[dict[str, Any]], int]:
    """Verify; a row an entry, and 1 if one is not ok."""
    return _judged(
        verify(
            args.names,
            manifest=args.manifest,
            packed=args.packed,
            data_dir=args.data,
            cache_dir=args.cache_dir,
            workers=args.workers,
            quiet=args.quiet,
        )
    )


def _add_pull(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = verbs.add_parser(
        "pull",
        help="weights ahead of time, for a machine that will be offline",
        description="Download weights into huggingface_hub's cache (HF_HOME) and verify them.",
        epilog="examples:\n"
        "  timm-convmix pull convmix_resnet18_cifar.cifar10\n"
        "  timm-convmix pull hf-hub:my-team/convmix_resnet50.mine --cache-dir cache\n",
    )
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help="convmix_ARCH.TAG of the manifest, or hf-hub:NAMESPACE/NAME[@REVISION] (default: all of the manifest)",
    )
    parser.add_argument("--cache-dir", metavar="DIR", help="cache of huggingface_hub")
    _add_manifest(parser)
    parser.set_defaults(run=run_pull)


def run_pull(args: argparse.Namespace) -> tuple[list[dict[str, Any]], int]:
    """Pull; a row an entry, and 1 if one is not ok."""
    return _judged(pull(args.names, manifest=args.manifest, cache_dir=args.cache_dir))


def _add_rebuild(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = verbs.add_parser(
        "rebuild",
        help="a weight of the manifest, trained anew from its recipe and seed",
        description="Train a weight of the manifest anew with timm's train.py, by the recipe and the seed that its\n"
        "record holds, its paired baseline first, and pack both into DIR. The rows say whether the bytes came out the\n"
        "same; another machine or version may round otherwise, and training enlarges that.",
        epilog="examples:\n"
        "  timm-convmix rebuild convmix_tiny_cifar.cifar10 --script pytorch-image-models/train.py --data DATA\n",
    )
    parser.add_argument("name", metavar="NAME", help="convmix_ARCH.TAG of the manifest")
    parser.add_argument("--script", required=True, metavar="FILE", help="train.py of a checkout of timm")
    parser.add_argument("--data", required=True, metavar="DIR", help="the images of the record, as SPLIT/CLASS/*")
    parser.add_argument("--output", metavar="DIR", default="rebuilt", help="runs and packed folders (default: rebuilt)")
    parser.add_argument("--workers", type=int, default=0, help="processes that read images (default: 0)")
    _add_manifest(parser)
    parser.set_defaults(run=run_rebuild)


def run_rebuild(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rebuild; a row a weight says what it measures now and what its record says."""
    recorded = read_manifest(args.manifest)
    rebuilt = rebuild(
        args.name,
        script=args.script,
        data_dir=args.data,
        output=args.output,
        manifest=args.manifest,
        workers=args.workers,
        quiet=args.quiet,
    )
    return [
        dict(
            name=name,
            folder=f"{args.output}/{name}",
            top1=round(record.metrics.top1, 4),
            recorded=round(recorded[name].metrics.top1, 4),
            same_bytes=record.sha256 == recorded[name].sha256,
        )
        for name, record in rebuilt.items()
    ]


def _judged(rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], int]:
    """Rows with the exit code that they amount to."""
    return rows, int(not all(row["ok"] for row in rows))

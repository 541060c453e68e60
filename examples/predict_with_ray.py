"""Classify the images of a large folder tree with Ray Data, on one machine or on a cluster.

    python examples/predict_with_ray.py PHOTOS CLASSES --workers 8

CLASSES gets a CSV file a shard of 1000 images, whole or not at all: the same command again, after a kill, does the
shards that are missing. On a cluster (--address), every machine must see both folders under the same path.
"""

import argparse
import csv
import hashlib
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray
import torch

import timm_convmix
from timm_convmix.prediction import find_images, load_model, predict

FIELDS = ["file", "rank", "label", "class_index", "probability", "error"]


class Predictor:
    """A process with its own model, which takes a shard after the other."""

    def __init__(self, model: str | None, output: Path) -> None:
        self.model, self.output = load_model(model), output
        self.device = "cuda" if torch.cuda.is_available() else "cpu"  # Ray shows an actor its own GPUs only

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Classify the files of one shard and write its rows; a file that is no image gets one with the error."""
        [name], [files] = batch["shard"], batch["files"]
        errors: list[dict[str, Any]] = []
        try:
            rows = predict(
                [Path(file) for file in files],
                model=self.model,
                device=self.device,
                topk=1,
                on_skip=lambda file, reason: errors.append(dict(file=file, error=reason)),
                quiet=True,
            )
        except timm_convmix.InputError:  # not one of them is an image
            if len(errors) < len(files):
                raise
            rows = []
        unfinished = self.output / f".{name}.{os.getpid()}"
        with unfinished.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(sorted(rows + errors, key=lambda row: row["file"]))
        unfinished.replace(self.output / name)
        return dict(images=[len(rows)], errors=[len(errors)])


def shards(images: Path, size: int, model: str | None) -> dict[str, list[str]]:
    """Name -> files; a name changes with the names of the files and of the model, not with what they hold."""
    files = sorted(map(str, find_images([images.resolve()])))
    groups = [files[start : start + size] for start in range(0, len(files), size)]
    return {f"{hashlib.sha256(repr([model, *group]).encode()).hexdigest()[:16]}.csv": group for group in groups}


def main() -> None:
    """Classify what no shard holds yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--model", help="as of `timm-convmix predict`")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes, each with a CPU")
    parser.add_argument("--gpus", type=float, default=0, help="GPUs a process, such as 1 or 0.5")
    parser.add_argument("--shard-size", type=int, default=1000)
    parser.add_argument("--address", help="of a running cluster; without it, Ray runs on this machine")
    args = parser.parse_args()

    args.output.mkdir(parents=True, exist_ok=True)
    output = args.output.resolve()
    wanted = shards(args.images, args.shard_size, args.model)
    todo = [dict(shard=name, files=files) for name, files in wanted.items() if not (output / name).exists()]
    print(f"{len(todo)} of {len(wanted)} shards to do")
    if not todo:
        return
    here = dict(num_cpus=args.workers + 1, include_dashboard=False)  # one more, for Ray's reading of the list
    ray.init(address=args.address, **({} if args.address else here))
    done = ray.data.from_items(todo, override_num_blocks=len(todo)).map_batches(
        Predictor,
        fn_constructor_args=(args.model, output),
        batch_size=1,  # a batch is a shard
        num_gpus=args.gpus or None,
        concurrency=min(args.workers, len(todo)),
    )
    counts = done.to_pandas().sum()
    print(f"{counts['images']} images, {counts['errors']} files that are none")


if __name__ == "__main__":
    main()

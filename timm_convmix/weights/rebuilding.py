"""A weight of the manifest, trained anew from its own record: recipe, seed, images, and the paired baseline first."""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from timm_convmix.errors import PackingError
from timm_convmix.weights.manifest import MANIFEST_NAME, WeightRecord
from timm_convmix.weights.measuring import dataset_checksum, open_dataset
from timm_convmix.weights.packing import (
    RECIPE_NAME,
    Images,
    format_recipe,
    origin_of,
    pack,
    read_checkpoint,
    recipe_of,
)
from timm_convmix.weights.verifying import select


def rebuild(
    name: str,
    *,
    script: str | Path,
    data_dir: str | Path,
    output: str | Path = "rebuilt",
    manifest: str | Path | None = None,
    workers: int = 0,
    quiet: bool = False,
) -> dict[str, WeightRecord]:
    """Train a weight anew with timm's train.py, and pack it beside a manifest of its own.

    A baseline that it is paired to comes first. A run that reached its last epoch is not trained again.

    Args:
        name: ``arch.tag`` of the manifest.
        script: timm's train.py; it uses the timm that is installed.
        data_dir: The images that the record names, as ``SPLIT/CLASS/*``.
        output: ``output/runs/NAME`` is what train.py left, ``output/NAME`` the packed folder; the new record stands in
            ``output/weights_manifest.json``.
        manifest: The weights_manifest.json to read; None is this package's own.
        workers: Processes that read images while measuring.
        quiet: Show neither what train.py writes nor progress bars.

    Returns:
        Name -> new record, of the baseline and of what is paired to it.

    Raises:
        ManifestError: There is no such entry, or its baseline has none.
        PackingError: There is no such script, the images are others, the recipe does not say all, or the training
            failed.
    """
    script, output = Path(script), Path(output)
    if not script.is_file():
        raise PackingError(f"{script}: no such file; name train.py in a checkout of timm.")
    baseline = select([name], manifest)[name].baseline
    records = select([*([baseline.name] if baseline else []), name], manifest)
    for each, record in records.items():
        check(each, record, data_dir)
    rebuilt = {}
    for each, record in records.items():
        run, dataset = output / "runs" / each, record.dataset
        if not is_complete(run, record):
            train(each, record, script=script, data_dir=data_dir, run=run, quiet=quiet)
        rebuilt[each] = pack(
            read_checkpoint(run),
            name=each,
            images=Images(
                data_dir=data_dir,
                split=dataset.split,
                name=dataset.name,
                source=dataset.source,
                revision=dataset.revision,
                workers=workers,
            ),
            output=output,
            manifest=output / MANIFEST_NAME,
            dtype=record.dtype,
            baseline=record.baseline.name if record.baseline else None,
            license=record.license,
            quiet=quiet,
        )
    return rebuilt


def check(name: str, record: WeightRecord, data_dir: str | Path) -> None:
    """Refuse what one process of train.py would not make again.

    Args:
        name: Of the record.
        record: Whose recipe.
        data_dir: The images.

    Raises:
        PackingError: The recipe is incomplete or of several processes, or the images are others.
    """
    recipe, by_hand = record.recipe, "train it with train.py yourself, and pack what it leaves"
    if "model" not in recipe:
        raise PackingError(f"{name} was packed without the arguments of train.py: {by_hand}.")
    if origin_of(recipe, None, record.license, name)[0] != record.base:
        raise PackingError(f"{name} was trained from a file ({record.base and record.base.name}): {by_hand}.")
    if (processes := recipe.get("world_size", 1)) > 1:
        raise PackingError(f"{name} was trained by {processes} processes: {by_hand}.")
    if dataset_checksum(open_dataset(data_dir, record.dataset.split, channels=record.input_size[0])) != (
        record.dataset.checksum
    ):
        raise PackingError(
            f"{data_dir}: other images of the split {record.dataset.split!r} than those of {record.dataset.name} that"
            f" {name} was measured on; take those of {record.dataset.source or 'its record'}."
        )


def is_complete(run: Path, record: WeightRecord) -> bool:
    """Whether a run's folder holds the last epoch of a record's training."""
    if not (run / "last.pth.tar").is_file():
        return False
    saved = read_checkpoint(run)
    return saved.epochs == record.epochs and format_recipe(recipe_of(saved.args)) == format_recipe(record.recipe)


def train(
    name: str, record: WeightRecord, *, script: Path, data_dir: str | Path, run: Path, quiet: bool = False
) -> None:
    """Run train.py in a process of its own, with a record's recipe, into a folder that is emptied first.

    Args:
        name: Of the record, for the message.
        record: Whose recipe.
        script: timm's train.py.
        data_dir: The images.
        run: The folder.
        quiet: Show nothing of what it writes.

    Raises:
        PackingError: It failed.
    """
    shutil.rmtree(run, ignore_errors=True)
    with tempfile.TemporaryDirectory() as temporary:
        copy, recipe = Path(temporary, script.name), Path(temporary, RECIPE_NAME)
        shutil.copyfile(script, copy)  # beside timm's source it would import that
        recipe.write_text(format_recipe(record.recipe), encoding="utf-8")
        arguments = ["-c", recipe, "--data-dir", data_dir, "--output", run.parent, "--experiment", run.name]
        ended = subprocess.run(  # noqa: S603  (the script that the user named)
            [sys.executable, "-m", "timm_convmix", "run", *map(str, (copy, *arguments))],
            check=False,
            stdout=subprocess.PIPE if quiet else sys.stderr,
            stderr=subprocess.STDOUT if quiet else None,
        )
    if ended.returncode:
        *_, last = ["", *(ended.stdout or b"").decode(errors="replace").strip().splitlines()]
        raise PackingError(f"{name}: train.py ended with exit code {ended.returncode}{last and f': {last}'}.")

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
        PackingError: There is no such entry or script, the images are others, the training started from a file, or it
            failed.
    """
    record, script, output = select([name], manifest)[name], Path(script), Path(output)
    if not script.is_file():
        raise PackingError(f"{script}: no such file; name train.py in a checkout of timm.")
    if origin_of(record.recipe, None, record.license, name)[0] != record.base:
        raise PackingError(f"{name} was trained from a file ({record.base and record.base.name}): train it by hand.")
    checksum = dataset_checksum(open_dataset(data_dir, record.dataset.split, channels=record.input_size[0]))
    if checksum != record.dataset.checksum:
        raise PackingError(
            f"{data_dir}: other images of the split {record.dataset.split!r} than those of {record.dataset.name} that"
            f" {name} was measured on."
        )
    rebuilt: dict[str, WeightRecord] = {}
    if record.baseline:
        rebuilt = rebuild(
            record.baseline.name,
            script=script,
            data_dir=data_dir,
            output=output,
            manifest=manifest,
            workers=workers,
            quiet=quiet,
        )
    run = output / "runs" / name
    if not is_complete(run, record):
        train(name, record, script=script, data_dir=data_dir, run=run, quiet=quiet)
    rebuilt[name] = pack(
        read_checkpoint(run),
        name=name,
        images=Images(
            data_dir=data_dir,
            split=record.dataset.split,
            name=record.dataset.name,
            source=record.dataset.source,
            revision=record.dataset.revision,
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

"""Every claim of the manifest, tried again: reachable, the right bytes, the same logits, the same accuracy."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import constants
from timm.models import split_model_name_tag

from timm_convmix.errors import ChecksumError, ConvMixError, ManifestError, WeightsError
from timm_convmix.weights.hub import (
    CONFIG_NAME,
    HUB_PREFIX,
    WEIGHTS_NAME,
    client,
    download,
    download_weights,
    hub_errors,
    stored_digests,
)
from timm_convmix.weights.loading import Digest, StateDict, load_record, load_repository, load_strictly, read_verified
from timm_convmix.weights.manifest import WeightRecord, read_manifest
from timm_convmix.weights.measuring import dataset_checksum, evaluate, open_dataset, probe_input

TOLERANCE = 0.1
"""Points by which a top-1 accuracy may differ between machines."""


def select(names: Sequence[str], manifest: str | Path | None = None) -> dict[str, WeightRecord]:
    """Entries of a manifest by name, all of them if none is named.

    Raises:
        ManifestError: There is no such entry, or the manifest is not valid.
    """
    records = read_manifest(manifest)
    if unknown := [name for name in names if name not in records]:
        raise ManifestError(f"{unknown[0]} is not in the manifest, which has {', '.join(records) or 'no weights'}.")
    return {name: records[name] for name in names or records}


def pull(
    names: Sequence[str], *, manifest: str | Path | None = None, cache_dir: str | Path | None = None
) -> list[dict[str, Any]]:
    """Download weights into huggingface_hub's cache and verify them, for a machine that will be offline.

    Args:
        names: Of entries, or ``hf-hub:NAMESPACE/NAME[@revision]``; all of the manifest if there is none.
        manifest: The weights_manifest.json; None is this package's own.
        cache_dir: Of huggingface_hub.

    Returns:
        A row a weight: name, source, revision (of a repository the commit that it resolved to), bytes, ok, error.

    Raises:
        ManifestError: There is no such entry, or the manifest is not valid.
    """
    entries = [name for name in names if not name.startswith(HUB_PREFIX)]
    records = select(entries, manifest) if entries or not names else {}
    rows = []
    for name in names or records:
        record = records.get(name)
        row: dict[str, Any] = dict(name=name, source=None, revision=None, bytes=None, ok=False, error=None)
        try:
            if record:
                row |= dict(source=record.embedded or record.hub_id, revision=record.revision, bytes=record.bytes)
                load_record(record, name=name, cache_dir=cache_dir)
            else:
                row |= _pull_repository(name, manifest, cache_dir)
            row["ok"] = True
        except (ConvMixError, OSError) as failure:
            row["error"] = str(failure)
        rows.append(row)
    return rows


def _pull_repository(name: str, manifest: str | Path | None, cache_dir: str | Path | None) -> dict[str, Any]:
    """Fetch config and weights of a repository at one commit, checked as when they are loaded."""
    repo = name.removeprefix(HUB_PREFIX)
    repo_id = repo.partition("@")[0]
    if (config := download(repo, CONFIG_NAME, what=name, cache_dir=cache_dir)) is None:
        raise WeightsError(f"{name}: {repo_id} holds no {CONFIG_NAME}, so timm cannot build a model of it.")
    commit = config.parent.name
    load_repository(f"{repo_id}@{commit}", read_manifest(manifest), what=name, cache_dir=cache_dir)
    weights = download_weights(f"{repo_id}@{commit}", what=name, cache_dir=cache_dir)  # from the cache
    return dict(source=repo_id, revision=commit, bytes=weights.stat().st_size)


def verify(
    names: Sequence[str] = (),
    *,
    manifest: str | Path | None = None,
    packed: str | Path = "packed",
    data_dir: str | Path | None = None,
    cache_dir: str | Path | None = None,
    workers: int = 0,
    quiet: bool = False,
) -> list[dict[str, Any]]:
    """Try each entry: get its bytes, check them, load them, reproduce the probe, and with images the accuracy.

    Args:
        names: Of entries; all of the manifest if there is none.
        manifest: The weights_manifest.json; None is this package's own.
        packed: Where the folders of entries stand that are on no Hub and not in the package.
        data_dir: Images as ``SPLIT/CLASS/*``; None measures no accuracy.
        cache_dir: Of huggingface_hub.
        workers: Processes that read images.
        quiet: Show no progress bar.

    Returns:
        A row an entry: name, state, bytes ('ok' once they are those recorded), hub ('ok' once the Hub states the
        recorded digest at the pinned commit; None where the entry is on no Hub, or HF_HUB_OFFLINE is set), probe (how
        far the worst logit is off), top1 (measured anew, in percent), ok, error.
    """
    rows = []
    for name, record in select(names, manifest).items():
        row: dict[str, Any] = dict(
            name=name, state=record.state, bytes=None, hub=None, probe=None, top1=None, ok=False, error=None
        )
        try:
            tensors = _tensors(name, record, Path(packed), cache_dir)
            row["bytes"] = "ok"
            if record.state == "published" and not constants.HF_HUB_OFFLINE:
                check_hub(name, record)
                row["hub"] = "ok"
            model = build(name, record, tensors)
            row["probe"] = check_probe(model, record)
            if data_dir is not None:
                row["top1"] = check_accuracy(model, record, data_dir, workers=workers, quiet=quiet)
            row["ok"] = True
        except (ConvMixError, OSError) as failure:
            row["error"] = str(failure)
        rows.append(row)
    return rows


def _tensors(name: str, record: WeightRecord, packed: Path, cache_dir: str | Path | None) -> StateDict:
    folder = packed / name
    if record.state == "packed" and not record.embedded and folder.is_dir():
        return read_verified(folder / WEIGHTS_NAME, Digest(record.sha256, record.bytes), source=str(folder))
    return load_record(record, name=name, cache_dir=cache_dir)


def check_hub(name: str, record: WeightRecord) -> None:
    """Ask the Hub, whatever the cache holds, for the pinned file.

    Raises:
        HubError: It cannot be asked, or has no such repository or commit.
        ChecksumError: It has no such file, or another.
    """
    repo_id, revision = str(record.hub_id), str(record.revision)
    ahead = f"(`timm-convmix pull {HUB_PREFIX}{repo_id}@{revision}`)"
    with hub_errors(name, f"{repo_id} at {revision}", ahead):
        found = stored_digests(client(), repo_id, revision, [record.filename]).get(record.filename)
    if found != record.sha256:
        states = f"states sha256 {found}" if found else "has no such large file"
        raise ChecksumError(
            f"{name}: expected sha256 {record.sha256} of {record.filename}, but {repo_id} at {revision} {states}."
        )


def build(name: str, record: WeightRecord, tensors: StateDict) -> Any:
    """The model of an entry, with these tensors.

    Raises:
        ManifestError: There is no such architecture, or it does not take the recorded arguments.
        WeightsError: The tensors are not those of the architecture.
    """
    arch, _ = split_model_name_tag(name)
    try:
        model = timm.create_model(arch, num_classes=record.num_classes, **record.model_args)
    except (RuntimeError, TypeError) as error:
        raise ManifestError(f"{name} cannot be built ({error}); was it recorded with other versions?") from error
    load_strictly(model, tensors, source=name)
    return model.eval()


@torch.no_grad()
def check_probe(model: Any, record: WeightRecord) -> str:
    """Compare the logits of the fixed input with those recorded.

    Returns:
        How far the worst of them is off.

    Raises:
        ManifestError: It is farther than the recorded tolerance.
    """
    logits = model(probe_input(record.input_size))[0]
    expected = torch.tensor(record.probe.logits)
    worst = float((logits[list(record.probe.classes)] - expected).abs().max())
    if not worst <= record.probe.tolerance:
        raise ManifestError(f"probe: a logit is off by {worst:.2g}, and {record.probe.tolerance:.2g} is allowed.")
    return f"{worst:.1e}"


def check_accuracy(model: Any, record: WeightRecord, data_dir: str | Path, *, workers: int, quiet: bool) -> float:
    """Measure the top-1 accuracy again, on images of the same checksum.

    Raises:
        ManifestError: The images are others, or the accuracy is.
        PackingError: There are no images.
    """
    dataset = open_dataset(data_dir, record.dataset.split, channels=record.input_size[0])
    if (found := dataset_checksum(dataset)) != record.dataset.checksum:
        raise ManifestError(
            f"data: {data_dir} has images of checksum {found}, measured were {record.dataset.checksum}."
        )
    config = dataclasses.asdict(record) | {"crop_mode": model.pretrained_cfg.get("crop_mode", "center")}
    top1 = evaluate(model, dataset, config, workers=workers, quiet=quiet).top1
    if abs(top1 - record.metrics.top1) > TOLERANCE:
        raise ManifestError(f"accuracy: top-1 is {top1:.2f} %, and {record.metrics.top1:.2f} % is recorded.")
    return round(top1, 4)

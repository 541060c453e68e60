"""Bytes to verified bytes to tensors to a strictly loaded model."""

import json
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from timm.models import load_pretrained, load_state_dict
from torch import Tensor, nn

from timm_convmix.errors import ChecksumError, HubError, WeightsError
from timm_convmix.weights.hub import CONFIG_NAME, WEIGHTS_NAME, download, download_weights
from timm_convmix.weights.manifest import Manifest, Positive, Sha256, WeightRecord, embedded_path, fit

_logger = logging.getLogger(__name__)

StateDict = dict[str, Tensor]
OPTIONAL = ".num_batches_tracked"
"""Absent from checkpoints older than torch 0.4.1; torch fills it in."""

Filter = Callable[[StateDict, nn.Module], StateDict]
CONFIG_KEY = "timm_convmix"
"""Top-level key of a config.json under which a packed folder records its digest; timm reads past it."""


# Bytes that are verified ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Digest:
    """What a weight file must be: its sha256 in hexadecimal, and its length in bytes."""

    sha256: str
    bytes: int


def read_verified(path: Path, digest: Digest, *, source: str) -> StateDict:
    """Read a safetensors file once, verify the bytes, and parse those same bytes.

    Args:
        path: The file.
        digest: What it must be.
        source: Where it comes from, for the message.

    Returns:
        Name -> tensor.

    Raises:
        ChecksumError: It is of another length, or its bytes differ.
        WeightsError: The bytes are as recorded, and no safetensors file.
        OSError: It cannot be read.
    """
    if (size := path.stat().st_size) != digest.bytes:  # before reading: it may be of any size
        raise ChecksumError(f"{source}: expected {digest.bytes} bytes of sha256 {digest.sha256}, found {size} bytes.")
    data = path.read_bytes()
    if (found := sha256(data).hexdigest()) != digest.sha256:
        raise ChecksumError(f"{source}: expected sha256 {digest.sha256}, found {found}.")
    try:
        return safetensors.torch.load(data)
    except Exception as error:  # of a hostile header the parser, or torch after it, complains in many ways
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise WeightsError(f"{source} is not a sound safetensors file ({reason}).") from error


def load_record(record: WeightRecord, *, name: str, cache_dir: str | Path | None = None) -> StateDict:
    """Get the tensors of a manifest's entry: from inside this package, or from the Hub at the pinned commit.

    Args:
        record: The entry.
        name: ``arch.tag``.
        cache_dir: Of huggingface_hub.

    Raises:
        ChecksumError: The bytes are not those recorded, after a second download too.
        WeightsError: The weights are packed only, and not in this package.
        HubError: They could not be fetched.
    """
    digest = Digest(record.sha256, record.bytes)
    if record.embedded and (path := embedded_path(record)).is_file():
        return read_verified(path, digest, source=f"{name}, {record.embedded} of this package")
    if record.state == "packed":
        raise WeightsError(
            f"{name} is trained and packed, but not published on a Hub yet: load the folder that `timm-convmix pack`"
            " wrote (local-dir:DIR), publish it (`timm-convmix publish`), or pass pretrained=False."
        )
    return _fetch_verified(f"{record.hub_id}@{record.revision}", record.filename, digest, name, cache_dir)


def load_repository(
    repo: str,
    manifest: Manifest,
    *,
    what: str,
    filename: str = WEIGHTS_NAME,
    cache_dir: str | Path | None = None,
) -> StateDict:
    """Get the tensors of any Hub repository, config and weights from one commit.

    Where the manifest lists the commit, the bytes are checked against the manifest; otherwise against the digest that
    a packed folder's config.json holds; where there is neither, a warning says so.

    Args:
        repo: ``NAMESPACE/NAME`` or ``NAMESPACE/NAME@revision``.
        manifest: Of this package.
        what: The model whose weights these are, for messages.
        filename: In the repository.
        cache_dir: Of huggingface_hub.

    Raises:
        ChecksumError: The bytes are not those stated, after a second download too.
        WeightsError: There is no such safetensors file.
        HubError: It could not be fetched.
    """
    repo_id, _, revision = repo.partition("@")
    config = download(repo, CONFIG_NAME, what=what, cache_dir=cache_dir)
    commit = config.parent.name if config else revision
    if commit:
        repo = f"{repo_id}@{commit}"
    # a server that names another commit than was asked for, or hides the config, is no way around the manifest
    own = (r for r in manifest.values() if r.hub_id == repo_id and r.revision in (commit, revision))
    record = next(own, None)
    digest = None
    try:
        digest = Digest(record.sha256, record.bytes) if record else config and stated_digest(config)
        if digest:
            return _fetch_verified(repo, filename, digest, what, cache_dir)
    except WeightsError:
        again = None if record else _state_again(repo, what, cache_dir)
        if again in (None, digest):
            raise
        return _fetch_verified(repo, filename, again, what, cache_dir)  # it was the config that was damaged
    path = download_weights(repo, what=what, filename=filename, cache_dir=cache_dir)
    _logger.warning("%s: %s states no checksum, its %s is loaded unverified.", what, repo, filename)
    return read_state_dict(path)


def load_local(path: Path) -> StateDict:
    """Get the tensors of a file or folder of the user's own; a packed folder's are verified against its config.json.

    Raises:
        ChecksumError: The bytes are not those that the folder's config.json states.
        WeightsError: See ``read_state_dict``.
    """
    config, weights = path / CONFIG_NAME, path / WEIGHTS_NAME
    if config.is_file() and weights.is_file() and (digest := stated_digest(config)):
        return read_verified(weights, digest, source=str(weights))
    return read_state_dict(path)


def stated_digest(config: Path) -> Digest | None:
    """The digest of model.safetensors in a packed folder's config.json; None where it states none.

    Raises:
        WeightsError: The file is no JSON, or states something that is no digest.
    """
    try:
        stated = json.loads(config.read_text(encoding="utf-8")).get(CONFIG_KEY)
        if stated is None:
            return None
        return Digest(fit(Sha256, stated["sha256"], "sha256"), fit(Positive, stated["bytes"], "bytes"))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WeightsError(f"{config}: {CONFIG_KEY} states no sha256 and bytes ({error!r}).") from error


def _state_again(repo: str, what: str, cache_dir: str | Path | None) -> Digest | None:
    """The digest in a repository's config.json once that is downloaded anew; None where that brings nothing."""
    with suppress(HubError, WeightsError):
        config = download(repo, CONFIG_NAME, what=what, cache_dir=cache_dir, force_download=True)
        return stated_digest(config) if config else None
    return None


def _fetch_verified(repo: str, filename: str, digest: Digest, what: str, cache_dir: str | Path | None) -> StateDict:
    """Download, or take from the cache, and verify; what does not verify is downloaded once more."""
    source = f"{what}: {filename} of {repo}"

    def fetch(*, force_download: bool) -> StateDict:
        path = download_weights(repo, what=what, filename=filename, cache_dir=cache_dir, force_download=force_download)
        return read_verified(path, digest, source=source)

    try:
        return fetch(force_download=False)
    except ChecksumError as cached:
        _logger.warning("%s The file is downloaded again.", cached)
        try:
            return fetch(force_download=True)
        except HubError as error:
            raise ChecksumError(f"{cached} It could not be downloaded again: {error}") from error
        except ChecksumError as again:
            raise ChecksumError(
                f"{again} That is so after a second download too: ask whoever publishes it, and who runs the proxy or"
                " mirror (HF_ENDPOINT) in between, or pass pretrained=False."
            ) from again


# Tensors --------------------------------------------------------------------------------------------------------------


def read_state_dict(path: str | Path) -> StateDict:
    """Read a safetensors file, a train.py checkpoint (EMA weights first, as timm does), or a folder of ``save_for_hf``.

    A checkpoint is read with torch's ``weights_only`` loader; of a folder only ``model.safetensors`` is.

    Raises:
        WeightsError: The file is absent, corrupt, truncated, or holds something else than tensors.
    """
    path = Path(path)
    file = path / WEIGHTS_NAME if path.is_dir() else path
    if not file.is_file():
        raise WeightsError(f"{file}: no such weight file; a folder must hold {WEIGHTS_NAME}, a pickle is not loaded.")
    try:
        state_dict = load_state_dict(str(file))
    except SafetensorError as error:
        raise WeightsError(
            f"{file} is not a sound safetensors file ({error}); get it again from its source."
        ) from error
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise WeightsError(
            f"{file} cannot be read as a checkpoint ({reason}); get it again from its source."
        ) from error
    if not state_dict or not all(isinstance(tensor, Tensor) for tensor in state_dict.values()):
        raise WeightsError(f"{file} holds no state dict: expected names and tensors.")
    return state_dict


def names_of(names: str | Sequence[str] | None) -> list[str]:
    """The ``classifier`` or ``first_conv`` of a timm cfg as a list: it may be none, one or several."""
    return [names] if isinstance(names, str) else list(names or [])


def count_classes(state_dict: StateDict, classifier: str | Sequence[str] | None) -> int | None:
    """Outputs of the classifier in a state dict; None where there is none of that name."""
    weights = [f"{name}.weight" for name in names_of(classifier)]
    return next((state_dict[name].shape[0] for name in weights if name in state_dict and state_dict[name].ndim), None)


def load_strictly(
    model: Any,
    state_dict: StateDict,
    *,
    source: str,
    fresh_head: bool = False,
    num_classes: int | None = None,
    filter_fn: Filter | None = None,
) -> None:
    """Load a state dict into a timm model, adapting head and stem as timm does and refusing every other difference.

    timm itself stops being strict as soon as the class counts differ: a file of another architecture would then load
    nothing, and only a log line would say so.

    Args:
        model: With timm's ``pretrained_cfg``, ``num_classes`` and ``in_chans``.
        state_dict: Names as in ``model`` once ``filter_fn`` has seen them.
        source: Where the tensors come from, for the message.
        fresh_head: Whether the model may keep its own head where the source's has another class count, or none.
        num_classes: Of the source; None counts its classifier's outputs.
        filter_fn: The family's own conversion of foreign names and shapes.

    Raises:
        WeightsError: Something else than the replaced head or the stem's input channels differs.
    """
    cfg: dict[str, Any] = dict(model.pretrained_cfg, state_dict=state_dict, source=None, label_offset=0)
    classifiers = names_of(cfg.get("classifier"))
    heads = {f"{name}.{leaf}" for name in classifiers for leaf in ("weight", "bias")}
    stems = [f"{name}.weight" for name in names_of(cfg.get("first_conv"))]
    refused = f"{source} is not a checkpoint of {cfg.get('architecture', type(model).__name__)}"
    if not state_dict:  # timm would look for others, on a Hub
        raise WeightsError(f"{refused}: it holds no tensors.")

    def fit(tensors: StateDict, model: Any) -> StateDict:
        try:
            tensors = dict(filter_fn(tensors, model) if filter_fn else tensors)
        except Exception as error:
            raise WeightsError(f"{refused}: its names or shapes are of another family.") from error
        own = model.state_dict()
        cfg["num_classes"] = count_classes(tensors, cfg.get("classifier")) if num_classes is None else num_classes
        free = heads if fresh_head and cfg["num_classes"] != model.num_classes else set()
        if free and model.num_classes == 0:  # a norm that stands beside the classifier goes with it in some families
            parents = {f"{name.rpartition('.')[0]}." for name in classifiers} - {".", "backbone."}
            free = free | {name for name in tensors.keys() - own.keys() if name.startswith(tuple(parents))}
        faults = {
            "missing": {name for name in own.keys() - tensors.keys() - free if not name.endswith(OPTIONAL)},
            "unexpected": tensors.keys() - own.keys() - free,
            "of another shape": {
                name
                for name in own.keys() & tensors.keys() - free
                if _fixed_shape(own[name], name in stems) != _fixed_shape(tensors[name], name in stems)
            },
        }
        if any(faults.values()):
            raise WeightsError(
                f"{refused}: {'; '.join(_listed(fault, sorted(names)) for fault, names in faults.items() if names)}."
                " Create the model with the architecture, stages, mixer and num_classes it was saved with."
            )
        for stem in own.keys() & stems:  # how many of the stem's input planes an image channel feeds is the family's
            channels = tensors[stem].shape[1] * model.in_chans // own[stem].shape[1]
            cfg["input_size"] = (channels, *cfg["input_size"][1:])
        return tensors

    load_pretrained(model, cfg, num_classes=model.num_classes, in_chans=model.in_chans, filter_fn=fit)


def _fixed_shape(tensor: Tensor, is_stem: bool) -> tuple[int, ...]:
    """The sizes that a source must share: of a stem's weight all but the input channels, which can be adapted."""
    return (*tensor.shape[:1], *tensor.shape[2:], tensor.ndim) if is_stem else tuple(tensor.shape)


def _listed(fault: str, names: list[str]) -> str:
    return f"{len(names)} {fault} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"

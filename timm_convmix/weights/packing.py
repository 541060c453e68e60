"""A trained checkpoint to a folder that timm and transformers load, and the record that vouches for it.

What is packed has proved itself: the folder was loaded again, gave the checkpoint's logits exactly, and was evaluated.
"""

import argparse
import csv
import dataclasses
import datetime
import json
import tempfile
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, get_args

import safetensors.torch
import timm
import torch
from timm.data import resolve_input_data_config
from timm.models import (
    PretrainedCfg,
    clean_state_dict,
    get_arch_pretrained_cfgs,
    get_model_args,
    get_pretrained_cfg,
    is_model,
    split_model_name_tag,
)
from torch import Tensor

from timm_convmix.errors import PackingError
from timm_convmix.version import __version__
from timm_convmix.weights.card import format_card
from timm_convmix.weights.hub import CONFIG_NAME, WEIGHTS_NAME
from timm_convmix.weights.loading import CONFIG_KEY, Digest, load_strictly
from timm_convmix.weights.manifest import (
    PACKAGE,
    Base,
    Baseline,
    Dataset,
    Dtype,
    Name,
    WeightRecord,
    fit,
    read_manifest,
    update_manifest,
    write_atomically,
)
from timm_convmix.weights.measuring import dataset_checksum, evaluate, hardware, open_dataset, probe, probe_input

CARD_NAME = "README.md"
RECIPE_NAME = "recipe.yaml"
DTYPES = {name: getattr(torch, name) for name in get_args(Dtype)}
PLACES = {
    "class_map",
    "config",
    "data",
    "data_dir",
    "experiment",
    "initial_checkpoint",
    "local_rank",
    "output",
    "pretrained_path",
    "resume",
}
"""Arguments of train.py that name a place of one machine; they are no part of a recipe."""
OPEN_LICENSES = {"apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "cc-by-4.0", "cc0-1.0"}
"""Of base weights, under which a fine-tuned weight may be published without asking."""
EMBEDDED_LIMIT = 3_000_000
"""Bytes that one file inside the wheel may have."""


# The checkpoint -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checkpoint:
    """What a training run left.

    Args:
        path: Of the file.
        tensors: Name -> tensor.
        args: Of train.py.
        epochs: How many were trained.
        top1: The accuracy that the run itself measured for these weights, in percent; None where it says none.
    """

    path: Path
    tensors: dict[str, Tensor]
    args: dict[str, Any]
    epochs: int | None = None
    top1: float | None = None


def read_checkpoint(
    path: str | Path,
    *,
    use_ema: bool = False,
    model_kwargs: dict[str, Any] | None = None,
    seed: int | None = None,
    epochs: int | None = None,
) -> Checkpoint:
    """Read a train.py output folder, a checkpoint in one, or a safetensors file.

    A folder stands for its ``last.pth.tar``, since ``model_best.pth.tar`` was chosen on the images that it is measured
    on. Checkpoints are read with torch's ``weights_only`` loader.

    Args:
        path: The folder or file.
        use_ema: Take the EMA weights.
        model_kwargs: Arguments of the model; a safetensors file says none.
        seed: Of the training, likewise.
        epochs: Trained, likewise.

    Raises:
        PackingError: There is no such file, it cannot be read, or it has no EMA weights where those are asked for.
    """
    path = Path(path)
    path = path / "last.pth.tar" if path.is_dir() else path
    if use_ema and path.suffix == ".safetensors":
        raise PackingError(f"{path} holds one set of weights: give it without EMA, or a checkpoint of train.py.")
    try:
        if path.suffix == ".safetensors":
            stated = {"model_kwargs": model_kwargs, "seed": seed}
            return Checkpoint(
                path, safetensors.torch.load_file(path), {k: v for k, v in stated.items() if v is not None}, epochs
            )
        with torch.serialization.safe_globals([argparse.Namespace]):
            saved = torch.load(path, map_location="cpu", weights_only=True)
        key = "state_dict_ema" if use_ema else "state_dict"
        tensors, args, epoch = clean_state_dict(saved[key]), vars(saved["args"]), int(saved["epoch"])
    except FileNotFoundError as error:
        raise PackingError(f"{path}: no such file; give a train.py output folder, or a file in one.") from error
    except KeyError as error:
        raise PackingError(f"{path} holds no {error}: is it a checkpoint of timm's train.py?") from error
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise PackingError(f"{path} cannot be read as a checkpoint ({reason}).") from error
    ema_measured = bool(args.get("model_ema")) and not args.get("model_ema_force_cpu")  # what train.py validates last
    top1 = claimed_top1(path.with_name("summary.csv"), epoch) if use_ema == ema_measured else None
    return Checkpoint(path, tensors, args, epoch + 1, top1)


def claimed_top1(summary: Path, epoch: int) -> float | None:
    """The ``eval_top1`` of an epoch in train.py's summary.csv; None where there is none."""
    if not summary.is_file():
        return None
    with summary.open(newline="") as file:
        claims = [row.get("eval_top1") for row in csv.DictReader(file) if row.get("epoch") == str(epoch)]
    return float(claims[-1]) if claims and claims[-1] else None


def recipe_of(args: dict[str, Any]) -> dict[str, Any]:
    """The arguments of train.py that make the same training elsewhere, those left at nothing left out."""
    return {name: args[name] for name in sorted(args.keys() - PLACES) if args[name] not in (None, "", [], {})}


# The folder -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Images:
    """What a weight is measured on.

    Args:
        data_dir: Holds ``SPLIT/CLASS/*``.
        split: The part to measure on.
        name: Of the data set; None is the folder's name.
        source: Where the images come from.
        revision: Of the source.
        workers: Processes that read images.
    """

    data_dir: str | Path
    split: str = "validation"
    name: str | None = None
    source: str | None = None
    revision: str | None = None
    workers: int = 0


def pack(
    saved: Checkpoint,
    *,
    name: str,
    images: Images,
    output: str | Path = "packed",
    manifest: str | Path | None = None,
    dtype: str = "float32",
    tolerance: float = 0.1,
    baseline: str | None = None,
    base: str | None = None,
    license: str | None = None,  # noqa: A002  (the Hub's word)
    embed: bool = False,
    quiet: bool = False,
) -> WeightRecord:
    """Turn a trained checkpoint into a folder and a manifest entry, and prove both.

    Args:
        saved: See ``read_checkpoint``.
        name: ``convmix_<arch>.<tag>`` to be.
        images: What to measure on.
        output: The folder ``output/name`` is written, or replaced.
        manifest: The weights_manifest.json to write to; None is this package's own.
        dtype: Of the stored tensors, a key of ``DTYPES``; the accuracy is measured after the conversion.
        tolerance: By how many points the measured top-1 may differ from the one that the training run measured.
        baseline: ``arch.tag`` of the packed plain backbone of the same recipe.
        base: The weights that training started from, where the checkpoint does not say.
        license: Of the weights; None is that of the base weights, or apache-2.0 without any.
        embed: Copy the weights into this package too.
        quiet: Show no progress bar.

    Returns:
        The record, as it now stands in the manifest.

    Raises:
        PackingError: The checkpoint or an argument does not fit, or the reloaded model is not the one that was trained.
        ManifestError: The manifest, or the record, is not valid.
        WeightsError: The tensors are not those of the architecture.
    """
    arch, _ = split_model_name_tag(fit(Name, name, "name"))
    args = saved.args
    if dtype not in DTYPES:
        raise PackingError(f"dtype={dtype!r} is none of {', '.join(DTYPES)}.")
    if not is_model(arch):
        raise PackingError(f"{name}: timm knows no {arch}; see `timm-convmix list`.")
    if (trained := split_model_name_tag(args.get("model", arch))[0]) != arch:
        raise PackingError(f"{saved.path} was trained as {trained}, not as {arch}: choose the name accordingly.")
    if saved.epochs is None or "seed" not in args:
        raise PackingError(f"{saved.path} does not say how it was trained: state epochs and seed.")
    started_from, terms = origin_of(args, base, license, name)
    recipe = recipe_of(args)
    built_with = build_args(args)
    dataset = open_dataset(images.data_dir, images.split, channels=built_with.get("in_chans") or 3)
    checksum = dataset_checksum(dataset)
    paired = paired_baseline(
        baseline, read_manifest(manifest), arch=arch, recipe=recipe, epochs=saved.epochs, checksum=checksum
    )
    labels = [label for label, _ in sorted(dataset.reader.class_to_idx.items(), key=lambda item: item[1])]

    source = timm.create_model(arch, num_classes=len(labels), **built_with).eval()
    if mixer := get_model_args(source).get("mixer"):  # by name, because a default changes
        recipe = recipe_of(args | {"model_kwargs": {"mixer": mixer} | (args.get("model_kwargs") or {})})
    tensors = {key: converted(tensor, DTYPES[dtype], key) for key, tensor in saved.tensors.items()}
    load_strictly(source, tensors, source=str(saved.path))
    config = resolve_input_data_config(source, args=args)

    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output, prefix=f".{name}.") as temporary:
        folder = Path(temporary) / "folder"
        folder.mkdir()
        weights = folder / WEIGHTS_NAME
        data = safetensors.torch.save(tensors, metadata={"format": "pt"})
        weights.write_bytes(data)
        digest = Digest(sha256(data).hexdigest(), len(data))
        (folder / CONFIG_NAME).write_text(json.dumps(config_of(source, config, labels, digest), indent=2) + "\n")

        model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        prove_same(source, model, config["input_size"], name)
        metrics = evaluate(model, dataset, config, workers=images.workers, quiet=quiet)
        if saved.top1 is not None and abs(metrics.top1 - saved.top1) > tolerance:
            raise PackingError(
                f"{name}: top-1 is {metrics.top1:.2f} % of {metrics.count} images, but the training run measured"
                f" {saved.top1:.2f} %: other images, another split, or another preprocessing? Nothing was packed."
            )
        record = WeightRecord(
            state="packed",
            sha256=digest.sha256,
            bytes=digest.bytes,
            embedded=f"{name}.safetensors" if embed else None,
            dtype=dtype,  # type: ignore[arg-type]  # checked above
            model_args=rebuild_args(source),
            num_classes=len(labels),
            label_names=tuple(labels),
            input_size=config["input_size"],
            mean=config["mean"],
            std=config["std"],
            interpolation=config["interpolation"],
            crop_pct=config["crop_pct"],
            dataset=Dataset(
                name=images.name or Path(images.data_dir).resolve().name,
                split=images.split,
                checksum=checksum,
                source=images.source,
                revision=images.revision,
            ),
            metrics=metrics,
            baseline=paired,
            probe=probe(model, config["input_size"]),
            recipe=recipe,
            seeds=(args["seed"],),
            epochs=saved.epochs,
            versions=dict(timm=timm.__version__, torch=str(torch.__version__), timm_convmix=__version__),
            hardware=hardware(),
            base=started_from,
            license=terms,
            date=datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat(),
        )
        (folder / CARD_NAME).write_text(format_card(name, record), encoding="utf-8")
        (folder / RECIPE_NAME).write_text(format_recipe(record.recipe), encoding="utf-8")
        if embed:
            embed_weights(weights, f"{name}.safetensors")
        replace_folder(folder, output / name)
    update_manifest(name, record, manifest)
    return record


def build_args(args: dict[str, Any]) -> dict[str, Any]:
    """What train.py passed to ``create_model``, as far as the model computes something else for it."""
    channels = args.get("in_chans") or (args.get("input_size") or [None])[0]
    given = dict(in_chans=channels, global_pool=args.get("gp"), bn_eps=args.get("bn_eps"))
    return given | (args.get("model_kwargs") or {})


def converted(tensor: Tensor, dtype: torch.dtype, key: str) -> Tensor:
    """A tensor as it is stored: floating ones in ``dtype``, contiguous, sharing memory with no other.

    Raises:
        PackingError: A value is too large for ``dtype``, or no number.
    """
    if not tensor.is_floating_point():
        return tensor.contiguous().clone()
    stored = tensor.to(dtype).contiguous().clone()
    if not torch.isfinite(stored).all():
        raise PackingError(f"{key} has values that are not finite in {str(dtype).removeprefix('torch.')}.")
    return stored


def rebuild_args(model: Any) -> dict[str, Any]:
    """What rebuilds a model besides its class count, which transformers passes itself; JSON values."""
    args = {key: value for key, value in get_model_args(model).items() if key != "num_classes"}
    return json.loads(json.dumps(args))


def config_of(model: Any, config: dict[str, Any], labels: list[str], digest: Digest) -> dict[str, Any]:
    """A config.json that timm and transformers read; the digest stands at the top, where timm reads past it."""
    known = {f.name for f in dataclasses.fields(PretrainedCfg)}
    data = {key: value for key, value in config.items() if key in known}
    cfg = PretrainedCfg(**dict(model.pretrained_cfg, num_classes=model.num_classes, custom_load=False) | data)
    of_the_base = dict(architecture=None, label_names=None, description=None, license=None, label_offset=None)
    of_the_base |= dict(test_input_size=None, test_pool_size=None, test_crop_pct=None, label_descriptions=None)
    if cfg.input_size[1:] != tuple(model.pretrained_cfg["input_size"][1:]):
        of_the_base |= dict(pool_size=None)
    cfg = dataclasses.replace(cfg, **of_the_base)
    return {
        "architecture": model.pretrained_cfg["architecture"],
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        "label_names": labels,
        "model_args": rebuild_args(model),
        "pretrained_cfg": cfg.to_dict(remove_source=True),
        CONFIG_KEY: dataclasses.asdict(digest),
    }


@torch.no_grad()
def prove_same(source: Any, reloaded: Any, input_size: tuple[int, int, int], name: str) -> None:
    """Compare the model that was packed with the one that was loaded again.

    Raises:
        PackingError: Their logits differ in any bit.
    """
    x = torch.cat([probe_input(input_size), torch.randn(3, *input_size)])
    if not torch.equal(source(x), reloaded(x)):
        raise PackingError(f"{name}: the reloaded model gives other logits than the checkpoint; nothing was packed.")


def format_recipe(recipe: dict[str, Any]) -> str:
    """Arguments for ``train.py -c``: YAML, a line each."""
    return "".join(f"{key}: {yaml_of(value)}\n" for key, value in recipe.items())


def yaml_of(value: Any) -> str:
    """A JSON value as YAML 1.1 reads it, which takes 1e-05 for text and knows no surrogate pairs."""
    if isinstance(value, dict):
        return f"{{{', '.join(f'{yaml_of(key)}: {yaml_of(item)}' for key, item in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(yaml_of, value))}]"
    text = json.dumps(value, ensure_ascii=False)
    if isinstance(value, float) and "." not in text:
        text = text.replace("e", ".0e")
    return "".join(char if " " <= char <= "~" else f"\\U{ord(char):08x}" for char in text)


def replace_folder(new: Path, place: Path) -> None:
    """Move a folder to its place, beside it already; what stood there goes once it is replaced, or comes back."""
    old = new.with_name("old")
    if place.exists():
        place.replace(old)
    try:
        new.replace(place)
    except BaseException:
        if old.exists():
            old.replace(place)
        raise


def embed_weights(weights: Path, filename: str) -> None:
    """Copy a weight file into this package.

    Raises:
        PackingError: It is too large for a wheel.
    """
    if (size := weights.stat().st_size) > EMBEDDED_LIMIT:
        raise PackingError(f"{filename} has {size} bytes; only files of up to {EMBEDDED_LIMIT} travel in the package.")
    folder = PACKAGE / "embedded"
    folder.mkdir(exist_ok=True)
    write_atomically(folder / filename, weights.read_bytes())


# Where it comes from --------------------------------------------------------------------------------------------------


def origin_of(args: dict[str, Any], base: str | None, license: str | None, name: str) -> tuple[Base | None, str]:  # noqa: A002
    """The weights that training started from, and the licence of what it gave.

    Raises:
        PackingError: The base weights' licence is unknown or forbids something, and the user has named none.
    """
    path = args.get("pretrained_path") or args.get("initial_checkpoint")
    registered = args.get("pretrained") and not path and get_pretrained_cfg(args["model"])
    if registered:
        own = f"{registered.architecture}.{registered.tag}"
        plain = own.removeprefix("convmix_")
        base = base or (plain if plain in get_arch_pretrained_cfgs(split_model_name_tag(plain)[0]) else own)
    elif path:
        base = base or Path(path).name
    if not base:
        return None, license or "apache-2.0"
    terms = (registered and registered.license) or "unknown"
    if terms not in OPEN_LICENSES and not license:
        raise PackingError(
            f"{name} was trained from {base}, whose licence is {terms}: state under which one the result may be used"
            " with --license."
        )
    return Base(name=base, license=terms), license or terms


def paired_baseline(
    name: str | None,
    records: dict[str, WeightRecord],
    *,
    arch: str,
    recipe: dict[str, Any],
    epochs: int,
    checksum: str,
) -> Baseline | None:
    """The packed plain backbone of the same training, measured on the same images.

    Args:
        name: Of the baseline; None is none.
        records: Of the manifest.
        arch: Of the model that is paired to it.
        recipe: Of that model.
        epochs: That it was trained: a run may have been cut short.
        checksum: Of the images that it is measured on.

    Raises:
        PackingError: It is not packed, is no plain backbone, or was trained by another recipe.
    """
    if name is None:
        return None
    if name not in records or records[name].model_args.get("mixer") != "none":
        raise PackingError(
            f"{name} is no packed plain backbone (mixer 'none'): pack it first, then what it is paired to."
        )
    theirs = records[name]
    own = dict(_unmixed(recipe), architecture=arch, epochs_trained=epochs, images=checksum)
    other = dict(
        _unmixed(theirs.recipe),
        architecture=split_model_name_tag(name)[0],
        epochs_trained=theirs.epochs,
        images=theirs.dataset.checksum,
    )
    if different := sorted(key for key in own.keys() | other.keys() if own.get(key) != other.get(key)):
        raise PackingError(f"{name} was trained otherwise ({', '.join(different)}): that is no paired baseline.")
    return Baseline(name=name, metrics=theirs.metrics)


def _unmixed(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe without what says how stages are mixed; JSON values."""
    kwargs = recipe.get("model_kwargs") or {}
    rest = {key: value for key, value in kwargs.items() if key not in ("stages", "mixer", "mixer_args")}
    return json.loads(json.dumps(recipe | {"model_kwargs": rest}))

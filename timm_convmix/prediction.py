"""Image files to classes: a model from wherever it is, the images as it was trained on them, its labels."""

import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]
from PIL import Image, ImageOps
from timm.data import (
    CustomDatasetInfo,
    DatasetInfo,
    DatasetInfoLabelMapper,
    ImageNetInfo,
    create_transform,
    infer_imagenet_subset,
    resolve_input_data_config,
)
from timm.models import split_model_name_tag
from torch import nn

from timm_convmix.convmix import default_cfgs, is_baseline, manifest
from timm_convmix.errors import ConvMixError, InputError, PackingError, WeightsError
from timm_convmix.model import ARCH_PREFIX
from timm_convmix.weights.hub import CONFIG_NAME, hub_errors
from timm_convmix.weights.packing import read_checkpoint

EXTENSIONS = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
"""What is taken for an image in a folder; a file that is named itself may have any."""
MODES = {1: "L", 3: "RGB"}
"""Channels that a model reads -> mode of an image."""
LONGEST = 100
"""Times its width that an image may be high, or the reverse: resized by its shorter side, it would fill the memory."""


def predict(
    images: str | Path | Iterable[str | Path],
    *,
    model: str | Path | nn.Module | None = None,
    arch: str | None = None,
    topk: int = 5,
    batch_size: int = 32,
    device: str | torch.device | None = None,
    on_skip: Callable[[str, str], None] | None = None,
    quiet: bool = False,
) -> list[dict[str, Any]]:
    """Classify image files.

    Args:
        images: Files, and folders whose image files are taken in sorted order, those of subfolders too.
        model: See ``load_model``; or a timm model, which is put into eval mode.
        arch: See ``load_model``.
        topk: How many classes an image, the most probable first.
        batch_size: Images a step.
        device: Where to compute; None is a GPU if there is one, and where a given model already is.
        on_skip: Called with the name of a file that cannot be read as an image, and with the reason; the others are
            predicted nevertheless. None raises.
        quiet: Show no progress bar.

    Returns:
        A row an image and class: file, rank (from 1), label (the index where no name is known), class_index,
        probability.

    Raises:
        InputError: There is no image, one cannot be read, the model does not read images of 1 or 3 channels, or there
            is no such device.
        ConvMixError: The model cannot be loaded.
    """
    files = list(find_images([images] if isinstance(images, str | Path) else images))
    if isinstance(model, nn.Module):
        net: Any = model
    else:
        net = load_model(model, arch=arch)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device is not None:
        move(net, device)
    weight = next(net.parameters())
    labels = label_names(net)
    config = input_config(net)
    mode, transform = MODES[config["input_size"][0]], create_transform(**config)

    net.eval()
    rows = []
    progress = tqdm(files, desc="predict", unit="image", disable=quiet or None)
    readable = ((name, transform(image)) for name, image in read_images(progress, mode, on_skip))
    while batch := list(islice(readable, batch_size)):
        names, tensors = zip(*batch, strict=True)
        with torch.inference_mode():
            logits = net(torch.stack(tensors).to(weight.device, weight.dtype))
            best = logits.float().softmax(dim=1).topk(min(topk, len(labels)))
        for name, indices, values in zip(names, best.indices.tolist(), best.values.tolist(), strict=True):
            rows += [
                dict(file=name, rank=rank, label=labels[index], class_index=index, probability=value)
                for rank, (index, value) in enumerate(zip(indices, values, strict=True), start=1)
            ]
    if not rows:
        raise InputError("there is nothing to predict: name image files, or folders that hold some.")
    return rows


# Images ---------------------------------------------------------------------------------------------------------------


def find_images(paths: Iterable[str | Path]) -> Iterator[Path]:
    """Files as they are named, and the image files of folders, sorted; a folder without any stands for itself."""
    for path in map(Path, paths):
        found = (file for file in path.rglob("*") if file.suffix.lower() in EXTENSIONS and not file.is_dir())
        yield from sorted(found) or [path]


def read_images(
    files: Iterable[Path], mode: str = "RGB", on_skip: Callable[[str, str], None] | None = None
) -> Iterator[tuple[str, Image.Image]]:
    """Read the files that are images; arguments as of ``read_image`` and ``predict``.

    Returns:
        Name and image of each.
    """
    for file in files:
        name = str(file)
        try:
            image = read_image(file, mode)
        except InputError as error:
            if on_skip is None:
                raise InputError(f"{name}: {error}") from error
            on_skip(name, str(error))
        else:
            yield name, image


def read_image(path: Path, mode: str = "RGB") -> Image.Image:
    """Decode an image file, upright as its EXIF orientation says; of several frames the first.

    Args:
        path: The file.
        mode: To convert to: 'RGB' or 'L', where transparency is dropped as timm's own loader does.

    Raises:
        InputError: It is no image, or not a whole one; the message is the reason alone.
    """
    if path.is_dir():
        raise InputError("the folder holds no image file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about what can be read nevertheless
            with Image.open(path) as opened:
                if max(opened.size) > LONGEST * min(opened.size):
                    raise ValueError(f"{opened.width}x{opened.height} pixels are too long and thin to resize")
                image = ImageOps.exif_transpose(opened)
        if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow would cut off at 255
            image = image.point(lambda value: value / 256).convert("L")
        return image.convert(mode)
    except Exception as error:  # Pillow's decoders meet bad bytes with errors of every kind
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise InputError(reason.splitlines()[0]) from error


def input_config(model: Any) -> dict[str, Any]:
    """How a model's images are prepared, as arguments of ``timm.data.create_transform``.

    Raises:
        InputError: It does not read images of 1 or 3 channels.
    """
    config = resolve_input_data_config(model)
    if (channels := config["input_size"][0]) not in MODES:
        raise InputError(f"The model reads {channels} channels, and an image file has 1 or 3.")
    return config


# Model ----------------------------------------------------------------------------------------------------------------


def default_model() -> str | None:
    """The trained model that travels in this package; None where there is none."""
    return next((name for name, record in manifest.items() if record.embedded and not is_baseline(record)), None)


def load_model(source: str | Path | None = None, *, arch: str | None = None) -> Any:
    """Load a classifier with its weights.

    Args:
        source: ``convmix_<arch>[.tag]``, with or without the prefix; ``hf-hub:NAMESPACE/NAME[@revision]``;
            ``local-dir:DIR``, or the folder alone; an output folder of train.py, a checkpoint in one (its EMA weights
            first, as timm does), or another file with a state dict. None is ``default_model``.
        arch: Of a file that does not say it.

    Returns:
        A timm model on the CPU, in eval mode, whose ``pretrained_cfg`` says how images are prepared.

    Raises:
        WeightsError: There is no such model, or its weights are not as they must be.
        PackingError: A checkpoint cannot be read.
        HubError: It cannot be fetched.
    """
    source = str(source or default_model() or "")
    path = Path(source)
    if not source:
        raise WeightsError("no trained model travels in this package: name one, see `timm-convmix list --pretrained`.")
    if source.startswith(("hf-hub:", "hf_hub:", "local-dir:")):
        model = load_described(source)
    elif name := registered_name(source):
        model = timm.create_model(name, pretrained=True)
    elif (path / CONFIG_NAME).is_file():
        model = load_described(f"local-dir:{source}")
    elif path.exists():
        model = load_checkpoint(path / "last.pth.tar" if path.is_dir() else path, arch)
    else:
        raise WeightsError(
            f"{source} is no architecture (see `timm-convmix list`), tag of one, file or folder; a repository of a Hub"
            " is named hf-hub:NAMESPACE/NAME."
        )
    if not model.num_classes:
        raise WeightsError(f"{source} has no classifier: it gives features, not classes.")
    return model.eval()


def registered_name(name: str) -> str | None:
    """The ``convmix_<arch>[.tag]`` that a name with or without the prefix means; None where there is no such."""
    name = ARCH_PREFIX + name.removeprefix(ARCH_PREFIX)
    arch, tag = split_model_name_tag(name)
    return name if arch in default_cfgs and (not tag or tag in default_cfgs[arch].cfgs) else None


def load_described(source: str) -> Any:
    """Load what a config.json describes: a folder's (``local-dir:``), or that of a repository (``hf-hub:``)."""
    try:
        with nullcontext() if source.startswith("local-dir:") else hub_errors(source, source.partition(":")[2]):
            return timm.create_model(source, pretrained=True)
    except ConvMixError:
        raise
    except (AssertionError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise WeightsError(f"{source}: timm cannot load what its {CONFIG_NAME} describes ({error!r}).") from error


def load_checkpoint(path: Path, arch: str | None) -> Any:
    """Load a file, as train.py built the model and prepared its images, where train.py has written it.

    A file of a plain backbone is loaded into its twin, which adds nothing to it. What the classes are called no such
    file says.
    """
    args = training_args(path)
    name = registered_name(arch or args.get("model") or "")
    if name is None:
        found = f"names {arch or args['model']}, which is none" if arch or args.get("model") else "does not say which"
        raise WeightsError(f"{path}: it {found} of timm-convmix's architectures: name its own (arch=..., --arch ...).")
    model = timm.create_model(
        name,
        pretrained=True,
        pretrained_cfg_overlay=dict(file=str(path)),
        in_chans=args.get("in_chans") or (args.get("input_size") or [None])[0],
        global_pool=args.get("gp"),
        bn_eps=args.get("bn_eps"),
        **(args.get("model_kwargs") or {}),
    )
    model.pretrained_cfg.update(resolve_input_data_config(model, args), tag=None, label_names=None)
    return model


def training_args(path: Path) -> dict[str, Any]:
    """The arguments of train.py in a checkpoint; none in a file of another origin."""
    try:
        return read_checkpoint(path).args
    except PackingError as error:
        if isinstance(error.__cause__, KeyError):  # it could be read, and is no checkpoint of train.py
            return {}
        raise


def label_names(model: Any) -> list[str]:
    """A label for each class: the model's own, ImageNet's for a tag of ImageNet, else the index.

    WordNet ids, as the folders of ImageNet and of its parts are called, are given in timm's words for them.
    """
    cfg = model.pretrained_cfg
    info: DatasetInfo | None = None
    if cfg.get("label_names"):
        try:
            info = CustomDatasetInfo(cfg["label_names"], cfg.get("label_descriptions"))
        except (TypeError, ValueError) as error:
            raise WeightsError(f"The model's labels are not as timm has them: {error}") from error
    elif re.search(r"(^|_)in\d+k", cfg.get("tag") or "") and (subset := infer_imagenet_subset(model)):
        info = ImageNetInfo(subset)
    if info is None or info.num_classes() != model.num_classes:  # none, or those of a head that was replaced
        return list(map(str, range(model.num_classes)))
    labels = list(map(DatasetInfoLabelMapper(info, fallback_format="{index}"), range(model.num_classes)))
    if all(re.fullmatch(r"n\d{8}", label) for label in labels):
        words = ImageNetInfo("imagenet-22k-ms").label_descriptions(as_dict=True)
        labels = [words.get(label, label) for label in labels]
    return labels


def move(model: nn.Module, device: str | torch.device) -> None:
    """Move a model.

    Raises:
        InputError: There is no such device, or this torch cannot compute on it.
    """
    try:
        model.to(device)
    except (AssertionError, RuntimeError) as error:
        raise InputError(f"device {device}: {str(error).splitlines()[0]}") from error

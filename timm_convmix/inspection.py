"""Looking into a model with image files: Grad-CAM beside a baseline, how much each tap counts, and what is tapped.

Rows of plain data, and arrays that ``pictures`` draws.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from timm.data import create_transform
from timm.models import get_model_input_config, get_pretrained_cfg
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from timm_convmix.convmix import manifest
from timm_convmix.errors import InputError
from timm_convmix.mixers import BlendConvMix
from timm_convmix.model import ConvMixNet
from timm_convmix.prediction import (
    MODES,
    default_model,
    find_images,
    input_config,
    label_names,
    load_model,
    read_images,
    registered_name,
)
from timm_convmix.saliency import StageMap, as_convmix, grad_cam, mixes, tap_contributions

MIXER_OFF = "off"
PHOTO_SIDE = 224
"""Pixels that the shorter side of a photograph has at least beside its maps, however small the model's input is."""

# Image files ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Classifier:
    """A model with its name, the labels of its classes, and how its images are prepared (``create_transform``)."""

    name: str
    net: ConvMixNet
    labels: list[str]
    config: dict[str, Any]

    @classmethod
    def load(
        cls, source: str | Path | nn.Module | None, *, arch: str | None = None, size: tuple[int, int] | None = None
    ) -> "Classifier":
        """Load a model, or take one that is built.

        Args:
            source: See ``load_model``; or a ``ConvMixNet``, or a plain timm model.
            arch: See ``load_model``.
            size: Height and width of its images; None is what the model is made for.
        """
        net: Any = source if isinstance(source, nn.Module) else load_model(source, arch=arch)
        name = type(net).__name__ if isinstance(source, nn.Module) else str(source or default_model())
        labels, config = label_names(net), input_config(net)
        if size:
            config = config | dict(input_size=(config["input_size"][0], *size))
        return cls(name=name, net=resized(as_convmix(net), size), labels=labels, config=config)

    def without_mixer(self) -> "Classifier":
        """The same weights without what the mixer adds."""
        share = {"share": float(self.net.mixer.share)} if isinstance(self.net.mixer, BlendConvMix) else {}
        net = ConvMixNet(self.net.backbone, stages=self.net.stages, mixer="none", mixer_args=share)
        return dataclasses.replace(self, name=f"{self.name}, mixer off (ablation)", net=net)

    def find_class(self, wanted: str | int) -> int:
        """Index of the class of a label, or else of an index.

        Raises:
            InputError: The model has no such class.
        """
        labels = self.labels
        if wanted in labels:
            return labels.index(str(wanted))
        if str(wanted).isdecimal() and int(wanted) < len(labels):
            return int(wanted)
        similar = [label for label in labels if str(wanted).lower() in label.lower()] or labels
        raise InputError(
            f"{self.name} has no class {wanted!r}: give an index of 0 to {len(labels) - 1}, or a label such as"
            f" {' or '.join(map(repr, similar[:3]))}."
        )

    def prepare(self, image: Image.Image) -> Tensor:
        """An RGB image as the model reads it, (1, C, H, W)."""
        weight = next(self.net.parameters())
        image = image.convert(MODES[self.config["input_size"][0]])
        return create_transform(**self.config)(image)[None].to(weight.device, weight.dtype)

    def photo(self, image: Image.Image) -> Tensor:
        """What the model sees of an RGB image, in colours, larger than it sees it: (h, w, 3) of uint8."""
        channels, *size = self.config["input_size"]
        scale = math.ceil(PHOTO_SIDE / min(size))
        config = self.config | dict(input_size=(channels, *(side * scale for side in size)))
        return create_transform(**config, normalize=False)(image).permute(1, 2, 0)


@dataclass(frozen=True, kw_only=True)
class Cam:
    """Grad-CAM of one image by one model.

    Args:
        model: Its name, and that its mixer is off where it is.
        mixes: Whether the model has a mixer that does something.
        label: Of the class that the maps are of.
        probability: That the model gives to it.
        photo: See ``Classifier.photo``.
        maps: Of each stage, with ``heat`` (H, W).
    """

    model: str
    mixes: bool
    label: str
    probability: float
    photo: Tensor
    maps: list[StageMap]


def cam(
    images: str | Path | Iterable[str | Path],
    *,
    model: str | Path | nn.Module | None = None,
    compare: str | Path | nn.Module | None = None,
    class_name: str | int | None = None,
    arch: str | None = None,
    on_skip: Callable[[str, str], None] | None = None,
) -> Iterator[tuple[str, list[Cam]]]:
    """Grad-CAM of image files, by a model and by another one beside it.

    Args:
        images: See ``predict``.
        model: See ``predict``.
        compare: The other one, or 'off': the same weights with the mixer off, which is an ablation and no baseline,
            because these weights were trained with it. None takes the baseline that the manifest names for these
            weights, else 'off'; beside a plain backbone that is nothing.
        class_name: Whose evidence: a label, or an index. None is what ``model`` predicts, for both.
        arch: See ``load_model``; of both.
        on_skip: See ``predict``.

    Yields:
        Name of the file, and a ``Cam`` a model.

    Raises:
        InputError: There is no image, one cannot be read, or a model has no such class.
        ConvMixError: A model cannot be loaded, or has no maps, see ``grad_cam``.
    """
    classifiers = load_pair(model, compare=compare, arch=arch)
    for name, image in look_at(images, on_skip):
        yield name, compare_cams(classifiers, image, class_name)


def load_pair(
    model: str | Path | nn.Module | None = None,
    *,
    compare: str | Path | nn.Module | None = None,
    arch: str | None = None,
) -> list[Classifier]:
    """Load a model, and what stands beside it; arguments as of ``cam``.

    Returns:
        Both, or the model alone where it is a plain backbone that has no other.

    Raises:
        ConvMixError: A model cannot be loaded.
    """
    classifiers = [Classifier.load(model, arch=arch)]
    compare = compare or baseline_of(model) or MIXER_OFF
    if compare != MIXER_OFF:
        classifiers.append(Classifier.load(compare, arch=arch))
    elif mixes(classifiers[0].net):
        classifiers.append(classifiers[0].without_mixer())
    return classifiers


def compare_cams(
    classifiers: Sequence[Classifier], image: Image.Image, class_name: str | int | None = None
) -> list[Cam]:
    """Grad-CAM of an image by each model, for one class.

    Args:
        classifiers: The first says which class, where none is named.
        image: RGB.
        class_name: See ``cam``.

    Raises:
        InputError: A model has no such class.
        ConvMixError: A model has no maps, see ``grad_cam``.
    """
    same_classes = all(each.labels == classifiers[0].labels for each in classifiers)
    wanted, cams = class_name, []
    for each in classifiers:
        found = grad_cam(each.net, each.prepare(image), None if wanted is None else each.find_class(wanted))
        index = int(found.classes)
        cams.append(
            Cam(
                model=each.name,
                mixes=mixes(each.net),
                label=each.labels[index],
                probability=float(found.logits[0].float().softmax(0)[index]),
                photo=each.photo(image),
                maps=[dataclasses.replace(stage, heat=stage.heat[0]) for stage in found.maps],
            )
        )
        if wanted is None:
            wanted = index if same_classes else each.labels[index]
    return cams


def baseline_of(source: str | Path | nn.Module | None) -> str | None:
    """The plain backbone that this package keeps for comparison with a weight of its own; None without one."""
    if isinstance(source, nn.Module) or not (name := registered_name(str(source or default_model()))):
        return None
    cfg = get_pretrained_cfg(name)
    record = manifest.get(f"{cfg.architecture}.{cfg.tag}")
    return record.baseline.name if record and record.baseline and record.baseline.name in manifest else None


def weigh_taps(
    images: str | Path | Iterable[str | Path],
    *,
    model: str | Path | nn.Module | None = None,
    size: tuple[int, int] | None = None,
    arch: str | None = None,
    on_skip: Callable[[str, str], None] | None = None,
) -> list[dict[str, Any]]:
    """How much each tap counts for the class that the model predicts, see ``tap_contributions``.

    Args:
        images: See ``predict``.
        model: See ``predict``.
        size: Height and width of the images; None is what the model is made for.
        arch: See ``load_model``.
        on_skip: See ``predict``.

    Returns:
        A row an image and tap, and at the end the mean of each tap, whose file and label are None: file, label,
        position, module, logit, logit_drop.

    Raises:
        InputError: There is no image, one cannot be read, or the model does not mix.
        ConvMixError: The model cannot be loaded.
    """
    classifier = Classifier.load(model, arch=arch, size=size)
    net = classifier.net
    stages = [dict(position=stage, module=net.feature_info[stage]["module"]) for stage in net.stages]
    rows, logits, drops = [], [], []
    for name, image in look_at(images, on_skip):
        classes, logit, drop = tap_contributions(net, classifier.prepare(image))
        label = classifier.labels[int(classes)]
        rows += [
            dict(file=name, label=label, **stage, logit=float(logit), logit_drop=value)
            for stage, value in zip(stages, drop[0].tolist(), strict=True)
        ]
        logits.append(logit)
        drops.append(drop)
    logit, drop = torch.cat(logits).mean(), torch.cat(drops).mean(0)
    means = [
        dict(file=None, label=None, **stage, logit=float(logit), logit_drop=value)
        for stage, value in zip(stages, drop.tolist(), strict=True)
    ]
    return rows + means


def look_at(
    images: str | Path | Iterable[str | Path], on_skip: Callable[[str, str], None] | None
) -> Iterator[tuple[str, Image.Image]]:
    """Names and images of files, and of those in folders; arguments as of ``predict``.

    Raises:
        InputError: There is no image, or one cannot be read.
    """
    name = None
    files = find_images([images] if isinstance(images, str | Path) else images)
    for name, image in read_images(files, on_skip=on_skip):
        yield name, image
    if name is None:
        raise InputError("there is nothing to look at: name image files, or folders that hold some.")


# What is tapped -------------------------------------------------------------------------------------------------------


def describe(
    model: str | Path | nn.Module, *, size: tuple[int, int] | None = None, arch: str | None = None
) -> list[dict[str, Any]]:
    """What is tapped, and what the mixer costs.

    MACs are those of one image, see ``count_mixing``.

    Args:
        model: See ``load_model``, where no weights are loaded for ``convmix_<arch>[.tag]``; or a ``ConvMixNet``, or a
            plain timm model.
        size: Height and width of the image; None is what the model is made for.
        arch: See ``load_model``.

    Returns:
        A row a stage, shallow to deep, the last being the mixed map (module 'mixer'), and one for the whole model
        (module None): position, module, channels, reduction, shape (CxHxW; of the model: its input), tapped, params,
        params_share, macs, macs_share. The last four, with shares of the model's, are of the mixer and the model only.

    Raises:
        InputError: The model does not take images of this size.
        ConvMixError: The model cannot be loaded, or has too few stages.
    """
    net = as_convmix(model if isinstance(model, nn.Module) else build(model, arch=arch)).eval()
    nominal = get_model_input_config(net)["input_size"][-2:]
    shape = (net.in_chans, *(size or nominal))
    weight = next(net.parameters())
    images = torch.zeros(1, *shape, device=weight.device, dtype=weight.dtype)
    try:
        with torch.no_grad():
            _, maps = resized(net, size).forward_intermediates(images)
    except RuntimeError as error:  # without memory, layers say it in other words than the model knows
        if size is None:
            raise
        made = "x".join(map(str, nominal))
        raise InputError(f"{net.arch} cannot take images of {size[0]}x{size[1]}, it is made for {made}.") from error
    params, params_of_mixer = (sum(p.numel() for p in part.parameters()) for part in (net, net.mixer))
    macs_of_mixer, macs = count_mixing(net, images)

    rows = [
        dict(
            position=position,
            module=stage["module"],
            channels=stage["num_chs"],
            reduction=stage["reduction"],
            shape="x".join(map(str, map_.shape[1:])),
            tapped=position in net.stages and mixes(net),
            **dict.fromkeys(("params", "params_share", "macs", "macs_share")),
        )
        for position, (stage, map_) in enumerate(zip(net.feature_info, maps, strict=True))
    ]
    rows.append(dict.fromkeys(rows[0]) | dict(shape="x".join(map(str, shape))))
    for row, own_params, own_macs in zip(rows[-2:], (params_of_mixer, params), (macs_of_mixer, macs), strict=True):
        row.update(params=own_params, params_share=own_params / params, macs=own_macs, macs_share=own_macs / macs)
    return rows


def count_mixing(net: ConvMixNet, images: Tensor) -> tuple[int, int]:
    """MACs of an inference: multiplications of convolutions, matrix products and attention, as torch counts them.

    Args:
        net: In eval mode; an encoder without a head too.
        images: (B, in_chans, H, W), on any device, 'meta' too.

    Returns:
        Those of the mixer, and those of the whole model.
    """
    no_head = contextlib.suppress(NotImplementedError)  # timm's way to say that an encoder ends with its final map
    with torch.no_grad(), FlopCounterMode(display=False) as counter, no_head:
        net(images)
    mixing = counter.get_flop_counts().get(f"{type(net).__name__}.mixer", {})
    return sum(mixing.values()) // 2, counter.get_total_flops() // 2


def build(source: str | Path, *, arch: str | None = None) -> Any:
    """Build a model for its shapes: without memory where it is one of the registry, else as ``load_model`` does."""
    if name := registered_name(str(source)):
        with torch.device("meta"):
            return timm.create_model(name)
    return load_model(source, arch=arch)


def resized(net: ConvMixNet, size: tuple[int, int] | None) -> ConvMixNet:
    """Tell a backbone of fixed input size which size it gets; others take any."""
    if size and hasattr(net.backbone, "set_input_size"):
        net.set_input_size(img_size=size)
    return net

"""Looking into a model: where the evidence for a class is, how much each tap counts, and what is tapped.

Arrays and rows of plain data; ``pictures`` draws them.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from timm.data import create_transform
from timm.models import get_model_input_config, get_pretrained_cfg
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn.functional import interpolate
from torch.utils.flop_counter import FlopCounterMode

from timm_convmix.convmix import manifest
from timm_convmix.errors import FeatureError, InputError
from timm_convmix.mixers import NoMixer
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

MIXER_OFF = "off"
PHOTO_SIDE = 224
"""Pixels that the shorter side of a photograph has at least beside its maps, however small the model's input is."""
DIGIT = 256
"""Integers up to here are exact in every floating type."""

Classes = int | Sequence[int] | Tensor | None
"""One class for all images of a batch, or one an image; None is the class that the model predicts."""
MixerInput = tuple[Sequence[Tensor], Tensor]


# Grad-CAM of a batch --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class StageMap:
    """Grad-CAM of one map of a model.

    Args:
        name: Of the module, as in the model's ``feature_info``; 'mixer' is the map that the head reads.
        reduction: Stride to the image.
        grid: Height and width of the map.
        heat: (B, H, W) of the images' size, or (H, W) of one image; 0 to 1.
    """

    name: str
    reduction: int
    grid: tuple[int, int]
    heat: Tensor


@dataclass(frozen=True, kw_only=True)
class GradCam:
    """Grad-CAM of a batch.

    Args:
        logits: (B, num_classes).
        classes: (B,), the class that each image's maps are of.
        maps: Of each tapped stage, shallow to deep, and of the map that the head reads.
    """

    logits: Tensor
    classes: Tensor
    maps: list[StageMap]


@torch.enable_grad()
def grad_cam(model: nn.Module, images: Tensor, classes: Classes = None) -> GradCam:
    """Where the evidence for a class is, not why: Grad-CAM (Selvaraju et al. 2017, arXiv:1610.02391).

    ``relu(sum_c(mean(d logit / d A_c) * A_c))`` of a map A with channels c, resized to the image (bilinear) and divided
    by its maximum; where nothing counts in favour of the class, the map is zero everywhere. Maxima are no common
    scale: a faint map looks like a strong one.

    A stage's gradient is the total one, through the deeper stages and through the mixer. What ConvMix adds to the final
    map is the same in every cell, so it widens the map of 'mixer' by construction: wider is not better.

    Args:
        model: A ``ConvMixNet``, or a plain timm model with a 2-D final map, whose stages are those that its twin would
            tap by default. It is put into eval mode.
        images: (B, in_chans, H, W), normalised.
        classes: See ``Classes``.

    Raises:
        InputError: The images, or the classes, do not fit.
        StageError: The model has too few stages.
        FeatureError: The deeper stages do not read what a tap holds, so that it has no total gradient.
    """
    net = as_convmix(model).eval()
    seen: list[Tensor] = []

    def keep(_mixer: nn.Module, args: MixerInput, mixed: Tensor) -> Tensor:
        taps, final = args
        seen[:] = final, *taps, mixed
        return mixed.clone()  # a head may begin with an activation in place

    hook = net.mixer.register_forward_hook(keep)
    try:
        logits = net(images.detach().requires_grad_())
    finally:
        hook.remove()
    classes = check_classes(net, logits, classes)
    score = logits.gather(1, classes[:, None]).sum()  # in eval mode no image has a part in another's logits

    final, *taps, mixed = seen
    maps = []
    for stage, activation in zip([*net.stages, -1], [*taps, mixed], strict=True):
        info = net.feature_info[stage]
        gradient = total_gradient(score, activation, mixed if activation is mixed else final)
        if gradient is None:
            raise FeatureError(
                f"{net.arch}: the deeper stages do not read what the mixer gets of {info['module']}, so it has no"
                " gradient along both paths; choose other stages=... or another backbone."
            )
        heat = heat_map(activation.detach(), gradient, (images.shape[2], images.shape[3]))
        grid = (activation.shape[2], activation.shape[3])
        maps.append(StageMap(name=info["module"], reduction=info["reduction"], grid=grid, heat=heat))
    return GradCam(logits=logits.detach(), classes=classes, maps=maps)


def as_convmix(model: nn.Module) -> ConvMixNet:
    """The model itself, or a plain timm model behind a mixer that does nothing; weights are shared."""
    return model if isinstance(model, ConvMixNet) else ConvMixNet(model, mixer="none")


def check_classes(model: ConvMixNet, logits: Tensor, classes: Classes) -> Tensor:
    """One class an image, (B,): those given, or the predicted ones.

    Raises:
        InputError: The model has no classifier, or the classes are none of its own.
    """
    if not model.num_classes:
        raise InputError(f"{model.arch} has no classifier, and evidence is for a class: create it with num_classes=...")
    count, outputs = logits.shape
    if classes is None:
        return logits.argmax(1)
    chosen = torch.as_tensor(classes, device=logits.device)
    if chosen.shape not in ((), (count,)) or chosen.is_floating_point():
        raise InputError(f"classes={classes} must be one integer, or {count}, one an image.")
    if not ((chosen >= 0) & (chosen < outputs)).all():
        raise InputError(f"classes={classes} must lie in 0 to {outputs - 1}, the model's classes.")
    return chosen.long().expand(count)


def heat_map(activation: Tensor, gradient: Tensor, size: tuple[int, int]) -> Tensor:
    """The formula of ``grad_cam``: activation and gradient (B, C, h, w) to (B, *size), 0 to 1."""
    weights = gradient.mean((2, 3), keepdim=True)  # (B, C, 1, 1)
    heat = (weights * activation).sum(1, keepdim=True).relu().float()
    heat = interpolate(heat, size, mode="bilinear", align_corners=False)[:, 0]
    peak = heat.amax((1, 2), keepdim=True)
    return heat / torch.where(peak > 0, peak, 1)


def total_gradient(score: Tensor, tap: Tensor, final: Tensor) -> Tensor | None:
    """Gradient of a score with respect to the output of a stage, along every path.

    Backbones that compute in NHWC give the mixer an NCHW copy which the deeper stages never see, and the gradient with
    respect to that copy is the mixer's path alone. So the graph is climbed from the tap as long as what stands above
    holds the same numbers in another order; the gradient is taken there, and brought into the tap's order.

    Args:
        score: A scalar.
        tap: What the mixer gets of the stage, (B, C, H, W).
        final: What follows from the stage before anything is mixed in: the backbone's final map.

    Returns:
        (B, C, H, W), or None where the final map depends on no such numbers: the tap is made for the mixer alone.
    """
    source, order = get_gradient_edge(tap), None
    while len(inputs := source.node.next_functions) == 1:
        ((node, output),) = inputs
        if node is None or (order_above := rearrangement(tap, GradientEdge(node, output))) is None:
            break
        source, order = GradientEdge(node, output), order_above
    if torch.autograd.grad(final.sum(), source, retain_graph=True, allow_unused=True)[0] is None:
        return None
    (gradient,) = torch.autograd.grad(score, source, retain_graph=True)
    if order is None:
        return gradient
    return gradient.new_empty(tap.numel()).scatter(0, order, gradient.flatten()).view(tap.shape)


def rearrangement(tap: Tensor, above: GradientEdge) -> Tensor | None:
    """Where each number of a point above a tap in the graph stands in the tap, both flat; None if they differ.

    Backwards, a rearrangement carries ones to ones, and each position to where its number came from.
    """
    count = tap.numel()

    def carry_back(values: Tensor) -> Tensor:
        return torch.autograd.grad(tap, above, values.to(tap.dtype).view(tap.shape), retain_graph=True)[0].flatten()

    ones = carry_back(torch.ones(count, device=tap.device))
    if len(ones) != count or not (ones == 1).all():
        return None
    places = torch.arange(count, device=tap.device)
    order = torch.zeros_like(places)
    power = 1
    while power < count:
        order += carry_back(places // power % DIGIT).long() * power
        power *= DIGIT
    return order if torch.equal(order.sort().values, places) else None


# How much each tap counts ---------------------------------------------------------------------------------------------


@torch.no_grad()
def tap_contributions(model: ConvMixNet, images: Tensor, classes: Classes = None) -> tuple[Tensor, Tensor, Tensor]:
    """How much each tap counts: by how much the logit falls where the mixer gets zeros instead of the tap's map.

    A map of zeros means something to every mixer. To ConvMix it is a stage without information: of a vector of zeros
    the layer norm leaves its bias, whatever the scale of the stage. The deeper stages still see the stage as it is, so
    this is the mixer's path alone. Taps share what they say: the drops do not add up to what the mixer does.

    Args:
        model: That mixes. It is put into eval mode.
        images: (B, in_chans, H, W), normalised.
        classes: See ``Classes``.

    Returns:
        The classes, (B,); their logits, (B,); and by how much these fall, (B, taps), negative where a tap speaks
        against the class.

    Raises:
        InputError: The model does not mix, or the images or classes do not fit.
    """
    if not mixes(model):
        raise InputError(f"{model.arch} is a plain backbone (mixer='none'): it has no taps that could count.")
    logits = model.eval()(images)
    classes = check_classes(model, logits, classes)

    def blank(place: int, _mixer: nn.Module, args: MixerInput) -> MixerInput:
        taps, final = args
        return [torch.zeros_like(tap) if at == place else tap for at, tap in enumerate(taps)], final

    without = []
    for place in range(len(model.stages)):
        hook = model.mixer.register_forward_pre_hook(partial(blank, place))
        try:
            without.append(model(images))
        finally:
            hook.remove()
    index = classes[:, None]
    logit = logits.gather(1, index)  # (B, 1)
    return classes, logit[:, 0], logit - torch.cat([each.gather(1, index) for each in without], dim=1)


def mixes(model: ConvMixNet) -> bool:
    """Whether there is a mixer that does something."""
    return not isinstance(model.mixer, NoMixer)


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
        net = ConvMixNet(self.net.backbone, stages=self.net.stages, mixer="none")
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
    classifiers = [Classifier.load(model, arch=arch)]
    compare = compare or baseline_of(model) or MIXER_OFF
    if compare != MIXER_OFF:
        classifiers.append(Classifier.load(compare, arch=arch))
    elif mixes(classifiers[0].net):
        classifiers.append(classifiers[0].without_mixer())

    same_classes = all(each.labels == classifiers[0].labels for each in classifiers)

    name = None
    for name, image in read_images(find_images(listed(images)), on_skip=on_skip):
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
        yield name, cams
    if name is None:
        raise InputError("there is nothing to look at: name image files, or folders that hold some.")


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
    for name, image in read_images(find_images(listed(images)), on_skip=on_skip):
        classes, logit, drop = tap_contributions(net, classifier.prepare(image))
        label = classifier.labels[int(classes)]
        rows += [
            dict(file=name, label=label, **stage, logit=float(logit), logit_drop=value)
            for stage, value in zip(stages, drop[0].tolist(), strict=True)
        ]
        logits.append(logit)
        drops.append(drop)
    if not rows:
        raise InputError("there is nothing to look at: name image files, or folders that hold some.")
    logit, drop = torch.cat(logits).mean(), torch.cat(drops).mean(0)
    means = [
        dict(file=None, label=None, **stage, logit=float(logit), logit_drop=value)
        for stage, value in zip(stages, drop.tolist(), strict=True)
    ]
    return rows + means


def listed(images: str | Path | Iterable[str | Path]) -> Iterable[str | Path]:
    """Several paths, or the one that is given alone."""
    return [images] if isinstance(images, str | Path) else images


# What is tapped -------------------------------------------------------------------------------------------------------


def describe(
    model: str | Path | nn.Module, *, size: tuple[int, int] | None = None, arch: str | None = None
) -> list[dict[str, Any]]:
    """What is tapped, and what the mixer costs.

    MACs are the multiplications of convolutions, matrix products and attention, of one image, as
    ``torch.utils.flop_counter`` counts them.

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
    no_head = contextlib.suppress(NotImplementedError)  # timm's way to say that an encoder ends with its final map
    with torch.no_grad(), FlopCounterMode(display=False) as counter, no_head:
        net(images)
    mixing = counter.get_flop_counts().get(f"{type(net).__name__}.mixer", {})
    params, params_of_mixer = (sum(p.numel() for p in part.parameters()) for part in (net, net.mixer))
    macs, macs_of_mixer = counter.get_total_flops() // 2, sum(mixing.values()) // 2

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

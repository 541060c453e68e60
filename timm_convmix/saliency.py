"""Where the evidence for a class is (Grad-CAM of each stage), and how much each tap counts: of batches, in tensors."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn.functional import interpolate

from timm_convmix.errors import FeatureError, InputError
from timm_convmix.mixers import NoMixer
from timm_convmix.model import ConvMixNet

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

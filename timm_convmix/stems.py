"""Backbones for small images: timm's architectures that keep the resolution at first, registered as ``<arch>_cifar``.

At 32x32 a stem made for 224x224 leaves one cell of the image. Here no stem downsamples, and the final map has an eighth
of its size (a quarter in ``nano_cifar``). The rest of the package sees ordinary architectures of timm's registry.
"""

import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import timm
from timm.models import (
    ByoBlockCfg,
    ByobNet,
    ByoModelCfg,
    DefaultCfg,
    PretrainedCfg,
    build_model_with_cfg,
    get_pretrained_cfg,
    is_model,
    register_model,
)
from torch import nn

__all__: list[str] = []
default_cfgs: dict[str, DefaultCfg] = {}

CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
"""Of CIFAR-10's training images, per channel in 0 to 1; CIFAR-100's differ by less than 0.03."""


# Stems: what no longer downsamples ------------------------------------------------------------------------------------


def keep_resolution(model: nn.Module, *names: str) -> None:
    """Take the stride out of convolutions, and poolings out altogether, in place.

    A convolution wider than 3x3 becomes a 3x3 one, initialised as timm initialises ResNets (He et al. 2015,
    arXiv:1502.01852, fan-out mode).
    """
    for name in names:
        parent, _, leaf = name.rpartition(".")
        module = model.get_submodule(name)
        if not isinstance(module, nn.Conv2d):
            setattr(model.get_submodule(parent), leaf, nn.Identity())
        elif module.kernel_size <= (3, 3):
            module.stride = (1, 1)
        else:
            like: dict[str, Any] = dict(device=module.weight.device, dtype=module.weight.dtype)
            bias = module.bias is not None
            conv = nn.Conv2d(module.in_channels, module.out_channels, 3, padding=1, bias=bias, **like)
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)
            setattr(model.get_submodule(parent), leaf, conv)


def keep_vgg_resolution(model: Any) -> None:
    """Take out VGG's last two poolings, and its wide layers made for a 7x7 map: one linear layer, as usual on CIFAR.

    The last pooling is a stage of its own in timm; without it that stage would be the one before once more.
    """
    keep_resolution(model, "features.33", "features.43")
    model.feature_info, model.feature_ends = model.feature_info[:-1], model.feature_ends[:-1]
    model.pre_logits = nn.Identity()
    model.head.reset(model.num_classes, in_features=model.num_features)
    model.head_hidden_size = model.head.num_features


def stem(*names: str) -> Callable[[Any], None]:
    """The stem function that keeps the resolution at the modules of these names."""
    return lambda model: keep_resolution(model, *names)


# Backbones: a constructor, a stem function, and by how much each stage is finer for it --------------------------------


@dataclass(frozen=True)
class SmallBackbone:
    """How to build a backbone for small images.

    Args:
        build: Constructor that takes timm's arguments.
        stem: Edits what ``build`` made, in place.
        finer: By which factor the reduction of each stage in ``feature_info`` falls.
        first_conv: Module name of the first convolution.
        classifier: Module name of the classifier.
        grid: Height and width of the final map at 32x32.
    """

    build: Callable[..., Any]
    stem: Callable[[Any], None]
    finer: tuple[int, ...]
    first_conv: str
    classifier: str
    grid: int = 4


def of_timm(arch: str, stem: Callable[[Any], None], finer: tuple[int, ...], **kwargs: Any) -> SmallBackbone:
    """A backbone that timm has for larger images; ``kwargs`` go to its constructor."""
    cfg = get_pretrained_cfg(arch)
    return SmallBackbone(partial(timm.create_model, arch, **kwargs), stem, finer, cfg.first_conv, cfg.classifier)


def of_blocks(widths: tuple[int, ...], depths: tuple[int, ...], grid: int) -> SmallBackbone:
    """A ResNet of basic blocks (two 3x3 convolutions each), its shortcuts averaged where a stage halves the grid."""
    blocks = tuple(
        ByoBlockCfg(type="basic", d=depth, c=width, s=2 if stage else 1, gs=0)
        for stage, (width, depth) in enumerate(zip(widths, depths, strict=True))
    )
    cfg = ByoModelCfg(blocks=blocks, stem_chs=widths[0], stem_pool="", downsample="avg")
    finer = (2,) * len(widths)
    return SmallBackbone(partial(ByobNet, cfg), stem("stem.conv"), finer, "stem.conv", "head.fc", grid)


RESNET = stem("conv1", "maxpool"), (2, 4, 4, 4, 4)
BACKBONES: dict[str, SmallBackbone] = {
    "resnet18": of_timm("resnet18", *RESNET),
    "resnet34": of_timm("resnet34", *RESNET),
    "resnet50": of_timm("resnet50", *RESNET),
    "wide_resnet50_2": of_timm("wide_resnet50_2", *RESNET),
    "seresnet18": of_timm("seresnet18", *RESNET),
    "densenet121": of_timm("densenet121", stem("features.conv0", "features.pool0"), (2, 4, 4, 4, 4)),
    # the two wide layers are built narrow here, because the stem function drops them
    "vgg16_bn": of_timm("vgg16_bn", keep_vgg_resolution, (1, 1, 1, 1, 2), mlp_ratio=1 / 4096),
    "mobilenetv2_100": of_timm("mobilenetv2_100", stem("conv_stem", "blocks.1.0.conv_dw"), (2, 4, 4, 4, 4)),
    "mobilenetv3_small_100": of_timm("mobilenetv3_small_100", stem("conv_stem", "blocks.0.0.conv_dw"), (2, 4, 4, 4, 4)),
    "efficientnet_b0": of_timm("efficientnet_b0", stem("conv_stem", "blocks.1.0.conv_dw"), (2, 4, 4, 4, 4)),
    "regnety_008": of_timm(
        "regnety_008", stem("stem.conv", "s1.b1.conv2.conv", "s1.b1.downsample.conv"), (2, 4, 4, 4, 4)
    ),
    "convnext_atto": of_timm("convnext_atto", stem("stem.0"), (4, 4, 4, 4)),
    # ResNet-32 (He et al. 2015, arXiv:1512.03385, section 4.2): the best of chenyaofo/pytorch-cifar-models below half a
    # million parameters
    "nano": of_blocks(widths=(16, 32, 64), depths=(5, 5, 5), grid=8),
    # wide and shallow, most parameters where the grid is small: what two CPU cores can train
    "tiny": of_blocks(widths=(24, 48, 96, 144), depths=(1, 1, 2, 1), grid=4),
}


def entrypoint(name: str, small: SmallBackbone) -> Callable[..., nn.Module]:
    """The function that timm calls to build a backbone for small images."""

    def construct(**kwargs: Any) -> nn.Module:
        model = small.build(**kwargs)
        small.stem(model)
        for stage, factor in zip(model.feature_info, small.finer, strict=True):
            stage["reduction"] = max(1, stage["reduction"] // factor)  # an output_stride may lie below the stem's
        return model

    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        feature_cfg = dict(feature_cls="getter", out_indices=tuple(range(len(small.finer))))
        return build_model_with_cfg(construct, name, pretrained, feature_cfg=feature_cfg, **kwargs)

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"``{name.removesuffix('_cifar')}`` for small images; arguments as of the large one."
    return create


def register_backbones() -> None:
    """Register ``<arch>_cifar`` for each of ``BACKBONES``; again does no harm."""
    for arch, small in BACKBONES.items():
        name = f"{arch}_cifar"
        cfg = PretrainedCfg(
            num_classes=10,
            input_size=(3, 32, 32),
            pool_size=(small.grid, small.grid),
            crop_pct=1.0,
            mean=CIFAR_MEAN,
            std=CIFAR_STD,
            first_conv=small.first_conv,
            classifier=small.classifier,
        )
        default_cfgs[name] = DefaultCfg(tags=deque([""]), cfgs={"": cfg})
        if not is_model(name):
            setattr(sys.modules[__name__], name, register_model(entrypoint(name, small)))
    __all__[:] = default_cfgs

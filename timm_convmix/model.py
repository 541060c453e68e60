"""A timm backbone whose stages are mixed into its final map, and which is otherwise a timm model.

What timm expects of a model is delegated to the backbone; this file adds the prefix ``backbone.`` to the names that
timm looks up, and the mix to the final map.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.layers import Format, get_device_dtype
from timm.models import get_model_input_config, get_model_traits, group_parameters
from torch import Tensor, nn

from timm_convmix.errors import InputError
from timm_convmix.mixers import DEFAULT_MIXER, Mixer, NoMixer, create_mixer
from timm_convmix.stages import choose_stages, read_feature_info, take_indices

ARCH_PREFIX = "convmix_"
MODULE_PREFIX = "backbone."


class ConvMixNet(nn.Module):
    """A backbone with a mixer between its final map and its head.

    The mixer stands before the backbone in the order of modules, so that the head's parameters stay the last ones
    (timm's adaptive gradient clipping leaves out the last two).

    Args:
        backbone: A timm model with a 2-D final map, ``forward_intermediates`` and a ``feature_info`` of two stages
            or more.
        stages: Positions in the feature info to tap, negative ones from the end; None takes the up to three before
            the deepest.
        mixer: A name in ``timm_convmix.MIXERS``; ``'none'`` is the plain backbone.
        mixer_args: The mixer's own settings.
        warm_start: Start as the backbone: the output is exactly the backbone's until the mixer has learned. For a
            backbone that is trained already.

    Raises:
        StageError: The backbone has fewer than two stages, or ``stages`` does not fit it.
        MixerError: There is no such mixer, or it does not know a setting.
    """

    backbone: Any  # a timm model: more than an nn.Module, and nowhere declared as a type
    mixer: Mixer

    def __init__(
        self,
        backbone: Any,
        *,
        stages: Sequence[int] | None = None,
        mixer: str = DEFAULT_MIXER,
        mixer_args: dict[str, Any] | None = None,
        warm_start: bool = False,
    ) -> None:
        super().__init__()
        cfg = dict(getattr(backbone, "pretrained_cfg", None) or {})
        self.arch = cfg.get("architecture") or type(backbone).__name__
        info = read_feature_info(getattr(backbone, "feature_info", None), name=self.arch)
        self.stages = choose_stages(len(info), stages, name=self.arch)
        self.mixer = create_mixer(
            mixer,
            {stage: info[stage]["num_chs"] for stage in self.stages},
            backbone.num_features,
            **(mixer_args or {}),
            **get_device_dtype(backbone),
        )
        if warm_start:
            self.mixer.start_as_identity()
        self.backbone = backbone
        self.mixer.train(backbone.training)
        self.training = backbone.training
        self.in_chans: int = get_model_traits(backbone).get("in_chans", cfg.get("input_size", (3,))[0])
        self._nhwc = Format(getattr(backbone, "output_fmt", "NCHW")) == Format.NHWC

        self.feature_info = [dict(stage, module=MODULE_PREFIX + stage["module"]) for stage in info]
        self.feature_info[-1].update(num_chs=backbone.num_features, module="mixer")
        self.pretrained_cfg = self.default_cfg = cfg | wrapped_cfg_values(cfg)
        self._mix_args = dict(mixer=mixer, mixer_args=self.mixer.settings, stages=self.stages)
        self._record()

    def _record(self) -> None:
        """Keep, where timm saves them from, what rebuilds this instance and how its input differs from the cfg's."""
        traits = get_model_traits(self.backbone)
        if "first_conv" in traits:
            traits["first_conv"] = prefixed(traits["first_conv"])
        self._traits = {key: traits[key] for key in traits if key not in ("in_chans", "num_classes")}
        self._model_args = getattr(self.backbone, "_model_args", {})

    @property
    def _model_args(self) -> dict[str, Any]:
        """What rebuilds this instance; timm writes the caller's raw arguments over it, the resolved mix wins."""
        return self._build_args | self._mix_args

    @_model_args.setter
    def _model_args(self, args: dict[str, Any]) -> None:
        self._build_args = dict(args)

    # What timm reads of a model -----------------------------------------------------------------------------------

    @property
    def num_classes(self) -> int:
        """Outputs of the head; 0 where there is none."""
        return self.backbone.num_classes

    @property
    def num_features(self) -> int:
        """Channels of the mixed map, the same as of the backbone's final map."""
        return self.backbone.num_features

    @property
    def head_hidden_size(self) -> int:
        """Width of what the classifier reads."""
        return self.backbone.head_hidden_size

    @property
    def head(self) -> nn.Module | None:
        """The backbone's head, where it has one of that name: timm reads the pooling from it."""
        return getattr(self.backbone, "head", None)

    @property
    def global_pool(self) -> Any:
        """The backbone's pooling, where it stands outside of the head."""
        return getattr(self.backbone, "global_pool", None)

    @property
    def output_fmt(self) -> str:
        """Layout of ``forward_features``: the backbone's own, NCHW or NHWC."""
        return "NHWC" if self._nhwc else "NCHW"

    def get_classifier(self) -> nn.Module:
        """The backbone's classifier."""
        return self.backbone.get_classifier()

    def reset_classifier(self, num_classes: int, global_pool: str | None = None, **kwargs: Any) -> None:
        """Give the backbone a new classifier; device, dtype and mode stay.

        Args:
            num_classes: Outputs; 0 removes the classifier.
            global_pool: Pooling before it; None keeps the present one.
            **kwargs: What else the backbone's own method takes.
        """
        self.backbone.reset_classifier(num_classes, global_pool, **kwargs)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the backbone's activations in the backward pass, or stop doing so."""
        self.backbone.set_grad_checkpointing(enable)

    def set_input_size(self, *args: Any, **kwargs: Any) -> None:
        """Resize a backbone of fixed input size; arguments as of the backbone's own method.

        Raises:
            InputError: The backbone takes any size, and has no such method.
        """
        if not hasattr(self.backbone, "set_input_size"):
            raise InputError(f"{self.arch} takes any input size its stages can divide: there is nothing to set.")
        self.backbone.set_input_size(*args, **kwargs)
        self._record()

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """Depth of a parameter for layer decay: the backbone's own groups, the mixer with the head at the top.

        Args:
            coarse: Stages instead of blocks.

        Returns:
            Parameter name -> ordinal, 0 the shallowest.
        """
        if hasattr(self.backbone, "group_matcher"):
            groups = group_parameters(self.backbone, self.backbone.group_matcher(coarse), reverse=True)
        else:  # what timm's optimizers do with such a backbone
            from timm.optim import auto_group_layers  # noqa: PLC0415  (import timm alone does not load it)

            groups = auto_group_layers(self.backbone)
        depth = {MODULE_PREFIX + name: ordinal for name, ordinal in groups.items()}
        top = max(depth.values())
        return lambda name: depth.get(name, top)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that the authors of the backbone, or the mixer, exempt from weight decay."""
        names = self.backbone.no_weight_decay() if hasattr(self.backbone, "no_weight_decay") else ()
        return {MODULE_PREFIX + name for name in names} | {f"mixer.{name}" for name in self.mixer.no_weight_decay()}

    # From an image to logits --------------------------------------------------------------------------------------

    def forward_features(self, x: Tensor) -> Tensor:
        """Images to the mixed map.

        Args:
            x: (B, in_chans, H, W).

        Returns:
            (B, num_features, H', W'), or (B, H', W', num_features) where ``output_fmt`` is NHWC.

        Raises:
            InputError: The batch has another shape than the backbone takes.
        """
        return self._mix(*self._intermediates(x, indices=list(self.stages), stop_early=False))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Mixed map to logits, (B, num_classes), or with ``pre_logits`` to (B, head_hidden_size)."""
        kwargs = dict(pre_logits=True) if pre_logits else {}  # an encoder without classifier does not know the word
        return self.backbone.forward_head(x, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Images to the mixed map and the stages, of which the deepest is the mixed map too.

        Args:
            x: (B, in_chans, H, W).
            indices: Stages to return: None all, an integer the last n, else positions in ``feature_info``.
            norm: Apply the backbone's norm to stages where it has one; the mixed map is normalised anyway.
            stop_early: Stop at the deepest stage asked for, where the mixed map is not asked for.
            output_fmt: Of the stages; 'NCHW' only.
            intermediates_only: Return the stages alone.

        Returns:
            The mixed map as ``forward_features`` gives it, and a list of (B, num_chs, H_i, W_i), shallow to deep.

        Raises:
            InputError: The batch, or ``output_fmt``, does not fit.
            StageError: An index is out of range.
        """
        if Format(output_fmt) != Format.NCHW:
            raise InputError(f"output_fmt={output_fmt!r}: stages are returned as 'NCHW' only.")
        deepest = len(self.feature_info) - 1
        take = take_indices(len(self.feature_info), indices, name=self.arch)
        if intermediates_only and deepest not in take:
            return self._intermediates(x, indices=take, norm=norm, stop_early=stop_early, intermediates_only=True)
        read = sorted({*self.stages, *take} - ({deepest} - {*self.stages}))
        final, maps = self._intermediates(x, indices=read, stop_early=False)
        by_stage = dict(zip(read, maps, strict=True))
        final = self._mix(final, [by_stage[stage] for stage in self.stages])
        by_stage[deepest] = final.permute(0, 3, 1, 2) if self._nhwc else final
        stages = [by_stage[stage] for stage in take]
        return stages if intermediates_only else (final, stages)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what is not needed for some stages; ``features_only=True`` calls it.

        Args:
            indices: Stages to keep, as in ``forward_intermediates``. Where the deepest is among them, everything up to
                the mixed map stays; where it is not, the mixer goes too.
            prune_norm: Drop the backbone's last norm, where the mixed map goes too.
            prune_head: Drop the head; without it ``forward`` and ``forward_head`` mean nothing any more.

        Returns:
            The positions kept.
        """
        take = take_indices(len(self.feature_info), indices, name=self.arch)
        if len(self.feature_info) - 1 not in take:
            self.mixer = NoMixer()
            self.backbone.prune_intermediate_layers(take, prune_norm, prune_head)
        elif prune_head:  # the backbone's own pruning stops at its deepest stage, short of the final map
            self.backbone.reset_classifier(0)
            for name in _head_modules(self.backbone, self.num_features, nhwc=self._nhwc):
                setattr(self.backbone, name, nn.Identity())
        return take

    def _intermediates(self, x: Tensor, **kwargs: Any) -> Any:
        """What the backbone's own ``forward_intermediates`` returns, its final map in its own layout."""
        check_images(x, self.in_chans, self.arch)
        try:
            return self.backbone.forward_intermediates(x, **kwargs)
        except (AssertionError, RuntimeError) as error:
            height, width = x.shape[-2:]
            nominal = tuple(get_model_input_config(self)["input_size"][-2:])
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            about_size = isinstance(error, AssertionError) or "size" in reason
            if isinstance(error, torch.OutOfMemoryError) or (height, width) == nominal or not about_size:
                raise
            raise InputError(
                f"{self.arch} cannot take images of {height}x{width}, it is made for {nominal[0]}x{nominal[1]}"
                f" ({reason}). Resize them, or create the model with img_size=... where it has that."
            ) from error

    def _mix(self, final: Tensor, taps: Sequence[Tensor]) -> Tensor:
        """Mix the taps into the final map, whatever its layout."""
        check_final(final, self.arch)
        if self._nhwc:
            return self.mixer(taps, final.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.mixer(taps, final)


@torch.fx.wrap
def check_images(x: Tensor, in_chans: int, arch: str) -> None:
    """Refuse a batch of the wrong rank or channels before a layer inside does so in its own words.

    Raises:
        InputError: ``x`` is not (B, in_chans, H, W).
    """
    if x.ndim != 4 or x.shape[1] != in_chans:
        raise InputError(
            f"{arch} takes a batch of shape (B, {in_chans}, H, W), got {tuple(x.shape)};"
            " for another number of channels create the model with in_chans=..."
        )


@torch.no_grad()
def _head_modules(backbone: Any, num_features: int, *, nhwc: bool) -> set[str]:
    """Names of a backbone's children that hold parameters and run after its final map, found by running its head."""
    called = set()
    hooks = [
        module.register_forward_pre_hook(lambda *_, name=name: called.add(name.partition(".")[0]))
        for name, module in backbone.named_modules()
        if name
    ]
    modes = [(module, module.training) for module in backbone.modules()]
    size = (1, 8, 8, num_features) if nhwc else (1, num_features, 8, 8)
    try:
        backbone.eval().forward_head(torch.zeros(size, **get_device_dtype(backbone)))
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes:
            module.training = training
    return {name for name in called if any(True for _ in getattr(backbone, name).parameters())}


@torch.fx.wrap
def check_final(final: Tensor, arch: str) -> None:
    """Refuse a backbone without a 2-D final map, such as a ViT's (B, tokens, channels), which would broadcast wrongly.

    Raises:
        InputError: ``final`` is not a batch of maps.
    """
    if final.ndim != 4:
        raise InputError(f"{arch} has no 2-D final map to mix into, its features are {tuple(final.shape)}: use a CNN.")


def prefixed(names: str | Sequence[str] | None) -> str | tuple[str, ...] | None:
    """Names of the backbone's modules as the wrapper knows them."""
    if names is None:
        return None
    return MODULE_PREFIX + names if isinstance(names, str) else tuple(MODULE_PREFIX + name for name in names)


def wrapped_cfg_values(cfg: dict[str, Any]) -> dict[str, Any]:
    """What changes in a backbone's pretrained cfg (as a dict) once it is wrapped: the names, not the data."""
    return dict(
        architecture=ARCH_PREFIX + cfg["architecture"] if cfg.get("architecture") else None,
        first_conv=prefixed(cfg.get("first_conv")),
        classifier=prefixed(cfg.get("classifier")),
    )

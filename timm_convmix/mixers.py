"""Mixers: the taps of several stages and the final map in, one map of the final map's shape out.

A mixer knows no backbone, only widths. Adding one is one class and one line in ``MIXERS``. A name, once released,
never changes its meaning: checkpoints record it.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from timm_convmix.errors import MixerError

WARM_START_SCALE = 10.0
"""How much larger a warm start's activations are than those of a start from scratch, in mixers with gains.

Measured with 'convmix' on digits, one epoch of 45 steps from a ResNet-18 trained on CIFAR-10: with AdamW at 5e-5 and
layer decay 0.7 the mix grows to 0.1, 1.2 and 3.5 percent of the final map at scales 1, 10 and 30; with SGD at 0.01 and
0.1, 30 harms the accuracy and diverges, 10 does neither.
"""

RANK = 64
"""Of the linear layers: ConvMix's at least, AddConvMix's where the full matrix would be too large. An eighth of the few
channels that nets for small images end with was worse on a hold-out: 'single+rank8' in docs/evidence.md."""

LARGEST_MATRIX = 2**18
"""Parameters up to which AddConvMix's linear layer is the full matrix, ResNet-18's being 229,376; a larger one would be
too much beside some backbones. On hold-outs a pair of rank 64 was worse: 'add+rank64' in docs/evidence.md."""

FINAL = -1
"""Stands for the final map where a mixer names its parameters by the position of a tap."""


class Mixer(nn.Module):
    """What every mixer is: built from ``(in_channels, out_channels, *, device, dtype)``, called with maps.

    ``in_channels`` maps the position of each tapped stage to its channels, shallow to deep. A mixer with parameters of
    a tap's own names them by that position, so that a checkpoint of other stages does not fit by accident. A default's
    names are its own too, so that a checkpoint of train.py, which records no default, fits no later one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.settings: dict[str, Any] = {}
        """The resolved keyword arguments that rebuild this mixer (JSON values); they are saved with the model."""

    def forward(self, taps: Sequence[Tensor], final: Tensor) -> Tensor:
        """Mix.

        Args:
            taps: One (B, C_i, H_i, W_i) a tap, shallow to deep, on any grids.
            final: (B, out_channels, H, W).

        Returns:
            (B, out_channels, H, W), of the dtype of ``final``.
        """
        raise NotImplementedError

    def start_as_identity(self) -> None:
        """Set the parameters so that ``final`` comes out unchanged while every parameter can still learn."""
        raise NotImplementedError

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that timm's optimizers shall not decay, besides the one-dimensional ones."""
        return set()


def check_rank(rank: int, mixer: str) -> None:
    """Refuse what is no rank.

    Raises:
        MixerError: It is no integer, or negative.
    """
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 0:
        raise MixerError(f"rank={rank!r} of mixer {mixer!r} must be an integer, 0 (the full matrix) or more.")


def rank_that_pays(rank: int, width: int, out_channels: int) -> int:
    """A rank, or 0 (the full matrix) where a pair of that rank has no fewer parameters."""
    return rank if rank * (width + out_channels) < width * out_channels else 0


@torch.fx.wrap
def pool(tap: Tensor, pooling: str = "avg") -> Tensor:
    """Pool a map (B, C, H, W) over its grid to (B, C).

    While training the mean is a divided sum: its gradient is then a view of (B, C), where that of ``mean``, which
    expands before it divides, is a map as large as the tap, kept until the backward pass comes to that stage. That of
    the maximum is such a map; of equal maxima the first has all of it on a CPU, and elsewhere each has a part.

    Args:
        tap: The map.
        pooling: 'avg', 'max', or 'avgmax', half of each: timm's poolings of those names.
    """
    learns = torch.is_grad_enabled() and tap.requires_grad
    if pooling != "avg":
        # of amax a CPU takes long for the gradient; adaptive pooling has a GPU read a map in one thread
        adaptive = learns and tap.device.type == "cpu"
        maximum = nn.functional.adaptive_max_pool2d(tap, 1).flatten(1) if adaptive else tap.amax((2, 3))
        if pooling == "max":
            return maximum
    if learns:
        wide = torch.float32 if tap.dtype == torch.float16 else tap.dtype  # a sum can be too large for float16
        mean = (tap.sum((2, 3), dtype=wide) / (tap.shape[2] * tap.shape[3])).to(tap.dtype)
    else:
        mean = tap.mean((2, 3))
    return mean if pooling == "avg" else torch.lerp(mean, maximum, 0.5)


class NoMixer(Mixer):
    """The plain backbone: the final map unchanged, or a multiple of it.

    Args:
        in_channels: As of every mixer; not needed.
        out_channels: As of every mixer; not needed.
        share: What the final map is multiplied by.
        device: As of every mixer; not needed.
        dtype: As of every mixer; not needed.
    """

    def __init__(
        self,
        in_channels: Mapping[int, int] | None = None,
        out_channels: int = 0,
        *,
        share: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.share = share
        self.settings = {} if share == 1 else {"share": share}

    def forward(self, taps: Sequence[Tensor], final: Tensor) -> Tensor:
        """Return ``final``, or its multiple."""
        return final if self.share == 1 else self.share * final

    def start_as_identity(self) -> None:
        """Nothing to set."""


class PooledMixer(Mixer):
    """Globally pooled and normalised taps through one linear layer, added to the final map.

    Args:
        in_channels: Position of each tapped stage -> its channels, shallow to deep.
        out_channels: Channels of the final map.
        rank: Of the linear layer; 0 is the full matrix.
        bias: Whether the linear layer has one.
        pooling: See ``pool``.
        device: Where the parameters are made.
        dtype: Of the parameters.
    """

    suffix: ClassVar[str] = ""
    """Of the names of the taps' norms, where another mixer would read the same parameters in another way."""

    def __init__(
        self,
        in_channels: Mapping[int, int],
        out_channels: int,
        *,
        rank: int,
        bias: bool,
        pooling: str,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.settings = {"rank": rank}
        self.pooling = pooling
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        width = sum(in_channels.values())
        self.positions = [*in_channels]
        self.norms = nn.ModuleDict({f"{i}{self.suffix}": nn.LayerNorm(c, **dd) for i, c in in_channels.items()})
        self.reduce = nn.Linear(width, rank, bias=False, **dd) if rank else nn.Identity()
        self.between: nn.Module = nn.Identity()
        self.expand = nn.Linear(rank or width, out_channels, bias=bias, **dd)
        self.act: nn.Module = nn.Identity()

    def project(self, taps: Sequence[Tensor]) -> Tensor:
        """What the layers make of the taps: (B, out_channels)."""
        vectors = [norm(pool(tap, self.pooling)) for norm, tap in zip(self.norms.values(), taps, strict=True)]
        return self.act(self.expand(self.between(self.reduce(torch.cat(vectors, dim=1)))))

    def mix(self, taps: Sequence[Tensor]) -> Tensor:
        """What is added to every cell: (B, out_channels)."""
        raise NotImplementedError

    def forward(self, taps: Sequence[Tensor], final: Tensor) -> Tensor:
        """Add the mix of the pooled taps to every cell of the final map; shapes as in ``Mixer.forward``."""
        return final + self.mix(taps).to(final.dtype)[:, :, None, None]


class ConvMix(PooledMixer):
    """A learned combination of globally pooled stages, added to the final map.

    ``final + gain * relu(linear(concat(layer_norm(mean(tap)) for tap in taps)))``, broadcast over the grid: a 1x1
    convolution of multi-level pooled features. The form is this project's own, found by measurement; the paper
    (Arif, Burchert, Schmidt-Thieme, SCIA 2023, doi:10.1007/978-3-031-31438-4_11) is public only as an abstract.

    The linear layer is a pair of rank ``out_channels // 8``, but at least ``RANK``, wherever that has fewer
    parameters than the full matrix; this holds the mixer under a tenth of any timm backbone. The gain stands after the
    activation, because a zero before it would have a zero gradient for ever; it is one-dimensional, so timm's
    optimizers do not decay it.

    Args:
        in_channels: Position of each tapped stage -> its channels, shallow to deep.
        out_channels: Channels of the final map.
        rank: Of the linear layer; 0 is the full matrix, None the rule above.
        device: Where the parameters are made.
        dtype: Of the parameters.

    Raises:
        MixerError: ``rank`` is no integer, or negative.
    """

    def __init__(
        self,
        in_channels: Mapping[int, int],
        out_channels: int,
        *,
        rank: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if rank is None:
            rank = rank_that_pays(max(RANK, out_channels // 8), sum(in_channels.values()), out_channels)
        check_rank(rank, "convmix")
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        super().__init__(in_channels, out_channels, rank=rank, bias=True, pooling="avg", **dd)
        self.act = nn.ReLU()
        self.gain = nn.Parameter(torch.ones(out_channels, **dd))

    def mix(self, taps: Sequence[Tensor]) -> Tensor:
        """What is added to every cell: (B, out_channels)."""
        return self.gain * self.project(taps)

    @torch.no_grad()
    def start_as_identity(self) -> None:
        """Set the gain to zero, so that ``final`` comes out exactly, and widen what it multiplies.

        The gain's gradient is the activation, and fine-tuning rates are made for matrices: at AdamW's 5e-5 a gain in
        front of activations of unit size would move by a thousandth in an epoch of 45 steps.
        """
        nn.init.zeros_(self.gain)
        self.expand.weight.mul_(WARM_START_SCALE)
        self.expand.bias.mul_(WARM_START_SCALE)


class DualConvMix(Mixer):
    """Two ConvMix side by side, one of the taps and one of the final map itself.

    ``final + mix(taps) + mix(final)``, each ``mix`` with norms, a linear layer, an activation and a gain of its own.
    The default before 'linear', chosen on a hold-out over the taps alone: 'single' in docs/evidence.md.

    Args:
        in_channels: Position of each tapped stage -> its channels, shallow to deep.
        out_channels: Channels of the final map.
        rank: Of the taps' linear layer, wherever that has fewer parameters than the full matrix; 0 is the full matrix.
            The final map's has the same up to 512 channels, and beyond them no more parameters than there, so that a
            wide last layer on a small backbone does not make the mixer large.
        device: Where the parameters are made.
        dtype: Of the parameters.

    Raises:
        MixerError: ``rank`` is no integer, or negative.
    """

    name: ClassVar[str] = "dual"
    activation: ClassVar[type[nn.Module]] = nn.ReLU
    pooling: ClassVar[str] = "avg"
    """Of the taps; see ``pool``."""
    start: ClassVar[float] = 1.0
    """Of each channel's gain."""

    def __init__(
        self,
        in_channels: Mapping[int, int],
        out_channels: int,
        *,
        rank: int = RANK,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_rank(rank, self.name)
        self.settings = {"rank": rank}
        self.taps, self.final = (
            ConvMix(channels, out_channels, rank=fitting, device=device, dtype=dtype)
            for channels, fitting in dual_branches(in_channels, out_channels, rank)
        )
        self.taps.pooling = self.pooling
        for branch in (self.taps, self.final):
            branch.act = self.activation()
            nn.init.constant_(branch.gain, self.start)

    def forward(self, taps: Sequence[Tensor], final: Tensor) -> Tensor:
        """Add both mixes to every cell of the final map; shapes as in ``Mixer.forward``."""
        mix = self.taps.mix(taps) + self.final.mix([final])  # (B, out_channels)
        return final + mix.to(final.dtype)[:, :, None, None]

    def start_as_identity(self) -> None:
        """Both do, see ConvMix."""
        self.taps.start_as_identity()
        self.final.start_as_identity()


def dual_branches(
    in_channels: Mapping[int, int], out_channels: int, rank: int
) -> Iterator[tuple[Mapping[int, int], int]]:
    """Position -> channels, and the rank, of the taps' branch and of the final map's; see DualConvMix."""
    of_final = max(1, min(rank, rank * 512 // out_channels)) if rank else 0
    for channels, wanted in (in_channels, rank), ({FINAL: out_channels}, of_final):
        yield channels, rank_that_pays(wanted, sum(channels.values()), out_channels)


class LinearConvMix(DualConvMix):
    """A learned linear combination of globally pooled stages and of the final map, added to it.

    ``final + gain * linear(concat(layer_norm(mean(tap)) for tap in taps)) + gain' * linear'(layer_norm(mean(final)))``,
    broadcast over the grid: DualConvMix without activation. The default before 'layerscale', chosen on a hold-out over
    DualConvMix, which ends below the plain backbone on few images: 'dual' in docs/evidence.md.

    Arguments and errors are those of DualConvMix.
    """

    name = "linear"
    activation = nn.Identity


class LayerScaleConvMix(LinearConvMix):
    """LinearConvMix whose gains start small, as LayerScale's do.

    At 0.1, what LayerScale takes for networks of up to 18 layers (Touvron et al. 2021, arXiv:2103.17239). From gains of
    one, half the plain backbone's learning rate was best. The default before 'avgmax', chosen on hold-outs over
    LinearConvMix, each at the rate that is best for it: 'linear' in docs/evidence.md.

    Arguments and errors are those of DualConvMix.
    """

    name = "layerscale"
    start = 0.1


class AvgMaxConvMix(LayerScaleConvMix):
    """LayerScaleConvMix that pools the taps by average and maximum, half each.

    The maximum keeps how strong a feature is wherever it is, which the average of a large map loses. The final map is
    pooled by average alone. The default before 'blend', chosen on hold-outs over LayerScaleConvMix, each at the rate
    that is best for it: 'layerscale' in docs/evidence.md.

    Arguments and errors are those of DualConvMix.
    """

    name = "avgmax"
    pooling = "avgmax"


class AddConvMix(PooledMixer):
    """The final map plus the mean of the tapped stages' maxima, each projected to its channels.

    ``final + linear(concat(layer_norm(max(tap)) for tap in taps)) / number of taps``, broadcast over the grid. The
    linear layer starts as one of each tap alone would, so that all count alike at first. Where it has low rank, a layer
    norm without parameters stands between its two matrices: their bare product diverges in a ResNet-50 at the learning
    rate 0.1. The default before 'add_avgmax', chosen over BlendConvMix, which ends below the plain backbone in
    'tiny_cifar': docs/experiments.md.

    Args:
        in_channels: Position of each tapped stage -> its channels, shallow to deep.
        out_channels: Channels of the final map.
        rank: Of the linear layer; 0 is the full matrix, None the full matrix up to ``LARGEST_MATRIX`` parameters and
            ``RANK`` beyond.
        device: Where the parameters are made.
        dtype: Of the parameters.

    Raises:
        MixerError: ``rank`` is no integer, or negative.
    """

    name: ClassVar[str] = "add"
    taps_pooling: ClassVar[str] = "max"
    """See ``pool``."""

    def __init__(
        self,
        in_channels: Mapping[int, int],
        out_channels: int,
        *,
        rank: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if rank is None:
            rank = 0 if sum(in_channels.values()) * out_channels <= LARGEST_MATRIX else RANK
        check_rank(rank, self.name)
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        super().__init__(in_channels, out_channels, rank=rank, bias=False, pooling=self.taps_pooling, **dd)
        first = self.reduce if isinstance(self.reduce, nn.Linear) else self.expand
        for columns in torch.split(first.weight.detach(), [*in_channels.values()], dim=1):
            nn.init.kaiming_uniform_(columns, a=math.sqrt(5))  # nn.Linear's own, of this tap alone
        if rank > 1:  # one number has no deviation to divide by
            self.between = nn.LayerNorm(rank, elementwise_affine=False)

    def mix(self, taps: Sequence[Tensor]) -> Tensor:
        """What is added to every cell: (B, out_channels)."""
        return self.project(taps) / len(self.norms)

    def start_as_identity(self) -> None:
        """Set the linear layer to zero, so that ``final`` comes out exactly.

        On digits, one epoch of 43 steps from the embedded baseline, the mix of 'add' grows to 1.6 percent of the final
        map with AdamW at 5e-5 and layer decay 0.7, and to 8.4 percent with SGD at 0.01.
        """
        nn.init.zeros_(self.expand.weight)


class AddAvgMaxConvMix(AddConvMix):
    """AddConvMix whose stages are pooled by average and maximum, half each; the default.

    ``final + linear(concat(layer_norm((mean(tap) + max(tap)) / 2) for tap in taps)) / number of taps``. Chosen over
    AddConvMix, whose maxima alone end below the plain backbone on a hold-out, a ResNet-18 on all of CIFAR-100; averages
    alone gain less in short trainings: 'add' and 'pool_avg' in docs/evidence.md.

    Arguments and errors are those of AddConvMix.
    """

    name = "add_avgmax"
    taps_pooling = "avgmax"
    suffix = "_avgmax"


class BlendConvMix(AddConvMix):
    """The mean of the final map and of the tapped stages' maxima, each projected to its channels.

    ``share * (final + linear(concat(layer_norm(max(tap)) for tap in taps)))``, broadcast over the grid, with
    ``share = 1 / (1 + number of taps)``. It is ELMo's scalar mix (Peters et al. 2018, arXiv:1802.05365) with equal
    shares, of stages that are pooled by their maximum and projected. The default before 'add', chosen on hold-outs over
    AvgMaxConvMix, each at the rate that is best for it: 'avgmax' in docs/evidence.md. Nothing stands between the two
    matrices of a low rank.

    Arguments and errors are those of AddConvMix.
    """

    name = "blend"
    share: Tensor  # (1,): a buffer, because a warm start changes it

    def __init__(
        self,
        in_channels: Mapping[int, int],
        out_channels: int,
        *,
        rank: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_channels, out_channels, rank=rank, device=device, dtype=dtype)
        self.between = nn.Identity()
        self.register_buffer("share", torch.full((1,), 1 / (1 + len(in_channels)), device=device, dtype=dtype))

    def forward(self, taps: Sequence[Tensor], final: Tensor) -> Tensor:
        """Average the projected taps and every cell of the final map; shapes as in ``Mixer.forward``."""
        share = self.share.to(final.dtype)
        return share * final + (share * self.project(taps).to(final.dtype))[:, :, None, None]

    def start_as_identity(self) -> None:
        """Set the linear layer to zero and the share to one, so that ``final`` comes out exactly."""
        super().start_as_identity()
        nn.init.ones_(self.share)


MIXERS: dict[str, Callable[..., Mixer]] = {
    "add_avgmax": AddAvgMaxConvMix,
    "add": AddConvMix,
    "blend": BlendConvMix,
    "avgmax": AvgMaxConvMix,
    "layerscale": LayerScaleConvMix,
    "linear": LinearConvMix,
    "dual": DualConvMix,
    "convmix": ConvMix,
    "none": NoMixer,
}
DEFAULT_MIXER = "add_avgmax"


def create_mixer(name: str, in_channels: Mapping[int, int], out_channels: int, **settings: Any) -> Mixer:
    """Build a mixer by name.

    Args:
        name: A key of ``MIXERS``.
        in_channels: Position of each tapped stage -> its channels, shallow to deep.
        out_channels: Channels of the final map.
        **settings: The mixer's own keyword arguments, ``device`` and ``dtype`` among them.

    Raises:
        MixerError: There is no mixer of that name, or it does not know a setting.
    """
    if name not in MIXERS:
        raise MixerError(f"Unknown mixer {name!r}; choose one of {', '.join(map(repr, MIXERS))}.")
    try:
        inspect.signature(MIXERS[name]).bind(in_channels, out_channels, **settings)
    except TypeError as error:
        raise MixerError(f"mixer {name!r} does not take these settings: {error}; leave them out.") from error
    return MIXERS[name](in_channels, out_channels, **settings)

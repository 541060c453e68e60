"""The ways to use a backbone's stages that are compared: ConvMix, its variants, its control, and its peers.

A scheme's name is one of ``PEERS``, or ``convmix``, or changes to it from ``CHANGES``, joined by '+' (``grid+full``);
``control`` and ``control-CHANGES`` are the mixer, or a branch of it, on the deepest stage alone, of as many parameters.
``ALL`` lists what ``python -m benchmarks.accuracy --schemes all`` runs.

Importing this module adds ``variant`` and ``scalar`` to ``timm_convmix.MIXERS``; the package itself
has released mixers only.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from timm_convmix import MIXERS, ConvMixNet, Mixer, MixerError
from timm_convmix.mixers import (
    DEFAULT_MIXER,
    FINAL,
    AddConvMix,
    AvgMaxConvMix,
    BlendConvMix,
    ConvMix,
    LayerScaleConvMix,
    PooledMixer,
    create_mixer,
    pool,
)
from timm_convmix.stages import MAX_TAPS, read_feature_info

SIDE_WEIGHT = 0.3
"""Of each side classifier's loss: GoogLeNet (Szegedy et al. 2014, arXiv:1409.4842)."""
ADDED_SEED = 1_000_000
"""Added to a run's seed for what a scheme adds to the backbone."""

Criterion = Callable[[Tensor, Tensor], Tensor]


# Mixers ---------------------------------------------------------------------------------------------------------------


class RunningNorm(nn.Module):
    """Batch norm that uses its running statistics while it learns too, so that a batch of one is no special case.

    The statistics are updated before they are used, the first ones as plain means (Ioffe 2017, arXiv:1702.03275,
    shows that training may use running statistics; here they carry no gradient).

    Args:
        channels: C of the last dimension.
        device: Where the parameters are made.
        dtype: Of the parameters.
    """

    running: Tensor  # (2, C): means of the values and of their squares
    updates: Tensor

    def __init__(
        self, channels: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(channels, device=device, dtype=dtype))
        self.register_buffer("running", torch.zeros(2, channels, device=device))
        self.register_buffer("updates", torch.zeros((), device=device))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (..., C)."""
        if self.training:
            with torch.no_grad():
                values = x.detach().float().flatten(0, -2)
                self.updates += 1
                momentum = (1 / self.updates).clamp(min=0.1)
                self.running += momentum * (torch.stack([values.mean(0), values.square().mean(0)]) - self.running)
        mean = self.running[0]
        variance = torch.where(self.updates > 0, (self.running[1] - mean.square()).clamp(min=0), 1)
        return ((x - mean) * (variance + 1e-5).rsqrt()).to(x.dtype) * self.weight + self.bias


class BatchNorm(nn.BatchNorm1d):
    """Batch norm over the last dimension of (..., C)."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (torch's name)
        """Normalise (..., C)."""
        return super().forward(input.flatten(0, -2)).view_as(input)


class UnitNorm(nn.Module):
    """Each vector divided by its length."""

    def __init__(self, channels: int, **kwargs: Any) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (..., C)."""
        return F.normalize(x, dim=-1)


class GeM(nn.Module):
    """Generalised mean (Radenovic et al. 2018, arXiv:1711.02512): ``mean(x ** p) ** (1 / p)``, p learned from 3.

    Below ``eps`` values count as ``eps``: the form is made for maps after a ReLU.
    """

    def __init__(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.full((1,), 3.0, device=device, dtype=dtype))
        self.eps = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, 1, 1)."""
        p = self.p.float()  # a half cannot hold powers of activations
        return x.float().clamp(min=self.eps).pow(p).mean((2, 3), keepdim=True).pow(1 / p).to(x.dtype)


NORMS: dict[str, Callable[..., nn.Module]] = {
    "none": nn.Identity,
    "layer": nn.LayerNorm,
    "rms": nn.RMSNorm,
    "batch": BatchNorm,
    "running": RunningNorm,
    "l2": UnitNorm,
}
POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "avg": lambda x: pool(x)[:, :, None, None],
    "max": lambda x: pool(x, "max")[:, :, None, None],
    "avgmax": lambda x: pool(x, "avgmax")[:, :, None, None],
}
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"none": nn.Identity, "relu": nn.ReLU, "gelu": nn.GELU}


class Variant(Mixer):
    """A released mixer with its choices as arguments; with their defaults it computes what that mixer does.

    Args:
        in_channels: Position of each tapped stage -> its channels, shallow to deep.
        out_channels: Channels of the final map.
        base: The mixer: 'add_avgmax', 'add', 'blend', or a key of ``MIXERS`` whose branches are ConvMix's.
        rank: As of that mixer; None is its default.
        grid: Mix on the final map's grid, to which the maps are averaged whatever ``pool`` says, instead of after
            global pooling.
        norm: A key of ``NORMS``; applied to each map's channels.
        pool: Global pooling: a key of ``POOLS``, or 'gem'; None is that mixer's own.
        pool_final: The same, of the final map; None is ``pool``.
        act: A key of ``ACTIVATIONS``; None is that mixer's own.
        residual: Add the mix to the final map. Without it the mix replaces the final map.
        gate: Multiply the mix by the final map before.
        gain: What each channel's gain starts with; None is that mixer's own, and that of one without gains.
        share: Multiplies what mixers 'add_avgmax' and 'add' add, or the share of mixer 'blend'.
        drop_tap: Chance that a map is left out for an image while training; the others are scaled up.
        dropout: The same for each of a map's channels.
        bare: Nothing between the two matrices of a low rank.
        decay: Decay the weights of the linear layers, where the optimizer decays any.
        device: Where the parameters are made.
        dtype: Of the parameters.

    Raises:
        MixerError: A setting is unknown, or is of other mixers than ``base``.
    """

    pool: Callable[[Tensor], Tensor] | None
    pool_final: Callable[[Tensor], Tensor] | None

    def __init__(  # noqa: PLR0913  (a choice each)
        self,
        in_channels: Mapping[int, int],
        out_channels: int,
        *,
        base: str = DEFAULT_MIXER,
        rank: int | None = None,
        grid: bool = False,
        norm: str = "layer",
        pool: str | None = None,
        pool_final: str | None = None,
        act: str | None = None,
        residual: bool = True,
        gate: bool = False,
        gain: float | None = None,
        share: float = 1.0,
        drop_tap: float = 0.0,
        dropout: float = 0.0,
        bare: bool = False,
        decay: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for what, chosen, known in (
            ("norm", norm, NORMS),
            ("pool", pool or "avg", {*POOLS, "gem"}),
            ("pool_final", pool_final or "avg", {*POOLS, "gem"}),
            ("act", act or "none", ACTIVATIONS),
        ):
            if chosen not in known:
                raise MixerError(f"{what}={chosen!r} of a variant is none of {', '.join(sorted(known))}.")
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        self.like = create_mixer(base, in_channels, out_channels, **({} if rank is None else {"rank": rank}), **dd)
        if not self.branches():
            raise MixerError(f"there is no variant of {base!r}: choose a mixer that pools its taps.")
        averages = isinstance(self.like, AddConvMix)
        if gain is not None if averages else share != 1:
            raise MixerError(f"a variant of {base!r} has no {'gain' if averages else 'share'}: leave it out.")
        self.settings = self.like.settings | dict(
            base=base,
            grid=grid,
            norm=norm,
            pool=pool,
            pool_final=pool_final,
            act=act,
            residual=residual,
            gate=gate,
            gain=gain,
            share=share,
            drop_tap=drop_tap,
            dropout=dropout,
            bare=bare,
            decay=decay,
        )
        channels = {**in_channels, FINAL: out_channels}
        self.maps = list(channels)
        for branch in self.branches():
            for key, position in zip(branch.norms, branch.positions, strict=True):
                branch.norms[key] = NORMS[norm](channels[position], **dd)
            branch.act = ACTIVATIONS[act]() if act else branch.act
            branch.between = nn.Identity() if bare else branch.between
            if isinstance(branch, ConvMix) and gain is not None:
                nn.init.constant_(branch.gain, gain)
        self.scale = share / len(in_channels)  # of what a mixer without gains adds
        if isinstance(self.like, BlendConvMix):  # which multiplies everything instead
            self.like.share.mul_(share)
            self.scale = 1.0
        self.pool = GeM(**dd) if pool == "gem" else POOLS.get(pool or "")
        self.pool_final = GeM(**dd) if pool_final == "gem" else POOLS.get(pool_final or "", self.pool)
        self.grid, self.residual, self.gate = grid, residual, gate
        self.drop_tap, self.dropout = drop_tap, nn.Dropout(dropout)

    def branches(self) -> list[PooledMixer]:
        """Those of the mixer, each with norms, linear layers and an activation."""
        return [module for module in self.like.modules() if isinstance(module, PooledMixer)]

    def forward(self, taps: Sequence[Tensor], final: Tensor) -> Tensor:
        """Mix; shapes as in ``Mixer.forward``."""
        maps = dict(zip(self.maps, [*taps, final], strict=True))
        mix = torch.stack([self.mix(branch, maps) for branch in self.branches()]).sum(0)
        mix = mix.to(final.dtype).permute(0, 3, 1, 2)  # (B, out_channels, H, W), or (B, out_channels, 1, 1)
        mix = mix * final if self.gate else mix
        mixed = final + mix if self.residual else mix.expand_as(final)
        return self.like.share.to(mixed.dtype) * mixed if isinstance(self.like, BlendConvMix) else mixed

    def mix(self, branch: PooledMixer, maps: Mapping[int, Tensor]) -> Tensor:
        """What a branch makes of its maps: (B, H, W, out_channels), or (B, 1, 1, out_channels)."""
        grid = maps[FINAL].shape[2], maps[FINAL].shape[3]
        vectors = []
        for position, norm in zip(branch.positions, branch.norms.values(), strict=True):
            x, chosen = maps[position], self.pool_final if position == FINAL else self.pool
            cells = F.adaptive_avg_pool2d(x, grid) if self.grid else (chosen or POOLS[branch.pooling])(x)
            vector = norm(cells.permute(0, 2, 3, 1))  # (B, H, W, C_i), or (B, 1, 1, C_i)
            keep = F.dropout(vector.new_ones(len(vector), 1, 1, 1), self.drop_tap, self.training)
            vectors.append(self.dropout(vector * keep))
        mixed = branch.act(branch.expand(branch.between(branch.reduce(torch.cat(vectors, dim=3)))))
        return (branch.gain if isinstance(branch, ConvMix) else self.scale) * mixed

    def no_weight_decay(self) -> set[str]:
        """None, or all."""
        return set() if self.settings["decay"] else {name for name, _ in self.named_parameters()}

    @torch.no_grad()
    def start_as_identity(self) -> None:
        """Set the gains to zero, or what mixers without gains do, so that ``final`` comes out exactly.

        Raises:
            MixerError: The mix replaces the final map.
        """
        if not self.residual:
            raise MixerError("A mixer without residual cannot start as an identity: train it from scratch.")
        for branch in self.branches():
            if isinstance(branch, ConvMix):
                nn.init.zeros_(branch.gain)
            else:
                branch.start_as_identity()


class ScalarMix(Mixer):
    """ELMo's scalar mix (Peters et al. 2018, arXiv:1802.05365): ``gamma * sum(softmax(w)_k * h_k)``.

    There all layers have one shape. Here each tap is pooled over its grid, layer-normalised and projected to the final
    map's channels; the final map itself is the last of the ``h_k``.

    Args:
        in_channels: Position of each tapped stage -> its channels, shallow to deep.
        out_channels: Channels of the final map.
        pooling: Of the taps: 'avg' or 'avgmax', see ``timm_convmix.mixers.pool``.
        device: Where the parameters are made.
        dtype: Of the parameters.
    """

    def __init__(
        self,
        in_channels: Mapping[int, int],
        out_channels: int,
        *,
        pooling: str = "avg",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        self.pooling = pooling
        self.settings = {"pooling": pooling}
        self.projections = nn.ModuleDict(
            {
                str(stage): nn.Sequential(nn.LayerNorm(c, **dd), nn.Linear(c, out_channels, bias=False, **dd))
                for stage, c in in_channels.items()
            }
        )
        self.weights = nn.Parameter(torch.zeros(len(in_channels) + 1, **dd))
        self.gamma = nn.Parameter(torch.ones(1, **dd))

    def forward(self, taps: Sequence[Tensor], final: Tensor) -> Tensor:
        """Mix; shapes as in ``Mixer.forward``."""
        *shares, own = (self.gamma * self.weights.softmax(0)).unbind()
        pooled = (
            share * projection(pool(tap, self.pooling))
            for share, projection, tap in zip(shares, self.projections.values(), taps, strict=True)
        )
        mix = torch.stack(list(pooled)).sum(0)  # (B, out_channels)
        return own.to(final.dtype) * final + mix.to(final.dtype)[:, :, None, None]

    @torch.no_grad()
    def start_as_identity(self) -> None:
        """Equal shares, a gamma that undoes them, and projections to zero."""
        nn.init.zeros_(self.weights)
        nn.init.constant_(self.gamma, len(self.weights))
        for projection in self.projections.values():
            nn.init.zeros_(projection[1].weight)  # type: ignore[index]


MIXERS.update(variant=Variant, scalar=ScalarMix)


# Peers that end in logits instead of a map ----------------------------------------------------------------------------


class Peer(nn.Module):
    """A backbone read at the stages that ConvMix taps by default, with classifiers of its own.

    Args:
        backbone: A timm model with its classifier.
    """

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.net: Any = ConvMixNet(backbone, mixer="none")
        self.num_classes: int = self.net.num_classes
        self.widths: list[int] = [self.net.feature_info[stage]["num_chs"] for stage in self.net.stages]
        """Channels of the taps, shallow to deep."""
        self.hidden: int = self.net.head_hidden_size
        """Width of the embedding."""

    def read(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Images to the embedding (B, hidden) and the taps (B, C_i, H_i, W_i)."""
        final, taps = self.net.forward_intermediates(x, indices=self.net.stages)
        return self.net.forward_head(final, pre_logits=True), taps


class Concat(Peer):
    """The pooled taps and the embedding, concatenated, into one wider classifier."""

    def __init__(self, backbone: Any) -> None:
        super().__init__(backbone)
        self.net.reset_classifier(0)
        self.classifier = nn.Linear(sum(self.widths) + self.hidden, self.num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images to logits."""
        embedding, taps = self.read(x)
        return self.classifier(torch.cat([*(tap.mean((2, 3)) for tap in taps), embedding], dim=1))


class DagCnn(Peer):
    """DAG-CNN (Yang & Ramanan, ICCV 2015, arXiv:1505.05232): a classifier a stage, the scores summed.

    Each stage is averaged over its grid and scaled to unit length; the deepest one is the embedding.
    """

    def __init__(self, backbone: Any) -> None:
        super().__init__(backbone)
        self.net.reset_classifier(0)
        self.classifiers = nn.ModuleList(nn.Linear(width, self.num_classes) for width in (*self.widths, self.hidden))

    def forward(self, x: Tensor) -> Tensor:
        """Images to logits."""
        embedding, taps = self.read(x)
        vectors = [*(tap.mean((2, 3)) for tap in taps), embedding]
        scores = [
            classifier(F.normalize(vector, dim=1)) for classifier, vector in zip(self.classifiers, vectors, strict=True)
        ]
        return torch.stack(scores).sum(0)


class Attention(Peer):
    """Learn to pay attention (Jetley et al., ICLR 2018, arXiv:1804.02391), its 'concat-pc' form.

    A tap's cells, projected to the embedding's width, are scored by ``<u, cell + embedding>`` with a learned u; the
    softmax over the grid weights their sum; the sums of all taps, concatenated, are classified. The paper also drops
    early poolings to keep the maps large; here the backbone stays as it is.
    """

    def __init__(self, backbone: Any) -> None:
        super().__init__(backbone)
        self.net.reset_classifier(0)
        self.projections = nn.ModuleList(nn.Conv2d(width, self.hidden, 1, bias=False) for width in self.widths)
        self.scores = nn.ModuleList(nn.Linear(self.hidden, 1, bias=False) for _ in self.widths)
        self.classifier = nn.Linear(len(self.widths) * self.hidden, self.num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images to logits."""
        embedding, taps = self.read(x)
        attended = []
        for tap, projection, score in zip(taps, self.projections, self.scores, strict=True):
            cells = projection(tap).flatten(2).transpose(1, 2)  # (B, H_i * W_i, hidden)
            share = score(cells + embedding[:, None]).softmax(1)
            attended.append((share * cells).sum(1))
        return self.classifier(torch.cat(attended, dim=1))


class Supervised(Peer):
    """Deep supervision (Lee et al. 2014, arXiv:1409.5185): a classifier a tap whose loss helps while training only."""

    def __init__(self, backbone: Any) -> None:
        super().__init__(backbone)
        self.sides = nn.ModuleList(nn.Linear(width, self.num_classes) for width in self.widths)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Images to logits, while training with those of the side classifiers after them."""
        final, taps = self.net.forward_intermediates(x, indices=self.net.stages)
        logits = self.net.forward_head(final)
        if not self.training:
            return logits
        return [logits, *(side(tap.mean((2, 3))) for side, tap in zip(self.sides, taps, strict=True))]


def as_list(outputs: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """What a model returned: its logits, then those of side classifiers where it has some."""
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def total_loss(outputs: Tensor | Sequence[Tensor], labels: Tensor, criterion: Criterion) -> Tensor:
    """The loss of the logits, and ``SIDE_WEIGHT`` times that of each side classifier."""
    logits, *sides = as_list(outputs)
    loss = criterion(logits, labels)
    return loss + SIDE_WEIGHT * torch.stack([criterion(side, labels) for side in sides]).sum() if sides else loss


# The table ------------------------------------------------------------------------------------------------------------

PEERS: dict[str, Callable[[Any], nn.Module]] = {
    "last": lambda backbone: backbone,  # the plain backbone: only the last stage is classified
    "concat": Concat,
    "dag": DagCnn,
    "scalar": lambda backbone: ConvMixNet(backbone, mixer="scalar"),
    "scalar_avgmax": lambda backbone: ConvMixNet(backbone, mixer="scalar", mixer_args={"pooling": "avgmax"}),
    "attention": Attention,
    "supervised": Supervised,
}

OWN_CLASSIFIERS = {name for name, make in PEERS.items() if isinstance(make, type)}
"""Peers that do not end in the backbone's classifier, or not in it alone."""

CHANGES: dict[str, dict[str, Any]] = {
    "convmix": {},
    # mixers that were the default before: by the maximum alone; the mean of stages and final map; both in branches of
    # their own, added to the final map
    "add": dict(base="add"),
    "blend": dict(base="blend"),
    "avgmax": dict(base="avgmax"),
    "layerscale": dict(base="layerscale"),
    "linear": dict(base="linear"),
    "dual": dict(base="dual"),
    # their branches: the stages alone, or together with the deepest in one branch, of 'linear' and, with ReLU, of the
    # mixer 'convmix'
    "one_branch_linear": dict(base="convmix", act="none", deepest=True),
    "single": dict(base="convmix"),
    "one_branch": dict(base="convmix", deepest=True),
    # what the stages are multiplied by, or in 'blend' everything: 1 / number by default, or a multiple of it
    "share0.5": dict(share=0.5),
    "share2": dict(share=2.0),
    "share3": dict(share=3.0),
    # where it mixes: after global pooling by default; the grid takes averages
    "grid": dict(grid=True),
    # an activation: none by default
    "gelu": dict(act="gelu"),
    # how many stages before the deepest it taps: up to three by default
    "stages1": dict(before=1),
    "stages2": dict(before=2),
    "stages_all": dict(before=None),
    # or the deepest too, or it alone: the control without its width
    "deepest": dict(deepest=True),
    "deepest_alone": dict(before=0, deepest=True),
    # how it normalises: layer norm by default
    "norm_none": dict(norm="none"),
    "norm_batch": dict(norm="batch"),
    "norm_l2": dict(norm="l2"),
    "norm_rms": dict(norm="rms"),
    "norm_running": dict(norm="running"),
    # how it pools the taps: by average and maximum by default; 'add' by the maximum
    "pool_avg": dict(pool="avg"),
    "gem": dict(pool="gem"),
    # the rank of the linear layers: the mixer's own by default, or full where that is smaller; divisor is read by
    # `arguments_of`
    "full": dict(divisor=0),
    "rank4": dict(divisor=4),
    "rank8": dict(divisor=8),
    "rank64": dict(rank=64),
    # and no layer norm between its two matrices
    "bare": dict(bare=True),
    # added to the final map by default; or instead of it, or multiplied by it before that
    "no_residual": dict(residual=False, deepest=True),
    "gate": dict(gate=True),
    # regularisation: none by default
    "drop_tap": dict(drop_tap=0.2),
    "dropout": dict(dropout=0.5),
    # weight decay: that of every linear layer by default
    "no_decay": dict(decay=False),
}
CHANGES_OF_BRANCHES: dict[str, dict[str, Any]] = {
    # what the gains start with
    "gain0": dict(gain=0.0),
    "gain0.3": dict(gain=0.3),
    "gain1": dict(gain=1.0),
    "gain3": dict(gain=3.0),
    # how everything is pooled, or the taps alone, or the final map alone
    "pool_avgmax": dict(pool="avgmax"),
    "max": dict(pool="max"),
    "max_taps": dict(pool="max", pool_final="avg"),
    "avgmax_final": dict(pool_final="avgmax"),
    # the default's layer norm in the control
    "normed": dict(bare=False),
}
"""Of former defaults, most with gains and a branch of the final map (``layerscale+gain3``), or of the control."""
BRANCHES: dict[str, dict[str, Any]] = {
    # bare: a stronger control than with a layer norm between (``control-add+normed``)
    "add_avgmax": dict(base="add_avgmax", bare=True),
    "add": dict(base="add", bare=True),
    "blend": dict(base="blend"),
    "avgmax": dict(base="convmix", act="none", gain=AvgMaxConvMix.start, pool="avgmax"),
    "layerscale": dict(base="convmix", act="none", gain=LayerScaleConvMix.start),
    "linear": dict(base="convmix", act="none"),
    "dual": dict(base="convmix"),
    "convmix": dict(base="convmix"),
}
"""The branch of the taps in each mixer, as a variant; the control's is of the same form."""
CONTROL = "control"
ALL = (*PEERS, CONTROL, *CHANGES)


def changes_of(scheme: str) -> dict[str, Any]:
    """What a scheme changes of ConvMix: ``grid+full`` to ``{'grid': True, 'divisor': 0}``.

    Raises:
        ValueError: There is no such scheme.
    """
    names = scheme.removeprefix(CONTROL).removeprefix("-").split("+")
    changes: dict[str, Any] = {}
    known = CHANGES | CHANGES_OF_BRANCHES
    for name in names if scheme != CONTROL else ():
        if name not in known:
            raise ValueError(
                f"Unknown scheme {scheme!r}: choose {', '.join((*PEERS, CONTROL))}, changes of ConvMix"
                f" ({', '.join(CHANGES)}) joined by '+', or {CONTROL}-CHANGES."
            )
        changes |= known[name]
    return changes


def check_name(scheme: str) -> None:
    """Refuse a name that is no scheme's.

    Raises:
        ValueError: It is none.
    """
    if scheme not in PEERS:
        changes_of(scheme)


def stages_of(count: int, *, before: int | None = MAX_TAPS, deepest: bool = False) -> tuple[int, ...]:
    """Positions to tap: up to ``before`` stages before the deepest (None: all), and the deepest too if asked for."""
    first = 0 if before is None else max(0, count - 1 - before)
    return tuple(range(first, count if deepest else count - 1))


def arguments_of(scheme: str, backbone: Any) -> dict[str, Any]:
    """The arguments that ``ConvMixNet`` takes for a mixing scheme on a backbone.

    Args:
        scheme: A name that ``changes_of`` knows.
        backbone: A timm model.
    """
    changes = changes_of(scheme)
    info = read_feature_info(backbone.feature_info, name=type(backbone).__name__)
    taps = {key: changes.pop(key) for key in ("before", "deepest") if key in changes}
    stages = stages_of(len(info), **taps)
    out: int = backbone.num_features
    if "divisor" in changes:
        divisor = changes.pop("divisor")
        changes["rank"] = max(1, out // divisor) if divisor else 0
    mixer, settings = mixer_of(changes)
    if not scheme.startswith(CONTROL):
        return dict(stages=stages, mixer=mixer, mixer_args=settings)
    budget = mixer_parameters(mixer, {stage: info[stage]["num_chs"] for stage in stages}, out, settings)
    branch = BRANCHES[changes.get("base", DEFAULT_MIXER)]
    alone, settings = mixer_of(branch | changes | {"base": branch["base"]})
    deepest = {len(info) - 1: info[-1]["num_chs"]}
    rank = matching_rank(budget, lambda rank: mixer_parameters(alone, deepest, out, settings | {"rank": rank}))
    return dict(stages=tuple(deepest), mixer=alone, mixer_args=settings | {"rank": rank})


def mixer_of(changes: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """A mixer's name and settings: the released one where only the rank is changed, or its variant."""
    base = changes.get("base", DEFAULT_MIXER)
    if changes.keys() <= {"base", "rank"}:
        return base, {key: value for key, value in changes.items() if key == "rank"}
    return "variant", changes


def mixer_parameters(mixer: str, in_channels: Mapping[int, int], out_channels: int, settings: dict[str, Any]) -> int:
    """How many parameters a mixer has."""
    made = create_mixer(mixer, in_channels, out_channels, **settings, device="meta")
    return sum(parameter.numel() for parameter in made.parameters())


def matching_rank(budget: int, parameters: Callable[[int], int]) -> int:
    """The rank at which ``parameters``, linear in it, comes closest to ``budget``; at least 1."""
    one, two = parameters(1), parameters(2)
    return max(1, 1 + round((budget - one) / (two - one)))


def build(arch: str, scheme: str, *, num_classes: int, seed: int) -> nn.Module:
    """Build a scheme on a backbone.

    Args:
        arch: Of timm.
        scheme: One of ``PEERS``, or a name that ``changes_of`` knows.
        num_classes: Outputs.
        seed: Of the backbone and its classifier, which are the same for every scheme; what the scheme adds is drawn
            from a generator of its own.

    Returns:
        A model whose outputs ``total_loss`` takes; in evaluation mode they are logits.

    Raises:
        ValueError: There is no such scheme.
    """
    torch.manual_seed(seed)
    backbone = timm.create_model(arch, num_classes=num_classes)
    torch.manual_seed(seed + ADDED_SEED)
    if scheme in PEERS:
        return PEERS[scheme](backbone)
    return ConvMixNet(backbone, **arguments_of(scheme, backbone))


def describe(model: nn.Module) -> dict[str, Any]:
    """What rebuilds a mixing scheme's mixer: stages, mixer, mixer_args; empty for the others."""
    if not isinstance(model, ConvMixNet):
        return {}
    return {key: model._model_args[key] for key in ("stages", "mixer", "mixer_args")}

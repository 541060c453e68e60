import pytest
import torch
from torch.nn import functional as F

from timm_convmix.errors import MixerError
from timm_convmix.mixers import (
    DEFAULT_MIXER,
    MIXERS,
    AddAvgMaxConvMix,
    AddConvMix,
    AvgMaxConvMix,
    BlendConvMix,
    ConvMix,
    DualConvMix,
    LayerScaleConvMix,
    LinearConvMix,
    NoMixer,
    create_mixer,
    pool,
)

CHANNELS, OUT = {1: 8, 2: 16, 4: 24}, 40
LEARNED = ["add_avgmax", "add", "blend", "avgmax", "layerscale", "linear", "dual", "convmix"]


def maps(batch=2, dtype=torch.float32):
    taps = [torch.randn(batch, c, s, s + 1, dtype=dtype) for c, s in zip(CHANNELS.values(), (31, 15, 7), strict=True)]
    return taps, torch.randn(batch, OUT, 4, 3, dtype=dtype)


@pytest.mark.parametrize("rank", [0, 5])
def test_convmix_is_its_formula(rank):
    mixer = ConvMix(CHANNELS, OUT, rank=rank)
    torch.nn.init.normal_(mixer.gain)
    for norm in mixer.norms.values():
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.bias)
    taps, final = maps()
    rows = []
    for b in range(2):
        vector = torch.cat(
            [
                F.layer_norm(tap[b].flatten(1).mean(1), (tap.shape[1],)) * norm.weight + norm.bias
                for tap, norm in zip(taps, mixer.norms.values(), strict=True)
            ]
        )
        matrix = mixer.expand.weight @ mixer.reduce.weight if rank else mixer.expand.weight
        rows.append(final[b] + (mixer.gain * (matrix @ vector + mixer.expand.bias).clamp(min=0))[:, None, None])
    torch.testing.assert_close(mixer(taps, final), torch.stack(rows))


@pytest.mark.parametrize("rank", [0, 5])
def test_linear_is_two_matrices(rank):
    mixer = LinearConvMix(CHANNELS, OUT, rank=rank)
    taps, final = maps()
    mix = 0
    for branch, pooled in ((mixer.taps, taps), (mixer.final, [final])):
        torch.nn.init.normal_(branch.gain)
        for norm in branch.norms.values():
            torch.nn.init.normal_(norm.weight)
            torch.nn.init.normal_(norm.bias)
        vector = torch.cat([norm(x.mean((2, 3))) for norm, x in zip(branch.norms.values(), pooled, strict=True)], 1)
        matrix = branch.expand.weight @ branch.reduce.weight if rank else branch.expand.weight
        mix = mix + (vector @ matrix.T + branch.expand.bias) * branch.gain
    assert (mix < 0).any()
    torch.testing.assert_close(mixer(taps, final), final + mix[:, :, None, None])


def test_layerscale_is_linear_with_small_gains():
    taps, final = maps()
    mixes = []
    for kind in (LinearConvMix, LayerScaleConvMix):
        torch.manual_seed(1)
        mixes.append(kind(CHANNELS, OUT)(taps, final) - final)
    assert mixes[0].abs().min() > 0
    torch.testing.assert_close(mixes[1], 0.1 * mixes[0])


def test_avgmax_pools_the_taps_by_average_and_maximum():
    taps, final = maps()
    mixer, average = AvgMaxConvMix(CHANNELS, OUT), LayerScaleConvMix(CHANNELS, OUT)
    average.load_state_dict(mixer.state_dict())
    halved = [(tap.mean((2, 3), keepdim=True) + tap.flatten(2).max(2).values[:, :, None, None]) / 2 for tap in taps]
    torch.testing.assert_close(mixer(taps, final), average(halved, final))
    assert not torch.allclose(mixer(taps, final), average(taps, final))


@pytest.mark.parametrize("rank", [0, 5])
def test_add_avgmax_pools_the_taps_by_average_and_maximum(rank):
    mixer, maximum = AddAvgMaxConvMix(CHANNELS, OUT, rank=rank), AddConvMix(CHANNELS, OUT, rank=rank)
    maximum.load_state_dict({name.replace("_avgmax", ""): tensor for name, tensor in mixer.state_dict().items()})
    taps, final = maps()
    halved = [(tap.mean((2, 3), keepdim=True) + tap.flatten(2).max(2).values[:, :, None, None]) / 2 for tap in taps]
    torch.testing.assert_close(mixer(taps, final), maximum(halved, final))
    assert not torch.allclose(mixer(taps, final), maximum(taps, final))


@pytest.mark.parametrize("rank", [0, 5])
def test_add_and_blend_average_projected_stages(rank):
    mixer, blend = AddConvMix(CHANNELS, OUT, rank=rank), BlendConvMix(CHANNELS, OUT, rank=rank)
    for norm in mixer.norms.values():
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.bias)
    taps, final = maps()
    matrix = mixer.expand.weight @ mixer.reduce.weight if rank else mixer.expand.weight
    parts = []
    for tap, norm, columns in zip(taps, mixer.norms.values(), matrix.split([*CHANNELS.values()], 1), strict=True):
        pooled = tap.flatten(2).max(2).values
        parts.append((norm(pooled) @ columns.T)[:, :, None, None].expand_as(final))
    if rank == 0:
        torch.testing.assert_close(mixer(taps, final), final + torch.stack(parts).mean(0))
    assert blend.state_dict()["share"] == 1 / 4
    blend.load_state_dict(mixer.state_dict() | {"share": blend.share})
    torch.testing.assert_close(blend(taps, final), torch.stack([*parts, final]).mean(0))


def test_the_matrices_of_a_low_rank_cannot_grow_together():
    mixer, taps, final = AddConvMix(CHANNELS, OUT, rank=5), *maps()
    pooled = [norm(tap.amax((2, 3))) for norm, tap in zip(mixer.norms.values(), taps, strict=True)]
    reduced = mixer.reduce(torch.cat(pooled, dim=1))
    reduced = (reduced - reduced.mean(1, keepdim=True)) / reduced.std(1, correction=0, keepdim=True)
    expected = final + (mixer.expand(reduced) / 3)[:, :, None, None]
    torch.testing.assert_close(mixer(taps, final), expected, atol=1e-3, rtol=1e-3)
    mixer.reduce.weight.data *= 1000
    torch.testing.assert_close(mixer(taps, final), expected, atol=1e-3, rtol=1e-3)
    assert not AddConvMix(CHANNELS, OUT, rank=1)(taps, final).equal(final)


def test_every_stage_starts_with_the_same_weight():
    taps = {0: 32, 1: 128, 2: 512}
    for rank in (0, 64):
        mixer = AddConvMix(taps, 400, rank=rank)
        first = mixer.reduce if rank else mixer.expand
        for channels, columns in zip(taps.values(), first.weight.split([*taps.values()], 1), strict=True):
            assert columns.std().item() == pytest.approx(
                (3 * channels) ** -0.5, rel=0.05
            )  # as nn.Linear(channels, ...)


def test_the_rank_follows_from_the_parameters():
    assert AddConvMix({1: 64, 2: 128, 3: 256}, 512).settings == {"rank": 0}  # 229,376 in the full matrix
    wide = AddConvMix({1: 256, 2: 512, 3: 1024}, 2048)
    assert wide.settings == {"rank": 64}


def test_a_plain_final_map_can_be_scaled():
    taps, final = maps()
    assert create_mixer("none", CHANNELS, OUT)(taps, final) is final
    scaled = create_mixer("none", CHANNELS, OUT, share=0.25)
    assert torch.equal(scaled(taps, final), final / 4)
    assert scaled.settings == {"share": 0.25}


def test_dual_is_two_mixes_added():
    mixer = DualConvMix(CHANNELS, OUT, rank=3)
    taps, final = maps()
    zero = torch.zeros_like(final)
    assert list(mixer.final.norms) == ["-1"]
    torch.testing.assert_close(mixer(taps, final), final + mixer.taps(taps, zero) + mixer.final([final], zero))


@pytest.mark.parametrize("kind", [DualConvMix, LinearConvMix])
def test_ranks_of_two_branches_follow_from_the_channels(kind):
    for channels, out, ranks in (
        ({1: 64, 2: 128, 3: 256}, 512, (64, 64)),
        ({1: 256, 2: 512, 3: 1024}, 2048, (64, 16)),  # 64 * 512 // 2048
        ({1: 24, 2: 40, 3: 112}, 1280, (64, 25)),
        ({0: 8, 1: 16, 2: 32}, 64, (0, 0)),  # a pair would be larger than the matrix
    ):
        mixer = kind(channels, out)
        assert mixer.settings == {"rank": 64}
        assert (mixer.taps.settings["rank"], mixer.final.settings["rank"]) == ranks
    full = kind({1: 256}, 2048, rank=0)
    assert (full.taps.settings["rank"], full.final.settings["rank"]) == (0, 0)
    assert kind({1: 256}, 2048, rank=1).final.settings["rank"] == 1


def test_rank_follows_from_the_channels():
    assert ConvMix({1: 256, 2: 512, 3: 1024}, 2048).settings == {"rank": 256}
    assert ConvMix({0: 64, 1: 128, 2: 256}, 320).settings == {"rank": 64}
    assert ConvMix({0: 2, 1: 2}, 64).settings == {"rank": 0}  # a pair would be larger than the matrix


@pytest.mark.parametrize("name", MIXERS)
def test_a_mixer_can_start_as_the_identity(name):
    mixer = create_mixer(name, CHANNELS, OUT)
    taps, final = maps()
    mixer.start_as_identity()
    assert torch.equal(mixer(taps, final), final)


@pytest.mark.parametrize("name", LEARNED)
def test_everything_moves_within_two_steps_of_a_warm_start(name):
    mixer = create_mixer(name, CHANNELS, OUT)
    mixer.start_as_identity()
    before = {name: p.detach().clone() for name, p in mixer.named_parameters()}
    optimizer = torch.optim.AdamW(mixer.parameters(), lr=1e-3, weight_decay=0)
    for _ in range(2):
        taps, final = maps()
        optimizer.zero_grad()
        (mixer(taps, final) - torch.ones_like(final)).square().mean().backward()
        optimizer.step()
    assert not [name for name, p in mixer.named_parameters() if torch.equal(p, before[name])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_gradient_of_average_pooling_is_no_map(dtype):
    tap = (1000 * torch.rand(2, 3, 80, 90)).to(dtype)  # a sum of which float16 cannot hold
    expected = tap.float().mean((2, 3)).to(dtype)
    assert torch.equal(pool(tap), tap.mean((2, 3)))  # nothing to train: the plain operator, in exports too
    pooled = pool(tap.requires_grad_())
    torch.testing.assert_close(pooled, expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-3, atol=0)
    (gradient,) = torch.autograd.grad(pooled.sum(), tap)
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient, torch.full_like(tap, 1 / 7200))
    assert (gradient.stride()[2:] == (0, 0)) == (dtype != torch.float16)


@pytest.mark.parametrize("pooling", ["max", "avgmax"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_maximum_is_the_same_while_training(pooling, dtype):
    tap = torch.randn(2, 3, 9, 7).to(dtype)
    pooled = pool(tap.clone().requires_grad_(), pooling)
    assert pooled.dtype == dtype
    torch.testing.assert_close(pooled, pool(tap, pooling), rtol=1e-2, atol=1e-3)
    if pooling == "max":
        where = tap.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(pool(where, "max").sum(), where)
        highest = F.one_hot(tap.flatten(2).argmax(2), 63).view_as(tap)  # the first, where some are equal
        assert torch.equal(gradient, highest.to(dtype))


@pytest.mark.parametrize("name", LEARNED)
def test_a_single_image_trains(name):
    taps, final = maps(batch=1)
    mixer = create_mixer(name, CHANNELS, OUT).train()
    mixer(taps, final).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in mixer.parameters())


@pytest.mark.parametrize("name", LEARNED)
def test_autocast_keeps_the_dtype_of_the_map(name):
    taps, final = maps(dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert create_mixer(name, CHANNELS, OUT)(taps, final).dtype == torch.bfloat16


@pytest.mark.parametrize("name", LEARNED)
def test_settings_rebuild_the_mixer(name):
    mixer = create_mixer(name, CHANNELS, OUT)
    again = create_mixer(name, CHANNELS, OUT, **mixer.settings)
    again.load_state_dict(mixer.state_dict())
    taps, final = maps()
    assert torch.equal(again(taps, final), mixer(taps, final))
    assert isinstance(create_mixer("none", CHANNELS, OUT, device="meta"), NoMixer)


def test_a_checkpoint_of_the_default_fits_no_other_mixer():
    own = create_mixer(DEFAULT_MIXER, CHANNELS, OUT).state_dict()  # train.py records no mixer that was not named
    for name in MIXERS.keys() - {DEFAULT_MIXER}:
        with pytest.raises(RuntimeError, match=r"Error\(s\) in loading"):
            create_mixer(name, CHANNELS, OUT).load_state_dict(own)


def test_wrong_names_and_settings_are_refused():
    with pytest.raises(
        MixerError,
        match=r"Unknown mixer 'fpn'; choose one of 'add_avgmax', 'add', 'blend', 'avgmax', .*'convmix', 'none'",
    ):
        create_mixer("fpn", CHANNELS, OUT)
    with pytest.raises(MixerError, match=r"mixer 'convmix' does not take these settings: .*'width'"):
        create_mixer("convmix", CHANNELS, OUT, width=3)
    assert DEFAULT_MIXER in MIXERS
    with pytest.raises(MixerError, match=r"mixer 'none' does not take these settings: .*'rank'"):
        create_mixer("none", CHANNELS, OUT, rank=3)
    for name in LEARNED:
        for rank in (-1, "8", True):
            with pytest.raises(MixerError, match=rf"rank={rank!r} of mixer '{name}' must be an integer, 0"):
                create_mixer(name, CHANNELS, OUT, rank=rank)

"""The evidence harness: images, schemes, paired runs, corrupted images. Its report has a file of its own."""

import argparse
import io
import json
import math
import re
import shlex
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import safetensors
import timm
import torch
from PIL import Image
from sklearn.datasets import load_digits
from timm.optim import create_optimizer_v2
from torch import nn
from torch.nn import functional as F

from benchmarks import accuracy, cost, images, robustness, saliency, schemes, timing, tuning
from benchmarks.accuracy import Run
from benchmarks.images import Epoch, Images
from timm_convmix import MIXERS, ConvMixNet, MixerError
from timm_convmix.mixers import DEFAULT_MIXER, create_mixer


def coded(count, classes, size=8):
    """Images whose pixels are all their own number."""
    numbers = torch.arange(count)
    pixels = (numbers % 256).byte()[:, None, None, None].expand(-1, 3, size, size).contiguous()
    return Images(pixels, numbers % classes)


@pytest.fixture
def folder(tmp_path):
    """Two classes of noise, PNG, 4 + 3 images to train on and 2 + 2 to validate on."""
    for split, counts in dict(train=(4, 3), validation=(2, 2)).items():
        for label, count in enumerate(counts):
            directory = tmp_path / "data" / split / f"class{label}"
            directory.mkdir(parents=True)
            for index in range(count):
                noise = torch.randint(0, 256, (8, 8, 3), dtype=torch.uint8).numpy()
                Image.fromarray(noise).save(directory / f"{split}{index}.png")
    return tmp_path / "data"


# Images ---------------------------------------------------------------------------------------------------------------


def test_a_folder_is_read_once(folder, monkeypatch):
    first = images.load_split(folder, "train")
    assert first.pixels.shape == (7, 3, 8, 8)
    assert first.labels.tolist() == [0, 0, 0, 0, 1, 1, 1]
    with Image.open(folder / "train/class1/train0.png") as image:
        assert image.getpixel((5, 2)) == tuple(first.pixels[4, :, 2, 5].tolist())
    assert images.read_names(folder, "train")[4] == "class1/train0.png"

    monkeypatch.setattr(images, "decode", None)
    again = images.load_split(folder, "train")
    assert images.digest_of(again) == images.digest_of(first)


def test_a_changed_folder_and_a_damaged_cache_are_read_again(folder):
    before = images.load_split(folder, "train")
    cache = folder / "train.safetensors"
    data = bytearray(cache.read_bytes())
    data[-100] ^= 1  # in the pixels, the largest tensor and the last
    cache.write_bytes(data)
    assert images.digest_of(images.load_split(folder, "train")) == images.digest_of(before)
    (folder / "train/class1/train0.png").unlink()
    assert len(images.load_split(folder, "train")) == 6


def test_images_of_several_sizes_need_one(folder):
    Image.new("L", (5, 6), 100).save(folder / "train/class0/z.png")
    with pytest.raises(ValueError, match="images of 8x8 and of 5x6: give --size"):
        images.load_split(folder, "train")
    resized = images.load_split(folder, "train", 4)
    assert resized.pixels.shape == (8, 3, 4, 4)
    assert (resized.pixels[4] == 100).all()  # a grey one


def test_mean_and_deviation():
    pixels = torch.randint(0, 256, (5, 3, 7, 6), dtype=torch.uint8)
    mean, std = images.mean_and_std(pixels)
    values = pixels.double() / 255
    assert mean == pytest.approx(values.mean((0, 2, 3)).tolist(), abs=1e-4)
    assert std == pytest.approx(values.std((0, 2, 3), correction=0).tolist(), abs=1e-4)
    x = images.normalise(pixels, mean, std)
    assert x.mean((0, 2, 3)) == pytest.approx([0] * 3, abs=1e-3)
    assert x.std((0, 2, 3), correction=0) == pytest.approx([1] * 3, abs=1e-3)


def test_any_first_part_is_stratified_and_contained_in_a_larger_one():
    labels = torch.tensor([0] * 10 + [1] * 40 + [2] * 50)[torch.randperm(100)]
    order = images.stratified_order(labels, seed=1)
    assert order.sort().values.tolist() == list(range(100))
    for part in (10, 37, 50, 99):
        shares = labels[order[:part]].bincount(minlength=3) - torch.tensor([0.1, 0.4, 0.5]) * part
        assert shares.abs().max() <= 1
    assert order.tolist() != images.stratified_order(labels, seed=2).tolist()
    assert order.tolist() == images.stratified_order(labels, seed=1).tolist()


def test_the_hold_out_is_a_tenth_and_apart():
    train = coded(200, classes=4)
    rest, held = images.split_hold_out(train)
    numbers = [set(part.pixels[:, 0, 0, 0].tolist()) for part in (rest, held)]
    assert (len(rest), len(held)) == (180, 20)
    assert numbers[0] | numbers[1] == set(range(200))
    assert held.labels.bincount().tolist() == [5] * 4


@pytest.mark.parametrize(("select", "count", "scored"), [(False, 40, 12), (True, 36, 4)])
def test_selection_never_sees_a_test_image(select, count, scored, monkeypatch, tmp_path):
    sets = {"train": coded(80, classes=4), "validation": coded(24, classes=4)}
    sets["validation"].pixels.add_(100)  # numbers 100 to 123
    monkeypatch.setattr(accuracy, "load_split", lambda root, split, size: sets[split])
    options = ["--data", str(tmp_path), "--dataset-name", "coded", "--epochs", "1", "--classes", "2"]
    args = accuracy.build_parser().parse_args([*options, *["--select"] * select])
    data = accuracy.load_data(args)
    trained, tested = (set(part.pixels[:, 0, 0, 0].tolist()) for part in (data.train, data.scored))
    assert (len(trained), len(tested)) == (count, scored)
    assert not trained & tested
    assert (max(tested) < 100) == select
    assert data.settings["split"] == ("holdout" if select else "test")
    assert (data.settings["classes"], data.settings["images"], data.settings["fraction"]) == (2, count, 1.0)


def test_a_part_of_the_images(monkeypatch, tmp_path):
    monkeypatch.setattr(accuracy, "load_split", lambda root, split, size: coded(80, classes=4))
    options = ["--data", str(tmp_path), "--dataset-name", "coded", "--epochs", "1"]
    for amount in (["--images", "20"], ["--fraction", "0.25"]):
        data = accuracy.load_data(accuracy.build_parser().parse_args([*options, *amount]))
        assert data.train.labels.bincount().tolist() == [5] * 4
        assert (data.settings["images"], data.settings["fraction"]) == (20, 0.25)
    with pytest.raises(ValueError, match="There are 80 training images, and 81 were asked for"):
        accuracy.load_data(accuracy.build_parser().parse_args([*options, "--images", "81"]))


def test_augmentation_is_a_crop_and_a_mirror():
    pixels = torch.randint(0, 256, (6, 3, 5, 5), dtype=torch.uint8)
    plan = Epoch.draw(6, padding=2, generator=torch.Generator().manual_seed(3))
    assert plan.order.sort().values.tolist() == list(range(6))
    assert plan.flip.any()
    assert not plan.flip.all()
    augmented = images.crop_and_flip(pixels, plan.shift, plan.flip, padding=2)
    assert augmented.is_contiguous(memory_format=torch.channels_last)
    for image, (top, left), flip, found in zip(pixels, plan.shift.tolist(), plan.flip, augmented, strict=True):
        expected = F.pad(image, (2, 2, 2, 2))[:, top : top + 5, left : left + 5]
        assert torch.equal(found, expected.flip(2) if flip else expected)
    assert torch.equal(images.crop_and_flip(pixels, torch.zeros(6, 2).long(), plan.flip & False, padding=0), pixels)


def test_packed_lossless_images_come_back(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(images, "TILES", 3)
    packed, other = tmp_path / "packed", tmp_path / "other"
    images.pack(folder, packed, piece_bytes=1000)
    assert len(list(packed.glob("train-*.safetensors"))) > 1
    assert images.main(["unpack", str(packed), str(other)]) == 0
    assert "other pixels" not in capsys.readouterr().out
    for split in images.SPLITS:
        for size in (None, 4, 4):  # the last one from its cache
            there, here = (images.load_split(root, split, size) for root in (other, folder))
            assert images.digest_of(there) == images.digest_of(here)
        assert images.read_names(other, split) == images.read_names(folder, split)

    for path in folder.rglob("*.png"):
        Image.new("RGB", (8, 8)).save(path)
    images.pack(folder, tmp_path / "black")
    images.unpack(tmp_path / "black", other)  # into the same folder: what was resized there is of the images before
    assert images.load_split(other, "train", 4).pixels.max() == 0

    piece = packed / "train-01.safetensors"
    piece.write_bytes(piece.read_bytes()[:-1] + b"?")
    with pytest.raises(ValueError, match=r"train-01.safetensors is missing or not the piece that was packed"):
        images.unpack(packed, tmp_path / "third")
    with pytest.raises(SystemExit):
        images.main(["unpack", str(tmp_path / "nowhere"), str(other)])
    assert "pack.json" in capsys.readouterr().err


def test_jpeg_files_travel_as_they_are(folder, tmp_path):
    for path in list(folder.rglob("*.png")):
        with Image.open(path) as image:
            image.save(path.with_suffix(".jpeg"), quality=60)
        path.unlink()
    digests = images.pack(folder, tmp_path / "packed")
    assert images.unpack(tmp_path / "packed", tmp_path / "other") == digests
    with safetensors.safe_open(tmp_path / "packed/validation-00.safetensors", "pt") as file:
        data, ends = file.get_tensor("data").numpy().tobytes(), file.get_tensor("ends").tolist()
    assert data[ends[0] : ends[1]] == (folder / "validation/class0/validation1.jpeg").read_bytes()
    with Image.open(io.BytesIO(data[: ends[0]])) as image:
        assert image.size == (8, 8)


# Schemes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", [*schemes.ALL, "grid+full+norm_batch", "control-grid"])
def test_every_scheme_learns_and_answers_for_one_image(scheme):
    model = schemes.build("test_resnet", scheme, num_classes=7, seed=0)
    outputs = model.train()(torch.randn(4, 3, 64, 64))
    schemes.total_loss(outputs, torch.arange(4), F.cross_entropy).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    assert len(schemes.as_list(outputs)) == (4 if scheme == "supervised" else 1)
    logits = model.eval()(torch.randn(1, 3, 64, 64))
    assert logits.shape == (1, 7)
    assert logits.isfinite().all()


@pytest.mark.parametrize(
    "scheme", ["convmix", "grid+norm_batch", "norm_running+gem", "avgmax+norm_l2+avgmax_final", *schemes.PEERS]
)
def test_schemes_learn_in_half_precision(scheme):
    model = schemes.build("test_resnet", scheme, num_classes=7, seed=0).train()
    with accuracy.autocast("bfloat16", "cpu"):
        outputs = [logits.float() for logits in schemes.as_list(model(torch.randn(4, 3, 64, 64)))]
    schemes.total_loss(outputs, torch.arange(4), F.cross_entropy).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("scheme", schemes.ALL)
def test_schemes_of_a_seed_share_their_backbone_bit_for_bit(scheme):
    plain = schemes.build("test_resnet", "last", num_classes=7, seed=5).state_dict()
    other = schemes.build("test_resnet", scheme, num_classes=7, seed=5).state_dict()
    shared = {name.partition("backbone.")[2] or name: tensor for name, tensor in other.items()}
    missing = set() if scheme not in schemes.OWN_CLASSIFIERS - {"supervised"} else {"fc.weight", "fc.bias"}
    assert {name for name in plain if name not in shared} == missing
    assert all(torch.equal(plain[name], shared[name]) for name in plain.keys() - missing)


@pytest.mark.parametrize("name", list(schemes.BRANCHES))
def test_a_variant_by_default_is_its_mixer(name):
    in_channels, taps = {0: 8, 2: 12}, [torch.randn(3, 8, 6, 6), torch.randn(3, 12, 3, 3)]
    final = torch.randn(3, 16, 2, 2)
    mixers = []
    for settings in (dict(name=name), dict(name="variant", base=name)):
        torch.manual_seed(1)
        mixers.append(create_mixer(in_channels=in_channels, out_channels=16, **settings))
    assert torch.allclose(mixers[0](taps, final), mixers[1](taps, final), atol=1e-6)
    assert {f"like.{key}" for key in mixers[0].state_dict()} == mixers[1].state_dict().keys()
    rebuilt = create_mixer("variant", in_channels, 16, **mixers[1].settings)
    rebuilt.load_state_dict(mixers[1].state_dict())
    assert torch.equal(rebuilt(taps, final), mixers[1](taps, final))


@pytest.mark.parametrize(
    "arch",
    [
        "resnet18_cifar",
        "resnet50_cifar",
        "nano_cifar",
        "tiny_cifar",
        "mobilenetv3_small_100_cifar",
        "efficientnet_b0_cifar",
        "vgg16_bn_cifar",
        "densenet121_cifar",
        "convnext_atto_cifar",
        "resnet18",
    ],
)
def test_the_control_has_as_many_parameters(arch):
    with torch.device("meta"):
        backbone = timm.create_model(arch, num_classes=100)
        for scheme in ("convmix", "add", "blend", "avgmax", "avgmax+gelu", "single", "single+grid", "dual", "linear"):
            names = (scheme, "control" if scheme == "convmix" else f"control-{scheme}")
            models = [ConvMixNet(backbone, **schemes.arguments_of(name, backbone)) for name in names]
            counts = [sum(p.numel() for p in model.mixer.parameters()) for model in models]
            assert counts[1] == pytest.approx(counts[0], rel=0.05)
            assert models[1].stages == (len(backbone.feature_info) - 1,)


@pytest.mark.parametrize(
    ("scheme", "act", "gain", "maximum"),
    [
        ("control-avgmax", "Identity", 0.1, 0.5),
        ("control-layerscale", "Identity", 0.1, 0),
        ("control-linear", "Identity", 1, 0),
        ("control-dual", "ReLU", 1, 0),
        ("control-single", "ReLU", 1, 0),
    ],
)
def test_the_control_is_a_branch_of_its_mixer(scheme, act, gain, maximum):
    mixer = schemes.build("test_resnet", scheme, num_classes=7, seed=0).mixer
    (branch,) = mixer.branches() if isinstance(mixer, schemes.Variant) else [mixer]
    assert type(branch.act).__name__ == act
    assert torch.equal(branch.gain, torch.full_like(branch.gain, gain))
    (norm,) = branch.norms.values()
    tap, seen = torch.randn(2, *norm.normalized_shape, 3, 3), []
    norm.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(1)))
    mixer([tap], torch.randn(2, len(branch.gain), 3, 3))
    torch.testing.assert_close(seen[0], (1 - maximum) * tap.mean((2, 3)) + maximum * tap.amax((2, 3)))


@pytest.mark.parametrize(
    ("scheme", "between", "maximum"),
    [
        ("control", "Identity", 0.5),
        ("control-add", "Identity", 1),
        ("control-add+normed", "LayerNorm", 1),
        ("control-blend", "Identity", 1),
    ],
)
def test_the_control_of_a_mixer_without_gains_is_a_pair_of_matrices(scheme, between, maximum):
    mixer = schemes.build("test_resnet", scheme, num_classes=7, seed=0).mixer
    (branch,) = mixer.branches() if isinstance(mixer, schemes.Variant) else [mixer]
    assert branch.settings["rank"] > 0
    assert type(branch.between).__name__ == between
    (norm,) = branch.norms.values()
    tap, seen = torch.randn(2, *norm.normalized_shape, 3, 3), []
    norm.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(1)))
    mixer([tap], torch.randn(2, branch.expand.out_features, 3, 3))
    torch.testing.assert_close(seen[0], (1 - maximum) * tap.mean((2, 3)) + maximum * tap.amax((2, 3)))


def test_the_control_has_as_many_macs():
    x = torch.zeros(1, 3, 32, 32, device="meta")
    with torch.device("meta"):
        backbone = timm.create_model("resnet18_cifar", num_classes=100)
        counts = []
        for scheme in ("last", "convmix", "control"):
            model = backbone if scheme == "last" else ConvMixNet(backbone, **schemes.arguments_of(scheme, backbone))
            counts.append(cost.count_macs(model, x))
    plain, convmix, control = counts
    assert control - plain == pytest.approx(convmix - plain, rel=0.05)


def test_names_of_schemes():
    assert schemes.changes_of("convmix") == schemes.changes_of("control") == {}
    assert schemes.changes_of("dual+gelu") == dict(base="dual", act="gelu")
    assert schemes.changes_of("grid+full") == schemes.changes_of("control-grid+full") == dict(grid=True, divisor=0)
    for unknown in ("grd", "grid+", "control-", "controlgrd"):
        with pytest.raises(
            ValueError, match=rf"Unknown scheme '{re.escape(unknown)}': choose last, concat, .* changes of ConvMix"
        ):
            schemes.check_name(unknown)
    assert schemes.stages_of(5) == (1, 2, 3)
    assert schemes.stages_of(5, deepest=True) == (1, 2, 3, 4)
    assert schemes.stages_of(5, before=None) == (0, 1, 2, 3)
    assert schemes.stages_of(3, before=1) == (1,)
    assert {"variant", "scalar"} <= MIXERS.keys()
    for base, setting, value in (("add_avgmax", "gain", 1.0), ("blend", "gain", 1.0), ("avgmax", "share", 0.5)):
        with pytest.raises(MixerError, match=f"a variant of '{base}' has no {setting}"):
            create_mixer("variant", {0: 4}, 8, base=base, **{setting: value})
    with pytest.raises(MixerError, match="norm='bath' of a variant is none of batch, l2, layer"):
        create_mixer("variant", {0: 4}, 8, norm="bath")


def test_every_mixer_has_a_control():
    assert schemes.BRANCHES.keys() == MIXERS.keys() - {"none", "variant", "scalar"}


def test_a_bare_pair_is_one_matrix():
    mixer = create_mixer("variant", {0: 4}, 8, rank=3, bare=True)
    tap, final = torch.randn(2, 4, 4, 4), torch.randn(2, 8, 2, 2)
    matrix = mixer.like.expand.weight @ mixer.like.reduce.weight
    expected = final + (F.layer_norm((tap.mean((2, 3)) + tap.amax((2, 3))) / 2, (4,)) @ matrix.T)[:, :, None, None]
    torch.testing.assert_close(mixer([tap], final), expected)
    normed = create_mixer("variant", {0: 4}, 8, rank=3)
    normed.load_state_dict(mixer.state_dict())
    assert not torch.allclose(normed([tap], final), expected)


def test_the_mix_on_the_grid_averages_cells():
    mixer = create_mixer("variant", {0: 4}, 8, base="convmix", grid=True, norm="none", act="none", rank=0)
    tap, final = torch.randn(2, 4, 4, 4), torch.zeros(2, 8, 2, 2)
    expected = F.conv2d(F.avg_pool2d(tap, 2), mixer.like.expand.weight[:, :, None, None], mixer.like.expand.bias)
    assert torch.allclose(mixer([tap], final), expected, atol=1e-6)


@pytest.mark.parametrize("base", list(schemes.BRANCHES))
def test_a_variant_without_residual_is_the_mix_alone(base):
    mixer, alone = (create_mixer("variant", {0: 4}, 8, base=base, residual=residual) for residual in (True, False))
    alone.load_state_dict(mixer.state_dict())
    taps, final = [torch.randn(2, 4, 6, 6)], torch.randn(2, 8, 3, 3)
    share = 1 / 2 if base == "blend" else 1
    assert torch.allclose(alone(taps, final), mixer(taps, final) - share * final, atol=1e-6)
    with pytest.raises(MixerError, match="without residual cannot start as an identity"):
        alone.start_as_identity()


def test_a_share_scales_what_is_added_or_all_of_a_blend():
    taps, final = [torch.randn(2, 4, 6, 6), torch.randn(2, 6, 4, 4)], torch.randn(2, 8, 3, 3)
    for base in ("add_avgmax", "add", "blend"):
        released = create_mixer(base, {0: 4, 1: 6}, 8)
        own, twice = (create_mixer("variant", {0: 4, 1: 6}, 8, base=base, share=share) for share in (1, 2))
        for variant in (own, twice):
            weights = {f"like.{name}": tensor for name, tensor in released.state_dict().items() if name != "share"}
            variant.load_state_dict(variant.state_dict() | weights)
        expected = released(taps, final)
        torch.testing.assert_close(own(taps, final), expected)
        torch.testing.assert_close(twice(taps, final), 2 * expected - final if base != "blend" else 2 * expected)


@pytest.mark.parametrize("base", list(schemes.BRANCHES))
def test_a_gate_multiplies_the_final_map(base):
    mixer, added = (create_mixer("variant", {0: 4}, 8, base=base, gate=gate) for gate in (True, False))
    taps, final = [torch.randn(2, 4, 6, 6)], torch.randn(2, 8, 3, 3)
    added.load_state_dict(mixer.state_dict())
    share = 1 / 2 if base == "blend" else 1
    mix = added(taps, final) / share - final
    assert torch.allclose(mixer(taps, final), share * final * (1 + mix), atol=1e-5)
    mixer.start_as_identity()
    assert torch.equal(mixer(taps, final), final)


def test_an_activation_is_the_bases_own_unless_given():
    taps, final = [torch.randn(2, 4, 6, 6)], torch.zeros(2, 8, 3, 3)
    for base, act, negative in (("linear", None, True), ("convmix", None, False), ("linear", "relu", False)):
        assert bool((create_mixer("variant", {0: 4}, 8, base=base, act=act)(taps, final) < 0).any()) == negative


def test_pooling():
    x = torch.rand(2, 3, 4, 4)
    gem = schemes.GeM()
    nn.init.ones_(gem.p)
    assert torch.allclose(gem(x), x.mean((2, 3), keepdim=True))
    nn.init.constant_(gem.p, 200)
    assert torch.allclose(gem(x), x.amax((2, 3), keepdim=True), atol=0.05)
    assert torch.allclose(schemes.POOLS["avgmax"](x), (x.mean((2, 3)) + x.amax((2, 3)))[:, :, None, None] / 2)


def test_a_running_norm_takes_one_vector_and_ends_as_batch_norm():
    norm, batch_norm = schemes.RunningNorm(3), schemes.BatchNorm(3, momentum=None)  # None: plain means
    x = torch.randn(9, 32, 3) * torch.tensor([1.0, 5.0, 0.1]) + torch.tensor([0.0, 3.0, 7.0])
    assert norm(x[0, :1]).isfinite().all()
    norm = schemes.RunningNorm(3)
    for batch in x:
        norm(batch), batch_norm(batch)
    assert torch.allclose(norm.eval()(x[0]), batch_norm.eval()(x[0]), atol=0.05)
    assert torch.equal(schemes.RunningNorm(3).eval()(x[0]), x[0] * (1 + 1e-5) ** -0.5)  # untrained, as batch norm


def test_a_tap_is_dropped_while_training_only():
    mixer = create_mixer("variant", {0: 4, 1: 4}, 8, base="convmix", drop_tap=0.5, norm="none", act="none", rank=0)
    nn.init.ones_(mixer.like.expand.weight)
    nn.init.zeros_(mixer.like.expand.bias)
    taps, final = [torch.ones(64, 4, 2, 2), 10 * torch.ones(64, 4, 2, 2)], torch.zeros(64, 8, 1, 1)
    assert set(mixer.train()(taps, final).flatten().tolist()) == {0.0, 8.0, 80.0, 88.0}
    assert set(mixer.eval()(taps, final).flatten().tolist()) == {44.0}


def test_channels_are_dropped_while_training_only():
    mixer = create_mixer("variant", {0: 4}, 8, base="convmix", dropout=0.5, norm="none", act="none", rank=0)
    nn.init.ones_(mixer.like.expand.weight)
    nn.init.zeros_(mixer.like.expand.bias)
    taps, final = [torch.ones(64, 4, 2, 2)], torch.zeros(64, 8, 1, 1)
    assert set(mixer.train()(taps, final).flatten().tolist()) == {0.0, 2.0, 4.0, 6.0, 8.0}
    assert set(mixer.eval()(taps, final).flatten().tolist()) == {4.0}


@pytest.mark.parametrize(
    ("scheme", "decayed"), [("gelu", 1), ("no_decay", 0), ("single+no_decay", 0), ("convmix", 1), ("avgmax", 4)]
)
def test_what_no_decay_exempts(scheme, decayed):
    model = schemes.build("tiny_cifar", scheme, num_classes=10, seed=0)
    of_mixer = {id(parameter) for parameter in model.mixer.parameters()}
    groups = create_optimizer_v2(model, "sgd", lr=0.1, weight_decay=5e-4).param_groups
    found = [p for group in groups if group["weight_decay"] for p in group["params"]]
    assert sum(id(p) in of_mixer for p in found) == decayed
    assert len(found) > decayed


def test_mixers_start_as_identities():
    taps, final = [torch.randn(2, 4, 6, 6), torch.randn(2, 6, 3, 3)], torch.randn(2, 8, 3, 3)
    for name, settings in (
        ("scalar", {}),
        ("variant", dict(grid=True, norm="batch")),
        ("variant", dict(base="dual", pool="gem")),
    ):
        mixer = create_mixer(name, {0: 4, 1: 6}, 8, **settings)
        assert not torch.equal(mixer(taps, final), final)
        mixer.start_as_identity()
        assert torch.equal(mixer(taps, final), final)


def test_attention_by_hand():
    model = schemes.build("test_resnet", "attention", num_classes=3, seed=0).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        embedding, taps = model.read(x)
        parts = []
        for tap, projection, score in zip(taps, model.projections, model.scores, strict=True):
            for_each = []
            for image, g in zip(tap, embedding, strict=True):
                cells = [
                    projection.weight[:, :, 0, 0] @ image[:, i, j]
                    for i in range(tap.shape[2])
                    for j in range(tap.shape[3])
                ]
                weights = torch.stack([score.weight[0] @ (cell + g) for cell in cells]).softmax(0)
                for_each.append(sum(w * cell for w, cell in zip(weights, cells, strict=True)))
            parts.append(torch.stack(for_each))
        assert torch.allclose(model(x), model.classifier(torch.cat(parts, 1)), atol=1e-5)


def test_the_loss_of_side_classifiers():
    logits, sides = torch.randn(4, 5), [torch.randn(4, 5), torch.randn(4, 5)]
    labels = torch.arange(4)
    own, *others = (F.cross_entropy(outputs, labels) for outputs in (logits, *sides))
    assert torch.equal(schemes.total_loss(logits, labels, F.cross_entropy), own)
    assert torch.allclose(schemes.total_loss([logits, *sides], labels, F.cross_entropy), own + 0.3 * sum(others))


def test_cost_of_schemes(tmp_path, monkeypatch):
    monkeypatch.setattr(schemes, "ALL", ("last", "supervised", "grid"))
    options = ["--archs", "test_resnet", "--size", "64", "--batch", "2", "--seconds", "0", "--threads", "1"]
    assert cost.main(["schemes", *options, "--results", str(tmp_path)]) == 0
    rows = timing.read_rows(tmp_path / "cost.csv")
    assert {(row.part, row.other) for row in rows} == {
        ("schemes", "test_resnet:supervised"),
        ("schemes", "test_resnet:grid"),
    }
    assert {row.metric for row in rows} == {"training_ms", "inference_ms", "macs", "params", "saved_bytes"}
    assert "| test_resnet:grid, 3x64x64 |" in cost.render(rows, [])


# Scores ---------------------------------------------------------------------------------------------------------------


def test_scores_by_hand():
    probabilities = torch.tensor(
        [[0.9, 0.1, 0, 0, 0, 0], [0.52, 0.48, 0, 0, 0, 0], [0.54, 0.1, 0.09, 0.09, 0.09, 0.09]]
    )
    scores = accuracy.score_logits((probabilities + 1e-9).log(), torch.tensor([0, 1, 1]))
    assert (scores.correct, scores.count) == (1, 3)
    assert scores.top1 == pytest.approx(100 / 3)
    assert scores.top5 == 100
    assert scores.loss == pytest.approx(-(math.log(0.9) + math.log(0.48) + math.log(0.1)) / 3, abs=1e-6)
    # 0.52 lies in the bin from 7/15 to 8/15, 0.54 in the next
    assert scores.ece == pytest.approx(100 * (0.1 + 0.52 + 0.54) / 3, abs=1e-4)


# Runs -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """scikit-learn's scanned digits as 32x32 images, unpacked: 200 to train on, 60 to score on."""
    root = tmp_path_factory.mktemp("unpacked")
    raw = load_digits()
    grey = (torch.from_numpy(raw.images) * 255 / 16).byte().repeat_interleave(4, 1).repeat_interleave(4, 2)
    whole = Images(grey[:, None].expand(-1, 3, -1, -1).contiguous(), torch.from_numpy(raw.target).long())
    for split, part in (("train", slice(0, 200)), ("validation", slice(200, 260))):
        chosen = whole.take(torch.arange(len(whole))[part])
        images.write_cache(root / f"{split}.safetensors", chosen, [f"{label}/x" for label in chosen.labels], "")
    return root


@pytest.fixture
def command(data, tmp_path):
    """Run the accuracy command on a few digits; returns the rows."""

    def run(*options, schemes=("last", "convmix"), seeds="0", epochs="1"):
        words = ["--data", str(data), "--dataset-name", "digits", "--arch", "test_resnet", "--epochs", epochs]
        words += ["--schemes", *schemes, "--seeds", seeds, "--batch", "16", "--threads", "1"]
        words += [] if "--images" in options else ["--images", "32"]
        assert accuracy.main([*words, "--results", str(tmp_path), *options]) == 0
        return timing.read_rows_of(Run, tmp_path / "accuracy.csv")

    return run


def test_each_scheme_is_scored_at_the_rate_that_was_best_on_the_hold_out(data, tmp_path, monkeypatch, capsys):
    words = ["--data", str(data), "--dataset-name", "digits", "--arch", "test_resnet", "--epochs", "1", "--batch", "16"]
    words += ["--schemes", "last", "convmix", "--images", "32", "--threads", "1", "--results", str(tmp_path)]
    words += ["--rate-seeds", "0"]
    best = {"last": 0.2, "convmix": 0.05}  # one between those tried first, one beyond them

    def score(settings, *_, **__):
        far = abs(math.log2(settings.lr / best[settings.scheme]))
        return replace(template, **asdict(settings), top1=90 - far)

    assert accuracy.main([*words[:-2], "--seeds", "9"]) == 0
    (template, *_) = timing.read_rows_of(Run, tmp_path / "accuracy.csv")
    (tmp_path / "accuracy.csv").unlink()
    saved = []
    monkeypatch.setattr(accuracy, "run", lambda *given: saved.append((given[0].split, given[3].save)) or score(*given))
    assert tuning.main([*words, "--seeds", "3", "4", "--save", "models"]) == 0
    assert {*saved} == {("holdout", None), ("test", Path("models"))}
    assert "test_resnet: last 0.2, convmix 0.05" in capsys.readouterr().out
    rows = timing.read_rows_of(Run, tmp_path / "accuracy.csv")
    tried = {scheme: sorted(r.lr for r in rows if r.scheme == scheme and r.split == "holdout") for scheme in best}
    assert tried == {"last": [0.1, 0.2, 0.4], "convmix": [0.025, 0.05, 0.1, 0.2, 0.4]}
    tested = [(row.seed, row.scheme, row.lr) for row in rows if row.split == "test"]
    assert tested == [(seed, scheme, lr) for seed in (3, 4) for scheme, lr in best.items()]

    monkeypatch.setattr(accuracy, "run", None)  # nothing is left to run, whoever runs it
    assert tuning.main([*words, "--seeds", "3", "--processes", "2"]) == 0
    assert timing.read_rows_of(Run, tmp_path / "accuracy.csv") == rows
    monkeypatch.setattr(accuracy, "run", lambda settings, *_: replace(template, **asdict(settings)))  # all score alike
    for wrong, why in (
        (["--lr=0.3"], "leave out --lr"),
        (["--rates", "0.1"], "give two or more"),
        (["--seeds", "0..4"], "seeds that choose a rate prove nothing: 0 is among --rate-seeds and --seeds."),
        (["--epochs", "2"], "last: no rate of 0.00078125 to 0.4 is better than its neighbours; give other --rates."),
    ):
        with pytest.raises(SystemExit):
            tuning.main([*words, *wrong])
        assert why in capsys.readouterr().err
    with pytest.raises(SystemExit):
        tuning.main(["--data", "x"])
    assert "benchmarks.tuning: error: the following arguments are required:" in capsys.readouterr().err


def test_a_compiled_run_learns_what_an_eager_one_does(command, monkeypatch):
    compile_model = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, mode: compile_model(model, backend="aot_eager"))
    eager, compiled = command(schemes=["convmix"]), command("--compile", schemes=["convmix"])[1:]
    assert [row.mode for row in eager + compiled] == ["float32", "float32, compiled"]
    assert compiled[0].train_loss == pytest.approx(eager[0].train_loss, rel=1e-3)


def test_every_scheme_sees_the_same_images(command, monkeypatch):
    seen = {}

    def spy(pixels, shift, flip, *, padding):
        seen.setdefault(current[0], []).append(found := original(pixels, shift, flip, padding=padding))
        return found

    def build(arch, scheme, **kwargs):
        current[0] = (scheme, kwargs["seed"])
        return build_scheme(arch, scheme, **kwargs)

    current, original, build_scheme = [None], accuracy.crop_and_flip, schemes.build
    monkeypatch.setattr(accuracy, "crop_and_flip", spy)
    monkeypatch.setattr(schemes, "build", build)
    names = ("last", "drop_tap")  # drop_tap draws numbers of its own
    command(schemes=names, seeds="0..1", epochs="2")
    for seed in range(2):
        batches = [torch.cat(seen[name, seed]) for name in names]
        assert len(batches[0]) == 64
        assert torch.equal(*batches)
    assert not torch.equal(torch.cat(seen["last", 0]), torch.cat(seen["last", 1]))


def test_a_killed_command_goes_on_where_it_stopped(command, monkeypatch, tmp_path):
    train, calls = accuracy.train, []

    def stop_at_the_third(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return train(*args, **kwargs)

    monkeypatch.setattr(accuracy, "train", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        command(seeds="0..1")
    path = tmp_path / "accuracy.csv"
    kept = path.read_text()
    assert len(kept.splitlines()) == 1 + 2
    rows = command(seeds="0..1")
    assert path.read_text().startswith(kept)
    assert [(row.scheme, row.seed) for row in rows] == [("last", 0), ("convmix", 0), ("last", 1), ("convmix", 1)]
    assert len(path.read_text().splitlines()) == 1 + 4
    assert len(calls) == 3 + 2
    command(seeds="0..1")
    assert len(calls) == 5
    command("--lr", "0.05")  # another setting
    assert len(calls) == 7


def test_a_row_says_what_repeats_it(command, tmp_path, data):
    run = command("--smoothing", "0.1", schemes=["control"])[0]
    assert (run.arch, run.scheme, run.seed, run.split, run.size) == ("test_resnet", "control", 0, "test", 32)
    assert (run.classes, run.images, run.padding, run.smoothing, run.mode) == (10, 32, 4, 0.1, "float32")
    assert run.count == 60
    assert run.top1 == pytest.approx(100 * run.correct / 60)
    assert math.isfinite(run.train_loss)
    model = schemes.build("test_resnet", "control", num_classes=10, seed=0)
    assert run.params == sum(p.numel() for p in model.parameters())
    assert run.macs == cost.count_macs(model, torch.zeros(1, 3, 32, 32))
    assert json.loads(run.form) == json.loads(json.dumps(schemes.describe(model)))
    assert str(data) not in run.argv
    assert str(tmp_path) not in run.argv
    assert run.argv.startswith(f"python -m benchmarks.accuracy --data {data.name} --dataset-name digits")
    repeated = command("--smoothing", "0.1", "--results", str(tmp_path / "again"), schemes=["control"])
    again = timing.read_rows_of(Run, tmp_path / "again" / "accuracy.csv")[0]
    assert repeated == [run]
    assert (again.correct, again.train_loss, again.loss) == (run.correct, run.train_loss, run.loss)


def test_training_learns(command):
    (run,) = command("--images", "200", "--lr", "0.05", "--padding", "1", schemes=["convmix"], epochs="6")
    assert run.top1 > 30
    assert run.diverged == 0


def test_a_diverged_run_is_recorded(command):
    (run,) = command("--lr", "1e30", "--opt", "momentum", "--warmup", "0", schemes=["last"], epochs="3")
    assert run.diverged == 1
    assert not math.isfinite(run.train_loss)


def test_saved_models_come_back(command, tmp_path):
    rows = command("--save", str(tmp_path / "models"), schemes=["last", "convmix", "attention"])
    x = torch.randn(3, 3, 32, 32)
    for run in rows:
        path = tmp_path / "models" / f"test_resnet-{run.scheme}-0.safetensors"
        saved = accuracy.load_model(path)
        assert accuracy.key_of(saved.settings) == run.key
        assert saved.model(x).isfinite().all()
        if run.scheme != "attention":  # through timm's and the package's own doors
            if run.scheme == "last":
                model = timm.create_model("test_resnet", num_classes=10, checkpoint_path=str(path))
            else:
                overlay = dict(file=str(path))
                model = timm.create_model("convmix_test_resnet", pretrained=True, pretrained_cfg_overlay=overlay)
            assert torch.equal(model.eval()(x), saved.model(x))
    other = tmp_path / "other.safetensors"
    safetensors.torch.save_file({"x": x}, other)
    with pytest.raises(ValueError, match=r"other.safetensors does not say how it was trained"):
        accuracy.load_model(other)
    former = safetensors.torch.load_file(path.with_name("test_resnet-convmix-0.safetensors"))
    known = safetensors.safe_open(path.with_name("test_resnet-convmix-0.safetensors"), "pt").metadata()
    safetensors.torch.save_file(former, other, known | {"form": known["form"].replace(DEFAULT_MIXER, "layerscale")})
    model = schemes.build("test_resnet", "convmix", num_classes=10, seed=0)
    for use in (accuracy.load_model, lambda file: accuracy.start_from(model, file, num_classes=10, seed=0)):
        with pytest.raises(ValueError, match=r"other.safetensors was saved with .*'layerscale'.* train it again"):
            use(other)


def test_a_net_that_was_not_kept_is_trained_again_and_no_other_is_overwritten(command, tmp_path, capsys):
    (first,) = command(schemes=["last"])
    save = ["--save", str(tmp_path / "models")]
    (again,) = command(*save, schemes=["last"])
    file = tmp_path / "models" / "test_resnet-last-0.safetensors"
    assert (again.correct, again.train_loss) == (first.correct, first.train_loss)
    kept = file.read_bytes()
    with pytest.raises(SystemExit):
        command(*save, "--lr", "0.05", schemes=["last"])
    assert f"{file} is of another training (lr): give another --save." in capsys.readouterr().err
    assert file.read_bytes() == kept
    file.write_bytes(kept[:-9])
    with pytest.raises(SystemExit):
        command("--init", str(file), schemes=["convmix"])
    assert "get it again from its source." in capsys.readouterr().err


def test_transfer_and_warm_start(command, tmp_path):
    models = tmp_path / "models"
    command("--save", str(models))
    own = str(models / "{arch}-{scheme}-{seed}.safetensors")
    plain = str(models / "{arch}-last-{seed}.safetensors")
    rows = command("--init", own, "--classes", "5")
    assert [row.init for row in rows[2:]] == ["models/{arch}-{scheme}-{seed}.safetensors"] * 2
    assert rows[2].init_sha256 == accuracy.short_sha256(models / "test_resnet-last-0.safetensors")
    rows = command("--init", plain, "--classes", "5")
    assert [row.init for row in rows[4:]] == ["models/{arch}-last-{seed}.safetensors"] * 2
    x = torch.randn(2, 3, 32, 32)
    source = accuracy.load_model(models / "test_resnet-last-0.safetensors").model
    warm, again = (schemes.build("test_resnet", name, num_classes=5, seed=3).eval() for name in ("convmix", "last"))
    for model in (warm, again):
        accuracy.start_from(model, models / "test_resnet-last-0.safetensors", num_classes=5, seed=4)
    assert torch.equal(warm.forward_features(x), source.forward_features(x))
    assert torch.equal(warm(x), again(x))
    assert torch.equal(warm.get_classifier().weight, again.get_classifier().weight)


def test_a_linear_probe_changes_the_classifier_only(command, tmp_path):
    models = tmp_path / "models"
    command("--save", str(models))
    own = str(models / "{arch}-{scheme}-{seed}.safetensors")
    command("--init", own, "--freeze", "--classes", "5", "--save", str(tmp_path / "probes"))
    for scheme in ("last", "convmix"):
        before, after = (
            safetensors.torch.load_file(tmp_path / folder / f"test_resnet-{scheme}-0.safetensors")
            for folder in ("models", "probes")
        )
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert {name.rpartition("fc.")[2] for name in changed} == {"weight", "bias"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--schemes", "grd"], "Unknown scheme 'grd'"),
        (["--epochs", "0"], "--epochs 0 trains nothing"),
        (["--freeze"], "--freeze trains a classifier on features that were learned before: add --init"),
        (["--init", "x", "--schemes", "dag"], "--init cannot start dag, which has classifiers of its own"),
        (["--init", "none.safetensors"], "--init: there is no none.safetensors; train it first"),
        (["--data", "nowhere"], "nowhere: no images of the split 'train' as train/CLASS/* (there is no such folder)."),
        (["--arch", "resnet19"], "Unknown architecture 'resnet19': choose one of timm.list_models()."),
        (["--images", "9999"], "There are 200 training images, and 9999 were asked for"),
    ],
)
def test_a_command_that_cannot_run_says_why(options, message, data, capsys, tmp_path):
    base = ["--data", str(data), "--dataset-name", "digits", "--epochs", "1", "--results", str(tmp_path)]
    with pytest.raises(SystemExit):
        accuracy.main([*base, *options])
    assert message in capsys.readouterr().err


def test_seeds_of_selection_and_proof_are_apart():
    assert accuracy.seeds("3..5") == [3, 4, 5]
    assert accuracy.seeds("7") == [7]
    assert not set(accuracy.SELECTION_SEEDS) & set(accuracy.PROOF_SEEDS)
    assert len(accuracy.PROOF_SEEDS) >= 8


# Corrupted images -----------------------------------------------------------------------------------------------------


def test_corruptions():
    pixels = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    assert torch.equal(robustness.corrupt(pixels, "none", 0), pixels)
    for corruption in robustness.STRENGTHS:
        distances = []
        for severity in robustness.SEVERITIES:
            found = robustness.corrupt(pixels, corruption, severity)
            assert (found.shape, found.dtype) == (pixels.shape, torch.uint8)
            assert torch.equal(found, robustness.corrupt(pixels, corruption, severity))
            distances.append((found.float() - pixels.float()).square().mean())
        assert 0 < distances[0] < distances[1] < distances[2]
    flat = torch.full((2, 3, 64, 64), 128, dtype=torch.uint8)
    assert robustness.corrupt(flat, "noise", 5).float().std() == pytest.approx(0.1 * 255, rel=0.02)
    assert torch.equal(robustness.corrupt(flat, "blur", 5), flat)
    half = robustness.corrupt(torch.tensor([0, 200], dtype=torch.uint8).expand(1, 3, 2, 2), "contrast", 3)
    assert half[0, 0, 0].tolist() == [60, 140]  # 100 -+ 0.4 * 100


def test_robustness_rows(command, data, tmp_path):
    rows = command("--save", str(tmp_path / "models"))
    files = sorted(map(str, (tmp_path / "models").iterdir()))
    options = ["--data", str(data), "--results", str(tmp_path), "--threads", "1"]
    assert robustness.main([*files, *options]) == 0
    found = timing.read_rows_of(robustness.Robustness, tmp_path / "robustness.csv")
    assert len(found) == 2 * (1 + 4 * 3)
    clean = {row.scheme: row.correct for row in found if row.corruption == "none"}
    assert clean == {row.scheme: row.correct for row in rows}
    lines = (tmp_path / "robustness.csv").read_text()
    assert robustness.main([*files, *options]) == 0
    assert (tmp_path / "robustness.csv").read_text() == lines
    assert str(tmp_path) not in lines


def test_saliency_rows(command, data, tmp_path, capsys):
    command("--save", str(tmp_path / "models"), "--classes", "5")
    files = sorted(map(str, (tmp_path / "models").iterdir()))
    boxes = tmp_path / "boxes.txt"
    boxes.write_text("".join(f"x\t{label}\t8\t8\t23\t23\n" for label in range(5)))  # none of the other classes
    options = ["--data", str(data), "--boxes", str(boxes), "--results", str(tmp_path), "--threads", "1"]
    assert saliency.main([*files, *options, "--images", "20"]) == 0
    rows = timing.read_rows_of(saliency.Saliency, tmp_path / "saliency.csv")
    assert {(row.scheme, row.classes, row.count, row.chance) for row in rows} == {
        ("convmix", 5, 20, 0.25),
        ("last", 5, 20, 0.25),
    }
    lines = (tmp_path / "saliency.csv").read_text()
    assert saliency.main([*files, *options, "--images", "20"]) == 0
    assert (tmp_path / "saliency.csv").read_text() == lines
    assert str(tmp_path) not in lines
    command("--save", str(tmp_path / "others"), "--classes", "4")
    with pytest.raises(SystemExit):
        saliency.main([*files, *map(str, (tmp_path / "others").iterdir()), *options])
    assert "trained on several data sets, classes or sizes" in capsys.readouterr().err
    command("--save", str(tmp_path / "small"), "--classes", "5", "--size", "16")
    with pytest.raises(SystemExit):
        saliency.main([*map(str, (tmp_path / "small").iterdir()), *options])
    assert "images of 16 px, and the boxes are for the data's own 32 px: train without" in capsys.readouterr().err
    Path(files[0]).write_bytes(Path(files[0]).read_bytes()[:-9])
    for measure, more in ((saliency, options), (robustness, [*options[:2], *options[4:]])):
        with pytest.raises(SystemExit):
            measure.main([*files, *more])
        assert f"{Path(files[0]).name} cannot be read (" in capsys.readouterr().err


def test_the_commands_of_the_docs_are_accepted():
    text = (timing.ROOT / "docs" / "experiments.md").read_text().replace("\\\n", " ")
    for variable, value in {
        "$n": "10",
        "$S": "last control-layerscale layerscale",
        "$s": "128",
        "$lr": "0.2",
        "$d": "cifar10",
        "${d^^}": "CIFAR10",
    }.items():
        text = text.replace(variable, value)
    found = re.findall(r"(?:\b([RT])|benchmarks\.accuracy) (--data [^;\n`]*)", text)
    assert len(found) >= 15
    for letter, command in found:
        words = shlex.split(command)
        rest = tuning.build_parser().parse_known_args(words)[1] if letter == "T" else words
        assert letter != "T" or not {"--lr", "--select"} & {*rest}
        args = accuracy.build_parser().parse_args(rest)
        args.schemes = schemes.ALL if args.schemes == ["all"] else args.schemes
        accuracy.check_options(args)
        for arch in args.arch:
            assert timm.is_model(f"convmix_{arch}")


def test_options_are_what_a_row_records():
    recorded = set(accuracy.Settings.__dataclass_fields__)
    names = {action.dest for action in accuracy.build_parser()._actions}
    assert isinstance(accuracy.build_parser(), argparse.ArgumentParser)
    how = {"help", "data", "dataset_name", "schemes", "seeds", "select", "device", "dtype", "compile", "threads"}
    assert names - how - {"save", "results"} <= recorded

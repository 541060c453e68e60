"""Backbones for small images: what their stems keep, what their feature info says, and what they weigh.

Shapes are measured on the meta device; figures that others published are written out as the reference.
"""

import functools
import json
import re
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from timm.models import get_pretrained_cfg, model_entrypoint, save_for_hf, split_model_name_tag
from torch import nn

import timm_convmix
from timm_convmix import StageError, WeightsError
from timm_convmix.stems import BACKBONES, CIFAR_MEAN, CIFAR_STD, register_backbones
from timm_convmix.weights.manifest import read_manifest

ARCHS = list(BACKBONES)
LIGHT = [arch for arch in ARCHS if arch not in ("resnet34", "resnet50", "wide_resnet50_2")]  # others of the same kind
STRIDES = {  # what output_stride each family takes, an architecture or two of each; the stem's part of it is gone
    "resnet18": [8, 16],
    "wide_resnet50_2": [8],
    "vgg16_bn": [32],
    "mobilenetv2_100": [1, 2, 8, 16],
    "efficientnet_b0": [1, 16],
    "regnety_008": [16],
    "convnext_atto": [8, 16],
    "nano": [1, 2, 4],
    "tiny": [1, 4, 8],
}
WITHOUT_STRIDE = ["densenet121", "mobilenetv3_small_100"]


@functools.cache
def on_meta(name, **kwargs):
    return timm.create_model(name, device="meta", **kwargs).eval()


def zeros(size, channels=3):
    return torch.zeros(1, channels, size, size, device="meta")


@functools.cache
def measured(name, size, **kwargs):
    """What a model makes of an image: the input and output of its first convolution, the stages, the final map."""
    model, seen = on_meta(name, **kwargs), {}
    conv = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    with torch.no_grad(), conv.register_forward_hook(lambda module, args, out: seen.update(image=args[0], first=out)):
        final, stages = model.forward_intermediates(zeros(size))
        return SimpleNamespace(**seen, stages=stages, final=final, logits=model.forward_head(final))


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def logits(model, x):
    with torch.no_grad():
        return model.eval()(x)


@torch.no_grad()
def shaken(name, **kwargs):
    """A model whose norms, gains and biases are not as initialised."""
    model = timm.create_model(name, **kwargs).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.add_(torch.rand_like(parameter), alpha=0.1)
    return model


def test_the_architectures_are_those_of_the_plan():
    assert set(ARCHS) - {"nano", "tiny"} == {
        "resnet18",
        "resnet34",
        "resnet50",
        "wide_resnet50_2",
        "seresnet18",
        "densenet121",
        "vgg16_bn",
        "mobilenetv2_100",
        "mobilenetv3_small_100",
        "efficientnet_b0",
        "regnety_008",
        "convnext_atto",
    }
    for prefix in ("", "convmix_"):
        names = {name for name in timm.list_models(f"{prefix}*_cifar") if name.startswith("convmix_") == bool(prefix)}
        assert names == {f"{prefix}{arch}_cifar" for arch in ARCHS}


@pytest.mark.parametrize("arch", ARCHS)
def test_the_cfg_is_of_cifar(arch):
    cfg, mixed = get_pretrained_cfg(f"{arch}_cifar"), get_pretrained_cfg(f"convmix_{arch}_cifar")
    for each in (cfg, mixed):
        assert (each.input_size, each.num_classes, each.crop_pct) == ((3, 32, 32), 10, 1.0)
        assert (each.mean, each.std, each.pool_size) == (CIFAR_MEAN, CIFAR_STD, cfg.pool_size)
    assert not cfg.has_weights
    assert not cfg.tag
    assert not cfg.license


@pytest.mark.parametrize("arch", ARCHS)
def test_without_trained_weights_there_are_none(arch):
    name = f"convmix_{arch}_cifar"
    if any(split_model_name_tag(known)[0] == name for known in read_manifest()):
        assert get_pretrained_cfg(name).has_weights
        return
    assert not get_pretrained_cfg(name).has_weights
    with pytest.raises(WeightsError, match=rf"^timm has no pretrained weights for {arch}_cifar: use pretrained=False"):
        timm.create_model(name, pretrained=True, device="meta")


@pytest.mark.parametrize("arch", ARCHS)
def test_the_stem_keeps_the_resolution(arch):
    name = f"{arch}_cifar"
    conv = on_meta(name).get_submodule(get_pretrained_cfg(name).first_conv)
    assert conv is next(module for module in on_meta(name).modules() if isinstance(module, nn.Conv2d))
    assert (conv.kernel_size, conv.stride, conv.padding) == ((3, 3), (1, 1), (1, 1))
    found = measured(name, 32)
    assert found.image.shape == (1, 3, 32, 32)
    assert found.first.shape[-2:] == found.stages[0].shape[-2:] == (32, 32)


@pytest.mark.parametrize("arch", ARCHS)
def test_the_final_map_is_what_the_cfg_says(arch):
    cfg = get_pretrained_cfg(f"{arch}_cifar")
    assert min(cfg.pool_size) >= 4
    for name, size in [(f"{arch}_cifar", 32), (f"{arch}_cifar", 64), (f"convmix_{arch}_cifar", 32)]:
        found = measured(name, size)
        assert tuple(found.final.shape[-2:]) == tuple(cells * size // 32 for cells in cfg.pool_size)
        assert found.final.shape[1] == on_meta(name).num_features
        assert found.logits.shape == (1, 10)


def reductions(name, size, **kwargs):
    stages = measured(name, size, **kwargs).stages
    return [size / stage.shape[-1] for stage in stages], [stage.shape[1] for stage in stages]


def told(model):
    return [stage["reduction"] for stage in model.feature_info], [stage["num_chs"] for stage in model.feature_info]


@pytest.mark.parametrize("arch", ARCHS)
def test_the_feature_info_is_measured(arch):
    for name, size in [(f"{arch}_cifar", 32), (f"{arch}_cifar", 64), (f"convmix_{arch}_cifar", 32)]:
        assert told(on_meta(name)) == reductions(name, size)
        for stage in on_meta(name).feature_info:
            on_meta(name).get_submodule(stage["module"])
    expected = {"nano": [1, 2, 4], "tiny": [1, 2, 4, 8], "convnext_atto": [1, 2, 4, 8], "vgg16_bn": [1, 2, 4, 8, 8]}
    assert told(on_meta(f"{arch}_cifar"))[0] == expected.get(arch, [1, 1, 2, 4, 8])


@pytest.mark.parametrize(("arch", "stride"), [(arch, stride) for arch in STRIDES for stride in STRIDES[arch]])
def test_the_feature_info_is_measured_under_an_output_stride(arch, stride):
    model = on_meta(f"{arch}_cifar", output_stride=stride)
    assert told(model) == reductions(f"{arch}_cifar", 32, output_stride=stride)
    assert parameters(model) == parameters(on_meta(f"{arch}_cifar"))
    if arch not in ("nano", "tiny", "vgg16_bn"):
        assert told(model)[0][-1] == max(1, stride // 4), "the stem's factor of four is gone, the rest is as asked for"


@pytest.mark.parametrize("arch", WITHOUT_STRIDE)
def test_what_takes_no_output_stride_says_so(arch):
    with pytest.raises(TypeError, match="output_stride"):
        timm.create_model(f"{arch}_cifar", output_stride=8, device="meta")


# What they weigh ------------------------------------------------------------------------------------------------------

PUBLISHED = {  # with ten classes: kuangliu/pytorch-cifar; He et al. 2015 call ResNet-32 0.46 million
    "resnet18": 11_173_962,
    "resnet34": 21_282_122,
    "resnet50": 23_520_842,
    "vgg16_bn": 14_728_266,
}
TORCHVISION = {  # with 1000 classes, from torchvision's table of weights, and the features that the classifier reads
    "resnet18": (11_689_512, 512),
    "resnet34": (21_797_672, 512),
    "resnet50": (25_557_032, 2048),
    "wide_resnet50_2": (68_883_240, 2048),
    "densenet121": (7_978_856, 1024),
    "mobilenetv2_100": (3_504_872, 1280),
    "efficientnet_b0": (5_288_548, 1280),
}


@pytest.mark.parametrize("arch", PUBLISHED)
def test_parameters_are_those_that_others_published(arch):
    assert parameters(on_meta(f"{arch}_cifar")) == PUBLISHED[arch]


@pytest.mark.parametrize("arch", TORCHVISION)
def test_nothing_but_stem_and_classifier_differs_from_the_large_one(arch):
    large, features = TORCHVISION[arch]
    stem = 0 if arch in ("mobilenetv2_100", "efficientnet_b0") else 64 * 3 * (7 * 7 - 3 * 3)
    assert parameters(on_meta(f"{arch}_cifar")) == large - stem - 990 * (features + 1)


@pytest.mark.parametrize("arch", [arch for arch in ARCHS if arch not in ("nano", "tiny", "vgg16_bn")])
def test_the_large_ones_tensors_fit_besides_stem_and_classifier(arch):
    """So that weights of timm's can start a small one."""
    small, large = on_meta(f"{arch}_cifar").state_dict(), timm.create_model(arch, device="meta").state_dict()
    cfg = get_pretrained_cfg(arch)
    assert small.keys() == large.keys()
    other = {name.rpartition(".")[0] for name in small if small[name].shape != large[name].shape}
    assert cfg.classifier in other
    assert other <= {cfg.classifier, cfg.first_conv}


@pytest.mark.parametrize(("arch", "least", "most"), [("nano", 0.4e6, 0.5e6), ("tiny", 0.6e6, 0.75e6)])
def test_the_tiny_ones_are_tiny(arch, least, most):
    assert least < parameters(on_meta(f"{arch}_cifar")) < most
    assert least < parameters(on_meta(f"convmix_{arch}_cifar")) < most


def test_nano_is_resnet_32():
    """Six n + 2 layers: a stem, three stages of n = 5 blocks of two convolutions, a classifier."""
    model = on_meta("nano_cifar")
    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3)]
    assert len(convs) + 1 == 6 * 5 + 2
    assert [(conv.in_channels, conv.out_channels) for conv in convs[:2]] == [(3, 16), (16, 16)]
    assert sorted({conv.out_channels for conv in convs}) == [16, 32, 64]
    assert parameters(model) == sum(
        [
            3 * 16 * 9 + 2 * 16,
            10 * 16 * 16 * 9 + 10 * 2 * 16,
            16 * 32 * 9 + 9 * 32 * 32 * 9 + 10 * 2 * 32 + 16 * 32 + 2 * 32,
            32 * 64 * 9 + 9 * 64 * 64 * 9 + 10 * 2 * 64 + 32 * 64 + 2 * 64,
            64 * 10 + 10,
        ]
    )


def test_vgg_has_no_wide_layers():
    model = on_meta("vgg16_bn_cifar")
    assert [m.out_features for m in model.modules() if isinstance(m, nn.Linear)] == [10]
    assert max(max(p.shape) for p in model.parameters()) == 512
    assert sum(isinstance(m, nn.Conv2d) for m in model.modules()) == 13
    assert sum(isinstance(m, nn.MaxPool2d) for m in model.modules()) == 3
    assert (model.num_features, model.head_hidden_size) == (512, 512)
    assert model.forward_head(model.forward_features(zeros(32)), pre_logits=True).shape == (1, 512)


def test_a_wider_stem_is_initialised_as_timm_initialises_resnets():
    model = timm.create_model("resnet18_cifar")
    assert model.conv1.weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.05)
    assert not timm.create_model("convnext_atto_cifar").stem[0].bias.any()
    half = timm.create_model("resnet18_cifar", dtype=torch.float16)
    assert {p.dtype for p in half.parameters()} == {torch.float16}


# What they compute ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", LIGHT)
def test_mixer_none_is_the_plain_backbone(arch):
    plain = shaken(f"{arch}_cifar")
    model = timm.create_model(f"convmix_{arch}_cifar", mixer="none").eval()
    model.backbone.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(logits(model, x), logits(plain, x))
    assert parameters(model) == parameters(plain)


@pytest.mark.parametrize("arch", LIGHT)
def test_a_saved_folder_computes_the_same(arch, tmp_path):
    model = shaken(f"convmix_{arch}_cifar", num_classes=7, stages=(0, -2))
    save_for_hf(model, tmp_path, safe_serialization=True)
    assert json.loads((tmp_path / "config.json").read_text())["architecture"] == f"convmix_{arch}_cifar"
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    x = torch.randn(2, 3, 32, 32)
    expected = logits(model, x)
    assert torch.equal(logits(again, x), expected)
    assert expected.shape == (2, 7)
    assert not torch.equal(expected[0], expected[1])


def test_a_plain_one_is_saved_and_loaded_by_timm(tmp_path):
    model = shaken("nano_cifar", num_classes=3)
    save_for_hf(model, tmp_path, safe_serialization=True)
    x = torch.randn(2, 3, 32, 32)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert torch.equal(logits(again, x), logits(model, x))


@pytest.mark.parametrize("arch", ["nano", "tiny"])
def test_one_step_lowers_the_loss(arch):
    model = timm.create_model(f"convmix_{arch}_cifar")
    x, y = torch.randn(8, 3, 32, 32), torch.arange(8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        losses.append(nn.functional.cross_entropy(model(x), y))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("arch", ARCHS)
def test_timms_arguments(arch):
    for name in (f"{arch}_cifar", f"convmix_{arch}_cifar"):
        model = timm.create_model(name, num_classes=100, in_chans=1, device="meta").eval()
        assert {p.device.type for p in model.parameters()} == {"meta"}
        assert model.get_submodule(model.pretrained_cfg["first_conv"]).in_channels == 1
        final = torch.zeros(1, model.num_features, 4, 4, device="meta")
        assert model.forward_head(final).shape == (1, model.num_classes) == (1, 100)
        for num_classes in (5, 0):
            model.reset_classifier(num_classes)
            assert model.forward_head(final).shape == (1, num_classes or model.head_hidden_size)
            assert {p.device.type for p in model.parameters()} == {"meta"}
    assert model(zeros(32, channels=1)).shape == (1, model.head_hidden_size)


@pytest.mark.parametrize("arch", ARCHS)
def test_features_only(arch):
    for prefix, chosen in {"": None, "convmix_": (0, -1)}.items():
        kwargs = dict(out_indices=chosen) if chosen else {}
        features = timm.create_model(f"{prefix}{arch}_cifar", features_only=True, device="meta", **kwargs).eval()
        maps, stages = features(zeros(32)), measured(f"{prefix}{arch}_cifar", 32).stages
        assert [m.shape for m in maps] == [stages[index].shape for index in chosen or range(len(stages))]
        assert [m.shape[1] for m in maps] == features.feature_info.channels()
        assert [32 // m.shape[-1] for m in maps] == features.feature_info.reduction()
    with pytest.raises(StageError, match=rf"{arch}_cifar has stages 0 to {len(stages) - 1}"):
        timm.create_model(f"convmix_{arch}_cifar", features_only=True, out_indices=(9,), device="meta")


# One mechanism --------------------------------------------------------------------------------------------------------


def test_registering_again_does_no_harm():
    names = [f"{prefix}{arch}_cifar" for prefix in ("", "convmix_") for arch in ARCHS]
    before = {name: (model_entrypoint(name), get_pretrained_cfg(name)) for name in names}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        register_backbones()
        register_backbones()
    assert before == {name: (model_entrypoint(name), get_pretrained_cfg(name)) for name in names}
    assert timm.list_models(module="stems") == sorted_by_timm([f"{arch}_cifar" for arch in ARCHS])
    entry = model_entrypoint("nano_cifar")
    assert (entry.__name__, entry.__module__) == ("nano_cifar", "timm_convmix.stems")
    assert "small images" in entry.__doc__


def sorted_by_timm(names):
    return sorted(names, key=lambda name: [int(s) if s.isdigit() else s for s in re.split(r"(\d+)", name)])


def test_timms_own_architectures_are_left_alone():
    model = timm.create_model("resnet18", device="meta")
    assert (model.conv1.kernel_size, model.conv1.stride) == ((7, 7), (2, 2))
    assert [stage["reduction"] for stage in model.feature_info] == [2, 4, 8, 16, 32]
    again = timm.create_model("convmix_resnet18", device="meta")
    assert [stage["reduction"] for stage in again.feature_info] == [2, 4, 8, 16, 32]


def test_nothing_else_knows_of_them():
    package = Path(timm_convmix.__file__).parent
    for path in sorted(package.rglob("*.py")):
        named = re.findall(rf"\b(?:convmix_)?(?:{'|'.join(ARCHS)})_cifar\b", code_of(path))
        assert path.name == "stems.py" or not named, f"{path.relative_to(package)} names {named}"


def code_of(path):
    """Without examples in help texts and docstrings: names that a user may type are no knowledge of a module."""
    text = re.sub(r'"""(?:.|\n)*?"""', '""', path.read_text(encoding="utf-8"))
    return re.sub(r'"(?:[^"\\]|\\.)*timm-convmix (?:[^"\\]|\\.)*"', '""', text)

"""What a ConvMixNet adds to its backbone's contract; test_families.py holds the contract itself."""

import copy
import pickle

import pytest
import timm
import torch
from timm.data import resolve_model_data_config
from timm.models import get_model_args, get_model_input_config
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from timm.utils import freeze

from timm_convmix import ConvMixNet, InputError, StageError
from timm_convmix.mixers import DEFAULT_MIXER

VARIANT = "convmix_test_resnet"


def images(size=64):
    return torch.randn(2, 3, size, size)


def test_wrapping_ones_own_model():
    backbone = timm.create_model("test_convnext", num_classes=4, drop_rate=0.1)
    model = ConvMixNet(backbone, stages=(0, -2), warm_start=True)
    x = images()
    assert model.stages == (0, 2)
    assert torch.equal(model.eval()(x), backbone(x))
    assert model.pretrained_cfg["architecture"] == "convmix_test_convnext"
    assert resolve_model_data_config(model) == resolve_model_data_config(backbone)
    assert not ConvMixNet(backbone.eval()).mixer.training
    assert ConvMixNet(backbone.double()).mixer.expand.weight.dtype == torch.float64


def test_wrapping_what_is_no_timm_model():
    with pytest.raises(StageError, match=r"Linear has 0 stage\(s\) in its feature_info"):
        ConvMixNet(torch.nn.Linear(2, 2))


def test_wrapping_what_has_no_final_map():
    model = ConvMixNet(timm.create_model("test_vit"), warm_start=True)
    with pytest.raises(InputError, match=r"test_vit has no 2-D final map to mix into"):
        model(torch.randn(1, 3, 160, 160))


def test_taps_are_the_same_under_output_stride():
    dilated = timm.create_model("convmix_resnet18", output_stride=8, num_classes=3)
    usual = timm.create_model("convmix_resnet18", num_classes=3)
    assert dilated.stages == usual.stages == (1, 2, 3)
    dilated.load_state_dict(usual.state_dict())
    assert dilated.forward_features(images()).shape == (2, 512, 8, 8)
    assert [stage["reduction"] for stage in dilated.feature_info] == [2, 4, 8, 8, 8]


def test_the_head_stays_last_among_the_parameters():
    """timm's adaptive gradient clipping leaves out the last two."""
    assert [name for name, _ in timm.create_model(VARIANT).named_parameters()][-2:] == [
        "backbone.fc.weight",
        "backbone.fc.bias",
    ]


def test_forward_intermediates():
    model = timm.create_model(VARIANT).eval()
    torch.nn.init.normal_(model.mixer.expand.weight)
    x = images()
    mixed = model.forward_features(x)
    final, stages = model.forward_intermediates(x)
    assert torch.equal(final, mixed)
    assert torch.equal(stages[-1], mixed)
    assert [s.shape[1] for s in stages] == [info["num_chs"] for info in model.feature_info]
    _, raw = model.backbone.forward_intermediates(x)
    assert all(torch.equal(a, b) for a, b in zip(stages[:-1], raw[:-1], strict=True))
    assert not torch.equal(stages[-1], raw[-1])
    final, stages = model.forward_intermediates(x, indices=(0,))
    assert torch.equal(final, mixed)
    assert len(stages) == 1
    (last,) = model.forward_intermediates(x, indices=1, intermediates_only=True)
    assert torch.equal(last, mixed)
    with pytest.raises(InputError, match=r"output_fmt='NHWC': stages are returned as 'NCHW' only"):
        model.forward_intermediates(x, output_fmt="NHWC")
    with pytest.raises(StageError, match=r"out_indices=\(5,\): 5 out of range; test_resnet has stages 0 to 4"):
        model.forward_intermediates(x, indices=(5,))


def test_the_deepest_stage_may_be_tapped():
    model = timm.create_model(VARIANT, stages=(-1,)).eval()
    x = images()
    tap = model.backbone.forward_intermediates(x)[1][-1]
    assert torch.equal(model.forward_features(x), model.mixer([tap], tap))
    assert torch.equal(model.forward_intermediates(x, indices=1, intermediates_only=True)[0], model.forward_features(x))


def test_no_mixer_is_the_plain_backbone():
    plain = timm.create_model("test_resnet").eval()
    model = timm.create_model(VARIANT, mixer="none").eval()
    model.backbone.load_state_dict(plain.state_dict())
    x = images()
    assert torch.equal(model(x), plain(x))
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in plain.parameters())


def test_the_backbone_starts_the_same_with_every_mixer():
    weights = []
    for mixer in ("convmix", "none"):
        torch.manual_seed(3)
        weights.append(timm.create_model(VARIANT, mixer=mixer).backbone.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_frozen_backbone():
    model = timm.create_model(VARIANT)
    head = model.get_classifier()
    freeze(model.backbone)
    head.requires_grad_(True)
    statistics = [b.clone() for b in model.backbone.buffers()]
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {n for n, _ in model.named_parameters() if n.startswith("mixer.")} | {
        "backbone.fc.weight",
        "backbone.fc.bias",
    }
    model.train()(images()).sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(statistics, model.backbone.buffers(), strict=True))
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


def test_optimizers_see_the_mixer():
    model = timm.create_model(VARIANT)
    weight = model.mixer.norms["3_avgmax"].weight
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.1)
    (group,) = [g for g in optimizer.param_groups if any(p is weight for p in g["params"])]
    assert group["weight_decay"] == 0
    groups = param_groups_layer_decay(model, layer_decay=0.5, no_weight_decay_list=model.no_weight_decay())
    scales = {id(p): g["lr_scale"] for g in groups for p in g["params"]}
    assert scales[id(weight)] == scales[id(model.get_classifier().weight)] == 1
    assert scales[id(model.backbone.conv1[0].weight)] < 0.1


def test_no_weight_decay_is_prefixed():
    model = timm.create_model("convmix_swin_tiny_patch4_window7_224", depths=(1, 1, 1, 1), embed_dim=24, device="meta")
    expected = {f"backbone.{name}" for name in model.backbone.no_weight_decay()}
    assert model.no_weight_decay() == expected != set()
    assert timm.create_model(VARIANT, device="meta").no_weight_decay() == set()


def test_set_input_size():
    model = timm.create_model("convmix_swin_tiny_patch4_window7_224", depths=(1, 1, 1, 1), embed_dim=24, num_classes=2)
    model.set_input_size(img_size=(64, 96), window_size=4)
    assert model(torch.randn(1, 3, 64, 96)).shape == (1, 2)
    assert get_model_input_config(model)["input_size"] == (3, 64, 96)
    arguments = get_model_args(model)
    assert (arguments["img_size"], arguments["window_size"], arguments["mixer"]) == (
        (64, 96),
        ((4, 4),) * 4,
        DEFAULT_MIXER,
    )
    again = timm.create_model("convmix_swin_tiny_patch4_window7_224", **arguments)
    again.load_state_dict(model.state_dict())
    with pytest.raises(InputError, match=r"test_resnet takes any input size"):
        timm.create_model(VARIANT).set_input_size(64)


@pytest.mark.parametrize("name", [VARIANT, "convmix_test_mambaout"])
def test_copies(name):
    model = timm.create_model(name).eval()
    x = images()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301
        assert torch.equal(twin(x), model(x))
        assert twin.mixer.expand.weight is not model.mixer.expand.weight


def test_device_and_dtype():
    assert {p.device.type for p in timm.create_model(VARIANT, device="meta").parameters()} == {"meta"}
    assert {p.dtype for p in timm.create_model(VARIANT, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("name", [VARIANT, "convmix_test_mambaout", "convmix_test_convnext"])
def test_memory_formats_and_autocast(name):
    model = timm.create_model(name).eval()
    torch.nn.init.normal_(model.mixer.expand.weight)
    x = images()
    with torch.no_grad():
        wanted = model(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            plain, mixed = model.backbone.forward_features(x), model.forward_features(x)
            assert mixed.dtype == plain.dtype
            torch.testing.assert_close(model(x).float(), wanted, atol=0.1, rtol=0.1)
        model.to(memory_format=torch.channels_last)
        torch.testing.assert_close(model(x.contiguous(memory_format=torch.channels_last)), wanted, atol=1e-4, rtol=1e-4)


def test_non_square_images_of_any_size():
    model = timm.create_model(VARIANT, num_classes=3).eval()
    for size in [(33, 65), (160, 96), (224, 224)]:
        assert model(torch.randn(1, 3, *size)).shape == (1, 3)

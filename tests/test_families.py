"""The contract of a timm model, on the smallest architecture of every timm module that has variants."""

import pytest
import timm
import torch
from families import FAMILIES, smallest
from timm.models import group_parameters

families = pytest.mark.parametrize("family", FAMILIES)


def images(model, batch=2):
    """Small ones, where the architecture takes any size: what is compared does not depend on it."""
    config = model.pretrained_cfg
    channels, *size = config["input_size"]
    if not (config.get("fixed_input_size") or config.get("min_input_size")):
        size = [min(side, 128) for side in size]
    return torch.randn(batch, channels, *size)


@families
def test_warm_start_is_exact(family, save_plain):
    arch = smallest(family)
    plain, path = save_plain(arch)
    model = timm.create_model(f"convmix_{arch}", pretrained=True, pretrained_cfg_overlay=dict(file=str(path))).eval()
    x = images(plain, batch=1)
    with torch.no_grad():
        features = plain.forward_features(x)
        assert torch.equal(model.forward_features(x), features)
        assert torch.equal(model(x), plain(x))
        assert torch.equal(model.forward_head(features, pre_logits=True), plain.forward_head(features, pre_logits=True))


@families
def test_a_file_goes_under_another_head(family, save_plain):
    arch = smallest(family)
    plain, path = save_plain(arch, num_classes=5)
    x = images(plain, batch=1)
    for num_classes in (0, 3):
        model = timm.create_model(
            f"convmix_{arch}", pretrained=True, pretrained_cfg_overlay=dict(file=str(path)), num_classes=num_classes
        )
        with torch.no_grad():
            assert torch.equal(model.eval().forward_features(x), plain.forward_features(x))
        assert model.num_classes == num_classes


@families
def test_features_only(family):
    arch = smallest(family)
    with torch.device("meta"):
        plain = timm.create_model(arch, features_only=True)
    model = timm.create_model(f"convmix_{arch}", features_only=True)
    assert model.feature_info.out_indices == plain.feature_info.out_indices
    if len(plain.feature_info) - 1 not in plain.feature_info.out_indices:  # a few leave out the deepest by default
        model = timm.create_model(f"convmix_{arch}", features_only=True, out_indices=len(plain.feature_info))
    own, theirs = model.feature_info.info, plain.feature_info.info
    assert [s["reduction"] for s in own] == [s["reduction"] for s in theirs]
    assert [s["num_chs"] for s in own[:-1]] == [s["num_chs"] for s in theirs[:-1]]
    assert [s["module"] for s in own[:-1]] == ["backbone." + s["module"] for s in theirs[:-1]]
    mixed = model.model
    whole = timm.create_model(f"convmix_{arch}").eval()
    assert own[-1]["module"] == "mixer"
    assert own[-1]["num_chs"] == whole.num_features == model.feature_info.channels()[-1]

    x = images(model)
    maps = model(x)
    assert [m.shape[1] for m in maps] == model.feature_info.channels()
    mixed.load_state_dict(whole.state_dict(), strict=False)
    model.eval()
    with torch.no_grad():
        final, stages = whole.forward_intermediates(x)
        for got, index in zip(model(x), model.feature_info.out_indices, strict=True):
            assert torch.equal(got, stages[index])
        final = final.permute(0, 3, 1, 2) if whole.output_fmt == "NHWC" else final
        assert torch.equal(final, stages[-1])

    model.train()
    sum(m.sum() for m in model(x)).backward()
    idle = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not idle  # DistributedDataParallel works without find_unused_parameters


@families
def test_features_only_without_the_deepest_stage(family):
    arch = smallest(family)
    model = timm.create_model(f"convmix_{arch}", features_only=True, out_indices=(-2, 0))
    plain = timm.create_model(arch).eval()
    assert not [name for name, _ in model.named_parameters() if "mixer." in name.removeprefix("model.backbone.")[:6]]
    model.model.backbone.load_state_dict(plain.state_dict(), strict=False)
    model.eval()
    x = images(model, batch=1)
    with torch.no_grad():
        maps = model(x)
        wanted = plain.forward_intermediates(x, indices=[0, len(plain.feature_info) - 2], intermediates_only=True)
    assert [m.shape[1] for m in maps] == model.feature_info.channels()
    assert all(torch.equal(a, b) for a, b in zip(maps, wanted, strict=True))


def outcome(call):
    """What a call returns, or the kind of error it raises: a variant can do just what its backbone can."""
    try:
        return call()
    except (AssertionError, RuntimeError, ValueError) as error:
        return type(error)


@families
def test_one_image_trains(family):
    arch = smallest(family)

    def train(name):
        model = timm.create_model(name).train()
        model(images(model, batch=1)).sum().backward()
        return model

    model, plain = outcome(lambda: train(f"convmix_{arch}")), outcome(lambda: train(arch))
    if isinstance(plain, type):  # some backbones have batch norm on pooled vectors themselves
        assert model is plain
    else:
        assert all(p.grad is not None for p in model.mixer.parameters())


@families
def test_classifier(family):
    arch = smallest(family)

    def walk(name):
        model = timm.create_model(name, num_classes=7).eval()
        x = images(model, batch=1)
        yield model(x).shape, model.num_classes, model.head_hidden_size
        model.to(torch.float64)
        x = x.double()
        for arguments in ((5,), (3, "avg"), (0,), (0, "")):
            yield outcome(lambda arguments=arguments: model.reset_classifier(*arguments))
            yield outcome(lambda: model(x).shape), outcome(lambda: model(x).dtype)
            yield model.num_classes, model.head_hidden_size, any(module.training for module in model.modules())

    assert list(walk(f"convmix_{arch}")) == list(walk(arch))


@families
def test_layer_groups(family):
    model = timm.create_model(f"convmix_{smallest(family)}", device="meta")
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    top = max(groups.values())
    assert top > 0
    assert {groups[name] for name in groups if name.startswith("mixer.")} == {top}
    assert groups.keys() == dict(model.named_parameters()).keys()


@families
def test_gradient_checkpointing_changes_nothing(family):
    model = timm.create_model(f"convmix_{smallest(family)}").eval()
    x = images(model, batch=1)
    with torch.no_grad():
        plain = model(x)
    refused = outcome(model.set_grad_checkpointing)
    if refused is None:
        torch.testing.assert_close(model(x), plain)
    else:
        assert outcome(model.backbone.set_grad_checkpointing) is refused

"""Grad-CAM against finite differences and against captum; what a tap counts; what a model is said to be."""

import pytest
import timm
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from timm.models import get_pretrained_cfg
from torch.nn import functional as F

from timm_convmix import ConvMixNet, FeatureError, InputError, StageError, WeightsError
from timm_convmix.inspection import Classifier, baseline_of, cam, describe, weigh_taps
from timm_convmix.mixers import MIXERS, Mixer, NoMixer
from timm_convmix.prediction import default_model
from timm_convmix.saliency import grad_cam, tap_contributions, total_gradient

PHOTOGRAPHS = load_sample_images().filenames
FAMILIES = [
    ("test_resnet", (64, 96)),  # a plain CNN, with activations in place
    ("nano_cifar", (16, 24)),  # a ByobNet
    ("test_mambaout", (64, 96)),  # NHWC: the mixer gets copies
    ("ghostnet_050", (64, 96)),  # stages that are views, added to in place
    ("pvt_v2_b0", (64, 96)),  # stages made of tokens
    ("hrnet_w18_small", (32, 64)),  # stages of several maps; the tap is made by another module than is named
]
MAKERS = {"stage1": "incre_modules.0", "stage2": "incre_modules.1", "stage3": "incre_modules.2"}
"""Module in HRNet's feature info -> the one that makes the tap."""


def lively(name, **kwargs):
    """An untrained model whose norms and whose mixer's parameters are not as they were initialised."""
    torch.manual_seed(0)
    model = timm.create_model(name, **{"num_classes": 5} | kwargs).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.rand_like(parameter), alpha=0.3)
        if weights := model.get_classifier():
            weights.weight.mul_(30)
    return model


@pytest.fixture(scope="module")
def model():
    return lively("convmix_test_resnet")


@pytest.fixture
def images():
    return torch.randn(2, 3, 64, 64)


def nchw(output, like):
    """What a module gives, as maps like these."""
    if output.shape == like.shape:
        return output
    batch, channels, height, width = like.shape
    return output.reshape(batch, height, width, channels).permute(0, 3, 1, 2)


@torch.no_grad()
def score_of_shifted(net, x, stage, tap, shift):
    """The logit where the module that makes a stage gives it shifted."""

    def add(_module, _args, output):
        seen.append(nchw(output, tap))
        if output.shape != tap.shape:
            return output + shift.permute(0, 2, 3, 1).reshape(output.shape)
        return output + shift

    seen = []
    named = net.backbone.feature_info[stage]["module"]
    hook = net.backbone.get_submodule(MAKERS.get(named, named)).register_forward_hook(add)
    score = net(x)[0, 1]
    hook.remove()
    assert torch.equal(*seen, tap)
    return score


# Gradients ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arch", "size"), FAMILIES)
def test_a_gradient_is_what_a_shifted_stage_does_to_the_logit(arch, size):
    """Central differences in double precision; the stage is shifted where it is made, so on every path."""
    net = lively(f"convmix_{arch}").double()
    x = torch.randn(1, 3, *size, dtype=torch.double, requires_grad=True)
    seen = []
    hook = net.mixer.register_forward_pre_hook(lambda _, args: seen.extend([args[1], *args[0]]))
    score = net(x)[0, 1]
    hook.remove()
    final, *taps = seen
    for stage, tap in zip(net.stages, taps, strict=True):
        gradient = total_gradient(score, tap, final)
        assert gradient.shape == tap.shape
        highest = (tap == tap.amax((2, 3), keepdim=True)).sum((2, 3), keepdim=True)
        direction = torch.randn_like(tap) * (highest == 1)  # a maximum of several cells has no derivative
        scores = [score_of_shifted(net, x, stage, tap, step * direction) for step in (1e-7, -1e-7)]
        difference = (scores[0] - scores[1]) / 2e-7
        assert difference.abs() > 1e-6
        torch.testing.assert_close((gradient * direction).sum(), difference, rtol=1e-3, atol=1e-9)


def test_the_mixers_copy_alone_would_be_wrong():
    """Or the test above would not tell the two apart."""
    net = lively("convmix_test_mambaout")
    seen = []
    net.mixer.register_forward_pre_hook(lambda _, args: seen.extend([args[1], *args[0]]))
    score = net(torch.randn(1, 3, 64, 64))[0, 1]
    final, *taps = seen
    (of_the_copy,) = torch.autograd.grad(score, taps[0], retain_graph=True)
    assert F.cosine_similarity(of_the_copy.flatten(), total_gradient(score, taps[0], final).flatten(), dim=0) < 0.9


def test_a_tap_that_is_made_for_the_mixer_alone_is_refused(model, images, monkeypatch):
    inner = model.backbone.forward_intermediates

    def rectified(*args, **kwargs):  # as NASNet's
        final, maps = inner(*args, **kwargs)
        return final, [F.relu(m - 0.1) for m in maps]

    monkeypatch.setattr(model.backbone, "forward_intermediates", rectified)
    with pytest.raises(
        FeatureError, match="test_resnet: the deeper stages do not read what the mixer gets of backbone"
    ):
        grad_cam(model, images)


# Maps -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["convmix_test_resnet", "test_efficientnet"])
def test_maps_are_captums(arch, images):
    captum = pytest.importorskip("captum.attr")
    model = lively(arch)
    net = model if isinstance(model, ConvMixNet) else ConvMixNet(model, mixer="none")
    peaks = []
    for classes in ([1, 4], [0, 2], [3, 0], [2, 1]):
        found = grad_cam(model, images, classes)
        torch.testing.assert_close(found.logits, model(images).detach())
        modules = [net.feature_info[stage]["module"] for stage in [*net.stages, -1]]
        assert [stage.name for stage in found.maps] == modules
        for stage in found.maps:
            layer = captum.LayerGradCam(net, net.get_submodule(stage.name))
            wanted = layer.attribute(images, target=torch.tensor(classes), relu_attributions=True)
            assert stage.grid == wanted.shape[2:]
            assert stage.reduction == 64 // stage.grid[0]
            wanted = F.interpolate(wanted, (64, 64), mode="bilinear")[:, 0]
            peak = wanted.amax((1, 2), keepdim=True)
            peaks.append(peak.max())
            torch.testing.assert_close(stage.heat, wanted / peak.clamp(min=1e-9), atol=1e-5, rtol=1e-4)
    assert sum(peak > 0.01 for peak in peaks) > len(peaks) / 2  # most have evidence to compare


def test_an_image_has_no_part_in_the_maps_of_another(model, images):
    both = grad_cam(model, images, torch.tensor([3, 0]))
    for index, wanted in enumerate((3, 0)):
        alone = grad_cam(model, images[index : index + 1], wanted)
        for stage, single in zip(both.maps, alone.maps, strict=True):
            torch.testing.assert_close(stage.heat[index], single.heat[0], atol=1e-5, rtol=1e-4)


def test_the_class_is_the_predicted_one_unless_it_is_given(model, images):
    predicted = model(images).argmax(1)
    assert torch.equal(grad_cam(model, images).classes, predicted)
    assert grad_cam(model, images, 2).classes.tolist() == [2, 2]


def test_a_map_without_evidence_is_zero_everywhere(images):
    model = lively("convmix_test_resnet", mixer="dual")  # its mix is rectified, as the final map is
    with torch.no_grad():
        model.get_classifier().weight[0] = -1  # of such a map every cell counts against the class
    for stage in grad_cam(model, images, 0).maps[-1:]:
        assert torch.equal(stage.heat, torch.zeros(2, 64, 64))
    of_class = [grad_cam(model, images, each).maps for each in range(1, 5)]
    for stages in zip(*of_class, strict=True):
        heat = torch.stack([stage.heat for stage in stages])
        assert heat.shape == (4, 2, 64, 64)
        assert heat.min() >= 0
        assert {0.0, 1.0} >= set(heat.amax((2, 3)).flatten().tolist()) >= {1.0}  # some class has evidence


def test_neither_the_model_nor_the_images_are_changed(images):
    model = lively("convmix_test_resnet").train().requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        maps = grad_cam(model, images).maps
    assert not model.training
    assert not images.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for stage, again in zip(maps, grad_cam(model.requires_grad_(True), images).maps, strict=True):
        assert torch.equal(stage.heat, again.heat)
    with pytest.raises(InputError, match=r"takes a batch of shape \(B, 3, H, W\)"):
        grad_cam(model, images[:, :1])
    assert not model.mixer._forward_hooks
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_a_head_that_begins_in_place_changes_nothing(images, monkeypatch):
    model = lively("convmix_test_resnet")
    head = model.backbone.forward_head

    def behind(activation):
        monkeypatch.setattr(model.backbone, "forward_head", lambda x, **kwargs: head(activation(x), **kwargs))
        return grad_cam(model, images, 3).maps  # a class for which every map shows something

    for kept, overwritten in zip(behind(torch.tanh), behind(torch.tanh_), strict=True):
        assert torch.equal(kept.heat, overwritten.heat)
        assert kept.heat.amax() == 1


def test_a_plain_model_is_its_own_baseline(images):
    plain = lively("test_resnet")
    maps = grad_cam(plain, images, 1).maps
    twin = grad_cam(ConvMixNet(plain, warm_start=True), images, 1).maps
    for stage, same in zip(maps, twin, strict=True):
        assert (stage.name, stage.grid) == (same.name, same.grid)
        torch.testing.assert_close(stage.heat, same.heat)


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (5, r"classes=5 must lie in 0 to 4"),
        (-1, r"classes=-1 must lie in 0 to 4"),
        ([1, 2, 3], r"classes=\[1, 2, 3\] must be one integer, or 2, one an image"),
        (torch.tensor(0.5), r"must be one integer, or 2"),
    ],
)
def test_classes_that_are_none(model, images, classes, message):
    with pytest.raises(InputError, match=message):
        grad_cam(model, images, classes)


def test_models_without_maps(images):
    with pytest.raises(InputError, match="has no classifier, and evidence is for a class"):
        grad_cam(timm.create_model("convmix_test_resnet", num_classes=0), images)
    with pytest.raises(InputError, match="has no 2-D final map"):
        grad_cam(timm.create_model("test_vit"), torch.randn(1, 3, 160, 160))
    with pytest.raises(StageError, match=r"has 0 stage\(s\) in its feature_info"):
        grad_cam(torch.nn.Conv2d(3, 5, 1), images)


# Taps -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["test_resnet", "test_mambaout"])
def test_a_tap_counts_what_its_zeros_take(arch, images):
    model = lively(f"convmix_{arch}")
    with torch.no_grad():
        final, taps = model.backbone.forward_intermediates(images, indices=list(model.stages))
        logits = model(images)
        classes, logit, drops = tap_contributions(model, images)
        assert torch.equal(classes, logits.argmax(1))
        assert torch.equal(logit, logits.amax(1))
        assert drops.shape == (2, len(taps))
        for dropped in range(len(taps)):
            mixer = model.mixer
            vectors = [  # by the words of the docstring: the norm's bias
                norm.bias.expand(2, -1) if at == dropped else norm((tap.mean((2, 3)) + tap.amax((2, 3))) / 2)
                for at, (norm, tap) in enumerate(zip(mixer.norms.values(), taps, strict=True))
            ]
            mix = mixer.expand(mixer.reduce(torch.cat(vectors, dim=1)))
            mix = mix / len(taps)
            mixed = final + (mix[:, None, None] if arch == "test_mambaout" else mix[:, :, None, None])
            without = model.backbone.forward_head(mixed).gather(1, classes[:, None])[:, 0]
            torch.testing.assert_close(drops[:, dropped], logit - without, atol=1e-4, rtol=1e-4)
    assert drops.abs().min() > 1e-3


def test_taps_count_for_any_mixer_and_any_class(images, monkeypatch):
    class FirstTap(Mixer):
        def __init__(self, in_channels, out_channels, *, device=None, dtype=None):
            super().__init__()

        def forward(self, taps, final):
            return final + taps[0].mean((1, 2, 3), keepdim=True)

    monkeypatch.setitem(MIXERS, "first", FirstTap)
    model = lively("convmix_test_resnet", mixer="first")
    classes, _, drops = tap_contributions(model, images, 4)
    assert classes.tolist() == [4, 4]
    assert (drops[:, 0] != 0).all()
    assert torch.equal(drops[:, 1:], torch.zeros(2, len(model.stages) - 1))
    assert not model.mixer._forward_pre_hooks


def test_a_plain_backbone_has_no_taps(images):
    with pytest.raises(InputError, match=r"test_resnet is a plain backbone \(mixer='none'\): it has no taps"):
        tap_contributions(timm.create_model("convmix_test_resnet", mixer="none"), images)


# Image files ----------------------------------------------------------------------------------------------------------


def named(labels, **kwargs):
    """A model whose classes have names."""
    model = lively("convmix_test_resnet", num_classes=len(labels), **kwargs)
    model.pretrained_cfg = model.pretrained_cfg | dict(label_names=labels, input_size=(3, 64, 64))
    return model


@pytest.fixture
def pair():
    return named(["cat", "dog", "3"]), named(["cat", "dog", "3"], mixer="none")


def test_a_model_and_another_one_beside_it(pair):
    model, baseline = pair
    for class_name, wanted in ((None, None), ("dog", 1), ("2", 2), ("3", 2), (0, 0)):
        seen = list(cam(PHOTOGRAPHS, model=model, compare=baseline, class_name=class_name))
        assert [name for name, _ in seen] == PHOTOGRAPHS
        for name, cams in seen:
            with Image.open(name) as image:
                prepared = Classifier.load(model).prepare(image)
            found = grad_cam(model, prepared, wanted)
            index = int(found.classes)
            assert [each.label for each in cams] == [["cat", "dog", "3"][index]] * 2
            assert [each.mixes for each in cams] == [True, False]
            for each, net in zip(cams, pair, strict=True):
                assert each.probability == pytest.approx(net(prepared).softmax(1)[0, index].item(), abs=1e-5)
                assert (tuple(each.photo.shape), each.photo.dtype) == ((256, 256, 3), torch.uint8)
                for stage, same in zip(each.maps, grad_cam(net, prepared, index).maps, strict=True):
                    torch.testing.assert_close(stage.heat, same.heat[0])


def test_a_photograph_is_what_the_model_sees(pair):
    model = pair[0]
    model.pretrained_cfg = model.pretrained_cfg | dict(crop_pct=0.5, mean=(0, 0, 0), std=(1, 1, 1))
    with Image.open(PHOTOGRAPHS[0]) as image:
        classifier = Classifier.load(model)
        seen, photo = classifier.prepare(image), classifier.photo(image)
    shrunk = F.interpolate(photo.permute(2, 0, 1)[None] / 255, (64, 64), mode="area")
    assert (seen - shrunk).abs().mean() < 0.02


def test_a_model_of_one_channel_is_shown_in_colours():
    model = lively("convmix_test_resnet", in_chans=1)
    (_, (seen, off)), *_ = cam(PHOTOGRAPHS[0], model=model)
    side = model.pretrained_cfg["input_size"][-1]
    assert seen.photo.shape == (2 * side, 2 * side, 3)
    assert torch.equal(seen.photo, off.photo)
    with Image.open(PHOTOGRAPHS[0]) as image:
        grey = Classifier.load(model).prepare(image)
    assert grey.shape == (1, 1, side, side)
    assert torch.equal(seen.maps[-1].heat, grad_cam(model, grey).maps[-1].heat[0])


@pytest.mark.parametrize("mixer", ["add_avgmax", "add", "blend"])
def test_the_same_weights_with_the_mixer_off(pair, mixer):
    model, plain = named(["cat", "dog", "3"], mixer=mixer), pair[1]
    plain.backbone.load_state_dict(model.backbone.state_dict())
    if mixer == "blend":
        plain.mixer = NoMixer(share=model.mixer.share.item())  # the final map keeps its share of the mean
    off, other = (next(iter(cam(PHOTOGRAPHS[0], model=model, compare=each)))[1][1] for each in ("off", plain))
    assert (off.model, off.mixes) == ("ConvMixNet, mixer off (ablation)", False)
    assert off.probability == other.probability
    assert all(torch.equal(a.heat, b.heat) for a, b in zip(off.maps, other.maps, strict=True))
    (_, cams), *_ = cam(PHOTOGRAPHS[0], model=model)
    assert cams[1].model == off.model  # nobody keeps a baseline of it
    (_, cams), *_ = cam(PHOTOGRAPHS[0], model=plain)
    assert len(cams) == 1


def test_models_of_other_classes(pair):
    fewer = named(["dog", "cat"])
    (_, cams), *_ = cam(PHOTOGRAPHS[0], model=pair[0], compare=fewer, class_name="cat")
    assert [each.label for each in cams] == ["cat", "cat"]
    with pytest.raises(
        InputError, match=r"ConvMixNet has no class '3': give an index of 0 to 1, or a label such as 'dog'"
    ):
        list(cam(PHOTOGRAPHS[0], model=pair[0], compare=fewer, class_name="3"))
    with pytest.raises(InputError, match=r"no class 'at': give an index of 0 to 2, or a label such as 'cat'\."):
        list(cam(PHOTOGRAPHS[0], model=pair[0], class_name="at"))
    twice = named(["crane", "crane"])  # as two classes of ImageNet are called
    with torch.no_grad():
        twice.get_classifier().bias[1] = 1000
    (_, cams), *_ = cam(PHOTOGRAPHS[0], model=twice)
    assert [round(each.probability) for each in cams] == [1, 1]


def test_the_baseline_of_a_weight_is_the_manifests():
    if (name := default_model()) is None:
        pytest.skip("no trained model is embedded")
    arch = name.partition(".")[0]
    baseline = baseline_of(name)
    assert get_pretrained_cfg(baseline).architecture == arch
    assert baseline_of(None) == baseline_of(name.removeprefix("convmix_")) == baseline
    assert baseline_of(arch) == baseline  # whose weights these are by default
    assert baseline_of(baseline) is baseline_of("convmix_resnet18") is baseline_of("no_such_net") is None
    (_, cams), *_ = cam(PHOTOGRAPHS[0])
    assert [each.model for each in cams] == [name, baseline]
    assert [each.mixes for each in cams] == [True, False]


def test_weighed_taps_are_those_of_each_image_and_their_mean(pair):
    model = pair[0]
    rows = weigh_taps(PHOTOGRAPHS, model=model)
    taps = len(model.stages)
    assert [row["file"] for row in rows] == [name for name in [*PHOTOGRAPHS, None] for _ in range(taps)]
    assert [row["position"] for row in rows] == [*model.stages] * 3
    classifier = Classifier.load(model)
    for number, name in enumerate(PHOTOGRAPHS):
        with Image.open(name) as image:
            classes, logit, drops = tap_contributions(model, classifier.prepare(image))
        for row, drop in zip(rows[number * taps :], drops[0].tolist(), strict=False):
            wanted = (classifier.labels[int(classes)], float(logit), drop)
            assert (row["label"], row["logit"], row["logit_drop"]) == wanted
    for at, mean in enumerate(rows[-taps:]):
        assert mean["label"] is None
        for key in ("logit", "logit_drop"):
            assert mean[key] == pytest.approx((rows[at][key] + rows[at + taps][key]) / 2, abs=1e-5)


def test_nothing_to_look_at(pair, tmp_path):
    for look in (lambda **kwargs: list(cam([], **kwargs)), lambda **kwargs: weigh_taps([], **kwargs)):
        with pytest.raises(InputError, match="there is nothing to look at: name image files"):
            look(model=pair[0])
    with pytest.raises(InputError, match="holds no image file"):
        weigh_taps(tmp_path, model=pair[0])


# What is tapped -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arch", "size"), [("test_resnet", (64, 96)), ("test_mambaout", None)])
def test_a_description_is_what_the_model_does(arch, size):
    rows = describe(f"convmix_{arch}", size=size)
    model = timm.create_model(f"convmix_{arch}").eval()
    shape = (3, *(size or model.pretrained_cfg["input_size"][1:]))
    with torch.no_grad():
        maps = model.forward_intermediates(torch.zeros(1, *shape), intermediates_only=True)
    *stages, whole = rows
    assert [row["shape"] for row in stages] == ["x".join(map(str, m.shape[1:])) for m in maps]
    assert [row["channels"] for row in stages] == [m.shape[1] for m in maps]
    assert [row["position"] for row in stages if row["tapped"]] == list(model.stages)
    for key, own in (("module", "module"), ("reduction", "reduction")):
        assert [row[key] for row in stages] == [info[own] for info in model.feature_info]
    assert whole["shape"] == "x".join(map(str, shape))
    assert whole["params"] == sum(p.numel() for p in model.parameters())
    mixer, width = model.mixer, sum(maps[stage].shape[1] for stage in model.stages)
    assert stages[-1]["params"] == sum(p.numel() for p in mixer.parameters())
    assert mixer.settings["rank"] == 0
    assert stages[-1]["macs"] == width * model.num_features  # of one vector an image; norms are no matrix products
    for key in ("params", "macs"):
        assert stages[-1][f"{key}_share"] == pytest.approx(stages[-1][key] / whole[key])
        assert whole[f"{key}_share"] == 1
        assert {row[key] for row in stages[:-1]} == {None}
    assert describe(model, size=size) == rows


def test_a_description_needs_no_weights(monkeypatch):
    monkeypatch.setattr("timm_convmix.convmix.find_tensors", lambda *_: pytest.fail("weights were fetched"))
    assert describe("resnet18.a1_in1k")[-1]["shape"] == "3x224x224"
    with pytest.raises(WeightsError, match="no_such_net is no architecture"):
        describe("no_such_net")


def test_a_description_of_a_weight_is_of_the_model_as_it_was_trained():
    if (name := default_model()) is None:
        pytest.skip("no trained model is embedded")
    assert describe(name) == describe(timm.create_model(name, pretrained=True))
    *stages, _ = describe(baseline_of(name))
    assert not any(row["tapped"] for row in stages)
    assert (stages[-1]["params"], stages[-1]["macs"]) == (0, 0)


def test_a_backbone_of_fixed_size_is_told_another_one():
    rows = describe("swin_tiny_patch4_window7_224", size=(64, 128))
    assert [row["shape"] for row in rows] == ["96x16x32", "192x8x16", "384x4x8", "768x2x4", "3x64x128"]
    with pytest.raises(InputError, match="levit_conv_128s cannot take images of 64x64, it is made for 224x224"):
        describe("levit_conv_128s", size=(64, 64))

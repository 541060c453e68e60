import importlib
import json
import re
import subprocess
import sys
import warnings

import pytest
import timm
import torch
from families import FAMILIES
from safetensors.torch import load_file, save_file
from timm.models import get_arch_pretrained_cfgs, get_pretrained_cfg, model_entrypoint, save_for_hf

import timm_convmix
from timm_convmix import ConvMixNet, FeatureError, HubError, InputError, MixerError, StageError, WeightsError
from timm_convmix import convmix as registry
from timm_convmix.mixers import DEFAULT_MIXER
from timm_convmix.weights.manifest import manifest_path

ARCH = "test_resnet"
VARIANT = f"convmix_{ARCH}"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def images(size=64, channels=3):
    return torch.randn(2, channels, size, size)


def logits(model, x):
    with torch.no_grad():
        return model.eval()(x)


def from_file(path, name=VARIANT, overlay=(), **kwargs):
    return timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay=dict(file=str(path), **dict(overlay)), **kwargs
    )


def trained(name=VARIANT, **kwargs):
    """A ConvMix model that is neither at its initialisation nor at the identity."""
    model = timm.create_model(name, **kwargs)
    torch.nn.init.normal_(model.mixer.expand.weight)
    return model.eval()


# Names and cfgs ------------------------------------------------------------------------------------------------------


def test_every_architecture_with_a_final_map_is_registered():
    expected = [
        f"convmix_{arch}"
        for arch in timm.list_models(exclude_filters="convmix_*")
        if (cfg := get_pretrained_cfg(arch)) and cfg.pool_size
    ]
    assert timm.list_models("convmix_*") == timm.list_models(module="convmix") == expected
    assert len(expected) >= 880
    assert len(FAMILIES) >= 68
    assert timm.is_model("convmix_resnet50")
    assert timm.is_model("convmix_resnet50.a1_in1k")
    assert not timm.is_model("convmix_vit_base_patch16_224")


def test_tags_are_the_backbones_in_the_same_order():
    for arch in timm.list_models(["resnet*", "convnext_*", "swin_*", "mobilenetv3*"]):
        if timm.is_model(f"convmix_{arch}"):
            plain = get_arch_pretrained_cfgs(arch)
            assert list(get_arch_pretrained_cfgs(f"convmix_{arch}")) == [f"convmix_{name}" for name in plain]
    weights = set(timm.list_pretrained("convmix_*"))
    own = {name for name, record in registry.manifest.items() if record.embedded or record.state == "published"}
    assert {"convmix_tiny_cifar.cifar10", "convmix_tiny_cifar.cifar10_baseline"} <= own <= weights
    assert weights - own == {f"convmix_{name}" for name in timm.list_pretrained() if f"convmix_{name}" in weights}
    assert {"convmix_resnet50.a1_in1k", "convmix_convnext_tiny.in12k_ft_in1k"} <= weights


def test_cfg_is_derived_from_timms():
    plain, cfg = get_pretrained_cfg("resnet50.a1_in1k"), get_pretrained_cfg("convmix_resnet50.a1_in1k")
    changed = {key for key in vars(plain) if getattr(plain, key) != getattr(cfg, key)}
    assert changed == {"architecture", "first_conv", "classifier", "description"}
    assert (cfg.hf_hub_id, cfg.first_conv, cfg.classifier) == ("timm/resnet50.a1_in1k", "backbone.conv1", "backbone.fc")
    assert cfg.description == "timm's resnet50.a1_in1k as backbone; the mixer is untrained and starts as an identity."
    assert get_pretrained_cfg("convmix_resnet50").tag == plain.tag
    assert get_pretrained_cfg("convmix_mobileone_s0").first_conv == (
        "backbone.stem.conv_kxk.0.conv",
        "backbone.stem.conv_scale.conv",
    )
    assert get_pretrained_cfg("resnetv2_50x1_bit.goog_in21k").custom_load
    assert not get_pretrained_cfg("convmix_resnetv2_50x1_bit.goog_in21k").custom_load


def test_importing_again_warns_of_nothing_and_overwrites_nothing():
    before = {name: model_entrypoint(name) for name in ("resnet50", "convmix_resnet50")}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        importlib.reload(registry)
    assert before == {name: model_entrypoint(name) for name in before}


def test_star_import_brings_the_entrypoints():
    names = {}
    exec("from timm_convmix.convmix import *", names)  # noqa: S102
    assert names["convmix_resnet18"].__name__ == "convmix_resnet18"
    assert names["convmix_test_resnet"](num_classes=3).num_classes == 3


def test_importing_builds_nothing_and_reads_the_manifest_alone():
    code = """
import sys, timm, torch
opened = []
def audit(event, args):
    if event.startswith("socket.") or (event == "open" and not str(args[0]).endswith((".py", ".pyc"))):
        opened.append((event, args[0]))
torch.nn.Module.__init__ = None
sys.addaudithook(audit)
import timm_convmix
print(*{str(path) for event, path in opened if not "__pycache__" in str(path)})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(manifest_path())


# The load path -------------------------------------------------------------------------------------------------------


def test_a_tag_is_an_exact_warm_start_from_the_hub(tmp_path, hub_cache, save_plain):
    plain, path = save_plain(ARCH)
    hub_cache(f"timm/{ARCH}.r160_in1k", path)
    for name in (VARIANT, f"{VARIANT}.r160_in1k"):
        model = timm.create_model(name, pretrained=True, cache_dir=tmp_path / "cache")
        x = images()
        assert torch.equal(logits(model, x), logits(plain, x))
        assert model.pretrained_cfg["tag"] == "r160_in1k"
        assert model.mixer.expand.weight.count_nonzero() == 0
    model = timm.create_model(VARIANT, pretrained=True, num_classes=5, in_chans=1, cache_dir=tmp_path / "cache")
    assert logits(model, images(channels=1)).shape == (2, 5)
    assert torch.equal(model.backbone.layer4[0].conv1.weight, plain.layer4[0].conv1.weight)
    features = timm.create_model(VARIANT, pretrained=True, features_only=True, cache_dir=tmp_path / "cache")
    assert torch.equal(features.eval()(x)[-1], plain.forward_features(x))


def test_no_network(tmp_path):
    with pytest.raises(HubError) as error:
        timm.create_model(f"{VARIANT}.r160_in1k", pretrained=True, cache_dir=tmp_path)
    message = str(error.value)
    assert message.startswith(f"{VARIANT}.r160_in1k: could not get its weights from timm/{ARCH}.r160_in1k (")
    assert message.endswith(f"fetch them ahead (`hf download timm/{ARCH}.r160_in1k`), or pass pretrained=False.")
    assert "\n" not in message


def test_no_network_for_weights_that_are_on_no_hub(tmp_path):
    name = next(n for n in timm.list_pretrained("convmix_*") if not get_pretrained_cfg(n).hf_hub_id)
    with pytest.raises(HubError, match=r"from https://.* fetch them ahead and pass pretrained_cfg_overlay=dict\(file="):
        timm.create_model(name, pretrained=True, cache_dir=tmp_path)


def test_an_architecture_without_weights_says_so():
    arch = next(
        a for a in timm.list_models("resnet5*") if not any(c.has_weights for c in get_arch_pretrained_cfgs(a).values())
    )
    with pytest.raises(WeightsError, match=rf"timm has no pretrained weights for {arch}\S*: use pretrained=False"):
        timm.create_model(f"convmix_{arch}", pretrained=True)


def test_a_corrupt_cached_file_is_named(tmp_path, hub_cache, save_plain):
    _, path = save_plain(ARCH)
    target = hub_cache(f"timm/{ARCH}.r160_in1k", path)
    target.write_bytes(target.read_bytes()[:5000])
    with pytest.raises(WeightsError, match=rf"{VARIANT}.r160_in1k: .*timm/{ARCH}.r160_in1k.* not a sound safetensors"):
        timm.create_model(VARIANT, pretrained=True, cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("in_chans", [1, 3, 4])
@pytest.mark.parametrize("num_classes", [None, 0, 7, 1000])
def test_a_plain_file_is_a_warm_start(save_plain, num_classes, in_chans):
    _, path = save_plain(ARCH)
    model = from_file(path, num_classes=num_classes, in_chans=in_chans)
    wanted = timm.create_model(
        ARCH, pretrained=True, pretrained_cfg_overlay=dict(file=str(path)), num_classes=num_classes, in_chans=in_chans
    )
    x = images(channels=in_chans)
    assert torch.equal(model.forward_features(x), wanted.forward_features(x))
    assert model.num_classes == (1000 if num_classes is None else num_classes)
    assert torch.equal(logits(model, x), logits(wanted, x)) == (num_classes != 7)  # a fresh head is random


@pytest.mark.parametrize("overlay", [{}, {"num_classes": -1}])  # the second is what train.py --pretrained-path passes
@pytest.mark.parametrize("kwargs", [{}, {"num_classes": 10}, {"num_classes": 4}, {"num_classes": 10, "in_chans": 1}])
def test_a_convmix_file_loads_as_such(tmp_path, overlay, kwargs):
    source = trained(num_classes=10)
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    model = from_file(tmp_path / "model.safetensors", overlay=overlay, **kwargs)
    head = {"backbone.fc.weight", "backbone.fc.bias", "backbone.conv1.0.weight"}
    for name, tensor in source.state_dict().items():
        assert name in head or torch.equal(model.state_dict()[name], tensor), name
    keeps_head = not overlay and kwargs.get("num_classes", 10) == 10
    assert model.num_classes == kwargs.get("num_classes", 1000 if overlay else 10)
    assert torch.equal(model.get_classifier().weight, source.get_classifier().weight) == keeps_head
    assert "state_dict" not in model.pretrained_cfg


def test_a_file_knows_its_input_channels(tmp_path):
    source = trained(num_classes=3, in_chans=1)
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    same = from_file(tmp_path / "model.safetensors", in_chans=1)
    x = images(channels=1)
    assert torch.equal(logits(same, x), logits(source, x))
    colour = from_file(tmp_path / "model.safetensors")
    assert logits(colour, images()).shape == (2, 3)


def test_a_checkpoint_of_train_py_loads(tmp_path):
    source = trained(num_classes=10)
    torch.save({"state_dict": source.state_dict(), "epoch": 3, "arch": VARIANT}, tmp_path / "last.pth.tar")
    model = from_file(tmp_path / "last.pth.tar")
    x = images()
    assert torch.equal(logits(model, x), logits(source, x))


def test_a_foreign_checkpoint_passes_the_familys_filter(tmp_path):
    """The first ConvNeXt weights carry other names, which timm's filter knows."""
    plain = timm.create_model("test_convnext").eval()
    renames = {
        "stages.0.downsample": "downsample_layers.0",
        ".blocks.": ".",
        "conv_dw": "dwconv",
        "mlp.fc": "pwconv",
        "head.norm": "norm",
        "head.fc": "head",
    }
    state = {}
    for name, tensor in plain.state_dict().items():
        foreign = re.sub(r"stages\.(\d)\.downsample", r"downsample_layers.\1", name)
        for ours, theirs in renames.items():
            foreign = foreign.replace(ours, theirs)
        state[re.sub(r"^stem", "downsample_layers.0", foreign)] = tensor
    assert len(state.keys() & plain.state_dict().keys()) < len(state) / 2
    torch.save({"model": state}, tmp_path / "original.pth")
    x = images()
    model = from_file(tmp_path / "original.pth", "convmix_test_convnext")
    assert torch.equal(logits(model, x), logits(plain, x))


def test_a_convmix_file_fits_another_window(tmp_path):
    name, sizes = "convmix_swin_tiny_patch4_window7_224", dict(depths=(1, 1, 1, 1), embed_dim=24, num_classes=3)
    source = timm.create_model(name, **sizes)
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    model = from_file(tmp_path / "model.safetensors", name, img_size=96, window_size=3, **sizes)
    assert model(images(96)).shape == (2, 3)
    assert torch.equal(model.mixer.expand.weight, source.mixer.expand.weight)


def test_families_keep_their_filters_where_we_look():
    """One name of timm's that its public interface does not promise: a checkpoint's conversion beside its model."""
    families = ["convnext_atto", "swin_tiny_patch4_window7_224", "levit_conv_128s", "coatnet_0_rw_224", "nextvit_small"]
    lost = [arch for arch in families if registry.family_filter(arch) is None]
    assert not lost, f"timm no longer keeps checkpoint_filter_fn beside {lost}: foreign checkpoints would be refused"


@pytest.mark.parametrize("mixer", [DEFAULT_MIXER, "none"])
def test_local_dir_round_trip(tmp_path, mixer):
    source = timm.create_model(VARIANT, num_classes=6, mixer=mixer, stages=(-2, 0), drop_rate=0.1)
    if mixer != "none":
        torch.nn.init.normal_(source.mixer.expand.weight)
    save_for_hf(source, tmp_path, safe_serialization=True)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architecture"] == VARIANT
    assert (config["model_args"]["mixer"], config["model_args"]["stages"]) == (mixer, [0, 3])
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    x = images()
    assert torch.equal(logits(model, x), logits(source, x))
    assert model.stages == (0, 3)
    assert timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=2).num_classes == 2
    features = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, features_only=True).eval()
    assert torch.equal(features(x)[-1], source.forward_features(x))


@pytest.mark.parametrize("arch", [ARCH, "test_convnext"])  # one pools beside its head, the other inside
def test_a_changed_pooling_is_saved(tmp_path, arch):
    source = trained(f"convmix_{arch}", num_classes=6)
    source.reset_classifier(4, "max")
    save_for_hf(source, tmp_path, safe_serialization=True)
    x = images()
    assert torch.equal(logits(timm.create_model(f"local-dir:{tmp_path}", pretrained=True), x), logits(source, x))


def test_what_is_saved_is_resolved(tmp_path):
    save_for_hf(timm.create_model(VARIANT), tmp_path, safe_serialization=True)
    arguments = json.loads((tmp_path / "config.json").read_text())["model_args"]
    assert (arguments["mixer"], arguments["mixer_args"], arguments["stages"]) == (DEFAULT_MIXER, {"rank": 0}, [1, 2, 3])


def test_a_user_wrapped_model_is_saved_under_the_variants_name(tmp_path):
    source = ConvMixNet(timm.create_model(ARCH, num_classes=4), stages=(0, 1)).eval()
    save_for_hf(source, tmp_path, safe_serialization=True)
    x = images()
    assert torch.equal(logits(timm.create_model(f"local-dir:{tmp_path}", pretrained=True), x), logits(source, x))


def test_hf_hub_folder_loads_from_the_cache(tmp_path, hub_cache):
    source = trained(num_classes=6)
    save_for_hf(source, tmp_path / "folder", safe_serialization=True)
    target = hub_cache("someone/mine", tmp_path / "folder" / "model.safetensors")
    (target.parent / "config.json").write_bytes((tmp_path / "folder" / "config.json").read_bytes())
    x = images()
    model = timm.create_model(f"hf-hub:someone/mine@{COMMIT}", pretrained=True, cache_dir=tmp_path / "cache")
    assert torch.equal(logits(model, x), logits(source, x))
    model = timm.create_model(
        VARIANT, pretrained=True, pretrained_cfg_overlay=dict(hf_hub_id="someone/mine"), cache_dir=tmp_path / "cache"
    )
    assert torch.equal(logits(model, x), logits(source, x))


# What is refused -----------------------------------------------------------------------------------------------------


def test_a_folder_of_pickles_is_refused(tmp_path):
    save_for_hf(trained(), tmp_path)  # timm's default
    with pytest.raises(WeightsError, match=r"model\.safetensors: no such weight file; .* a pickle is not loaded"):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True)


@pytest.mark.parametrize("num_classes", [None, 10])
@pytest.mark.parametrize("other", ["test_convnext", "convmix_test_convnext", "test_resnet2"])
def test_another_architecture_is_refused(tmp_path, other, num_classes):
    model = timm.create_model("test_resnet") if other == "test_resnet2" else timm.create_model(other)
    state = model.state_dict()
    if other == "test_resnet2":
        state["layer1.0.conv1.weight"] = state["layer1.0.conv1.weight"][:5].clone()
    save_file(state, tmp_path / "wrong.safetensors")
    mixed = "convmix_" if other.startswith("convmix") else ""
    with pytest.raises(WeightsError, match=rf"wrong.safetensors is not a checkpoint of {mixed}test_resnet: \d+ "):
        from_file(tmp_path / "wrong.safetensors", num_classes=num_classes)


def test_another_mixer_or_other_stages_are_refused(tmp_path):
    save_file(trained().state_dict(), tmp_path / "model.safetensors")
    names = r"2 missing \(mixer\.norms\.0_avgmax\.bias.*2 unexpected \(mixer\.norms\.1_avgmax\.bias"
    with pytest.raises(WeightsError, match=names):
        from_file(tmp_path / "model.safetensors", stages=(0, 2, 3))  # stage 0 is as wide as stage 1
    with pytest.raises(WeightsError, match=r"unexpected \(mixer\."):
        from_file(tmp_path / "model.safetensors", mixer="none")


def test_another_stem_is_refused(tmp_path):
    state = trained().state_dict()
    state["backbone.conv1.0.weight"] = torch.zeros(24, 3, 1, 1)
    save_file(state, tmp_path / "stem.safetensors")
    with pytest.raises(WeightsError, match=r"1 of another shape \(backbone\.conv1\.0\.weight\)"):
        from_file(tmp_path / "stem.safetensors")


def test_a_file_without_head_needs_num_classes(tmp_path):
    state = {name: tensor for name, tensor in trained().state_dict().items() if "fc" not in name}
    save_file(state, tmp_path / "headless.safetensors")
    with pytest.raises(WeightsError, match=r"2 missing \(backbone\.fc\.bias, backbone\.fc\.weight\).*num_classes"):
        from_file(tmp_path / "headless.safetensors")
    assert from_file(tmp_path / "headless.safetensors", num_classes=0).num_classes == 0
    assert from_file(tmp_path / "headless.safetensors", num_classes=9).num_classes == 9


def test_counters_of_batch_norm_may_be_absent(tmp_path):
    source = trained(num_classes=3)
    state = {name: tensor for name, tensor in source.state_dict().items() if not name.endswith("num_batches_tracked")}
    save_file(state, tmp_path / "old.safetensors")
    x = images()
    assert torch.equal(logits(from_file(tmp_path / "old.safetensors"), x), logits(source, x))


@pytest.mark.parametrize("damage", ["truncated", "header", "empty", "absent", "text", "objects"])
def test_an_unreadable_file_is_named(tmp_path, damage):
    path = tmp_path / ("model.pth" if damage in {"text", "objects"} else "model.safetensors")
    if damage != "absent":
        save_file(trained().state_dict(), path)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-1000])
    elif damage == "header":
        path.write_bytes(b"\xff" * 100)
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "text":
        path.write_text("not a checkpoint")
    elif damage == "objects":
        torch.save({"state_dict": {"fc.weight": "no tensor"}}, path)
    with pytest.raises(WeightsError, match=r"model\.\w+.*(sound safetensors|no such|read as a|state dict)") as error:
        from_file(path)
    assert "\n" not in str(error.value)


def test_wrong_arguments_are_refused():
    with pytest.raises(StageError, match=r"stages=\(9,\): 9 out of range; test_resnet has stages 0 to 4"):
        timm.create_model(VARIANT, stages=(9,))
    with pytest.raises(MixerError, match=r"Unknown mixer 'fpn'"):
        timm.create_model(VARIANT, mixer="fpn")
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'colour'"):
        timm.create_model(VARIANT, colour="red")
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'drop_path_rate'"):
        timm.create_model("convmix_vgg11", drop_path_rate=0.1, device="meta")
    with pytest.raises(FeatureError, match=r"feature_cls.*'getter' only"):
        timm.create_model(VARIANT, features_only=True, feature_cls="fx")
    with pytest.raises(StageError, match=r"out_indices=\(7,\): 7 out of range; test_resnet has stages 0 to 4"):
        timm.create_model(VARIANT, features_only=True, out_indices=(7,))


def test_wrong_images_are_refused():
    model = timm.create_model(VARIANT)
    with pytest.raises(InputError, match=r"test_resnet takes .*\(B, 3, H, W\), got \(2, 1, 64, 64\); .*in_chans"):
        model(images(channels=1))
    with pytest.raises(InputError, match=r"got \(3, 64, 64\)"):
        model(images()[0])
    fixed = timm.create_model("convmix_swin_tiny_patch4_window7_224", depths=(1, 1, 1, 1), embed_dim=24)
    with pytest.raises(
        InputError, match=r"swin_tiny_patch4_window7_224 cannot take images of 64x64, it is made for 224x224"
    ):
        fixed(images())
    with pytest.raises(InputError, match=r"cannot take images of 8x8"):
        timm.create_model("convmix_inception_v4")(images(8))
    with pytest.raises(InputError, match=r"halonet26t cannot take images of 200x200, .* 256x256 \(AssertionError\)"):
        timm.create_model("convmix_halonet26t", device="meta")(images(200).to("meta"))
    pruned = timm.create_model(VARIANT, features_only=True, out_indices=(0, 1))
    with pytest.raises(InputError, match=r"got \(2, 4, 64, 64\)"):
        pruned(images(channels=4))
    with pytest.raises(RuntimeError, match=r"type") as error:  # small, but that is not what is wrong
        model(images(16).to(torch.uint8))
    assert not isinstance(error.value, InputError)


def test_every_error_is_a_convmix_error_and_a_builtin():
    for error, builtin in [
        (StageError, ValueError),
        (MixerError, ValueError),
        (InputError, ValueError),
        (FeatureError, ValueError),
        (WeightsError, RuntimeError),
        (HubError, OSError),
    ]:
        assert issubclass(error, timm_convmix.ConvMixError)
        assert issubclass(error, builtin)


def test_load_file_is_what_was_saved(tmp_path, save_plain):
    """`model.backbone` comes out as a plain timm checkpoint."""
    plain, path = save_plain(ARCH)
    model = from_file(path)
    save_file(model.backbone.state_dict(), tmp_path / "backbone.safetensors")
    again = timm.create_model(ARCH)
    again.load_state_dict(load_file(tmp_path / "backbone.safetensors"))
    x = images()
    assert torch.equal(logits(again, x), logits(plain, x))

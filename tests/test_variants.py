"""Every registered variant is built and run, on the meta device: shapes without arithmetic."""

import contextlib

import pytest
import timm
import torch
from families import FAMILIES

from timm_convmix.weights.loading import names_of


def check(name):
    """Return what is wrong with a variant, or nothing."""
    model = timm.create_model(name, device="meta").eval()
    config = model.pretrained_cfg
    x = torch.zeros(2, *config["input_size"], device="meta")
    final, stages = model.forward_intermediates(x)
    channels_first = final.permute(0, 3, 1, 2) if model.output_fmt == "NHWC" else final
    assert channels_first.shape[1] == model.num_features == model.feature_info[-1]["num_chs"]
    assert [tuple(stage.shape[:2]) for stage in stages] == [(2, info["num_chs"]) for info in model.feature_info]
    assert all(getattr(stage, "ndim", 0) == 4 for stage in stages)
    assert len(model.stages) == min(3, len(stages) - 1)
    with contextlib.suppress(NotImplementedError):  # timm's way to say that an encoder has no head
        assert model.forward_head(final).shape[1] == (model.num_classes or model.head_hidden_size)
    for key in ("first_conv", "classifier"):
        own, plain = names_of(config[key]), names_of(model.backbone.pretrained_cfg[key])
        assert own == [f"backbone.{name}" for name in plain]
    added = sum(p.numel() for p in model.mixer.parameters()) / sum(p.numel() for p in model.backbone.parameters())
    limit = 0.17 if name.startswith("convmix_test_") else 0.10  # of timm's own tests: smaller than any real net
    assert added <= limit, f"the mixer adds {added:.1%} parameters"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_variant_runs(family):
    archs = [arch for arch in timm.list_models(module=family) if timm.is_model(f"convmix_{arch}")]
    assert archs
    for arch in archs:
        try:
            check(f"convmix_{arch}")
        except Exception as error:
            raise AssertionError(f"convmix_{arch}") from error

"""Compilers, tracers and exporters take a variant as they take its backbone."""

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from timm.models import create_feature_extractor

from timm_convmix.exporting import ONNX_TORCH

NAMES = ["test_resnet", "test_convnext", "test_mambaout", "test_efficientnet"]  # the third computes in NHWC


@pytest.fixture(params=NAMES)
def model(request):
    model = timm.create_model(f"convmix_{request.param}", num_classes=10).eval()
    torch.nn.init.normal_(model.mixer.expand.weight)
    return model


def images(batch=2):
    return torch.randn(batch, 3, 96, 96)


def test_compile_in_one_graph(model):
    x = images()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
    model.train()
    compiled(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_inductor():
    torch.compiler.reset()  # what other tests compiled counts against a limit
    model = timm.create_model("convmix_test_resnet", num_classes=10).eval()
    x = images()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x), atol=1e-4, rtol=1e-4)


def test_export_with_a_dynamic_batch(model):
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (images(),), dynamic_shapes=({0: batch},))
    for size in (1, 5):
        x = images(size)
        torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.skipif(torch.__version__ < ONNX_TORCH, reason=f"ONNX needs torch {ONNX_TORCH}")
def test_onnx(model, tmp_path):
    path = tmp_path / "model.onnx"
    batch = torch.export.Dim("batch", min=1, max=64)
    torch.onnx.export(model, (images(),), path, dynamo=True, dynamic_shapes=({0: batch},), verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for size in (1, 3):
        x = images(size)
        (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        with torch.no_grad():
            np.testing.assert_allclose(got, model(x).numpy(), atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("arch", NAMES)
def test_fx_where_the_backbone_can(arch):
    model = timm.create_model(f"convmix_{arch}", num_classes=10).eval()
    x = images()
    try:
        torch.fx.symbolic_trace(model.backbone)
    except (torch.fx.proxy.TraceError, TypeError, ValueError, RuntimeError) as error:
        with pytest.raises(type(error)):
            torch.fx.symbolic_trace(model)
    else:
        assert torch.equal(torch.fx.symbolic_trace(model)(x), model(x))
    extractor = create_feature_extractor(timm.create_model("convmix_test_resnet").eval(), {"mixer": "mixed"})
    assert extractor(x)["mixed"].shape == (2, 96, 3, 3)

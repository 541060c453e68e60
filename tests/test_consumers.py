"""Libraries that say timm.create_model(name) work after the import; each runs where it is installed."""

import pytest
import timm
import torch
from sklearn.datasets import load_sample_images
from torch.nn import functional as F


@pytest.fixture(scope="module")
def photographs():
    """Two photographs, (2, 3, 64, 64) in 0 to 1."""
    images = torch.stack([torch.from_numpy(image.copy()) for image in load_sample_images().images])
    return F.interpolate(images.permute(0, 3, 1, 2) / 255, size=64, mode="bilinear")


@pytest.mark.parametrize("decoder", ["Unet", "FPN"])
def test_segmentation_models_pytorch(decoder, photographs):
    smp = pytest.importorskip("segmentation_models_pytorch")
    model = getattr(smp, decoder)("tu-convmix_resnet18", encoder_weights=None, classes=2)
    masks = (photographs.mean(1) > photographs.mean()).long()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        losses.append(F.cross_entropy(model(photographs), masks))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    gains = [p for name, p in model.named_parameters() if name.endswith("mixer.gain")]
    assert len(gains) == 1
    assert gains[0].grad.count_nonzero() > 0


def test_effdet_reads_the_feature_info():
    efficientdet = pytest.importorskip("effdet.efficientdet")
    features = timm.create_model("convmix_resnet18", features_only=True, out_indices=(2, 3, 4))
    info = efficientdet.get_feature_info(features)
    assert [(stage["num_chs"], stage["reduction"]) for stage in info] == [(128, 8), (256, 16), (512, 32)]

"""Offline before anything imports the Hub client; one thread a worker; the same seed for every test."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import functools
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_digits

import timm_convmix  # noqa: F401  (registers the variants)

torch.set_num_threads(1)

FAMILIES = sorted(
    module
    for module in timm.list_modules()
    if module != "convmix" and any(timm.is_model(f"convmix_{arch}") for arch in timm.list_models(module=module))
)


@functools.cache
def smallest(family):
    """The backbone of a timm module with the fewest parameters, among those that have a variant."""

    def size(arch):
        with torch.device("meta"):
            return sum(p.numel() for p in timm.create_model(arch).parameters())

    return min((arch for arch in timm.list_models(module=family) if timm.is_model(f"convmix_{arch}")), key=size)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def save_plain(tmp_path):
    """Build a plain timm model whose norms are no longer as initialised, and save it as a user has it on disk."""

    def save(arch, **kwargs) -> tuple[torch.nn.Module, Path]:
        model = timm.create_model(arch, **kwargs).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.rand_like(parameter), alpha=0.01)
        path = tmp_path / f"{arch}.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path)
        return model, path

    return save


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """scikit-learn's 1,797 scanned digits as an image folder for timm: train/CLASS/*.png and validation/CLASS/*.png."""
    root = tmp_path_factory.mktemp("digits")
    data = load_digits()
    for index, (pixels, label) in enumerate(zip(data.images, data.target, strict=True)):
        folder = root / ("validation" if index % 5 == 0 else "train") / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray((pixels * 255 / 16).astype("uint8")).convert("RGB")
        image.resize((32, 32)).save(folder / f"{index:04}.png")
    return root

"""Offline before anything imports the Hub client; one thread a worker; the same seed for every test."""

import os
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_CACHE"] = tempfile.mkdtemp(prefix="hub-cache-")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import importlib.util
import shutil
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser
from timm.utils import random_seed

import timm_convmix  # noqa: F401  (registers the variants)

torch.set_num_threads(1)

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def pytest_unconfigure():
    shutil.rmtree(os.environ["HF_HUB_CACHE"], ignore_errors=True)


@pytest.fixture(autouse=True)
def seed():
    random_seed(0)


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


@pytest.fixture
def hub_cache(tmp_path):
    """Put a weight file where a download from the Hub leaves it."""

    def fill(repo, weights, cache=tmp_path / "cache"):
        folder = Path(cache) / f"models--{repo.replace('/', '--')}"
        snapshot = folder / "snapshots" / COMMIT
        snapshot.mkdir(parents=True)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(COMMIT)
        return Path(shutil.copy(weights, snapshot / "model.safetensors"))

    return fill


@pytest.fixture
def readme_weights(hub_cache, save_plain):
    """Random weights in the Hub's cache for what the README loads: the whole way but the transfer and the accuracy."""
    _, weights = save_plain("resnet50")
    if not (Path(os.environ["HF_HUB_CACHE"]) / "models--timm--resnet50.a1_in1k").exists():
        hub_cache("timm/resnet50.a1_in1k", weights, os.environ["HF_HUB_CACHE"])


def know_what_is_missing(namespace):
    """For snippets that say `<!-- skip: next if(missing("fastai"), reason="...") -->`."""
    namespace["missing"] = lambda package: importlib.util.find_spec(package) is None
    namespace["torch_before"] = lambda version: torch.__version__ < version


pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser(), SkipParser()],
    patterns=["README.md", "docs/*.md"],
    fixtures=["readme_weights"],
    setup=know_what_is_missing,
).pytest()

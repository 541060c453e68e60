"""What a model and a data set measure: accuracy through timm's loader, a fixed probe, a checksum of the images."""

import platform
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]
from timm.data import create_dataset, create_loader
from torch import Tensor, nn

from timm_convmix.errors import PackingError
from timm_convmix.weights.manifest import Metrics, Probe


def probe_input(input_size: Sequence[int]) -> Tensor:
    """A fixed input that any machine computes alike: sin((k + 1)^2 / 1000) over the flat index k, (1, C, H, W)."""
    index = torch.arange(1, 1 + input_size[0] * input_size[1] * input_size[2], dtype=torch.float64)
    return (index.square() / 1000).sin().reshape(1, *input_size).float()


@torch.no_grad()
def probe(model: Any, input_size: Sequence[int]) -> Probe:
    """The five largest logits of ``probe_input``, and a tolerance of a thousandth of the largest magnitude."""
    logits = model.eval()(probe_input(input_size).to(next(model.parameters()).device))[0].float().cpu()
    top = logits.topk(min(5, len(logits)))
    return Probe(
        classes=tuple(top.indices.tolist()),
        logits=tuple(round(value, 5) for value in top.values.tolist()),
        tolerance=round(max(1e-3, 1e-3 * float(logits.abs().max())), 5),
    )


@torch.no_grad()
def evaluate(
    model: Any, dataset: Any, config: dict[str, Any], *, batch_size: int = 256, workers: int = 0, quiet: bool = False
) -> Metrics:
    """Measure a classifier through timm's own loader.

    Args:
        model: A timm model.
        dataset: Of ``timm.data.create_dataset``.
        config: Of ``timm.data.resolve_data_config``.
        batch_size: Images a step.
        workers: Processes that read images.
        quiet: Show no progress bar.

    Returns:
        top1 and top5 in percent, the mean cross-entropy in nats, and how many images there were.

    Raises:
        PackingError: There is no image.
    """
    device = next(model.parameters()).device
    loader = create_loader(
        dataset,
        input_size=config["input_size"],
        batch_size=batch_size,
        interpolation=config["interpolation"],
        mean=config["mean"],
        std=config["std"],
        crop_pct=config["crop_pct"],
        crop_mode=config["crop_mode"],
        num_workers=workers,
        use_prefetcher=False,
        persistent_workers=False,
    )
    model.eval()
    top1 = top5 = count = 0
    loss = 0.0
    for images, labels in tqdm(loader, desc="evaluate", unit="batch", disable=quiet or None):
        logits = model(images.to(device)).float().cpu()
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
        top1 += int(best[:, 0].sum())
        top5 += int(best.sum())
        count += len(labels)
        loss += float(nn.functional.cross_entropy(logits, labels, reduction="sum"))
    if not count:
        raise PackingError("There is no image to evaluate on.")
    return Metrics(top1=100 * top1 / count, top5=100 * top5 / count, loss=loss / count, count=count)


def open_dataset(data_dir: str | Path, split: str, *, channels: int = 3) -> Any:
    """Timm's dataset over ``DATA/SPLIT/CLASS/*``.

    Args:
        data_dir: Holds the split.
        split: The folder's name, or a word that timm takes for the same ('val' for 'validation').
        channels: Of the images; as in train.py, other than three are read as grey.

    Raises:
        PackingError: There are no images.
    """
    try:
        if not Path(data_dir).is_dir():
            raise FileNotFoundError("there is no such folder")
        dataset = create_dataset("", root=str(data_dir), split=split, input_img_mode="RGB" if channels == 3 else "L")
        if Path(dataset.reader.root) == Path(data_dir):  # timm takes everything there is where there is no such split
            raise FileNotFoundError(f"there is no folder {Path(data_dir) / split}")
        return dataset
    except (OSError, RuntimeError, AssertionError) as error:
        raise PackingError(f"{data_dir}: no images of the split {split!r} as {split}/CLASS/* ({error}).") from error


def dataset_checksum(dataset: Any) -> str:
    """sha256 over the sorted lines ``CLASS/FILE sha256-of-the-file`` of a dataset's images."""
    names = ["/".join(Path(name).parts[-2:]) for name in dataset.filenames(absolute=True)]
    digests = [sha256(Path(name).read_bytes()).hexdigest() for name in dataset.filenames(absolute=True)]
    lines = sorted(f"{name} {digest}\n" for name, digest in zip(names, digests, strict=True))
    return sha256("".join(lines).encode()).hexdigest()


def hardware() -> str:
    """The accelerator's name, or the processor's."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")  # of Linux; elsewhere Python knows
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"CPU {models[0] if models else platform.processor() or platform.machine()}"

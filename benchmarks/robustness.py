"""What saved models score on corrupted test images: rows of benchmarks/results/robustness.csv.

    python -m benchmarks.robustness --data DIR MODELS/*.safetensors

MODELS are what ``python -m benchmarks.accuracy --save`` kept. Corruptions are four of Hendrycks & Dietterich 2019
(arXiv:1903.12261) at their severities 1, 3 and 5 for 32x32 images, made here. A row that exists is not measured again.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from huggingface_hub.utils.tqdm import tqdm
from torch import Tensor
from torchvision.transforms.v2 import functional as corrupting

from benchmarks.accuracy import Saved, Scores, Settings, load_model, score
from benchmarks.images import Images, digest_of, first_classes, load_split
from benchmarks.timing import RESULTS, append_rows, conditions, read_rows_of
from timm_convmix import PackingError

CLEAN = "none"
SEVERITIES = (1, 3, 5)
STRENGTHS: dict[str, tuple[float, ...]] = {
    "noise": (0.04, 0.08, 0.10),  # standard deviation, of the full range
    "blur": (0.4, 0.7, 1.0),  # standard deviation of the Gaussian, in pixels
    "contrast": (0.75, 0.4, 0.15),  # what is left of it
    "jpeg": (80, 58, 40),  # quality
}
NOISE_SEED = 0


@dataclass(frozen=True, kw_only=True)
class Robustness(Scores, Settings):
    """A line of robustness.csv: the settings of the model's training, scores, and what they are of.

    Args:
        corruption: A key of ``STRENGTHS``, or 'none'.
        severity: One of ``SEVERITIES``; 0 for 'none'.
        scored: sha256 of the decoded test images before the corruption, its first 16 digits.
        weights: sha256 of the model's file, its first 16 digits.
        device: Name of the processor that computed.
        torch: Version.
        timm: Version.
        python: Version.
        date: Day.
        argv: The command, of paths the last part only.
    """

    corruption: str
    severity: int
    scored: str
    weights: str
    device: str
    torch: str
    timm: str
    python: str
    date: str
    argv: str

    @property
    def key(self) -> tuple[object, ...]:
        """What is measured once."""
        return self.scored, self.weights, self.corruption, self.severity


def corrupt(pixels: Tensor, corruption: str, severity: int) -> Tensor:
    """Corrupt images; the same images always in the same way.

    Args:
        pixels: (N, 3, H, W), uint8, on the CPU.
        corruption: A key of ``STRENGTHS``, or 'none'.
        severity: One of ``SEVERITIES``; of 'none' it is not read.

    Returns:
        As ``pixels``.
    """
    if corruption == CLEAN:
        return pixels
    strength = STRENGTHS[corruption][SEVERITIES.index(severity)]
    if corruption == "jpeg":
        return torch.stack([corrupting.jpeg(image, int(strength)) for image in pixels])
    values = pixels.float()
    if corruption == "noise":
        generator = torch.Generator().manual_seed(NOISE_SEED)
        values = values + 255 * strength * torch.randn(values.shape, generator=generator)
    elif corruption == "blur":
        kernel = 2 * round(4 * strength) + 1  # four deviations to each side, as scikit-image cuts it
        values = corrupting.gaussian_blur(values, [kernel, kernel], [strength, strength])
    else:
        mean = values.mean((2, 3), keepdim=True)
        values = (values - mean) * strength + mean
    return values.round().clamp(0, 255).byte()


def measure(
    models: Sequence[Saved], images: Images, path: Path, *, device: str, command: Sequence[str], threads: int
) -> None:
    """Score every model on every corruption, and append the rows that are not there yet.

    Args:
        models: On the device.
        images: The test images.
        path: Of the CSV.
        device: Of torch.
        command: The words of the command line, for the record.
        threads: Of torch, on the CPU.
    """
    scored = digest_of(images)[:16]
    at = conditions(device=device, threads=threads, clock="wall", seed=NOISE_SEED, argv=command)
    kinds = [(CLEAN, 0), *((corruption, severity) for corruption in STRENGTHS for severity in SEVERITIES)]
    done = {row.key for row in read_rows_of(Robustness, path)}
    for corruption, severity in tqdm(kinds, unit="corruption"):
        todo = [model for model in models if (scored, model.sha256, corruption, severity) not in done]
        if not todo:
            continue
        corrupted = Images(corrupt(images.pixels, corruption, severity), images.labels)
        for saved in todo:
            chosen = first_classes(corrupted, saved.settings.classes).to(device)
            scores = score(saved.model, chosen, mean=saved.mean, std=saved.std, mode=saved.settings.mode, device=device)
            row = Robustness(
                **asdict(saved.settings),
                **asdict(scores),
                corruption=corruption,
                severity=severity,
                scored=scored,
                weights=saved.sha256,
                **{key: at[key] for key in ("device", "torch", "timm", "python", "date", "argv")},
            )
            append_rows(path, [row])


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.robustness",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("models", type=Path, nargs="+", help="files of benchmarks.accuracy --save, of one data set")
    parser.add_argument("--data", type=Path, required=True, help="holds validation/CLASS/*")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch, on the CPU")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of robustness.csv")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what has no row yet; the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    parser = build_parser()
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    try:
        models = [load_model(path, args.device) for path in args.models]
        sizes = {saved.settings.size for saved in models}
        if len({saved.settings.dataset for saved in models}) > 1 or len(sizes) > 1:
            raise ValueError("The models were trained on several data sets or sizes: give those of one.")
        images = load_split(args.data, "validation")
        if images.size not in sizes:
            images = load_split(args.data, "validation", sizes.pop())
    except (ValueError, OSError, PackingError) as error:
        parser.error(str(error))
    command = ["python", "-m", "benchmarks.robustness", *argv]
    path = args.results / "robustness.csv"
    measure(models, images, path, device=args.device, command=command, threads=args.threads)
    return 0


if __name__ == "__main__":
    sys.exit(main())

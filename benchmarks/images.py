"""Image folders as tensors: read once, cut into subsets, augmented on the device, packed for another machine.

    python -m benchmarks.images pack DATA OUT       pieces under 60 MiB: files are the only way to some machines
    python -m benchmarks.images unpack OUT DATA     there: checked, decoded, and kept where the benchmarks look

DATA holds ``train/CLASS/*`` and ``validation/CLASS/*``.
"""

import argparse
import io
import json
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from itertools import pairwise
from pathlib import Path

import safetensors
import torch
from huggingface_hub.utils.tqdm import tqdm
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from timm_convmix import PackingError
from timm_convmix.weights.measuring import open_dataset

SPLITS = ("train", "validation")
SUBSET_SEED, HOLD_OUT_SEED = 1, 2
HOLD_OUT = 0.1
"""Share of the training images that selection is scored on, and that is not trained on then."""

PIECE_BYTES = 54 * 2**20
"""Of images; with labels and names a file stays below 60 MiB."""
UNPACKED = "unpacked"
"""Stands in a cache for the digest of the files, where there are none."""
TILES = 2500
"""Images a mosaic: enough that no header counts, few enough for WebP's 16383 pixels a side up to 327 px an image."""


# Images ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Images:
    """A labelled set.

    Args:
        pixels: (N, 3, H, W), uint8.
        labels: (N,), int64.
    """

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def size(self) -> int:
        """Height and width in pixels."""
        return self.pixels.shape[-1]

    def take(self, index: Tensor) -> "Images":
        """Those at positions ``index``, or where a mask of bool is true."""
        return Images(self.pixels[index], self.labels[index])

    def to(self, device: str) -> "Images":
        """The same on a device."""
        return Images(self.pixels.to(device), self.labels.to(device))


def digest_of(*sets: Images) -> str:
    """sha256 over pixels and labels: the same wherever the images were decoded to the same values."""
    digest = sha256()
    for images in sets:
        digest.update(images.pixels.numpy().reshape(-1).data)
        digest.update(images.labels.numpy().data)
    return digest.hexdigest()


def mean_and_std(pixels: Tensor) -> tuple[list[float], list[float]]:
    """Of each channel, in units of the full range; exact, from counts of the 256 values.

    Args:
        pixels: (N, 3, H, W), uint8.
    """
    values = torch.arange(256, dtype=torch.float64) / 255
    counts = torch.stack([torch.bincount(plane.flatten(), minlength=256) for plane in pixels.unbind(1)]).double()
    mean = counts @ values / counts.sum(1)
    variance = counts @ values.square() / counts.sum(1) - mean.square()
    return [round(m, 4) for m in mean.tolist()], [round(s, 4) for s in variance.sqrt().tolist()]


# Reading --------------------------------------------------------------------------------------------------------------


def load_split(root: Path, split: str, size: int | None = None) -> Images:
    """The images of ``root/split``, from a cache beside the folder where it is sound and the folder unchanged.

    Args:
        root: Data folder, laid out or unpacked.
        split: 'train' or 'validation'.
        size: Height and width to resize to (bicubic, without keeping the aspect); None keeps the files' own, which
            must be one.

    Raises:
        PackingError: There are no such images.
        ValueError: They differ in size, and ``size`` is None.
    """
    native = root / f"{split}.safetensors"
    cache = root / f"{split}-{size}.safetensors" if size else native
    files = None if native.is_file() and not (root / split).is_dir() else list_files(root, split)
    # where there are no files, what was unpacked stands for itself
    source = read_digests(native)["images" if size else "files"] if files is None else list_digest(files)
    if cache.is_file():
        known = read_digests(cache)
        with safetensors.safe_open(cache, "pt") as file:
            images = Images(file.get_tensor("pixels"), file.get_tensor("labels"))
        if known["files"] == source and known["images"] == digest_of(images):
            return images
    if files is None and size:
        whole = load_split(root, split)
        pixels = (as_pixels(to_pil_image(image), size) for image in whole.pixels)
        labels, names = whole.labels, read_names(root, split)
    else:
        files = files or list_files(root, split)
        pixels = (decode(path, size) for path, _ in files)
        labels, names = torch.tensor([label for _, label in files]), names_of(files)
    images = Images(stack(pixels, count=len(labels), what=f"{root / split}"), labels)
    write_cache(cache, images, names, source)
    return images


def read_digests(cache: Path) -> dict[str, str]:
    """Of a cache: 'files', of what it was made from, and 'images'."""
    with safetensors.safe_open(cache, "pt") as file:
        return file.metadata()


def list_files(root: Path, split: str) -> list[tuple[Path, int]]:
    """Paths and labels as timm's folder reader orders them.

    Raises:
        PackingError: There are none.
    """
    return [(Path(path), label) for path, label in open_dataset(root, split).reader.samples]


def names_of(files: Iterable[tuple[Path, int]]) -> list[str]:
    """``CLASS/FILE`` of each."""
    return ["/".join(path.parts[-2:]) for path, _ in files]


def list_digest(files: Sequence[tuple[Path, int]]) -> str:
    """sha256 over the lines ``CLASS/FILE bytes``."""
    lines = (f"{name} {path.stat().st_size}\n" for name, (path, _) in zip(names_of(files), files, strict=True))
    return sha256("".join(lines).encode()).hexdigest()


def read_names(root: Path, split: str) -> list[str]:
    """``CLASS/FILE`` of each image, in the order of ``load_split``, which must have run before."""
    with safetensors.safe_open(root / f"{split}.safetensors", "pt") as file:
        return file.get_tensor("names").numpy().tobytes().decode().splitlines()


def write_cache(cache: Path, images: Images, names: Sequence[str], files: str) -> None:
    """Keep a split, whole or not at all."""
    part = cache.with_suffix(".part")
    metadata = {"files": files, "images": digest_of(images)}
    tensors = {"pixels": images.pixels, "labels": images.labels, "names": as_bytes("\n".join(names).encode())}
    save_file(tensors, part, metadata)
    part.replace(cache)


def as_bytes(data: bytes) -> Tensor:
    """Bytes as a tensor (N,) of uint8."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def decode(source: Path | io.BytesIO, size: int | None = None) -> Tensor:
    """An image file as (3, H, W) of uint8, grey ones too; resized to ``size`` where that is given."""
    with Image.open(source) as image:
        return as_pixels(image.convert("RGB"), size)


def as_pixels(image: Image.Image, size: int | None) -> Tensor:
    """A picture as (3, H, W) of uint8."""
    if size and image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    return pil_to_tensor(image)


def stack(images: Iterable[Tensor], *, count: int, what: str) -> Tensor:
    """Images (3, H, W) as one tensor (count, 3, H, W), with a progress bar.

    Raises:
        ValueError: They differ in size.
    """
    pixels = torch.empty(0)
    for index, image in enumerate(tqdm(images, total=count, desc=f"read {Path(what).name}", unit="image")):
        if index == 0:
            pixels = torch.empty(count, *image.shape, dtype=torch.uint8)
        if image.shape != pixels.shape[1:]:
            first, other = (f"{shape[2]}x{shape[1]}" for shape in (pixels.shape[1:], image.shape))
            raise ValueError(f"{what} holds images of {first} and of {other}: give --size to resize them.")
        pixels[index] = image
    return pixels


# Subsets --------------------------------------------------------------------------------------------------------------


def stratified_order(labels: Tensor, seed: int) -> Tensor:
    """A random order of which any first part holds each class in its share, to within one image.

    Args:
        labels: (N,).
        seed: Of the order; a smaller part is contained in a larger one.

    Returns:
        (N,) positions.
    """
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    label, counts = labels[by_class], labels.bincount()
    rank = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[label]  # within the class
    return by_class[((rank + 0.5) / counts[label]).argsort(stable=True)]


def split_hold_out(train: Images) -> tuple[Images, Images]:
    """The training images without the hold-out, and the hold-out: the same for every run."""
    order = stratified_order(train.labels, HOLD_OUT_SEED)
    cut = round(HOLD_OUT * len(order))
    return train.take(order[cut:]), train.take(order[:cut])


def first_classes(images: Images, classes: int | None) -> Images:
    """The images of the first classes; None keeps all."""
    return images if classes is None else images.take(images.labels < classes)


def subset(train: Images, count: int) -> Images:
    """``count`` images, stratified; the same for every run.

    Raises:
        ValueError: There are not as many.
    """
    if not 0 < count <= len(train):
        raise ValueError(f"There are {len(train)} training images, and {count} were asked for.")
    return train.take(stratified_order(train.labels, SUBSET_SEED)[:count])


# Augmentation ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Epoch:
    """What chance decides in an epoch, drawn on the CPU so that every device and every scheme sees the same.

    Args:
        order: (N,) positions of the images.
        shift: (N, 2) rows and columns by which the crop is shifted, 0 to twice the padding.
        flip: (N,) bool.
    """

    order: Tensor
    shift: Tensor
    flip: Tensor

    @classmethod
    def draw(cls, count: int, *, padding: int, generator: torch.Generator) -> "Epoch":
        """Draw an epoch of ``count`` images."""
        return cls(
            torch.randperm(count, generator=generator),
            torch.randint(0, 2 * padding + 1, (count, 2), generator=generator),
            torch.rand(count, generator=generator) < 0.5,
        )

    def to(self, device: str) -> "Epoch":
        """The same on a device."""
        return Epoch(self.order.to(device), self.shift.to(device), self.flip.to(device))


def crop_and_flip(pixels: Tensor, shift: Tensor, flip: Tensor, *, padding: int) -> Tensor:
    """Crop images from their zero-padded selves and mirror some, each in its own way.

    Args:
        pixels: (B, 3, H, W), any type.
        shift: (B, 2), as in ``Epoch``.
        flip: (B,) bool.
        padding: Pixels on each side.

    Returns:
        (B, 3, H, W) in channels_last layout.
    """
    height, width = pixels.shape[-2:]
    padded = F.pad(pixels, (padding,) * 4)
    rows = torch.arange(height, device=pixels.device) + shift[:, :1]  # (B, H)
    columns = torch.arange(width, device=pixels.device).expand(len(pixels), -1)
    columns = torch.where(flip[:, None], columns.flip(1), columns) + shift[:, 1:]  # (B, W)
    batch = torch.arange(len(pixels), device=pixels.device)[:, None, None]
    return padded[batch, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)  # indexed: (B, H, W, 3)


def normalise(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Images of uint8 as floats of zero mean and unit deviation, the layout kept; ``mean`` and ``std`` in 0 to 1."""
    shift, scale = (per_channel(tuple(values), pixels.device) for values in (mean, std))
    return (pixels.float() - shift) / scale


@cache
def per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Values in 0 to 1 as (C, 1, 1) in 0 to 255; kept, because a copy to a GPU in every step would wait for it."""
    return torch.tensor(values, device=device)[:, None, None] * 255


# Packing --------------------------------------------------------------------------------------------------------------


def pack(root: Path, out: Path, *, piece_bytes: int = PIECE_BYTES) -> dict[str, str]:
    """Write both splits as pieces, and pack.json with their sha256 and that of the decoded images.

    JPEG files travel as they are. Others become mosaics in lossless WebP, the smallest form that Pillow writes.

    Args:
        root: Data folder, laid out; all images of one size.
        out: Where the pieces go.
        piece_bytes: Most bytes of images a piece.

    Returns:
        The digest of each split's decoded images.
    """
    out.mkdir(parents=True, exist_ok=True)
    pieces, digests = {}, {}
    for split in SPLITS:
        images, files = load_split(root, split), list_files(root, split)
        digests[split] = digest_of(images)
        keep = all(path.suffix.lower() in (".jpg", ".jpeg") for path, _ in files)
        blobs = ((path.read_bytes(), 1) for path, _ in files) if keep else mosaics(images.pixels)
        first = 0
        for index, (part, count) in enumerate(fill(blobs, piece_bytes)):
            tensors = {
                "data": as_bytes(b"".join(part)),
                "ends": torch.tensor([len(blob) for blob in part]).cumsum(0),
                "labels": images.labels[first : first + count],
                "names": as_bytes("\n".join(names_of(files[first : first + count])).encode()),
            }
            path = out / f"{split}-{index:02}.safetensors"
            save_file(tensors, path, {"size": str(images.size)})
            pieces[path.name] = sha256(path.read_bytes()).hexdigest()
            first += count
    (out / "pack.json").write_text(json.dumps(dict(pieces=pieces, images=digests), indent=1) + "\n")
    return digests


def mosaics(pixels: Tensor) -> Iterator[tuple[bytes, int]]:
    """Images (N, 3, H, H) as files of up to ``TILES`` tiles in a square, and how many each holds."""
    for tiles in tqdm(torch.split(pixels, TILES), desc="compress", unit="mosaic"):
        side, size = math.isqrt(len(tiles) - 1) + 1, tiles.shape[-1]
        square = tiles.new_zeros(side * side, *tiles.shape[1:])
        square[: len(tiles)] = tiles
        canvas = square.unflatten(0, (side, side)).permute(2, 0, 3, 1, 4).reshape(3, side * size, side * size)
        file = io.BytesIO()
        to_pil_image(canvas).save(file, "WebP", lossless=True, quality=100, method=4)
        yield file.getvalue(), len(tiles)


def fill(blobs: Iterable[tuple[bytes, int]], limit: int) -> Iterator[tuple[list[bytes], int]]:
    """Group files of some images each into pieces of at most ``limit`` bytes, and count the images of each."""
    part: list[bytes] = []
    used = images = 0
    for blob, count in blobs:
        if part and used + len(blob) > limit:
            yield part, images
            part, used, images = [], 0, 0
        part.append(blob)
        used += len(blob)
        images += count
    if part:
        yield part, images


def unpack(source: Path, root: Path) -> dict[str, str]:
    """Check and decode what ``pack`` wrote, into the caches that ``load_split`` reads.

    Args:
        source: Folder of the pieces.
        root: Data folder to fill.

    Returns:
        The digest of each split's decoded images. Of JPEG files it depends on the decoder; a difference is printed,
        because every row records it.

    Raises:
        ValueError: A piece is not the one that was packed.
    """
    packed = json.loads((source / "pack.json").read_text())
    for name, expected in packed["pieces"].items():
        if not (source / name).is_file() or sha256((source / name).read_bytes()).hexdigest() != expected:
            raise ValueError(f"{name} is missing or not the piece that was packed: copy it to {source} again.")
    root.mkdir(parents=True, exist_ok=True)
    digests = {}
    for split in SPLITS:
        pieces = [source / name for name in packed["pieces"] if name.startswith(f"{split}-")]
        pixels, labels, names = zip(*map(read_piece, pieces), strict=True)
        images = Images(torch.cat(pixels), torch.cat(labels))
        digests[split] = digest_of(images)
        if digests[split] != packed["images"][split]:
            print(f"{split}: decoded to other pixels than where it was packed, by another JPEG library.")
        write_cache(root / f"{split}.safetensors", images, [name for part in names for name in part], UNPACKED)
    return digests


def read_piece(path: Path) -> tuple[Tensor, Tensor, list[str]]:
    """Pixels, labels and names of a piece; a file of several tiles is cut up, its empty ones dropped."""
    with safetensors.safe_open(path, "pt") as file:
        size = int(file.metadata()["size"])
        data, ends, labels, names = (file.get_tensor(name) for name in ("data", "ends", "labels", "names"))
    raw = data.numpy().tobytes()
    starts = [0, *ends.tolist()]
    pixels, filled = torch.empty(len(labels), 3, size, size, dtype=torch.uint8), 0
    for start, end in tqdm(list(pairwise(starts)), desc=path.stem, unit="file"):
        canvas = decode(io.BytesIO(raw[start:end]))
        side = canvas.shape[-1] // size
        tiles = canvas.reshape(3, side, size, side, size).permute(1, 3, 0, 2, 4).flatten(0, 1)
        tiles = tiles[: min(TILES, len(labels) - filled)]
        pixels[filled : filled + len(tiles)] = tiles
        filled += len(tiles)
    return pixels, labels, names.numpy().tobytes().decode().splitlines()


# Command line ---------------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.images", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("pack", "unpack"))
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Pack or unpack, and print the digests; the exit status."""
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        digests = pack(args.source, args.target) if args.what == "pack" else unpack(args.source, args.target)
    except (ValueError, OSError, PackingError) as error:
        parser.error(str(error))
    for split, digest in digests.items():
        print(split, digest)
    return 0


if __name__ == "__main__":
    sys.exit(main())

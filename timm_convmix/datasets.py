"""Data sets of small images: what each is, and how it is laid out for timm's folder reader.

``DATASETS`` is the one table of them. ``lay_out`` takes the official files, from where they are published or from disk,
and writes ``DIR/train/CLASS/*`` and ``DIR/validation/CLASS/*``, where the sorted folders are the official labels in
order. The official test images are ``validation``; images without a label are left out, and so is CINIC-10's ``valid``.

Checksums are md5, because that is what is published. Those of CIFAR, STL-10 and SVHN are torchvision's, which has them
of each file within an archive too; no pickle is opened before it agrees. Those of CINIC-10 and Tiny-ImageNet are the
ones that public loaders check (such as Avalanche's), as their pages state none; CINIC-10's is also the ETag with which
Edinburgh DataShare sends the archive, such a loader says. Of a folder of these two only the counts are checked.
"""

import contextlib
import importlib.util
import io
import re
import socket
import ssl
import sys
import tarfile
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeAlias, cast
from urllib.error import URLError
from urllib.parse import urlsplit

from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100, STL10, SVHN  # timm.data imports torchvision anyway
from torchvision.datasets.utils import calculate_md5, download_url

from timm_convmix.errors import DatasetError, ExtraError
from timm_convmix.stems import CIFAR_MEAN, CIFAR_STD

SPLITS = ("train", "validation")
PATIENCE = 60.0
"""Seconds without a byte from a host until it counts as gone; torchvision itself waits for ever."""


# Official files: where they are published, and what is in them --------------------------------------------------------


class OfficialFile(NamedTuple):
    """A file as it is published."""

    url: str
    name: str
    md5: str


@dataclass(frozen=True)
class Files:
    """What is in the official files, once they are on disk.

    Iterates over ``(path, read)``: a path within an archive or folder, and the function that returns the bytes. No path
    of an archive is ever written to, so none can lead out of the folder.

    Args:
        origin: What an error calls them.
        paths: Archives (tar or zip, by their content), folders, or plain files.
    """

    origin: str
    paths: Sequence[Path]

    def __iter__(self) -> Iterator[tuple[str, Callable[[], bytes]]]:
        for path in self.paths:
            if path.is_dir():
                files = sorted(file for file in path.rglob("*") if file.is_file())
                yield from ((file.relative_to(path.parent).as_posix(), file.read_bytes) for file in files)
            elif tarfile.is_tarfile(path):
                with tarfile.open(path) as tar:
                    for member in tar:
                        if member.isfile():
                            yield member.name, cast(IO[bytes], tar.extractfile(member)).read
            elif zipfile.is_zipfile(path):
                with zipfile.ZipFile(path) as archive:
                    for name in archive.namelist():
                        yield name, partial(archive.read, name)
            else:
                yield path.name, path.read_bytes


# Readers: the images in official files --------------------------------------------------------------------------------

Images: TypeAlias = Iterator[tuple[str, bytes | Image.Image]]
"""``SPLIT/CLASS/FILE`` with the bytes of an image file or with pixels; ``boxes/FILE`` with the bytes of a text file."""
Reader: TypeAlias = Callable[[Files, Path], Images]
"""From official files and an empty folder to work in, to the images."""


def by_torchvision(
    kind: Any, members: Sequence[str], train: Mapping[str, Any], test: Mapping[str, Any], labels: Sequence[str] = ()
) -> Reader:
    """A reader of arrays that torchvision parses, after it has checked the md5 of each file.

    Args:
        kind: Class of torchvision.
        members: Paths of the files that it reads, below its ``root``.
        train: Its arguments for the training images.
        test: Its arguments for the test images.
        labels: Names of the classes, where the class does not read them from a file.
    """

    def read(files: Files, scratch: Path) -> Images:
        for path, content in files:
            for member in members:
                if f"/{path}".endswith(f"/{member}"):
                    (scratch / member).parent.mkdir(exist_ok=True)
                    (scratch / member).write_bytes(content())
        for split, arguments in zip(SPLITS, (train, test), strict=True):
            try:
                images = kind(scratch, **arguments)
            except RuntimeError as error:  # torchvision's word for a file that is absent or has another md5
                raise DatasetError(
                    f"{files.origin}: of {', '.join(members)}, one is absent or is not the official file (by its md5)."
                ) from error
            names = labels or images.classes
            for index, (image, label) in enumerate(images):
                yield f"{split}/{names[label]}/{index:05}.png", image

    return read


def of_cifar(kind: Any) -> Reader:
    """A reader of CIFAR-10 or CIFAR-100."""
    names = [name for name, _ in kind.train_list + kind.test_list] + [kind.meta["filename"]]
    return by_torchvision(kind, [f"{kind.base_folder}/{name}" for name in names], dict(train=True), dict(train=False))


class LabelledSTL10(STL10):  # type: ignore[misc]  # torchvision is not typed
    """STL-10 without the 100,000 unlabelled images, which torchvision would want to check as well."""

    train_list = STL10.train_list[:2]


def read_cinic10(files: Files, _scratch: Path) -> Images:
    """CINIC-10's own PNG files, ``train`` and ``test``."""
    for path, content in files:
        if match := re.fullmatch(r"(?:.*/)?(train|test)/([a-z]+)/([\w-]+\.png)", path):
            split, label, file = match.groups()
            yield f"{dict(train='train', test='validation')[split]}/{label}/{file}", content()


def read_tiny_imagenet(files: Files, _scratch: Path) -> Images:
    """Tiny-ImageNet's own JPEG files, ``train`` and ``val``, and the boxes of both."""
    validation, labels = {}, {}
    for path, content in files:
        if match := re.fullmatch(r"(?:.*/)?train/(n\d{8})/(?:images/(\1_\d+\.JPEG)|(\1_boxes\.txt))", path):
            label, image, boxes = match.groups()
            yield f"train/{label}/{image}" if image else f"boxes/train/{boxes}", content()
        elif match := re.fullmatch(r"(?:.*/)?val/images/(val_\d+\.JPEG)", path):
            validation[match[1]] = content()  # all of them are 20 MB
        elif re.fullmatch(r"(?:.*/)?val/val_annotations\.txt", path):
            labels = dict(re.findall(r"^(val_\d+\.JPEG)\t(n\d{8})\t", content().decode(), re.MULTILINE))
            yield "boxes/val_annotations.txt", content()
    for file in sorted(validation.keys() & labels.keys()):
        yield f"validation/{labels[file]}/{file}", validation[file]


# The table ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dataset:
    """A data set.

    Args:
        name: As on the command line; its recipe is ``recipes/NAME.yaml``.
        classes: How many.
        train: Labelled training images.
        validation: Official test images, or where their labels are secret, validation images.
        size: Height and width, in pixels.
        mean: Of all pixels of the training images, per channel, in 0 to 1.
        std: Likewise.
        flip: Whether an image mirrored left to right is one of the same class.
        source: The page that publishes it.
        license: What the source says of use.
        files: The official files.
        read: Finds the images in them.
        needs: Package that ``read`` needs and that timm does not bring.
    """

    name: str
    classes: int
    train: int
    validation: int
    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    source: str
    license: str
    files: tuple[OfficialFile, ...]
    read: Reader
    flip: bool = True
    needs: str | None = None

    @property
    def recipe(self) -> Path:
        """The config for timm's train.py."""
        return Path(__file__).parent / "recipes" / f"{self.name}.yaml"


DATASETS: dict[str, Dataset] = {
    dataset.name: dataset
    for dataset in (
        Dataset(
            name="cifar10",
            classes=10,
            train=50_000,
            validation=10_000,
            size=32,
            mean=CIFAR_MEAN,
            std=CIFAR_STD,
            source="https://www.cs.toronto.edu/~kriz/cifar.html",
            license="none named",
            files=(OfficialFile(CIFAR10.url, CIFAR10.filename, CIFAR10.tgz_md5),),
            read=of_cifar(CIFAR10),
        ),
        Dataset(
            name="cifar100",
            classes=100,
            train=50_000,
            validation=10_000,
            size=32,
            mean=(0.5071, 0.4865, 0.4409),
            std=(0.2673, 0.2564, 0.2762),
            source="https://www.cs.toronto.edu/~kriz/cifar.html",
            license="none named",
            files=(OfficialFile(CIFAR100.url, CIFAR100.filename, CIFAR100.tgz_md5),),
            read=of_cifar(CIFAR100),
        ),
        Dataset(
            name="cinic10",
            classes=10,
            train=90_000,
            validation=90_000,
            size=32,
            mean=(0.4789, 0.4723, 0.4305),  # of the README of BayesWatch/cinic-10, and so is std
            std=(0.2421, 0.2383, 0.2587),
            source="https://doi.org/10.7488/ds/2448",
            license="CC BY 4.0; images of ImageNet (research only) and CIFAR-10",
            files=(
                OfficialFile(
                    "https://datashare.ed.ac.uk/server/api/core/bitstreams/e8e186cc-2688-48f1-aa5a-3fda1a43f8b6/content",
                    "CINIC-10.tar.gz",
                    "6ee4d0c996905fe93221de577967a372",
                ),
            ),
            read=read_cinic10,
        ),
        Dataset(
            name="stl10",
            classes=10,
            train=5_000,
            validation=8_000,
            size=96,
            mean=(0.4467, 0.4398, 0.4066),
            std=(0.2603, 0.2566, 0.2713),
            source="https://cs.stanford.edu/~acoates/stl10/",
            license="none named; images of ImageNet (research only)",
            files=(OfficialFile(STL10.url, STL10.filename, STL10.tgz_md5),),
            read=by_torchvision(
                LabelledSTL10,
                [f"{STL10.base_folder}/{name}" for name, _ in LabelledSTL10.train_list + STL10.test_list],
                train=dict(split="train"),
                test=dict(split="test"),
                labels=("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"),
            ),
        ),
        Dataset(
            name="svhn",
            classes=10,
            train=73_257,
            validation=26_032,
            size=32,
            mean=(0.4377, 0.4438, 0.4728),
            std=(0.1980, 0.2010, 0.1970),
            flip=False,
            source="http://ufldl.stanford.edu/housenumbers/",
            license="non-commercial use only",
            files=tuple(OfficialFile(*SVHN.split_list[split]) for split in ("train", "test")),
            read=by_torchvision(
                SVHN,
                [SVHN.split_list[split][1] for split in ("train", "test")],
                train=dict(split="train"),
                test=dict(split="test"),
                labels=tuple("0123456789"),
            ),
            needs="scipy",
        ),
        Dataset(
            name="tiny_imagenet",
            classes=200,
            train=100_000,
            validation=10_000,
            size=64,
            mean=(0.4802, 0.4481, 0.3975),
            std=(0.2764, 0.2689, 0.2816),
            source="http://cs231n.stanford.edu/",
            license="images of ImageNet (research only)",
            files=(
                OfficialFile(
                    "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
                    "tiny-imagenet-200.zip",
                    "90528d7ca1a48142e341f4ef8d21d0de",
                ),
            ),
            read=read_tiny_imagenet,
        ),
    )
}


def list_datasets() -> list[dict[str, Any]]:
    """What there is, a row a data set."""
    shown = ("name", "classes", "train", "validation", "size", "source", "license", "recipe")
    rows = [{key: getattr(dataset, key) for key in shown} for dataset in DATASETS.values()]
    return [row | dict(recipe=str(row["recipe"])) for row in rows]


# Laying out -----------------------------------------------------------------------------------------------------------


def lay_out(name: str, folder: str | Path, *, source: str | Path | None = None, quiet: bool = False) -> Dataset:
    """Lay a data set out as ``train/CLASS/*`` and ``validation/CLASS/*``, whole or not at all.

    Arrays become PNG files, so every pixel stays as it is; image files keep their bytes. Tiny-ImageNet's boxes go to
    ``boxes/train/WNID_boxes.txt`` and ``boxes/val_annotations.txt``, in pixels of the 64x64 images.

    Everything is prepared in a temporary folder beside ``folder`` (or its first parent that exists) and moved there at
    the end. That folder goes after an error or Ctrl-C as well; only a process that is killed leaves it.

    Args:
        name: A key of ``DATASETS``.
        folder: Is made; may exist if it is empty.
        source: The official archive, or a folder with the official files, instead of a download.
        quiet: Show no progress bar.

    Raises:
        DatasetError: There is no such data set, ``folder`` is not empty, a host does not deliver, or what it or
            ``source`` holds is not the official data.
        ExtraError: SVHN is read with scipy, which is not installed.
        OSError: Of the disk.
    """
    if name not in DATASETS:
        raise DatasetError(f"There is no data set {name!r}, but {', '.join(DATASETS)}.")
    dataset, target = DATASETS[name], Path(folder).resolve()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise DatasetError(f"{folder} exists and is not an empty folder; name one that is empty or not there yet.")
    if dataset.needs and importlib.util.find_spec(dataset.needs) is None:
        raise ExtraError(f"{name} needs {dataset.needs}: pip install 'timm-convmix[data]'.")
    place = next(parent for parent in target.parents if parent.is_dir())
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=place) as temporary:
        whole, scratch = Path(temporary, "whole"), Path(temporary, "scratch")
        scratch.mkdir()
        files = given(dataset, Path(source)) if source else download(dataset, Path(temporary, "download"), quiet)
        write(dataset, files, whole, scratch, quiet)
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_dir():
            target.rmdir()
        whole.rename(target)
    return dataset


def given(dataset: Dataset, source: Path) -> Files:
    """The official files that the user has; an archive must be the official one, byte for byte.

    Raises:
        DatasetError: It is not.
        OSError: There is no such file.
    """
    if not source.is_dir():
        first, *more = dataset.files
        if more:
            names = " and ".join(file.name for file in dataset.files)
            raise DatasetError(f"{source}: {dataset.name} is {names}; pass the folder that holds them.")
        if (md5 := calculate_md5(source)) != first.md5:
            raise DatasetError(
                f"{source} is not the official {first.name}, or not all of it: its md5 is {md5}, not {first.md5}."
            )
    return Files(str(source), [source.resolve()])


def download(dataset: Dataset, folder: Path, quiet: bool) -> Files:
    """Fetch the official files through torchvision's downloader, which checks their md5.

    Raises:
        DatasetError: A host cannot be reached, or does not send the official file.
    """
    remedy = "Fetch it elsewhere and pass it with --from."
    # torchvision's bars have no switch, and older releases say on stdout what they fetch
    bars = sys.stderr if sys.stderr.isatty() and not quiet else io.StringIO()
    for file in dataset.files:
        host = urlsplit(file.url).hostname
        try:
            with contextlib.redirect_stdout(bars), contextlib.redirect_stderr(bars), network_patience(PATIENCE):
                download_url(file.url, folder, file.name, file.md5)
        except RuntimeError as error:  # torchvision's word for another md5
            raise DatasetError(
                f"{host} sent another file than the official {file.name}, or not all of it (by its md5). Try again. "
                f"{remedy}"
            ) from error
        except (URLError, HTTPException, ConnectionError, TimeoutError, ssl.SSLError) as error:
            raise DatasetError(f"{host} cannot be reached or does not send {file.url} ({error}). {remedy}") from error
    return Files(dataset.source, [folder / file.name for file in dataset.files])


@contextlib.contextmanager
def network_patience(seconds: float) -> Iterator[None]:
    """Let every new connection fail after so many seconds of silence."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def write(dataset: Dataset, files: Files, folder: Path, scratch: Path, quiet: bool) -> None:
    """Write the images of official files, and count them.

    Raises:
        DatasetError: Images or classes are missing, or there are too many.
    """
    counts: dict[str, Counter[str]] = {split: Counter() for split in SPLITS}
    total = dataset.train + dataset.validation
    with tqdm(total=total, desc=dataset.name, unit="image", disable=quiet or None) as bar:
        for path, content in dataset.read(files, scratch):
            file = folder / path
            file.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                file.write_bytes(content)
            else:
                content.save(file)
            split, label, *_ = path.split("/")
            if split in counts:
                counts[split][label] += 1
                bar.update()
    for split, count in zip(SPLITS, (dataset.train, dataset.validation), strict=True):
        found = counts[split]
        if (found.total(), len(found)) != (count, dataset.classes):
            raise DatasetError(
                f"{files.origin} has {found.total()} {split} images of {len(found)} classes where {dataset.name} has "
                f"{count} of {dataset.classes}."
            )

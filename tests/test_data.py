"""``data``: official files, here small ones of the true formats, become image folders for timm, whole or not at all."""

import hashlib
import io
import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import zipfile
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from huggingface_hub.utils import enable_progress_bars
from PIL import Image
from scipy.io import savemat
from timm.data import create_dataset
from torchvision.datasets import CIFAR10, CIFAR100, SVHN

from timm_convmix import ConvMixError, cli, datasets
from timm_convmix.datasets import DATASETS, LabelledSTL10, OfficialFile, lay_out

CIFAR10_LABELS = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
STL10_LABELS = ["airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"]
CIFAR100_LABELS = [f"{letter}_thing" for letter in "abcdefghijklmnopqrst"]  # a fifth of them, in order as they are
WNIDS = ["n01443537", "n01629819", "n12267677"]
TINY = "tiny-imagenet-200"
CHECKED = {"cifar10": CIFAR10, "cifar100": CIFAR100, "stl10": LabelledSTL10}  # and SVHN, file by file by torchvision


def md5(content):
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


# Official files, small ------------------------------------------------------------------------------------------------


class Official:
    """A small data set as its source publishes it.

    Args:
        name: Of the data set.
        files: Path within the archive -> bytes; every file is one of its own for SVHN.
        images: Split -> a list of (label, what the image file or array holds).
        labels: In the official order.
    """

    def __init__(self, name, folder, files, images, labels):
        self.name, self.files, self.images, self.labels = name, files, images, labels
        self.unpacked, self.served = folder / "unpacked", folder / "served"
        self.served.mkdir(parents=True)
        for path, content in files.items():
            (self.unpacked / path).parent.mkdir(parents=True, exist_ok=True)
            (self.unpacked / path).write_bytes(content)
        for file in DATASETS[name].files:
            self.pack(self.served / file.name)

    def pack(self, archive):
        if archive.suffix == ".mat":
            archive.write_bytes(self.files[archive.name])
        elif archive.suffix == ".zip":
            with zipfile.ZipFile(archive, "w") as file:
                for path, content in self.files.items():
                    file.writestr(path, content)
        else:
            with tarfile.open(archive, "w:gz") as file:
                for path, content in self.files.items():
                    member = tarfile.TarInfo(path)
                    member.size = len(content)
                    file.addfile(member, io.BytesIO(content))

    @property
    def archive(self):
        return self.served if self.name == "svhn" else self.served / DATASETS[self.name].files[0].name

    def publish(self, monkeypatch, url="http://127.0.0.1:9/"):
        """Put this in the place of the real one: checksums, counts, and where it is served."""
        served = [(file.name, md5((self.served / file.name).read_bytes())) for file in self.dataset.files]
        small = replace(
            self.dataset,
            classes=len({label for label, _ in self.images["train"]}),
            train=len(self.images["train"]),
            validation=len(self.images["validation"]),
            files=tuple(OfficialFile(url + name, name, checksum) for name, checksum in served),
        )
        monkeypatch.setitem(DATASETS, self.name, small)
        sums = {path.rpartition("/")[2]: md5(content) for path, content in self.files.items()}
        if kind := CHECKED.get(self.name):
            for parts in ("train_list", "test_list"):
                monkeypatch.setattr(kind, parts, [[file, sums[file]] for file, _ in getattr(kind, parts)])
        if meta := getattr(kind, "meta", None):
            monkeypatch.setitem(meta, "md5", sums[meta["filename"]])
        if self.name == "svhn":
            parts = {"train": "train_32x32.mat", "test": "test_32x32.mat"}
            monkeypatch.setattr(SVHN, "split_list", {k: ["", file, sums[file]] for k, file in parts.items()})
        return self

    @property
    def dataset(self):
        return DATASETS[self.name]

    def read_back(self, folder):
        """What timm's folder reader finds: (label, pixels) of each image, sorted."""
        found = {}
        for split in ("train", "validation"):
            dataset = create_dataset("", root=folder, split=split)
            labels = dataset.reader.class_to_idx
            assert [label for label in self.labels if label in labels] == sorted(labels, key=labels.get)
            names, found[split] = list(labels), []
            for file, label in map(dataset.reader.__getitem__, range(len(dataset))):
                with file:  # which the dataset itself leaves open
                    found[split].append((names[label], pixels(file.read())))
            found[split].sort()
        return found

    @property
    def pixels(self):
        return {
            split: sorted((label, pixels(content)) for label, content in images)
            for split, images in self.images.items()
        }


def pixels(content):
    if isinstance(content, bytes):
        with Image.open(io.BytesIO(content)) as image:
            return np.asarray(image.convert("RGB")).tobytes()
    return content.tobytes()


def encoded(image, kind):
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind)
    return file.getvalue()


def noise(count, size=32):
    """(N, H, W, 3)"""
    return np.random.default_rng(count).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def cifar(base, batches, labels, key):
    """Pickles of rows of 3072 bytes, channels first, as cs.toronto.edu/~kriz/cifar.html describes them."""
    files, images = {}, {"train": [], "validation": []}
    for number, (name, split) in enumerate(batches.items()):
        arrays = noise(2 * len(labels) + number)
        numbers = [(index + number) % len(labels) for index in range(len(arrays))]
        rows = arrays.transpose(0, 3, 1, 2).reshape(len(arrays), -1)
        files[f"{base}/{name}"] = pickle.dumps({"data": rows, key: numbers}, protocol=2)
        images[split] += [(labels[n], array) for n, array in zip(numbers, arrays, strict=True)]
    return files, images


def make_cifar10(folder):
    batches = {f"data_batch_{number}": "train" for number in range(1, 6)} | {"test_batch": "validation"}
    files, images = cifar("cifar-10-batches-py", batches, CIFAR10_LABELS, "labels")
    files["cifar-10-batches-py/batches.meta"] = pickle.dumps({"label_names": CIFAR10_LABELS}, protocol=2)
    return Official("cifar10", folder, files | {"cifar-10-batches-py/readme.html": b""}, images, CIFAR10_LABELS)


def make_cifar100(folder):
    batches = {"train": "train", "test": "validation"}
    files, images = cifar("cifar-100-python", batches, CIFAR100_LABELS, "fine_labels")
    files["cifar-100-python/meta"] = pickle.dumps({"fine_label_names": CIFAR100_LABELS}, protocol=2)
    return Official("cifar100", folder, files, images, CIFAR100_LABELS)


def make_cinic10(folder):
    files, images = {"./README.md": b""}, {"train": [], "validation": []}
    for index, image in enumerate(noise(60)):
        part, label = ("train", "valid", "test")[index // 20], CIFAR10_LABELS[index % 10]
        name = f"cifar-10-train-{index}" if index % 2 else f"n02130308_{index}"
        files[f"./{part}/{label}/{name}.png"] = encoded(image, "PNG")
        if part != "valid":
            split = "train" if part == "train" else "validation"
            images[split].append((label, files[f"./{part}/{label}/{name}.png"]))
    return Official("cinic10", folder, files, images, CIFAR10_LABELS)


def make_stl10(folder):
    """Columns before rows, and labels from 1, as cs.stanford.edu/~acoates/stl10 describes them."""
    files, images = {"stl10_binary/class_names.txt": "\n".join(STL10_LABELS).encode()}, {}
    for part, split, count in (("train", "train", 20), ("test", "validation", 30)):
        arrays, numbers = noise(count, 96), np.arange(count, dtype=np.uint8) % 10
        files[f"stl10_binary/{part}_X.bin"] = arrays.transpose(0, 3, 2, 1).tobytes()
        files[f"stl10_binary/{part}_y.bin"] = (numbers + 1).tobytes()
        images[split] = [(STL10_LABELS[n], array) for n, array in zip(numbers, arrays, strict=True)]
    return Official("stl10", folder, files | {"stl10_binary/unlabeled_X.bin": b"many"}, images, STL10_LABELS)


def make_svhn(folder):
    """X of (H, W, C, N), and a 0 is labelled 10, as ufldl.stanford.edu/housenumbers describes them."""
    files, images = {}, {}
    for part, split, count in (("train", "train", 20), ("test", "validation", 30)):
        arrays, numbers = noise(count), np.arange(count) % 10
        file = io.BytesIO()
        savemat(file, {"X": arrays.transpose(1, 2, 3, 0), "y": np.where(numbers == 0, 10, numbers)[:, None]})
        files[f"{part}_32x32.mat"] = file.getvalue()
        images[split] = [(str(n), array) for n, array in zip(numbers, arrays, strict=True)]
    return Official("svhn", folder, files, images, list("0123456789"))


def make_tiny_imagenet(folder):
    files, images, lines = {f"{TINY}/wnids.txt": "\n".join(WNIDS[::-1]).encode()}, {"train": [], "validation": []}, []
    for index, image in enumerate(noise(18, 64)):
        label, content = WNIDS[index % 3], encoded(image, "JPEG")
        if index < 12:
            files[f"{TINY}/train/{label}/images/{label}_{index}.JPEG"] = content
        else:
            files[f"{TINY}/val/images/val_{index}.JPEG"] = content
            lines.append(f"val_{index}.JPEG\t{label}\t0\t1\t62\t{index}\n")
        images["train" if index < 12 else "validation"].append((label, content))
    for label in WNIDS:
        files[f"{TINY}/train/{label}/{label}_boxes.txt"] = f"{label}_0.JPEG\t1\t2\t3\t4\n".encode()
    files[f"{TINY}/val/val_annotations.txt"] = "".join(lines).encode()
    files[f"{TINY}/test/images/test_0.JPEG"] = content
    return Official("tiny_imagenet", folder, files, images, WNIDS)


MAKERS = {name: globals()[f"make_{name}"] for name in DATASETS}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Every data set, small."""
    return {name: make(tmp_path_factory.mktemp(name)) for name, make in MAKERS.items()}


@pytest.fixture(params=DATASETS)
def official(request, made, monkeypatch):
    """Each data set, small, in the place of the real one."""
    return made[request.param].publish(monkeypatch)


@pytest.fixture
def cifar10(made, monkeypatch):
    return made["cifar10"].publish(monkeypatch)


@pytest.fixture
def cinic10(made, monkeypatch):
    return made["cinic10"].publish(monkeypatch)


def run(capsys, *arguments):
    status = cli.main(["data", *map(str, arguments)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def fails(capsys, place, *arguments):
    """The one line with which it fails, in a place where it leaves everything as it was."""
    before = sorted(place.rglob("*"))
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (1, ""), err
    (line,) = err.splitlines()
    assert line.startswith("timm-convmix data: ")
    assert sorted(place.rglob("*")) == before
    return line


# From disk ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["archive", "unpacked"])
def test_timm_reads_the_very_pixels(official, form, tmp_path, capsys):
    folder = tmp_path / "new" / official.name
    status, out, err = run(capsys, official.name, folder, "--from", getattr(official, form), "--json")
    assert (status, err) == (0, "")
    dataset = official.dataset
    row = dict(name=official.name, folder=str(folder), classes=dataset.classes, train=dataset.train)
    assert json.loads(out) == [row | dict(validation=dataset.validation, recipe=str(dataset.recipe))]
    assert official.read_back(folder) == official.pixels
    assert {path.name for path in folder.iterdir()} == {"train", "validation"} | (
        {"boxes"} if official.name == "tiny_imagenet" else set()
    )
    assert [path.name for path in folder.parent.iterdir()] == [official.name]
    assert folder.stat().st_mode & 0o777 == (tmp_path / "new").stat().st_mode & 0o777  # a temporary folder is private


def test_a_folder_of_official_files_may_be_named_itself(official, tmp_path):
    """And not only the one that holds it."""
    (inner, *more) = official.unpacked.iterdir()
    lay_out(official.name, tmp_path / "data", source=official.unpacked if more else inner)
    assert official.read_back(tmp_path / "data") == official.pixels


def test_image_files_keep_their_bytes(made, monkeypatch, tmp_path):
    for name in ("cinic10", "tiny_imagenet"):
        official = made[name].publish(monkeypatch)
        lay_out(name, tmp_path / name, source=official.archive)
        for split, images in official.images.items():
            written = {path.read_bytes() for path in (tmp_path / name / split).rglob("*.*")}
            assert written == {content for _, content in images}


def test_tiny_imagenet_keeps_its_boxes(made, monkeypatch, tmp_path):
    official = made["tiny_imagenet"].publish(monkeypatch)
    lay_out("tiny_imagenet", tmp_path / "data", source=official.archive)
    written = {str(path.relative_to(tmp_path / "data")): path.read_bytes() for path in tmp_path.rglob("*.txt")}
    boxes = {f"boxes/train/{w}_boxes.txt": official.files[f"{TINY}/train/{w}/{w}_boxes.txt"] for w in WNIDS}
    assert written == boxes | {"boxes/val_annotations.txt": official.files[f"{TINY}/val/val_annotations.txt"]}


def test_another_archive_is_refused(official, tmp_path, capsys):
    """Also one that holds the same files, since nobody can tell without unpacking it."""
    if official.name == "svhn":
        line = fails(capsys, tmp_path, "svhn", tmp_path / "data", "--from", official.served / "train_32x32.mat")
        assert "svhn is train_32x32.mat and test_32x32.mat; pass the folder that holds them" in line
        return
    cut = tmp_path / official.archive.name
    cut.write_bytes(official.archive.read_bytes()[:-1])
    line = fails(capsys, tmp_path, official.name, tmp_path / "data", "--from", cut)
    assert f"{cut} is not the official {cut.name}, or not all of it: its md5 is " in line
    assert line.endswith(f", not {official.dataset.files[0].md5}.")


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "stl10", "svhn"])
@pytest.mark.parametrize("fault", ["changed", "missing"])
def test_a_folder_with_another_file_is_refused(name, fault, made, monkeypatch, tmp_path, capsys):
    official = made[name].publish(monkeypatch)
    copy = shutil.copytree(official.unpacked, tmp_path / "copy")
    file = next(path for path in sorted(copy.rglob("*")) if path.name.startswith("test"))
    if fault == "missing":
        file.unlink()
    else:
        file.write_bytes(pickle.dumps("malicious"))
    opened = []
    monkeypatch.setattr("torchvision.datasets.cifar.pickle.load", lambda *_, **__: opened.append(1))
    line = fails(capsys, tmp_path, name, tmp_path / "data", "--from", copy)
    assert f"{copy}: of " in line
    assert file.name in line
    assert line.endswith(", one is absent or is not the official file (by its md5).")
    assert not opened


@pytest.mark.parametrize("name", ["cinic10", "tiny_imagenet"])
def test_a_folder_with_too_few_images_is_refused(name, made, monkeypatch, tmp_path, capsys):
    official = made[name].publish(monkeypatch)
    copy = shutil.copytree(official.unpacked, tmp_path / "copy")
    next((copy / TINY / "val" if name == "tiny_imagenet" else copy / "test").rglob("*.[pJ]*")).unlink()
    line = fails(capsys, tmp_path, name, tmp_path / "data", "--from", copy)
    count, classes = official.dataset.validation, official.dataset.classes
    assert f"{copy} has {count - 1} validation images of " in line
    assert line.endswith(f"where {name} has {count} of {classes}.")


def test_a_folder_of_something_else_is_refused(official, tmp_path, capsys):
    (tmp_path / "else").mkdir()
    line = fails(capsys, tmp_path, official.name, tmp_path / "data", "--from", tmp_path / "else")
    assert str(tmp_path / "else") in line


def test_no_archive_writes_outside(cinic10, monkeypatch, tmp_path):
    """Names that lead out, links, and devices; the images among them are laid out all the same."""
    content = cinic10.images["train"][0][1]
    with tarfile.open(cinic10.served / "evil.tar.gz", "w:gz") as file:
        for path, good in cinic10.files.items():
            member = tarfile.TarInfo(path)
            member.size = len(good)
            file.addfile(member, io.BytesIO(good))
        for path in ("../../evil.png", f"{tmp_path}/evil.png", "train/../../evil.png", "train/cat/..\\..\\evil.png"):
            member = tarfile.TarInfo(path)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE):
            member = tarfile.TarInfo("train/cat/evil.png")
            member.type, member.linkname = kind, "/etc/passwd"
            file.addfile(member)
    evil = cinic10.served / "evil.tar.gz"
    official = OfficialFile("", evil.name, md5(evil.read_bytes()))
    monkeypatch.setitem(DATASETS, "cinic10", replace(cinic10.dataset, files=(official,)))
    lay_out("cinic10", tmp_path / "place" / "data", source=evil)
    assert cinic10.read_back(tmp_path / "place" / "data") == cinic10.pixels
    assert not list(tmp_path.rglob("*evil*"))


# Where it goes --------------------------------------------------------------------------------------------------------


def test_an_empty_folder_is_taken(cifar10, tmp_path):
    (tmp_path / "data").mkdir()
    lay_out("cifar10", tmp_path / "data", source=cifar10.archive)
    assert cifar10.read_back(tmp_path / "data") == cifar10.pixels


@pytest.mark.parametrize("kind", ["full", "file"])
def test_what_is_there_stays(cifar10, kind, tmp_path, capsys, monkeypatch):
    """And it is seen before anything is downloaded."""
    monkeypatch.setattr(datasets, "download_url", pytest.fail)
    taken = tmp_path / "data"
    if kind == "full":
        taken.mkdir()
    (taken / "mine.txt" if kind == "full" else taken).write_text("mine")
    line = fails(capsys, tmp_path, "cifar10", taken)
    assert f"{taken} exists and is not an empty folder" in line


@pytest.mark.parametrize("moment", ["the first image", "the last image", "the download"])
@pytest.mark.parametrize("end", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_end_at_any_moment_leaves_nothing(cifar10, moment, end, tmp_path, capsys, monkeypatch):
    images = cifar10.dataset.train + cifar10.dataset.validation
    left = [0 if moment == "the first image" else images - 1]
    save = Image.Image.save

    def fail_in_time(*args, **kwargs):
        if left[0] == 0:
            raise end
        left[0] -= 1
        return save(*args, **kwargs)

    def start_of_file(url, folder, name, checksum):
        folder.mkdir()
        (folder / name).write_bytes(b"the first bytes")
        raise end

    monkeypatch.setattr(Image.Image, "save", fail_in_time)
    monkeypatch.setattr(datasets, "download_url", start_of_file)
    source = [] if moment == "the download" else ["--from", cifar10.archive]
    status, out, err = run(capsys, "cifar10", tmp_path / "new" / "data", *source)
    line = "timm-convmix data: [Errno 28] No space left on device\n"
    assert (status, out, err) == ((130, "", "") if end is KeyboardInterrupt else (1, "", line))
    assert not list(tmp_path.iterdir())


def test_it_says_what_reads_svhn(made, monkeypatch, tmp_path, capsys):
    official = made["svhn"].publish(monkeypatch)
    monkeypatch.setitem(sys.modules, "scipy", None)
    line = fails(capsys, tmp_path, "svhn", tmp_path / "data", "--from", official.served)
    assert line == "timm-convmix data: svhn needs scipy: pip install 'timm-convmix[data]'."


# From a host ----------------------------------------------------------------------------------------------------------


@contextmanager
def serve(folder, fault=None):
    """A host on 127.0.0.1 that serves a folder, and the paths that it was asked for."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            if fault == "404":
                self.send_error(404)
                return
            content = (folder / self.path[1:]).read_bytes()
            if fault == "another file":
                content = content[:-1] + bytes([content[-1] ^ 1])
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2] if fault == "cut" else content)

        def log_message(self, *args):
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, *args):  # torchvision hangs up on the first of two requests
            pass

    with Server(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/", asked
        server.shutdown()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def test_it_downloads(official, tmp_path, capsys, monkeypatch):
    with serve(official.served) as (url, asked):
        official.publish(monkeypatch, url)
        status, _, err = run(capsys, official.name, tmp_path / "data")
    assert (status, err) == (0, "")
    assert set(asked) == {f"/{file.name}" for file in official.dataset.files}
    assert official.read_back(tmp_path / "data") == official.pixels
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("404", "cannot be reached or does not send http://127.0.0.1:{port}/cifar-10-python.tar.gz (HTTP Error 404"),
        (
            "cut",
            "sent another file than the official cifar-10-python.tar.gz, or not all of it (by its md5). Try again.",
        ),
        ("another file", "sent another file than the official cifar-10-python.tar.gz"),
    ],
)
def test_a_host_that_does_not_deliver(cifar10, fault, reason, tmp_path, capsys, monkeypatch):
    with serve(cifar10.served, fault) as (url, _):
        cifar10.publish(monkeypatch, url)
        line = fails(capsys, tmp_path, "cifar10", tmp_path / "new" / "data")
    port = url.split(":")[2].strip("/")
    assert line.startswith(f"timm-convmix data: 127.0.0.1 {reason.format(port=port)}")
    assert line.endswith("Fetch it elsewhere and pass it with --from.")


@contextmanager
def silent_host():
    """Takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener, f"http://127.0.0.1:{listener.getsockname()[1]}/"


def test_a_host_that_is_silent(cifar10, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(datasets, "PATIENCE", 0.2)
    with silent_host() as (_, url):
        cifar10.publish(monkeypatch, url)
        line = fails(capsys, tmp_path, "cifar10", tmp_path / "data")
    assert "127.0.0.1 cannot be reached or does not send" in line
    assert "timed out" in line
    assert line.endswith("--from.")
    assert socket.getdefaulttimeout() is None


def test_a_host_that_is_not_there(cifar10, tmp_path, capsys, monkeypatch):
    with silent_host() as (_, url):
        pass
    cifar10.publish(monkeypatch, url)
    line = fails(capsys, tmp_path, "cifar10", tmp_path / "data")
    assert "127.0.0.1 cannot be reached or does not send" in line
    assert "refused" in line
    assert line.endswith("--from.")


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_a_process_that_is_ended_leaves_nothing_at_dir(end, tmp_path):
    """While it downloads; a killed one cannot take its temporary folder with it."""
    with silent_host() as (listener, url):
        code = (
            "import dataclasses, signal, sys; from timm_convmix import cli; from timm_convmix.datasets import *\n"
            "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # what a shell starts with & ignores it
            f"files = (OfficialFile({url!r} + 'file', 'file', ''),)\n"
            "DATASETS['cifar10'] = dataclasses.replace(DATASETS['cifar10'], files=files)\n"
            f"sys.exit(cli.main(['data', 'cifar10', {str(tmp_path / 'data')!r}]))"
        )
        environment = os.environ | {"no_proxy": "127.0.0.1"}
        process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, env=environment)
        with listener.accept()[0]:
            process.send_signal(end)
            _, err = process.communicate(timeout=60)
    assert not (tmp_path / "data").exists()
    if end is signal.SIGINT:
        assert (process.returncode, err) == (130, "")
        assert not list(tmp_path.iterdir())
    else:
        assert all(path.name.startswith(".data-") for path in tmp_path.iterdir())


# The verb -------------------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("quiet", [False, True])
def test_progress_is_shown_unless_it_is_to_be_quiet(cifar10, quiet, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("timm_convmix.cli.disable_progress_bars", lambda: None)  # for every test that follows
    enable_progress_bars()  # whatever a test before did
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with serve(cifar10.served) as (url, _):
        cifar10.publish(monkeypatch, url)
        assert cli.main(["data", "cifar10", str(tmp_path / "data"), *["--quiet"] * quiet]) == 0
    shown = terminal.getvalue()
    if quiet:
        assert shown == ""
    else:
        assert "B/s" in shown  # the download
        assert "image/s" in shown
    assert capsys.readouterr().out.startswith("name ")


def test_it_lists_what_there_is(capsys):
    status, out, err = run(capsys, "--json")
    rows = json.loads(out)
    assert (status, err) == (0, "")
    assert [list(row) for row in rows] == [
        ["name", "classes", "train", "validation", "size", "source", "license", "recipe"]
    ] * len(DATASETS)
    assert [row["name"] for row in rows] == list(DATASETS)
    assert all(Path(row["recipe"]).is_file() for row in rows)
    counts = {row["name"]: (row["classes"], row["train"], row["validation"], row["size"]) for row in rows}
    assert counts == {
        "cifar10": (10, 50_000, 10_000, 32),
        "cifar100": (100, 50_000, 10_000, 32),
        "cinic10": (10, 90_000, 90_000, 32),
        "stl10": (10, 5_000, 8_000, 96),
        "svhn": (10, 73_257, 26_032, 32),
        "tiny_imagenet": (200, 100_000, 10_000, 64),
    }
    status, out, _ = run(capsys)
    assert [line.split()[0] for line in out.splitlines()] == ["name", *DATASETS]


@pytest.mark.parametrize("wrong", [["cifar10"], ["mnist", "DIR"], ["--from", "FILE"]])
def test_wrong_usage(wrong, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["data", *wrong])
    assert capsys.readouterr().out == ""


def test_python_says_what_there_is():
    with pytest.raises(ConvMixError, match=r"no data set 'mnist', but cifar10, cifar100, .*, tiny_imagenet\."):
        lay_out("mnist", "DIR")

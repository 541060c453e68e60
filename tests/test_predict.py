"""``predict``, in Python and as a verb: timm's own probabilities, whatever the images and wherever the model."""

import csv
import io
import json
import os
import shutil
import struct
import sys
import zlib
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_sample_images
from timm.data import ImageNetInfo, create_transform, resolve_data_config
from timm.models import get_pretrained_cfg

import timm_convmix
from timm_convmix import ConvMixError, HubError, InputError, PackingError, WeightsError, cli, predict
from timm_convmix.prediction import default_model, label_names, load_model
from timm_convmix.weights.packing import Images, pack, read_checkpoint

ARCH = "test_resnet"
VARIANT = f"convmix_{ARCH}"
PHOTOGRAPHS = [Path(name) for name in load_sample_images().filenames]
WORDS = ["nought", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
PREPROCESSING = dict(img_size=64, mean=[0.4, 0.5, 0.6], std=[0.2, 0.3, 0.2], crop_pct=0.8, interpolation="bilinear")


def trained(name, **kwargs):
    """A model that decides, and not as it was initialised."""
    torch.manual_seed(0)
    model = timm.create_model(name, **kwargs).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.rand_like(parameter), alpha=0.1)
        model.get_classifier().weight.mul_(30)
    return model


def save_checkpoint(path, net, **args):
    """What train.py leaves of a net."""
    args = dict(seed=0, in_chans=None, input_size=None, gp=None, model_kwargs={}) | args
    torch.save(dict(epoch=0, state_dict=net.state_dict(), args=Namespace(**args), version=2), path)
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """An output folder of train.py: its model, and the folder."""
    folder = tmp_path_factory.mktemp("run")
    model = trained(VARIANT, num_classes=10)
    save_checkpoint(folder / "last.pth.tar", model, model=VARIANT, num_classes=10, **PREPROCESSING)
    return SimpleNamespace(model=model, folder=folder, checkpoint=folder / "last.pth.tar")


@pytest.fixture(scope="module")
def words(run, tmp_path_factory):
    """The same, packed, with labels that are not their own index."""
    root = tmp_path_factory.mktemp("words")
    for index, word in enumerate(WORDS):  # the order of folders is the order of classes
        folder = root / "data" / "validation" / f"{index} {word}"
        folder.mkdir(parents=True)
        rgb(PHOTOGRAPHS)[index % 2].resize((90, 60)).save(folder / "photograph.png")
    name = f"{VARIANT}.words"
    saved, images = read_checkpoint(run.folder), Images(data_dir=root / "data")
    pack(saved, name=name, images=images, output=root, manifest=root / "manifest.json", quiet=True)
    return root / name


def probabilities(model, images, **config):
    """By timm's own words alone: (images, classes)."""
    transform = create_transform(**resolve_data_config(config, model=model))
    with torch.no_grad():
        return model(torch.stack([transform(image) for image in images])).softmax(dim=1)


def rgb(paths):
    images = []
    for path in paths:
        with Image.open(path) as image:
            images.append(image.convert("RGB"))
    return images


def assert_like(rows, files, wanted, labels, topk=5):
    best = wanted.topk(topk)
    keys = ["file", "rank", "label", "class_index", "probability"]
    assert [list(row) for row in rows] == [keys] * len(files) * topk
    assert [(row["file"], row["rank"]) for row in rows] == [(str(f), r) for f in files for r in range(1, topk + 1)]
    assert [row["class_index"] for row in rows] == best.indices.flatten().tolist()
    assert [row["label"] for row in rows] == [labels[index] for index in best.indices.flatten()]
    torch.testing.assert_close([row["probability"] for row in rows], best.values.flatten().tolist(), atol=1e-5, rtol=0)


def call(capsys, *arguments):
    status = cli.main(["predict", *map(str, arguments)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


# Wherever the model is ------------------------------------------------------------------------------------------------


def test_a_packed_folder(words):
    wanted = probabilities(timm.create_model(f"local-dir:{words}", pretrained=True).eval(), rgb(PHOTOGRAPHS))
    labels = [f"{index} {word}" for index, word in enumerate(WORDS)]
    assert (wanted[0] - wanted[1]).abs().max() > 1e-3  # or a mix-up of images would not show
    for source in (words, str(words), f"local-dir:{words}"):
        assert_like(predict(PHOTOGRAPHS, model=source), PHOTOGRAPHS, wanted, labels)
    assert_like(predict(PHOTOGRAPHS[1], model=words, topk=99), PHOTOGRAPHS[1:], wanted[1:], labels, topk=10)


def test_what_train_py_leaves(run):
    wanted = probabilities(run.model, rgb(PHOTOGRAPHS), **PREPROCESSING)
    for source in (run.folder, run.checkpoint):
        assert_like(predict(PHOTOGRAPHS, model=source), PHOTOGRAPHS, wanted, list(map(str, range(10))))


def test_a_checkpoint_of_a_plain_model_of_one_channel_and_another_pooling(tmp_path):
    model = trained(ARCH, num_classes=7, in_chans=1, global_pool="max")
    config = PREPROCESSING | dict(input_size=(1, 48, 48), mean=[0.4], std=[0.3], img_size=None)
    path = save_checkpoint(tmp_path / "a.pth.tar", model, model=ARCH, num_classes=7, gp="max", **config)
    wanted = probabilities(model, [image.convert("L") for image in rgb(PHOTOGRAPHS)], **config)
    assert_like(predict(PHOTOGRAPHS, model=path), PHOTOGRAPHS, wanted, list(map(str, range(7))))


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_file_that_does_not_say_its_architecture(run, tmp_path, suffix):
    path = tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(run.model.state_dict(), path)
    wanted = probabilities(run.model, rgb(PHOTOGRAPHS))
    for arch in (VARIANT, ARCH):
        assert_like(predict(PHOTOGRAPHS, model=path, arch=arch), PHOTOGRAPHS, wanted, list(map(str, range(10))))
    with pytest.raises(WeightsError, match=rf"weights{suffix}: it does not say which .*--arch"):
        predict(PHOTOGRAPHS, model=path)
    with pytest.raises(WeightsError, match=rf"weights{suffix}: it names vit_tiny, which is none"):
        predict(PHOTOGRAPHS, model=path, arch="vit_tiny")


def test_a_tag_of_imagenet(hub_cache, save_plain, tmp_path, monkeypatch):
    plain, path = save_plain(ARCH)
    hub_cache(f"timm/{ARCH}.r160_in1k", path, tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    wanted = probabilities(plain, rgb(PHOTOGRAPHS))
    labels = ImageNetInfo().label_descriptions()
    assert labels[0] == "tench, Tinca tinca"
    for name in (VARIANT, ARCH, f"{ARCH}.r160_in1k"):
        assert_like(predict(PHOTOGRAPHS, model=name), PHOTOGRAPHS, wanted, labels)


def test_a_model_that_is_built_already(words):
    model = timm.create_model(f"local-dir:{words}", pretrained=True, num_classes=3).train()
    rows = predict(PHOTOGRAPHS, model=model)
    assert_like(rows, PHOTOGRAPHS, probabilities(model.eval(), rgb(PHOTOGRAPHS)), list("012"), topk=3)
    assert rows == predict(PHOTOGRAPHS, model=model, device="cpu")
    with pytest.raises(InputError, match="reads 4 channels, and an image file has 1 or 3"):
        predict(PHOTOGRAPHS, model=timm.create_model(VARIANT, in_chans=4))
    with pytest.raises(InputError, match="device teapot: "):
        predict(PHOTOGRAPHS, model=model, device="teapot")


def test_the_default_is_the_embedded_net_that_is_no_baseline(monkeypatch, capsys):
    def record(embedded, mixer):
        return SimpleNamespace(embedded=embedded, model_args=dict(mixer=mixer))

    records = {
        "convmix_a.b": record("a.safetensors", "none"),
        "convmix_c.d": record(None, "convmix"),
        "convmix_e.f": record("e.safetensors", "convmix"),
    }
    monkeypatch.setattr("timm_convmix.prediction.manifest", records)
    assert default_model() == "convmix_e.f"
    with pytest.raises(SystemExit, match="0"):
        cli.main(["predict", "--help"])
    assert "(default: convmix_e.f)" in capsys.readouterr().out

    del records["convmix_e.f"]
    assert default_model() is None
    with pytest.raises(SystemExit, match="2"):
        cli.main(["predict", str(PHOTOGRAPHS[0])])
    assert "required: --model" in capsys.readouterr().err
    with pytest.raises(WeightsError, match="no trained model travels in this package: name one"):
        predict(PHOTOGRAPHS)


def test_the_default_answers_without_a_network():
    if (name := default_model()) is None:
        pytest.skip("no trained model is embedded")
    rows = predict(PHOTOGRAPHS, topk=1)
    assert {row["label"] for row in rows} <= {*get_pretrained_cfg(name).label_names}


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("no_such_net", WeightsError, r"no_such_net is no architecture \(see `timm-convmix list`\), tag of one, file"),
        (f"{VARIANT}.no_such_tag", WeightsError, "no_such_tag is no architecture"),
        ("vit_tiny_patch16_224", WeightsError, "vit_tiny_patch16_224 is no architecture"),
        ("hf-hub:nobody/nothing", HubError, "hf-hub:nobody/nothing: could not get its weights from nobody/nothing"),
        ("local-dir:nowhere", OSError, "Config file not found: nowhere"),
        ("EMPTY", PackingError, r"last\.pth\.tar: no such file; give a train.py output folder"),
        ("BERT", WeightsError, r"local-dir:.*: timm cannot load what its config.json describes \(KeyError"),
        ("CUT", PackingError, r"cut\.pth\.tar cannot be read as a checkpoint"),
        ("HEADLESS", WeightsError, "headless.pth.tar has no classifier"),
    ],
)
def test_no_such_model(run, tmp_path, source, error, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "cut.pth.tar").write_bytes(run.checkpoint.read_bytes()[:5000])
    if source == "HEADLESS":
        headless = timm.create_model(VARIANT, num_classes=0)
        save_checkpoint(tmp_path / "headless.pth.tar", headless, model=VARIANT, model_kwargs=dict(num_classes=0))
    places = dict(EMPTY="empty", BERT="bert", CUT="cut.pth.tar", HEADLESS="headless.pth.tar")
    with pytest.raises(error, match=message):
        load_model(tmp_path / places[source] if source in places else source)


def test_wordnet_ids_in_words(words):
    model = timm.create_model(f"local-dir:{words}", pretrained=True)
    ids = ["n01440764", "n02123045", "n00000000", *ImageNetInfo("imagenet-22k").label_names()[:7]]
    model.pretrained_cfg["label_names"] = ids
    labels = label_names(model)
    assert labels[:3] == ["tench, Tinca tinca", "tabby, tabby cat", "n00000000"]
    model.pretrained_cfg["label_names"] = [*ids[:-1], "mine"]
    assert label_names(model) == [*ids[:-1], "mine"]


def test_labels_that_timm_could_not_read_either(words):
    model = timm.create_model(f"local-dir:{words}", pretrained=True)
    model.pretrained_cfg["label_names"] = list(range(10))
    with pytest.raises(WeightsError, match="labels are not as timm has them: All label names must be strings"):
        predict(PHOTOGRAPHS, model=model)


# Whatever the images --------------------------------------------------------------------------------------------------


def test_folders_in_any_batches(run, tmp_path):
    root = tmp_path / "pieces"
    for folder in ("3", "1", "1/deeper"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for index in range(11):
        piece = rgb(PHOTOGRAPHS)[index % 2].crop((40 * index, 30 * index, 40 * index + 100, 30 * index + 80))
        piece.save(root / ("1", "3", "1/deeper")[index % 3] / f"{index:02}.{'PNG' if index % 2 else 'png'}")
    (root / "notes.txt").write_text("no image, and nobody said so")
    files = sorted(root.rglob("*.[pP]*"))
    assert len(files) == 11
    wanted = probabilities(run.model, rgb(files), **PREPROCESSING)
    for batch_size in (1, 4, 11, 64):
        rows = predict(root, model=run.checkpoint, batch_size=batch_size)
        assert_like(rows, files, wanted, list(map(str, range(10))))
    rows = predict([PHOTOGRAPHS[0], root, PHOTOGRAPHS[1]], model=run.checkpoint, topk=1)
    assert [row["file"] for row in rows] == list(map(str, [PHOTOGRAPHS[0], *files, PHOTOGRAPHS[1]]))


def test_images_of_any_mode_and_kind(run, tmp_path):
    photograph = rgb(PHOTOGRAPHS)[0].resize((90, 60))
    files = []
    for mode, suffix in [
        *[("1", "png"), ("L", "png"), ("LA", "png"), ("P", "png"), ("RGBA", "png"), ("P", "gif"), ("L", "webp")],
        *[("CMYK", "jpg"), ("YCbCr", "jpg"), ("CMYK", "tif"), ("RGB", "bmp"), ("RGB", "ppm")],
    ]:
        files.append(tmp_path / f"{mode}.{suffix}")
        photograph.convert(mode).save(files[-1])
    assert_like(
        predict(files, model=run.checkpoint),
        files,
        probabilities(run.model, rgb(files), **PREPROCESSING),
        list(map(str, range(10))),
    )


def test_deep_greys_keep_their_range(run, tmp_path):
    grey = np.array(rgb(PHOTOGRAPHS)[0].resize((90, 60)).convert("L"))
    Image.fromarray(grey).save(tmp_path / "8.png")
    Image.fromarray(grey.astype("uint16") * 256).save(tmp_path / "16.png")
    shallow, deep = (predict(tmp_path / name, model=run.checkpoint) for name in ("8.png", "16.png"))
    assert [row | dict(file="") for row in shallow] == [row | dict(file="") for row in deep]


@pytest.mark.parametrize(
    ("orientation", "transposition"),
    [
        (3, Image.Transpose.ROTATE_180),
        (6, Image.Transpose.ROTATE_90),
        (5, Image.Transpose.TRANSPOSE),
    ],
)
def test_an_image_stands_as_its_exif_says(run, tmp_path, orientation, transposition):
    photograph = rgb(PHOTOGRAPHS)[0].resize((90, 60))
    exif = Image.Exif()
    exif[0x0112] = orientation
    photograph.transpose(transposition).save(tmp_path / "lying.png", exif=exif)
    rows = predict(tmp_path / "lying.png", model=run.checkpoint)
    wanted = probabilities(run.model, [photograph], **PREPROCESSING)
    assert_like(rows, [tmp_path / "lying.png"], wanted, list(map(str, range(10))))


def png(width, height):
    """A PNG file that claims a size and holds next to nothing."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@pytest.fixture
def mixed(tmp_path):
    """A folder with two photographs, and with all that goes for no image: name -> reason."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    for photograph in PHOTOGRAPHS:
        shutil.copy(photograph, folder)
    (folder / "text.jpg").write_text("not an image")
    (folder / "empty.png").write_bytes(b"")
    (folder / "cut.jpg").write_bytes(PHOTOGRAPHS[0].read_bytes()[:20_000])
    (folder / "bomb.png").write_bytes(png(60_000, 60_000))
    (folder / "large.png").write_bytes(png(10_000, 10_000))  # Pillow only warns
    (folder / "thin.png").write_bytes(png(100_000, 1))
    (folder / "broken.webp").symlink_to("nowhere")
    reasons = {
        "text.jpg": "cannot identify image file",
        "empty.png": "cannot identify image file",
        "cut.jpg": "runcated",
        "bomb.png": "decompression bomb",
        "large.png": "image file is truncated",
        "thin.png": "100000x1 pixels are too long and thin to resize",
        "broken.webp": "No such file or directory",
    }
    return folder, {str(folder / name): reason for name, reason in reasons.items()}


def test_what_is_no_image_is_named_and_the_rest_predicted(mixed, run, tmp_path, capsys):
    folder, reasons = mixed
    (tmp_path / "without images").mkdir()
    missing = tmp_path / "missing.jpg"
    given = [folder, missing, tmp_path / "without images", "--model", run.checkpoint]
    status, out, err = call(capsys, *given, "--batch-size", 2, "--json")
    assert status == 1
    assert json.loads(out) == predict([folder / photograph.name for photograph in PHOTOGRAPHS], model=run.checkpoint)
    reasons |= {str(missing): "No such file or directory", str(tmp_path / "without images"): "holds no image file"}
    lines = err.splitlines()
    assert len(lines) == len(reasons)
    for file, reason in reasons.items():
        assert [line for line in lines if line.startswith(f"timm-convmix predict: {file}: ") and reason in line], err


def test_in_python_what_is_no_image_is_an_error(mixed, run):
    folder, reasons = mixed
    with pytest.raises(InputError, match=r"bomb\.png: Image size .* decompression bomb"):
        predict(folder, model=run.checkpoint)
    skipped = {}
    rows = predict(folder, model=run.checkpoint, topk=1, on_skip=skipped.__setitem__)
    assert skipped.keys() == reasons.keys()
    assert len(rows) == 2


@pytest.mark.parametrize("name", ["empty", "missing", "text.jpg"])
def test_nothing_to_predict_is_an_error(run, tmp_path, capsys, name):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.jpg").write_text("not an image")
    status, out, err = call(capsys, tmp_path / name, "--model", run.checkpoint, "--quiet")
    assert (status, out) == (1, "")
    first, last = err.splitlines()
    assert first.startswith(f"timm-convmix predict: {tmp_path / name}: ")
    assert last.startswith("timm-convmix predict: there is nothing to predict")
    with pytest.raises(ConvMixError, match="nothing to predict"):
        predict([], model=run.model)


# The verb -------------------------------------------------------------------------------------------------------------


def test_every_format_says_the_same(run, tmp_path, capsys):
    awkward = tmp_path / 'a, "b"\n1.jpg'
    shutil.copy(PHOTOGRAPHS[0], awkward)
    files = [PHOTOGRAPHS[1], awkward]
    rows = predict(files, model=run.checkpoint, topk=3)
    given = [*files, "--model", run.checkpoint, "--topk", 3]
    for flag in (["--json"], ["--format", "json"]):
        status, out, err = call(capsys, *given, *flag)
        assert (status, json.loads(out), err) == (0, rows, "")
    status, out, _ = call(capsys, *given, "--format", "csv")
    text = [{key: str(value) for key, value in row.items()} for row in rows]
    assert (status, list(csv.DictReader(io.StringIO(out)))) == (0, text)
    status, out, _ = call(capsys, files[0], *given[2:])
    header, *lines = out.splitlines()
    assert (status, header.split()) == (0, list(rows[0]))
    assert [line.split()[:-1] for line in lines] == [
        [row["file"], str(row["rank"]), row["label"], str(row["class_index"])] for row in rows[:3]
    ]
    shown = [float(line.split()[-1]) for line in lines]
    assert shown == pytest.approx([row["probability"] for row in rows[:3]], abs=5.1e-5)


@pytest.mark.skipif(sys.platform != "linux", reason="names of any bytes")
def test_a_file_name_that_is_no_text(run, tmp_path, capsys):
    name = os.path.join(os.fsencode(tmp_path), b"\xff.jpg")  # noqa: PTH118
    shutil.copy(os.fsencode(PHOTOGRAPHS[0]), name)
    status, out, _ = call(capsys, os.fsdecode(name), "--model", run.checkpoint, "--format", "csv")
    assert status == 0
    assert r"\udcff.jpg,1," in out


def test_quiet_stops_every_progress_bar(run, capsys, monkeypatch):
    stopped = []
    monkeypatch.setattr("timm_convmix.cli.disable_progress_bars", lambda: stopped.append("the Hub's"))
    monkeypatch.setattr("timm_convmix.cli.predict.predict", lambda *_, quiet, **__: stopped.append(quiet) or [])
    call(capsys, PHOTOGRAPHS[0], "--model", run.checkpoint, "--quiet")
    assert stopped == ["the Hub's", True]
    call(capsys, PHOTOGRAPHS[0], "--model", run.checkpoint)
    assert stopped[2:] == [False]


@pytest.mark.parametrize("wrong", [["--topk", "0"], ["--batch-size", "-1"], ["--format", "xml"], []])
def test_wrong_usage(wrong, capsys):
    images = [str(PHOTOGRAPHS[0])] if wrong else []
    with pytest.raises(SystemExit, match="2"):
        cli.main(["predict", *images, "--model", VARIANT, *wrong])
    assert capsys.readouterr().out == ""


def test_a_model_that_fails_is_one_line(capsys):
    status, out, err = call(capsys, PHOTOGRAPHS[0], "--model", "no_such_net")
    assert (status, out, len(err.splitlines())) == (1, "", 1)
    assert err.startswith("timm-convmix predict: no_such_net is no architecture")


def test_it_is_public():
    assert timm_convmix.predict is predict

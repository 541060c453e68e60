"""The verbs ``cam`` and ``info``, and their pictures."""

import builtins
import csv
import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from timm_convmix import cli
from timm_convmix.errors import ExtraError
from timm_convmix.inspection import Cam, cam, describe, weigh_taps
from timm_convmix.pictures import draw_cams, draw_stages, short
from timm_convmix.prediction import default_model
from timm_convmix.saliency import StageMap

pytest.importorskip("matplotlib")

PHOTOGRAPHS = [Path(name) for name in load_sample_images().filenames]
MODEL = default_model()
embedded = pytest.mark.skipif(MODEL is None, reason="no trained model is embedded")


def call(capsys, *arguments):
    status = cli.main([*map(str, arguments)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def drawn(figure):
    """The canvas, with everything in its place."""
    canvas = pytest.importorskip("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
    canvas.draw()
    return canvas


def written(figure):
    """All texts that are seen in a figure, but the numbers at ticks."""
    found = [text for part in (figure, *figure.subfigs) for text in part.texts]
    found += [text for axis in figure.axes for text in (axis.title, axis.yaxis.label, *axis.texts)]
    return [text for text in found if text.get_text()]


def texts(figure):
    return [text.get_text() for text in written(figure)]


# cam ------------------------------------------------------------------------------------------------------------------


@embedded
def test_a_picture_an_image_and_a_row_a_model(tmp_path, capsys):
    output = tmp_path / "new" / "folder"
    status, out, err = call(capsys, "cam", *PHOTOGRAPHS, "--output", output, "--json")
    assert (status, err) == (0, "")
    wanted = [
        dict(
            image=name,
            model=each.model,
            label=each.label,
            probability=each.probability,
            file=str(output / f"{Path(name).stem}_cam.png"),
        )
        for name, cams in cam(PHOTOGRAPHS)
        for each in cams
    ]
    assert json.loads(out) == wanted
    assert len(wanted) == 4
    assert sorted(output.iterdir()) == sorted({Path(row["file"]) for row in wanted})
    for row in wanted:
        with Image.open(row["file"]) as picture:
            assert picture.format == "PNG"
            assert min(picture.size) > 500


@embedded
def test_a_class_and_another_model(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = ["cam", PHOTOGRAPHS[0], "--class", "dog", "--compare", "off", "--format", "csv"]
    status, out, _ = call(capsys, *given)
    assert status == 0
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [(row["model"], row["label"]) for row in rows] == [(MODEL, "dog"), (f"{MODEL}, mixer off (ablation)", "dog")]
    assert [path.name for path in tmp_path.iterdir()] == [f"{PHOTOGRAPHS[0].stem}_cam.png"]
    status, out, err = call(capsys, *given[:3], "unicorn")
    assert (status, out) == (1, "")
    assert err.startswith(
        f"timm-convmix cam: {MODEL} has no class 'unicorn': give an index of 0 to 9, or a label such as"
    )
    assert err.count("\n") == 1


def test_a_checkpoint_that_does_not_say_what_it_is(tmp_path, capsys):
    checkpoint = tmp_path / "weights.pth"
    torch.save(timm.create_model("convmix_test_resnet", num_classes=4).state_dict(), checkpoint)
    given = [
        "cam",
        PHOTOGRAPHS[0],
        "--model",
        checkpoint,
        "--arch",
        "test_resnet",
        "--output",
        tmp_path,
        "--class",
        "3",
    ]
    status, out, _ = call(capsys, *given, "--json")
    assert status == 0
    assert [row["model"] for row in json.loads(out)] == [str(checkpoint), f"{checkpoint}, mixer off (ablation)"]
    assert {row["label"] for row in json.loads(out)} == {"3"}
    status, _, err = call(capsys, *given[:4])
    assert status == 1
    assert "it does not say which of timm-convmix's architectures" in err
    status, out, _ = call(capsys, "info", checkpoint, "--arch", "test_resnet", "--size", 64, "--json")
    assert (status, json.loads(out)) == (0, describe(checkpoint, arch="test_resnet", size=(64, 64)))


@embedded
def test_no_picture_takes_the_place_of_another_or_of_an_image(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("timm_convmix.cli.cam.draw_cams", lambda cams: cams)
    monkeypatch.setattr("timm_convmix.cli.cam.save", lambda _, path: path.write_text("a picture"))
    images = [tmp_path / name for name in ("a.png", "a.jpg", "a_cam.png", "b/a.png")]
    (tmp_path / "b").mkdir()
    for image in images:
        with Image.open(PHOTOGRAPHS[0]) as photograph:
            photograph.resize((64, 64)).save(image)
    (tmp_path / "a_cam2.png").write_text("an older picture")
    before = [image.read_bytes() for image in images]
    status, out, _ = call(capsys, "cam", *images, images[0], "--output", tmp_path, "--json")
    assert status == 0
    assert [image.read_bytes() for image in images] == before
    files = {row["image"]: Path(row["file"]).name for row in json.loads(out)}
    assert files == dict(
        zip(map(str, images), ["a_cam2.png", "a_cam3.png", "a_cam_cam.png", "a_cam4.png"], strict=True)
    )
    assert (tmp_path / "a_cam2.png").read_text() == "a picture"


@embedded
def test_what_is_no_image_is_named_and_skipped(tmp_path, capsys):
    (tmp_path / "text.jpg").write_text("not an image")
    given = [tmp_path / "text.jpg", tmp_path / "missing.png"]
    status, out, err = call(capsys, "cam", given[0], PHOTOGRAPHS[0], given[1], "--output", tmp_path, "--json")
    assert status == 1
    assert {row["image"] for row in json.loads(out)} == {str(PHOTOGRAPHS[0])}
    for line, file, reason in zip(err.splitlines(), given, ["cannot identify", "No such file"], strict=True):
        assert line.startswith(f"timm-convmix cam: {file}: {reason}")
    status, out, err = call(capsys, "cam", given[0], "--output", tmp_path)
    assert (status, out) == (1, "")
    assert err.splitlines()[1].startswith("timm-convmix cam: there is nothing to look at")
    status, out, err = call(capsys, "info", MODEL, "--image", given[0], PHOTOGRAPHS[0], "--json")
    assert status == 1
    assert {row["file"] for row in json.loads(out)} == {str(PHOTOGRAPHS[0]), None}
    assert err.startswith(f"timm-convmix info: {given[0]}: cannot identify")


@pytest.mark.parametrize("arguments", [["cam", "photo.jpg"], ["info", "convmix_resnet18", "--picture", "a.png"]])
def test_without_matplotlib_it_says_what_to_install(arguments, capsys, monkeypatch, tmp_path):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(builtins, "__import__", without)
    status, out, err = call(capsys, *arguments)
    wanted = f"timm-convmix {arguments[0]}: pictures need matplotlib: pip install 'timm-convmix[cam]'.\n"
    assert (status, out, err) == (1, "", wanted)
    assert not list(tmp_path.iterdir())


def test_a_missing_extra_is_an_import_error():
    assert issubclass(ExtraError, ImportError)


@embedded
def test_a_folder_that_is_none(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    status, out, err = call(capsys, "cam", PHOTOGRAPHS[0], "--output", tmp_path / "file")
    assert (status, out) == (1, "")
    assert err.startswith("timm-convmix cam: ")
    assert "exists" in err


# info -----------------------------------------------------------------------------------------------------------------


def test_every_format_says_what_is_tapped(capsys):
    rows = describe("convmix_test_resnet", size=(64, 96))
    given = ["info", "test_resnet", "--size", 64, 96]
    status, out, err = call(capsys, *given, "--json")
    assert (status, json.loads(out), err) == (0, rows, "")
    _, out, _ = call(capsys, *given, "--format", "csv")
    text = [{key: "" if value is None else str(value) for key, value in row.items()} for row in rows]
    assert list(csv.DictReader(io.StringIO(out))) == text
    _, out, _ = call(capsys, *given)
    assert [line.split()[0] for line in out.splitlines()] == ["position", "0", "1", "2", "3", "4", "-"]
    _, square, _ = call(capsys, "info", "test_resnet", "--size", 64, "--json")
    assert json.loads(square) == describe("convmix_test_resnet", size=(64, 64))


@embedded
def test_how_much_each_tap_counts(tmp_path, capsys):
    given = ["info", MODEL, "--image", *PHOTOGRAPHS, "--picture", tmp_path / "taps.svg"]
    status, out, _ = call(capsys, *given, "--json")
    assert (status, json.loads(out)) == (0, weigh_taps(PHOTOGRAPHS, model=MODEL))
    assert "<svg" in (tmp_path / "taps.svg").read_text()


@pytest.mark.parametrize("wrong", [["--size", "0"], ["--size", "1", "2", "3"], ["--size", "x"], ["--image"]])
def test_wrong_usage(wrong, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["info", "convmix_test_resnet", *wrong])
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"argument {wrong[0]}" in captured.err


def test_a_picture_of_no_known_kind(tmp_path, capsys):
    for name in ("taps.xyz", "taps"):
        status, out, err = call(capsys, "info", "test_resnet", "--size", 64, "--picture", tmp_path / name)
        wanted = (
            f"timm-convmix info: {tmp_path / name}: no such kind of picture; end its name with .png, .svg or .pdf.\n"
        )
        assert (status, out, err) == (1, "", wanted)


# Pictures -------------------------------------------------------------------------------------------------------------


def example(**kwargs):
    """A mixing model's maps of one image: evidence in the upper half."""
    heat = torch.zeros(8, 12)
    heat[:4] = 1
    stages = [("backbone.stages.0", 2, (4, 6)), ("mixer", 4, (2, 3))]
    values = dict(
        model="a net",
        mixes=True,
        label="cat",
        probability=0.875,
        photo=torch.full((80, 120, 3), 200, dtype=torch.uint8),
        maps=[StageMap(name=name, reduction=reduction, grid=grid, heat=heat) for name, reduction, grid in stages],
    )
    return Cam(**values | kwargs)


def test_a_picture_says_what_it_shows():
    rows = [example(), example(model="another", mixes=False, probability=0.5)]
    figure = draw_cams(rows)
    shown = texts(figure)
    for text in ("a net: cat 0.875", "another: cat 0.500", "input\n8x12", "stages.0\n4x6, reduction 2"):
        assert text in shown
    assert "mixed map\n2x3, reduction 4" in shown
    assert "final map\n2x3, reduction 4" in shown
    caption = " ".join(figure.get_supxlabel().split())
    assert caption.startswith("Grad-CAM for 'cat': where the evidence is, not why. Each map is divided by its own")
    assert caption.endswith("widens the mixed map by construction.")
    assert "widens" not in draw_cams(rows[1:]).get_supxlabel()
    assert "nothing in favour" not in shown
    maps = [dataclasses.replace(stage, heat=torch.zeros_like(stage.heat)) for stage in rows[0].maps]
    assert texts(draw_cams([example(maps=maps)])).count("nothing in favour") == len(maps)


def test_heat_lies_over_the_photograph():
    figure = draw_cams([example()])
    pixels = np.asarray(drawn(figure).buffer_rgba())[..., :3].astype(int)
    axis = next(axis for axis in figure.axes if "stages.0" in axis.get_title())
    box = axis.get_window_extent()
    column, height = int((box.x0 + box.x1) / 2), len(pixels)
    warm = pixels[height - int(box.y1 - box.height / 4), column]
    cold = pixels[height - int(box.y0 + box.height / 4), column]
    assert warm.sum() > cold.sum() + 150  # light where the evidence is, in the upper half
    assert cold.min() == pytest.approx(80, abs=15)  # the photograph below what is nearly black
    assert cold.max() == pytest.approx(80, abs=15)


def test_nothing_overlaps():
    long = "backbone.stages.0.blocks.17.mlp.fc2.with_a_long_name"
    maps = [StageMap(name=long, reduction=1024, grid=(1000, 1000), heat=torch.zeros(8, 8)) for _ in range(4)]
    label = "a $label$ of very many words, as ImageNet has them, and more"
    figure = draw_cams([example(maps=maps, model="folder/" * 20 + "net", label=label)] * 2)
    drawn(figure)
    shown = written(figure)
    boxes = [text.get_window_extent() for text in shown]
    assert len(boxes) > 10
    for at, box in enumerate(boxes):
        assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1 + 1, shown[at].get_text()
        for other, text in zip(boxes[at + 1 :], shown[at + 1 :], strict=True):
            assert not box.shrunk(0.98, 0.98).overlaps(other), (shown[at].get_text(), text.get_text())


def test_a_drawing_of_stages():
    rows = describe("convmix_test_resnet")
    shown = texts(draw_stages(rows, {1: 0.25, 2: -0.5, 3: 0.0}))
    assert {"+0.250", "-0.500", "+0.000"} <= {*shown}
    for row in rows[:-2]:
        assert f"{short(row['module'])}\n{row['shape']}\nreduction {row['reduction']}" in shown
    assert [text for text in shown if text.startswith(f"mixer: {rows[-2]['params']:,} parameters (")]
    shown = texts(draw_stages([row | dict(tapped=False) for row in rows]))
    assert [text for text in shown if text.startswith("final map")]
    assert not [text for text in shown if text.startswith(("mixer", "mixed"))]


def test_a_long_name_keeps_its_end():
    assert short("backbone.layer1") == "layer1"
    assert short("a" * 40 + "z", 10) == "...aaaaaaz"

"""``export``, in Python and as a verb: what is written computes the same, knows what it is, and else is not written."""

import json
import sys
from hashlib import sha256
from pathlib import Path

import onnxruntime
import pytest
import timm
import torch
from desks import NAME
from PIL import Image
from sklearn.datasets import load_sample_images
from timm.data import create_transform

from timm_convmix import ConvMixError, InputError, PackingError, cli, exporting
from timm_convmix.convmix import manifest
from timm_convmix.errors import ExportError, ExtraError
from timm_convmix.exporting import balanced_sample, export
from timm_convmix.mixers import DEFAULT_MIXER
from timm_convmix.prediction import default_model

needs_onnx = pytest.mark.skipif(torch.__version__ < exporting.ONNX_TORCH, reason=f"ONNX: torch {exporting.ONNX_TORCH}")
PHOTOGRAPHS = [Path(name) for name in load_sample_images().filenames]


def build(arch="test_resnet", **kwargs):
    model = timm.create_model(f"convmix_{arch}", **dict(num_classes=10) | kwargs).eval()
    torch.nn.init.normal_(model.mixer.expand.weight)
    return model


def read(file):
    """What a file computes, and what it knows, by its runtime's own words alone."""
    if file.suffix == ".pt2":
        facts = dict.fromkeys(["labels", "preprocessing", "model", "weights", "versions"], "")
        program = torch.export.load(file, extra_files=facts)
        return program.module(), {name: json.loads(text) for name, text in facts.items()}
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    assert [each.name for each in session.get_inputs() + session.get_outputs()] == ["images", "logits"]
    facts = session.get_modelmeta().custom_metadata_map
    return (
        lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0]),
        {name: json.loads(text) for name, text in facts.items() if not name.startswith("onnx")},
    )


def call(capsys, *arguments):
    status = cli.main(["export", *map(str, arguments)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.mark.parametrize(
    ("arch", "to"),  # the first is NHWC
    [
        pytest.param("test_mambaout", "onnx", marks=needs_onnx),
        ("test_mambaout", "torch-export"),
        pytest.param("test_convnext", "onnx", marks=needs_onnx),
    ],
)
def test_a_file_computes_the_same_on_any_batch(arch, to, tmp_path):
    model = build(arch)
    row = export(model, to=to, images=PHOTOGRAPHS, size=(64, 96), output=tmp_path / "new" / "folder" / "net")
    file = Path(row["file"])
    assert list((tmp_path / "new" / "folder").iterdir()) == [file]
    assert (row["format"], row["images"]) == (to, 2)
    assert (row["bytes"], row["sha256"]) == (file.stat().st_size, sha256(file.read_bytes()).hexdigest())
    assert 0 <= row["difference_random"] < 1e-4
    assert 0 <= row["difference_images"] < 1e-4
    if to == "onnx":  # traced for inference: what only training needs is not in it
        assert "ReduceSum" not in {node.op_type for node in pytest.importorskip("onnx").load(file).graph.node}
    run, facts = read(file.rename(tmp_path / f"net{exporting.SUFFIXES[to]}"))
    assert facts["preprocessing"]["input_size"] == [3, 64, 96]
    assert facts["weights"] == dict(source=None, sha256=None)
    with torch.no_grad():
        for size in (1, 2, 5):
            x = torch.randn(size, 3, 64, 96)
            torch.testing.assert_close(run(x), model(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("to", [pytest.param("onnx", marks=needs_onnx), "torch-export"])
def test_a_file_knows_what_it_is(packed, to, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = packed.folders / NAME
    status, out, err = call(capsys, folder, "--to", to, "--images", *PHOTOGRAPHS, "--quiet", "--json")
    assert (status, err) == (0, "")
    (row,) = json.loads(out)
    file = Path(row["file"])
    assert file == Path(f"{NAME.partition('.')[0]}{exporting.SUFFIXES[to]}")
    run, facts = read(file)
    assert facts["labels"] == [str(digit) for digit in range(10)]
    assert facts["weights"] == dict(source=str(folder), sha256=packed.record.sha256)
    assert facts["model"].items() >= dict(architecture=NAME.partition(".")[0], tag=None, mixer=DEFAULT_MIXER).items()
    assert facts["versions"]["timm"] == timm.__version__
    transform = create_transform(**facts["preprocessing"])
    with Image.open(PHOTOGRAPHS[0]) as image:
        x = transform(image.convert("RGB"))[None]
    with torch.no_grad():
        wanted = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()(x)
        torch.testing.assert_close(run(x), wanted, atol=1e-4, rtol=1e-4)


def test_the_embedded_net_says_its_digest(tmp_path):
    if (name := default_model()) is None:
        pytest.skip("no trained model is embedded")
    row = export(to="torch-export", images=PHOTOGRAPHS[0], output=tmp_path)
    assert Path(row["file"]) == tmp_path / f"{name}.pt2"
    _, facts = read(Path(row["file"]))
    assert facts["weights"] == dict(source=name, sha256=manifest[name].sha256)
    assert facts["model"]["tag"] == name.partition(".")[2]


# What is not the same is not written ----------------------------------------------------------------------------------


@needs_onnx
def test_another_program_is_refused_and_the_older_file_stays(tmp_path, monkeypatch):
    model, other = build(), build()
    translate = torch.onnx.export
    shapes = ({0: torch.export.Dim("batch", max=exporting.MAX_BATCH)},)

    def tampered(_, args, **kwargs):
        return translate(torch.export.export(other, (torch.randn(2, 3, 64, 64),), dynamic_shapes=shapes), (), **kwargs)

    monkeypatch.setattr("torch.onnx.export", tampered)
    place = tmp_path / "net.onnx"
    place.write_text("older")
    with pytest.raises(ExportError, match=r"net\.onnx: on random input a logit differs by [\d.]+ from eager, whose"):
        export(model, images=PHOTOGRAPHS, size=(64, 64), output=place)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["older"]


@pytest.mark.parametrize("value", [float("nan"), 1.0])
@pytest.mark.parametrize("kind", ["random", "images"])
def test_what_is_no_number_is_refused_too(kind, value):
    found = dict(random=exporting.Difference(1e-4, 1.0), images=exporting.Difference(1e-4, 1.0))
    exporting.check_same(found, "net.onnx")
    with pytest.raises(ExportError, match=f"on {kind}"):
        exporting.check_same(found | {kind: exporting.Difference(value, 1.0)}, "net.onnx")
    outputs = iter([torch.zeros(2, 3), torch.full((2, 3), float("nan")), torch.zeros(2, 3)])
    found = exporting.difference(lambda _: torch.zeros(2, 3), lambda _: next(outputs), [None] * 3)
    assert not found.largest <= 0


@needs_onnx
def test_int8_is_measured_and_refused_where_it_costs_too_much(packed, digits, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("timm_convmix.exporting.CALIBRATION", 64)
    folder = packed.folders / NAME
    given = [folder, "--to", "onnx", "--int8", "--data", digits, "--output", tmp_path, "--quiet", "--json"]
    status, out, _ = call(capsys, *given, "--max-loss", 5)
    assert status == 0
    (row,) = json.loads(out)
    file = Path(row["file"])
    assert list(tmp_path.iterdir()) == [file]
    assert file.name.endswith(".int8.onnx")
    assert (row["images"], row["measured"]) == (64, packed.record.metrics.count)
    assert row["top1"] == pytest.approx(packed.record.metrics.top1)
    assert abs(row["top1"] - row["top1_int8"]) <= 5
    assert row["difference_images"] > 0
    assert row["bytes"] < packed.record.bytes / 2
    run, facts = read(file)
    assert facts["weights"]["sha256"] == packed.record.sha256
    assert run(torch.randn(5, *facts["preprocessing"]["input_size"])).shape == (5, 10)

    file.unlink()
    status, out, err = call(capsys, *given, "--max-loss", -100)
    assert (status, out, list(tmp_path.iterdir())) == (1, "", [])
    (line,) = err.splitlines()
    assert "points of top-1" in line
    assert line.endswith("and -100 are allowed; nothing was written.")


# What cannot be done --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (dict(images=()), InputError, r"no real image to compare on: name some \(images, --images\)"),
        (dict(images="nowhere.png"), InputError, r"nowhere\.png: No such file"),
        (dict(to="tflite"), InputError, "to='tflite' is none of onnx, torch-export"),
        (dict(int8=True), InputError, "int8 is a kind of onnx, and needs a data set"),
        (dict(int8=True, to="torch-export", data_dir="DIGITS"), InputError, "int8 is a kind of onnx"),
        (dict(images=(), data_dir="nowhere"), PackingError, "no images of the split 'train'"),
        (dict(images=(), data_dir="DIGITS"), InputError, "train holds 10 classes, and the model knows 7"),
    ],
)
def test_what_cannot_be_done_is_said_and_nothing_is_written(wrong, error, message, digits, tmp_path):
    if wrong.get("data_dir") == "DIGITS":
        wrong = wrong | dict(data_dir=digits)
    with pytest.raises(error, match=message):
        export(build(num_classes=7), **dict(to="torch-export", images=PHOTOGRAPHS, output=tmp_path) | wrong)
    assert not list(tmp_path.iterdir())


def test_a_model_that_cannot_be_traced(tmp_path):
    with pytest.raises(ExportError, match=r"^convmix_test_convnext at 1x1 cannot be exported by torch \S+ \("):
        export(build("test_convnext"), to="torch-export", images=PHOTOGRAPHS, size=(1, 1), output=tmp_path)
    assert not list(tmp_path.iterdir())


@needs_onnx
def test_a_model_that_is_too_large_for_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr("timm_convmix.exporting.ONNX_LIMIT", 1_000_000)
    with pytest.raises(ExportError, match="bytes are more than one ONNX file holds; take --to torch-export"):
        export(build(), images=PHOTOGRAPHS, output=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("extra", ["onnx", "onnxruntime", "onnxscript"])
def test_without_onnx(extra, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, extra, None)
    status, out, err = call(capsys, "convmix_test_resnet", "--to", "onnx", "--images", PHOTOGRAPHS[0])
    assert (status, out, len(err.splitlines())) == (1, "", 1)
    assert "pip install 'timm-convmix[export]'" in err
    with pytest.raises(ExtraError):
        export(build(), images=PHOTOGRAPHS)


def test_an_older_torch_writes_no_onnx(monkeypatch, capsys):
    monkeypatch.setattr("torch.__version__", torch.torch_version.TorchVersion("2.6.0+cu124"))
    status, out, err = call(capsys, "convmix_test_resnet", "--to", "onnx", "--images", PHOTOGRAPHS[0])
    assert (status, out) == (1, "")
    assert "ONNX needs torch 2.7 or newer: pip install 'timm-convmix[export]'" in err
    exporting.check_request("torch-export", None, int8=False)
    monkeypatch.setattr("torch.__version__", torch.torch_version.TorchVersion("2.10.0"))
    exporting.check_request("onnx", None, int8=False)


def test_a_folder_that_cannot_be_made(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises((ConvMixError, OSError), match="file"):
        export(build(), to="torch-export", images=PHOTOGRAPHS, output=tmp_path / "file" / "net.pt2")


def test_classes_give_to_a_sample_in_turn():
    samples = [(f"{index}.png", 0 if index < 90 else index % 3) for index in range(100)]
    sample = balanced_sample(samples, 9)
    classes = [dict(samples)[str(file)] for file in sample]
    assert classes == [0, 1, 2] * 3
    assert sample == balanced_sample(samples, 9)
    assert len(set(balanced_sample(samples, 1000))) == 100

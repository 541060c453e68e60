"""A weight of the manifest trained anew: by a short stand-in for train.py, and by the real one where it is at hand."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from timm_convmix import ManifestError, PackingError, cli
from timm_convmix.mixers import DEFAULT_MIXER
from timm_convmix.weights.manifest import read_manifest
from timm_convmix.weights.packing import Images, pack, read_checkpoint
from timm_convmix.weights.rebuilding import rebuild

SCRIPTS = os.environ.get("TIMM_SCRIPTS")
NAME = "convmix_test_resnet.digits"
PLAIN = f"{NAME}_baseline"

STAND_IN = """
import argparse, sys
from pathlib import Path
import timm, torch, yaml
from timm.utils import CheckpointSaver, random_seed, update_summary

parser = argparse.ArgumentParser()
parser.add_argument("-c", dest="config")
for option in ("--data-dir", "--output", "--experiment"):
    parser.add_argument(option)
told = parser.parse_args()
args = argparse.Namespace(**yaml.safe_load(Path(told.config).read_text()) | vars(told))
folder = Path(args.output, args.experiment)
folder.mkdir(parents=True)
print("training", args.experiment)
if args.lr > 1:
    sys.exit("the loss is no number")
random_seed(args.seed)
model = timm.create_model(args.model, num_classes=args.num_classes, **args.model_kwargs)
optimizer = torch.optim.SGD(model.parameters(), lr=args.lr)
saver = CheckpointSaver(model, optimizer, args, checkpoint_dir=str(folder), recovery_dir=str(folder))
saver.save_checkpoint(args.epochs - 1, metric=0.0)
"""
RECIPE = dict(model="convmix_test_resnet", num_classes=10, img_size=32, seed=3, epochs=2, lr=0.05)


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("script") / "train.py"
    path.write_text(STAND_IN)
    return path


@pytest.fixture(scope="module")
def pair(script, few, tmp_path_factory):
    return released(script, few, tmp_path_factory.mktemp("pair")).read_text()


@pytest.fixture
def manifest(pair, tmp_path):
    """Of a pair that the stand-in trained."""
    path = tmp_path / "released.json"
    path.write_text(pair)
    return path


def released(script, few, folder, *, recipe=RECIPE, dtype="bfloat16"):
    """A pair that ``script`` trained, packed: the manifest."""
    manifest = folder / "released.json"
    for name, kwargs in ((PLAIN, {"mixer": "none"}), (NAME, {})):  # the record names what the run left to the default
        config = folder / "config.yaml"
        config.write_text(json.dumps(recipe | dict(model_kwargs=kwargs)))
        places = ["-c", config, "--data-dir", few, "--output", folder / "first", "--experiment", name]
        command = [sys.executable, "-m", "timm_convmix", "run", script, *places]
        subprocess.run(list(map(str, command)), check=True, capture_output=True)
        pack(
            read_checkpoint(folder / "first" / name),
            name=name,
            images=Images(data_dir=few, source="scikit-learn"),
            output=folder / "packed",
            manifest=manifest,
            dtype=dtype,
            baseline=None if kwargs else PLAIN,
            quiet=True,
        )
    return manifest


def test_a_pair_is_rebuilt(script, few, manifest, tmp_path, capfd):
    output = tmp_path / "rebuilt"
    arguments = ["rebuild", NAME, "--script", str(script), "--data", str(few), "--manifest", str(manifest)]
    arguments += ["--output", str(output), "--json"]
    before = manifest.read_bytes()
    capfd.readouterr()
    assert cli.main(arguments) == 0
    out, err = capfd.readouterr()
    assert [(row["name"], row["same_bytes"]) for row in json.loads(out)] == [(PLAIN, True), (NAME, True)]
    assert [line for line in err.splitlines() if "training" in line] == [f"training {PLAIN}", f"training {NAME}"]

    assert manifest.read_bytes() == before
    then, now = read_manifest(manifest), read_manifest(output / "weights_manifest.json")
    assert now.keys() == then.keys()
    assert now[NAME].recipe["model_kwargs"] == {"mixer": DEFAULT_MIXER}
    for name in (PLAIN, NAME):
        same = ("sha256", "dtype", "recipe", "epochs", "dataset", "metrics", "baseline", "license", "model_args")
        assert [getattr(now[name], key) for key in same] == [getattr(then[name], key) for key in same]
    assert {path.name for path in output.iterdir()} == {"runs", "weights_manifest.json", PLAIN, NAME}

    (output / "runs" / NAME / "last.pth.tar").unlink()  # as if stopped in between: what is whole is not trained again
    assert cli.main([*arguments, "--quiet"]) == 0
    assert "training" not in capfd.readouterr().err
    assert cli.main(arguments) == 0
    assert "training" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(name="convmix_test_resnet.other"), ManifestError, "is not in the manifest, which has"),
        (dict(script="nowhere/train.py"), PackingError, r"nowhere/train\.py: no such file; name train\.py in a"),
        (dict(data_dir="digits"), PackingError, "other images of the split 'validation' than those of few that"),
        (dict(data_dir="nowhere"), PackingError, "no images of the split 'validation'"),
    ],
)
def test_what_cannot_be_rebuilt_is_refused_before_any_training(
    change, error, message, script, few, digits, manifest, tmp_path
):
    arguments = dict(name=NAME, script=script, data_dir=few, output=tmp_path / "rebuilt", manifest=manifest)
    arguments |= {key: digits if value == "digits" else value for key, value in change.items()}
    with pytest.raises(error, match=message) as raised:
        rebuild(**arguments)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "rebuilt").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            dict(base=dict(name="mine.safetensors", license="mit")),
            r"was trained from a file \(mine\.safetensors\): train",
        ),
        (dict(recipe=RECIPE | dict(world_size=4)), "was trained by 4 processes: train it with"),
        (dict(recipe=dict(seed=3)), r"was packed without the arguments of train\.py: train it with"),
    ],
)
def test_a_recipe_that_does_not_say_all_is_refused(change, message, script, few, manifest, tmp_path):
    data = json.loads(manifest.read_text())
    data["weights"][NAME] |= change
    manifest.write_text(json.dumps(data))
    with pytest.raises(PackingError, match=f"{NAME} {message}"):
        rebuild(NAME, script=script, data_dir=few, output=tmp_path / "rebuilt", manifest=manifest)
    assert not (tmp_path / "rebuilt").exists()


@pytest.mark.parametrize("quiet", [False, True])
def test_a_failed_training_is_said(quiet, script, few, manifest, tmp_path, capfd):
    data = json.loads(manifest.read_text())
    for entry in data["weights"].values():
        entry["recipe"]["lr"] = 5.0
    manifest.write_text(json.dumps(data))
    reason = ": the loss is no number" if quiet else ""
    with pytest.raises(PackingError, match=rf"{PLAIN}: train\.py ended with exit code 1{reason}\.$"):
        rebuild(NAME, script=script, data_dir=few, output=tmp_path / "out", manifest=manifest, quiet=quiet)
    assert ("the loss is no number" in capfd.readouterr().err) is not quiet
    assert not (tmp_path / "out" / PLAIN).exists()


@pytest.mark.skipif(not SCRIPTS, reason="set TIMM_SCRIPTS to a folder with timm's train.py (it is not in its wheel)")
def test_the_real_train_py_makes_the_same_weights_again(few, tmp_path):
    copy = Path(shutil.copy(Path(SCRIPTS) / "train.py", tmp_path))
    recipe = RECIPE | dict(epochs=1, warmup_epochs=0, cooldown_epochs=0, batch_size=10, validation_batch_size=20)
    recipe |= dict(workers=0, no_prefetcher=True, device="cpu", opt="sgd", device_modules=["timm_convmix"])
    manifest = released(copy, few, tmp_path, recipe=recipe, dtype="float32")  # few steps: rounding may turn a class
    script = Path(SCRIPTS) / "train.py"  # beside timm's source
    rebuilt = rebuild(NAME, script=script, data_dir=few, output=tmp_path / "out", manifest=manifest, quiet=True)
    assert {name: record.sha256 for name, record in rebuilt.items()} == {
        name: record.sha256 for name, record in read_manifest(manifest).items()
    }

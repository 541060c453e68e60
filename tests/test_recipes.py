"""The recipes: one for every data set, the same but for what the data set itself is, and what timm's train.py reads."""

import csv
import importlib.util
import numbers
import sys
from pathlib import Path

import pytest
import timm
import torch
import yaml
from test_training import SCRIPTS, needs_scripts, script
from timm.models import is_model, is_model_pretrained

import timm_convmix
from timm_convmix.datasets import DATASETS

FOLDER = Path(timm_convmix.__file__).parent / "recipes"
RECIPES = {path.stem: path for path in sorted(FOLDER.iterdir())}
OF_THE_DATA = {"num_classes", "input_size", "mean", "std", "hflip"}


def config(name):
    return yaml.safe_load(RECIPES[name].read_text())


def test_every_data_set_has_one():
    assert RECIPES.keys() == DATASETS.keys() | {"finetune"}
    assert all(RECIPES[name] == dataset.recipe for name, dataset in DATASETS.items())


@pytest.mark.parametrize("name", DATASETS)
def test_it_says_what_the_data_set_is(name):
    stated, dataset = config(name), DATASETS[name]
    assert stated["num_classes"] == dataset.classes
    assert stated["input_size"] == [3, dataset.size, dataset.size]
    assert (stated["mean"], stated["std"]) == (list(dataset.mean), list(dataset.std))
    assert stated["hflip"] == (0.5 if dataset.flip else 0.0)


def test_nothing_else_depends_on_the_data_set():
    first, *others = ({k: v for k, v in config(name).items() if k not in OF_THE_DATA} for name in DATASETS)
    assert all(other == first for other in others)


@pytest.mark.parametrize("name", RECIPES)
def test_the_head_says_how_to_run_it(name):
    head = RECIPES[name].read_text().split("\n\n")[0]
    assert all(line.startswith("#") for line in head.splitlines())
    assert f"python train.py -c {name}.yaml --data-dir DATA" in head
    assert "--model-kwargs mixer=none" in head
    assert (f"timm-convmix data {name} DATA" in head) == (name in DATASETS)


@pytest.mark.parametrize("name", RECIPES)
def test_values_are_what_yaml_takes_them_for(name):
    """YAML 1.1 takes 5e-4 for text, and a word such as 'no' for a truth value."""
    for key, value in config(name).items():
        for item in value if isinstance(value, list) else [value]:
            assert isinstance(item, numbers.Number) or not item.replace("e-", "").replace(".", "").isdigit(), key
    assert [key for key, value in config(name).items() if isinstance(value, bool)] == [
        key for key in config(name) if key in ("pretrained", "sched_on_updates")
    ]


@pytest.mark.parametrize("name", RECIPES)
def test_the_model_takes_the_images(name):
    stated = config(name)
    assert stated["device_modules"] == ["timm_convmix"]
    assert is_model(stated["model"])
    assert is_model_pretrained(stated["model"]) or not stated.get("pretrained")
    model = timm.create_model(stated["model"], num_classes=stated.get("num_classes", 7), device="meta").eval()
    logits = model(torch.empty(2, *stated["input_size"], device="meta"))
    assert logits.shape == (2, stated.get("num_classes", 7))


def parse(monkeypatch, *arguments):
    """What train.py itself makes of a command line, and the names that it knows."""
    spec = importlib.util.spec_from_file_location("train", Path(SCRIPTS) / "train.py")
    train = importlib.util.module_from_spec(spec)  # a new one, since a parser keeps the defaults of a config
    spec.loader.exec_module(train)
    known = {action.dest for action in train.parser._actions}
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
    return vars(train._parse_args()[0]), known


@needs_scripts
@pytest.mark.parametrize("name", RECIPES)
def test_train_py_reads_it(name, monkeypatch):
    args, known = parse(monkeypatch, "-c", RECIPES[name], "--data-dir", "DATA", "--model-kwargs", "mixer=none")
    assert config(name).keys() <= known
    assert {key: args[key] for key in config(name)} == config(name)
    assert (args["data_dir"], args["model_kwargs"]) == ("DATA", {"mixer": "none"})
    plain, _ = parse(monkeypatch)
    assert {key: type(args[key]) for key in config(name) if plain[key] is not None} == {
        key: type(plain[key]) for key in config(name) if plain[key] is not None
    }


@needs_scripts
def test_train_py_runs_it(digits, tmp_path):
    """With a smaller model, for one epoch; nothing but the recipe registers the model."""
    smaller = ["--model", "convmix_test_resnet", "--epochs", 1, "--warmup-epochs", 0]
    here = ["--device", "cpu", "--workers", 0, "--no-prefetcher", "--output", tmp_path, "--experiment", "run"]
    script(tmp_path, "train.py", "-c", RECIPES["svhn"], "--data-dir", digits, *smaller, *here)
    with (tmp_path / "run" / "summary.csv").open() as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["0"]
    saved = yaml.safe_load((tmp_path / "run" / "args.yaml").read_text())
    assert (saved["lr"], saved["smoothing"], saved["scale"]) == (0.1, 0.0, [0.73, 1.0])

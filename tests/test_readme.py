"""The shell commands of the README; its Python snippets are collected from the file itself."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import timm
from families import FAMILIES
from test_training import needs_scripts, script

from timm_convmix import predict
from timm_convmix.convmix import manifest
from timm_convmix.stems import BACKBONES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("block", blocks("bash"))
def test_commands(block):
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    done = subprocess.run(
        ["bash", "-ec", block], cwd=ROOT, env={"PATH": path}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_numbers():
    if f"with timm {timm.__version__}\n" not in README:
        pytest.skip("the README counts what another release of timm has")
    variants = timm.list_models("convmix_*")
    assert f"  # {len(variants)} with timm {timm.__version__}\n" in README
    assert f"any of the {len(variants)} architectures" in README
    assert f"CNNs and hybrids of {len(FAMILIES) - 1} modules" in README
    assert f"; {len(BACKBONES)} backbones for small images" in README
    model = timm.create_model("convmix_resnet50", device="meta")
    added = sum(p.numel() for p in model.mixer.parameters()) / sum(p.numel() for p in model.backbone.parameters())
    assert f"{added:.1%} to ResNet-50".replace("%", " %") in README


def test_what_the_embedded_pairs_are_worth():
    pairs = {name: record for name, record in manifest.items() if record.embedded and record.baseline}
    assert len(pairs) == 3
    for name, record in pairs.items():
        own, plain = record.metrics.top1, record.baseline.metrics.top1
        stated = rf"`{re.escape(name)}` with top-1 {own:.2f} %[^%]* \(its plain baseline {plain:.2f} %\)"
        assert re.search(stated, " ".join(README.split()))


def test_what_the_photographs_are_taken_for():
    rows = predict(ROOT / "examples" / "images", topk=3)
    stated = re.findall(r"^\| (\w+ 0\.\d\d, .+) \| (.+) \|$", README, re.MULTILINE)
    assert len(stated) == 1
    words = [word.split() for cell in stated[0] for word in cell.split(", ")]
    assert [label for label, _ in words] == [row["label"] for row in rows]
    assert [float(value) for _, value in words] == pytest.approx([row["probability"] for row in rows], abs=0.01)


def test_ci_installs_and_tests_as_the_readme_says():
    ci = (ROOT / ".ci" / "run").read_text().splitlines()
    install, tests = blocks("sh")
    assert install.splitlines()[-1].replace("pip install", "pip install --quiet") in ci
    assert tests.strip() in ci


@needs_scripts
def test_fine_tuning(digits, tmp_path):
    (command,) = blocks("train")
    python, name, *arguments = shlex.split(command.replace("DATA", str(digits)))
    assert (python, name) == ("python", "train.py")
    script(tmp_path, name, *arguments, "--output", tmp_path)
    assert next(tmp_path.rglob("summary.csv")).read_text().count("\n") == 3

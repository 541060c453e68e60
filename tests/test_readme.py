"""The shell commands of the README; its Python snippets are collected from the file itself."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from test_training import needs_scripts, script

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

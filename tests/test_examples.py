"""Recipes of examples/ that need more than the test extra; each runs where its package is installed."""

import csv
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from timm_convmix import predict

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_ray_goes_on_where_it_was_stopped(digits, tmp_path):
    pytest.importorskip("ray")
    images, output = tmp_path / "images", tmp_path / "classes"
    shutil.copytree(digits / "validation" / "3", images / "three")
    shutil.copytree(digits / "validation" / "4", images / "four")
    broken = images / "four" / "broken.png"
    broken.write_bytes(b"no image")

    def run():
        command = [sys.executable, EXAMPLES / "predict_with_ray.py", images, output, "--workers", 2, "--shard-size", 20]
        return subprocess.run([*map(str, command)], check=True, capture_output=True, text=True).stdout

    def stamps():
        return {path: path.stat().st_mtime_ns for path in output.glob("*.csv")}

    run()
    before = stamps()
    assert len(before) > 2
    lost = min(before)
    lost.unlink()
    (output / f".{lost.name}.123").write_text("what a kill leaves")
    assert run().startswith(f"1 of {len(before)} shards to do")
    assert {path for path, stamp in stamps().items() if before[path] != stamp} == {lost}

    rows = [row for path in stamps() for row in csv.DictReader(path.read_text(encoding="utf-8").splitlines())]
    got = {row["file"]: (row["label"], row["probability"]) for row in rows if not row["error"]}
    skipped = []
    expected = predict(images.resolve(), topk=1, on_skip=lambda *skip: skipped.append(skip), quiet=True)
    assert {file: label for file, (label, _) in got.items()} == {row["file"]: row["label"] for row in expected}
    for row in expected:
        assert float(got[row["file"]][1]) == pytest.approx(row["probability"], abs=1e-4)
    assert [(row["file"], row["error"]) for row in rows if row["error"]] == skipped == [(str(broken), skipped[0][1])]

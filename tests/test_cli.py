import csv
import io
import json
import subprocess
import sys

import pytest
import timm

from timm_convmix import cli, list_weights
from timm_convmix.cli.output import as_table


def run(capsys, *arguments):
    status = cli.main(arguments)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_list_knows_every_tag(capsys):
    status, out, _ = run(capsys, "list", "--json")
    rows = json.loads(out)
    assert status == 0
    assert [row["name"] for row in rows] == timm.list_models("convmix_*", include_tags=True)
    assert {row["name"] for row in rows if row["weights"]} == {
        name for name in timm.list_pretrained("convmix_*") if "." in name
    }


def test_list_filters_by_name_weights_and_licence(capsys):
    _, out, _ = run(capsys, "list", "resnet18*", "--license", "cc-by-nc-*", "--json")
    rows = json.loads(out)
    assert rows == list_weights("convmix_resnet18.fb_*")
    assert {(row["weights"], row["license"]) for row in rows} == {("warm start", "cc-by-nc-4.0")}
    assert rows[0]["source"].startswith("timm/resnet18.fb_")
    _, out, _ = run(capsys, "list", "resnet50_mlp", "--pretrained", "--json")
    assert json.loads(out) == []


def test_list_as_a_table(capsys):
    _, out, _ = run(capsys, "list", "resnet18.a1_in1k")
    header, row = out.splitlines()
    assert header.split() == ["name", "weights", "source", "license"]
    assert row.split() == ["convmix_resnet18.a1_in1k", "warm", "start", "timm/resnet18.a1_in1k", "apache-2.0"]
    assert run(capsys, "list", "no_such_net")[1] == "nothing matches\n"


def test_numbers_of_a_table():
    values = [None, 0.0, 0.25, -0.00006, 8.2e-07, 3]
    lines = as_table([dict(x=value) for value in values]).splitlines()
    assert lines == ["x", "-", "0.0000", "0.2500", "-0.0001", "8.2e-07", "3"]


def test_list_as_csv(capsys):
    _, out, _ = run(capsys, "list", "resnet18*", "--format", "csv")
    rows = [{key: value or "" for key, value in row.items()} for row in list_weights("resnet18*")]
    assert list(csv.DictReader(io.StringIO(out))) == rows
    assert run(capsys, "list", "no_such_net", "--format", "csv")[1] == "\n"


@pytest.mark.parametrize(
    "arguments", [["--help"], ["list", "--help"], ["run", "--help"], ["predict", "--help"], ["--version"]]
)
def test_it_explains_itself(arguments, capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(arguments)
    captured = capsys.readouterr()
    assert "timm-convmix" in captured.out
    assert captured.err == ""


def test_alone_it_explains_itself_too(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--help"])
    explanation = capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        cli.main([])
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", explanation)
    assert {"list", "run"} <= {line.split()[0] for line in explanation.splitlines() if line}


def test_expected_errors_are_one_line(capsys, monkeypatch):
    def fail(pattern):
        raise OSError("the disk is gone")

    monkeypatch.setattr("timm_convmix.cli.models.list_weights", fail)
    assert run(capsys, "list") == (1, "", "timm-convmix list: the disk is gone\n")


def test_as_a_module():
    command = [sys.executable, "-m", "timm_convmix", "list", "resnet18.a1_in1k", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)[0]["name"] == "convmix_resnet18.a1_in1k"

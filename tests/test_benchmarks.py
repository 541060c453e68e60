"""The benchmarks: what they count, the order in which they time, that their bars can fail, what they write."""

import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch import nn

from benchmarks import cost, startup, timing
from benchmarks.timing import Figures, Row

CONDITIONS = dict(
    device="CPU",
    threads=1,
    clock="wall",
    load=0.5,
    torch="2",
    timm="1",
    python="3",
    seed=0,
    date="2026-01-01",
    argv="a b",
)


def row(ratio=1.0, low=1.0, high=1.0, pairs=20, **labels):
    labels = dict(part="measure", base="resnet18", other="convmix_resnet18", metric="inference_ms") | labels
    labels = dict(mode="eager", batch=1, input="3x224x224") | labels
    return Row(ratio, low, high, pairs, 10.0, 10.0 * ratio, **labels, **CONDITIONS)


def count_row(metric, ratio, **labels):
    return row(ratio, ratio, ratio, 0, metric=metric, batch=8, **labels)


# Timing ---------------------------------------------------------------------------------------------------------------


class Machine:
    """A clock that moves only when something is called: by 2 s and 3 s, ever slower."""

    def __init__(self, drift=0.0):
        self.now, self.calls, self.drift = 0.0, [], drift

    def call(self, name, seconds):
        self.calls.append(name)
        self.now += seconds * (1 + self.drift * len(self.calls))

    def functions(self):
        return lambda: self.call("base", 2), lambda: self.call("other", 3)


def test_the_order_alternates():
    machine = Machine()
    samples = timing.interleave(*machine.functions(), pairs=3, number=2, clock=lambda: machine.now)
    assert machine.calls == ["base"] * 2 + ["other"] * 4 + ["base"] * 4 + ["other"] * 2
    assert samples == [(2, 3)] * 3


def test_a_drifting_machine_favours_neither():
    machine = Machine(drift=0.001)
    figures = timing.compare(*machine.functions(), seconds=500, clock=lambda: machine.now)
    assert figures.ratio == pytest.approx(1.5, abs=1e-4)
    assert figures.low <= figures.ratio <= figures.high
    assert figures.pairs % 2 == 0


def test_there_are_enough_pairs_and_long_enough_samples():
    machine = Machine()
    assert timing.compare(*machine.functions(), seconds=0, clock=lambda: machine.now).pairs == timing.MIN_PAIRS
    calls = []
    fast = lambda: calls.append(0)  # noqa: E731
    figures = timing.compare(fast, fast, seconds=0, clock=timing.CLOCKS["process"])
    assert len(calls) > 100 * figures.pairs


def test_interval_of_the_median():
    assert timing.median_interval(list(range(20, 0, -1))) == (6, 15)  # 95.9 %, as tables of the sign test say for 20
    assert timing.median_interval([2, 1]) == (1, 2)
    intervals = [timing.median_interval(draws.tolist()) for draws in torch.empty(1000, 31).exponential_()]
    assert 0.95 < sum(low <= math.log(2) <= high for low, high in intervals) / 1000 < 0.98


# Counting -------------------------------------------------------------------------------------------------------------


def test_counts_by_hand():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 8 * 8, 10))
    images = torch.randn(2, 3, 8, 8)
    assert cost.count_params(model, images) == 3 * 4 * 9 + 256 * 10 + 10
    assert cost.count_macs(model, images) == 8 * 8 * 4 * 3 * 9 + 256 * 10
    activations = 3 * 64 + 4 * 64  # the convolution keeps the image; ReLU and the linear layer keep the same storage
    assert cost.count_saved_bytes(model, images) == 2 * activations * 4


def test_counts_of_resnet50():
    """He et al. 2015 give 3.8e9 multiplications for the stride in the 1x1 convolutions; timm's has it in the 3x3."""
    plain, mixed = cost.build_pair("resnet50", "convmix_resnet50", "meta")
    images = torch.zeros(1, 3, 224, 224, device="meta")
    assert cost.count_macs(plain, images) == 4_089_184_256
    assert cost.count_params(plain, images) == 25_557_032
    added = cost.count_macs(mixed, images) - cost.count_macs(plain, images)
    assert added == sum(p.numel() for name, p in mixed.mixer.named_parameters() if p.ndim == 2 and "norms" not in name)
    assert cost.split_macs(mixed, images) == (cost.count_macs(plain, images), cost.count_macs(mixed, images))


def test_a_twin_shares_its_backbone_and_a_larger_one_does_not():
    plain, mixed = cost.build_pair("test_resnet", "convmix_test_resnet", "meta")
    assert plain is mixed.backbone
    plain, larger = cost.build_pair("test_resnet", "test_efficientnet", "meta")
    assert type(plain) is not type(larger)


def test_a_training_step_reaches_every_parameter_and_changes_none():
    _, model = cost.build_pair("test_resnet", "convmix_test_resnet", "cpu")
    before = [p.clone() for p in model.parameters()]
    cost.training_step(model, model, torch.randn(2, 3, 32, 32))()
    assert all(p.grad is not None for p in model.parameters())
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


# Bars -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("measured", "failing"),
    [
        (row(1.03, low=1.009, high=1.05), False),  # the interval reaches below the bar
        (row(1.03, low=1.011, high=1.05), True),
        (row(1.03, low=1.011, high=1.05, base="efficientnet_b0"), False),  # a mobile net
        (row(1.03, low=1.021, high=1.05, base="efficientnet_b0"), True),
        (count_row("macs", 1.0051), True),
        (count_row("params", 1.0799), False),
        (count_row("params", 1.0801), True),
        (row(1.5, low=1.5, high=1.5, base="tiny_cifar"), False),  # no bar
        (row(1.5, low=1.5, high=1.5, input="3x64x64"), False),
        (row(1.5, low=1.5, high=1.5, part="larger", other="resnet34"), False),
        (count_row("params", 1.099, part="census"), False),
        (count_row("params", 1.101, part="census"), True),
    ],
)
def test_a_bar_fails_where_the_whole_interval_is_above(measured, failing):
    assert cost.fails(measured) is failing


@pytest.mark.parametrize(("check", "status"), [(["--check"], 1), ([], 0)])
def test_a_failing_bar_is_named_and_fails_the_check(check, status, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cost, "run", lambda *_: [row(), count_row("params", 1.2)])
    assert cost.main(["--archs", "resnet18", "--results", str(tmp_path), *check]) == status
    assert capsys.readouterr().out == "convmix_resnet18, parameters, batch 8: 1.2000 is over 1.08\n"
    monkeypatch.setattr(cost, "run", lambda *_: [row()])
    assert cost.main(["--archs", "resnet18", "--results", str(tmp_path), *check]) == 0


def test_creation_has_a_bar():
    assert startup.fails(row(1.2, low=1.11, metric="create_ms"))
    assert not startup.fails(row(1.2, low=1.09, metric="create_ms"))
    assert not startup.fails(row(2.0, low=2.0, metric="import_s"))


def test_the_process_clock_counts_one_thread(capsys):
    with pytest.raises(SystemExit):
        cost.main(["--clock", "process", "--threads", "2"])
    assert "add --threads 1" in capsys.readouterr().err


# CSV and tables -------------------------------------------------------------------------------------------------------


def test_rows_come_back_and_the_last_of_a_key_counts(tmp_path):
    path = tmp_path / "new" / "cost.csv"
    assert timing.read_rows(path) == []
    old, other, new = row(1.1), row(1.0, batch=8), replace(row(1.2), load=3.0)
    timing.append_rows(path, [old, other])
    timing.append_rows(path, [new])
    assert timing.read_rows(path) == [new, other]
    assert path.read_text().count("ratio") == 1
    assert len(path.read_text().splitlines()) == 4


def test_processes_that_begin_a_table_at_once_write_one_header(tmp_path):
    rows = [row(1.0, batch=batch) for batch in range(1, 9)]
    with ThreadPoolExecutor(len(rows)) as threads:
        for number in range(20):
            path = tmp_path / f"{number}.csv"
            list(threads.map(lambda one, path=path: timing.append_rows(path, [one]), rows))
            assert sorted(found.batch for found in timing.read_rows(path)) == list(range(1, 9))


def test_a_command_names_no_folder_of_this_machine(tmp_path):
    argv = ["python", f"--save={tmp_path / 'nets'}", "--data", str(tmp_path / "tiny"), "--lr=0.1", "a=b/c"]
    assert timing.conditions(device="cpu", threads=1, clock="wall", seed=0, argv=argv)["argv"] == (
        "python --save=nets --data tiny --lr=0.1 c"
    )


def test_tables():
    rows = [
        row(1.0123, low=1.011, high=1.02),
        row(1.004, low=0.99, high=1.01, batch=8),
        count_row("macs", 1.00012),
        row(2.0, low=1.9, high=2.1, part="larger", other="resnet34"),
        row(1.001, low=1.0, high=1.002, part="scaling", input="3x64x64"),
    ]
    census = [count_row("params", 1 + i / 1000, part="census", base=f"arch{i}") for i in range(1, 111)]
    census += [count_row("macs", 1.0, part="census", base=f"arch{i}") for i in range(1, 111)]
    text = cost.render(rows, census)
    for line in (
        "|  | MACs | inference, batch 1 | inference, batch 8 |",
        "| resnet18, eager | 1.0001 | **1.012 (1.011 to 1.020)** | 1.004 (0.990 to 1.010) |",
        "| bar (mobile nets) | 1.005 (1.005) | 1.01 (1.02) | 1.01 (1.02) |",
        "| resnet34 to resnet18 | 2.000 (1.900 to 2.100) |",
        "| resnet18, 3x64x64 | 1.001 (1.000 to 1.002) |",
        "| parameters | 1.0010 | 1.0550 | 1.0990 | 1.1090 | 1.1100 (arch110) | 10 of 110 |",
    ):
        assert line in text.splitlines()
    assert "CPU, 1 thread(s), wall clock, load 0.5 to 0.5, torch 2, timm 1, Python 3, 2026-01-01;" in text
    assert "`a b`" in text


@pytest.mark.parametrize(("name", "command"), [("cost", cost), ("startup", startup)])
def test_the_tables_are_written_and_compared(name, command, tmp_path, capsys):
    rows = [
        row(metric="create_ms" if name == "startup" else "inference_ms", mode=mode) for mode in ("eager", "compiled")
    ]
    timing.append_rows(tmp_path / f"{name}.csv", rows)
    page, readme = tmp_path / "cost.md", tmp_path / "README.md"
    for path in (page, readme):
        path.write_text(f"before\n<!-- {name}:begin -->\nold\n<!-- {name}:end -->\nafter\n")
    arguments = ["table", "--results", str(tmp_path), "--page", str(page)]
    if name == "cost":
        arguments += ["--readme", str(readme)]
    assert command.main([*arguments, "--check"]) == 1
    assert "cost.md differs" in capsys.readouterr().out
    assert command.main([*arguments, "--write"]) == 0
    assert command.main([*arguments, "--check"]) == 0
    assert command.main(arguments) == 0
    table = capsys.readouterr().out
    assert page.read_text() == f"before\n<!-- {name}:begin -->\n{table}<!-- {name}:end -->\nafter\n"
    if name == "cost":
        assert "compiled" in table
        assert "eager" in readme.read_text()
        assert "compiled" not in readme.read_text()
    page.write_text("nothing")
    readme.write_text(f"<!-- {name}:begin -->\nold\n<!-- {name}:end -->")
    for option in ("--check", "--write"):
        with pytest.raises(ValueError, match=rf"cost.md needs one line <!-- {name}:begin --> and one"):
            command.main([*arguments, option])
    assert "old" in readme.read_text()  # all is written, or nothing


@pytest.mark.parametrize("command", [cost, startup])
def test_the_repository_s_tables_are_what_the_commands_print(command):
    assert command.main(["table", "--check"]) == 0


# From the command line ------------------------------------------------------------------------------------------------


def test_cost_of_a_small_net(tmp_path):
    options = ["--archs", "test_resnet", "--size", "64", "--batch", "1", "2", "--seconds", "0", "--threads", "1"]
    assert cost.main([*options, "--results", str(tmp_path)]) == 0
    rows = timing.read_rows(tmp_path / "cost.csv")
    assert [(r.metric, r.batch) for r in rows] == [
        ("training_ms", 1),
        ("inference_ms", 1),
        ("macs", 2),
        ("params", 2),
        ("saved_bytes", 2),
        ("training_ms", 2),
        ("inference_ms", 2),
    ]
    assert all((r.base, r.other, r.input) == ("test_resnet", "convmix_test_resnet", "3x64x64") for r in rows)
    assert all(r.argv.startswith("python -m benchmarks.cost --archs test_resnet --size 64") for r in rows)


def test_a_backbone_that_cannot_train_on_one_image_is_left_out(tmp_path, capsys):
    options = ["--archs", "test_resnet", "--size", "32", "--batch", "1", "--seconds", "0", "--threads", "1"]
    assert cost.main([*options, "--results", str(tmp_path)]) == 0
    assert "training_ms" not in {r.metric for r in timing.read_rows(tmp_path / "cost.csv")}
    assert "test_resnet, training step at batch 1: Expected more than 1 value" in capsys.readouterr().err


def test_keeping_the_heap_starts_over_with_another_allocator(tmp_path, monkeypatch):
    started = []

    def start(command, env, **_):
        started.append((command, {name: env[name] for name in cost.KEEP_HEAP}))
        return subprocess.CompletedProcess(command, 3)

    monkeypatch.setattr(subprocess, "run", start)
    options = ["--archs", "test_resnet", "--results", str(tmp_path), "--keep-heap"]
    assert cost.main(options) == 3
    assert started == [([sys.executable, "-m", "benchmarks.cost", *options], cost.KEEP_HEAP)]
    for name, value in cost.KEEP_HEAP.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(cost, "run", lambda *_: [])
    assert cost.main(options) == 0


@pytest.mark.parametrize(
    ("options", "mode"),
    [([], "eager"), (["--compile", "--channels-last", "--keep-heap"], "compiled, channels_last, heap kept")],
)
def test_the_mode_is_named(options, mode):
    assert cost.name_mode(cost.build_parser().parse_args(options)) == mode


def test_census_of_one_family(tmp_path):
    for _ in range(2):  # the second replaces the first
        assert cost.main(["census", "--pattern", "convmix_test_r*", "--check", "--results", str(tmp_path)]) == 0
    rows = timing.read_rows(tmp_path / "census.csv")
    assert {r.base for r in rows} == {"test_resnet"}
    assert [r.metric for r in rows] == ["params", "macs"]
    assert len((tmp_path / "census.csv").read_text().splitlines()) == 3


def test_startup(tmp_path):
    options = ["--runs", "1", "--archs", "test_resnet", "--seconds", "0", "--threads", "1"]
    assert startup.main([*options, "--results", str(tmp_path)]) == 0
    rows = timing.read_rows(tmp_path / "startup.csv")
    assert [r.metric for r in rows] == ["import_s", "import_mib", "list_models_ms", "create_ms"]
    assert rows[0].ratio > 1
    assert isinstance(rows[0], Figures)

"""``timm-convmix run``: a script ends as it does alone, but knows the variants; timm's own scripts on real images."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent
from types import SimpleNamespace

import onnxruntime
import pytest
import timm
import torch
from safetensors.torch import load_file
from test_training import SCRIPTS, evaluate, loader, needs_scripts, train_one_epoch
from timm.utils import CheckpointSaver, random_seed

from timm_convmix import cli

VARIANT = "convmix_test_resnet"
SERVER = """
import gc, json, os, sys
from timm_convmix.cli import main

gc.freeze()  # a forked process need not go through all of torch when it ends
for line in sys.stdin:
    folder, *argv = json.loads(line)
    child = os.fork()
    if not child:
        for stream, path in enumerate([os.devnull, "stdout", "stderr"]):
            os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC), stream)
        os.chdir(folder)
        sys.exit(main(argv))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """``timm-convmix run ...`` in a process of its own, forked from one that has imported torch already (seconds)."""
    home = tmp_path_factory.mktemp("run")
    command = [sys.executable, "-c", SERVER]
    with subprocess.Popen(command, cwd=home, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:

        def call(folder, *arguments):
            server.stdin.write(json.dumps([str(folder), "run", *map(str, arguments)]) + "\n")
            server.stdin.flush()
            status = int(server.stdout.readline())
            return status, (home / "stdout").read_text(), (home / "stderr").read_text()

        yield call


@pytest.fixture
def write(tmp_path):
    """Write a script into a folder, and a module beside it; link to it from the folder above."""

    def write(source, name="script.py"):
        folder = tmp_path / "scripts"
        folder.mkdir()
        (folder / name).write_text(dedent(source))
        (folder / "beside.py").write_text("VALUE = 5\n")
        (tmp_path / "link.py").symlink_to(folder / name)
        return folder / name

    return write


# As if it had been run alone ------------------------------------------------------------------------------------------

FACTS = '''
    """What a script sees of itself."""
    import atexit, json, pickle, sys, threading, beside

    class Mine:
        pass

    def late():
        print(pickle.loads(pickle.dumps(Mine())).__class__, __name__)

    print(json.dumps([sys.argv, __name__, __file__, __doc__, __package__, __spec__, beside.VALUE, sys.path[0]]))
    print(type(__builtins__), sys.modules["__main__"].Mine is Mine, sys.excepthook is sys.__excepthook__)
    threading.Timer(0.2, late).start()
    atexit.register(late)
'''
CTRL_C = """
import os, signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that runs the tests in the background ignores it
os.kill(os.getpid(), signal.SIGINT)
"""
ENDS = {
    "at its end": (FACTS, 0),
    "with exit(None)": ("import sys; sys.exit()", 0),
    "with exit(3)": ("import sys; sys.exit(3)", 3),
    "with exit(text)": ("raise SystemExit('no images')", 1),
    "with an error": ("def f():\n    open('no such file')\n\nf()", 1),
    "with a chain of errors": ("try:\n    1 / 0\nexcept ZeroDivisionError as e:\n    raise ValueError(1) from e", 1),
    "with its own hook": ("import sys\nsys.excepthook = lambda *what: print(what[:2])\n1 / 0", 1),
    "with Ctrl-C": (CTRL_C, -2),
    "before it starts": ("print(1)\nif print", 1),
}


@pytest.mark.parametrize(("end", "path"), [*((end, "scripts/script.py") for end in ENDS), ("at its end", "link.py")])
def test_a_script_ends_as_it_does_alone(end, path, run, write, tmp_path):
    source, status = ENDS[end]
    write(source)
    command = [path, "--", "--help", "--json", "-v", "run", "", "--x=1 2"]
    alone = subprocess.run([sys.executable, *command], cwd=tmp_path, check=False, capture_output=True, text=True)
    assert alone.returncode == status
    assert run(tmp_path, *command) == (status, alone.stdout, alone.stderr)


def test_as_a_module_that_keeps_the_folder_out(write):
    """``python -P -m timm_convmix run``"""
    script = write("import sys, timm\nprint(timm.is_model('convmix_test_resnet'))\nimport beside")
    done = subprocess.run(
        [sys.executable, "-m", "timm_convmix", "run", script],
        env=os.environ | {"PYTHONSAFEPATH": "1"},
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "True\n"
    assert ("No module named 'beside'" in done.stderr) == hasattr(sys.flags, "safe_path")


def test_processes_of_a_script_know_the_variants(run, write):
    script = write(
        """
        import sys
        import timm
        from torch.utils.data import DataLoader
        from beside import VALUE

        NAMES = timm.list_models("convmix_test_resne*")

        def build(batch):
            return NAMES, VALUE, sum(p.numel() for p in timm.create_model(NAMES[0]).parameters())

        if __name__ == "__main__":
            for method in sys.argv[1:]:
                print(*DataLoader([0], collate_fn=build, num_workers=1, multiprocessing_context=method))
        """
    )
    size = sum(p.numel() for p in timm.create_model(VARIANT).parameters())
    status, out, err = run(script.parent, script.name, "fork", "spawn", "forkserver")
    assert (status, out.splitlines()) == (0, [str(([VARIANT], 5, size))] * 3), err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: SCRIPT"),
        (["missing.py"], "can't open file 'missing.py': No such file or directory"),
        (["folder"], "can't open file 'folder': Is a directory"),
        (["image.png"], "'image.png' is not a Python script"),
        (["--json", "script.py"], "the following arguments are required: SCRIPT"),
    ],
)
def test_what_is_not_a_script_is_named(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "image.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR")
    with pytest.raises(SystemExit, match="2"):
        cli.main(["run", *arguments])
    usage, error = capsys.readouterr().err.splitlines()
    assert usage == "usage: timm-convmix run [-h] SCRIPT [ARGS ...]"
    assert error.startswith("timm-convmix run: error: ")
    assert error.endswith(message)


def test_torchrun(write):
    script = write(
        """
        import sys
        import timm, torch
        import torch.distributed as dist
        from beside import VALUE

        dist.init_process_group("gloo")
        rank = torch.tensor(dist.get_rank())
        dist.all_reduce(rank)
        with open(f"{sys.argv[1]}{dist.get_rank()}", "w") as file:
            print(rank.item(), VALUE, timm.is_model("convmix_test_resnet"), file=file)
        dist.destroy_process_group()
        """
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    subprocess.run([*launcher, "-m", "timm_convmix", "run", script, "rank"], cwd=script.parent, check=True)
    assert [(script.parent / f"rank{rank}").read_text() for rank in (0, 1)] == ["1 5 True\n"] * 2


# timm's scripts, on real images ---------------------------------------------------------------------------------------

NET = ["--model", VARIANT, "--num-classes", 10]
DATA = ["--img-size", 32, "--crop-pct", 1.0, "--device", "cpu", "--workers", 0]


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory):
    """Two epochs on the digits, saved as train.py saves them, and what the net says of the validation images."""
    folder = tmp_path_factory.mktemp("trained")
    random_seed(0)  # the fixture that seeds every test runs after this one
    model = timm.create_model(VARIANT, num_classes=10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    saver = CheckpointSaver(model, optimizer, checkpoint_dir=str(folder), recovery_dir=str(folder))
    own = dict(mean=model.pretrained_cfg["mean"], std=model.pretrained_cfg["std"])
    images, validation = loader(digits, "train", **own), loader(digits, "validation", **own)
    for epoch in range(2):
        train_one_epoch(model, images, optimizer)
        accuracy, _ = evaluate(model, validation)
        saver.save_checkpoint(epoch, metric=100 * accuracy)
    assert accuracy > 0.7
    images = torch.cat([image for image, _ in validation])
    with torch.no_grad():
        logits = model(images)
    last = folder / "last.pth.tar"
    return SimpleNamespace(folder=folder, last=last, top1=100 * accuracy, images=images, logits=logits)


@pytest.fixture
def timm_script(run, tmp_path):
    """Run one of timm's scripts; returns the result that it prints for bulk_runner.py to read."""

    def call(name, *arguments):
        status, out, err = run(tmp_path, Path(SCRIPTS, name).absolute(), *arguments)
        assert status == 0, err
        return out.partition("--result")[2]

    return call


@needs_scripts
def test_validate(timm_script, digits, trained):
    result = timm_script("validate.py", *NET, *DATA, "--data-dir", digits, "--checkpoint", trained.last)
    assert json.loads(result)["top1"] == pytest.approx(trained.top1, abs=1e-3)


@needs_scripts
def test_inference(timm_script, digits, trained, tmp_path):
    pytest.importorskip("pandas")
    options = ["--label-type", "none", "--include-index", "--fullname", "--results-file", "own.csv"]
    timm_script("inference.py", *NET, *DATA, "--data-dir", digits, "--checkpoint", trained.last, *options)
    with (tmp_path / "own.csv").open() as file:
        rows = list(csv.DictReader(file))
    probabilities, classes = trained.logits.softmax(1).max(1)
    assert [int(row["index"]) for row in rows] == classes.tolist()
    assert [float(row["prob"]) for row in rows] == pytest.approx(probabilities.tolist(), abs=1e-4)
    right = [row["filename"].split("/")[0] == row["index"] for row in rows]
    assert 100 * sum(right) / len(right) == pytest.approx(trained.top1)


@needs_scripts
def test_benchmark(timm_script):
    options = ["--img-size", 32, "--batch-size", 2, "--num-warm-iter", 1, "--num-bench-iter", 5, "--device", "cpu"]
    result = json.loads(timm_script("benchmark.py", *NET, *options))
    size = sum(p.numel() for p in timm.create_model(VARIANT, num_classes=10).parameters())
    assert result["param_count"] == round(size / 1e6, 2)
    assert result["infer_samples_per_sec"] > result["train_samples_per_sec"] > 0


@needs_scripts
def test_onnx_export(timm_script, trained, tmp_path):
    timm_script("onnx_export.py", "net.onnx", *NET, "--img-size", 32, "--checkpoint", trained.last, "--check-forward")
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    (logits,) = session.run(None, {session.get_inputs()[0].name: trained.images.numpy()})
    assert (torch.from_numpy(logits) - trained.logits).abs().max() < 1e-4


@needs_scripts
def test_avg_checkpoints(timm_script, trained, tmp_path):
    options = ["--filter", "checkpoint-*", "--output", "mean.safetensors", "--safetensors"]
    timm_script("avg_checkpoints.py", "--input", trained.folder, *options)
    files = [trained.folder / f"checkpoint-{epoch}.pth.tar" for epoch in (0, 1)]
    both = [torch.load(file, weights_only=False)["state_dict"] for file in files]
    mean = load_file(tmp_path / "mean.safetensors")
    assert mean.keys() == both[0].keys()
    assert all(torch.allclose(mean[name], (both[0][name] + both[1][name]) / 2, atol=1e-6) for name in mean)
    timm.create_model(VARIANT, num_classes=10, checkpoint_path=str(tmp_path / "mean.safetensors"))


@needs_scripts
def test_bulk_runner(timm_script, digits, trained, tmp_path):
    """Its children are fresh processes: its own --module starts them as ``python -m timm_convmix run validate.py``."""
    child = ["--module", "yes", "timm_convmix", "run", Path(SCRIPTS, "validate.py").absolute()]
    options = ["--model-list", "convmix_test_resne*", "--results-file", "own.csv"]
    options += [*child, *NET[2:], *DATA, "--data-dir", digits, "--checkpoint", trained.last]
    timm_script("bulk_runner.py", *options)
    with (tmp_path / "own.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["model"] for row in rows] == [VARIANT]
    assert float(rows[0]["top1"]) == pytest.approx(trained.top1, abs=1e-3)

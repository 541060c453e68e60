"""Processes as fresh as new ones, in milliseconds: forked from one that imported what takes long, and used none of it.

    with Forks(folder, package) as forks:
        client = forks.start("cli", ["pull", "--json"], env=client_env(hub, home))
        assert client.wait().status == 0

A process has its own environment, which the Hub's client reads anew; it imports timm_convmix itself where a folder is
named to take it from; and it waits for the Hub at once, noting how long it would have waited.
"""

# ruff: noqa: BLE001, PLC0415, S102, T201  (a process imports what it uses itself, and runs what it is given)

import importlib
import json
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping
from hashlib import sha256
from itertools import count
from pathlib import Path
from subprocess import CompletedProcess, Popen
from types import SimpleNamespace

# What a process does --------------------------------------------------------------------------------------------------


def cli(argv):
    """`timm-convmix ARGV`; a publication proves itself in this process instead of one more."""
    from timm_convmix import cli
    from timm_convmix.weights import publishing

    if os.environ.get("PROOF") != "real":
        publishing.subprocess = SimpleNamespace(run=prove_here)
    return cli.main(argv)


def prove_here(command, **kwargs):
    saved, sys.argv = sys.argv, ["-c", *command[3:]]
    try:
        exec(command[2], {"__name__": "__main__"})
    except SystemExit as end:
        reason = "" if end.code in (None, 0) else str(end.code)
    except Exception as error:
        reason = traceback.format_exception_only(error)[-1]
    finally:
        sys.argv = saved
    return CompletedProcess(command, bool(reason), "", reason)


def load(names, manifest=None, **kwargs):
    """Load each by `timm.create_model`; print the digest of its logits, or its error."""
    import timm
    import torch

    import timm_convmix
    from timm_convmix import convmix
    from timm_convmix.weights.manifest import read_manifest
    from timm_convmix.weights.measuring import probe_input

    if manifest:
        convmix.manifest.update(read_manifest(manifest))
    try:
        for name in names:
            model = timm.create_model(name, pretrained=True, **kwargs).eval()
            with torch.no_grad():
                logits = model(probe_input(model.pretrained_cfg["input_size"]))
            print(sha256(logits.numpy().tobytes()).hexdigest())
    except timm_convmix.ConvMixError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return 1
    return 0


def python(code):
    exec(code, {"__name__": "__main__"})
    return 0


ACTS = {act.__name__: act for act in (cli, load, python)}


# Where it comes from --------------------------------------------------------------------------------------------------


def wait_at_once():
    really = time.sleep

    def sleep(seconds):
        if seconds >= 0.5:
            with Path("waited").open("a") as file:
                file.write(f"{seconds}\n")
        really(min(seconds, 0.02))

    time.sleep = sleep


def become(folder, act, arguments, env, package):
    """Turn the forked process into what was asked for, and end it."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.chdir(folder)
    for stream, path in enumerate([os.devnull, "out", "err"]):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), stream)
    status = 1
    try:
        os.environ.clear()
        os.environ.update(env)
        import huggingface_hub.constants

        importlib.reload(huggingface_hub.constants)
        tempfile.tempdir = None
        if package:
            sys.path.insert(0, package)
        wait_at_once()
        status = ACTS[act](**arguments) if isinstance(arguments, dict) else ACTS[act](arguments)
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    Path("status.new").write_text(str(int(status or 0)))
    Path("status.new").rename("status")
    os._exit(0)


def answer(requests):
    for line in requests.makefile():
        if pid := os.fork():
            requests.sendall(f"{pid}\n".encode())
        else:
            become(**json.loads(line))
    os._exit(0)


def main():
    import timm  # noqa: F401
    import torch

    torch.set_num_threads(1)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the children: the system forgets them at once
    bare, ready = (socket.socket(fileno=int(number)) for number in sys.argv[1:])
    if os.fork():
        answer(bare)
    else:
        import timm_convmix.cli  # noqa: F401

        answer(ready)


# Where it is asked for ------------------------------------------------------------------------------------------------


class Client:
    """A process that was started; looks like `subprocess.Popen` as far as tests need it."""

    def __init__(self, folder: Path, pid: int, args):
        self.folder, self.pid, self.args = folder, pid, args

    def poll(self) -> int | None:
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            path = self.folder / "status"
            return int(path.read_text()) if path.exists() else -signal.SIGKILL
        return None

    def wait(self, timeout: float = 120) -> "Client":
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                self.kill()
                raise TimeoutError(f"Not ended after {timeout} s: {self.args}")
            time.sleep(0.005)
        return self

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        self.wait()

    status = property(lambda self: self.wait().poll())
    out = property(lambda self: (self.wait().folder / "out").read_text())
    err = property(lambda self: (self.wait().folder / "err").read_text())
    rows = property(lambda self: json.loads(self.out))

    @property
    def waited(self) -> list[float]:
        path = self.wait().folder / "waited"
        return [float(line) for line in path.read_text().split()] if path.exists() else []


class Forks:
    def __init__(self, folder: Path, package: Path):
        self.folder = folder
        self.numbers = count()
        self.clients: list[Client] = []
        pairs = [socket.socketpair() for _ in range(2)]
        theirs = [other.fileno() for _, other in pairs]
        env = os.environ | {"PYTHONPATH": str(package), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, *map(str, theirs)]
        self.process = Popen(command, env=env, pass_fds=theirs, cwd=folder)
        self.bare, self.ready = (own for own, _ in pairs)
        for _, other in pairs:
            other.close()

    def start(self, act: str, arguments, env: Mapping[str, str], package: Path | None = None) -> Client:
        folder = self.folder / str(next(self.numbers))
        folder.mkdir()
        requests = self.bare if package else self.ready
        job = dict(folder=str(folder), act=act, arguments=arguments, env=dict(env), package=package and str(package))
        requests.sendall((json.dumps(job) + "\n").encode())
        client = Client(folder, int(requests.recv(64)), [act, arguments])
        self.clients.append(client)
        return client

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for requests in (self.bare, self.ready):
            requests.close()  # the last line is read: they end
        self.process.wait(30)


if __name__ == "__main__":
    main()

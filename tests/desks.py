"""Users of a Hub, each with a folder, a cache and a token; their processes know that Hub alone."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
from forks import Client, Forks
from huggingface_hub import constants
from loopback_hub import Hub, client_env

from timm_convmix.weights.manifest import MANIFEST_NAME, read_manifest

NAME = "convmix_test_resnet.digits"
REPO = f"alice/{NAME}"

needs_unlinked_cache = pytest.mark.skipif(
    not hasattr(constants, "HF_HUB_DISABLE_SYMLINKS"), reason="this huggingface_hub cannot be told to use no links"
)


class Desk:
    """Where one user works: a folder with a manifest, a home with a cache, a token of a Hub."""

    def __init__(self, folder: Path, packed: SimpleNamespace, hub: Hub, forks: Forks, token: str | None):
        self.folder, self.packed, self.hub, self.forks, self.token = folder, packed, hub, forks, token
        self.manifest = folder / MANIFEST_NAME
        self.home = folder / "home"
        shutil.copy(packed.manifest, self.manifest)

    @property
    def record(self):
        return read_manifest(self.manifest)[NAME]

    def env(self, **extra: str) -> dict[str, str]:
        return client_env(self.hub, self.home, self.token, HF_HUB_DISABLE_PROGRESS_BARS="1", **extra)

    def start(self, verb: str, *argv: str, **extra: str) -> Client:
        """`timm-convmix VERB convmix_test_resnet.digits --json ARGV`"""
        given = [verb, NAME, "--json", "--manifest", str(self.manifest)]
        given += {"publish": ["--yes"], "verify": [], "pull": []}[verb]
        given += [] if verb == "pull" else ["--packed", str(self.packed.folders)]
        return self.forks.start("cli", [*given, *argv], self.env(**extra))

    def cli(self, *argv: str, package: Path | None = None, **extra: str) -> Client:
        """`timm-convmix ARGV`"""
        return self.forks.start("cli", argv, self.env(**extra), package).wait()

    def run(self, verb: str, *argv: str, **extra: str) -> Client:
        return self.start(verb, *argv, **extra).wait()

    def start_load(self, *names: str, package: Path | None = None, env: Mapping[str, str] = {}, **kwargs) -> Client:
        return self.forks.start("load", dict(names=names, **kwargs), self.env(**env), package)

    def load(self, *names: str, **kwargs) -> Client:
        return self.start_load(*names, **kwargs).wait()

    def fails(self, client: Client, *words: str) -> str:
        """The one line with which a verb fails, once it names all that it must."""
        assert client.status == 1, client.out + client.err
        *_, line = client.err.splitlines()
        verb = client.args[1][0]
        assert line.startswith(f"timm-convmix {verb}: "), client.err
        assert "Traceback" not in client.err
        assert client.out == ""
        assert not [word for word in words if word not in line], line
        return line

    def python(self, code: str, **extra: str) -> Client:
        return self.forks.start("python", code, self.env(**extra)).wait()

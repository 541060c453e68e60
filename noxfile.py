"""The cells of the matrix, each in an environment of its own: ``nox --list``, ``nox --session "tests-3.12(newest)"``.

What runs before a merge is ``.ci/run``, in one environment; this is for everything else.
"""

import nox

nox.options.default_venv_backend = "uv|virtualenv"
nox.options.sessions = ["lint"]

OLDEST = ("torch==2.5.*", "torchvision==0.20.*", "timm==1.0.31", "huggingface_hub==1.5.*", "safetensors==0.4.3")
"""The lower bounds of pyproject.toml, with the torchvision that belongs to that torch."""


@nox.session(python=["3.10", "3.11", "3.12", "3.13"])
@nox.parametrize("versions", ["newest", "oldest"], ids=["newest", "oldest"])
def tests(session: nox.Session, versions: str) -> None:
    """The whole suite, with the newest or the oldest versions that are declared; words after ``--`` go to pytest."""
    session.install(".[test]", *(OLDEST if versions == "oldest" else ()))
    session.run("pytest", *(session.posargs or ["-n", "auto"]))


@nox.session
def lint(session: nox.Session) -> None:
    """Format, style, types."""
    session.install(".[test]")
    session.run("ruff", "format", "--check", ".")
    session.run("ruff", "check", ".")
    session.run("mypy")


@nox.session
def docs(session: nox.Session) -> None:
    """The site, where a warning is an error."""
    session.install(".[docs]")
    session.run("sphinx-build", "-W", "docs", "docs/_build")


@nox.session
def integrations(session: nox.Session) -> None:
    """What is tested only where it is installed: libraries that build on timm, and the demo (in Chromium, if any)."""
    session.install(".[test,demo,ray]", "fastai", "lightning", "selenium", "transformers")
    tests = ("test_consumers.py", "test_demo.py", "test_examples.py", "test_packing.py")
    session.run("pytest", *(f"tests/{name}" for name in tests), "docs/integrations.md")

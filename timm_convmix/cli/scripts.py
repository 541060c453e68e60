"""Verb that runs somebody else's script in this process, where the variants are registered."""

import argparse
import builtins
import multiprocessing
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, TracebackType
from typing import NamedTuple

VERB = "run"


class Script(NamedTuple):
    """A script: its path as the user gave it, and what is in it."""

    path: str
    source: bytes


class ScriptPath(str):
    """``sys.argv[0]`` of a script.

    multiprocessing hands ``sys.argv`` to the processes that it spawns, before they import the script. To unpickle this
    type they import this package, so that they know the variants as well.
    """

    __slots__ = ()


def add_verbs(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add ``run``."""
    parser = verbs.add_parser(
        VERB,
        help="any script, such as timm's validate.py, with the variants registered",
        usage="%(prog)s [-h] SCRIPT [ARGS ...]",
        description="Run a Python script as `python SCRIPT ARGS...` would, with the convmix_* variants registered.\n"
        "timm's scripts are not in its wheel: take them from a checkout. They use the installed timm.",
        epilog="examples:\n"
        "  timm-convmix run validate.py --data-dir DATA --model convmix_resnet18 --checkpoint FILE\n"
        "  torchrun --nproc_per_node=2 -m timm_convmix run train.py --data-dir DATA --model convmix_resnet18\n"
        "  timm-convmix run bulk_runner.py --model-list 'convmix_resnet*' --module yes \\\n"
        "      timm_convmix run validate.py --data-dir DATA\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("script", metavar="SCRIPT", type=read_script, help="whatever follows it belongs to the script")


def split_arguments(argv: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    """What of a command line is ours to parse, and what belongs to a script (argparse would lose a ``--`` of it)."""
    end = 2 if argv[:1] == [VERB] else len(argv)
    return argv[:end], argv[end:]


def read_script(path: str) -> Script:
    """Read a script whose name stands on the command line.

    Raises:
        argparse.ArgumentTypeError: There is no such file, it cannot be read, or it is binary.
    """
    try:
        source = Path(path).read_bytes()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"can't open file {path!r}: {error.strerror}") from error
    if b"\0" in source:
        raise argparse.ArgumentTypeError(f"{path!r} is not a Python script")
    return Script(path, source)


def run_script(script: Script, arguments: Sequence[str]) -> None:
    """Run a script as ``python script arguments...`` would: this process becomes the script's.

    Unlike with ``runpy.run_path``, ``sys.argv[0]`` stays as given where ``__file__`` is absolute, ``__main__`` stays
    until the process ends, and a traceback shows the script's frames only.

    Args:
        script: What to run.
        arguments: The rest of ``sys.argv``.
    """
    path = Path(script.path).absolute()
    main = sys.modules["__main__"] = ModuleType("__main__")
    vars(main).update(__file__=str(path), __builtins__=builtins)
    sys.argv = [ScriptPath(script.path), *arguments]
    if not getattr(sys.flags, "safe_path", sys.flags.isolated):  # python -P, python -I
        sys.path[0] = str(path.resolve().parent)
    multiprocessing.set_forkserver_preload(["timm_convmix"])  # by default __main__, which needs the variants
    try:
        exec(compile(script.source, path, "exec", dont_inherit=True), vars(main))  # noqa: S102 (what the verb is for)
    except BaseException as error:
        hide_own_frames(error)
        raise


def hide_own_frames(error: BaseException) -> None:
    """If ``error`` ends the process, print its traceback from the frame that the present one called."""
    show, trace = sys.excepthook, error.__traceback__ and error.__traceback__.tb_next

    def excepthook(kind: type[BaseException], value: BaseException, whole: TracebackType | None) -> None:
        show(kind, *((value.with_traceback(trace), trace) if value is error else (value, whole)))

    sys.excepthook = excepthook

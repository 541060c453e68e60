"""The command ``timm-convmix``: verbs that parse, call one function of the library, and print what it returns."""

import argparse
import io
import sys
from collections.abc import Sequence

from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

from timm_convmix.cli import cam, data, demo, export, models, predict, scripts, weights
from timm_convmix.cli.output import FORMATS
from timm_convmix.errors import ConvMixError
from timm_convmix.version import __version__


def build_parser() -> argparse.ArgumentParser:
    """The parser with every verb.

    A verb's ``run`` takes the parsed arguments and returns rows of plain data, or such rows and an exit code.
    """
    parser = argparse.ArgumentParser(prog="timm-convmix", description="ConvMix twins of timm's architectures.")
    parser.add_argument("--version", action="version", version=f"timm-convmix {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    models.add_verbs(verbs)
    weights.add_verbs(verbs)
    predict.add_verbs(verbs)
    data.add_verbs(verbs)
    cam.add_verbs(verbs)
    demo.add_verbs(verbs)
    export.add_verbs(verbs)
    for verb in verbs.choices.values():
        verb.formatter_class = argparse.RawDescriptionHelpFormatter
        verb.add_argument("--format", choices=FORMATS, default="table", help="of what is printed (default: table)")
        verb.add_argument("--json", dest="format", action="store_const", const="json", help="the same as --format json")
        verb.add_argument("--quiet", action="store_true", help="no progress and no notes on stderr, only what failed")
    scripts.add_verbs(verbs)  # after these: what a script prints is its own affair
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb.

    Args:
        argv: Without the program's name; None takes the process's own.

    Returns:
        0 done, 1 failed, 130 interrupted; argparse itself exits with 2 on wrong usage. A script ends as it would alone.
    """
    own, of_script = scripts.split_arguments(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    if not own:
        parser.exit(2, parser.format_help())
    args = parser.parse_args(own)
    if args.verb == scripts.VERB:
        scripts.run_script(args.script, of_script)
        return 0
    if args.quiet:
        disable_progress_bars()
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # a file may have a name that no encoding has
    try:
        result = args.run(args)
        rows, status = result if isinstance(result, tuple) else (result, 0)
        if rows or not status:
            sys.stdout.write(FORMATS[args.format](rows) + "\n")
        sys.stdout.flush()
    except BrokenPipeError:  # `timm-convmix list | head`
        sys.stderr.close()
        return 0
    except (ConvMixError, OSError) as error:
        sys.stderr.write(f"timm-convmix {args.verb}: {error}\n")
        return 1
    except KeyboardInterrupt:
        return 130
    return status

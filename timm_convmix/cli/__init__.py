"""The command ``timm-convmix``: verbs that parse, call one function of the library, and print what it returns."""

import argparse
import json
import sys
from collections.abc import Sequence

from timm_convmix.cli import models
from timm_convmix.cli.output import as_table
from timm_convmix.errors import ConvMixError
from timm_convmix.version import __version__


def build_parser() -> argparse.ArgumentParser:
    """The parser with every verb; a verb's ``run`` takes the parsed arguments and returns rows of plain data."""
    parser = argparse.ArgumentParser(prog="timm-convmix", description="ConvMix twins of timm's architectures.")
    parser.add_argument("--version", action="version", version=f"timm-convmix {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    models.add_verbs(verbs)
    for verb in verbs.choices.values():
        verb.formatter_class = argparse.RawDescriptionHelpFormatter
        verb.add_argument("--json", action="store_true", help="print one JSON document instead of a table")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb.

    Args:
        argv: Without the program's name; None takes the process's own.

    Returns:
        0 done, 1 failed, 130 interrupted; argparse itself exits with 2 on wrong usage.
    """
    args = build_parser().parse_args(argv)
    try:
        rows = args.run(args)
        sys.stdout.write((json.dumps(rows, indent=2) if args.json else as_table(rows)) + "\n")
        sys.stdout.flush()
    except BrokenPipeError:  # `timm-convmix list | head`
        sys.stderr.close()
        return 0
    except (ConvMixError, OSError) as error:
        sys.stderr.write(f"timm-convmix {args.verb}: {error}\n")
        return 1
    except KeyboardInterrupt:
        return 130
    return 0

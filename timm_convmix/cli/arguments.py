"""Arguments that several verbs take."""

import argparse
from typing import Any

MODEL = "convmix_ARCH[.TAG], hf-hub:NAMESPACE/NAME, a packed folder, or a checkpoint"


def add_model(parser: argparse.ArgumentParser, name: str, **kwargs: Any) -> None:
    """Add the argument for a model, and the architecture of a checkpoint."""
    default = kwargs.get("default")
    parser.add_argument(name, **kwargs, help=MODEL + (f" (default: {default})" if default else ""))
    parser.add_argument("--arch", help="architecture of a checkpoint that does not say it")


def add_size(parser: argparse.ArgumentParser) -> None:
    """Add the argument for the height and width of images."""
    parser.add_argument(
        "--size",
        type=positive,
        nargs="+",
        action=Size,
        metavar="N",
        help="height and width of the image, or both at once",
    )


def positive(text: str) -> int:
    """A number of the command line that is at least 1."""
    if (number := int(text)) < 1:
        raise ValueError
    return number


class Size(argparse.Action):
    """One number for height and width, or two."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Keep (height, width)."""
        if len(values) > 2:
            parser.error(f"argument {option_string}: one number, or two: height and width")
        setattr(namespace, self.dest, (values[0], values[-1]))

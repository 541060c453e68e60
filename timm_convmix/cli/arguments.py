"""Arguments that several verbs take."""

import argparse
from typing import Any

MODEL = "convmix_ARCH[.TAG], hf-hub:NAMESPACE/NAME, a packed folder, or a checkpoint"


def add_model(parser: argparse.ArgumentParser, name: str, **kwargs: Any) -> None:
    """Add the argument for a model, and the architecture of a checkpoint."""
    default = kwargs.get("default")
    parser.add_argument(name, **kwargs, help=MODEL + (f" (default: {default})" if default else ""))
    parser.add_argument("--arch", help="architecture of a checkpoint that does not say it")


class Size(argparse.Action):
    """One positive number for height and width, or two."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Keep (height, width)."""
        if len(values) > 2 or min(values) < 1:
            parser.error(f"argument {option_string}: one positive number, or two: height and width")
        setattr(namespace, self.dest, (values[0], values[-1]))

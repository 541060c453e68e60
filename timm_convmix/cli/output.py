"""What a verb says: rows of plain data, as a table for a terminal, JSON or CSV for programs; the files it skips."""

import csv
import io
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

Rows = Sequence[dict[str, Any]]


def as_table(rows: Rows) -> str:
    """Align rows of the same keys under those keys; None is a dash, fractions have four decimals, tiny ones a power."""
    if not rows:
        return "nothing matches"
    table = [list(rows[0])] + [[_cell(value) for value in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in table)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.1e}" if 0 < abs(value) < 0.00005 else f"{value:.4f}"
    return "-" if value is None else str(value)


def as_json(rows: Rows) -> str:
    """One document, a list of objects."""
    return json.dumps(rows, indent=2)


def as_csv(rows: Rows) -> str:
    """A header and a line a row; None is an empty field."""
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return text.getvalue().removesuffix("\n")


FORMATS: dict[str, Callable[[Rows], str]] = {"table": as_table, "json": as_json, "csv": as_csv}


def skipping(verb: str) -> tuple[list[str], Callable[[str, str], None]]:
    """The files that were skipped, and what names another one on stderr, above a progress bar."""
    skipped: list[str] = []

    def skip(file: str, reason: str) -> None:
        skipped.append(file)
        tqdm.write(f"timm-convmix {verb}: {file}: {reason}", file=sys.stderr)

    return skipped, skip

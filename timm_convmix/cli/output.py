"""How rows of plain data look on a terminal."""

from collections.abc import Sequence
from typing import Any


def as_table(rows: Sequence[dict[str, Any]]) -> str:
    """Align rows of the same keys under those keys; None shows as a dash."""
    if not rows:
        return "nothing matches"
    table = [list(rows[0])] + [["-" if value is None else str(value) for value in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in table)

"""Where the record of this package's own weights stands."""

from pathlib import Path

MANIFEST_NAME = "weights_manifest.json"


def manifest_path() -> Path:
    """Find ``weights_manifest.json``: inside the installed package, or at the top of a checkout installed editable."""
    package = Path(__file__).resolve().parents[1]
    inside = package / MANIFEST_NAME
    return inside if inside.is_file() else package.parent / MANIFEST_NAME

"""What holds the package together: imports in one direction, public names, the manifest, the dependencies."""

import ast
import json
import sys
from importlib import metadata
from pathlib import Path

import pytest

import timm_convmix
from timm_convmix.weights.manifest import manifest_path

PACKAGE = Path(timm_convmix.__file__).parent
LAYERS = [  # a module imports from lines above its own only
    {"errors", "version"},
    {"stages", "mixers", "stems", "weights.manifest", "weights.hub"},
    {"model", "weights.loading", "weights.measuring", "weights.card", "datasets"},
    {"weights.packing", "weights.verifying"},
    {"weights.publishing", "weights.rebuilding"},
    {"convmix"},
    {"prediction", "saliency"},
    {"inspection"},
    {"pictures"},
    {"demo", "exporting"},
    {"cli.output", "cli.arguments"},
    {
        "cli.models",
        "cli.scripts",
        "cli.weights",
        "cli.predict",
        "cli.data",
        "cli.cam",
        "cli.demo",
        "cli.export",
    },
    {"cli"},
    {"__main__", "__init__", "weights"},
]
RUNTIME = {"torch", "timm", "huggingface_hub", "safetensors"}
OF_TIMM = {"PIL", "torchvision"}  # timm reads images with them, so they are there wherever timm is
EXTRAS = {"matplotlib", "gradio", "fastapi", "onnx", "onnxruntime", "onnxscript"}
"""Imported where one is needed, inside the function: everything else works without it."""


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        yield ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts), path


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def floor(name):
    return next(height for height, layer in enumerate(LAYERS) if name in layer)


@pytest.mark.parametrize(("name", "path"), list(modules()))
def test_imports_point_one_way(name, path):
    known = set().union(*LAYERS)
    for imported in imports(path):
        root, _, rest = imported.partition(".")
        if root != "timm_convmix":
            assert root in RUNTIME | OF_TIMM | EXTRAS | set(sys.stdlib_module_names), f"{name} imports {imported}"
            assert not imported.startswith("timm.") or "._" not in imported, f"{name} imports timm's private {imported}"
            continue
        target = next(t for t in (rest, rest.rpartition(".")[0]) if t in known)
        same_folder = name == target.rpartition(".")[0]
        assert floor(target) < floor(name) or same_folder, f"{name} imports {target}"


@pytest.mark.parametrize(("name", "path"), list(modules()))
def test_extras_are_imported_where_they_are_needed(name, path):
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            text = ast.unparse(node)
            assert not any(extra in text for extra in EXTRAS), f"{name}: {text}"


def test_public_names_exist():
    assert all(hasattr(timm_convmix, name) for name in timm_convmix.__all__)
    assert all(
        getattr(timm_convmix, name).__doc__ for name in timm_convmix.__all__ if callable(getattr(timm_convmix, name))
    )


def test_runtime_dependencies_are_four():
    required = [line for line in metadata.requires("timm-convmix") if "extra ==" not in line]
    assert {line.split(">")[0].strip().replace("-", "_") for line in required} == RUNTIME
    assert metadata.version("timm-convmix") == timm_convmix.__version__


def test_the_manifest_is_found():
    assert manifest_path().name == "weights_manifest.json"
    assert json.loads(manifest_path().read_text())["schema"] == 1


def test_the_manifest_is_found_in_a_wheel_and_in_a_checkout(tmp_path, monkeypatch):
    package = tmp_path / "timm_convmix"
    (package / "weights").mkdir(parents=True)
    monkeypatch.setattr("timm_convmix.weights.manifest.PACKAGE", package)
    assert manifest_path() == tmp_path / "weights_manifest.json"  # a checkout, installed editable
    (package / "weights_manifest.json").write_text("{}")
    assert manifest_path() == package / "weights_manifest.json"  # a wheel

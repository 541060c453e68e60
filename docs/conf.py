"""Sphinx: the site of timm-convmix. ``sphinx-build -W docs docs/_build`` fails on any warning."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import generate
from sphinx.application import Sphinx

import timm_convmix

project = "timm-convmix"
author = "The timm-convmix authors"
copyright = author  # noqa: A001  (Sphinx's name)
version = release = timm_convmix.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = "timm-convmix"

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
napoleon_numpy_docstring = False
suppress_warnings = ["autodoc.import_object"]


def setup(app: Sphinx) -> None:
    """Write what pages include, before they are read."""
    app.connect("builder-inited", lambda _: generate.main())

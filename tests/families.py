"""The timm modules that have variants, and a small backbone of each."""

import math

import timm

import timm_convmix  # noqa: F401  (registers the variants)
from benchmarks.timing import RESULTS, read_rows

FAMILIES = sorted(
    module
    for module in timm.list_modules()
    if module != "convmix" and any(timm.is_model(f"convmix_{arch}") for arch in timm.list_models(module=module))
)
PARAMS = {row.base: row.base_value for row in read_rows(RESULTS / "census.csv") if row.metric == "params"}


def smallest(family):
    """The backbone of a timm module with the fewest parameters, by the census, among those that have a variant."""
    archs = [arch for arch in timm.list_models(module=family) if timm.is_model(f"convmix_{arch}")]
    return min(archs, key=lambda arch: PARAMS.get(arch, math.inf))

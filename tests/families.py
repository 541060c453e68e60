"""The timm modules that have variants, and a small backbone of each."""

import functools

import timm
import torch

import timm_convmix  # noqa: F401  (registers the variants)

FAMILIES = sorted(
    module
    for module in timm.list_modules()
    if module != "convmix" and any(timm.is_model(f"convmix_{arch}") for arch in timm.list_models(module=module))
)


@functools.cache
def smallest(family):
    """The backbone of a timm module with the fewest parameters, among those that have a variant."""

    def size(arch):
        with torch.device("meta"):
            return sum(p.numel() for p in timm.create_model(arch).parameters())

    return min((arch for arch in timm.list_models(module=family) if timm.is_model(f"convmix_{arch}")), key=size)

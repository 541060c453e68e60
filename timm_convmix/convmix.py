"""The registry: every ``convmix_*`` entrypoint and cfg, derived from timm's, and the one decision what to load.

timm shows the last part of this module's name in ``list_models(module='convmix')``, and looks for ``default_cfgs`` and
``__all__`` here.
"""

import dataclasses
import sys
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import (
    DefaultCfg,
    PretrainedCfg,
    build_model_with_cfg,
    get_arch_pretrained_cfgs,
    get_pretrained_cfg,
    is_model,
    list_models,
    model_entrypoint,
    register_model,
    resolve_pretrained_cfg,
    split_model_name_tag,
)
from torch import nn

from timm_convmix.errors import FeatureError, WeightsError
from timm_convmix.model import ARCH_PREFIX, MODULE_PREFIX, ConvMixNet, wrapped_cfg_values
from timm_convmix.stems import register_backbones
from timm_convmix.weights.hub import WEIGHTS_NAME, hub_errors
from timm_convmix.weights.loading import (
    Filter,
    StateDict,
    count_classes,
    load_local,
    load_record,
    load_repository,
    load_strictly,
)
from timm_convmix.weights.manifest import Manifest, WeightRecord, embedded_path, read_manifest

__all__: list[str] = []
default_cfgs: dict[str, DefaultCfg] = {}
manifest: Manifest = {}
"""This package's own weights, ``arch.tag`` -> record."""


# What is registered ---------------------------------------------------------------------------------------------------


def register_variants() -> None:
    """Register ``convmix_<arch>`` for each architecture of timm whose cfg has a ``pool_size``, so a 2-D final map.

    The manifest's tags come first, so that trained weights are an architecture's default.
    """
    manifest.clear()
    manifest.update(read_manifest())
    trained: dict[str, dict[str, WeightRecord]] = {}
    for name in manifest:
        variant, tag = split_model_name_tag(name)
        trained.setdefault(variant, {})[tag] = manifest[name]
    for arch in list_models():
        variant = ARCH_PREFIX + arch
        cfgs = {} if arch.startswith(ARCH_PREFIX) else get_arch_pretrained_cfgs(arch)
        if not cfgs or next(iter(cfgs.values())).pool_size is None:
            continue
        derived = {split_model_name_tag(name)[1]: derived_cfg(cfg, name) for name, cfg in cfgs.items()}
        first = next(iter(derived.values()))
        records = trained.get(variant, {})
        own = {tag: record_cfg(record, first) for tag, record in records.items()}
        baselines = {tag: own.pop(tag) for tag in records if is_baseline(records[tag])}
        tags = own | derived | own  # first, and instead of timm's tags of the same name
        if len(tags) > 1:
            tags.pop("", None)  # timm would take it for the default wherever it stands
        tags |= baselines  # nobody's default
        default_cfgs[variant] = DefaultCfg(tags=deque(tags), cfgs=tags)  # timm's order: the first tag is the default
        known = is_model(variant)  # by an earlier import of this module, or by timm itself
        function = model_entrypoint(variant) if known else register_model(entrypoint(arch))
        setattr(sys.modules[__name__], variant, function)
    __all__[:] = default_cfgs


def derived_cfg(cfg: PretrainedCfg, name: str) -> PretrainedCfg:
    """The cfg of a variant's tag: the backbone's data, the wrapper's names.

    Args:
        cfg: The backbone's, as timm registered it (its Hub id resolved).
        name: ``arch.tag`` of the backbone.
    """
    note = f"timm's {name} as backbone; the mixer is untrained and starts as an identity."
    return dataclasses.replace(
        cfg,
        **wrapped_cfg_values(vars(cfg)),
        custom_load=False,
        description=note if cfg.has_weights else cfg.description,
    )


def record_cfg(record: WeightRecord, like: PretrainedCfg) -> PretrainedCfg:
    """The cfg of a manifest's entry.

    Args:
        record: The entry.
        like: The cfg of the same architecture's other weights, for the names of its modules.
    """
    scale = [own / other for own, other in zip(record.input_size[1:], like.input_size[1:], strict=True)]
    return PretrainedCfg(
        file=str(embedded_path(record)) if record.embedded else None,
        hf_hub_id=f"{record.hub_id}@{record.revision}" if record.state == "published" else None,
        hf_hub_filename=record.filename if record.state == "published" else None,
        architecture=like.architecture,
        input_size=record.input_size,
        fixed_input_size=like.fixed_input_size,
        pool_size=tuple(round(size * factor) for size, factor in zip(like.pool_size or (), scale, strict=True)),
        interpolation=record.interpolation,
        crop_pct=record.crop_pct,
        crop_mode=like.crop_mode,
        mean=record.mean,
        std=record.std,
        num_classes=record.num_classes,
        label_names=record.label_names,
        first_conv=like.first_conv,
        classifier=like.classifier,
        license=record.license,
        description=f"Trained on {record.dataset.name}: top-1 {record.metrics.top1:.2f} % ({record.dataset.split}).",
    )


def is_baseline(record: WeightRecord) -> bool:
    """Whether an entry is a plain backbone, kept for comparison."""
    return record.model_args.get("mixer") == "none"


def entrypoint(arch: str) -> Callable[..., nn.Module]:
    """The function that timm calls to build ``convmix_<arch>``."""

    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return create_variant(arch, pretrained, **kwargs)

    create.__name__ = create.__qualname__ = ARCH_PREFIX + arch
    create.__doc__ = f"``{arch}`` with its stages mixed into the final map; arguments as of ``create_variant``."
    return create


def list_weights(pattern: str = "*") -> list[dict[str, str | None]]:
    """What ``timm.create_model(name, pretrained=True)`` would load, for every tag of every variant.

    Args:
        pattern: Wildcards over ``arch`` or ``arch.tag``, with or without the prefix ``convmix_``.

    Returns:
        name; weights ('trained', 'warm start' or None); source, the Hub repository, the file in this package, or the
        address of the backbone's weights; license. Sorted by name as timm sorts.
    """
    rows = []
    for name in list_models(ARCH_PREFIX + pattern.removeprefix(ARCH_PREFIX), module="convmix", include_tags=True):
        cfg = get_pretrained_cfg(name)
        record = manifest.get(name)
        source = cfg.hf_hub_id or cfg.url or (record and record.embedded)
        weights = "trained" if record else "warm start"
        rows.append(dict(name=name, weights=weights if source else None, source=source, license=cfg.license))
    return rows


# What is built --------------------------------------------------------------------------------------------------------


def create_variant(
    arch: str,
    pretrained: bool = False,
    *,
    stages: Sequence[int] | None = None,
    mixer: str | None = None,
    mixer_args: dict[str, Any] | None = None,
    pretrained_cfg: str | dict[str, Any] | PretrainedCfg | None = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    cache_dir: str | Path | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Build a variant; ``timm.create_model`` comes here.

    Args:
        arch: The backbone's architecture in timm.
        pretrained: Load weights. Those of the plain backbone start the model as exactly that backbone; those of a
            ``ConvMixNet`` are loaded strictly. A file, a folder or a repository may hold either.
        stages: See ``ConvMixNet``.
        mixer: See ``ConvMixNet``; None is what the weights were trained with, the default without such weights.
        mixer_args: See ``ConvMixNet``.
        pretrained_cfg: A tag, or a cfg.
        pretrained_cfg_overlay: Values that replace the cfg's; ``file`` names a file of the user's own.
        cache_dir: Of huggingface_hub.
        **kwargs: ``features_only`` and ``out_indices``, and all that the backbone takes.

    Returns:
        A ``ConvMixNet``, or with ``features_only=True`` timm's extractor around one.

    Raises:
        ConvMixError: One of its kinds; nothing half loaded is ever returned.
        TypeError: The backbone does not know an argument.
    """
    cfg = resolve_pretrained_cfg(ARCH_PREFIX + arch, pretrained_cfg, pretrained_cfg_overlay)
    tagged = f"{arch}.{cfg.tag}"
    plain = tagged if tagged in get_arch_pretrained_cfgs(arch) else arch
    record = find_record(f"{ARCH_PREFIX}{arch}", cfg)
    # an architecture's name alone is built as this version builds it, a weight as it was trained
    trained_args = record.model_args if record and (pretrained or pretrained_cfg) else {}
    given_args = dict(stages=stages, mixer=mixer, mixer_args=mixer_args) | kwargs
    kwargs = trained_args | {key: value for key, value in given_args.items() if value is not None}
    mix = {key: kwargs.pop(key) for key in ("stages", "mixer", "mixer_args") if key in kwargs}
    tensors = find_tensors(cfg, record, plain, cache_dir) if pretrained else None
    is_mixed = tensors is not None and all(name.startswith((MODULE_PREFIX, "mixer.")) for name in tensors)
    given = "num_classes" in (pretrained_cfg_overlay or {})
    fresh_head = given or "num_classes" in kwargs
    if tensors is not None and not fresh_head:  # the file decides
        classifier = cfg.classifier if is_mixed else get_pretrained_cfg(plain).classifier
        if (found := count_classes(tensors, classifier)) is not None:
            kwargs["num_classes"] = found

    def construct(**backbone_args: Any) -> ConvMixNet:
        from_timm = pretrained and tensors is None
        with hub_errors(f"{ARCH_PREFIX}{plain}", cfg.hf_hub_id or cfg.url or "timm"):
            backbone = timm.create_model(plain, pretrained=from_timm, cache_dir=cache_dir, **backbone_args)
        model = ConvMixNet(backbone, **mix, warm_start=pretrained and not is_mixed)
        if tensors is not None:
            load_strictly(
                model if is_mixed else backbone,
                tensors,
                source=f"{ARCH_PREFIX}{tagged}" if record else str(cfg.file or cfg.hf_hub_id or "The state dict"),
                fresh_head=fresh_head,
                num_classes=cfg.num_classes if given else None,
                filter_fn=family_filter(arch, is_mixed=is_mixed),
            )
        return model

    if kwargs.get("features_only"):
        if kwargs.pop("feature_cls", "getter") != "getter":
            raise FeatureError(
                "feature_cls: ConvMix models extract features through timm's 'getter' only; leave it out."
            )
        if "out_indices" not in kwargs:
            kwargs["out_indices"] = default_out_indices(arch)
    return build_model_with_cfg(
        construct,
        ARCH_PREFIX + arch,
        pretrained=False,  # construct has loaded them
        pretrained_cfg=dataclasses.replace(cfg, state_dict=None, file=None if record else cfg.file).to_dict(),
        feature_cfg=dict(feature_cls="getter"),
        **kwargs,
    )


def find_record(variant: str, cfg: PretrainedCfg) -> WeightRecord | None:
    """The manifest's entry that a cfg stands for; None where it points elsewhere."""
    name = f"{variant}.{cfg.tag}"
    if name not in manifest or cfg.state_dict:
        return None
    return manifest[name] if _location(cfg) == _location(get_pretrained_cfg(name)) else None


def _location(cfg: PretrainedCfg) -> tuple[str | None, ...]:
    return cfg.hf_hub_id, cfg.hf_hub_filename, cfg.url, cfg.file, cfg.source


def find_tensors(
    cfg: PretrainedCfg, record: WeightRecord | None, plain: str, cache_dir: str | Path | None
) -> StateDict | None:
    """Get the tensors that a cfg points to, or None where it points to what timm itself has for the backbone.

    Args:
        cfg: Resolved.
        record: The manifest's entry, where the cfg stands for one.
        plain: The backbone's name in timm, with its tag if it has one.
        cache_dir: Of huggingface_hub.

    Raises:
        WeightsError: There are no weights, they cannot be read, or (ChecksumError) they are not those recorded.
        HubError: They cannot be fetched.
    """
    if record:
        return load_record(record, name=f"{cfg.architecture}.{cfg.tag}", cache_dir=cache_dir)
    if cfg.state_dict:
        return cfg.state_dict
    if cfg.source != "hf-hub" and cfg.file:
        return load_local(Path(cfg.file))
    registered = get_pretrained_cfg(plain)
    if cfg.source != "hf-hub" and (cfg.hf_hub_id, cfg.url) == (registered.hf_hub_id, registered.url):
        if not cfg.has_weights:
            raise WeightsError(f"timm has no pretrained weights for {plain}: use pretrained=False or another tag.")
        return None
    what = ARCH_PREFIX + plain
    if not cfg.hf_hub_id:
        raise WeightsError(f"{what}: download {cfg.url} and pass pretrained_cfg_overlay=dict(file=...).")
    filename = cfg.hf_hub_filename or WEIGHTS_NAME
    return load_repository(cfg.hf_hub_id, manifest, what=what, filename=filename, cache_dir=cache_dir)


def family_filter(arch: str, *, is_mixed: bool = False) -> Filter | None:
    """The conversion that timm keeps beside an architecture, by its name there: foreign names, other window sizes.

    Args:
        arch: Of the backbone.
        is_mixed: For the tensors of a ``ConvMixNet``, where the conversion sees the backbone's part alone.
    """
    convert: Filter | None = getattr(sys.modules[model_entrypoint(arch).__module__], "checkpoint_filter_fn", None)
    if convert is None or not is_mixed:
        return convert

    def convert_backbone(tensors: StateDict, model: Any) -> StateDict:
        inner = {name.removeprefix(MODULE_PREFIX): tensors[name] for name in tensors if name.startswith(MODULE_PREFIX)}
        outer = {name: tensors[name] for name in tensors if not name.startswith(MODULE_PREFIX)}
        return outer | {MODULE_PREFIX + name: tensor for name, tensor in convert(inner, model.backbone).items()}

    return convert_backbone


def default_out_indices(arch: str) -> tuple[int, ...]:
    """The stages that ``timm.create_model(arch, features_only=True)`` returns."""
    with torch.device("meta"):
        return tuple(timm.create_model(arch, features_only=True).feature_info.out_indices)


register_backbones()
register_variants()

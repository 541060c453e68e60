"""Which stages of a backbone are tapped: pure decisions over timm's feature info, no tensors."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from timm_convmix.errors import StageError

FeatureInfo = list[dict[str, Any]]
"""One dict a stage, shallow to deep: at least num_chs (channels), reduction (stride to the image), module (name)."""

MAX_TAPS = 3
"""Default taps at most; the deepest stage is not among them, because the final map is made of it."""


def read_feature_info(feature_info: Iterable[Mapping[str, Any]] | None, *, name: str) -> FeatureInfo:
    """Copy a backbone's feature info (a timm ``FeatureInfo`` or its list of dicts).

    Args:
        feature_info: What ``backbone.feature_info`` holds, shallow to deep.
        name: The backbone's name, for the message.

    Raises:
        StageError: There are fewer than two stages, so nothing to mix into the deepest one.
    """
    info = [dict(stage) for stage in feature_info or ()]
    if len(info) < 2:
        raise StageError(
            f"{name} has {len(info)} stage(s) in its feature_info, and mixing needs at least 2:"
            " choose a backbone that timm can run with features_only=True and several stages."
        )
    return info


def choose_stages(count: int, stages: Sequence[int] | None = None, *, name: str = "this backbone") -> tuple[int, ...]:
    """Pick the stages to tap, by position in the feature info.

    By position and not by reduction, so that the choice is the same under every ``output_stride``.

    Args:
        count: How many stages the backbone has, at least 2.
        stages: Positions in the feature info, negative ones from the end; None takes the up to three stages
            before the deepest.
        name: The backbone's name, for the message.

    Returns:
        Ascending positions in ``range(count)``.

    Raises:
        StageError: ``stages`` is empty, repeats a stage, holds something else than integers, or is out of range.
    """
    if stages is None:
        return tuple(range(max(0, count - 1 - MAX_TAPS), count - 1))
    chosen = _positions(count, stages, argument="stages", name=name)
    if not chosen:
        raise StageError(f"stages=() taps nothing of {name}; for the plain backbone use mixer='none'.")
    if len(set(chosen)) < len(chosen):
        raise StageError(f"stages={tuple(stages)!r} names a stage of {name} twice.")
    return tuple(sorted(chosen))


def take_indices(count: int, indices: int | Sequence[int] | None, *, name: str) -> list[int]:
    """Resolve timm's ``indices`` / ``out_indices``: None is all stages, an integer the last n, else positions.

    Returns:
        Ascending positions in ``range(count)``, each once, the order in which timm's own models return them.

    Raises:
        StageError: A position, or the number of last stages, is out of range, or there is none.
    """
    if indices is None:
        return list(range(count))
    if isinstance(indices, int):
        if not 0 < indices <= count:
            raise StageError(f"out_indices={indices} asks for the last {indices} stages of {name}, which has {count}.")
        return list(range(count - indices, count))
    if not (positions := _positions(count, indices, argument="out_indices", name=name)):
        raise StageError(f"out_indices=() asks for no stage of {name}, which has {count}.")
    return sorted(set(positions))


def _positions(count: int, indices: Sequence[int], *, argument: str, name: str) -> list[int]:
    """Check integers against the range of stages and count negative ones from the end."""
    valid = f"{name} has stages 0 to {count - 1}, or -{count} to -1 from the end"
    if isinstance(indices, str) or not isinstance(indices, Iterable):
        raise StageError(f"{argument}={indices!r} is not a sequence of integers; {valid}.")
    if any(isinstance(index, bool) or not isinstance(index, int) for index in indices):
        raise StageError(f"{argument}={tuple(indices)!r} must hold integers only; {valid}.")
    if outside := [index for index in indices if not -count <= index < count]:
        raise StageError(f"{argument}={tuple(indices)!r}: {', '.join(map(str, outside))} out of range; {valid}.")
    return [index % count for index in indices]

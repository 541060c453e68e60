"""Bytes to tensors to a strictly loaded model."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from timm.models import load_pretrained, load_state_dict
from torch import Tensor, nn

from timm_convmix.errors import WeightsError
from timm_convmix.weights.hub import WEIGHTS_NAME

StateDict = dict[str, Tensor]
OPTIONAL = ".num_batches_tracked"
"""Absent from checkpoints older than torch 0.4.1; torch fills it in."""

Filter = Callable[[StateDict, nn.Module], StateDict]


def read_state_dict(path: str | Path) -> StateDict:
    """Read a safetensors file, a train.py checkpoint (EMA weights first, as timm does), or a folder of ``save_for_hf``.

    A checkpoint is read with torch's ``weights_only`` loader; of a folder only ``model.safetensors`` is.

    Raises:
        WeightsError: The file is absent, corrupt, truncated, or holds something else than tensors.
    """
    path = Path(path)
    file = path / WEIGHTS_NAME if path.is_dir() else path
    if not file.is_file():
        raise WeightsError(f"{file}: no such weight file; a folder must hold {WEIGHTS_NAME}, a pickle is not loaded.")
    try:
        state_dict = load_state_dict(str(file))
    except SafetensorError as error:
        raise WeightsError(
            f"{file} is not a sound safetensors file ({error}); get it again from its source."
        ) from error
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise WeightsError(
            f"{file} cannot be read as a checkpoint ({reason}); get it again from its source."
        ) from error
    if not state_dict or not all(isinstance(tensor, Tensor) for tensor in state_dict.values()):
        raise WeightsError(f"{file} holds no state dict: expected names and tensors.")
    return state_dict


def names_of(names: str | Sequence[str] | None) -> list[str]:
    """The ``classifier`` or ``first_conv`` of a timm cfg as a list: it may be none, one or several."""
    return [names] if isinstance(names, str) else list(names or [])


def count_classes(state_dict: StateDict, classifier: str | Sequence[str] | None) -> int | None:
    """Outputs of the classifier in a state dict; None where there is none of that name."""
    weights = [f"{name}.weight" for name in names_of(classifier)]
    return next((state_dict[name].shape[0] for name in weights if name in state_dict and state_dict[name].ndim), None)


def load_strictly(
    model: Any,
    state_dict: StateDict,
    *,
    source: str,
    fresh_head: bool = False,
    num_classes: int | None = None,
    filter_fn: Filter | None = None,
) -> None:
    """Load a state dict into a timm model, adapting head and stem as timm does and refusing every other difference.

    timm itself stops being strict as soon as the class counts differ: a file of another architecture would then load
    nothing, and only a log line would say so.

    Args:
        model: With timm's ``pretrained_cfg``, ``num_classes`` and ``in_chans``.
        state_dict: Names as in ``model`` once ``filter_fn`` has seen them.
        source: Where the tensors come from, for the message.
        fresh_head: Whether the model may keep its own head where the source's has another class count, or none.
        num_classes: Of the source; None counts its classifier's outputs.
        filter_fn: The family's own conversion of foreign names and shapes.

    Raises:
        WeightsError: Something else than the replaced head or the stem's input channels differs.
    """
    cfg: dict[str, Any] = dict(model.pretrained_cfg, state_dict=state_dict, source=None, label_offset=0)
    classifiers = names_of(cfg.get("classifier"))
    heads = {f"{name}.{leaf}" for name in classifiers for leaf in ("weight", "bias")}
    stems = [f"{name}.weight" for name in names_of(cfg.get("first_conv"))]
    refused = f"{source} is not a checkpoint of {cfg.get('architecture', type(model).__name__)}"

    def fit(tensors: StateDict, model: Any) -> StateDict:
        try:
            tensors = dict(filter_fn(tensors, model) if filter_fn else tensors)
        except Exception as error:
            raise WeightsError(f"{refused}: its names or shapes are of another family.") from error
        own = model.state_dict()
        cfg["num_classes"] = count_classes(tensors, cfg.get("classifier")) if num_classes is None else num_classes
        free = heads if fresh_head and cfg["num_classes"] != model.num_classes else set()
        if free and model.num_classes == 0:  # a norm that stands beside the classifier goes with it in some families
            parents = {f"{name.rpartition('.')[0]}." for name in classifiers} - {".", "backbone."}
            free = free | {name for name in tensors.keys() - own.keys() if name.startswith(tuple(parents))}
        faults = {
            "missing": {name for name in own.keys() - tensors.keys() - free if not name.endswith(OPTIONAL)},
            "unexpected": tensors.keys() - own.keys() - free,
            "of another shape": {
                name
                for name in own.keys() & tensors.keys() - free
                if _fixed_shape(own[name], name in stems) != _fixed_shape(tensors[name], name in stems)
            },
        }
        if any(faults.values()):
            raise WeightsError(
                f"{refused}: {'; '.join(_listed(fault, sorted(names)) for fault, names in faults.items() if names)}."
                " Create the model with the architecture, stages, mixer and num_classes it was saved with."
            )
        for stem in own.keys() & stems:  # how many of the stem's input planes an image channel feeds is the family's
            channels = tensors[stem].shape[1] * model.in_chans // own[stem].shape[1]
            cfg["input_size"] = (channels, *cfg["input_size"][1:])
        return tensors

    load_pretrained(model, cfg, num_classes=model.num_classes, in_chans=model.in_chans, filter_fn=fit)


def _fixed_shape(tensor: Tensor, is_stem: bool) -> tuple[int, ...]:
    """The sizes that a source must share: of a stem's weight all but the input channels, which can be adapted."""
    return (*tensor.shape[:1], *tensor.shape[2:], tensor.ndim) if is_stem else tuple(tensor.shape)


def _listed(fault: str, names: list[str]) -> str:
    return f"{len(names)} {fault} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"

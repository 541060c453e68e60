"""The record of this package's own weights: what ``weights_manifest.json`` may say, read strictly, written atomically.

The dataclasses here are the only definition. They check themselves when they are made, read JSON, and give the JSON
Schema that ships beside this file.
"""

import dataclasses
import json
import math
import os
import re
import sys
import tempfile
import types
from contextlib import AbstractContextManager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

from timm_convmix.errors import ManifestError

MANIFEST_NAME = "weights_manifest.json"
SCHEMA = 1
PACKAGE = Path(__file__).resolve().parents[1]
EXACT = 2**53 - 1
"""The largest integer that every reader of JSON keeps exactly (RFC 8259, section 6)."""


# Types of single values -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pattern:
    """What a whole string must match, in words and as a regular expression that JSON Schema knows too."""

    words: str
    regex: str


@dataclass(frozen=True)
class Range:
    """Least and greatest number, both allowed."""

    low: float
    high: float = math.inf


Name = Annotated[str, Pattern("convmix_<arch>.<tag>", r"convmix_[a-z0-9_]+\.[a-z0-9_]+")]
HubId = Annotated[  # what huggingface_hub's own check lets through, and has both parts
    str,
    Pattern(
        "NAMESPACE/NAME",
        r"(?!.*(--|\.\.|\.git$))[A-Za-z0-9]([A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?/[A-Za-z0-9]([A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?",
    ),
]
Revision = Annotated[str, Pattern("a commit of 40 hexadecimal digits", r"[0-9a-f]{40}")]
Sha256 = Annotated[str, Pattern("64 hexadecimal digits", r"[0-9a-f]{64}")]
Filename = Annotated[
    str, Pattern("the plain name of a .safetensors file", r"[A-Za-z0-9](\.?[A-Za-z0-9_-])*\.safetensors")
]
Text = Annotated[str, Pattern("text", r"[^\x00-\x1f]+")]
Date = Annotated[str, Pattern("YYYY-MM-DD", r"[0-9]{4}-[0-9]{2}-[0-9]{2}")]
Dtype = Literal["float32", "float16", "bfloat16"]
Percent = Annotated[float, Range(0, 100)]
Positive = Annotated[int, Range(1)]


# Records --------------------------------------------------------------------------------------------------------------


class Checked:
    """A dataclass whose values are fitted to their types when it is made, so that an invalid one cannot exist."""

    def __post_init__(self) -> None:
        for name, hint in type_hints(type(self)).items():
            object.__setattr__(self, name, fit(hint, getattr(self, name), name))


@dataclass(frozen=True, kw_only=True)
class Metrics(Checked):
    """What an evaluation gave: top-1 and top-5 accuracy in percent, mean cross-entropy in nats, images counted."""

    top1: Percent
    top5: Percent
    loss: Annotated[float, Range(0)]
    count: Positive


@dataclass(frozen=True, kw_only=True)
class Dataset(Checked):
    """What was learned and measured. ``checksum`` is that of the images measured, see ``packing.dataset_checksum``."""

    name: Text
    split: Text
    checksum: Sha256
    source: Text | None = None
    revision: Text | None = None


@dataclass(frozen=True, kw_only=True)
class Baseline(Checked):
    """The same backbone without mixer, trained by the same recipe and seed."""

    name: Name
    metrics: Metrics


@dataclass(frozen=True, kw_only=True)
class Probe(Checked):
    """Logits of a fixed input (``packing.probe_input``): the five largest, with how far another machine may differ."""

    classes: tuple[Annotated[int, Range(0)], ...]
    logits: tuple[float, ...]
    tolerance: Annotated[float, Range(0)]


@dataclass(frozen=True, kw_only=True)
class Base(Checked):
    """The weights that a fine-tuned model started from."""

    name: Text
    license: Text


@dataclass(frozen=True, kw_only=True)
class WeightRecord(Checked):
    """One weight: where it is, what its bytes are, what it was made from and what it measured.

    ``packed`` is trained and verified, on no Hub yet; ``published`` names a repository and the commit that holds it.
    ``embedded`` names a file inside this package that holds the same bytes. ``dtype`` is that of the stored tensors.
    """

    state: Literal["packed", "published"]
    filename: Filename = "model.safetensors"
    sha256: Sha256
    bytes: Positive
    hub_id: HubId | None = None
    revision: Revision | None = None
    embedded: Filename | None = None
    dtype: Dtype = "float32"

    model_args: dict[str, Any]
    num_classes: Positive
    label_names: tuple[Text, ...]
    input_size: tuple[Positive, Positive, Positive]
    mean: tuple[float, ...]
    std: tuple[Annotated[float, Range(1e-6)], ...]
    interpolation: Text
    crop_pct: Annotated[float, Range(0.01, 1)]

    dataset: Dataset
    metrics: Metrics
    baseline: Baseline | None = None
    probe: Probe

    recipe: dict[str, Any]
    seeds: tuple[int, ...]
    epochs: Positive
    versions: dict[str, str]
    hardware: Text
    base: Base | None = None
    license: Text
    date: Date

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.state == "published") != (self.hub_id is not None and self.revision is not None):
            raise ManifestError(f"state: {self.state!r} does not go with hub_id {self.hub_id} at {self.revision}")
        if len(self.label_names) != self.num_classes:
            raise ManifestError(f"label_names: {len(self.label_names)} names for {self.num_classes} classes")
        if not len(self.mean) == len(self.std) == self.input_size[0]:
            raise ManifestError(f"mean, std: {len(self.mean)} and {len(self.std)} for {self.input_size[0]} channels")
        if len(self.probe.classes) != len(self.probe.logits):
            raise ManifestError(f"probe: {len(self.probe.classes)} classes, {len(self.probe.logits)} logits")
        if outside := [index for index in self.probe.classes if index >= self.num_classes]:
            raise ManifestError(f"probe.classes: {outside[0]} is none of {self.num_classes} classes")


Manifest = dict[str, WeightRecord]
"""``arch.tag`` -> record."""


def type_hints(cls: type) -> dict[str, Any]:
    """Field name -> type, with the ``Annotated`` limits."""
    return get_type_hints(cls, include_extras=True)


def fit(hint: Any, value: Any, key: str) -> Any:  # noqa: PLR0911  (one a kind of type)
    """Turn a JSON value into one of a type, or refuse it.

    Args:
        hint: Type, as the records here use them.
        value: As ``json.loads`` gives it, or already of that type.
        key: Where it stands, for the message.

    Raises:
        ManifestError: The value is of another type, or outside the limits.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        inner = fit(arguments[0], value, key)
        return _limited(inner, arguments[1], key)
    if origin in (Union, types.UnionType):  # X | None
        return None if value is None else fit(arguments[0], value, key)
    if origin is Literal:
        if value not in arguments:
            raise ManifestError(f"{key}: {value!r} is none of {', '.join(map(repr, arguments))}")
        return value
    if origin is tuple:
        return _tuple(arguments, value, key)
    if origin is dict:
        value = _object(value, key)
        return {name: fit(arguments[1], value[name], f"{key}.{name}") for name in value}
    if isinstance(hint, type) and issubclass(hint, Checked):
        return value if isinstance(value, hint) else _record(hint, value, key)
    return _any(value, key) if hint is Any else _single(hint, value, key)


def _any(value: Any, key: str) -> Any:
    """Whatever JSON holds; a tuple becomes the list that it is read back as."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, list | tuple):
        return [_any(item, f"{key}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, dict):
        return fit(dict[str, Any], value, key)
    if type(value) not in (str, int, float):
        raise ManifestError(f"{key}: {_short(value)} is no JSON value")
    return _single(type(value), value, key)


def _single(hint: Any, value: Any, key: str) -> Any:
    """A string, an integer (a bool is none here) or a number, such as UTF-8 and JSON can hold."""
    if hint is str and _is_text(value):
        return value
    if hint is int and type(value) is int and abs(value) <= EXACT:
        return value
    if hint is float and type(value) in (int, float) and abs(value) <= sys.float_info.max:  # NaN is not
        return float(value)
    raise ManifestError(f"{key}: {_short(value)} is no {hint.__name__}{' of at most 2^53 - 1' * (hint is int)}")


def _is_text(value: Any) -> bool:
    """Whether it is a string without lone surrogates, which no file can hold."""
    return isinstance(value, str) and value == value.encode(errors="ignore").decode()


def _limited(value: Any, limit: Pattern | Range, key: str) -> Any:
    if isinstance(limit, Pattern):
        if not re.fullmatch(limit.regex, value, re.ASCII):
            raise ManifestError(f"{key}: {_short(value)} is not {limit.words}")
    elif not limit.low <= value <= limit.high:
        raise ManifestError(f"{key}: {_short(value)} is outside {limit.low} to {limit.high}")
    return value


def _tuple(arguments: tuple[Any, ...], value: Any, key: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise ManifestError(f"{key}: {_short(value)} is no list")
    hints = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
    if len(value) != len(hints):
        raise ManifestError(f"{key}: {len(value)} values instead of {len(hints)}")
    return tuple(
        fit(hint, item, f"{key}[{index}]") for index, (hint, item) in enumerate(zip(hints, value, strict=True))
    )


def _object(value: Any, key: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(map(_is_text, value)):
        raise ManifestError(f"{key}: {_short(value)} is no object")
    return value


def _record(cls: type[Checked], value: Any, key: str) -> Any:
    """Make a record from an object that has all of its required keys and no others."""
    value = _object(value, key)
    names = type_hints(cls).keys()
    if unknown := sorted(value.keys() - names):
        raise ManifestError(f"{key}: unknown key {_short(unknown[0])}; known are {', '.join(sorted(names))}")
    if missing := [name for name in required(cls) if name not in value]:
        raise ManifestError(f"{key}: {missing[0]!r} is missing")
    try:
        return cls(**value)
    except ManifestError as error:
        raise ManifestError(f"{key}.{error}") from None


def required(cls: type[Checked]) -> list[str]:
    """Names of the fields without a default."""
    return [name for name in type_hints(cls) if not hasattr(cls, name)]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# The file -------------------------------------------------------------------------------------------------------------


def manifest_path() -> Path:
    """Find ``weights_manifest.json``: inside the installed package, or at the top of a checkout installed editable."""
    inside = PACKAGE / MANIFEST_NAME
    return inside if inside.is_file() else PACKAGE.parent / MANIFEST_NAME


def embedded_path(record: WeightRecord) -> Path:
    """Where the file that a record embeds stands in this package; a link there is as good as its bytes."""
    return PACKAGE / "embedded" / (record.embedded or "")


def parse_manifest(text: str, *, source: str = MANIFEST_NAME) -> Manifest:
    """Read a manifest.

    Args:
        text: JSON.
        source: Where it comes from, for the message.

    Raises:
        ManifestError: It is no JSON, of another schema, or one entry is not as ``WeightRecord`` says.
    """
    try:
        data = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
        data = _object(data, "the document")
        if type(data.get("schema")) is not int or data["schema"] != SCHEMA:
            raise ManifestError(
                f"schema: {_short(data.get('schema'))}, but this version reads {SCHEMA}; upgrade timm-convmix"
            )
        if unknown := sorted(data.keys() - {"schema", "weights"}):
            raise ManifestError(f"unknown key {_short(unknown[0])}")
        entries = _object(data.get("weights"), "weights")
        return {fit(Name, name, "weights"): _record(WeightRecord, entry, name) for name, entry in entries.items()}
    except (ManifestError, ValueError, RecursionError) as error:
        raise ManifestError(f"{source}: {str(error) or type(error).__name__}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object, unless a key stands in it twice: readers would differ in which one they take."""
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise ManifestError(f"the key {_short(name)} stands twice in one object")
        result[name] = value
    return result


def _no_constant(name: str) -> None:
    raise ManifestError(f"{name} is no JSON number")


def read_manifest(path: str | Path | None = None) -> Manifest:
    """Read the manifest of this package, or another; a file that does not exist holds no weights.

    Raises:
        ManifestError: See ``parse_manifest``.
    """
    path = Path(path or manifest_path())
    try:
        return parse_manifest(path.read_text(encoding="utf-8"), source=str(path)) if path.exists() else {}
    except UnicodeDecodeError as error:
        raise ManifestError(f"{path}: {error}") from error


def format_manifest(records: Manifest) -> str:
    """Write records as JSON that ``parse_manifest`` reads back to the same; keys sorted, absent values left out."""
    weights = {
        name: {key: value for key, value in dataclasses.asdict(records[name]).items() if value is not None}
        for name in sorted(records)
    }
    return json.dumps({"schema": SCHEMA, "weights": weights}, indent=2, ensure_ascii=False) + "\n"


def update_manifest(name: str, record: WeightRecord, path: str | Path | None = None) -> None:
    """Add or replace one entry; a reader sees the old file or the new one, never a part.

    A user's processes take turns, so that none loses the entry of another.

    Raises:
        ManifestError: The present file, or the new entry, is not valid.
    """
    path = Path(path or manifest_path())
    with take_turns(path):
        write_atomically(path, format_manifest(read_manifest(path) | {fit(Name, name, "weights"): record}).encode())


def take_turns(path: Path) -> AbstractContextManager[Any]:
    """A lock under which a user's processes change a file one after the other; it lies among the temporary files."""
    user = getattr(os, "getuid", int)()  # Windows has none, and gives each user a temporary folder of their own
    place = sha256(f"{user} {path.resolve()}".encode()).hexdigest()
    return WeakFileLock(Path(tempfile.gettempdir(), f"timm_convmix-{place[:16]}.lock"))


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file beside its place and move it there, so that it is never seen half written."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(path.stat().st_mode if path.exists() else 0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


# Its JSON Schema ------------------------------------------------------------------------------------------------------


def json_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a manifest; ``python -m timm_convmix.weights.manifest`` writes it."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": MANIFEST_NAME,
        "type": "object",
        "properties": {
            "schema": {"const": SCHEMA},
            "weights": {
                "type": "object",
                "propertyNames": _schema_of(Name),
                "additionalProperties": _schema_of(WeightRecord),
            },
        },
        "required": ["schema", "weights"],
        "additionalProperties": False,
    }


def _schema_of(hint: Any) -> dict[str, Any]:  # noqa: PLR0911  (one a kind of type)
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        limit = arguments[1]
        if isinstance(limit, Pattern):
            limits = {"pattern": f"^(?:{limit.regex})$", "description": limit.words}
        else:
            limits = {"minimum": limit.low} | ({"maximum": limit.high} if math.isfinite(limit.high) else {})
        return _schema_of(arguments[0]) | limits
    if origin in (Union, types.UnionType):
        return {"anyOf": [_schema_of(arguments[0]), {"type": "null"}]}
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin is tuple and arguments[-1] is Ellipsis:
        return {"type": "array", "items": _schema_of(arguments[0])}
    if origin is tuple:
        return {
            "type": "array",
            "items": _schema_of(arguments[0]),
            "minItems": len(arguments),
            "maxItems": len(arguments),
        }
    if origin is dict:
        return {"type": "object", "additionalProperties": _schema_of(arguments[1])}
    if isinstance(hint, type) and issubclass(hint, Checked):
        properties = {name: _schema_of(inner) for name, inner in type_hints(hint).items()}
        return {
            "type": "object",
            "description": (hint.__doc__ or "").partition("\n")[0],
            "properties": properties,
            "required": required(hint),
            "additionalProperties": False,
        }
    if hint is int:
        return {"type": "integer", "minimum": -EXACT, "maximum": EXACT}
    return {} if hint is Any else {"type": {str: "string", float: "number"}[hint]}


def schema_path() -> Path:
    """Where the JSON Schema stands in this package."""
    return Path(__file__).with_name("manifest.schema.json")


if __name__ == "__main__":
    write_atomically(schema_path(), (json.dumps(json_schema(), indent=2) + "\n").encode())

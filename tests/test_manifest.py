"""What weights_manifest.json may say: generated entries, and everything that is wrong with them.

The entries are generated from strategies written out here, not from the record under test; jsonschema is the second
opinion on each of them.
"""

import contextlib
import copy
import dataclasses
import json
import re
import resource
import stat
import string
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import date

import jsonschema
import pytest
from huggingface_hub.utils import validate_repo_id
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from records import COMMIT, NAME, entry, published, record

from timm_convmix import ManifestError
from timm_convmix.weights import manifest
from timm_convmix.weights.manifest import (
    MANIFEST_NAME,
    embedded_path,
    format_manifest,
    json_schema,
    manifest_path,
    parse_manifest,
    read_manifest,
    schema_path,
    update_manifest,
)

few = settings(max_examples=12, deadline=None, derandomize=True, database=None)
many = settings(few, max_examples=100)
schema = jsonschema.Draft202012Validator(json_schema())

# Valid entries --------------------------------------------------------------------------------------------------------

line = st.text(st.characters(min_codepoint=32, exclude_categories=["Cs"]), min_size=1, max_size=12)
percent = st.floats(0, 100)
count = st.integers(1, 2**53 - 1)
finite = st.floats(allow_nan=False, allow_infinity=False) | st.integers(-1000, 1000)
value = st.none() | st.booleans() | st.integers(-(2**53) + 1, 2**53 - 1) | st.floats(allow_nan=False) | st.text()
value = value.filter(lambda x: x not in (float("inf"), -float("inf")))
anything = st.recursive(
    value, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3), max_leaves=8
)
word = st.text(string.ascii_lowercase + string.digits + "_", min_size=1, max_size=9)
name = st.builds("convmix_{}.{}".format, word, word)
part = st.from_regex(r"[A-Za-z0-9]([._-]?[A-Za-z0-9]){0,8}", fullmatch=True).filter(lambda s: not s.endswith(".git"))
filename = st.builds("{}.safetensors".format, st.from_regex(r"[A-Za-z0-9](\.?[A-Za-z0-9_-]){0,8}", fullmatch=True))


def digits(length):
    return st.integers(0, 16**length - 1).map(f"{{:0{length}x}}".format)


def exactly(length, items):
    return st.lists(items, min_size=length, max_size=length)


metrics = st.fixed_dictionaries(
    {"top1": percent, "top5": percent | st.integers(0, 100), "loss": st.floats(0, 1e6), "count": count}
)


@st.composite
def entries(draw, *, full=False):
    """Entries, or with ``full`` those in which every key stands and no list is too short for the faults below."""
    classes, channels = draw(st.integers(1 + full, 5)), draw(st.integers(1 + full, 4))
    top = draw(st.integers(1, classes))
    where = {"state": "packed"}
    if full or draw(st.booleans()):
        repository = f"{draw(part)}/{draw(part)}"
        where = {"state": "published", "hub_id": repository, "revision": draw(digits(40))}
    fixed = {
        "sha256": digits(64),
        "bytes": count,
        "model_args": st.dictionaries(st.text(), anything, max_size=3),
        "num_classes": st.just(classes),
        "label_names": exactly(classes, line),
        "input_size": st.tuples(st.just(channels), count, count).map(list),
        "mean": exactly(channels, finite),
        "std": exactly(channels, st.floats(1e-6, 10)),
        "interpolation": line,
        "crop_pct": st.floats(0.01, 1) | st.just(1),
        "dataset": st.fixed_dictionaries(
            {"name": line, "split": line, "checksum": digits(64)}
            | ({"source": line, "revision": line} if full else {}),
            optional={} if full else {"source": line | st.none(), "revision": line},
        ),
        "metrics": metrics,
        "probe": st.fixed_dictionaries(
            {
                "classes": exactly(top, st.integers(0, classes - 1)),
                "logits": exactly(top, finite),
                "tolerance": st.floats(0, 10),
            }
        ),
        "recipe": st.dictionaries(st.text(), anything, max_size=3),
        "seeds": st.lists(st.integers(0, 2**32), min_size=full, max_size=2),
        "epochs": count,
        "versions": st.dictionaries(st.text(), st.text(), max_size=2),
        "hardware": line,
        "license": line,
        "date": st.dates(min_value=date(1000, 1, 1)).map(str),
    }
    optional = {
        "filename": filename,
        "embedded": filename if full else filename | st.none(),
        "dtype": st.sampled_from(["float32", "float16", "bfloat16"]),
        "baseline": st.fixed_dictionaries({"name": name, "metrics": metrics}),
        "base": st.fixed_dictionaries({"name": line, "license": line}),
    }
    if full:
        fixed, optional = fixed | optional, {}
    return where | draw(st.fixed_dictionaries(fixed, optional=optional))


def document(weights):
    return json.dumps({"schema": 1, "weights": weights})


def one(changed):
    return document({NAME: changed})


def without_absent(tree):
    if isinstance(tree, dict):
        return {key: without_absent(item) for key, item in tree.items() if item is not None}
    return tree


@settings(few, max_examples=40)
@given(st.dictionaries(name, entries(), max_size=2))
def test_what_is_written_is_what_is_read(weights):
    records = parse_manifest(document(weights))
    text = format_manifest(records)
    assert parse_manifest(text) == records
    assert format_manifest(parse_manifest(text)) == text
    written = json.loads(text)["weights"]
    assert list(written) == sorted(weights)
    for key, stated in weights.items():
        default = {"filename": "model.safetensors", "dtype": "float32"}
        opaque = {part: stated[part] for part in ("model_args", "recipe", "versions")}  # None inside stays
        assert without_absent(written[key] | opaque) == without_absent(default | stated)
        assert {part: written[key][part] for part in opaque} == opaque
    schema.validate({"schema": 1, "weights": weights})
    schema.validate(json.loads(text))


@few
@given(entries())
def test_records_made_in_python_are_the_same(stated):
    """Tuples for lists, records for objects: whatever a caller passes, the record is what the file will say."""
    parsed = parse_manifest(one(stated))[NAME]
    assert dataclasses.replace(parsed) == parsed
    again = manifest.WeightRecord(**{field.name: getattr(parsed, field.name) for field in dataclasses.fields(parsed)})
    assert again == parsed
    assert record(recipe={"scale": (0.8, 1.0)}).recipe == {"scale": [0.8, 1.0]}


# Entries with one fault -----------------------------------------------------------------------------------------------


def put(path, item):
    """A mutation: put a value at a path such as 'metrics.top1' or 'label_names.0'."""

    def mutate(stated):
        *parents, last = [int(key) if key.isdigit() else key for key in path.split(".")]
        for key in parents:
            stated = stated[key]
        stated[last] = item

    return mutate


def drop(path):
    def mutate(stated):
        *parents, last = path.split(".")
        for key in parents:
            stated = stated[key]
        del stated[last]

    return mutate


KINDS = {
    "text": "state filename sha256 hub_id revision embedded interpolation dataset.name dataset.split dataset.checksum "
    "dataset.source dataset.revision hardware license date dtype label_names.0 baseline.name base.name base.license",
    "integer": "bytes num_classes input_size.0 input_size.2 metrics.count baseline.metrics.count probe.classes.0 "
    "seeds.0 epochs",
    "number": "mean.0 std.1 crop_pct metrics.top1 metrics.top5 metrics.loss baseline.metrics.loss probe.logits.0 "
    "probe.tolerance",
    "list": "label_names input_size mean std probe.classes probe.logits seeds",
    "object": "model_args dataset metrics baseline probe recipe versions base",
}
HUGE = 10**400
BOUNDED = {"crop_pct", "metrics.top1", "metrics.top5"}
NULLABLE = {"hub_id", "revision", "embedded", "dataset.source", "dataset.revision", "baseline", "base"}
WRONG = {
    "text": [None, True, 0, 1.5, [], ["x"], {}],
    "integer": [None, True, False, 1.5, -1, "1", [1], {}, 2**53, HUGE],
    "number": [None, True, "0.5", [0.5], {}, HUGE],
    "list": [None, False, 3, "abc", {}, {"0": 1}],
    "object": [None, True, 1, "x", [], [["a", 1]]],
}
ODD_NAMES = ["../up.safetensors", "/etc/x.safetensors", "a/b.safetensors", "..\\up.safetensors", "C:\\x.safetensors"]
ODD_NAMES += ["C:x.safetensors", ".safetensors", ".x.safetensors", "x..safetensors", "x.pth", "x.safetensors.bin", ""]
ODD_NAMES += [
    "..",
    "%2e%2e%2fx.safetensors",
    "x\0.safetensors",
    "\uff41.safetensors",
    "x.SAFETENSORS",
    "a b.safetensors",
]
ODD_IDS = ["net", "/net", "a/", "a/b/c", "../b", "a/..", "./b", "a/b--c", "a--b/c", "a/b..c", "a/b.git", "a/b.", "a/b-"]
ODD_IDS += [
    "-a/b",
    ".a/b",
    "a b/c",
    "a/b@main",
    "a\\b",
    "\u00e4/b",
    "a/\u0660",
    "a/" + "b" * 97,
    "https://hub/a",
    "a/b?c",
    "",
]
ODD_REVISIONS = ["main", "", "0" * 39, "0" * 41, "A" * 40, "g" * 40, "\u0660" * 40, "refs/pr/1", COMMIT.upper()]
ODD_DIGESTS = ["", "ab" * 31, "ab" * 33, "AB" * 32, "zz" * 32, "\uff11" * 64, "sha256:" + "ab" * 32]
REQUIRED = "baseline.name baseline.metrics baseline.metrics.top1 base.name base.license metrics.count dataset.checksum"
REQUIRED += (
    " metrics.top1 metrics.top5 metrics.loss dataset.name dataset.split probe.classes probe.logits probe.tolerance "
)
REQUIRED += " ".join(entry())  # of the entry itself all that stand there
OBJECTS = ["", "dataset", "metrics", "baseline", "baseline.metrics", "probe", "base"]

FAULTS = {}  # what is wrong -> mutation, key in the message, whether JSON Schema can say it too
for kind, paths in KINDS.items():
    for path in paths.split():
        for wrong in WRONG[kind]:
            if (wrong is not None or path not in NULLABLE) and (wrong != -1 or path != "seeds.0"):
                huge = kind == "number" and wrong == HUGE and path not in BOUNDED  # a number all the same
                FAULTS[f"{path} is {json.dumps(wrong)[:20]}"] = put(path, wrong), path, not huge
for path in REQUIRED.split():
    FAULTS[f"{path} is absent"] = drop(path), path, True
for path in OBJECTS:
    FAULTS[f"unknown key in {path or 'the entry'}"] = put(f"{path}.colour".strip("."), 1), "colour", True
for key, items in {
    "filename": ODD_NAMES,
    "embedded": ODD_NAMES,
    "hub_id": ODD_IDS,
    "revision": ODD_REVISIONS,
    "sha256": ODD_DIGESTS,
    "dataset.checksum": ODD_DIGESTS,
    "baseline.name": ["tiny.x", "convmix_tiny", "convmix_tiny.", "convmix_Tiny.x", "convmix_../x.y", "convmix_a.b.c"],
    "date": ["24.11.2026", "2026-1-1", "", "\u0662026-01-01"],
    "license": ["", "two\nlines", "\x1b[31m"],
    "label_names.1": ["", "\0"],
}.items():
    for item in items:
        FAULTS[f"{key} is {json.dumps(item)[:30]}"] = put(key, item), key, True
for key, item in {
    "metrics.top1": 100.001,
    "metrics.top5": -0.1,
    "metrics.loss": -1,
    "metrics.count": 0,
    "bytes": 0,
    "epochs": 0,
    "crop_pct": 0,
    "std.0": 0,
    "input_size.1": 0,
    "probe.tolerance": -1e-9,
    "state": "local",
    "dtype": "int8",
    "input_size": [3, 64],
}.items():
    FAULTS[f"{key} is {item}"] = put(key, item), key, True
for key in ("filename", "revision", "hub_id", "sha256", "date", "embedded"):  # Python's $ also stands before a last \n
    FAULTS[f"{key} ends a line"] = lambda stated, key=key: stated.update({key: stated[key] + "\n"}), key, False
FAULTS |= {
    "no revision": (put("revision", None), "state", False),
    "no hub id": (put("hub_id", None), "state", False),
    "published for packed": (put("state", "packed"), "state", False),
    "a label more": (lambda stated: stated["label_names"].append("x"), "label_names", False),
    "a class more": (put("num_classes", 9), "label_names", False),
    "a channel less": (lambda stated: stated["mean"].pop(), "mean", False),
    "a logit more": (lambda stated: stated["probe"]["logits"].append(1.5), "probe", False),
    "a class that is none": (put("probe.classes.0", 99), "probe.classes", False),
    "a huge integer in the recipe": (put("recipe.x", {"y": [2**53]}), "recipe.x.y[0]", False),
    "a lone surrogate": (put("label_names.0", "\ud800"), "label_names[0]", False),
    "a lone surrogate in the recipe": (put("recipe.x", ["\udfff"]), "recipe.x[0]", False),
    "a lone surrogate as a key": (put("model_args.\ud800", 1), "model_args", False),
    "a whole number with a point": (put("epochs", 2.0), "epochs", False),
}


def whole():
    """An entry in which every key stands."""
    metrics = dict(entry()["metrics"])
    return entry(
        state="published",
        hub_id="someone/net",
        revision=COMMIT,
        filename="model.safetensors",
        embedded="small.safetensors",
        dtype="float16",
        baseline={"name": "convmix_test_resnet.plain", "metrics": metrics},
        base={"name": "resnet18.a1_in1k", "license": "apache-2.0"},
        dataset=entry()["dataset"] | {"source": "https://example.org", "revision": "v1"},
    )


def message(text):
    with pytest.raises(ManifestError) as error:
        parse_manifest(text, source="the_file.json")
    assert str(error.value).startswith("the_file.json: ")
    assert len(str(error.value)) < 1000
    assert str(error.value).isprintable()
    return str(error.value)


def in_brackets(path):
    return re.sub(r"\.(\d+)", r"[\1]", path)


def test_the_whole_entry_is_valid():
    schema.validate(json.loads(one(whole())))
    assert parse_manifest(one(whole()))[NAME].revision == COMMIT
    named = {field for paths in KINDS.values() for path in paths.split() for field in path.split(".")}
    assert named >= {field.name for field in dataclasses.fields(manifest.WeightRecord)}
    assert len(FAULTS) > 350


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_refused_by_entry_and_key(fault):
    mutate, key, said_by_schema = FAULTS[fault]
    stated = whole()
    mutate(stated)
    said = message(one(stated))
    where, _, last = in_brackets(key).rpartition(".")
    assert said.startswith(f"the_file.json: {NAME}{f'.{where}' if where else ''}"), said
    assert last in said.removeprefix(f"the_file.json: {NAME}"), said
    assert schema.is_valid(json.loads(one(stated))) != said_by_schema


@many
@given(entries(full=True), st.sampled_from(sorted(set(FAULTS) - {"a huge integer in the recipe"})))
def test_a_fault_is_refused_in_any_entry(stated, fault):
    mutate, key, said_by_schema = FAULTS[fault]
    assume(not (fault.startswith("a class") and stated["num_classes"] == 9))
    mutate(stated)
    said = message(one(stated))
    assert said.startswith(f"the_file.json: {NAME}"), said
    assert key.rpartition(".")[2].removesuffix("]").rpartition("[")[2] in said
    assert schema.is_valid(json.loads(one(stated))) != said_by_schema


@pytest.mark.parametrize(
    "path", ["", "weights", *(f"weights/{NAME}/{key}" for key in ("", "metrics", "recipe", "recipe/inner"))]
)
def test_a_key_that_stands_twice_is_refused_at_every_level(path):
    """Readers of JSON differ in which of the two they take."""
    stated = whole()
    stated["recipe"]["inner"] = {}
    tree = {"schema": 1, "weights": {NAME: stated}}
    target = tree
    for key in filter(None, path.split("/")):
        target = target[key]
    target["one"] = target["two"] = 1
    said = message(json.dumps(tree).replace('"one"', '"twice"').replace('"two"', '"twice"'))
    assert said == "the_file.json: the key 'twice' stands twice in one object"
    same = one(whole()).replace('"bytes": 1000', '"bytes": 1000, "bytes": 1000')
    assert message(same) == "the_file.json: the key 'bytes' stands twice in one object"


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
@pytest.mark.parametrize("before", ['"top1": ', '"crop_pct": ', '"lr": ', '"rank": ', '"tolerance": '])
def test_what_is_no_finite_number_is_refused(before, literal):
    text = re.sub(f"{before}[0-9.]+", before + literal, one(whole()), count=1)
    said = message(text)
    if "e" in literal:  # valid JSON, too large for a float
        assert f"{before[1:-3]}: {float(literal)} is no float" in said
        assert NAME in said
    else:
        assert f"{literal} is no JSON number" in said


@pytest.mark.parametrize(
    "number", ["2", "0", "-1", "true", "false", '"1"', "1.0", "1e0", "null", "[1]", "{}", "10" * 999]
)
def test_another_schema_is_refused(number):
    text = f'{{"schema": {number}, "weights": {{}}}}'
    assert re.search(r"schema: .*, but this version reads 1; upgrade timm-convmix$", message(text))
    assert schema.is_valid(json.loads(text)) == (number in ("1.0", "1e0"))  # JSON Schema takes these for 1
    later = '{"schema": 2, "weights": {"convmix_a.b": {"new": 1}}, "more": []}'
    assert "schema: 2, but this version reads 1" in message(later)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "Expecting value"),
        ("{", "Expecting property name"),
        ("[]", "the document: [] is no object"),
        ("null", "the document: None is no object"),
        ('{"weights": {}}', "schema: None"),
        ('{"schema": 1}', "weights: None is no object"),
        ('{"schema": 1, "weights": []}', "weights: [] is no object"),
        ('{"schema": 1, "weights": {}, "more": 1}', "unknown key 'more'"),
        ('{"schema": 1, "weights": {"tiny.x": {}}}', "weights: 'tiny.x' is not convmix_<arch>.<tag>"),
        ('{"schema": 1, "weights": {"convmix_a.b": []}}', "convmix_a.b: [] is no object"),
        ('{"schema": 1, "weights": {"convmix_a.b": {}}}', "convmix_a.b: 'state' is missing"),
        ("[" * 100_000, "recursion"),
        ('{"schema": 1, "weights": {"convmix_a.b": ' + "[" * 900 + "]" * 900 + "}}", ""),
        ('{"schema": 1, "weights": ' + "9" * 5000 + "}", "4300"),
        ("\ufeff{}", "BOM"),
    ],
)
def test_a_document_with_a_fault_is_refused(text, said):
    assert said in message(text)


def refusal(text):
    """What the parser says, or None where it has nothing to say; another error than its own fails the test."""
    try:
        parse_manifest(text)
    except ManifestError as error:
        return str(error)
    return None


@many
@given(anything | st.fixed_dictionaries({"schema": st.just(1), "weights": st.dictionaries(name, anything, max_size=2)}))
def test_any_json_parses_or_is_a_manifest_error(tree):
    assert refusal(json.dumps(tree)) or schema.is_valid(tree)


@many
@given(st.text() | st.text('{}[]",:0123456789.eE+-truefalsn\\ud8', max_size=40))
def test_any_text_parses_or_is_a_manifest_error(text):
    assert refusal(text) or json.loads(text)["schema"] == 1


@few
@given(st.binary(max_size=40))
def test_any_file_parses_or_is_a_manifest_error(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_bytes(data)
    with contextlib.suppress(ManifestError):
        assert read_manifest(path) == {}


CANNOT_SAY = re.compile(  # what JSON Schema has no words for, or says in others
    r"(state: .* does not go with|label_names: \d+ names|mean, std: \d|probe: \d+ classes|probe.classes: \d+ is none"
    r"|: -?\d[\d.e+]* is no int"  # 2.0 is an integer there; one in the recipe may be of any size
    r"|\\n['\"] is not )"  # jsonschema searches with Python's $, which stands before a last line feed as well
)


@many
@given(st.data())
def test_the_schema_agrees_with_the_parser(data):
    """A valid entry with one node replaced by anything: both take it, or both refuse it."""
    stated = copy.deepcopy(data.draw(entries()))
    target, key = {"entry": stated}, "entry"
    while isinstance(target[key], dict | list) and target[key] and data.draw(st.booleans()):
        target = target[key]
        key = data.draw(st.sampled_from(sorted(target) if isinstance(target, dict) else range(len(target))))
    target[key] = data.draw(anything | st.integers() | finite | line)
    assume(isinstance(stated, dict))
    tree = {"schema": 1, "weights": {NAME: stated}}
    said = refusal(json.dumps(tree))
    if schema.is_valid(tree):
        assert said is None or CANNOT_SAY.search(said)
    else:
        assert said is not None


@many
@given(st.text(st.sampled_from("ab0/._-@ \u00e9"), min_size=1, max_size=9) | st.from_regex(r"[\w./-]{1,9}"))
def test_every_hub_id_is_one_for_huggingface_hub(hub_id):
    try:
        published(hub_id=hub_id)
    except ManifestError:
        return
    validate_repo_id(hub_id)
    assert hub_id.count("/") == 1


@few
@given(st.text(max_size=20).map("{}.safetensors".format) | st.from_regex(r"[\w./\\:-]{0,9}\.safetensors"))
def test_every_embedded_name_stays_in_its_folder(embedded):
    try:
        path = embedded_path(record(embedded=embedded))
    except ManifestError:
        return
    assert path.parent == manifest.PACKAGE / "embedded"
    assert path.name == embedded


# The schema and the file that are shipped -----------------------------------------------------------------------------


def test_the_shipped_schema_is_the_records():
    assert json.loads(schema_path().read_text()) == json_schema(), "run python -m timm_convmix.weights.manifest"
    jsonschema.Draft202012Validator.check_schema(json_schema())


def test_the_shipped_manifest_is_valid():
    assert manifest_path().name == MANIFEST_NAME
    text = manifest_path().read_text(encoding="utf-8")
    schema.validate(json.loads(text))
    assert format_manifest(parse_manifest(text)) == text


def test_records_cannot_be_changed_or_made_wrong():
    made = record()
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.sha256 = "0" * 64
    with pytest.raises(ManifestError, match=r"^epochs: 0 is outside 1 to "):
        dataclasses.replace(made, epochs=0)
    for wrong in ({1, 2}, b"x", object(), float("nan"), float("inf"), {1: 2}, [("a", b"b")]):
        with pytest.raises(ManifestError, match=r"^recipe\.x"):
            record(recipe={"x": wrong})


# Writing --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "folder" / MANIFEST_NAME
    path.parent.mkdir()
    path.write_text(format_manifest({NAME: record()}))
    return path


def alone(path):
    """Whether nothing but the file itself is left in its folder."""
    return [each.name for each in path.parent.iterdir()] == [path.name]


def test_an_entry_is_added_and_replaced(tmp_path):
    path = tmp_path / MANIFEST_NAME
    update_manifest(NAME, record(), path)  # made where there was none
    update_manifest("convmix_a.b", published(), path)
    update_manifest(NAME, record(epochs=9), path)
    assert read_manifest(path) == {"convmix_a.b": published(), NAME: record(epochs=9)}
    assert list(json.loads(path.read_text())["weights"]) == ["convmix_a.b", NAME]
    assert alone(path)


def test_writers_take_turns(tmp_path):
    path = tmp_path / MANIFEST_NAME
    names = [f"convmix_a.w{number}" for number in range(24)]
    with ThreadPoolExecutor(8) as writers:
        list(writers.map(lambda name: update_manifest(name, record(), path), names))
    assert read_manifest(path).keys() == set(names)


@pytest.mark.parametrize("mode", [0o600, 0o644, 0o664, 0o755])
def test_the_files_mode_is_kept(file, mode):
    file.chmod(mode)
    update_manifest(NAME, record(epochs=9), file)
    assert stat.S_IMODE(file.stat().st_mode) == mode


def test_a_full_disk_leaves_the_old_file(file):
    """A real error of the system: no file of this process may grow beyond 500 bytes."""
    before = file.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            update_manifest("convmix_a.b", record(), file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert file.read_bytes() == before
    assert alone(file)


@pytest.mark.parametrize("step", ["os.fsync", "pathlib.Path.chmod", "pathlib.Path.replace", "os.fdopen"])
@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_at_any_step_leaves_the_old_file(file, monkeypatch, step, failure):
    before = file.read_bytes()

    def fail(*args, **kwargs):
        raise failure

    with monkeypatch.context() as patched:
        patched.setattr(step, fail)
        with pytest.raises(type(failure)):
            update_manifest("convmix_a.b", record(), file)
    assert file.read_bytes() == before
    assert alone(file)


@pytest.mark.parametrize("wrong", ["tiny.x", "convmix_a", "../x", ""])
def test_a_name_that_is_none_leaves_the_old_file(file, wrong):
    before = file.read_bytes()
    with pytest.raises(ManifestError, match=r"^weights: '.*' is not convmix_<arch>\.<tag>$"):
        update_manifest(wrong, record(), file)
    assert file.read_bytes() == before
    assert alone(file)


@pytest.mark.parametrize("damage", [b"{", b"\xff\xfe", b'{"schema": 2, "weights": {}}'])
def test_a_file_that_cannot_be_read_is_not_overwritten(file, damage):
    file.write_bytes(damage)
    with pytest.raises(ManifestError, match=rf"^{re.escape(str(file))}: "):
        update_manifest(NAME, record(), file)
    assert file.read_bytes() == damage
    assert alone(file)


def test_a_reader_sees_the_old_file_or_the_new_one(file):
    stop, seen = threading.Event(), set()

    def read():
        while not stop.is_set():
            seen.add(read_manifest(file)[NAME].epochs)

    reader = threading.Thread(target=read)
    reader.start()
    for epochs in range(1, 40):
        update_manifest(NAME, record(epochs=epochs), file)
    stop.set()
    reader.join()
    assert len(seen) > 1
    assert seen <= set(range(1, 40))
    assert alone(file)


def test_a_manifest_that_is_absent_holds_nothing(tmp_path):
    assert read_manifest(tmp_path / "none.json") == {}
    assert not list(tmp_path.iterdir())

"""From bytes to a model, without a network: what is loaded is what was recorded, or nothing is."""

import dataclasses
import json
import re
import struct
import warnings
from hashlib import sha256
from pathlib import Path
from unittest.mock import create_autospec

import pytest
import timm
import torch
from records import COMMIT, published, record
from safetensors.torch import load_file, save_file
from timm.models import get_pretrained_cfg, model_entrypoint, register_model, save_for_hf

import timm_convmix
from timm_convmix import ChecksumError, HubError, WeightsError
from timm_convmix import convmix as registry
from timm_convmix.weights import loading, manifest
from timm_convmix.weights.hub import download
from timm_convmix.weights.loading import Digest, load_local, load_record, load_repository, read_verified, stated_digest

ARCH = "test_resnet"
VARIANT = f"convmix_{ARCH}"
NAME, PLAIN = f"{VARIANT}.digits", f"{VARIANT}.a_baseline"
TAGS = ["digits", "r160_in1k"]
MIX = dict(mixer="convmix", mixer_args={"rank": 4}, stages=[0, 2])
OTHER = "f" * 40


@pytest.fixture(scope="module")
def source():
    """A ConvMix model of four classes, with other stages and another rank than the defaults."""
    torch.manual_seed(1)
    model = timm.create_model(VARIANT, num_classes=4, **MIX).eval()
    torch.nn.init.normal_(model.mixer.gain)
    return model


@pytest.fixture
def weights(tmp_path, source):
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.fixture
def embed(tmp_path, monkeypatch):
    """Put a file inside the package, which stands in a folder of the test's own."""
    monkeypatch.setattr(manifest, "PACKAGE", tmp_path / "package")
    (tmp_path / "package" / "embedded").mkdir(parents=True)

    def put(path, name):
        return Path((tmp_path / "package" / "embedded" / name).write_bytes(path.read_bytes()) and path).parent

    return put


@pytest.fixture
def registered(monkeypatch):
    """Register the variants of one architecture as if the manifest had these entries; undone after the test.

    The registry's own function decides; timm keeps what it was told first, so it is told again.
    """

    def again():
        registry.register_variants()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # timm warns of a name that is taken
            setattr(registry, VARIANT, register_model(registry.entrypoint(ARCH)))

    def register(records):
        monkeypatch.setattr(registry, "read_manifest", lambda: records)
        again()

    before = timm.list_models("convmix_*", include_tags=True), timm.list_pretrained("convmix_*")
    yield register
    monkeypatch.undo()
    again()
    assert before == (timm.list_models("convmix_*", include_tags=True), timm.list_pretrained("convmix_*"))


@pytest.fixture
def cached(hub_cache, weights, tmp_path):
    """A repository in the Hub's cache, with a config.json; returns the cached weight file."""

    def fill(repo="someone/net", config=None):
        file = hub_cache(repo, weights)
        if config is not None:
            (file.parent / "config.json").write_text(json.dumps(config))
        return file

    fill.cache = tmp_path / "cache"
    return fill


def digest_of(path):
    data = path.read_bytes()
    return Digest(sha256(data).hexdigest(), len(data))


def images(channels=3):
    return torch.randn(2, channels, 64, 64)


def logits(model, x):
    with torch.no_grad():
        return model.eval()(x)


def flip(data, position):
    return data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]


DAMAGE = {
    "one bit of the header's length": lambda data: flip(data, 0),
    "one bit of the header": lambda data: flip(data, 12),
    "one bit of a tensor": lambda data: flip(data, len(data) // 2),
    "the last bit": lambda data: flip(data, len(data) - 1),
    "truncated": lambda data: data[:-1],
    "halved": lambda data: data[: len(data) // 2],
    "longer": lambda data: data + b"\0",
    "twice": lambda data: data * 2,
    "empty": lambda data: b"",
    "a pickle": lambda data: b"\x80\x02}.",
}


def damage(path, kind):
    """Damage a file; returns what a message must say: the expected and the found digest, or length."""
    data = path.read_bytes()
    damaged = DAMAGE[kind](data)
    path.write_bytes(damaged)
    if len(damaged) == len(data):
        return f"expected sha256 {sha256(data).hexdigest()}, found {sha256(damaged).hexdigest()}."
    return f"expected {len(data)} bytes of sha256 {sha256(data).hexdigest()}, found {len(damaged)} bytes."


# Bytes ----------------------------------------------------------------------------------------------------------------


def test_the_right_bytes_are_the_tensors(weights, source):
    tensors = read_verified(weights, digest_of(weights), source="mine")
    expected = source.state_dict()
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    assert tensors["mixer.gain"].dtype == torch.float32


@pytest.mark.parametrize("kind", DAMAGE)
def test_other_bytes_are_refused(weights, kind):
    digest = digest_of(weights)
    said = damage(weights, kind)
    with pytest.raises(ChecksumError) as error:
        read_verified(weights, digest, source="my weights")
    assert str(error.value) == f"my weights: {said}"


def test_an_absent_file_is_the_systems_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.safetensors"):
        read_verified(tmp_path / "absent.safetensors", Digest("0" * 64, 1), source="my weights")


def test_the_bytes_that_were_hashed_are_the_ones_that_are_parsed(weights, source, monkeypatch):
    """A file that changes between two readings would be verified in one and loaded from the other."""
    reads = []
    real = Path.read_bytes

    def read_bytes(path):
        reads.append(path)
        data = real(path)
        path.write_bytes(b"changed")
        return data

    digest, expected = digest_of(weights), source.state_dict()
    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    tensors = read_verified(weights, digest, source="mine")
    assert reads == [weights]
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)


def of_header(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(start, end, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


TWICE = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}'
HOSTILE = {
    "a header of 2^62 bytes": of_header({}, length=2**62),
    "a header of 2^64 - 1 bytes": of_header({}, length=2**64 - 1),
    "a header beyond the end": of_header({}, length=3),
    "no header": b"",
    "half a length": b"\1\0\0",
    "a header that is no JSON": of_header(b"no JSON at all"),
    "a header that is no object": of_header([1, 2]),
    "a header that is not UTF-8": of_header(b'{"\xff": 1}'),
    "a header of brackets": of_header(b'{"a":' + b"[" * 100_000),
    "offsets beyond the end": of_header({"a": tensor(0, 8)}, bytes(4)),
    "offsets far beyond the end": of_header({"a": tensor(2**62, 2**62 + 8)}, bytes(8)),
    "negative offsets": of_header({"a": tensor(-8, 0)}, bytes(8)),
    "offsets that run backwards": of_header({"a": tensor(8, 0)}, bytes(8)),
    "offsets that overlap": of_header({"a": tensor(0, 8), "b": tensor(4, 12)}, bytes(12)),
    "offsets that repeat": of_header({"a": tensor(0, 8), "b": tensor(0, 8)}, bytes(8)),
    "a hole between offsets": of_header({"a": tensor(0, 8), "b": tensor(12, 20)}, bytes(20)),
    "bytes that no tensor has": of_header({"a": tensor(0, 8)}, bytes(9)),
    "one name for two tensors": of_header(TWICE, bytes(16)),
    "a shape of more than its bytes": of_header({"a": tensor(0, 8, (3,))}, bytes(8)),
    "a shape that overflows": of_header({"a": tensor(0, 8, (2**33, 2**33))}, bytes(8)),
    "an empty shape whose strides overflow": of_header({"a": tensor(0, 0, (0, 2**62, 2**62))}),
    "an empty shape too large for torch": of_header({"a": tensor(0, 0, (0, 2**64 - 1))}),
    "an unknown type": of_header({"a": tensor(0, 8, dtype="F99")}, bytes(8)),
    "a type that torch has not": of_header({"a": tensor(0, 1, dtype="F4")}, bytes(1)),
    "metadata that is no text": of_header({"__metadata__": {"x": 1}}),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_header_of_the_right_digest_is_refused(tmp_path, kind):
    path = tmp_path / "model.safetensors"
    path.write_bytes(HOSTILE[kind])
    with pytest.raises(WeightsError) as error:
        read_verified(path, digest_of(path), source="my weights")
    assert re.fullmatch(r"my weights is not a sound safetensors file \(.+\)\.", str(error.value))
    assert not isinstance(error.value, ChecksumError)


def test_a_file_of_nothing_is_no_model(tmp_path, embed, registered):
    empty = tmp_path / "empty.safetensors"
    empty.write_bytes(of_header({}))
    embed(empty, "net.safetensors")
    registered({NAME: record(weights=empty, embedded="net.safetensors")})
    with pytest.raises(WeightsError, match=rf"^{NAME} is not a checkpoint of {VARIANT}: it holds no tensors\.$"):
        timm.create_model(NAME, pretrained=True)  # timm takes an empty state dict for none, and goes to the Hub


# A manifest's entry ---------------------------------------------------------------------------------------------------


def test_an_embedded_file_is_loaded_first(weights, embed, tmp_path):
    embed(weights, "net.safetensors")
    for state in (record, published):
        entry = state(weights=weights, embedded="net.safetensors")
        assert load_record(entry, name=NAME, cache_dir=tmp_path / "no cache").keys() == load_file(weights).keys()


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_embedded_file_is_not_loaded_nor_replaced_by_another(weights, embed, tmp_path, cached, kind):
    cached()
    entry = published(weights=weights, embedded="net.safetensors")
    said = damage(weights, kind)
    embed(weights, "net.safetensors") if kind != "empty" else (
        tmp_path / "package" / "embedded" / "net.safetensors"
    ).touch()
    with pytest.raises(ChecksumError) as error:
        load_record(entry, name=NAME, cache_dir=cached.cache)
    assert str(error.value) == f"{NAME}, net.safetensors of this package: {said}"


def test_an_embedded_link_is_as_good_as_its_bytes(weights, tmp_path, embed):
    """Some installers link every file (``uv pip install --link-mode=symlink``)."""
    embed(weights, "net.safetensors")
    link = tmp_path / "package" / "embedded" / "net.safetensors"
    link.unlink()
    link.symlink_to(weights)
    entry = record(weights=weights, embedded="net.safetensors")
    assert load_record(entry, name=NAME).keys() == load_file(weights).keys()
    link.unlink()
    link.symlink_to(__file__)
    with pytest.raises(ChecksumError, match=rf"^{NAME}, net\.safetensors of this package: expected "):
        load_record(entry, name=NAME)


def test_packed_only_says_so_and_what_to_do(weights, embed, tmp_path):
    for entry in (record(weights=weights), record(weights=weights, embedded="not_here.safetensors")):
        with pytest.raises(WeightsError) as error:
            load_record(entry, name=NAME, cache_dir=tmp_path)
        assert str(error.value) == (
            f"{NAME} is trained and packed, but not published on a Hub yet: load the folder that `timm-convmix pack`"
            " wrote (local-dir:DIR), publish it (`timm-convmix publish`), or pass pretrained=False."
        )


def test_a_published_entry_comes_from_the_cache(weights, cached, source):
    cached()
    entry = published(weights=weights)
    tensors = load_record(entry, name=NAME, cache_dir=cached.cache)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in source.state_dict().items())


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_cache_is_named(weights, cached, caplog, kind):
    entry = published(weights=weights)
    said = damage(cached(), kind)
    with pytest.raises(ChecksumError) as error:
        load_record(entry, name=NAME, cache_dir=cached.cache)
    cause = f"{NAME}: model.safetensors of someone/net@{COMMIT}: {said}"
    assert caplog.messages == [f"{cause} The file is downloaded again."]
    assert str(error.value).startswith(f"{cause} It could not be downloaded again: {NAME}: could not get its weights")
    assert "\n" not in str(error.value)


def test_a_second_download_heals(weights, cached, monkeypatch):
    """What the cache has is damaged, what comes anew is right."""
    entry, right = published(weights=weights), weights.read_bytes()
    file = cached()
    damage(file, "one bit of a tensor")
    asked = []

    def fetch(repo, **kwargs):
        asked.append((repo, kwargs["filename"], kwargs["force_download"]))
        if kwargs["force_download"]:
            file.write_bytes(right)
        return file

    monkeypatch.setattr(loading, "download_weights", create_autospec(loading.download_weights, side_effect=fetch))
    assert load_record(entry, name=NAME, cache_dir=cached.cache).keys() == load_file(weights).keys()
    assert asked == [(f"someone/net@{COMMIT}", "model.safetensors", again) for again in (False, True)]
    damage(file, "halved")
    right = file.read_bytes()
    with pytest.raises(ChecksumError, match=r"of someone/net@0123456789.*: expected \d+ bytes of sha256 "):
        load_record(entry, name=NAME, cache_dir=cached.cache)
    assert len(asked) == 4, "it is downloaded again once, not for ever"


def test_offline_and_not_cached_names_what_is_missing_and_the_remedies(weights, tmp_path):
    with pytest.raises(HubError) as error:
        load_record(published(weights=weights), name=NAME, cache_dir=tmp_path / "cache")
    message = str(error.value)
    assert message.startswith(
        f"{NAME}: could not get its weights from someone/net at {COMMIT}, file model.safetensors ("
    )
    assert message.endswith(
        f"fetch them ahead (`timm-convmix pull hf-hub:someone/net@{COMMIT}` or `hf download someone/net"
        f" model.safetensors --revision {COMMIT}`), use a folder (local-dir:DIR), or pass pretrained=False."
    )


# Any repository -------------------------------------------------------------------------------------------------------


def repository(name="someone/net", known=None, **kwargs):
    return load_repository(name, {NAME: known} if known else {}, what=NAME, **kwargs)


def stated(path):
    return {"timm_convmix": dataclasses.asdict(digest_of(path))}


@pytest.mark.parametrize("name", ["someone/net", f"someone/net@{COMMIT}"])
def test_a_repository_is_checked_against_its_own_digest(weights, cached, caplog, name):
    file = cached(config=stated(weights))
    assert repository(name, cache_dir=cached.cache).keys() == load_file(weights).keys()
    assert not caplog.messages
    said = damage(file, "one bit of a tensor")
    with pytest.raises(ChecksumError, match=re.escape(f"{NAME}: model.safetensors of someone/net@{COMMIT}: {said}")):
        repository(name, cache_dir=cached.cache)


@pytest.mark.parametrize("config", [{}, {"architecture": "x"}, {"timm_convmix": None}])
def test_a_repository_without_digest_loads_with_a_warning(weights, cached, caplog, config):
    cached(config=config)
    repository(cache_dir=cached.cache)
    assert caplog.messages == [
        f"{NAME}: someone/net@{COMMIT} states no checksum, its model.safetensors is loaded unverified."
    ]


def test_the_manifest_wins_over_what_a_repository_states(weights, cached):
    entry, file = published(weights=weights), cached()
    said = damage(file, "one bit of a tensor")
    (file.parent / "config.json").write_text(json.dumps(stated(file)))  # whoever changed the weights changed this too
    with pytest.raises(ChecksumError, match=re.escape(said)):
        repository(known=entry, cache_dir=cached.cache)
    assert repository(cache_dir=cached.cache)
    assert repository(known=published("someone/else", weights=weights), cache_dir=cached.cache)


@pytest.mark.parametrize("lie", ["no config", "another commit"])
def test_a_server_cannot_talk_its_way_around_the_manifest(weights, cached, monkeypatch, tmp_path, lie):
    """A pinned commit of the manifest is checked even where the server has no config.json, or names another commit."""
    entry, file = published(weights=weights), cached()
    said = damage(file, "one bit of a tensor")
    elsewhere = tmp_path / OTHER / "config.json"
    elsewhere.parent.mkdir()
    elsewhere.write_text(json.dumps(stated(file)))
    answer = None if lie == "no config" else elsewhere
    monkeypatch.setattr(loading, "download", create_autospec(download, return_value=answer))
    monkeypatch.setattr(loading, "download_weights", create_autospec(loading.download_weights, return_value=file))
    with pytest.raises(ChecksumError, match=re.escape(said)):
        repository(f"someone/net@{COMMIT}", known=entry, cache_dir=cached.cache)


def test_nothing_but_safetensors_is_fetched(weights, cached):
    cached(config=stated(weights))
    with pytest.raises(WeightsError, match=rf"^{NAME}: pytorch_model\.bin of someone/net@\w+ is no safetensors file, "):
        repository(filename="pytorch_model.bin", cache_dir=cached.cache)


@pytest.mark.parametrize("name", ["a b/c", "a/b--c", "a/b/c", "../net"])
def test_an_odd_repository_is_an_error_of_ours(name, tmp_path):
    with pytest.raises(HubError, match=re.escape(f"{NAME}: could not get its weights from {name} (")):
        repository(name, cache_dir=tmp_path)


# A folder -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, source):
    """As ``pack`` leaves it."""
    path = tmp_path / "folder"
    save_for_hf(source, path, safe_serialization=True)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | stated(path / "model.safetensors")))
    return path


def test_a_packed_folder_is_verified(folder, source):
    x = images()
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert torch.equal(logits(model, x), logits(source, x))
    assert load_local(folder).keys() == source.state_dict().keys()


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_folder_is_refused(folder, kind):
    said = damage(folder / "model.safetensors", kind)
    with pytest.raises(ChecksumError) as error:
        timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert str(error.value) == f"{folder / 'model.safetensors'}: {said}"


def test_a_folder_without_weights_is_refused(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.safetensors")
    with pytest.raises(WeightsError, match=r"model\.safetensors: no such weight file"):
        timm.create_model(f"local-dir:{folder}", pretrained=True)


@pytest.mark.parametrize(
    "digest",
    [
        {},
        [],
        "ab" * 32,
        7,
        True,
        {"sha256": "ab" * 32},
        {"bytes": 10},
        {"sha256": "AB" * 32, "bytes": 10},
        {"sha256": "ab" * 31, "bytes": 10},
        {"sha256": 5, "bytes": 10},
        {"sha256": None, "bytes": 10},
        {"sha256": "ab" * 32, "bytes": "10"},
        {"sha256": "ab" * 32, "bytes": 10.0},
        {"sha256": "ab" * 32, "bytes": True},
        {"sha256": "ab" * 32, "bytes": 0},
        {"sha256": "ab" * 32, "bytes": -1},
        {"sha256": "ab" * 32, "bytes": 10**400},
        {"sha256": "ab" * 32, "bytes": float("inf")},
        {"sha256": "ab" * 32, "bytes": float("nan")},
    ],
    ids=str,
)
def test_a_malformed_digest_is_refused(folder, digest):
    """It does not count as none: the file would be loaded unverified."""
    config = json.loads((folder / "config.json").read_text()) | {"timm_convmix": digest}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError) as error:
        timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert str(error.value).startswith(f"{folder / 'config.json'}: timm_convmix states no sha256 and bytes (")
    assert not isinstance(error.value, ChecksumError)


@pytest.mark.parametrize("text", ["", "{", "[]", "\udcff", "[" * 100_000, "9" * 5000], ids=lambda text: text[:9])
def test_a_config_that_cannot_be_read_is_refused(tmp_path, text):
    config = tmp_path / "config.json"
    config.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(WeightsError, match=rf"^{re.escape(str(config))}: timm_convmix states no sha256 and bytes \("):
        stated_digest(config)


def test_a_repository_by_name_is_verified(folder, cached, source, weights):
    file = cached(config=json.loads((folder / "config.json").read_text()))
    file.write_bytes((folder / "model.safetensors").read_bytes())
    x = images()
    for name in ("hf-hub:someone/net", f"hf-hub:someone/net@{COMMIT}"):
        model = timm.create_model(name, pretrained=True, cache_dir=cached.cache)
        assert torch.equal(logits(model, x), logits(source, x))
        assert not list(tensors_in(model.pretrained_cfg))
    said = damage(file, "the last bit")
    with pytest.raises(ChecksumError, match=re.escape(said)):
        timm.create_model("hf-hub:someone/net", pretrained=True, cache_dir=cached.cache)


# A tag ----------------------------------------------------------------------------------------------------------------


def tensors_in(tree):
    if isinstance(tree, torch.Tensor):
        yield tree
    for item in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list | tuple) else ():
        yield from tensors_in(item)


@pytest.fixture
def tagged(weights, embed, registered, source):
    """The manifest has an embedded weight and an embedded baseline of one architecture."""
    embed(weights, "net.safetensors")
    plain = timm.create_model(VARIANT, num_classes=4, mixer="none")
    save_file(plain.state_dict(), weights.with_name("plain.safetensors"))
    embed(weights.with_name("plain.safetensors"), "plain.safetensors")
    records = {
        PLAIN: record(
            weights=weights.with_name("plain.safetensors"),
            embedded="plain.safetensors",
            model_args={"mixer": "none", "mixer_args": {}, "stages": [1, 2, 3]},
        ),
        NAME: record(weights=weights, embedded="net.safetensors", model_args=MIX),
    }
    registered(records)
    return records


def test_a_trained_tag_is_the_default_before_warm_starts(tagged):
    assert get_pretrained_cfg(VARIANT).tag == "digits"
    assert [name.partition(".")[2] for name in timm.list_models(f"{VARIANT}.*", include_tags=True)] == [
        "a_baseline",
        *TAGS,
    ]
    cfg = get_pretrained_cfg(VARIANT)
    assert (cfg.num_classes, cfg.label_names, cfg.license) == (4, ("null", "eins", "zwei", "drei"), "apache-2.0")
    assert (cfg.input_size, cfg.mean, cfg.std) == ((3, 64, 48), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert (cfg.interpolation, cfg.crop_pct, cfg.first_conv, cfg.classifier) == (
        "bilinear",
        0.9,
        "backbone.conv1.0",
        "backbone.fc",
    )
    assert cfg.pool_size == (2, 2)  # 5 cells at 160 px
    assert cfg.description == "Trained on digits: top-1 91.25 % (validation)."


def test_a_tag_loads_as_it_was_trained(tagged, source):
    x = images()
    for name in (VARIANT, NAME):
        model = timm.create_model(name, pretrained=True)
        assert torch.equal(logits(model, x), logits(source, x))
        assert model.stages == (0, 2)
        assert model.mixer.settings == {"rank": 4}
        assert model.num_classes == 4
        cfg = model.pretrained_cfg
        assert cfg is model.default_cfg
        assert cfg["tag"] == "digits"
        assert not list(tensors_in(cfg)), "tensors linger in the cfg"
        assert not {"state_dict", "file"} & cfg.keys()


def test_a_name_without_weights_is_built_as_this_version_builds_it(tagged):
    assert timm.create_model(VARIANT).stages == (1, 2, 3)
    assert timm.create_model(VARIANT).mixer.settings != {"rank": 4}
    assert timm.create_model(NAME).stages == (0, 2)
    assert timm.create_model(NAME).mixer.settings == {"rank": 4}


def test_the_callers_word_wins_over_the_records(tagged):
    assert timm.create_model(NAME, stages=(1,), mixer_args={"rank": 2}).stages == (1,)
    with pytest.raises(WeightsError, match=rf"^{NAME} is not a checkpoint of {VARIANT}: 1 of another shape|missing"):
        timm.create_model(NAME, pretrained=True, stages=(1, 2))


def test_tags_are_listed(tagged, registered, weights):
    registered(
        tagged
        | {
            f"{VARIANT}.only_packed": record(weights=weights),
            f"{VARIANT}.on_hub": published(weights=weights, license="mit"),
        }
    )
    shown = timm.list_pretrained(f"{VARIANT}*")
    assert shown == [f"{VARIANT}.{tag}" for tag in ("a_baseline", "digits", "on_hub", "r160_in1k")]
    rows = {row["name"]: row for row in timm_convmix.list_weights(ARCH)}
    assert list(rows) == [f"{VARIANT}.{tag}" for tag in ("a_baseline", "digits", "on_hub", "only_packed", "r160_in1k")]
    assert {name.partition(".")[2]: row["weights"] for name, row in rows.items()} == {
        "a_baseline": "trained",
        "digits": "trained",
        "on_hub": "trained",
        "only_packed": None,
        "r160_in1k": "warm start",
    }
    assert rows[NAME]["source"] == "net.safetensors"
    assert rows[f"{VARIANT}.on_hub"] == {
        "name": f"{VARIANT}.on_hub",
        "weights": "trained",
        "source": f"someone/net@{COMMIT}",
        "license": "mit",
    }


def test_a_baseline_is_nobodys_default(tagged, registered):
    model = timm.create_model(PLAIN, pretrained=True)
    assert not [name for name in model.state_dict() if name.startswith("mixer.")]
    expected = load_file(manifest.PACKAGE / "embedded" / "plain.safetensors")
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in expected.items())
    registered({PLAIN: tagged[PLAIN]})
    assert get_pretrained_cfg(VARIANT).tag == "r160_in1k", "a baseline alone stands before timm's weights"
    assert PLAIN in timm.list_pretrained(f"{VARIANT}*")


def test_a_baseline_alone_is_no_default_of_an_architecture_without_weights(tagged, monkeypatch):
    """``tiny_cifar`` has no weights of timm's; what registers it is asked, without timm being told."""
    name = "convmix_tiny_cifar.plain"
    monkeypatch.setattr(registry, "read_manifest", lambda: {name: tagged[PLAIN]})
    registry.register_variants()
    assert list(registry.default_cfgs["convmix_tiny_cifar"].tags) == ["", "plain"]
    monkeypatch.setattr(registry, "read_manifest", lambda: {name: tagged[PLAIN], "convmix_tiny_cifar.x": tagged[NAME]})
    registry.register_variants()
    assert list(registry.default_cfgs["convmix_tiny_cifar"].tags) == ["x", "plain"]


def test_a_tag_of_timms_name_is_the_manifests(tagged, registered, source):
    name = f"{VARIANT}.r160_in1k"
    registered({name: tagged[NAME]})
    assert get_pretrained_cfg(name).num_classes == 4
    x = images()
    assert torch.equal(logits(timm.create_model(name, pretrained=True), x), logits(source, x))


def test_a_packed_tag_says_what_to_do(registered, weights):
    registered({NAME: record(weights=weights)})
    for name in (VARIANT, NAME):
        with pytest.raises(WeightsError, match=rf"^{NAME} is trained and packed, but not published .*local-dir:DIR"):
            timm.create_model(name, pretrained=True)
    assert timm.create_model(NAME).num_classes == 4


def test_a_published_tag_loads_from_the_given_cache(registered, weights, cached, source):
    cached()
    registered({NAME: published(weights=weights, model_args=MIX)})
    x = images()
    model = timm.create_model(NAME, pretrained=True, cache_dir=cached.cache)
    assert torch.equal(logits(model, x), logits(source, x))
    assert model.pretrained_cfg["hf_hub_id"] == f"someone/net@{COMMIT}"
    assert not list(tensors_in(model.pretrained_cfg))
    with pytest.raises(HubError, match=rf"^{NAME}: could not get its weights from someone/net at {COMMIT}, file "):
        timm.create_model(NAME, pretrained=True)


@pytest.mark.parametrize("kind", ["one bit of a tensor", "truncated"])
def test_a_damaged_tag_is_refused_whatever_is_asked_of_it(tagged, embed, weights, kind):
    said = damage(weights, kind)
    embed(weights, "net.safetensors")
    for kwargs in ({}, {"num_classes": 9}, {"in_chans": 1}, {"features_only": True}):
        with pytest.raises(ChecksumError) as error:
            timm.create_model(NAME, pretrained=True, **kwargs)
        assert str(error.value) == f"{NAME}, net.safetensors of this package: {said}"


def timms_own(source, tmp_path, **kwargs):
    """The backbone alone, adapted by timm: an independent reference for what happens to head and stem."""
    save_file(source.backbone.state_dict(), tmp_path / "backbone.safetensors")
    overlay = dict(file=str(tmp_path / "backbone.safetensors"), num_classes=4)
    return timm.create_model(ARCH, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)


@pytest.mark.parametrize(("num_classes", "in_chans"), [(None, 1), (None, 4), (0, 3), (4, 1), (9, 3), (9, 4)])
def test_head_and_stem_adapt_as_timm_adapts_them(tagged, source, tmp_path, num_classes, in_chans):
    asked = {key: value for key, value in dict(num_classes=num_classes, in_chans=in_chans).items() if value is not None}
    model, wanted = timm.create_model(NAME, pretrained=True, **asked), timms_own(source, tmp_path, **asked)
    x = images(in_chans)
    assert model.num_classes == wanted.num_classes == (4 if num_classes is None else num_classes)
    assert torch.equal(model.mixer.gain, source.mixer.gain)
    assert torch.equal(model.mixer.expand.weight, source.mixer.expand.weight)
    for name, tensor in wanted.state_dict().items():
        fresh = num_classes == 9 and name.startswith("fc.")
        assert fresh or torch.equal(model.backbone.state_dict()[name], tensor), name
    assert logits(model, x).shape == logits(wanted, x).shape


def test_features_and_output_stride_adapt(tagged, source):
    x = images()
    features = timm.create_model(NAME, pretrained=True, features_only=True).eval()
    maps = features(x)
    assert torch.equal(maps[-1], source.forward_features(x))
    assert [m.shape[1] for m in maps] == features.feature_info.channels() == timm_channels(features_only=True)
    dilated = timm.create_model(NAME, pretrained=True, output_stride=8)
    assert all(torch.equal(dilated.state_dict()[name], tensor) for name, tensor in source.state_dict().items())
    assert dilated.forward_features(x).shape[-1] == timm_grid(x, output_stride=8) == 8
    pooled = timm.create_model(NAME, pretrained=True, global_pool="max")
    expected = source.backbone.fc(source.forward_features(x).amax((2, 3)))
    torch.testing.assert_close(logits(pooled, x), expected.detach())


def timm_channels(**kwargs):
    return timm.create_model(ARCH, **kwargs).feature_info.channels()


def timm_grid(x, **kwargs):
    return timm.create_model(ARCH, **kwargs).forward_features(x).shape[-1]


def test_an_overlay_changes_the_cfg_and_not_what_is_verified(tagged, embed, source, weights, tmp_path):
    x = images()
    model = timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=dict(crop_pct=0.5, mean=(0.0, 0.0, 0.0)))
    assert (model.pretrained_cfg["crop_pct"], model.pretrained_cfg["mean"]) == (0.5, (0.0, 0.0, 0.0))
    assert torch.equal(logits(model, x), logits(source, x))
    fresh = timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=dict(num_classes=-1), num_classes=4)
    assert not torch.equal(fresh.get_classifier().weight, source.get_classifier().weight), "train.py --pretrained-path"

    other = timm.create_model(VARIANT, num_classes=2).eval()
    save_file(other.state_dict(), tmp_path / "other.safetensors")
    overlay = dict(file=str(tmp_path / "other.safetensors"))
    mine = timm.create_model(VARIANT, pretrained=True, pretrained_cfg_overlay=overlay)
    assert torch.equal(logits(mine, x), logits(other, x)), "a file of the user's own is no manifest's entry"

    damage(weights, "the last bit")
    embed(weights, "net.safetensors")
    with pytest.raises(ChecksumError):
        timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=dict(crop_pct=0.5))


def test_a_state_dict_of_the_users_own_does_not_linger(tagged, source):
    x = images()
    model = timm.create_model(
        VARIANT, pretrained=True, pretrained_cfg_overlay=dict(state_dict=source.state_dict()), **MIX
    )
    assert torch.equal(logits(model, x), logits(source, x))
    assert not list(tensors_in(model.pretrained_cfg))
    assert "state_dict" not in model.pretrained_cfg


def test_what_the_tests_register_is_undone():
    assert registry.manifest == manifest.read_manifest()
    assert get_pretrained_cfg(VARIANT).tag == "r160_in1k"
    assert model_entrypoint(VARIANT) is getattr(registry, VARIANT)

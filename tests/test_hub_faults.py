"""What happens to a publication and to a download where the Hub, the network, the disk or a signal interferes.

Each ends so: nothing lost, nothing wrong loaded, a clear error, a re-run that completes. A test that tries a fault at
each request in turn notes how many these were; the sum stands at the end of what pytest prints.
"""

import json
import shutil
import subprocess
import time
from copy import deepcopy
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import count
from pathlib import Path

import pytest
from desks import NAME, REPO, Desk, needs_unlinked_cache
from loopback_hub import Hold, cut, cut_upload, delay, flip, lose, serve, status, truncate

from timm_convmix.weights.hub import WEIGHTS_NAME
from timm_convmix.weights.loading import CONFIG_KEY
from timm_convmix.weights.manifest import format_manifest

CARD = b"---\nlicense: mit\nlanguage: en\n---\n\nWritten by hand.\n"
PRESENT = {"README.md": CARD, "pytorch_model.bin": b"an old pickle"}
"""A repository that somebody has begun by hand."""


@pytest.fixture(scope="module")
def expected(published, packed, forks, tmp_path_factory):
    """The commit that a publication ends in, on a new repository and on PRESENT."""
    with serve() as hub:
        hub.create(REPO, PRESENT)
        desk = Desk(tmp_path_factory.mktemp("expected"), packed, hub, forks, hub.token("alice"))
        assert desk.run("publish").status == 0
        present = hub.repos[REPO].at()
    assert b"Written by hand." in present.files["README.md"].data
    assert b"language: en" in present.files["README.md"].data
    assert "pytorch_model.bin" not in present.files
    return {False: published.repo.at(), True: present}


@pytest.fixture
def survives(expected):
    """What was published is nothing or everything, and in the manifest it is once it is proved; again it completes."""

    def check(desk, present, *argv):
        before = desk.hub.repos[REPO].at() if REPO in desk.hub.repos else None
        if before and before.oid != expected[present].oid:
            assert before.files.keys() <= {".gitattributes", *(PRESENT if present else ())}
        if desk.record.state == "published":
            assert desk.record.revision == before.oid
        desk.hub.faults.clear()
        again = desk.run("publish", *argv)
        assert again.status == 0, again.err
        assert desk.hub.repos[REPO].at() == expected[present]
        assert len(desk.hub.repos[REPO].history()) == (3 if present else 2)
        assert (desk.record.state, desk.record.hub_id) == ("published", REPO)
        assert desk.record.revision == expected[present].oid

    return check


# Publishing -----------------------------------------------------------------------------------------------------------


@dataclass
class Kill:
    processed: bool


AT_EACH = {
    "killed before": (Kill(processed=False), False),
    "killed after": (Kill(processed=True), True),
    "500 once": (status(500), False),
    "503 from then on": (status(503), True),
    "connection cut": (cut_upload(), False),
    "answer lost": (lose(), True),
}


@pytest.mark.parametrize("fault", AT_EACH)
def test_a_fault_at_each_request_of_publish(fault, desks, survives, request):
    action, present = AT_EACH[fault]
    for k in count(1):
        with serve() as hub:
            desk = desks(hub=hub)
            if present:
                hub.create(REPO, PRESENT)
            if isinstance(action, Kill):
                client = desk.start("publish")
                reached = kill_at(k, client, hub, action)
            else:
                met = hub.fail(".*", "", action, after=k - 1, times=None if "from then on" in fault else 1)
                client = desk.run("publish")
                reached = met.fired
                if client.status:
                    desk.fails(client, REPO if k > 1 else "log in to the Hub", "run it again")
                else:
                    assert desk.record.state == "published"
            survives(desk, present)
        if not reached:
            assert client.status == 0
            break
    request.node.user_properties.append(("faults", k - 1))
    assert k - 1 == (16 if present else 15)


def kill_at(k, client, hub, kill):
    """Kill a client at its k-th request; whether it came so far."""
    held = hub.hold(k, processed=kill.processed)
    if reached := held.reached_by(client):
        client.kill()
    return reached


def with_token(desk, token):
    desk.token = token
    return desk


REFUSED = {  # who publishes how, and what the error says; nothing has been written
    "no token": (lambda hub, desks: desks(None), [], ["log in to the Hub", "there is no token", "HF_TOKEN"]),
    "read-only token": (lambda hub, desks: desks("alice", "read"), [], ["token of alice may only read", "HF_TOKEN"]),
    "revoked token": (lambda hub, desks: with_token(desks(), "hf_no"), [], ["the token is not valid", "HF_TOKEN"]),
    "token of odd letters": (lambda hub, desks: with_token(desks(), "hf_n\xf6"), [], ["not valid", "HF_TOKEN"]),
    "strange namespace": (
        lambda hub, desks: desks(),
        ["--namespace", "acme"],
        ["The token's user alice does not belong to acme", "namespaces are alice."],
    ),
    "repository to read only": (
        lambda hub, desks: hub.create(f"acme/{NAME}") and desks(orgs={"acme": "read"}),
        ["--namespace", "acme"],
        [f"Could not write to acme/{NAME}", "403", "make one with write access to that namespace"],
    ),
    "no JSON": (
        lambda hub, desks: hub.create(REPO) and hub.fail("GET", "/api/models/", truncate()) and desks(),
        [],
        [f"Could not look at {REPO}", "check the network and run it again"],
    ),
    "429 for ever": (
        lambda hub, desks: hub.fail("GET", "/api/whoami", status(429, retry_after=9), times=None) and desks(),
        [],
        ["log in to the Hub", "rate limit", "slow down; run it again later"],
    ),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_refused_before_anything_is_written(fault, hub, desks, survives):
    who, argv, words = REFUSED[fault]
    desk = who(hub, desks)
    desk.fails(desk.run("publish", *argv), *words)
    assert hub.writes == []
    assert desk.record.state == "packed"
    survives(with_token(desk, hub.token("alice")), False)


REFUSED_LATE = {  # at which request, how, and what the error says
    "namespace to read only": ("/repos/create", status(403), ["403", "write access to that namespace"]),
    "429 at the upload": ("/preupload/", status(429, retry_after=9), ["429", "run it again later"]),
    "429 at the commit": ("/commit/", status(429, retry_after=9), ["429", "run it again later"]),
    "412 at the commit": ("/commit/", status(412), ["412", "somebody else has committed meanwhile; run it again"]),
    "uploads refused": ("^/lfs/", status(403), ["403", "write access to that namespace"]),
    "uploads cut": ("^/lfs/", cut_upload(), ["check the network and run it again: it goes on where it stopped"]),
    "gateway timeouts": ("/objects/batch", status(504), ["504", "the Hub failed; run it again"]),
}


@pytest.mark.parametrize("fault", REFUSED_LATE)
def test_refused_for_ever(fault, hub, desk, survives):
    path, action, words = REFUSED_LATE[fault]
    hub.fail("POST|PUT", path, action, times=None)
    client = desk.run("publish")
    desk.fails(client, f"Could not publish to {REPO}", *words)
    assert sum(client.waited) < 60
    survives(desk, False)


@pytest.mark.parametrize("path", ["/preupload/", "/objects/batch", "^/lfs/", "/verify"])
def test_slowed_down_once(path, hub, desk, survives):
    hub.fail("POST|PUT", path, status(429, retry_after=7))
    client = desk.run("publish")
    assert client.status == 0, client.err
    assert [seconds for seconds in client.waited if 7 <= seconds <= 8] == client.waited != []
    survives(desk, False)


def test_two_publishers_at_once(hub, desks, survives):
    hub.create(REPO, PRESENT)
    hub.fail("POST", "/commit/", held := Hold())
    one, two = desks(), desks()
    client = one.start("publish")
    assert held.reached_by(client)
    assert two.run("publish").rows[0]["action"] == "update"
    held.release()
    one.fails(client, REPO, "412", "somebody else has committed meanwhile", "run it again")
    assert one.record.state == "packed"
    survives(one, True)
    assert one.record == two.record


@pytest.mark.parametrize("path", ["/repos/create", "/preupload/", "/objects/batch", "/commit/"])
def test_two_that_make_the_repository(path, hub, desks, survives):
    hub.fail("POST", path, held := Hold())
    one, two = desks(), desks()
    client = one.start("publish")
    assert held.reached_by(client)
    assert two.run("publish").status == 0
    held.release()
    if client.status:
        one.fails(client, REPO, "412", "somebody else has committed meanwhile", "run it again")
    survives(one, False)
    assert one.record == two.record


def test_the_hub_stores_other_bytes(hub, desk, survives):
    digest = desk.record.sha256.encode()

    def misstate(exchange):
        answer = exchange.process()
        return replace(answer, body=answer.body.replace(digest, digest[::-1]))

    hub.fail("POST", "/paths-info/", misstate)
    desk.fails(desk.run("publish"), f"{REPO} at ", f"holds another {WEIGHTS_NAME} than was sent", "do not use it")
    assert desk.record.state == "packed"
    survives(desk, False)


def other_activation(exchange):
    answer = exchange.process()
    return replace(answer, body=answer.body.replace(b'"model_args": {', b'"model_args": {"act_layer": "gelu",'))


UNPROVED = {
    "corrupted": ("GET", WEIGHTS_NAME, flip(), ["ChecksumError", "expected sha256"]),
    "cut short": ("GET", WEIGHTS_NAME, truncate(), ["HubError", WEIGHTS_NAME]),
    "gone": ("HEAD", "config.json", status(404), ["404"]),
    "of other logits": ("HEAD|GET", "config.json", other_activation, ["gives other logits than the packed folder"]),
}


@pytest.mark.parametrize("fault", UNPROVED)
def test_a_commit_that_does_not_prove_itself(fault, hub, desk, survives):
    method, file, action, words = UNPROVED[fault]
    hub.fail(method, f"/resolve/.*/{file}", action, times=None)
    line = desk.fails(desk.run("publish"), f"{REPO} at ", "was committed, but did not prove itself", *words)
    assert line.endswith("; the manifest is unchanged: run it again.")
    assert desk.record.state == "packed"
    survives(desk, False)


def test_a_proof_that_is_corrupted_once(hub, desk, survives):
    hub.fail("GET", f"/resolve/.*/{WEIGHTS_NAME}", flip())
    assert desk.run("publish").status == 0
    survives(desk, False)


# Disks ----------------------------------------------------------------------------------------------------------------


class Disk:
    """A small file system of its own."""

    def __init__(self, path: Path):
        self.path = path
        path.mkdir()
        self.mounted = self.mount("-t", "tmpfs", "-o", "size=1m", "tmpfs")

    def mount(self, *options):
        return not subprocess.run(["mount", *options, self.path], capture_output=True, check=False).returncode

    def fill(self):
        with pytest.raises(OSError, match="No space left"):
            (self.path / "filler").write_bytes(bytes(2 << 20))

    def empty(self):
        (self.path / "filler").unlink(missing_ok=True)

    def set(self, options):
        assert self.mount("-o", f"remount,{options}")


@pytest.fixture
def disk(tmp_path):
    disk = Disk(tmp_path / "disk")
    if not disk.mounted:
        pytest.skip("a small disk has to be mounted, which is not permitted here")
    yield disk
    subprocess.run(["umount", str(disk.path)], check=True)


@pytest.mark.parametrize("full", ["manifest", "HF_HOME"])
def test_publishing_from_a_full_disk(full, disk, hub, desk, survives):
    hub.create(REPO, PRESENT)
    if full == "manifest":
        desk.manifest = Path(shutil.move(desk.manifest, disk.path))
        words = [f"{REPO} at ", "is published, but the manifest could not be written", "run it again"]
    else:
        desk.home = disk.path
        words = [f"Could not read README.md of {REPO}", "let HF_HOME name a folder that has space", "run it again"]
    disk.fill()
    before = desk.manifest.read_bytes()
    desk.fails(desk.run("publish"), "No space left on device", *words)
    assert desk.manifest.read_bytes() == before
    assert {path.name for path in desk.manifest.parent.iterdir() if path.is_file()} <= {desk.manifest.name, "filler"}
    disk.empty()
    survives(desk, True)


# Loading --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def reader(hub, desks, published):
    """Somebody without a token, whose manifest names what the Hub has."""
    hub.repos[REPO] = deepcopy(published.repo)
    return desks(None, manifest=published.manifest)


@pytest.fixture(params=["pinned", "hf-hub"])
def attempt(request, reader, published):
    """Load by the manifest's entry, or by the name of the repository; returns '' or the error, and the process."""

    def pinned(**env):
        client = reader.run("verify", **env)
        assert client.status in (0, 1), client.err
        [row] = client.rows
        assert row["ok"] == (client.status == 0) == (row["error"] is None) == (row["probe"] is not None)
        return row["error"] or "", client

    def by_repository(**env):
        client = reader.load(f"hf-hub:{REPO}", env=env)
        assert client.out.strip() == ("" if client.status else published.logits)
        return client.err.splitlines()[-1] if client.status else "", client

    return {"pinned": pinned, "hf-hub": by_repository}[request.param]


def assert_clear(error, published, *words):
    assert "\n" not in error
    wanted = [REPO, published.record.revision, WEIGHTS_NAME, *words]
    assert not [word for word in wanted if word not in error], error


NETWORK = "Check the network, HF_ENDPOINT and HF_HUB_OFFLINE, fetch them ahead (`timm-convmix pull "
DOWNLOADS = {  # a request for the weights, what happens to it, how often (None: for ever), what the error says if any
    "503 once": ("HEAD", status(503), 1, []),
    "503 for ever": ("HEAD", status(503), None, ["503", NETWORK]),
    "500 once at the bytes": ("GET", status(500), 1, ["500", NETWORK]),
    "500 for ever at the bytes": ("GET", status(500), None, ["500", NETWORK]),
    "429 once": ("GET", status(429, retry_after=7), 1, []),
    "429 for ever": ("GET", status(429, retry_after=7), None, ["429", NETWORK]),
    "cut once": ("GET", cut(), 1, []),
    "cut for ever": ("GET", cut(), None, [NETWORK]),
    "never answered once": ("GET", lose(), 1, []),
    "never answered": ("HEAD|GET", lose(), None, [NETWORK]),
    "late": ("GET", delay(0.2), 1, []),
    "truncated once": ("GET", truncate(), 1, [NETWORK]),
    "truncated for ever": ("GET", truncate(), None, [NETWORK]),
    "corrupted once": ("GET", flip(), 1, []),
    "corrupted at its start": ("GET", flip(0), 1, []),
    "corrupted for ever": (
        "GET",
        flip(),
        None,
        ["expected sha256", "found", "second download too", "pretrained=False"],
    ),
    "corrupted, then out of reach": ("GET", flip(), 1, ["expected sha256", "found", "could not be downloaded again"]),
    "gone": ("HEAD", status(404, x_error_code="EntryNotFound"), None, ["a pickle is not loaded"]),
    "commit gone": ("HEAD", status(404, x_error_code="RevisionNotFound"), None, ["404", NETWORK]),
    "missing": (
        "HEAD",
        status(404, x_error_code="RepoNotFound"),
        None,
        ["404", "If it is private, log in", "HF_TOKEN"],
    ),
    "gated": ("HEAD", status(403, x_error_code="GatedRepo"), None, ["403", "Ask for access", "log in", "HF_TOKEN"]),
    "forbidden": ("HEAD", status(403), None, ["403", NETWORK]),
    "no headers": ("HEAD", status(200), None, [NETWORK]),
}


@pytest.mark.parametrize("fault", DOWNLOADS)
def test_a_download_that_fails(fault, attempt, hub, published):
    method, action, times, words = DOWNLOADS[fault]
    hub.fail(method, f"/resolve/.*/{WEIGHTS_NAME}", action, times=times)
    if fault == "corrupted, then out of reach":
        hub.fail("HEAD", f"/resolve/.*/{WEIGHTS_NAME}", status(503), times=None, after=1)
    error, client = attempt()
    if words:
        assert_clear(error, published, *words)
    else:
        assert error == ""
    assert ("The file is downloaded again." in client.err) == ("corrupted" in fault)
    assert sum(client.waited) < 60
    if fault == "429 once":
        assert 7 <= client.waited[0] <= 8
    hub.faults.clear()
    assert attempt()[0] == ""


LOADS = {
    "pull": (lambda desk: desk.start("pull"), 2),
    "load": (lambda desk: desk.start_load(f"hf-hub:{REPO}"), 5),
}


@pytest.mark.parametrize("processed", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("load", LOADS)
def test_killed_at_each_request_of_a_download(load, processed, desks, published, request):
    start, requests = LOADS[load]
    for k in count(1):
        with serve() as hub:
            hub.repos[REPO] = deepcopy(published.repo)
            desk = desks(None, hub=hub, manifest=published.manifest)
            reached = kill_at(k, client := start(desk), hub, Kill(processed))
            hub.faults.clear()
            again = start(desk)
            assert again.status == 0, again.err
            if load == "load":
                assert again.out.strip() == published.logits
        if not reached:
            assert client.status == 0
            break
    request.node.user_properties.append(("faults", k - 1))
    assert k - 1 == requests


def test_two_processes_fill_one_cache(attempt, reader, hub, published):
    hub.fail("GET", f"/resolve/.*/{WEIGHTS_NAME}", held := Hold())
    one = reader.start("pull")
    assert held.reached_by(one)
    two = [reader.start("pull"), reader.start_load(f"hf-hub:{REPO}")]
    while sum(request.path.endswith(WEIGHTS_NAME) for request in hub.requests) < 4:  # both wait for the lock
        assert [client.poll() for client in [one, *two]] == [None] * 3
        time.sleep(0.02)
    held.release()
    assert [client.status for client in [one, *two]] == [0] * 3
    assert sum(request.method == "GET" and request.path.endswith(WEIGHTS_NAME) for request in hub.requests) == 1
    assert attempt()[0] == ""


def test_one_of_two_processes_is_killed(attempt, reader, hub, published):
    hub.fail("GET", f"/resolve/.*/{WEIGHTS_NAME}", held := Hold())
    one = reader.start("pull")
    assert held.reached_by(one)
    two = reader.start("pull")
    one.kill()
    assert two.status == 0
    assert attempt()[0] == ""


# What is in the cache -------------------------------------------------------------------------------------------------


def cached(desk, published, file=WEIGHTS_NAME):
    return desk.home / "hub" / f"models--{REPO.replace('/', '--')}" / "snapshots" / published.record.revision / file


def flip_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "one bit flipped": flip_bit,
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "grown": lambda path: path.write_bytes(path.read_bytes() + b"more"),
    "emptied": lambda path: path.write_bytes(b""),
}


@pytest.mark.parametrize(
    ("damage", "without_links"),
    [*((damage, False) for damage in DAMAGES), pytest.param("one bit flipped", True, marks=needs_unlinked_cache)],
)
def test_a_damaged_cache(damage, without_links, attempt, reader, hub, published):
    env = {"HF_HUB_DISABLE_SYMLINKS": "1"} if without_links else {}
    assert attempt(**env)[0] == ""
    path = cached(reader, published)
    assert path.is_symlink() != without_links
    DAMAGES[damage](path.resolve())
    hub.fail(".*", "", status(503), times=None)
    error, client = attempt(**env)
    assert_clear(error, published, "expected", "found", "could not be downloaded again", "503")
    hub.faults.clear()
    error, client = attempt(**env)
    assert error == ""
    assert "found" in client.err
    assert "The file is downloaded again." in client.err
    before = len(hub.requests)
    error, client = attempt(**env)
    assert (error, client.err) == ("", "")
    assert WEIGHTS_NAME not in str(hub.requests[before:])


def test_a_digest_that_is_damaged_in_the_cache(reader, published):
    assert reader.load(f"hf-hub:{REPO}").out.strip() == published.logits
    path = cached(reader, published, "config.json").resolve()
    for old, new in [("sha256", "sha257"), (published.record.sha256, published.record.sha256[::-1])]:
        path.write_text(path.read_text().replace(old, new))
        client = reader.load(f"hf-hub:{REPO}")
        assert client.out.strip() == published.logits, client.err
        assert json.loads(path.read_text())[CONFIG_KEY]["sha256"] == published.record.sha256


@pytest.mark.parametrize("how", ["not cached", "cached", "damaged"])
def test_a_cache_that_is_read_only(how, disk, attempt, reader, hub, published):
    reader.home = disk.path
    disk.set("size=64m")
    if how != "not cached":
        assert attempt()[0] == ""
    if how == "damaged":
        flip_bit(cached(reader, published).resolve())
    disk.set("ro")
    error, _ = attempt()
    if how == "cached":
        assert error == ""
    elif how == "damaged":
        assert_clear(error, published, "expected sha256", "could not be downloaded again", "Read-only file system")
    else:
        assert "Read-only file system" in error
    disk.set("rw")
    assert attempt()[0] == ""


def test_a_cache_that_is_full(disk, attempt, reader, hub, published):
    reader.home = disk.path
    error, _ = attempt()
    assert_clear(error, published, "No space left on device", "Let HF_HOME (or cache_dir) name a folder that has space")
    disk.set("size=64m")
    assert attempt()[0] == ""


# What is in the repository --------------------------------------------------------------------------------------------


@pytest.fixture
def repository(hub, published):
    """Make a repository with what was published, changed."""

    def make(changes=(), config=(), drop=()):
        files = published.repo.files() | dict(changes)
        told = json.loads(files["config.json"]) | dict(config)
        files["config.json"] = json.dumps({key: told[key] for key in told if key not in drop}).encode()
        return hub.create("bob/net", {name: files[name] for name in files if name not in drop})

    return make


def tampered(published):
    data = bytearray(published.repo.files()[WEIGHTS_NAME])
    data[-1] ^= 1
    return bytes(data)


def test_a_repository_that_states_its_digest(desk, repository, published):
    oid = repository().at().oid
    client = desk.load("hf-hub:bob/net", f"hf-hub:bob/net@{oid}")
    assert (client.out.split(), client.err) == ([published.logits] * 2, "")
    oid = repository({WEIGHTS_NAME: tampered(published)}).at().oid
    client = desk.load("hf-hub:bob/net")
    assert client.status == 1
    line = client.err.splitlines()[-1]
    assert line.startswith("ChecksumError: ")
    assert f"{WEIGHTS_NAME} of bob/net@{oid}: expected sha256 {published.record.sha256}, found " in line


def test_a_repository_that_states_no_digest(desk, repository, published):
    oid = repository(drop=[CONFIG_KEY]).at().oid
    client = desk.load("hf-hub:bob/net")
    assert client.out.strip() == published.logits
    assert client.err.splitlines() == [
        f"convmix_test_resnet.r160_in1k: bob/net@{oid} states no checksum, its {WEIGHTS_NAME} is loaded unverified."
    ]


@pytest.mark.parametrize(
    "stated",
    [
        {},
        {"sha256": "0" * 64},
        {"sha256": "0" * 63, "bytes": 1},
        {"sha256": 0, "bytes": 1},
        {"sha256": "0" * 64, "bytes": "1"},
        {"sha256": "0" * 64, "bytes": -1},
        ["sha256", "bytes"],
        "sha256",
        False,
        0,
    ],
)
def test_a_repository_that_states_no_sound_digest(stated, desk, repository, published):
    repository(config={CONFIG_KEY: stated})
    client = desk.load("hf-hub:bob/net")
    assert client.status == 1
    [line] = client.err.splitlines()
    assert line.startswith("WeightsError: ")
    assert f"config.json: {CONFIG_KEY} states no sha256 and bytes" in line


@pytest.mark.parametrize("pickles", [["pytorch_model.bin"], ["model.pth", "model.ckpt"]])
def test_a_repository_that_holds_only_pickles(pickles, desk, hub, repository):
    oid = repository(dict.fromkeys(pickles, b"a pickle"), drop=[WEIGHTS_NAME]).at().oid
    client = desk.load("hf-hub:bob/net")
    assert client.status == 1
    assert client.err.splitlines()[-1].endswith(f"bob/net@{oid} holds no {WEIGHTS_NAME}, and a pickle is not loaded.")
    assert not [request for request in hub.requests if request.path.endswith(tuple(pickles))]


@pytest.mark.parametrize("weights", ["sound", "tampered"])
def test_a_config_that_lies_about_a_commit_of_the_manifest(weights, desk, hub, repository, published):
    data = tampered(published)
    lie = {"sha256": sha256(data).hexdigest(), "bytes": len(data)}
    repo = repository({WEIGHTS_NAME: data} if weights == "tampered" else {}, {CONFIG_KEY: lie})
    record = replace(published.record, hub_id="bob/net", revision=repo.at().oid)
    desk.manifest.write_text(format_manifest({NAME: record}))
    for name in ("hf-hub:bob/net", f"hf-hub:bob/net@{record.revision}"):
        client = desk.load(name, manifest=str(desk.manifest))
        if weights == "sound":
            assert (client.out.strip(), client.err) == (published.logits, "")
        else:
            assert f"expected sha256 {record.sha256}, found {lie['sha256']}" in client.err.splitlines()[-1]
            assert client.out == ""
    assert (desk.run("pull").status == 0) == (weights == "sound")

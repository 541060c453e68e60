"""The loopback Hub as the real client sees it, each group of calls in a fresh process."""

import json
import subprocess
import sys
import threading
import urllib.request
from hashlib import sha256
from urllib.error import HTTPError, URLError

import huggingface_hub
import pytest
import timm
import torch
from loopback_hub import Hold, client_env, cut, cut_upload, delay, flip, lose, serve, status, truncate
from packaging.version import Version
from timm.models import save_for_hf

as_newest = pytest.mark.skipif(
    Version(huggingface_hub.__version__) < Version("2.4"), reason="says what the client of huggingface_hub 2.4 does"
)

WEIGHTS = bytes(range(256)) * 400
CARD = b"---\nlicense: apache-2.0\n---\nA card.\n"
PRELUDE = """
import json
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from time import monotonic
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download

api = HfApi()
out = {}

def publish(repo, weights=bytes(range(256)) * 400, **kwargs):
    files = {"README.md": b"---\\nlicense: apache-2.0\\n---\\nA card.\\n", "model.safetensors": weights}
    additions = [CommitOperationAdd(path, data) for path, data in files.items()]
    return api.create_commit(repo, additions, commit_message="Publish", **kwargs)

def fetch(repo, file="model.safetensors", **kwargs):
    return sha256(Path(hf_hub_download(repo, file, **kwargs)).read_bytes()).hexdigest()

def outcome(call, *args, **kwargs):
    try:
        result = call(*args, **kwargs)
        return getattr(result, "oid", result if isinstance(result, str) else "done")
    except Exception as error:
        return f"{type(error).__name__} {getattr(getattr(error, 'response', None), 'status_code', '')}".strip()

def timed(call, *args, **kwargs):
    start = monotonic()
    return outcome(call, *args, **kwargs), monotonic() - start

def at_once(call, names):
    with ThreadPoolExecutor(len(names)) as pool:
        out.update(zip(names, pool.map(call, names)))
"""


@pytest.fixture
def hub():
    with serve() as hub:
        yield hub


@pytest.fixture
def client(hub, tmp_path):
    """Start a fresh process with the Hub's client; it leaves what it found in `out`."""

    processes = []

    def start(code, token=None, **extra):
        command = [sys.executable, "-c", f"{PRELUDE}\n{code}\nprint(json.dumps(out))"]
        env = client_env(hub, tmp_path / "home", token, HF_HUB_DISABLE_PROGRESS_BARS="1", **extra)
        processes.append(subprocess.Popen(command, env=env, cwd=tmp_path, stdout=subprocess.PIPE, text=True))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def result(process):
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    return json.loads(text)


@pytest.fixture
def run(client):
    def run(code, token=None, **extra):
        return result(client(code, token, **extra))

    return run


def lines(hub):
    return [f"{request.method} {request.path} {request.status}" for request in hub.requests]


def test_publishes_and_reads_back(hub, run):
    token = hub.token("alice")
    out = run(
        """
out["url"] = api.create_repo("alice/net", exist_ok=True)
out["oid"] = publish("alice/net", parent_commit=api.model_info("alice/net").sha).oid
[file] = api.get_paths_info("alice/net", ["model.safetensors", "no.txt"], revision=out["oid"])
out["stored"] = [file.lfs.sha256, file.lfs.size, file.size]
""",
        token,
    )
    digest = sha256(WEIGHTS).hexdigest()
    assert out["url"] == f"{hub.url}/alice/net"
    assert out["stored"] == [digest, len(WEIGHTS), len(WEIGHTS)]
    assert lines(hub) == [
        "POST /api/repos/create 200",
        "GET /api/models/alice/net 200",
        "POST /api/validate-yaml 200",
        "POST /api/models/alice/net/preupload/main 200",
        "POST /alice/net.git/info/lfs/objects/batch 200",
        f"PUT /lfs/alice/net/{digest} 200",
        "POST /alice/net.git/info/lfs/objects/verify 200",
        "POST /api/models/alice/net/commit/main 200",
        f"POST /api/models/alice/net/paths-info/{out['oid']} 200",
    ]
    assert [request.path.rpartition("/")[2] for request in hub.writes] == ["create", "batch", digest, "verify", "main"]
    assert {request.token for request in hub.requests} == {token, None}
    assert [request.path for request in hub.requests if not request.token] == [f"/lfs/alice/net/{digest}"]
    repo = hub.repos["alice/net"]
    assert [commit.title for commit in repo.history()] == ["Publish", "initial commit"]
    assert repo.history()[0].oid == out["oid"]
    assert {path: repo.files()[path] for path in ("README.md", "model.safetensors")} == {
        "README.md": CARD,
        "model.safetensors": WEIGHTS,
    }


def test_downloads_by_revision_then_asks_for_nothing(hub, run, tmp_path):
    repo = hub.create("alice/net", {"model.safetensors": WEIGHTS})
    old = repo.at().oid
    repo.commit({"model.safetensors": b"newer"})
    code = f'out["sha"] = fetch("alice/net", revision="{old}")'
    digest = sha256(WEIGHTS).hexdigest()
    assert run(code) == {"sha": digest}
    path = f"/alice/net/resolve/{old}/model.safetensors"
    assert lines(hub) == [f"HEAD {path} 200", f"GET {path} 200"]
    assert (tmp_path / "home/hub/models--alice--net/blobs" / digest).read_bytes() == WEIGHTS
    hub.requests.clear()
    assert run(code) == run(code, HF_HUB_OFFLINE="1") == {"sha": digest}
    assert hub.requests == []


def test_commits_as_the_hub_does(hub, run):
    token = hub.token("alice")
    repo = hub.create("alice/net", {"pytorch_model.bin": b"pickle", "runs/1.csv": b"1"})
    first = repo.at().oid
    out = run(
        f"""
out["published"] = publish("alice/net", parent_commit="{first}").oid
out["again"] = publish("alice/net").oid
out["stale"] = outcome(publish, "alice/net", weights=b"other", parent_commit="{first}")
out["no branch"] = outcome(publish, "alice/net", weights=b"other", revision="side")
out["exists"] = outcome(api.create_repo, "alice/net")
api.create_branch("alice/net", branch="side", revision="{first}")
out["branch"] = outcome(publish, "alice/net", weights=b"side", revision="side")
pull = publish("alice/net", weights=b"pull", create_pr=True, parent_commit="{first}")
out["pull"] = [pull.oid, pull.pr_revision]
out["pull again"] = publish("alice/net", weights=b"more", revision="refs/pr/1").oid
out["pulled"] = fetch("alice/net", revision="refs/pr/1")
gone = [CommitOperationDelete("pytorch_model.bin"), CommitOperationDelete("runs/")]
out["deleted"] = api.create_commit("alice/net", gone, commit_message="Clean").oid
out["gone"] = outcome(api.create_commit, "alice/net", gone[:1], commit_message="Clean")
out["files"] = api.list_repo_files("alice/net")
refs = api.list_repo_refs("alice/net", include_pull_requests=True)
out["refs"] = {{ref.ref: ref.target_commit for ref in refs.branches + refs.pull_requests}}
out["bad card"] = outcome(api.create_commit, "alice/net",
    [CommitOperationAdd("README.md", b"---\\na: b: c\\n---\\n")], commit_message="Card")
""",
        token,
    )
    assert out["again"] == out["published"]
    assert out["stale"] == "HfHubHTTPError 412"
    assert out["no branch"] == "RevisionNotFoundError 404"
    assert out["exists"] == "HfHubHTTPError 409"
    assert out["gone"] == "RemoteEntryNotFoundError 404"
    assert out["bad card"] == "ValueError"
    assert out["pulled"] == sha256(b"more").hexdigest()
    assert out["files"] == [".gitattributes", "README.md", "model.safetensors"]
    assert [commit.oid for commit in repo.history()[:3]] == [out["deleted"], out["published"], first]
    assert [commit.oid for commit in repo.history("side")[:2]] == [out["branch"], first]
    assert [commit.oid for commit in repo.history("refs/pr/1")[:3]] == [out["pull again"], out["pull"][0], first]
    assert out["pull"][1] == "refs/pr/1"
    refs = {"refs/heads/main": out["deleted"], "refs/heads/side": out["branch"], "refs/pr/1": out["pull again"]}
    assert out["refs"] == refs


@as_newest
def test_who_may_do_what(hub, run):
    for name, limits in {"open": {}, "private": {"private": True}, "gated": {"gated": True}}.items():
        hub.create(f"alice/{name}", {"model.safetensors": WEIGHTS}, **limits)
    tokens = {
        "nobody": False,
        "forger": "hf_forged",
        "stranger": hub.token("bob", orgs={"acme": "write", "club": "read"}),
        "reader": hub.token("alice", "read"),
        "writer": hub.token("alice"),
    }
    out = run(f"""
def calls(who, token):
    note = [CommitOperationAdd("note.txt", who.encode())]
    return dict(
        missing=lambda: fetch("alice/missing", token=token),
        missing_info=lambda: api.model_info("alice/missing", token=token),
        no_file=lambda: fetch("alice/open", "no.txt", token=token),
        open=lambda: fetch("alice/open", cache_dir=who, token=token),
        gated=lambda: fetch("alice/gated", cache_dir=who, token=token),
        gated_info=lambda: api.model_info("alice/gated", token=token),
        private=lambda: fetch("alice/private", cache_dir=who, token=token),
        whoami=lambda: api.whoami(token=token)["auth"]["accessToken"]["role"],
        check=lambda: api.auth_check("alice/open", write=True, token=token),
        publish=lambda: publish("alice/open", token=token),
        pull=lambda: api.create_commit("alice/open", note, commit_message="Note", create_pr=True, token=token),
        again=lambda: api.create_repo("alice/open", exist_ok=True, token=token),
        create=lambda: api.create_repo(f"alice/{{who}}", token=token),
        acme=lambda: api.create_repo("acme/net", private=True, token=token),
        club=lambda: api.create_repo("club/net", token=token),
    )

for who, token in {tokens}.items():
    found = {{name: outcome(call) for name, call in calls(who, token).items()}}
    out[who] = {{name: result for name, result in found.items() if " 40" in result or "Error" in result}}
""")
    nobody = {
        "missing": "RepositoryNotFoundError 401",
        "missing_info": "RepositoryNotFoundError 401",
        "no_file": "RemoteEntryNotFoundError 404",
        "gated": "GatedRepoError 401",
        "private": "RepositoryNotFoundError 401",
        "whoami": "ValueError",
        "check": "RepositoryNotFoundError 401",
        "publish": "RepositoryNotFoundError 401",
        "pull": "RepositoryNotFoundError 401",
        "create": "HfHubHTTPError 401",
        "acme": "HfHubHTTPError 401",
        "club": "HfHubHTTPError 401",
    }
    known = {
        "missing": "RepositoryNotFoundError 404",
        "missing_info": "RepositoryNotFoundError 404",
        "no_file": "RemoteEntryNotFoundError 404",
        "club": "HfHubHTTPError 403",
    }
    reads = {"check": "HfHubHTTPError 403", "publish": "HfHubHTTPError 403", "create": "HfHubHTTPError 403"}
    assert out.pop("nobody") == nobody
    assert set(out.pop("forger").values()) == {"HfHubHTTPError 401"}
    assert out.pop("stranger") == known | reads | {
        "gated": "GatedRepoError 403",
        "private": "RepositoryNotFoundError 404",
    }
    assert out.pop("reader") == known | reads | {"pull": "HfHubHTTPError 403", "acme": "HfHubHTTPError 403"}
    assert out.pop("writer") == known | {"acme": "HfHubHTTPError 403"}
    assert out == {}
    assert hub.repos["acme/net"].private
    assert not hub.repos["alice/writer"].private


@as_newest
def test_a_download_that_fails(hub, run):
    faults = {
        "head": ("HEAD", status(503)),
        "forced": ("HEAD", status(503)),
        "busy": ("GET", status(429, retry_after=1)),
        "down": ("GET", status(503)),
        "cut": ("GET", cut()),
        "long": ("GET", cut(0.9)),
        "short": ("GET", truncate()),
        "flipped": ("GET", flip()),
        "late": ("GET", delay(0.5)),
        "hung": ("GET", Hold()),
        "moved": ("HEAD|GET", status(307, location="/alice/new/resolve/main/model.safetensors")),
    }
    fired = [hub.fail(method, f"/{name}/", action) for name, (method, action) in faults.items()]
    for name in (*faults, "new"):
        hub.create(f"alice/{name}", {"model.safetensors": bytes(12 << 20) if name == "long" else WEIGHTS})
    out = run(
        f"""
at_once(lambda name: timed(fetch, f"alice/{{name}}", force_download=name == "forced"), {list(faults)})
""",
        HF_HUB_DOWNLOAD_TIMEOUT="2",
    )
    assert [fault.fired for fault in fired] == [1] * len(faults)
    flipped = bytearray(WEIGHTS)
    flipped[len(WEIGHTS) // 2] ^= 1
    assert {name: found for name, (found, _) in out.items()} == dict.fromkeys(faults, sha256(WEIGHTS).hexdigest()) | {
        "forced": "ValueError",  # a forced download neither tries again nor says why
        "down": "HfHubHTTPError 503",
        "long": sha256(bytes(12 << 20)).hexdigest(),
        "short": "OSError",
        "flipped": sha256(flipped).hexdigest(),  # nothing but the size is checked
    }

    def seen(name):
        requests = [request for request in hub.requests if request.path.startswith(f"/alice/{name}/")]
        return [(request.method, request.status, request.headers.get("Range")) for request in requests]

    assert seen("head") == [("HEAD", 503, None), ("HEAD", 200, None), ("GET", 200, None)]
    assert seen("busy") == [("HEAD", 200, None), ("GET", 429, None), ("GET", 200, None)]
    assert seen("down") == [("HEAD", 200, None), ("GET", 503, None)]
    assert seen("cut") == [("HEAD", 200, None), ("GET", 200, None), ("GET", 200, None)]
    assert seen("long") == [("HEAD", 200, None), ("GET", 200, None), ("GET", 206, f"bytes={10 << 20}-")]
    assert seen("hung") == [("HEAD", 200, None), ("GET", None, None), ("GET", 200, None)]
    assert seen("moved") == [("HEAD", 307, None)]
    assert seen("new") == [("HEAD", 200, None), ("GET", 200, None)]
    seconds = {name: taken for name, (_, taken) in out.items()}
    assert 2 <= seconds["busy"] < 8  # Retry-After and one more
    assert seconds["cut"] >= 1
    assert seconds["late"] >= 0.5
    assert seconds["hung"] >= 3


@as_newest
def test_an_upload_that_fails(hub, run):
    faults = {
        "modes": hub.fail("POST", "/modes/preupload/", status(503)),
        "links": hub.fail("POST", "/links.git/.*/batch", status(429, retry_after=1)),
        "bytes": hub.fail("PUT", "/bytes/", cut_upload()),
        "check": hub.fail("POST", "/check.git/.*/verify", lose()),
        "busy": hub.fail("POST", "/busy/commit/", status(503)),
        "lost": hub.fail("POST", "/lost/commit/", lose()),
    }
    heads = {name: hub.create(f"alice/{name}") for name in faults}
    publish = 'at_once(lambda name: (*timed(publish, f"alice/{name}"), outcome(publish, f"alice/{name}")), %s)'
    out = run(publish % list(faults), hub.token("alice"))
    assert [fault.fired for fault in faults.values()] == [1] * len(faults)
    heads = {name: repo.at().oid for name, repo in heads.items()}
    assert {name: again for name, (_, _, again) in out.items()} == heads
    assert {name: found for name, (found, _, _) in out.items()} == heads | {
        "busy": "HfHubHTTPError 503",  # a commit is not tried again
        "lost": "RemoteProtocolError",
    }
    for name in faults:
        repo = hub.repos[f"alice/{name}"]
        assert len(repo.history()) == 2
        assert repo.files()["model.safetensors"] == WEIGHTS
    assert 2 <= out["links"][1] < 8  # Retry-After and one more
    assert min(out[name][1] for name in ("modes", "bytes", "check")) >= 1


@pytest.mark.parametrize("processed", [False, True])
def test_a_client_killed_at_a_request(hub, client, processed):
    token = hub.token("alice")
    repo = hub.create("alice/net")
    held = hub.hold(6, processed=processed)
    process = client('publish("alice/net")', token)
    assert held.reached_by(process)
    process.kill()
    assert hub.requests[-1].path == "/api/models/alice/net/commit/main"
    assert len(repo.history()) == 1 + processed
    process = client('publish("alice/net")', token)
    assert not hub.hold(99).reached_by(process)
    assert process.returncode == 0
    assert len(repo.history()) == 2


def test_two_publishers_at_once(hub, client):
    token = hub.token("alice")
    repo = hub.create("alice/net")
    hub.fail("POST", "/commit/", held := Hold())
    code = f'out["oid"] = outcome(publish, "alice/net", weights=%s, parent_commit="{repo.at().oid}")'
    one = client(code % b"one", token)
    assert held.reached_by(one)
    two = client(code % b"two", token)
    assert result(two) == {"oid": repo.at().oid}
    held.release()
    assert result(one) == {"oid": "HfHubHTTPError 412"}
    assert repo.files()["model.safetensors"] == b"two"
    assert len(repo.history()) == 2


def test_timm_loads_through_it(hub, run, tmp_path):
    model = timm.create_model("test_resnet").eval()
    save_for_hf(model, tmp_path / "folder", safe_serialization=True)
    hub.create("alice/net", {path.name: path.read_bytes() for path in (tmp_path / "folder").iterdir()})
    out = run("""
import timm, torch
model = timm.create_model("hf-hub:alice/net", pretrained=True).eval()
with torch.inference_mode():
    out["logits"] = model(torch.ones(1, 3, 64, 64)).tolist()
""")
    with torch.inference_mode():
        assert out["logits"] == model(torch.ones(1, 3, 64, 64)).tolist()
    assert [f"{request.method} {request.path.rpartition('/')[2]}" for request in hub.requests] == [
        "HEAD config.json",
        "GET config.json",
        "HEAD model.safetensors",
        "GET model.safetensors",
    ]


def get(url):
    try:
        with urllib.request.urlopen(url) as response:  # noqa: S310
            return response.read()
    except HTTPError as error:
        with error:
            return error.code


def test_counts_the_requests_that_it_meets(hub):
    hub.create("alice/net", {"a.txt": b"text"})
    url = f"{hub.url}/alice/net/resolve/main/a.txt"
    some = hub.fail("GET", "a.txt", status(418), times=2, after=1)
    hub.fail("PUT", "", status(500), times=None)
    hub.fail("GET", "b.txt", status(500), times=None)
    assert [get(url) for _ in range(4)] == [b"text", 418, 418, b"text"]
    assert some.fired == 2
    hub.fail("GET", "", status(410), times=None)
    assert [get(url) for _ in range(3)] == [410, 410, 410]
    hub.faults.clear()
    assert get(url) == b"text"


def test_stops_at_once_and_hides_no_error():
    threads = threading.active_count()
    held, failed = Hold(), []

    def wait(hub):
        with pytest.raises(ConnectionError):
            get(hub.url)
        failed.append(True)

    with serve() as hub:
        hub.fail("GET", "", delay(600))
        hub.fail("GET", "", held)
        waiting = [threading.Thread(target=wait, args=[hub]) for _ in range(2)]
        for thread in waiting:
            thread.start()
        assert held.reached.wait(10)
    for thread in waiting:
        thread.join(10)
    assert failed == [True, True]
    assert threading.active_count() == threads
    with pytest.raises(URLError, match="refused"):
        get(hub.url)

    def ask_for_a_space():
        with serve() as hub:
            assert get(f"{hub.url}/api/spaces/alice/demo") == 501

    with pytest.raises(NotImplementedError, match="This Hub has no GET /api/spaces/alice/demo"):
        ask_for_a_space()


def test_the_client_sees_this_hub_alone(hub, tmp_path, monkeypatch):
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_CACHE", "https_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, "foreign")
    env = client_env(hub, tmp_path)
    assert "foreign" not in env.values()
    assert env["HF_ENDPOINT"] == hub.url
    assert env["HF_HOME"] == str(tmp_path)
    token = hub.token("alice")
    assert (
        client_env(hub, tmp_path, token, HF_HUB_OFFLINE="1").items()
        >= {"HF_TOKEN": token, "HF_HUB_OFFLINE": "1"}.items()
    )

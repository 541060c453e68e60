"""A publication where nothing goes wrong, its options, and what its users have of it: as far as timm's validate.py."""

import json
import shutil
import subprocess
import sys
from copy import deepcopy
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest
from desks import NAME, REPO, needs_unlinked_cache
from huggingface_hub import ModelCard
from loopback_hub import File, lose, serve
from test_training import SCRIPTS, needs_scripts

from timm_convmix.weights.hub import WEIGHTS_NAME
from timm_convmix.weights.loading import CONFIG_KEY
from timm_convmix.weights.manifest import MANIFEST_NAME, format_manifest, read_manifest

FILES = ["README.md", "config.json", "model.safetensors", "recipe.yaml"]
CARD = b"---\nlicense: mit\nlanguage: en\n---\n\nWritten by hand.\n"
BEGUN = {"README.md": CARD, "pytorch_model.bin": b"an old pickle", "onnx/net.onnx": b"a graph", "old.safetensors": b"x"}
"""A repository that somebody has begun by hand."""


def altered(data):
    """The same size, and one bit of the last byte changed."""
    return data[:-1] + bytes([data[-1] ^ 1])


def commits(hub):
    return sum("/commit/" in request.path for request in hub.writes)


# Publishing -----------------------------------------------------------------------------------------------------------


def test_a_new_repository(hub, desk, packed):
    client = desk.run("publish")
    assert (client.status, client.err) == (0, "")
    repo = hub.repos[REPO]
    oid = repo.at().oid
    [row] = client.rows
    assert list(row) == ["name", "repo", "action", "files", "deleted", "revision", "url"]
    assert row == dict(
        name=NAME, repo=REPO, action="create", files=FILES, deleted=[], revision=oid, url=f"{hub.url}/{REPO}"
    )
    assert len(repo.history()) == 2
    assert not repo.private
    assert desk.record == replace(packed.record, state="published", hub_id=REPO, revision=oid)
    files = repo.files()
    assert sorted(files) == [".gitattributes", *FILES]
    for name in FILES[1:]:
        assert files[name] == (packed.folders / NAME / name).read_bytes()
    digest = {"sha256": sha256(files[WEIGHTS_NAME]).hexdigest(), "bytes": len(files[WEIGHTS_NAME])}
    assert json.loads(files["config.json"])[CONFIG_KEY] == digest
    card = ModelCard(files["README.md"].decode())
    assert [result.metric_value for result in card.data.eval_results] == [
        round(value, 4) for value in (packed.record.metrics.top1, packed.record.metrics.top5)
    ]
    snippet = card.text.partition("```python\n")[2].splitlines()
    assert [line.split()[:2] for line in snippet[:2]] == [["import", "timm"], ["import", "timm_convmix"]]
    assert snippet[3] == f'model = timm.create_model("hf-hub:{REPO}", pretrained=True).eval()'


def test_again_nothing_is_committed(hub, desk):
    first, manifest = desk.run("publish").rows[0], desk.manifest.read_bytes()
    again = desk.run("publish").rows[0]
    assert again == first | dict(action="none")
    assert commits(hub) == 1
    assert desk.manifest.read_bytes() == manifest


def test_what_somebody_has_begun(hub, desk):
    """The card's hand-written part stays; weights of other formats go in the same commit."""
    repo = hub.create(REPO, BEGUN)
    begun = repo.at()
    client = desk.run("publish")
    assert client.rows[0]["action"] == "update"
    assert client.rows[0]["deleted"] == ["old.safetensors", "pytorch_model.bin"]
    assert repo.at().parent == begun.oid
    files = repo.files()
    assert sorted(files) == [".gitattributes", *FILES[:3], "onnx/net.onnx", FILES[3]]
    card = ModelCard(files["README.md"].decode())
    assert card.text.rstrip().endswith("Written by hand.")
    assert (card.data.language, card.data.license, card.data.model_name) == ("en", "apache-2.0", NAME)
    edited = files["README.md"].replace(b"Written by hand.", b"Written by another hand.").replace(b"top-1", b"TOP-1")
    repo.commit({"README.md": edited, "model.ckpt": b"x"})
    assert desk.run("publish").rows[0]["deleted"] == ["model.ckpt"]
    files = repo.files()
    assert files["README.md"] == edited.replace(b"TOP-1", b"top-1")
    assert "model.ckpt" not in files
    assert desk.run("publish").rows[0]["action"] == "none"
    assert commits(hub) == 2


@pytest.mark.parametrize("begun", [False, True], ids=["new", "begun"])
@pytest.mark.parametrize("argv", [["--dry-run", "--yes"], ["--dry-run"], []], ids=["dry", "dry, no yes", "no yes"])
def test_a_dry_run_writes_nothing(argv, begun, hub, desk):
    if begun:
        hub.create(REPO, BEGUN)
    before = desk.manifest.read_bytes()
    given = ["publish", NAME, "--json", "--packed", str(desk.packed.folders), "--manifest", str(desk.manifest)]
    client = desk.cli(*given, *argv)
    assert client.status == 0
    assert hub.writes == []
    assert desk.manifest.read_bytes() == before
    assert client.err == ("" if argv else "Nothing is written without --yes; this is what would be done:\n")
    done = desk.run("publish").rows
    assert client.rows == [done[0] | dict(revision=None)]
    assert client.rows[0]["action"] == ("update" if begun else "create")


def test_a_private_repository(hub, desks):
    desk = desks()
    assert desk.run("publish", "--private").status == 0
    assert hub.repos[REPO].private
    assert desk.run("pull").status == 0
    other = desks("bob", manifest=desk.manifest)
    client = other.run("pull")
    assert client.status == 1
    assert "If it is private, log in (`hf auth login`, or HF_TOKEN)" in client.rows[0]["error"]


@pytest.mark.parametrize("begun", [False, True], ids=["new", "begun"])
def test_a_branch(begun, hub, desk):
    if begun:
        hub.create(REPO, BEGUN)
    [row] = desk.run("publish", "--revision", "v1").rows
    repo = hub.repos[REPO]
    main, branch = repo.at(), repo.at("v1")
    assert (branch.parent, row["revision"]) == (main.oid, branch.oid)
    assert WEIGHTS_NAME not in main.files
    assert branch.files.keys() >= set(FILES)
    if begun:
        assert main.files["pytorch_model.bin"].data == b"an old pickle"
        assert b"Written by hand." in branch.files["README.md"].data
        assert row["deleted"] == ["old.safetensors", "pytorch_model.bin"]
        assert not branch.files.keys() & {"pytorch_model.bin", "old.safetensors"}
    assert desk.record.revision == branch.oid
    assert desk.run("publish", "--revision", "v1").rows[0]["action"] == "none"
    assert desk.run("verify").status == 0
    assert commits(hub) == 1


def test_a_pull_request(hub, desk):
    repo = hub.create(REPO, BEGUN)
    begun, manifest = repo.at(), desk.manifest.read_bytes()
    [row] = desk.run("publish", "--create-pr").rows
    assert (row["action"], row["url"]) == ("pull request", f"{hub.url}/{REPO}/discussions/1")
    assert repo.at() == begun
    assert desk.manifest.read_bytes() == manifest
    proposed = repo.at("refs/pr/1")
    assert (proposed.oid, proposed.parent) == (row["revision"], begun.oid)
    assert proposed.files.keys() == {".gitattributes", "onnx/net.onnx", *FILES}
    assert desk.run("publish", "--create-pr").rows == [row], "no second one is opened"
    assert commits(hub) == 1
    repo.refs["main"] = proposed.oid  # it is merged
    [row] = desk.run("publish").rows
    assert (row["action"], desk.record.revision) == ("none", proposed.oid)


def test_a_pull_request_whose_answer_was_lost(hub, desk):
    repo = hub.create(REPO, BEGUN)
    repo.commit({"note.md": b"of somebody else"}, "Another", "refs/pr/1", repo.at().oid)
    hub.fail("POST", "/commit/", lose())
    desk.fails(desk.run("publish", "--create-pr"), f"Could not publish to {REPO}", "run it again")
    [row] = desk.run("publish", "--create-pr").rows
    assert (row["action"], row["url"]) == ("pull request", f"{hub.url}/{REPO}/discussions/2")
    assert row["revision"] == repo.at("refs/pr/2").oid
    assert repo.refs.keys() == {"main", "refs/pr/1", "refs/pr/2"}


def test_every_entry(hub, desk, tmp_path):
    other = NAME + "_again"
    folders = tmp_path / "folders"
    shutil.copytree(desk.packed.folders, folders)
    shutil.copytree(folders / NAME, folders / other)
    desk.manifest.write_text(format_manifest({NAME: desk.record, other: desk.record}))
    given = ["publish", "--json", "--all", "--yes", "--packed", str(folders), "--manifest", str(desk.manifest)]
    (folders / NAME / "recipe.yaml").rename(folders / NAME / "moved.yaml")
    client = desk.cli(*given)
    assert (client.status, [row["name"] for row in client.rows]) == (1, [other])
    assert f"timm-convmix publish: {folders / NAME} holds no recipe.yaml: pack {NAME} again" in client.err
    assert [record.state for record in read_manifest(desk.manifest).values()] == ["packed", "published"]
    (folders / NAME / "moved.yaml").rename(folders / NAME / "recipe.yaml")
    assert [row["action"] for row in desk.cli(*given).rows] == ["create", "none"]
    assert hub.repos.keys() == {REPO, f"alice/{other}"}
    assert {record.hub_id for record in read_manifest(desk.manifest).values()} == hub.repos.keys()


@pytest.mark.parametrize("names", [[], [NAME, "--all"]])
def test_which_entries_must_be_said(names, hub, desk):
    client = desk.cli("publish", *names, "--yes", "--manifest", str(desk.manifest))
    assert client.status == 2
    assert "--all" in client.err.splitlines()[-1]
    assert hub.requests == []


def test_what_is_not_packed_is_named(hub, desk, tmp_path):
    def refused(name, folders, *words):
        given = ["publish", name, "--yes", "--packed", str(folders), "--manifest", str(desk.manifest)]
        desk.fails(desk.cli(*given), *words)

    refused("convmix_resnet50.mine", desk.packed.folders, "convmix_resnet50.mine is not in the manifest", NAME)
    refused(NAME, tmp_path / "nowhere", f"nowhere/{NAME} holds no config.json: pack {NAME} again")
    shutil.copytree(desk.packed.folders, tmp_path / "folders")
    with (tmp_path / "folders" / NAME / WEIGHTS_NAME).open("ab") as file:
        file.write(b"more")
    refused(NAME, tmp_path / "folders", WEIGHTS_NAME, f"is not what the manifest records for {NAME}: pack it again")
    assert hub.requests == []


def test_the_token_of_a_login(hub, desk):
    token, desk.token = desk.token, None
    desk.home.mkdir()
    (desk.home / "token").write_text(f"{token}\n")
    assert desk.run("publish").status == 0
    assert {request.token for request in hub.writes if not request.path.startswith("/lfs/")} == {token}


@pytest.mark.parametrize("token", ["hf_Zwei\nlines", "hf_Z\xf6l", "hf_Zwo", False])
def test_no_token_is_ever_shown(token, hub, desk):
    desk.token = None
    code = "from timm_convmix.weights.publishing import publish\n"
    code += f"publish({NAME!r}, packed={str(desk.packed.folders)!r}, manifest={str(desk.manifest)!r}, token={token!r})"
    client = desk.python(code)
    line = client.err.splitlines()[-1]
    assert line.startswith("timm_convmix.errors.HubError: Could not log in to the Hub (")
    assert not token or token[3:6] not in client.err
    assert hub.writes == []


# Verifying and pulling ------------------------------------------------------------------------------------------------


def test_verify_and_pull(hub, desks, published, digits):
    hub.repos[REPO] = deepcopy(published.repo)
    desk = desks(None, manifest=published.manifest)
    record = published.record
    row = dict(name=NAME, source=REPO, revision=record.revision, bytes=record.bytes, ok=True, error=None)
    client = desk.run("pull")
    assert (client.status, client.rows, client.err) == (0, [row], "")
    client = desk.run("verify", "--data", str(digits), "--quiet")
    assert (client.status, client.err) == (0, "")
    [row] = client.rows
    assert list(row) == ["name", "state", "bytes", "hub", "probe", "top1", "ok", "error"]
    assert row["top1"] == pytest.approx(record.metrics.top1, abs=1e-3)
    assert float(row["probe"]) <= record.probe.tolerance
    assert [row[key] for key in ("state", "hub", "bytes", "ok", "error")] == ["published", "ok", "ok", True, None]
    client = desk.run("verify", HF_HUB_OFFLINE="1")
    assert [client.rows[0][key] for key in ("hub", "bytes", "ok")] == [None, "ok", True]


def test_verify_asks_the_hub_whatever_the_cache_holds(hub, desks, published):
    hub.repos[REPO] = deepcopy(published.repo)
    desk = desks(None, manifest=published.manifest)
    assert desk.run("pull").status == 0
    commit = hub.repos[REPO].at()
    commit.files[WEIGHTS_NAME] = File(altered(commit.files[WEIGHTS_NAME].data), lfs=True)
    client = desk.run("verify")
    assert client.status == 1
    assert f"{NAME}: expected sha256 {published.record.sha256} of {WEIGHTS_NAME}, but {REPO}" in client.rows[0]["error"]
    del commit.files[WEIGHTS_NAME]
    assert desk.run("verify").rows[0]["error"].endswith(f"{REPO} at {commit.oid} has no such large file.")
    del hub.repos[REPO]
    row = desk.run("verify").rows[0]
    assert (row["ok"], row["hub"], row["bytes"]) == (False, None, "ok")
    assert f"could not get its weights from {REPO} at {commit.oid}" in row["error"]


def test_verify_names_what_cannot_be_built(hub, desk):
    lost = replace(desk.record, model_args=dict(mixer="lost"))
    strange = replace(desk.record, model_args=dict(word="unknown"))
    names = ["convmix_no_such_arch.digits", NAME, NAME + "_strange"]
    desk.manifest.write_text(format_manifest(dict(zip(names, [desk.record, lost, strange], strict=True))))
    folders = desk.folder / "folders"
    for name in names:
        shutil.copytree(desk.packed.folders / NAME, folders / name)
    client = desk.cli("verify", "--json", "--manifest", str(desk.manifest), "--packed", str(folders))
    assert client.status == 1
    errors = {row["name"]: row["error"] for row in client.rows}
    assert "convmix_no_such_arch.digits cannot be built (Unknown model" in errors[names[0]]
    assert "Unknown mixer 'lost'" in errors[names[1]]
    assert f"{names[2]} cannot be built (" in errors[names[2]]
    assert "'word'" in errors[names[2]]


def test_pull_a_repository_of_the_hub(hub, desks, published):
    hub.repos[REPO] = deepcopy(published.repo)
    desk = desks(None)
    commit = published.record.revision
    command = ["pull", "--json", "--manifest", str(desk.manifest)]
    client = desk.cli(*command, f"hf-hub:{REPO}", NAME)
    assert (client.status, client.err) == (1, "")
    row = dict(source=REPO, revision=commit, bytes=published.record.bytes, ok=True, error=None)
    assert client.rows[0] == dict(name=f"hf-hub:{REPO}") | row
    assert client.rows[1]["error"].startswith(f"{NAME} is trained and packed, but not published")
    asked = len(hub.requests)
    pinned = f"hf-hub:{REPO}@{commit}"
    assert desk.cli(*command, pinned).rows == [dict(name=pinned) | row]
    assert desk.load(pinned, env={"HF_HUB_OFFLINE": "1"}).out.strip() == published.logits
    assert len(hub.requests) == asked
    hub.create("alice/bare", {WEIGHTS_NAME: b"x"})
    client = desk.cli(*command, "hf-hub:alice/bare", "hf-hub:alice/lost")
    assert client.status == 1
    assert "alice/bare holds no config.json" in client.rows[0]["error"]
    assert "could not get its weights from alice/lost" in client.rows[1]["error"]


def test_verify_and_pull_say_what_fails(hub, desks, published):
    other = NAME + "_lost"
    hub.repos[REPO] = deepcopy(published.repo)
    desk = desks(None)
    lost = replace(published.record, hub_id="alice/lost")
    desk.manifest.write_text(format_manifest({NAME: published.record, other: lost}))
    for verb in ("verify", "pull"):
        client = desk.cli(verb, "--json", "--manifest", str(desk.manifest))
        assert client.status == 1
        assert [(row["name"], row["ok"]) for row in client.rows] == [(NAME, True), (other, False)]
        assert f"alice/lost at {lost.revision}" in client.rows[1]["error"]
        client = desk.cli(verb, "--manifest", str(desk.manifest))
        assert client.status == 1
        assert [line.split()[0] for line in client.out.splitlines()] == ["name", NAME, other]
        assert desk.cli(verb, NAME, "--manifest", str(desk.manifest)).status == 0
        client = desk.cli(verb, "convmix_resnet50.mine", "--manifest", str(desk.manifest))
        desk.fails(client, "convmix_resnet50.mine is not in the manifest, which has", NAME, other)


def test_what_is_only_packed(hub, desk):
    client = desk.run("verify")
    assert (client.status, client.rows[0]["ok"], client.rows[0]["state"]) == (0, True, "packed")
    client = desk.run("pull")
    assert client.status == 1
    assert client.rows[0]["error"].startswith(f"{NAME} is trained and packed, but not published on a Hub yet")
    assert hub.requests == []


# Loading --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def reader(hub, desks, published):
    """Somebody without a token, and the Hub has what the manifest of `published.package` names."""
    hub.repos[REPO] = deepcopy(published.repo)
    return desks(None)


@pytest.mark.parametrize("links", [True, pytest.param(False, marks=needs_unlinked_cache)])
def test_a_pinned_weight_is_fetched_once(links, reader, hub, published):
    env = {} if links else {"HF_HUB_DISABLE_SYMLINKS": "1"}
    client = reader.load(NAME, "convmix_test_resnet", package=published.package, env=env)
    assert (client.out.split(), client.err) == ([published.logits] * 2, "")
    path = f"/{REPO}/resolve/{published.record.revision}/{WEIGHTS_NAME}"
    assert [(request.method, request.path) for request in hub.requests] == [("HEAD", path), ("GET", path)]
    snapshots = reader.home.glob(f"hub/models--*/snapshots/{published.record.revision}/{WEIGHTS_NAME}")
    assert [file.is_symlink() for file in snapshots] == [links]
    for extra in ({}, {"HF_HUB_OFFLINE": "1"}):
        client = reader.load(NAME, package=published.package, env=env | extra)
        assert (client.out.strip(), client.err) == (published.logits, "")
    pinned = f"hf-hub:{REPO}@{published.record.revision}"
    assert reader.load(pinned, env=env).out.strip() == published.logits
    assert [request.path.rpartition("/")[2] for request in hub.requests[2:]] == ["config.json"] * 2
    for extra in ({}, {"HF_HUB_OFFLINE": "1"}):
        assert reader.load(pinned, env=env | extra).out.strip() == published.logits
    assert len(hub.requests) == 4


def test_offline_and_not_cached(reader, hub, published):
    client = reader.load(NAME, package=published.package, env={"HF_HUB_OFFLINE": "1"})
    assert client.status == 1
    [line] = client.err.splitlines()
    revision = published.record.revision
    for words in (
        f"HubError: {NAME}: could not get its weights from {REPO} at {revision}, file {WEIGHTS_NAME} (",
        "offline mode is enabled",
        "HF_HUB_OFFLINE",
        f"(`timm-convmix pull hf-hub:{REPO}@{revision}` or `hf download {REPO} {WEIGHTS_NAME} --revision {revision}`)",
        "(local-dir:DIR)",
        "pretrained=False",
    ):
        assert words in line
    assert hub.requests == []


def test_a_mirror(reader, hub, published):
    hub.create(REPO, {"config.json": b"{}"})  # what the Hub itself has does not matter
    with serve() as mirror:
        mirror.repos[REPO] = deepcopy(published.repo)
        assert (
            reader.load(NAME, package=published.package, env={"HF_ENDPOINT": mirror.url}).out.strip()
            == published.logits
        )
        commit = mirror.repos[REPO].at()
        commit.files[WEIGHTS_NAME] = File(altered(commit.files[WEIGHTS_NAME].data), lfs=True)
        folder = {"HF_ENDPOINT": mirror.url, "HF_HOME": str(reader.folder / "another")}
        client = reader.load(NAME, package=published.package, env=folder)
        assert client.status == 1
        assert client.out == ""
        line = client.err.splitlines()[-1]
        assert f"{WEIGHTS_NAME} of {REPO}@{commit.oid}: expected sha256 {published.record.sha256}, found " in line
        assert "mirror (HF_ENDPOINT)" in line
    assert hub.requests == []


def test_a_cache_of_its_own(reader, hub, published, tmp_path):
    cache = tmp_path / "cache"
    client = reader.load(NAME, package=published.package, cache_dir=str(cache))
    assert client.out.strip() == published.logits
    assert len(list(cache.glob(f"models--*/snapshots/*/{WEIGHTS_NAME}"))) == 1
    assert not list(reader.home.rglob(WEIGHTS_NAME))
    assert reader.run("pull", "--cache-dir", str(cache)).status == 1  # the desk's own manifest has it packed only
    client = reader.cli(
        "pull", NAME, "--manifest", str(published.manifest), "--cache-dir", str(cache), HF_HUB_OFFLINE="1"
    )
    assert client.status == 0


# All of it ------------------------------------------------------------------------------------------------------------


def test_from_pack_to_another_machine(hub, desks, packed, digits, tmp_path):
    """Published with a token that is passed, proved in a process of its own; pulled and verified where nothing was."""
    author = desks()
    token, author.token = author.token, None
    code = f"""
from timm_convmix.weights.publishing import publish
folders, manifest = {str(packed.folders)!r}, {str(author.manifest)!r}
print(publish({NAME!r}, packed=folders, manifest=manifest, token={token!r}, private=True)["revision"])
"""
    client = author.python(code)
    assert (client.status, client.out) == (0, f"{hub.repos[REPO].at().oid}\n"), client.err
    package = tmp_path / "package"
    shutil.copytree(packed.package, package, ignore=shutil.ignore_patterns("__pycache__", MANIFEST_NAME))
    shutil.copy(author.manifest, package)
    user = desks(manifest=author.manifest)
    asked = len(hub.requests)
    assert user.cli("pull", NAME, package=package).status == 0
    assert {request.path.split("/")[4] for request in hub.requests[asked:]} == {author.record.revision}
    asked = len(hub.requests)
    client = user.cli("verify", NAME, "--json", "--data", str(digits), package=package, HF_HUB_OFFLINE="1")
    assert client.status == 0, client.out
    assert client.rows[0]["top1"] == round(packed.record.metrics.top1, 4)
    assert len(hub.requests) == asked


@needs_scripts
def test_validate_says_the_same_as_pack(reader, hub, published, digits):
    """timm's validate.py, where nothing was cached; then in a process of its own, offline."""
    command = ["run", str(Path(SCRIPTS) / "validate.py"), "--model", NAME, "--pretrained", "--data-dir", str(digits)]
    command += ["--device", "cpu", "--workers", "0"]
    online = reader.cli(*command, package=published.package)
    assert online.status == 0, online.err
    asked = len(hub.requests)
    assert asked == 2
    env = reader.env(HF_HUB_OFFLINE="1", PYTHONPATH=str(published.package))
    process = [sys.executable, "-m", "timm_convmix", *command]
    offline = subprocess.run(process, env=env, cwd=reader.folder, capture_output=True, text=True, check=False)
    assert offline.returncode == 0, offline.stderr
    assert len(hub.requests) == asked
    for out in (online.out, offline.stdout):
        assert json.loads(out.partition("--result")[2])["top1"] == pytest.approx(
            published.record.metrics.top1, abs=1e-3
        )

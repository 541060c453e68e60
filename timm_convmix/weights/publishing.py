"""A packed folder to the Hub: one commit, read back and proved before the manifest says so."""

import dataclasses
import os
import subprocess
import sys
import tempfile
from hashlib import sha256
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from timm_convmix.errors import ChecksumError, HubError, PackingError
from timm_convmix.weights.card import format_card
from timm_convmix.weights.hub import (
    CONFIG_NAME,
    HUB_PREFIX,
    WEIGHTS_NAME,
    Head,
    check_write_access,
    choose_namespace,
    client,
    commit_files,
    read_head,
    read_text,
)
from timm_convmix.weights.manifest import WeightRecord, read_manifest, update_manifest
from timm_convmix.weights.packing import CARD_NAME, RECIPE_NAME

PROOF = """
import sys, timm, torch, timm_convmix
from timm_convmix.weights.hub import one_line
from timm_convmix.weights.measuring import probe_input
x, logits = None, []
try:
    for name in sys.argv[2:]:
        model = timm.create_model(name, pretrained=True, cache_dir=sys.argv[1]).eval()
        x = probe_input(model.pretrained_cfg["input_size"]) if x is None else x
        with torch.no_grad():
            logits.append(model(x))
except Exception as error:
    sys.exit(f"{type(error).__name__}: {one_line(error)}")
sys.exit(0 if torch.equal(*logits) else "the published model gives other logits than the packed folder")
"""


def publish(
    name: str,
    *,
    packed: str | Path = "packed",
    manifest: str | Path | None = None,
    namespace: str | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    private: bool = False,
    create_pr: bool = False,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Publish a packed weight, and write where it is into the manifest. Again, it goes on where it stopped.

    Args:
        name: ``arch.tag`` of the manifest.
        packed: The folder ``packed/name`` is published.
        manifest: The weights_manifest.json; None is this package's own.
        namespace: User or organisation on the Hub; None is that of the entry, or the token's user.
        token: As in huggingface_hub: None is the stored one.
        revision: A branch; None is main.
        private: Make a new repository private.
        create_pr: Open a pull request. The manifest is written once it is merged and this runs again without it.
        dry_run: Say what would be done; no request that writes is made.

    Returns:
        name, repo, action ('create', 'update', 'none', 'pull request'), files, deleted, revision, url.

    Raises:
        PackingError: There is no such entry or folder, or the folder is not the one that was recorded.
        HubError: The token, the namespace, the Hub or the network.
        ChecksumError: What the Hub holds is not what was sent.
    """
    record, folder = packed_entry(name, Path(packed), manifest)
    api = client(token)
    own = record.hub_id.partition("/")[0] if record.hub_id else None
    repo_id = f"{choose_namespace(api, namespace or own)}/{name}"
    head = read_head(api, repo_id, revision)
    if head.commit:
        check_write_access(api, repo_id)
    files = files_of(name, record, folder, repo_id, existing_card(api, repo_id, head))
    plan: dict[str, Any] = dict(
        name=name, repo=repo_id, action="update" if head.commit else "create", files=sorted(files)
    )
    plan |= dict(deleted=head.stale(files), revision=None, url=f"{api.endpoint}/{repo_id}")
    if dry_run:
        return plan
    commit, pull_request = commit_files(
        api,
        repo_id,
        files,
        message=f"{name}: {record.dataset.name}, top-1 {record.metrics.top1:.2f} %",
        head=head,
        revision=revision,
        private=private,
        create_pr=create_pr,
    )
    prove_published(repo_id, commit, folder, api)
    if pull_request:
        return plan | dict(action="pull request", revision=commit, url=pull_request)
    try:
        update_manifest(name, dataclasses.replace(record, state="published", hub_id=repo_id, revision=commit), manifest)
    except OSError as error:
        raise HubError(
            f"{repo_id} at {commit} is published, but the manifest could not be written ({error}); run it again."
        ) from error
    return plan | dict(action="none" if commit == head.commit else plan["action"], revision=commit)


def packed_entry(name: str, packed: Path, manifest: str | Path | None) -> tuple[WeightRecord, Path]:
    """The manifest's entry and its folder, which must be those that were packed together.

    Raises:
        PackingError: One is missing, or they do not go together.
    """
    records = read_manifest(manifest)
    folder = packed / name
    if name not in records:
        raise PackingError(
            f"{name} is not in the manifest, which has {', '.join(records) or 'no weights'}: pack it first."
        )
    if missing := [file for file in (CONFIG_NAME, WEIGHTS_NAME, RECIPE_NAME) if not (folder / file).is_file()]:
        raise PackingError(f"{folder} holds no {missing[0]}: pack {name} again, or name the folder that it is in.")
    if sha256((folder / WEIGHTS_NAME).read_bytes()).hexdigest() != records[name].sha256:
        raise PackingError(f"{folder / WEIGHTS_NAME} is not what the manifest records for {name}: pack it again.")
    return records[name], folder


def existing_card(api: HfApi, repo_id: str, head: Head) -> str | None:
    """The card at the head of a repository, whose hand-written part is to be kept."""
    return read_text(api, repo_id, CARD_NAME, head.commit) if head.commit and CARD_NAME in head.files else None


def files_of(name: str, record: WeightRecord, folder: Path, repo_id: str, card: str | None) -> dict[str, bytes]:
    """What is published, by name in the repository."""
    files = {file: (folder / file).read_bytes() for file in (CONFIG_NAME, RECIPE_NAME)}
    files[CARD_NAME] = format_card(name, record, repo=repo_id, existing=card).encode()
    files[record.filename] = (folder / WEIGHTS_NAME).read_bytes()
    return files


def prove_published(repo_id: str, commit: str, folder: Path, api: HfApi) -> None:
    """Load a commit as a user would, in a fresh process with an empty cache, and compare its logits with the folder's.

    Raises:
        HubError: It does not load.
        ChecksumError: Its logits differ in any bit.
    """
    environment = dict(os.environ) | ({"HF_TOKEN": api.token} if isinstance(api.token, str) else {})
    names = [f"{HUB_PREFIX}{repo_id}@{commit}", f"local-dir:{folder.resolve()}"]
    try:
        with tempfile.TemporaryDirectory() as cache:
            command = [sys.executable, "-c", PROOF, cache, *names]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)  # noqa: S603
        reason = (done.stderr.strip() or "no message").splitlines()[-1] if done.returncode else ""
    except OSError as error:
        reason = str(error)
    if reason:
        kind = ChecksumError if "other logits" in reason else HubError
        raise kind(
            f"{repo_id} at {commit} was committed, but did not prove itself ({reason.rstrip('.')}); the manifest is"
            " unchanged: run it again."
        )

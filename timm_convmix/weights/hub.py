"""The only network code: a download, and one guarded commit."""

import errno
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, try_to_load_from_cache
from huggingface_hub.errors import (  # type: ignore[attr-defined]
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from safetensors import SafetensorError

from timm_convmix.errors import ChecksumError, HubError, WeightsError
from timm_convmix.version import __version__

HUB_PREFIX = "hf-hub:"
"""Of timm's names of Hub repositories."""
WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
OTHER_WEIGHTS = (".bin", ".ckpt", ".h5", ".msgpack", ".pickle", ".pkl", ".pt", ".pth", ".safetensors", ".tar")
"""Endings of weight files; those that a commit does not bring itself are stale, and a loader might take them."""


DISK_ERRORS = {errno.EACCES, errno.EDQUOT, errno.ENOSPC, errno.EPERM, errno.EROFS}


def client(token: str | bool | None = None) -> HfApi:
    """The Hub's client under this package's name; ``token`` as in huggingface_hub, None is the stored one."""
    return HfApi(token=token, library_name="timm_convmix", library_version=__version__)


def one_line(error: BaseException) -> str:
    """What an error says, without what it says besides; of the Hub's answers the status and what was asked for."""
    if isinstance(error, LocalEntryNotFoundError) and error.__cause__:  # it says only that something happened
        error = error.__cause__
    lines = [line.rstrip(".") for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    text = ". ".join(lines[: 2 if isinstance(error, HfHubHTTPError) else 1])
    text = re.sub("Bearer .*", "Bearer ...", text)  # of a token that is no header
    return re.sub(r"(https?://[^\s'?]+)\?[^\s']*", r"\1", text)  # the link of an upload is signed


# Downloading ----------------------------------------------------------------------------------------------------------


@contextmanager
def hub_errors(what: str, source: str, ahead: str = "") -> Iterator[None]:
    """Turn the ways in which a download fails into one line with a remedy.

    Args:
        what: The model whose weights are fetched.
        source: The repository, or the address, that they come from.
        ahead: How to fetch them ahead of time; by default from ``source``.

    Raises:
        HubError: The block raised an error of the network, the Hub or the cache.
        WeightsError: The block met a safetensors file that is cut short or corrupt.
    """
    try:
        yield
    except HubError:
        raise
    except SafetensorError as error:
        raise WeightsError(
            f"{what}: the cached copy of {source} is not a sound safetensors file ({error}); remove it from the cache"
            " (`hf cache rm`, or cache_dir) and load again."
        ) from error
    except (OSError, HTTPError, HFValidationError) as error:
        if not ahead:
            ahead = "and pass pretrained_cfg_overlay=dict(file=...)" if "://" in source else f"(`hf download {source}`)"
        raise HubError(
            f"{what}: could not get its weights from {source} ({one_line(error)}). {_advice(error)},"
            f" fetch them ahead {ahead}, or pass pretrained=False."
        ) from error


def _advice(error: BaseException) -> str:
    if isinstance(error, GatedRepoError):
        return "Ask for access on the page of the repository and log in (`hf auth login`, or HF_TOKEN)"
    if isinstance(error, RepositoryNotFoundError):
        return "If it is private, log in (`hf auth login`, or HF_TOKEN)"
    if getattr(error, "errno", None) in DISK_ERRORS:
        return "Let HF_HOME (or cache_dir) name a folder that has space and may be written to"
    return "Check the network, HF_ENDPOINT and HF_HUB_OFFLINE"


def download(
    repo: str,
    filename: str,
    *,
    what: str,
    cache_dir: str | Path | None = None,
    force_download: bool = False,
) -> Path | None:
    """Fetch one file of a repository into huggingface_hub's cache.

    Args:
        repo: ``NAMESPACE/NAME`` or ``NAMESPACE/NAME@revision``.
        filename: In the repository.
        what: The model that it belongs to, for the message.
        cache_dir: Of huggingface_hub; None is its default.
        force_download: Fetch it even if it is in the cache.

    Returns:
        The path, in a folder that is named by the commit; None where the repository has no such file.

    Raises:
        HubError: It could not be fetched.
    """
    repo_id, _, revision = repo.partition("@")
    source, ahead = repo_id, ""
    if revision:
        source = f"{repo_id} at {revision}, file {filename}"
        command = f"hf download {repo_id} {filename} --revision {revision}"
        ahead = f"(`timm-convmix pull {HUB_PREFIX}{repo}` or `{command}`), use a folder (local-dir:DIR)"
    place: dict[str, Any] = dict(revision=revision or None, cache_dir=cache_dir)
    present = force_download and try_to_load_from_cache(repo_id, filename, **place)
    with hub_errors(what, source, ahead):
        try:
            with _aside(Path(present) if isinstance(present, str) else None):
                path = client().hf_hub_download(repo_id, filename, **place, force_download=force_download)
        except LocalEntryNotFoundError:  # not in the cache and the network is away, which says nothing of the file
            raise
        except EntryNotFoundError:
            return None
        except ValueError as error:  # so a forced download ends whose first request failed
            cause = error.__cause__
            raise cause if isinstance(cause, OSError | HTTPError) else OSError(str(error)) from error
    return Path(path)


@contextmanager
def _aside(path: Path | None) -> Iterator[None]:
    """Keep a cached file out of the way, for good if the block ends well.

    In a cache without symlinks huggingface_hub 2.4 leaves a file where it stands, even if it is told to replace it.
    """
    if path is None or path.is_symlink() or not path.exists():
        yield
        return
    aside = path.with_name(f"{path.name}.damaged")
    path.replace(aside)
    try:
        yield
    except BaseException:
        if not path.exists():
            aside.replace(path)
        raise
    aside.unlink(missing_ok=True)


def download_weights(
    repo: str,
    *,
    what: str,
    filename: str = WEIGHTS_NAME,
    cache_dir: str | Path | None = None,
    force_download: bool = False,
) -> Path:
    """Fetch a repository's safetensors file, never a pickle; arguments as of ``download``.

    Raises:
        WeightsError: The repository has no such file, or it is of another format.
        HubError: It could not be fetched.
    """
    if not filename.endswith(".safetensors"):
        raise WeightsError(
            f"{what}: {filename} of {repo} is no safetensors file, and nothing else is loaded from a Hub."
        )
    path = download(repo, filename, what=what, cache_dir=cache_dir, force_download=force_download)
    if path is None:
        raise WeightsError(f"{what}: {repo} holds no {filename}, and a pickle is not loaded.")
    return path


# Publishing -----------------------------------------------------------------------------------------------------------


@contextmanager
def api_errors(doing: str) -> Iterator[None]:
    """Turn what the Hub refuses into one line with a remedy.

    Args:
        doing: What is being done to what, such as "publish x to y".

    Raises:
        HubError: The block raised an error of the network or the Hub.
    """
    remedies = {
        401: "the token is not valid; log in again (`hf auth login`) or set HF_TOKEN",
        403: "the token may not do this; make one with write access to that namespace",
        412: "somebody else has committed meanwhile; run it again",
        429: "the Hub asks to slow down; run it again later",
    }
    again = "run it again: it goes on where it stopped"
    try:
        yield
    except HubError:
        raise
    except LocalTokenNotFoundError as error:
        raise HubError(f"Could not {doing}: there is no token; log in (`hf auth login`) or set HF_TOKEN.") from error
    except (OSError, HTTPError, ValueError, RuntimeError) as raised:
        # huggingface_hub wraps what an upload met in a RuntimeError
        failure = raised.__cause__ if isinstance(raised, RuntimeError) and raised.__cause__ else raised
        status = failure.response.status_code if isinstance(failure, HfHubHTTPError) else 0
        # a token of odd characters cannot be sent at all
        if unsendable := isinstance(failure, UnicodeEncodeError) or "Bearer" in str(failure):
            status = 401
        if getattr(failure, "errno", None) in DISK_ERRORS:
            remedy = f"let HF_HOME name a folder that has space and may be written to, and {again}"
        else:
            remedy = remedies.get(
                status, f"the Hub failed; {again}" if status >= 500 else f"check the network and {again}"
            )
        raise HubError(f"Could not {doing} ({one_line(failure)}): {remedy}.") from (None if unsendable else raised)


def choose_namespace(api: HfApi, namespace: str | None) -> str:
    """Check the token, and where it may write, before anything is made.

    Args:
        api: With the token to use.
        namespace: A user or organisation; None is the token's own user.

    Raises:
        HubError: There is no valid token, it may only read, or the namespace is not one of the user's.
    """
    with api_errors("log in to the Hub"):
        account = api.whoami()
    user = account["name"]
    namespace = namespace or str(user)
    own = [user, *(organisation["name"] for organisation in account.get("orgs", []))]
    if namespace not in own:
        raise HubError(f"The token's user {user} does not belong to {namespace}; namespaces are {', '.join(own)}.")
    if account.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise HubError(f"The token of {user} may only read; make one with write access and set HF_TOKEN.")
    return namespace


@dataclass(frozen=True)
class Head:
    """What stands at the head of a branch of a repository; of a branch that is to be made, at the head of main.

    Args:
        commit: 40 hexadecimal digits; None where the repository does not exist.
        files: Names.
        is_branch: Whether the branch exists.
    """

    commit: str | None
    files: tuple[str, ...]
    is_branch: bool

    def stale(self, names: Iterable[str]) -> list[str]:
        """Weight files that go when files of these names come."""
        return sorted(name for name in self.files if name.endswith(OTHER_WEIGHTS) and name not in names)


def read_head(api: HfApi, repo_id: str, revision: str | None) -> Head:
    """Look at a repository without changing it.

    Raises:
        HubError: It cannot be read.
    """
    with api_errors(f"look at {repo_id}"):
        try:
            info, is_branch = api.model_info(repo_id, revision=revision), True
        except RevisionNotFoundError:
            info, is_branch = api.model_info(repo_id), False
        except RepositoryNotFoundError:
            return Head(None, (), is_branch=False)
    return Head(info.sha, tuple(file.rfilename for file in info.siblings or ()), is_branch)


def check_write_access(api: HfApi, repo_id: str) -> None:
    """Refuse a repository that the token may read only, before anything is sent.

    Raises:
        HubError: The token may not write there.
    """
    with api_errors(f"write to {repo_id}"):
        api.auth_check(repo_id, write=True)


def read_text(api: HfApi, repo_id: str, filename: str, commit: str) -> str:
    """A small text file at a commit.

    Raises:
        HubError: It cannot be fetched.
    """
    with api_errors(f"read {filename} of {repo_id}"):
        return Path(api.hf_hub_download(repo_id, filename, revision=commit)).read_text(encoding="utf-8")


def commit_files(
    api: HfApi,
    repo_id: str,
    files: Mapping[str, bytes],
    *,
    message: str,
    head: Head,
    revision: str | None,
    private: bool,
    create_pr: bool,
) -> tuple[str, str | None]:
    """Bring files to a repository in one commit, on top of the head that was looked at, stale weight files removed.

    Where the files stand there already, nothing is committed; where an open pull request of that message brings the
    weights already, none is opened: the answer to the first attempt may have been lost.

    Returns:
        The commit, and the address of the pull request if one was asked for.

    Raises:
        HubError: The Hub refused, or the network failed.
        ChecksumError: The Hub holds other weights than were sent.
    """
    with api_errors(f"publish to {repo_id}"):
        if head.commit is None:
            api.create_repo(repo_id, private=private, exist_ok=True)
            head = read_head(api, repo_id, revision)
        if revision and not head.is_branch:
            api.create_branch(repo_id, branch=revision, revision=head.commit, exist_ok=True)
        weights = {name: sha256(data).hexdigest() for name, data in files.items() if name.endswith(".safetensors")}
        if create_pr and (opened := _open_request(api, repo_id, weights, message)):
            return opened
        commit = api.create_commit(
            repo_id,
            [CommitOperationAdd(name, data) for name, data in files.items()]
            + [CommitOperationDelete(name) for name in head.stale(files)],
            commit_message=message,
            revision=revision,
            create_pr=create_pr,
            parent_commit=head.commit,
        )
        stored = stored_digests(api, repo_id, commit.oid, weights)
    if wrong := sorted(name for name in weights if stored.get(name) != weights[name]):
        raise ChecksumError(f"{repo_id} at {commit.oid} holds another {', '.join(wrong)} than was sent; do not use it.")
    return commit.oid, commit.pr_url


def stored_digests(api: HfApi, repo_id: str, revision: str, filenames: Iterable[str]) -> dict[str, str]:
    """The sha256 that the Hub states of large files at a revision, by name; those that are not there left out."""
    stored = api.get_paths_info(repo_id, list(filenames), revision=revision)
    return {file.path: file.lfs.sha256 for file in stored if isinstance(file, RepoFile) and file.lfs}


def _open_request(api: HfApi, repo_id: str, weights: Mapping[str, str], title: str) -> tuple[str, str] | None:
    """The head and the address of an open pull request that brings these weights (name -> sha256) under this title."""
    for found in api.get_repo_discussions(repo_id, discussion_type="pull_request", discussion_status="open"):
        reference = f"refs/pr/{found.num}"
        if found.title == title and stored_digests(api, repo_id, reference, weights) == weights:
            return str(api.model_info(repo_id, revision=reference).sha), found.url
    return None

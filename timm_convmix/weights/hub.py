"""The only network code: a download, and one guarded commit."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, RepoFile
from huggingface_hub.errors import (  # type: ignore[attr-defined]
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError

from timm_convmix.errors import ChecksumError, HubError, WeightsError
from timm_convmix.version import __version__

WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
OTHER_WEIGHTS = (".bin", ".ckpt", ".h5", ".msgpack", ".pickle", ".pkl", ".pt", ".pth", ".safetensors", ".tar")
"""Endings of weight files; those that a commit does not bring itself are stale, and a loader might take them."""


def client(token: str | bool | None = None) -> HfApi:
    """The Hub's client under this package's name; ``token`` as in huggingface_hub, None is the stored one."""
    return HfApi(token=token, library_name="timm_convmix", library_version=__version__)


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
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if not ahead:
            ahead = "and pass pretrained_cfg_overlay=dict(file=...)" if "://" in source else f"(`hf download {source}`)"
        raise HubError(
            f"{what}: could not get its weights from {source} ({reason.rstrip('.')}). Check the network, HF_ENDPOINT"
            f" and HF_HUB_OFFLINE, fetch them ahead {ahead}, or pass pretrained=False."
        ) from error


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
        ahead = f"(`timm-convmix pull {what}` or `{command}`), use a folder (local-dir:DIR)"
    with hub_errors(what, source, ahead):
        try:
            path = client().hf_hub_download(
                repo_id,
                filename,
                revision=revision or None,
                cache_dir=cache_dir,
                force_download=force_download,
            )
        except LocalEntryNotFoundError:  # not in the cache and the network is away, which says nothing of the file
            raise
        except EntryNotFoundError:
            return None
    return Path(path)


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
    try:
        yield
    except HubError:
        raise
    except LocalTokenNotFoundError as error:
        raise HubError(f"Could not {doing}: there is no token; log in (`hf auth login`) or set HF_TOKEN.") from error
    except (OSError, HTTPError) as error:
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        remedy = remedies.get(status or 0, "check the network and run it again: it goes on where it stopped")
        raise HubError(f"Could not {doing} ({reason}): {remedy}.") from error


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
    """What stands at the head of a branch of a repository.

    Args:
        commit: 40 hexadecimal digits; None where the repository, or the branch, does not exist.
        files: Names.
        exists: Whether the repository does.
    """

    commit: str | None
    files: tuple[str, ...]
    exists: bool


def read_head(api: HfApi, repo_id: str, revision: str | None) -> Head:
    """Look at a repository without changing it.

    Raises:
        HubError: It cannot be read.
    """
    with api_errors(f"look at {repo_id}"):
        try:
            info = api.model_info(repo_id, revision=revision)
        except RevisionNotFoundError:
            return Head(None, (), exists=True)
        except RepositoryNotFoundError:
            return Head(None, (), exists=False)
    return Head(info.sha, tuple(file.rfilename for file in info.siblings or ()), exists=True)


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

    Where the files stand there already, nothing is committed.

    Returns:
        The commit, and the address of the pull request if one was asked for.

    Raises:
        HubError: The Hub refused, or the network failed.
        ChecksumError: The Hub holds other weights than were sent.
    """
    stale = [name for name in head.files if name.endswith(OTHER_WEIGHTS) and name not in files]
    with api_errors(f"publish to {repo_id}"):
        if not head.exists:
            api.create_repo(repo_id, private=private, exist_ok=True)
        if head.commit is None:
            if revision:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            head = read_head(api, repo_id, revision)
        commit = api.create_commit(
            repo_id,
            [CommitOperationAdd(name, data) for name, data in files.items()]
            + [CommitOperationDelete(name) for name in stale],
            commit_message=message,
            revision=revision,
            create_pr=create_pr,
            parent_commit=head.commit,
        )
        stored = api.get_paths_info(repo_id, list(files), revision=commit.oid)
    digests = {file.path: file.lfs.sha256 for file in stored if isinstance(file, RepoFile) and file.lfs}
    weights = {name: sha256(data).hexdigest() for name, data in files.items() if name.endswith(".safetensors")}
    if wrong := sorted(name for name in weights if digests.get(name) != weights[name]):
        raise ChecksumError(f"{repo_id} at {commit.oid} holds another {', '.join(wrong)} than was sent; do not use it.")
    return commit.oid, commit.pr_url

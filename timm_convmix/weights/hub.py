"""The only network code."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HTTPError, LocalEntryNotFoundError  # type: ignore[attr-defined]
from safetensors import SafetensorError

from timm_convmix.errors import HubError, WeightsError
from timm_convmix.version import __version__

WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"


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
    except (OSError, HTTPError) as error:
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
            path = hf_hub_download(
                repo_id,
                filename,
                revision=revision or None,
                cache_dir=cache_dir,
                force_download=force_download,
                library_name="timm_convmix",
                library_version=__version__,
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

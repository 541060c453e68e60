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


@contextmanager
def hub_errors(what: str, source: str) -> Iterator[None]:
    """Turn the ways in which a download fails into one line with a remedy.

    Args:
        what: The model whose weights are fetched.
        source: The repository, or the address, that they come from.

    Raises:
        HubError: The block raised an error of the network, the Hub or the cache.
        WeightsError: The block met a safetensors file that is cut short or corrupt.
    """
    try:
        yield
    except SafetensorError as error:
        raise WeightsError(
            f"{what}: the cached copy of {source} is not a sound safetensors file ({error}); remove it from the cache"
            " (`hf cache rm`, or cache_dir) and load again."
        ) from error
    except (OSError, HTTPError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        ahead = "and pass pretrained_cfg_overlay=dict(file=...)" if "://" in source else f"(`hf download {source}`)"
        raise HubError(
            f"{what}: could not get its weights from {source} ({reason.rstrip('.')}). Check the network, HF_ENDPOINT"
            f" and HF_HUB_OFFLINE, fetch them ahead {ahead}, or pass pretrained=False."
        ) from error


def download_weights(
    repo: str, *, what: str, filename: str = WEIGHTS_NAME, cache_dir: str | Path | None = None
) -> Path:
    """Fetch a repository's safetensors file, never a pickle.

    Args:
        repo: ``NAMESPACE/NAME`` or ``NAMESPACE/NAME@revision``.
        what: The model whose weights these are, for the message.
        filename: In the repository.
        cache_dir: Of huggingface_hub; None is its default.

    Raises:
        WeightsError: The repository has no such file, or it is of another format.
        HubError: It could not be fetched.
    """
    if not filename.endswith(".safetensors"):
        raise WeightsError(
            f"{what}: {filename} of {repo} is no safetensors file, and nothing else is loaded from a Hub."
        )
    repo_id, _, revision = repo.partition("@")
    with hub_errors(what, repo):
        try:
            path = hf_hub_download(
                repo_id,
                filename,
                revision=revision or None,
                cache_dir=cache_dir,
                library_name="timm_convmix",
                library_version=__version__,
            )
        except LocalEntryNotFoundError:  # not in the cache and the network is away, which says nothing of the file
            raise
        except EntryNotFoundError as error:
            raise WeightsError(f"{what}: {repo} holds no {filename}, and a pickle is not loaded.") from error
    return Path(path)

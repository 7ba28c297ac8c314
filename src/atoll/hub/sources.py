"""Where a pulled adapter comes from: a folder on this disk, or a repository of the Hugging Face hub ("hf:owner/name", "hf:owner/name@revision").

Only the four files of an adapter are fetched, at one commit, which is recorded as the origin. Nothing is ever run or imported from there.

Used by store.py.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from atoll.errors import AdapterFormatError, AdapterNotFound, HubError
from atoll.hub.intake import MAX_BYTES
from atoll.model.adapter_files import PICKLE_SUFFIXES, WEIGHTS_FILE


@contextmanager
def opened(source: str | Path, scratch: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """(folder, origin record) of a source; a download goes into `scratch` and is the caller's to remove."""
    if isinstance(source, str) and source.startswith("hf:"):
        yield _download(source, scratch)
    elif isinstance(source, str) and "://" in source:
        raise HubError(f"cannot pull from {source!r}: URLs are not fetched", hint="download the folder first, or name a repository as hf:owner/name")
    else:
        yield Path(source).expanduser(), {"source": "folder"}  # no path: it would give the same files another digest on every machine


def _download(source: str, scratch: Path) -> tuple[Path, dict[str, Any]]:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, RepositoryNotFoundError

    repository, _, revision = source.removeprefix("hf:").partition("@")
    try:
        info = HfApi().model_info(repository, revision=revision or None, files_metadata=True)
        _check_listing(source, {file.rfilename: file.size or 0 for file in info.siblings or []})
        folder = Path(snapshot_download(repository, revision=info.sha, allow_patterns=list(MAX_BYTES), local_dir=scratch))
    except HFValidationError as error:
        raise HubError(f"{source}: {error}", hint="write hf:owner/name or hf:owner/name@revision") from error
    except RepositoryNotFoundError as error:
        raise AdapterNotFound(
            f"{source}: the Hugging Face hub has no such repository", hint="check the name; a private one needs `hf auth login`"
        ) from error
    except HfHubHTTPError as error:
        raise HubError(f"{source}: the Hugging Face hub answered {error.response.status_code}", hint="check the name and the revision") from error
    except Exception as error:
        # The client lets its HTTP library's errors through, and which library that is (requests, httpx, httpx2) depends on its version.
        offline = isinstance(error, OfflineModeIsEnabled | LocalEntryNotFoundError | ConnectionError)
        if not offline and not type(error).__module__.startswith(("httpx", "requests", "urllib3")):
            raise
        raise HubError(f"{source} could not be fetched: the Hugging Face hub is not reachable", hint="go online, or pull from a folder") from error
    shutil.rmtree(folder / ".cache", ignore_errors=True)  # the downloader's notes, which are not the repository's
    return folder, {"source": f"hf:{repository}", "revision": info.sha}


def _check_listing(source: str, sizes: dict[str, int]) -> None:
    """Refuse before downloading what would be refused after."""
    pickles = sorted(name for name in sizes if "/" not in name and Path(name).suffix in PICKLE_SUFFIXES)
    if WEIGHTS_FILE not in sizes:
        found = f"its weights are a pickle ({pickles[0]})" if pickles else f"it has no {WEIGHTS_FILE}"
        raise AdapterFormatError(
            f"{source} is not an adapter that can be pulled: {found}", hint="safetensors adapters only; ask its author to convert it"
        )
    for name, cap in MAX_BYTES.items():
        if sizes.get(name, 0) > cap:
            raise AdapterFormatError(f"{source}: {name} has {sizes[name]} bytes; the limit is {cap}", hint="is it the repository you meant?")

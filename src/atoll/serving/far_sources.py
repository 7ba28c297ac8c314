"""Adapters from elsewhere: the Hugging Face hub and object stores. Both are off unless the operator turns them on.

Sizes are read from the listing before a byte is fetched, only an adapter's three files are fetched, and nothing of them is ever run.

Used by registry.py, in worker threads.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from pathlib import Path
from typing import Any

from atoll.errors import AdapterNotFound, AtollError, EngineError
from atoll.serving.sources import FILES, Located, Reference, check_files, copy_capped, folder_digest

_REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}")


class HuggingFaceSource:
    """Repositories of the Hugging Face hub, at one commit. The request's token opens the request's download and no other; ours is never used."""

    name, far, ttl_s = "hf", True, 60.0

    def stamp(self, reference: Reference) -> object:
        return None

    def name_of(self, reference: Reference) -> str | None:
        repository, revision = self._parts(reference)
        if not _REPOSITORY.fullmatch(repository) or (revision and (not _REVISION.fullmatch(revision) or ".." in revision)):
            raise AdapterNotFound(f"{reference.shown!r} names no repository of the Hugging Face hub", hint="write owner/name or owner/name@revision")
        return f"hf:{repository}"

    def locate(self, reference: Reference) -> Located:
        from huggingface_hub import HfApi

        name = self.name_of(reference)
        repository, revision = self._parts(reference)
        try:
            info = HfApi(token=reference.token or False).model_info(repository, revision=revision or None, files_metadata=True, timeout=20)
        except Exception as error:
            raise _as_ours(error, f"hf:{repository}") from error
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or [] if "/" not in file.rfilename}
        files = {file: sizes[file] for file in FILES if file in sizes}
        check_files(files, list(sizes), f"hf:{repository}")
        identity = f"hf:{repository}@{info.sha}"
        return Located("hf", str(name), identity, identity, None, sum(files.values()), (repository, info.sha))

    def fetch(self, located: Located, scratch: Path, token: str | None) -> tuple[Path, str]:
        from huggingface_hub import snapshot_download

        repository, commit = located.detail
        try:
            snapshot_download(repository, revision=commit, allow_patterns=list(FILES), local_dir=scratch, token=token or False)
        except Exception as error:
            raise _as_ours(error, located.name) from error
        shutil.rmtree(scratch / ".cache", ignore_errors=True)  # the downloader's notes
        files = {path.name: path.stat().st_size for path in scratch.iterdir()}
        check_files(files, [], located.name)
        if sum(files.values()) > located.num_bytes:
            raise EngineError(f"{located.name} sent more than its listing said", hint="ask again later")
        return scratch, folder_digest(scratch)

    @staticmethod
    def _parts(reference: Reference) -> tuple[str, str]:
        repository, _, revision = reference.adapter_id.removeprefix("hf:").partition("@")
        return repository, reference.revision or revision


class StoreSource:
    """Objects below allowed URLs (s3://bucket/prefix), through fsspec and with the server's own credentials."""

    name, far, ttl_s = "s3", True, 10.0

    def __init__(self, prefixes: tuple[str, ...]) -> None:
        self._prefixes = tuple(prefix.rstrip("/") + "/" for prefix in prefixes)

    def stamp(self, reference: Reference) -> object:
        return None

    def name_of(self, reference: Reference) -> str | None:
        url = reference.adapter_id.rstrip("/")
        below = next((url[len(prefix) :] for prefix in self._prefixes if url.startswith(prefix)), None)
        if not below or not re.fullmatch(r"[A-Za-z0-9._/=+-]+", below) or any(part in ("", ".", "..") for part in below.split("/")):
            raise AdapterNotFound(f"{reference.shown!r} is not below a URL that this server may read", hint="the operator allows them: --s3-prefix")
        return url

    def locate(self, reference: Reference) -> Located:
        url = str(self.name_of(reference))
        files: dict[str, int] = {}
        marks = []
        try:
            store, root = _open(url)
            for file in FILES:
                try:
                    found = store.info(f"{root}/{file}")
                except FileNotFoundError:
                    continue
                files[file] = int(found["size"])
                marks.append(f"{file}:{found['size']}:{_mark(found)}")
            names = [] if len(files) > 1 else [str(path).rsplit("/", 1)[-1] for path in store.ls(root, detail=False)]
        except FileNotFoundError as error:
            raise AdapterNotFound(f"there is no adapter at {url!r}", hint="check the URL") from error
        except Exception as error:
            raise _as_ours(error, url) from error
        check_files(files, names, url)
        identity = f"s3:{url};{hashlib.sha256(';'.join(marks).encode()).hexdigest()}"
        return Located("s3", url, url, identity, None, sum(files.values()), (url, tuple(files)))

    def fetch(self, located: Located, scratch: Path, token: str | None) -> tuple[Path, str]:
        url, files = located.detail
        try:
            store, root = _open(url)
            for file in files:
                with store.open(f"{root}/{file}", "rb") as reader:
                    copy_capped(reader, scratch / file, located.num_bytes)
        except Exception as error:
            raise _as_ours(error, url) from error
        return scratch, folder_digest(scratch)


def _open(url: str) -> tuple[Any, str]:
    import fsspec

    store, root = fsspec.core.url_to_fs(url, use_listings_cache=False)
    return store, str(root).rstrip("/")


def _mark(found: dict[str, Any]) -> str:
    """What changes when an object does: its tag, or else its time."""
    return str(next((found[key] for key in ("ETag", "etag", "md5", "LastModified", "mtime", "created") if found.get(key) is not None), ""))


def _as_ours(error: Exception, where: str) -> AtollError:
    """A client library's error as a sentence. Which library raised it (httpx, requests, botocore, ...) depends on versions, so names decide."""
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    if isinstance(error, AtollError):
        return error
    if isinstance(error, RepositoryNotFoundError | RevisionNotFoundError):
        return AdapterNotFound(f"{where}: the Hugging Face hub has no such repository or revision", hint="a private one needs api_token")
    if isinstance(error, HfHubHTTPError):
        code = getattr(error.response, "status_code", None)
        return EngineError(f"{where}: the Hugging Face hub answered {code}", hint="check the name, the revision and api_token")
    if isinstance(error, ImportError):
        return EngineError(f"{where}: this server lacks a package to read it: {error}", hint="the operator can install it (s3fs for s3://)")
    return EngineError(f"{where} could not be fetched: {type(error).__name__}", hint="it is not reachable or refused; the server's log says more")

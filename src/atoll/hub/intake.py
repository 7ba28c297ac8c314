"""Take a stranger's folder in: copy what belongs to an adapter into quarantine, check it there, and hash it.

The copy comes first, so that what was checked is exactly what is stored, whatever happens to the source meanwhile. Only four files are an adapter;
the rest of a training folder (checkpoints, optimizer, tokenizer) is named and left out, and a pickle never stands in for weights.

Used by store.py for publish and pull.
"""

from __future__ import annotations

import hashlib
import json
import math
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from atoll.errors import AdapterFormatError, AtollError, BaseMismatch, UnsupportedAdapter
from atoll.hub.blobs import copy_and_hash, sha256_of
from atoll.model.adapter_files import CONFIG_FILE, MANIFEST_FILE, PICKLE_SUFFIXES, WEIGHTS_FILE

if TYPE_CHECKING:
    from atoll.model.adapter import AdapterSpec

README_FILE = "README.md"
# Text files have small caps: nothing that is read into memory whole may be large. Weights have one against filling the disk by mistake.
MAX_BYTES = {CONFIG_FILE: 1 << 20, WEIGHTS_FILE: 16 << 30, MANIFEST_FILE: 1 << 20, README_FILE: 1 << 20}
BESIDE_WEIGHTS = ("training_args", "optimizer", "scheduler", "rng_state", "scaler")  # pickles that a Trainer writes, none of which holds the adapter
KINDS = ("lora", "reft", "lora+reft", "composed")
FORMAT = 1
PYREFT_PREFIX = "intkey_"  # of the pickles in a folder that PyReFT saved
BASE_FIELDS = ("name", "config_hash", "weights_fingerprint", "tokenizer_hash", "chat_template_hash")


@dataclass(frozen=True)
class StoredFile:
    """One file of a version: its name in the folder, the sha256 of its bytes, its size."""

    name: str
    sha256: str
    size_bytes: int


@dataclass(frozen=True)
class Intake:
    """A checked adapter in quarantine, ready to be stored. `folder` holds exactly `files`."""

    folder: Path
    files: tuple[StoredFile, ...]
    digest: str
    manifest: Mapping[str, Any]
    readme: Mapping[str, Any]  # the README's front matter, or empty
    rank: int
    num_parameters: int
    left_out: tuple[str, ...]


class Quarantines:
    """Private folders of publishers at work, on the hub's file system.

    An owner holds the lock file beside its folder as long as it lives, so that `sweep` can tell what a killed process left behind.
    """

    def __init__(self, root: Path, lock: Path) -> None:
        """`lock` is the hub's: held for a moment, so that no quarantine appears half-made while another process sweeps."""
        self._root, self._lock = root, lock

    @contextmanager
    def new(self) -> Iterator[Path]:
        """An empty folder, gone at the end of the block."""
        place = self._root / secrets.token_hex(8)
        owner = FileLock(place.with_suffix(".lock"))
        with FileLock(self._lock):
            owner.acquire()
            place.mkdir()
        try:
            yield place
        finally:
            shutil.rmtree(place, ignore_errors=True)  # what resists is left for sweep
            place.with_suffix(".lock").unlink(missing_ok=True)
            owner.release()

    def sweep(self) -> None:
        """Remove the quarantines of dead owners."""
        with FileLock(self._lock):
            for lock in self._root.glob("*.lock"):
                try:
                    with FileLock(lock, timeout=0):
                        shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
                        lock.unlink(missing_ok=True)
                except Timeout:
                    continue  # its owner is at work


def take_in(
    source: Path, quarantine: Path, *, base: Mapping[str, Any] | None, origin: Mapping[str, Any] | None, fault: Callable[[str], None]
) -> Intake:
    """Copy, check and hash the adapter of `source` into the empty folder `quarantine`.

    Without a manifest.json one is made beside the other files, holding `origin` and what is known of the base: the same for the same input, so the
    digest is too. Raises AdapterFormatError, UnsupportedAdapter or BaseMismatch; the caller empties the quarantine.
    """
    left_out = survey(source)
    for name in MAX_BYTES:
        if (source / name).exists():
            copy_and_hash(source / name, quarantine / name, halfway=lambda: fault("copy"))
    spec = _checked_spec(source, quarantine)
    readme = front_matter((quarantine / README_FILE).read_bytes()) if (quarantine / README_FILE).exists() else {}
    if (quarantine / MANIFEST_FILE).exists():
        manifest = read_manifest(quarantine / MANIFEST_FILE)
        _check_same_base(manifest["base"], base or {})
    else:
        manifest = _new_manifest(quarantine, spec, readme, base, origin)
    if manifest["kind"] not in (spec.kind, "composed"):  # a composed adapter is stored in the form of what it was composed of
        raise AdapterFormatError(
            f"{MANIFEST_FILE} says the adapter is {manifest['kind']!r}, its files are {spec.kind!r}", hint="write the folder again with one tool"
        )
    files = tuple(_stored(path) for path in sorted(quarantine.iterdir()))
    shapes = tensor_shapes(quarantine)
    num_parameters = sum(math.prod(shape) for shape in shapes.values())
    return Intake(quarantine, files, version_digest(files), manifest, readme, spec.rank, num_parameters, left_out)


def version_digest(files: Iterable[StoredFile]) -> str:
    """sha256 over the sorted lines '<sha256>  <name>': in the folder, `sha256sum * | sort | sha256sum` says the same."""
    return hashlib.sha256("".join(sorted(f"{file.sha256}  {file.name}\n" for file in files)).encode()).hexdigest()


def survey(source: Path) -> tuple[str, ...]:
    """Names in `source` that are not part of an adapter, sorted. Raises AdapterFormatError if the adapter is incomplete, oversized or hostile."""
    if not source.is_dir():
        raise AdapterFormatError(f"there is no adapter folder at {source}", hint=f"give a folder with {CONFIG_FILE} and {WEIGHTS_FILE}")
    names = sorted(f"{path.name}/" if path.is_dir() else path.name for path in source.iterdir())
    pickles = [name for name in names if Path(name).suffix.lower() in PICKLE_SUFFIXES and not name.startswith(BESIDE_WEIGHTS)]
    if WEIGHTS_FILE not in names and pickles:
        save_again = f"save the adapter again as {WEIGHTS_FILE} (PEFT: model.save_pretrained(folder, safe_serialization=True))"
        raise AdapterFormatError(
            f"{source / pickles[0]} is a pickle, which can run code when it is read; the hub never opens one",
            hint=f"bring PyReFT's folders in with atoll hub import-pyreft {source} NAME" if pickles[0].startswith(PYREFT_PREFIX) else save_again,
        )
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if name not in names:
            raise AdapterFormatError(f"{source} has no {name}", hint=_elsewhere(source))
    for name, cap in MAX_BYTES.items():
        if name in names:
            _check_plain_file(source, name, cap)
    return tuple(name for name in names if name not in MAX_BYTES)


def _elsewhere(source: Path) -> str:
    """Where the adapter of a folder that is none may be: a Trainer's output has it in checkpoint-500/, unless it was saved there too."""
    inside = [path.parent for path in source.glob(f"*/{CONFIG_FILE}") if (path.parent / WEIGHTS_FILE).is_file()]
    if inside:
        newest = max(inside, key=lambda folder: (folder / WEIGHTS_FILE).stat().st_mtime)
        return f"the newest adapter inside is {newest}: give that folder"
    if any(path.is_dir() for path in source.iterdir()):
        return "the adapter may be in a folder inside: give that one"
    return f"an adapter is {CONFIG_FILE} and {WEIGHTS_FILE}"


def _check_plain_file(source: Path, name: str, cap: int) -> None:
    """A regular file of at most `cap` bytes; a link only within the folder, or within a Hugging Face cache (snapshots/<commit>/ links to blobs/)."""
    path = source / name
    if path.is_symlink():
        within = source.resolve()
        if within.parent.name == "snapshots":
            within = within.parent.parent
        if not path.resolve().is_relative_to(within):
            raise AdapterFormatError(f"{path} is a link out of its folder", hint="copy the file itself into the folder")
    found = path.stat() if path.exists() else None
    if found is None or not stat.S_ISREG(found.st_mode):
        raise AdapterFormatError(f"{path} is not a regular file", hint="copy the file itself into the folder")
    if found.st_size > cap:
        raise AdapterFormatError(f"{path} has {found.st_size} bytes; the limit is {cap}", hint="is it the file you meant?")


def _checked_spec(source: Path, quarantine: Path) -> AdapterSpec:
    """The header and value checks of the tensors, which belong to model/. Errors name the file the user gave, not our copy of it."""
    from atoll.model.adapter_files import check_adapter_files

    try:
        return check_adapter_files(quarantine)
    except AtollError as error:
        raise type(error)(error.message.replace(str(quarantine), str(source)), hint=error.hint) from error


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Tensor key -> shape of a folder's weights, from the header alone."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / WEIGHTS_FILE, framework="np") as tensors:
            return {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118  (it is no dict)
    except SafetensorError as error:
        raise AdapterFormatError(f"{folder / WEIGHTS_FILE} is not a safetensors file: {error}", hint="save the adapter again") from error


def _stored(path: Path) -> StoredFile:
    return StoredFile(path.name, sha256_of(path), path.stat().st_size)


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file; AdapterFormatError for anything else, NaN included."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        found = json.loads(path.read_bytes().decode("utf-8"), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise AdapterFormatError(f"{path.name} is not valid JSON: {error}", hint="write the file again") from error
    if not isinstance(found, dict):
        raise AdapterFormatError(f"{path.name} holds a {type(found).__name__}, not an object", hint="write the file again")
    return found


def read_manifest(path: Path) -> dict[str, Any]:
    """A manifest.json whose fields that the hub reads have their types; the others are kept unread."""
    manifest = read_json_object(path)
    if manifest.get("format") != FORMAT:
        newer = isinstance(manifest.get("format"), int) and manifest["format"] > FORMAT
        error = UnsupportedAdapter if newer else AdapterFormatError
        raise error(
            f"{MANIFEST_FILE} has format {manifest.get('format')!r}; this Atoll reads {FORMAT}", hint="upgrade Atoll" if newer else "write it again"
        )
    base = manifest.get("base")
    wrong = {
        f"kind must be one of {', '.join(KINDS)}": manifest.get("kind") not in KINDS,
        "base must be an object of strings": not isinstance(base, dict)
        or not all(base.get(key) is None or isinstance(base[key], str) for key in (*BASE_FIELDS, "quantization")),
        "parents must be a list of objects": not _is_list_of_parents(manifest.get("parents", [])),
        "training must be an object or null": not isinstance(manifest.get("training"), dict | None),
        "prompt must be an object or null": not isinstance(manifest.get("prompt"), dict | None),
        "name, title, description, task and licence must be strings or null": any(
            not isinstance(manifest.get(key), str | None) for key in ("name", "title", "description", "task", "licence")
        ),
    }
    for rule, broken in wrong.items():
        if broken:
            raise AdapterFormatError(f"{MANIFEST_FILE}: {rule}", hint=f"delete {MANIFEST_FILE} to have a plain one made, or write it again")
    return manifest


def _is_list_of_parents(parents: Any) -> bool:
    kinds = (("digest", str), ("name", str), ("weight", int | float))
    return isinstance(parents, list) and all(
        isinstance(parent, dict) and all(isinstance(parent.get(key), kind | None) for key, kind in kinds) for parent in parents
    )


def _check_same_base(recorded: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    for key in BASE_FIELDS[1:]:
        if recorded.get(key) and given.get(key) and recorded[key] != given[key]:
            raise BaseMismatch(
                f"{MANIFEST_FILE} records {key} {recorded[key][:12]}…, the base given has {given[key][:12]}…",
                hint="publish with the base the adapter was trained on, or without naming one",
            )


def _new_manifest(
    folder: Path, spec: AdapterSpec, readme: Mapping[str, Any], base: Mapping[str, Any] | None, origin: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The manifest of an adapter that came without one. No date and no name in it: equal files must have equal digests."""
    config = read_json_object(folder / CONFIG_FILE)
    named = config.get("base_model_name_or_path")
    licence = readme.get("license")
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "kind": spec.kind,
        "name": None,
        "base": {**dict.fromkeys(BASE_FIELDS), "name": named if isinstance(named, str) and named else None, **(base or {})},
        "prompt": None,
        "quantization": None,
        "training": None,
        "parents": [],
        "licence": licence if isinstance(licence, str) else None,
        "origin": dict(origin) if origin else None,
    }
    made = folder / MANIFEST_FILE
    made.with_suffix(".tmp").write_text(json.dumps(manifest, indent=2, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")
    copy_and_hash(made.with_suffix(".tmp"), made)
    made.with_suffix(".tmp").unlink()
    return manifest


def front_matter(readme: bytes) -> dict[str, Any]:
    """The YAML block at the start of a README, or {}; a broken one is the card's problem, not the adapter's."""
    import yaml

    text = readme.decode("utf-8", errors="replace")
    parts = text.split("---", 2)
    if parts[0].strip() or len(parts) < 3 or len(parts[1]) > 65536:
        return {}
    try:
        found = yaml.safe_load(parts[1])
    except yaml.YAMLError:
        return {}
    return {str(key): value for key, value in found.items()} if isinstance(found, dict) else {}

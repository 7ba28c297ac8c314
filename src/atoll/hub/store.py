"""Hub: publish, find, trust, label and delete adapters.

Publishing is five steps, each harmless to repeat and invisible until the last: copy into quarantine, check, store the blobs, build the folder, add
the index row. Storing is repeated inside the writer's transaction, where garbage collection also works, so neither can take the other's files.

    <root>/hub.db              the index (records.py), unless a database URL was given
    <root>/blobs/sha256/ab/…   every file once, read-only
    <root>/adapters/<digest>/  one ordinary adapter folder a version: hard links to blobs
    <root>/staging/            quarantines of publishers at work; a dead one's is swept by gc

Used by workflows, compose, the server and the command line.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from atoll.errors import HubError, IntegrityError, StorageError
from atoll.hub import index
from atoll.hub.blobs import copy_and_hash, link_or_copy, open_blobs, sha256_of, storage_errors, sync_folder
from atoll.hub.card import Card, Parent
from atoll.hub.card_composition import layer_weights
from atoll.hub.compatibility import Shapes, Verdict, verdict
from atoll.hub.database import Database, sqlite_url
from atoll.hub.intake import MAX_BYTES, README_FILE, Intake, Quarantines, StoredFile, read_json_object, take_in, tensor_shapes, version_digest
from atoll.hub.ledger import Ledger
from atoll.hub.names import check_name, check_tag, parse_reference
from atoll.hub.records import FileRow, ParentRow, TagRow, Version, VersionRow, version_of
from atoll.hub.sources import opened
from atoll.model.adapter_files import CONFIG_FILE, MANIFEST_FILE

SPARE_BYTES = 1 << 20  # kept free beside an upload, so that the index can still be written: deleting needs room too


@dataclass(frozen=True)
class Problem:
    """One way in which stored bytes differ from what was published. found is None where the file is gone."""

    ref: str
    file: str
    expected: str
    found: str | None

    def __str__(self) -> str:
        return f"{self.ref}: {self.file} should be {self.expected}, " + ("but it is gone" if self.found is None else f"but is {self.found}")


@dataclass(frozen=True)
class GcReport:
    """What garbage collection removed."""

    num_blobs: int
    num_folders: int
    freed_bytes: int


class Hub(Ledger):
    """A hub in a folder (default: hub/ in the Atoll home), its index in SQLite there or at `database_url`, its blobs there or at `blob_url`."""

    def __init__(
        self,
        root: Path | None = None,
        database_url: str | None = None,
        blob_url: str | None = None,
        *,
        fault: Callable[[str], None] = lambda point: None,
    ) -> None:
        """Opens the hub, creating or migrating it. `fault` is called with the name of each step of publishing: tests die there."""
        if root is None:
            from atoll.config import atoll_home

            root = atoll_home() / "hub"
        self.root = Path(root).expanduser().absolute()
        self.urls = (database_url, blob_url)  # as given: with the root, all that another process needs to open the same hub
        self._adapters, staging, lock = self.root / "adapters", self.root / "staging", self.root / "hub.lock"
        with storage_errors(f"opening the hub at {self.root}"):
            for folder in (self._adapters, staging):
                folder.mkdir(parents=True, exist_ok=True)
            self._blobs = open_blobs(self.root, blob_url)
            self._database = Database(database_url or sqlite_url(self.root / "hub.db"), lock)
        self._quarantines = Quarantines(staging, lock)
        self._fault = fault

    # ---- in and out ----

    def publish(
        self,
        folder: Path | str,
        name: str,
        *,
        tags: Sequence[str] = (),
        message: str = "",
        licence: str | None = None,
        base: Mapping[str, Any] | None = None,
    ) -> Version:
        """Store the adapter of `folder` as the next version of `name`; the same content again returns the version that is there.

        `base` is a manifest's base record, for a folder without a manifest; if there is one, the hashes must agree. Raises NameRefused,
        AdapterFormatError, UnsupportedAdapter, BaseMismatch, StorageError or Busy, and then nothing has changed.
        """
        return self._take(Path(folder).expanduser(), name, tags=tags, message=message, licence=licence, base=base, origin=None)

    def pull(self, source: Path | str, name: str, *, tags: Sequence[str] = (), message: str = "", licence: str | None = None) -> Version:
        """Bring a folder, or "hf:owner/name[@revision]", into the hub. Its files stay bit-exact; a manifest with the origin is put beside."""
        with storage_errors(f"pulling {source}"), self._quarantines.new() as scratch, opened(source, scratch / "download") as (folder, origin):
            return self._take(folder, name, tags=tags, message=message, licence=licence, base=None, origin=origin)

    def _take(
        self,
        folder: Path,
        name: str,
        *,
        tags: Sequence[str],
        message: str,
        licence: str | None,
        base: Mapping[str, Any] | None,
        origin: Mapping[str, Any] | None,
    ) -> Version:
        check_name(name)
        for tag in tags:
            check_tag(tag)
        with self._database.read() as session:
            index.check_free(session, name)  # before the work; add_version asks again under the writer's lock
            session.rollback()
        with storage_errors(f"publishing {folder} as {name!r}"), self._quarantines.new() as place:
            self._check_room(folder)
            files = place / "files"
            files.mkdir()
            intake = take_in(folder, files, base=base, origin=origin, fault=self._fault)
            self._fault("staged")
            self._keep(intake, trust=False)
            with self._database.write() as session:
                self._fault("locked")
                self._keep(intake, trust=True)  # garbage collection may have run since; it cannot now
                self._show_folder(intake, place)
                row = index.add_version(session, intake, name, tags=tags, message=message, licence=licence)
                self._fault("row")
                version = version_of(row, self._adapters, intake.left_out)
            self._fault("committed")
        return version

    def export(self, ref: str, out: Path | str) -> Path:
        """Copy the version's files, bit-exact, to the new or empty folder `out`. IntegrityError if the stored bytes have changed."""
        target = Path(out).expanduser().absolute()
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise HubError(f"{target} exists and is not an empty folder", hint="choose a new folder")
        version = self.resolve(ref)
        folder = self.path(version)
        with storage_errors(f"exporting {version.ref}"):
            target.parent.mkdir(parents=True, exist_ok=True)
            passing = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
            passing.mkdir()
            try:
                for file in self._files(version.digest):
                    found, _ = copy_and_hash(folder / file.name, passing / file.name)
                    if found != file.sha256:
                        raise IntegrityError(
                            f"{version.ref}: {file.name} has sha256 {found}, published was {file.sha256}",
                            hint="publish the adapter again to repair it",
                        )
                    (passing / file.name).chmod(0o644)
                if target.exists():
                    target.rmdir()
                passing.rename(target)
            except BaseException:
                shutil.rmtree(passing, ignore_errors=True)
                raise
        return target

    def path(self, version: Version | str) -> Path:
        """The version's folder, which never changes; rebuilt from the blobs if this machine does not have it."""
        found = self.resolve(version) if isinstance(version, str) else version
        if not found.path.is_dir():
            with storage_errors(f"building the folder of {found.ref}"), self._quarantines.new() as place:
                try:
                    self._build_folder(found.digest, self._files(found.digest), place)
                except FileNotFoundError as error:
                    raise IntegrityError(
                        f"{found.ref}: a stored file is gone ({error.filename})", hint="publish the adapter again to repair it"
                    ) from error
        return found.path

    # ---- find ----

    def resolve(self, ref: str) -> Version:
        """The version that `name`, `name@3`, `name@sha256:…`, `name:tag` or `sha256:…` means. Raises AdapterNotFound with the nearest names."""
        with self._database.read() as session:
            return version_of(index.resolve(session, ref), self._adapters)

    def list(
        self, name: str | None = None, *, base: str | None = None, kind: str | None = None, tag: str | None = None, all_versions: bool = False
    ) -> tuple[Version, ...]:
        """Versions by name: the newest of each, or all of one `name`; `name` may be "owner/". `base` is a name or a weights fingerprint."""
        with self._database.read() as session:
            rows = index.listing(session, name=name, base=base, kind=kind, tag=tag, all_versions=all_versions)
            return tuple(version_of(row, self._adapters) for row in rows)

    def search(self, text: str, *, kind: str | None = None) -> tuple[Version, ...]:
        """The newest version of each name that mentions every word, in its name, description, task, licence, base, message or tags."""
        with self._database.read() as session:
            rows = index.listing(session, name=None, base=None, kind=kind, tag=None, all_versions=False, words=text.split())
            return tuple(version_of(row, self._adapters) for row in rows)

    def show(self, ref: str) -> Card:
        """All that the hub knows of a version."""
        version = self.resolve(ref)
        folder = self.path(version)
        readme = folder / README_FILE
        with self._database.read() as session:
            parents = session.scalars(select(ParentRow).where(ParentRow.digest == version.digest).order_by(ParentRow.position)).all()
            used_in = select(ParentRow.digest).where(ParentRow.parent_digest == version.digest)
            children = session.scalars(select(VersionRow).where(VersionRow.digest.in_(used_in)).order_by(VersionRow.id)).all()
            lineage = tuple((p.parent_digest, _name_of(session, p), p.weight) for p in parents)
            made = tuple(f"{child.adapter.name}@{child.number}" for child in children)
        manifest = read_json_object(folder / MANIFEST_FILE)
        return Card(
            version=version,
            config=read_json_object(folder / CONFIG_FILE),
            manifest=manifest,
            readme=readme.read_text(encoding="utf-8", errors="replace") if readme.exists() else "",
            files=self._files(version.digest),
            scores=self.scores(version.digest),
            runs=self.runs(digest=version.digest),
            parents=tuple(Parent(*known, **_by_layer(entry)) for known, entry in zip(lineage, _entries(manifest, len(lineage)), strict=True)),
            children=made,
        )

    def check_base(self, ref: str, base_fingerprint: Mapping[str, Any], base_shapes: Shapes, *, ignore_quantization: bool = False) -> Verdict:
        """Whether the version may run on a base; the arguments are those of `verdict`."""
        folder = self.path(ref)
        recorded = read_json_object(folder / MANIFEST_FILE)["base"]
        return verdict(recorded, tensor_shapes(folder), base_fingerprint, base_shapes, ignore_quantization=ignore_quantization)

    def quantization_of(self, ref: str) -> str | None:
        """How the base was rounded that a version was trained on, a name such as "nf4"; None for a base as it is, or where nothing is recorded."""
        found = (read_json_object(self.path(ref) / MANIFEST_FILE).get("base") or {}).get("quantization")
        return found if isinstance(found, str) and found else None

    # ---- label and trust ----

    def tag(self, ref: str, tag: str) -> Version:
        """Point the label `tag` of the version's name to this version; it may be moved later."""
        check_tag(tag)
        with self._database.write() as session:
            row = index.resolve(session, ref, to_change=True)
            index.move_tag(session, row, tag)
            return version_of(row, self._adapters)

    def untag(self, ref: str) -> Version:
        """Remove the label of `name:tag`; the version stays."""
        label = parse_reference(ref).tag
        if label is None:
            raise HubError(f"{ref!r} names no tag", hint="write name:tag")
        with self._database.write() as session:
            row = index.resolve(session, ref)
            session.delete(session.get_one(TagRow, (row.adapter_id, label)))
            session.flush()
            session.refresh(row)
            return version_of(row, self._adapters)

    def yank(self, ref: str, *, undo: bool = False) -> Version:
        """Take a version out of bare names, listings and search; its number and digest still work. Nothing is deleted."""
        with self._database.write() as session:
            row = index.resolve(session, ref, to_change=True)
            row.yanked_at = None if undo else datetime.now(UTC)
            session.flush()
            return version_of(row, self._adapters)

    def verify(self, ref: str | None = None) -> tuple[Problem, ...]:
        """Read every stored byte of a version, or of all, and report what differs from what was published."""
        versions = self.list(all_versions=True) if ref is None else (self.resolve(ref),)
        return tuple(problem for version in versions for problem in self._problems(version))

    def _problems(self, version: Version) -> Iterator[Problem]:
        files = self._files(version.digest)
        if version_digest(files) != version.digest:
            yield Problem(version.ref, "the index", f"sha256:{version.digest}", f"sha256:{version_digest(files)}")
        for file in files:
            found = self._blobs.digest(file.sha256)
            if found != file.sha256:
                yield Problem(version.ref, f"blob of {file.name}", file.sha256, found)
        if not version.path.is_dir():
            return  # not built on this machine; path() builds it from the blobs
        known = {file.name: file.sha256 for file in files}
        there = _contents(version.path)
        for name in sorted(known.keys() | there.keys()):
            if known.get(name) != there.get(name):
                yield Problem(version.ref, str(version.path / name), known.get(name, "absent"), there.get(name))

    # ---- remove ----

    def delete(self, ref: str, *, all_versions: bool = False) -> tuple[Version, ...]:
        """Take a version out of the index, or all of a name. Its bytes stay until gc; its scores stay for good; its number is not given again.

        A bare name with several versions is refused unless `all_versions` says that all are meant.
        """
        with self._database.write() as session:
            rows = [index.resolve(session, ref, to_change=True)] if not parse_reference(ref).is_bare_name else []
            if not rows:
                rows = index.listing(
                    session, name=ref.removesuffix("@latest").removesuffix(":latest"), base=None, kind=None, tag=None, all_versions=True
                )
            if not rows:
                index.resolve(session, ref)  # raises, with the nearest names
            if len(rows) > 1 and not all_versions:
                raise HubError(
                    f"{ref!r} has {len(rows)} versions", hint=f"name one ({rows[0].adapter.name}@{rows[0].number}), or say that all are meant (--all)"
                )
            gone = tuple(version_of(row, self._adapters) for row in rows)
            for row in rows:
                index.remove_version(session, row)
        return gone

    def gc(self) -> GcReport:
        """Remove blobs and folders that no version uses, and the quarantines of dead publishers. Safe while others publish.

        It holds the writer's lock: a publisher's row is either there, and its files are kept, or not yet, and it will look for its files again.
        """
        num_blobs = num_folders = freed = 0
        self._quarantines.sweep()
        with storage_errors("garbage collection"), self._database.write() as session:
            used = set(session.scalars(select(FileRow.sha256)))
            alive = set(session.scalars(select(VersionRow.digest)))
            for sha256, size in list(self._blobs.all()):
                if sha256 not in used:
                    self._blobs.delete(sha256)
                    num_blobs, freed = num_blobs + 1, freed + size
            for folder in self._adapters.iterdir():
                if folder.name not in alive:
                    shutil.rmtree(folder)
                    num_folders += 1
        return GcReport(num_blobs, num_folders, freed)

    # ---- storing ----

    def _check_room(self, folder: Path) -> None:
        needed = SPARE_BYTES + sum((folder / name).stat().st_size for name in MAX_BYTES if (folder / name).is_file())
        free = shutil.disk_usage(self.root).free
        if free < needed:
            raise StorageError(
                f"publishing {folder} needs {needed:,} bytes, and the disk of {self.root} has {free:,} free", hint="free some space; atoll hub gc may"
            )

    def _keep(self, intake: Intake, *, trust: bool) -> None:
        """Store the blobs that are not there. Without `trust`, those that are there are read again and repaired."""
        for file in intake.files:
            if not (trust and self._blobs.has(file.sha256, file.size_bytes)):
                self._blobs.put(intake.folder / file.name, file.sha256)
                self._fault("blob")

    def _show_folder(self, intake: Intake, place: Path) -> None:
        """Build the version's folder, or again if it is damaged: publishing an adapter once more is how a user repairs it."""
        folder = self._adapters / intake.digest
        if folder.is_dir() and _contents(folder) != {file.name: file.sha256 for file in intake.files}:
            folder.rename(place / "damaged")
        if not folder.is_dir():
            self._build_folder(intake.digest, intake.files, place, None if self._blobs.near else intake.folder)
            self._fault("folder")

    def _build_folder(self, digest: str, files: Sequence[StoredFile], place: Path, source: Path | None = None) -> None:
        """Link the files from `source` (a quarantine), or get them from the blobs, and rename the whole into place."""
        folder = place / "folder"
        folder.mkdir()
        for file in files:
            if source is None:
                self._blobs.fetch(file.sha256, folder / file.name)
            else:
                link_or_copy(source / file.name, folder / file.name)
        sync_folder(folder)
        try:
            folder.rename(self._adapters / digest)
        except OSError:
            if not (self._adapters / digest).is_dir():
                raise
            shutil.rmtree(folder)  # another process built the same folder first
        sync_folder(self._adapters)

    def _files(self, digest: str) -> tuple[StoredFile, ...]:
        with self._database.read() as session:
            rows = session.scalars(select(FileRow).where(FileRow.digest == digest).order_by(FileRow.name)).all()
            return tuple(StoredFile(row.name, row.sha256, row.size_bytes) for row in rows)


def _contents(folder: Path) -> dict[str, str]:
    """Name -> sha256 of all that is in a version's folder, whether it belongs there or not."""
    return {path.name: sha256_of(path) if path.is_file() else "a folder" for path in folder.iterdir()}


def _entries(manifest: Mapping[str, Any], num: int) -> list[Mapping[str, Any]]:
    """The manifest's own entries of the parents, in the order of the index."""
    found = manifest.get("parents") or []
    return list(found) if len(found) == num else [{}] * num


def _by_layer(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The weights by layer of a parent's entry, where they have the form that composing writes."""
    if layer_weights(entry) is None:
        return {}
    layers = entry.get("layers")
    return {"layer_weights": tuple(map(float, entry["layer_weights"])), "layers": tuple(layers) if isinstance(layers, list) else None}


def _name_of(session: Session, parent: ParentRow) -> str | None:
    """What the hub calls a parent today, or what it was called when the child was made."""
    row = session.scalars(select(VersionRow).where(VersionRow.digest == parent.parent_digest).order_by(VersionRow.id)).first()
    return parent.parent_name if row is None else f"{row.adapter.name}@{row.number}"

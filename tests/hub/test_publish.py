"""Publishing and pulling: versions, identity, what is stored, what is refused."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import types
from pathlib import Path

import numpy
import pytest
from safetensors.numpy import load_file, save_file

from atoll.errors import AdapterFormatError, AtollError, BaseMismatch, HubError, IntegrityError, NameRefused, UnsupportedAdapter
from atoll.hub import Hub

from .conftest import BASE, KEY


def test_versions_count_up_within_a_name_and_identical_content_is_one_version(hub, make):
    """Publishing is idempotent: a job that runs twice must not make two versions, and numbers never skip or repeat."""
    first, second = hub.publish(make(1), "acme/intents"), hub.publish(make(2), "acme/intents")
    again, elsewhere = hub.publish(make(1), "acme/intents"), hub.publish(make(1), "other")
    assert (first.number, second.number, again.number, elsewhere.number) == (1, 2, 1, 1)
    assert first.digest == again.digest == elsewhere.digest != second.digest
    assert len({blob for blob, _ in hub._blobs.all()}) == 1 + 2 + 1  # one config, two weights, one generated manifest


def test_the_digest_is_the_documented_formula(hub, make):
    """Identity is content: anybody can recompute a digest with sha256sum, and it must not change between releases."""
    version = hub.publish(make(1, manifest={}), "a")
    lines = sorted(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in version.path.iterdir())
    assert [path.name for path in sorted(version.path.iterdir())] == ["adapter_config.json", "adapter_model.safetensors", "manifest.json"]
    assert version.digest == hashlib.sha256("".join(lines).encode()).hexdigest()


def test_the_stored_folder_and_an_export_are_bit_exact_and_peft_reads_them(hub, make, tmp_path):
    """The hub is a way station: a byte changed on the way would break the promise that transformers, PEFT and vLLM read our files."""
    source = make(3, manifest={})
    version = hub.publish(source, "a")
    exported = hub.export("a@1", tmp_path / "out" / "deep")
    for name in ("adapter_config.json", "adapter_model.safetensors", "manifest.json"):
        assert (exported / name).read_bytes() == (version.path / name).read_bytes() == (source / name).read_bytes()
    assert load_file(exported / "adapter_model.safetensors").keys() == {KEY.format(layer=0, factor=f) for f in "AB"}
    assert hub.publish(exported, "moved").digest == version.digest  # to another hub and back, it is the same adapter
    with pytest.raises(HubError, match="not an empty folder"):
        hub.export("a", exported)


def test_stored_files_cannot_be_written_by_accident(hub, make):
    """A version is immutable; its files are links to blobs that other versions share."""
    version = hub.publish(make(1), "a")
    assert all(path.stat().st_mode & 0o222 == 0 for path in version.path.iterdir())


def test_a_strangers_folder_gets_a_manifest_with_its_origin_and_keeps_its_bytes(hub, make):
    """PEFT's files go in untouched; what we know of them, and what we don't, stands beside."""
    source = make(1)
    (source / "README.md").write_text("---\nlicense: apache-2.0\nbase_model: toy/base\n---\n# Hi")
    version = hub.pull(source, "stranger")
    manifest = json.loads((version.path / "manifest.json").read_text())
    assert (version.path / "adapter_model.safetensors").read_bytes() == (source / "adapter_model.safetensors").read_bytes()
    assert manifest["base"] == {**dict.fromkeys(BASE), "name": "toy/base"} and manifest["prompt"] is None
    assert manifest["origin"] == {"source": "folder"} and version.licence == "apache-2.0" and version.base == "toy/base"
    assert not (source / "manifest.json").exists()
    assert hub.pull(source, "stranger").number == 1


def test_what_does_not_belong_to_an_adapter_is_named_and_left_out(hub, make):
    """A training folder holds gigabytes of checkpoints; storing them, or silently dropping them, would both surprise."""
    source = make(1)
    (source / "checkpoint-50").mkdir()
    for name in ("optimizer.pt", "tokenizer.json", "adapter_model.bin"):
        (source / name).write_bytes(b"x")
    version = hub.publish(source, "a")
    assert version.left_out == ("adapter_model.bin", "checkpoint-50/", "optimizer.pt", "tokenizer.json")
    assert {path.name for path in version.path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors", "manifest.json"}


def test_names_that_differ_in_case_are_one_name(hub, make):
    """`Intents` beside `intents` is how one is served for the other."""
    hub.publish(make(1), "Intents")
    with pytest.raises(NameRefused, match="differs only in case"):
        hub.publish(make(2), "intents")
    assert hub.resolve("INTENTS").name == "Intents"


def test_a_base_record_is_stored_and_a_contradicting_one_refused(hub, make):
    """The base of an adapter is a fact of its files; a publisher cannot relabel it."""
    assert json.loads((hub.publish(make(1), "a", base=BASE).path / "manifest.json").read_text())["base"] == BASE
    assert hub.publish(make(2, manifest={}), "a", base=BASE).number == 2
    with pytest.raises(BaseMismatch, match="weights_fingerprint"):
        hub.publish(make(2, manifest={}), "a", base={**BASE, "weights_fingerprint": "0" * 64})


def _truncate(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])


def _pad(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes() + b"\0" * 8)


def _bomb(folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", 1 << 40) + b"{}")


def _nan(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors[KEY.format(layer=0, factor="A")][0, 0] = numpy.nan
    save_file(tensors, folder / "adapter_model.safetensors")


def _only_pickle(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def _link_out(folder: Path) -> None:
    secret = folder.parent / "secret"
    secret.write_text("secret")
    (folder / "README.md").symlink_to(secret)


def _pipe(folder: Path) -> None:
    os.mkfifo(folder / "README.md")


def _huge_readme(folder: Path) -> None:
    (folder / "README.md").write_bytes(b"x" * ((1 << 20) + 1))


def _rank_zero(folder: Path) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "r": 0}))


def _manifest(**changes):
    def write(folder: Path) -> None:
        (folder / "manifest.json").write_text(json.dumps({"format": 1, "kind": "lora", "base": BASE, **changes}))

    return write


@pytest.mark.parametrize(
    "damage, error, words",
    [
        (_truncate, AdapterFormatError, "truncated"),
        (_pad, AdapterFormatError, "padded"),
        (_bomb, AdapterFormatError, "header"),
        (_nan, AdapterFormatError, "NaN"),
        (_only_pickle, AdapterFormatError, "adapter_model.bin"),
        (_link_out, AdapterFormatError, "link"),
        (_pipe, AdapterFormatError, "regular file"),
        (_huge_readme, AdapterFormatError, "limit"),
        (_rank_zero, AdapterFormatError, "r is 0"),
        (lambda folder: (folder / "adapter_config.json").unlink(), AdapterFormatError, "adapter_config.json"),
        (lambda folder: (folder / "adapter_config.json").write_bytes(b"\xff{"), AdapterFormatError, "JSON"),
        (lambda folder: (folder / "manifest.json").write_text('{"format": NaN}'), AdapterFormatError, "NaN"),
        (_manifest(format=2), UnsupportedAdapter, "format 2"),
        (_manifest(kind="magic"), AdapterFormatError, "kind"),
        (_manifest(kind="reft"), AdapterFormatError, "reft"),
        (_manifest(base="toy"), AdapterFormatError, "base"),
        (_manifest(parents=[1]), AdapterFormatError, "parents"),
    ],
)
def test_a_bad_adapter_is_refused_by_name_and_leaves_nothing(hub, make, damage, error, words):
    """Uploads are hostile until checked, and a refused one must not cost a byte or a version number."""
    source = make(1)
    damage(source)
    with pytest.raises(error, match=words) as caught:
        hub.publish(source, "a")
    assert "staging" not in caught.value.message  # it names the user's file, not our copy
    assert hub.list() == () and not list(hub._blobs.all()) and not list((hub.root / "staging").iterdir())
    assert hub.publish(make(2), "a").number == 1


def test_a_missing_folder_and_a_url_are_one_sentence(hub, tmp_path):
    """The commonest typing errors get an answer, not a traceback; and the hub never fetches a URL somebody hands it."""
    with pytest.raises(AdapterFormatError, match="no adapter folder"):
        hub.publish(tmp_path / "nowhere", "a")
    with pytest.raises(HubError, match="not fetched"):
        hub.pull("https://example.com/adapter.zip", "a")


def test_a_repository_that_cannot_be_reached_is_one_sentence(hub):
    """Offline machines are ordinary."""
    with pytest.raises(AtollError, match="not reachable") as caught:
        hub.pull("hf:someone/some-adapter", "a")
    assert "folder" in caught.value.hint and not list((hub.root / "staging").iterdir())


@pytest.fixture
def hugging_face(monkeypatch):
    """A stand-in for the Hugging Face hub: set `files` (name -> bytes) of its one repository; it notes what was asked for."""
    import huggingface_hub

    state = types.SimpleNamespace(files={}, asked=[])

    def model_info(_api, repository, *, revision=None, files_metadata=False):
        siblings = [types.SimpleNamespace(rfilename=name, size=len(data)) for name, data in state.files.items()]
        return types.SimpleNamespace(sha="c0ffee" if revision is None else revision, siblings=siblings)

    def snapshot_download(repository, *, revision, allow_patterns, local_dir):
        state.asked.append((repository, revision))
        (local_dir / ".cache").mkdir(parents=True)
        for name in set(allow_patterns) & set(state.files):
            (local_dir / name).write_bytes(state.files[name])
        return str(local_dir)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return state


def test_a_repository_is_pulled_at_one_commit_which_becomes_its_origin(hub, make, hugging_face):
    """A branch moves; what was pulled must say which commit it was, and its files stay those of the repository."""
    hugging_face.files = {path.name: path.read_bytes() for path in make(1).iterdir()} | {"training_args.bin": b"pickle", "README.md": b"hi"}
    version = hub.pull("hf:someone/thing", "thing")
    assert hugging_face.asked == [("someone/thing", "c0ffee")] and version.left_out == ()
    assert json.loads((version.path / "manifest.json").read_text())["origin"] == {"source": "hf:someone/thing", "revision": "c0ffee"}
    assert (version.path / "adapter_model.safetensors").read_bytes() == hugging_face.files["adapter_model.safetensors"]
    hub.pull("hf:someone/thing@v1", "thing")
    assert hugging_face.asked[1] == ("someone/thing", "v1")


def test_a_repository_with_only_a_pickle_is_refused_before_downloading(hub, hugging_face):
    """Neither its bytes nor its code should reach this machine."""
    hugging_face.files = {"adapter_config.json": b"{}", "adapter_model.bin": b"pickle"}
    with pytest.raises(AdapterFormatError, match=r"adapter_model\.bin"):
        hub.pull("hf:someone/thing", "thing")
    hugging_face.files = {"adapter_config.json": b" " * (2 << 20), "adapter_model.safetensors": b""}
    with pytest.raises(AdapterFormatError, match="limit"):
        hub.pull("hf:someone/thing", "thing")
    assert hugging_face.asked == []


def test_a_hugging_face_cache_folder_of_links_is_taken(hub, make, tmp_path):
    """The cache keeps snapshots as links into a neighbouring folder; users pull from there."""
    source, cache = make(1), tmp_path / "models--x"
    (cache / "blobs").mkdir(parents=True)
    snapshot = cache / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for path in source.iterdir():
        (cache / "blobs" / path.name).write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    assert hub.pull(snapshot, "cached").digest == hub.pull(source, "direct").digest


def test_verify_names_every_changed_missing_or_foreign_file_and_publishing_again_repairs(hub, make, tmp_path):
    """Disks rot and people edit: the hub must notice, refuse to hand the bytes out, and be repairable from the source."""
    source = make(1)
    version = hub.publish(source, "a")
    assert hub.verify() == ()
    weights = version.path / "adapter_model.safetensors"
    weights.chmod(0o644)
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)  # the blob too: it is the same inode
    (version.path / "extra.txt").write_text("x")
    found = hub.verify("a")
    assert {Path(problem.file).name for problem in found} == {"blob of adapter_model.safetensors", "adapter_model.safetensors", "extra.txt"}
    with pytest.raises(IntegrityError, match=r"adapter_model\.safetensors"):
        hub.export("a", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert hub.publish(source, "a").number == 1
    assert hub.verify() == ()


def test_a_lost_folder_is_rebuilt_from_the_blobs(hub, make):
    """The folders are a view; a machine that shares only index and blobs makes its own."""
    import shutil

    version = hub.publish(make(1), "a")
    shutil.rmtree(version.path)
    assert hub.verify() == () and sorted(path.name for path in hub.path("a").iterdir())[0] == "adapter_config.json"


def test_blobs_may_live_in_any_fsspec_store(tmp_path, make):
    """S3 by URL: the same verbs, tried here on fsspec's in-memory store."""
    shared = f"memory://hub-{tmp_path.name}"
    version = Hub(tmp_path / "one", blob_url=shared).publish(make(1), "a")
    other = Hub(tmp_path / "two", f"sqlite:///{tmp_path}/one/hub.db", blob_url=shared)  # another machine: same index and blobs, own folders
    assert (other.path("a") / "adapter_model.safetensors").read_bytes() == (version.path / "adapter_model.safetensors").read_bytes()
    assert other.verify() == () and other.gc().num_blobs == 0
    other.delete("a")
    assert other.gc().num_blobs == 3 and not list(other._blobs.all())
    with pytest.raises(HubError, match="blob store"):
        Hub(tmp_path / "three", blob_url="nonsense://x")

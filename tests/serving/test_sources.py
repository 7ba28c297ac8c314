"""Adapters from a folder, from the Hugging Face hub and from an object store: what is fetched, from where, and what is refused."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pytest

from atoll.errors import AdapterFormatError, AdapterNotFound, EngineError
from atoll.serving.entries import AdapterRef
from atoll.serving.far_sources import HuggingFaceSource, StoreSource
from atoll.serving.keys import Caller
from atoll.serving.sources import LocalSource, Reference
from serving.scenes import ME, answer, key_of, play, running

PROMPT = [5, 6, 7, 8]


@pytest.fixture
def root(tmp_path, write):
    """A local root with one adapter, team/sql."""
    root = tmp_path / "root"
    write("team/sql", 31, where=root)
    return root


# ---- which source ----


@pytest.mark.parametrize("source", ["ftp", "Hub2", "local;", "x" * 500])
def test_an_unknown_source_is_refused_in_lorax_words(base, hub, source):
    """Its clients show this sentence to their users."""

    async def scenario():
        async with running(base, hub) as service:
            with pytest.raises(EngineError) as caught:
                await key_of(service, "red", source=source)
            assert caught.value.message == f"Invalid source '{source[:40]}' when downloading adapter 'red'"

    play(scenario())


@pytest.mark.parametrize("source", ["local", "s3", "hf"])
def test_a_source_that_is_off_says_so(base, hub, source):
    """Foreign places are the operator's choice."""

    async def scenario():
        async with running(base, hub) as service:
            with pytest.raises(EngineError, match="is off"):
                await key_of(service, "acme/sql", source=source)

    play(scenario())


@pytest.mark.parametrize("source", [None, "hub", "HUB", "pbase"])
def test_our_hub_has_two_names(base, hub, source):
    """LoRAX's clients say hub; Predibase's say pbase."""

    async def scenario():
        async with running(base, hub) as service:
            assert await key_of(service, "red", source=source) == hub.resolve("red").digest

    play(scenario())


# ---- local folders ----


def test_a_folder_is_named_below_the_root_or_absolutely(base, hub, root):
    """One content, one key, however it is written."""

    async def scenario():
        async with running(base, hub, local_root=root) as service:
            keys = {await key_of(service, name, source="local") for name in ("team/sql", "team//sql/", "./team/sql", str(root / "team/sql"))}
            assert len(keys) == 1
            assert (await service.open(AdapterRef("team/sql", "local"), ME)).name == "local:team/sql"
            assert (await service.operator.adapter(AdapterRef("team/sql", "local"), ME)).state == "ready"

    play(scenario())


def test_nothing_outside_the_root_can_be_named(base, hub, root, write, tmp_path):
    """Paths come from requests: a way out reads any file of the machine, and error texts must not say what exists."""
    outside = write("outside", 32, where=tmp_path / "elsewhere")
    (root / "link").symlink_to(outside)
    (root / "team" / "up").symlink_to("..")
    hidden = write(".hidden", 33, where=root)
    names = [
        "../elsewhere/outside",
        str(outside),
        "team/../../elsewhere/outside",
        "link",
        "team/up/team/sql",
        hidden.name,
        ".",
        "",
        "/",
        "team",
        "team/s\nl",
    ]

    async def scenario():
        async with running(base, hub, local_root=root) as service:
            said = set()
            for name in [*names[:7], "nothing", str(tmp_path / "nothing")]:
                with pytest.raises(AdapterNotFound) as caught:
                    await service.open(AdapterRef(name, "local"), ME)
                said.add(caught.value.message.replace(repr(name), "X"))
            assert len(said) == 1
        source = LocalSource(root)
        for name in names:
            with pytest.raises((AdapterNotFound, AdapterFormatError)):
                source.locate(Reference(name))

    play(scenario())


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_link_in_the_folder_is_refused(root, tmp_path, file):
    """Even inside the root a file may point anywhere."""
    path = root / "team/sql" / file
    shutil.move(path, tmp_path / file)
    path.symlink_to(tmp_path / file)
    with pytest.raises(AdapterFormatError, match="not a regular file"):
        LocalSource(root).locate(Reference("team/sql"))


def test_a_changed_folder_is_another_adapter(base, hub, root, write, monkeypatch):
    """LoRAX never notices; the old weights would answer under the new name for ever."""
    monkeypatch.setattr(LocalSource, "ttl_s", 0.0)

    async def scenario():
        async with running(base, hub, local_root=root) as service:
            first = await key_of(service, "team/sql", source="local")
            assert await key_of(service, "team/sql", source="local") == first
            write("team/sql", 34, where=root)
            second = await key_of(service, "team/sql", source="local")
            assert first != second
            write("team/sql", 31, where=root)
            assert await key_of(service, "team/sql", source="local") == first  # content, not time, is what an adapter is

    play(scenario())


def test_a_folder_may_change_while_it_is_served(base, hub, root):
    """What was checked is what answers: nothing is read from the folder after it was loaded."""

    async def scenario():
        async with running(base, hub, local_root=root) as service:
            await key_of(service, "team/sql", source="local")
            shutil.rmtree(root / "team")
            key = next(iter(service.registry.entries))
            [entry] = service.registry.entries.values()
            assert entry.key == key
            from serving.scenes import ask

            [found] = await service.generate([ask(PROMPT, key)], ME)
            assert found.finish_reason == "length"

    play(scenario())


def test_a_pickle_is_refused_by_name(root):
    """Opening one runs its author's code."""
    folder = root / "team/sql"
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(AdapterFormatError, match="pickle"):
        LocalSource(root).locate(Reference("team/sql"))


def test_an_allow_list_names_the_place_too(base, hub, root):
    """A folder called as a hub's adapter is another adapter."""

    async def scenario():
        async with running(base, hub, local_root=root) as service:
            for patterns, fine in ((("team/*",), False), (("local:team/*",), True)):
                opened = service.open(AdapterRef("team/sql", "local"), Caller("k", adapters=patterns))
                if fine:
                    assert (await opened).name == "local:team/sql"
                else:
                    with pytest.raises(AdapterNotFound):
                        await opened

    play(scenario())


# ---- object stores ----


@pytest.fixture
def bucket(write):
    """memory://bucket/adapters/sql, removed at the end."""
    store = fsspec.filesystem("memory")
    folder = write("sql", 35)
    store.makedirs("/bucket/adapters/sql", exist_ok=True)
    for path in folder.iterdir():
        store.pipe(f"/bucket/adapters/sql/{path.name}", path.read_bytes())
    yield store
    store.rm("/bucket", recursive=True)


def test_an_object_store_serves_what_is_below_a_prefix(base, hub, bucket, write, monkeypatch):
    """And notices when an object changes."""
    monkeypatch.setattr(StoreSource, "ttl_s", 0.0)

    async def scenario():
        async with running(base, hub, s3_prefixes=["memory://bucket/adapters"]) as service:
            url = "memory://bucket/adapters/sql"
            served = await service.open(AdapterRef(url, "s3"), ME)
            assert served.name == url
            for path in write("sql", 36).iterdir():
                bucket.pipe(f"/bucket/adapters/sql/{path.name}", path.read_bytes())
            assert await key_of(service, url, source="s3") != served.key
            with pytest.raises(AdapterNotFound):
                await key_of(service, "memory://bucket/adapters/none", source="s3")

    play(scenario())


@pytest.mark.parametrize(
    "url", ["memory://bucket/other/sql", "memory://bucket/adapters/../other/sql", "memory://bucket/adapters", "memory://bucket/adapters2/sql",
            "s3://bucket/adapters/sql", "http://169.254.169.254/", "file:///etc", "memory://bucket/adapters/a//b", "memory://bucket/adapters/?x"],
)  # fmt: skip
def test_nothing_outside_the_prefixes_is_asked_for(url):
    """A URL from a request is a request of ours to anywhere: internal addresses among them."""
    with pytest.raises(AdapterNotFound, match="not below"):
        StoreSource(("memory://bucket/adapters",)).locate(Reference(url))


def test_a_store_is_read_through_a_file_system_too(tmp_path, write):
    """fsspec makes one code of all stores; a mounted one is file://."""
    write("deep/sql", 37, where=tmp_path / "mnt")
    source = StoreSource((f"file://{tmp_path}/mnt",))
    located = source.locate(Reference(f"file://{tmp_path}/mnt/deep/sql"))
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    folder, digest = source.fetch(located, scratch, None)
    assert {path.name for path in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors", "manifest.json"}
    assert len(digest) == 64


# ---- the Hugging Face hub ----


@pytest.fixture
def hugging_face(monkeypatch, write):
    """A stand-in for the Hugging Face hub: acme/sql is public, acme/private opens for the token "ours" alone."""
    import huggingface_hub
    from huggingface_hub.errors import RepositoryNotFoundError

    seen = SimpleNamespace(infos=[], downloads=[], commit="c1", folder=write("hf-sql", 38), extra={})

    class Api:
        def __init__(self, token=None):
            self.token = token

        def model_info(self, repository, revision=None, files_metadata=False, timeout=None):
            seen.infos.append((repository, revision, self.token))
            if repository != "acme/sql" and not (repository == "acme/private" and self.token == "ours"):
                raise RepositoryNotFoundError("gone", response=SimpleNamespace(status_code=404, headers={}, request=None, text=""))
            files = {path.name: path.stat().st_size for path in seen.folder.iterdir()} | seen.extra
            return SimpleNamespace(sha=seen.commit, siblings=[SimpleNamespace(rfilename=name, size=size) for name, size in files.items()])

    def snapshot_download(repository, revision, allow_patterns, local_dir, token):
        seen.downloads.append((repository, revision, tuple(allow_patterns), token))
        (Path(local_dir) / ".cache").mkdir()
        for name in allow_patterns:
            if (seen.folder / name).exists():
                shutil.copy(seen.folder / name, local_dir)
        return str(local_dir)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return seen


def test_a_repository_is_fetched_at_one_commit_and_only_its_three_files(base, hub, hugging_face):
    """A repository holds checkpoints, code and pickles too: none of them may come here."""

    async def scenario():
        async with running(base, hub, allow_hf=True) as service:
            served = await service.open(AdapterRef("acme/sql"), ME)  # not in our hub: then there
            assert (served.name, served.source) == ("hf:acme/sql", "hf")
            assert await key_of(service, "acme/sql", source="hf") == served.key
            assert hugging_face.downloads == [("acme/sql", "c1", ("adapter_config.json", "adapter_model.safetensors", "manifest.json"), False)]
            assert (await answer(service, "acme/sql", PROMPT)).finish_reason == "length"
            await key_of(service, "acme/sql", source="hf", revision="v2")
            assert hugging_face.infos[-1] == ("acme/sql", "v2", False)

    play(scenario())


def test_a_private_repository_is_asked_for_again_for_each_token(base, hub, hugging_face):
    """What one caller's token opened is not open for others, loaded or not; and no token is used for anything but its own request."""

    async def scenario():
        async with running(base, hub, allow_hf=True) as service:
            opened = await service.open(AdapterRef("acme/private", "hf", token="ours"), ME)
            for token in (None, "theirs"):
                with pytest.raises(AdapterNotFound):
                    await service.open(AdapterRef("acme/private", "hf", token=token), ME)
            assert [token for _, _, token in hugging_face.infos] == ["ours", False, "theirs"]
            assert (await service.open(AdapterRef("acme/private", "hf", token="ours"), ME)).key == opened.key
            assert len(hugging_face.infos) == 3
            assert len(hugging_face.downloads) == 1
            assert "ours" not in repr(AdapterRef("acme/private", "hf", token="ours"))

    play(scenario())


def test_a_repository_that_is_too_large_is_not_fetched(base, hub, hugging_face):
    """The listing tells; the disk must not."""
    hugging_face.extra = {"adapter_model.safetensors": 5 << 30}

    async def scenario():
        async with running(base, hub, allow_hf=True) as service:
            with pytest.raises(AdapterFormatError, match="bytes"):
                await key_of(service, "acme/sql", source="hf")
            assert hugging_face.downloads == []

    play(scenario())


def test_a_repository_of_pickles_is_not_fetched(hugging_face):
    """LoRAX converts them with torch.load, which runs what they hold."""
    (hugging_face.folder / "adapter_model.safetensors").rename(hugging_face.folder / "adapter_model.bin")
    with pytest.raises(AdapterFormatError, match="pickle"):
        HuggingFaceSource().locate(Reference("acme/sql"))


@pytest.mark.parametrize("name", ["acme", "a/b/c", "../x", "acme/sql@../main", "-x/y", "acme/sq l", "https://evil.example/x"])
def test_only_names_of_repositories_go_out(hugging_face, name):
    """The name becomes part of a URL."""
    with pytest.raises(AdapterNotFound):
        HuggingFaceSource().locate(Reference(name))
    assert hugging_face.infos == []


def test_a_hub_that_cannot_be_reached_is_one_sentence(monkeypatch):
    """Client libraries raise their own errors, with tokens and addresses in them."""
    import huggingface_hub

    class Api:
        def __init__(self, token=None):
            raise ConnectionError(f"could not connect with {token}")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    with pytest.raises(EngineError, match="could not be fetched") as caught:
        HuggingFaceSource().locate(Reference("acme/sql", token="secret"))
    assert "secret" not in caught.value.message
    assert os.environ.get("HF_TOKEN") is None or os.environ["HF_TOKEN"] not in caught.value.message

"""Management over HTTP: list, load, unload, pin, reload, publish, and vLLM's two routes."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
from tests.server.live_server import LABELS

from adapters import random_adapter
from atoll.model.adapter_files import write_adapter

ASK = {"inputs": "hello", "parameters": {"max_new_tokens": 4}}


def folder_of(server, path, seed=77, **manifest):
    """A new adapter's folder."""
    made = random_adapter(server.base.decoder, rank=4, seed=seed)
    write_adapter(path, replace(made, manifest={"format": 1, "kind": "lora", "base": server.base.describe(), "prompt": None, **manifest}))
    return path


def files_of(folder, **renamed):
    """The folder as a form's files."""
    return [("files", (renamed.get(path.stem, path.name), path.read_bytes())) for path in sorted(folder.iterdir())]


def upload(server, folder, data, *, key="", files=None):
    headers = {"authorization": f"Bearer {server.keys[key]}"} if key else {}
    import httpx

    return httpx.post(server.url + "/adapters", data=data, files=files or files_of(folder), headers=headers, timeout=60)


def ask(server, adapter, **options):
    return server.post("/generate", {**ASK, "parameters": {**ASK["parameters"], "adapter_id": adapter}}, **options)


def test_the_list_shows_every_adapter_and_its_state(live):
    """The one endpoint that other servers lack."""
    assert ask(live, "sentiment").status_code == 200
    found = {each["name"]: each for each in live.get("/adapters").json()["adapters"]}
    assert {"plain", "sentiment", "pair"} <= set(found)
    sentiment = found["sentiment"]
    assert (sentiment["state"], sentiment["version"], sentiment["digest"]) == ("ready", "sentiment@1", live.digest("sentiment"))
    assert sentiment["labels"] == list(LABELS)
    assert sentiment["counters"]["requests"] >= 1
    assert sentiment["engine"]["resident"]
    one = live.get("/adapters/sentiment@1").json()
    assert one["digest"] == sentiment["digest"]


def test_an_adapter_is_loaded_pinned_and_unloaded(serve):
    """Each answer is the adapter as it is then."""
    server = serve()
    assert server.get("/adapters/plain").json()["state"] == "known"
    assert server.post("/adapters/plain/load").json()["state"] == "ready"
    assert server.post("/adapters/plain@1/pin").json()["pinned"] is True
    refused = server.post("/adapters/plain/unload")
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "in_use")
    assert server.post("/adapters/plain/unpin").json()["pinned"] is False
    assert server.post("/adapters/plain/unload", {"wait_s": 5}).json()["state"] == "known"
    assert server.post("/adapters/plain/reload").json()["state"] == "ready"
    assert ask(server, "plain").status_code == 200


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("/adapters/nope/load", 404, "adapter_not_found"),
        ("/adapters/nope/unload", 404, "adapter_not_found"),
        ("/adapters/nope/pin", 404, "adapter_not_found"),
        ("/adapters/plain@7/load", 404, "adapter_not_found"),
        ("/adapters/plain/fly", 405, "method_not_allowed"),
    ],
)
def test_what_does_not_exist_is_one_clear_error(live, path, status, code):
    """In the shape of our own routes."""
    found = live.post(path)
    assert (found.status_code, found.json()["error"]["code"]) == (status, code)
    assert found.json()["error"]["message"]


@pytest.mark.parametrize("body", [{"source": 3}, {"wait_s": -1}, {"wait_s": 1e9}, [], "x", {"source": "ftp"}, {"source": "local"}])
def test_a_wrong_body_is_a_client_error(live, body):
    """Never a 500, and nothing is loaded."""
    found = live.post("/adapters/plain/load", body)
    assert 400 <= found.status_code < 500
    assert found.json()["error"]["message"]


def test_an_upload_is_servable_at_once(serve, tmp_path):
    """Publishing is one request; the next one may use it."""
    server = serve()
    folder = folder_of(server, tmp_path / "new")
    done = upload(server, folder, {"name": "acme/new", "message": "first", "tags": ["stable", "v-one"]})
    assert (done.status_code, done.json()["version"]) == (201, "acme/new@1")
    assert done.json()["tags"] == ["stable", "v-one"]
    assert ask(server, "acme/new:stable").status_code == 200
    again = upload(server, folder, {"name": "acme/new"})
    assert again.json()["version"] == "acme/new@1"  # the same content is the same version
    second = upload(server, folder_of(server, tmp_path / "newer", seed=78), {"name": "acme/new"})
    assert second.json()["version"] == "acme/new@2"
    assert ask(server, "acme/new").status_code == 200
    assert server.get("/adapters/acme/new").json()["state"] == "ready"


def test_a_bad_upload_publishes_nothing(serve, tmp_path):
    """Whole or not at all."""
    server = serve(max_adapter_bytes=400_000)
    folder = folder_of(server, tmp_path / "new")
    good = files_of(folder)
    refused = [
        upload(server, folder, {}),
        upload(server, folder, {"name": "../x"}),
        upload(server, folder, {"name": "new", "colour": "red"}),
        upload(server, folder, {"name": "new"}, files=good[:1]),
        upload(server, folder, {"name": "new"}, files=[*good, ("files", ("x.py", b"print()"))]),
        upload(server, folder, {"name": "new"}, files=[*good, ("files", ("pytorch_model.bin", b"\x80"))]),
        upload(server, folder, {"name": "new"}, files=[*good, good[0]]),
        upload(server, folder, {"name": "new"}, files=[*good[:-2], ("files", ("adapter_model.safetensors", b"\0" * 99)), good[-1]]),
        upload(server, folder, {"name": "new", "message": "x" * 70_000}),
        server.post("/adapters", {"name": "new", "folder": "new"}),
        server.post("/adapters", {"name": "new"}),
        server.post("/adapters", content=b"{", headers={"content-type": "application/json"}),
        server.post("/adapters", content=b"x", headers={"content-type": "text/plain"}),
        server.post("/adapters", content=b"x", headers={"content-type": "multipart/form-data; boundary=y"}),
        server.post("/adapters"),
    ]
    for reply in refused:
        assert 400 <= reply.status_code < 500, reply.text
        assert reply.json()["error"]["message"], reply.text
    assert server.get("/adapters/new").status_code == 404
    too_large = upload(server, folder, {"name": "new"}, files=[*good, ("files", ("README.md", b"x" * 6_000_000))])
    assert too_large.status_code == 413
    assert upload(server, folder, {"name": "new"}).status_code == 201


def test_a_folder_of_the_server_is_published_by_name(serve, tmp_path):
    """For adapters that are on the machine already; only below the root."""
    root = tmp_path / "root"
    server = serve(local_root=root.absolute()) if root.mkdir() is None else None
    folder_of(server, root / "ours")
    shutil.copytree(root / "ours", tmp_path / "outside")
    (root / "link").symlink_to(tmp_path / "outside")
    for folder in ("../outside", str(tmp_path / "outside"), "link", "none"):
        assert server.post("/adapters", {"name": "new", "folder": folder}).status_code == 404
    done = server.post("/adapters", {"name": "new", "folder": "ours", "tags": ["stable"]})
    assert (done.status_code, done.json()["tags"]) == (201, ["stable"])
    assert ask(server, "new").status_code == 200


def test_vllms_routes_load_and_unload_by_name(serve, tmp_path):
    """Its operators and tools send these two bodies, and read these two sentences."""
    root = tmp_path / "root"
    root.mkdir()
    server = serve(local_root=root)
    folder_of(server, root / "one", seed=80)
    folder_of(server, root / "two", seed=81)
    body = {"lora_name": "mine", "lora_path": str(root / "one")}
    done = server.post("/v1/load_lora_adapter", body)
    assert (done.status_code, done.text) == (200, "Success: LoRA adapter 'mine' added successfully.")
    assert ask(server, "mine").status_code == 200
    assert server.get("/v1/models/mine").json()["id"] == "mine"
    taken = server.post("/v1/load_lora_adapter", {**body, "lora_path": "two"})
    assert taken.status_code == 400
    assert "load_inplace" in taken.json()["error"]["message"]
    assert server.post("/v1/load_lora_adapter", {**body, "lora_path": "two", "load_inplace": True, "base_model_name": None}).status_code == 200
    gone = server.post("/v1/unload_lora_adapter", {"lora_name": "mine"})
    assert (gone.status_code, gone.text) == (200, "Success: LoRA adapter 'mine' removed successfully.")
    assert ask(server, "mine").status_code == 424
    assert server.post("/v1/unload_lora_adapter", {"lora_name": "mine"}).status_code == 404
    for bad in ({}, {"lora_name": "x"}, {"lora_name": "", "lora_path": "one"}, {"lora_name": "x", "lora_path": "/etc"}):
        found = server.post("/v1/load_lora_adapter", bad)
        assert found.status_code in (400, 404)
        assert found.json()["error"]["message"]


def test_a_page_of_elsewhere_manages_nothing(serve):
    """A POST without a body leaves a browser without asking anybody: any web page could unload adapters of a server on the visitor's machine."""
    server = serve(cors_origins=["https://ui.example"])
    for origin, status in (("https://evil.example", 403), ("null", 403), ("https://ui.example", 200), (server.url, 200)):
        assert server.post("/adapters/plain/load", headers={"origin": origin}).status_code == status
    refused = server.post("/v1/unload_lora_adapter", {"lora_name": "plain"}, headers={"origin": "https://evil.example"})
    assert (refused.status_code, refused.json()["error"]["type"]) == (403, "permission_error")

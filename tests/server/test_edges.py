"""Requests at the edges: odd headers and bodies, keys that are not for us, errors that clients act upon."""

from __future__ import annotations

import json

import httpx
import pytest
from starlette.requests import Request as HttpRequest

from atoll.engine.request import Completion, TokenEvent
from atoll.http.auth import source_token
from atoll.http.body import has_half_surrogate
from atoll.serving.entries import AdapterRef


def test_a_key_of_elsewhere_never_goes_to_the_adapters_source(live, monkeypatch):
    """OpenAI's clients send the key in their environment to whatever server they ask."""
    seen = []
    opened = live.service.open

    async def watched(ref: AdapterRef, caller):
        seen.append(ref.token)
        return await opened(ref, caller)

    monkeypatch.setattr(live.service, "open", watched)
    for bearer in ("sk-secret", "hf_mine"):
        headers = {"authorization": f"Bearer {bearer}"}
        live.post("/v1/completions", {"model": "plain", "prompt": "a", "max_tokens": 1}, headers=headers)
        live.post("/generate", {"inputs": "a", "parameters": {"adapter_id": "plain", "max_new_tokens": 1}}, headers=headers)
    live.post("/v1/completions", {"model": "plain", "prompt": "a", "max_tokens": 1, "api_token": "given"})
    assert seen == [None, None, None, "hf_mine", "given"]
    request = HttpRequest({"type": "http", "headers": [(b"x-api-key", b"hf_mine")]})
    assert source_token(request, has_keys=False) is None


def test_odd_headers_and_numbers_are_refused_and_break_nothing(live):
    """Each of these was a 500."""
    assert live.post("/adapters/plain/load", headers={"origin": "http://["}).status_code == 403
    body = {"model": "", "prompt": "a", "max_tokens": 1, "logit_bias": {"1" * 5000: 1}}
    assert live.post("/v1/completions", body).status_code == 400
    live.wait(live.service.operator.pin(AdapterRef("plain"), _everybody()))
    try:
        unload = live.post("/v1/unload_lora_adapter", {"lora_name": "plain"}, headers={"host": "[127.0.0.1"})
        assert unload.status_code == 409
    finally:
        live.wait(live.service.operator.unpin(AdapterRef("plain"), _everybody()))


def _everybody():
    from atoll.serving.keys import EVERYBODY

    return EVERYBODY


@pytest.mark.parametrize("field", ["parents", "labels", "training", "stop_token_ids", "prompt", "base", "name", "task", "quantization"])
def test_a_manifest_of_any_types_is_no_mistake_of_ours(serve, field):
    """It is a stranger's file: whatever stands in it is refused or ignored."""
    server = serve()
    assert server.service.hub is not None
    folder = server.service.hub.resolve("plain").path
    for value in (5, [5], {"x": 5}, "x"):
        manifest = {**json.loads((folder / "manifest.json").read_text()), field: value}
        files = [("files", (name, (folder / name).read_bytes())) for name in ("adapter_config.json", "adapter_model.safetensors")]
        files.append(("files", ("manifest.json", json.dumps(manifest).encode())))
        assert server.post("/adapters", data={"name": "odd"}, files=files).status_code in (201, 409, 422), (field, value)


@pytest.mark.parametrize(
    ("text", "is_half"),
    [
        (rb'"\ud83d\ude00"', False),
        (rb'"\ud83d\ude00\ud83d\ude00x\uD83D\uDE00"', False),
        (rb'"\\ud83d"', False),
        (rb'"\\\ud83d"', True),
        (rb'"\\ud83d\ude00"', True),
        (rb'"\ud83d"', True),
        (rb'"\ude00\ud83d"', True),
        (rb'"\ud83d\ude00\ude00"', True),
        (rb'"\ud83d\\ude00"', True),
        (rb'"\ud7ff\ue000"', False),
        (b'"' + b"\\\\" * 200_000 + b'ud83d"', False),
    ],
)
def test_half_a_pair_is_found_behind_any_backslashes(text, is_half):
    """Compared with what Python's own reader makes of it."""
    assert has_half_surrogate(text) == is_half
    assert any(0xD800 <= ord(letter) < 0xE000 for letter in json.loads(text)) == is_half


def test_tools_are_measured_before_they_are_read(live):
    """Looking through a schema of megabytes takes seconds, in front of everybody."""
    tool = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"enum": ["x" * 70_000]}}}}}
    found = live.post("/v1/chat/completions", {"model": "", "messages": [{"role": "user", "content": "a"}], "tools": [tool]})
    assert (found.status_code, found.json()["error"]["param"]) == (400, "tools")
    assert "65536" in found.json()["error"]["message"]


def _failing(monkeypatch, service, after: int = 0):
    """Let the engine fail every answer after some tokens."""
    from atoll.serving.tickets import TokenStream

    async def next_events(self):
        if self._ended:
            return []
        self._ended = True
        return [TokenEvent("x", None, "", completion=Completion("x", None, 1, (), "", "error", error="it broke"))]

    async def generate(requests, caller):
        return [Completion("x", None, 1, (), "", "error", error="it broke") for _ in requests]

    monkeypatch.setattr(TokenStream, "next_events", next_events)
    monkeypatch.setattr(service, "generate", generate)


def test_a_failure_of_the_engine_is_one_that_openais_clients_try_again(live, monkeypatch):
    """They repeat 5xx and nothing else; LoRAX's know 424."""
    _failing(monkeypatch, live.service)
    found = live.post("/v1/completions", {"model": "", "prompt": "a"})
    assert (found.status_code, found.json()["error"]["type"]) == (500, "server_error")
    assert live.post("/generate", {"inputs": "a"}).status_code == 424
    assert live.post("/v1/completions", {"model": "x", "prompt": "a", "adapter_source": "nowhere"}).status_code == 422


def test_a_stream_that_ends_in_an_error_is_a_failure_and_no_success(serve, monkeypatch):
    """Else the failures of a server that only streams do not show in its rate of success."""
    server = serve()

    def counted():
        text = server.get("/metrics").text
        return {line.split()[0]: float(line.split()[1]) for line in text.splitlines() if line.startswith("lorax_request_")}

    before = counted()
    _failing(monkeypatch, server.service)
    assert "it broke" in server.post("/generate_stream", {"inputs": "a", "parameters": {"max_new_tokens": 4}}).text
    after = counted()
    assert after["lorax_request_success"] == before["lorax_request_success"]
    assert after['lorax_request_failure{err="generation"}'] == 1
    assert after["lorax_request_count"] == before["lorax_request_count"] + 1


def test_health_is_asked_at_the_root_too_without_a_key(serve):
    """Some load balancers ask nothing else."""
    server = serve(keys={"ann": {}})
    assert server.get("/").status_code == httpx.head(server.url + "/").status_code == 200
    assert server.post("/", {"inputs": "a"}).status_code == 401


def test_predibases_path_knows_the_base_by_more_names(serve):
    """Its clients name a deployment, and one of them posts to the deployment itself."""
    server = serve(deployment_names=("llama-2-7b-chat",))
    last, body = server.base.name.rpartition("/")[2], {"inputs": "a", "parameters": {"max_new_tokens": 1}}
    for name in ("Llama-2-7B-chat", last.upper(), last):
        path = f"/me/deployments/v2/llms/{name}"
        whole = server.post(path + "/generate", body).json()
        assert server.post(path, body).json() == [whole]
        assert server.post(path, {**body, "stream": True}).text.startswith("data:")
    assert server.post("/me/deployments/v2/llms/other", body).status_code == 404


def test_many_texts_are_embedded_in_batches(live):
    """OpenAI's clients send up to 2048 texts; a batch takes the places of one request."""
    texts = [f"text {number}" for number in range(70)]
    found = live.post("/v1/embeddings", {"model": "plain", "input": texts}).json()["data"]
    assert [row["index"] for row in found] == list(range(70))
    [alone] = live.post("/v1/embeddings", {"model": "plain", "input": texts[69]}).json()["data"]
    assert alone["embedding"] == pytest.approx(found[69]["embedding"], abs=1e-4)


def test_info_counts_what_the_caller_may_use_without_asking_the_engine(serve, monkeypatch):
    """It is polled: it must wait for no step and list no hub each time."""
    server = serve(keys={"ann": {"adapters": ["pair"]}, "all": {}})
    assert [server.get("/info", key=key).json()["adapters"] for key in ("ann", "all")] == [1, 3]
    monkeypatch.setattr(server.service.hub, "list", None)
    monkeypatch.setattr(server.service, "run", None)
    assert server.get("/info", key="all").json()["adapters"] == 3
    assert len(server.get("/v1/models", key="all").json()["data"]) == 4

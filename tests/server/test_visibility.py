"""What a key can learn of others: not which adapters they have, by status, words, headers or work; not what they asked, by the prefix cache.

That an allow-list holds on every route is in test_auth_scopes; here is what could be told apart beside the status.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from tests.server.live_server import Live, fill_hub, serving

from atoll.model.base import Base
from atoll.serving.keys import add_key

PROMPT = "the same long beginning that fills more than two pages of the cache, which hold thirty-two tokens each"
KEYS: dict[str, dict[str, Any]] = {
    "ann": {"scopes": ["infer", "publish", "admin"], "adapters": ["plain", "ann/*"]},
    "bob": {"scopes": ["infer"]},
    "cleo": {"scopes": ["infer"]},
}
FORBIDDEN, MISSING = "sentiment", "sentimenu"  # names of one length

POSTS: dict[str, dict[str, Any]] = {
    "/": {"inputs": "a", "parameters": {"adapter_id": "X", "max_new_tokens": 1}},
    "/invocations": {"inputs": "a", "parameters": {"adapter_id": "X", "max_new_tokens": 1}},
    "/generate": {"inputs": "a", "parameters": {"adapter_id": "X", "max_new_tokens": 1}},
    "/generate_stream": {"inputs": "a", "parameters": {"adapter_id": "X", "max_new_tokens": 1}},
    "/t/deployments/v2/llms/BASE/generate": {"inputs": "a", "parameters": {"adapter_id": "X", "max_new_tokens": 1}},
    "/t/deployments/v2/llms/BASE/generate_stream": {"inputs": "a", "parameters": {"adapter_id": "X", "max_new_tokens": 1}},
    "/embed": {"inputs": "a", "parameters": {"adapter_id": "X"}},
    "/classify": {"inputs": "a", "parameters": {"adapter_id": "X"}},
    "/classify_batch": {"inputs": ["a"], "parameters": {"adapter_id": "X"}},
    "/v1/completions": {"model": "X", "prompt": "a", "max_tokens": 1},
    "/v1/chat/completions": {"model": "X", "messages": [{"role": "user", "content": "a"}], "max_tokens": 1},
    "/v1/embeddings": {"model": "X", "input": "a"},
    "/v1/load_lora_adapter": {"lora_name": "ann/new", "lora_path": "X"},
    "/v1/unload_lora_adapter": {"lora_name": "X"},
    **{f"/adapters/X/{action}": {} for action in ("load", "unload", "pin", "unpin", "reload")},
}
MERGED = {"ids": ["plain", "X"], "weights": [1.0, 0.5]}
VARIANTS: list[tuple[str, str, dict[str, Any] | None]] = [
    *(("POST", path, body) for path, body in POSTS.items()),
    *(
        ("POST", "/generate", {"inputs": "a", "parameters": {"adapter_id": f"X{tail}", "max_new_tokens": 1}})
        for tail in ("@1", ":latest", "@sha256:00")
    ),
    ("POST", "/generate", {"inputs": "a", "parameters": {"adapter_id": "X", "adapter_source": "pbase", "max_new_tokens": 1}}),
    ("POST", "/generate", {"inputs": "a", "parameters": {"adapter_id": "X", "adapter_source": "local", "max_new_tokens": 1}}),
    ("POST", "/generate", {"inputs": "a", "parameters": {"merged_adapters": MERGED, "max_new_tokens": 1}}),
    ("POST", "/v1/completions", {"prompt": "a", "merged_adapters": MERGED, "max_tokens": 1}),
    ("GET", "/adapters/X", None),
    ("GET", "/adapters/X?source=local", None),
    ("GET", "/v1/models/X", None),
]


@pytest.fixture(scope="module")
def guarded(served_base: Base, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A server with the keys above, whose local folders carry the names of the hub's adapters."""
    root = tmp_path_factory.mktemp("visibility")
    file = root / "keys.json"
    made = {name: add_key(file, name, **options) for name, options in KEYS.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATOLL_HOME", str(root / "home"))
        with serving(served_base, fill_hub(root, served_base), keys_file=file, local_root=root / "folders", negative_cache_s=0.0) as running:
            running.keys.update(made)
            yield running


def _asked(live: Live, variant: tuple[str, str, dict[str, Any] | None], name: str) -> httpx.Response:
    method, path, body = variant
    base = live.base.name.rstrip("/").rpartition("/")[2]
    filled: Any = None if body is None else _filled(body, name)
    path = path.replace("BASE", base).replace("X", name)
    return live.get(path, key="ann") if method == "GET" else live.post(path, filled, key="ann")


def _filled(value: Any, name: str) -> Any:
    if isinstance(value, dict):
        return {key: _filled(inner, name) for key, inner in value.items()}
    if isinstance(value, list):
        return [_filled(inner, name) for inner in value]
    return value.replace("X", name) if isinstance(value, str) else value


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: " ".join(map(str, variant))[:90])
def test_a_forbidden_adapter_cannot_be_told_from_a_missing_one(guarded: Live, variant: tuple[str, str, dict[str, Any] | None]) -> None:
    """By status, body, headers; whether the other is loaded or not; on the first asking and on later ones."""
    assert guarded.post("/generate", {"inputs": "a", "parameters": {"adapter_id": FORBIDDEN, "max_new_tokens": 1}}, key="bob").status_code == 200
    seen = []
    for name in (FORBIDDEN, MISSING, FORBIDDEN, MISSING):
        reply = _asked(guarded, variant, name)
        assert reply.status_code in (404, 424), reply.text
        headers = {key: value for key, value in reply.headers.items() if key != "date"}
        seen.append((reply.status_code, headers, reply.text.replace(name, "X")))
    assert all(found == seen[0] for found in seen)


def test_refusing_costs_the_same_work_whether_the_adapter_exists(guarded: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    """Time tells what words do not: neither is looked up, read or loaded, so there is nothing to measure."""
    work = Counter[str]()

    def counted(name: str, original: Any) -> Any:
        def count(self: Any, *args: Any, **more: Any) -> Any:
            if FORBIDDEN in str(args) or MISSING in str(args):  # the parent of a merge that ann may use is looked up beside the other
                work[name] += 1
            return original(self, *args, **more)

        return count

    from atoll.hub import Hub
    from atoll.serving.loading import Loader
    from atoll.serving.sources import LocalSource

    for kind, method in ((Hub, "resolve"), (Hub, "path"), (Loader, "load"), (LocalSource, "locate"), (LocalSource, "folder")):
        monkeypatch.setattr(kind, method, counted(f"{kind.__name__}.{method}", getattr(kind, method)))
    for variant in VARIANTS:
        found = []
        for name in (FORBIDDEN, MISSING):
            work.clear()
            guarded.service.registry.lookups.forget()
            _asked(guarded, variant, name)
            found.append(dict(work))
        assert found[0] == found[1], (variant, found)


def test_lists_and_metrics_show_a_key_its_own(guarded: Live) -> None:
    """The counts of other adapters are facts about them too."""
    assert guarded.post("/generate", {"inputs": "a", "parameters": {"adapter_id": FORBIDDEN, "max_new_tokens": 1}}, key="bob").status_code == 200
    for path in ("/adapters", "/v1/models", "/info"):
        assert FORBIDDEN not in guarded.get(path, key="ann").text
        assert path == "/info" or FORBIDDEN in guarded.get(path, key="bob").text
    assert guarded.get("/info", key="ann").json()["adapters"] == 1
    assert FORBIDDEN in guarded.get("/metrics", key="bob").text


def _cached(live: Live, key: str, path: str = "/v1/completions", **fields: Any) -> int:
    """Prompt tokens that a request found in the cache, as the reply's usage says."""
    body = {"prompt": PROMPT, "max_tokens": 1, "temperature": 0, **fields} if path == "/v1/completions" else fields
    reply = live.post(path, body, key=key)
    assert reply.status_code == 200, reply.text
    return int(reply.json()["usage"]["prompt_tokens_details"]["cached_tokens"])


@pytest.mark.parametrize("model", ["", "plain"])
def test_a_prompt_is_found_in_the_cache_by_its_own_key_only(guarded: Live, model: str) -> None:
    """Else a key could find out, token by token, what another has asked: the answer to a known beginning comes sooner."""
    assert _cached(guarded, "bob", model=model) == 0
    assert _cached(guarded, "bob", model=model) >= 64
    assert _cached(guarded, "cleo", model=model) == 0
    assert _cached(guarded, "ann", model=model) == 0
    assert _cached(guarded, "cleo", model=model) >= 64


def test_a_cached_prompt_is_of_one_adapter(guarded: Live) -> None:
    """Keys and values depend on the adapter: the same key with another one starts from nothing."""
    prompt = "another " + PROMPT
    for model in ("", "plain", "pair"):
        assert _cached(guarded, "bob", model=model, prompt=prompt) == 0
        assert _cached(guarded, "bob", model=model, prompt=prompt) >= 64


def test_what_a_request_leaves_in_the_cache_is_its_keys_by_every_route(guarded: Live) -> None:
    """Whole or streamed, native, chat, echoed or classified: no way in and no way out leads past the scope."""
    native = {"inputs": "native " + PROMPT, "parameters": {"max_new_tokens": 1}}
    assert guarded.post("/generate", native, key="bob").status_code == 200
    assert guarded.post("/generate_stream", native, key="bob").status_code == 200
    assert _cached(guarded, "cleo", prompt=native["inputs"]) == 0
    assert _cached(guarded, "bob", prompt=native["inputs"]) >= 64
    chat = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 1, "path": "/v1/chat/completions"}
    assert [_cached(guarded, key, **chat) > 0 for key in ("bob", "cleo", "bob", "cleo")] == [False, False, True, True]
    echoed = {"prompt": "echoed " + PROMPT, "echo": True, "logprobs": 1}
    assert guarded.post("/v1/completions", {"max_tokens": 0, **echoed}, key="bob").status_code == 200
    assert _cached(guarded, "cleo", prompt=echoed["prompt"]) == 0
    labelled = {"inputs": PROMPT, "parameters": {"adapter_id": "sentiment"}}
    assert guarded.post("/classify", labelled, key="bob").status_code == 200
    form = guarded.service.registry.entries[guarded.digest("sentiment")].loaded
    assert form is not None and form.prompt is not None
    assert _cached(guarded, "cleo", model="sentiment", prompt=form.prompt.render({"text": PROMPT})) == 0

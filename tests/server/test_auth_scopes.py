"""Keys on every route: which scope each needs, and that an allow-list holds whatever the route."""

from __future__ import annotations

import pytest

from atoll.http.auth import RULES
from atoll.server import manage
from atoll.server.app import declared

OPEN = {"/health", "/ping", "/startup"}
BODIES = {
    "/": {"inputs": "hello", "parameters": {"max_new_tokens": 2, "adapter_id": "ADAPTER"}},
    "/invocations": {"inputs": "hello", "parameters": {"max_new_tokens": 2, "adapter_id": "ADAPTER"}},
    "/generate": {"inputs": "hello", "parameters": {"max_new_tokens": 2, "adapter_id": "ADAPTER"}},
    "/generate_stream": {"inputs": "hello", "parameters": {"max_new_tokens": 2, "adapter_id": "ADAPTER"}},
    "/embed": {"inputs": "hello", "parameters": {"adapter_id": "ADAPTER"}},
    "/classify": {"inputs": "hello", "parameters": {"adapter_id": "ADAPTER"}},
    "/classify_batch": {"inputs": ["hello"], "parameters": {"adapter_id": "ADAPTER"}},
    "/v1/completions": {"model": "ADAPTER", "prompt": "hello", "max_tokens": 2},
    "/v1/chat/completions": {"model": "ADAPTER", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2},
    "/v1/embeddings": {"model": "ADAPTER", "input": "hello"},
}


@pytest.fixture(scope="module")
def guarded(served_base, tmp_path_factory):
    """A server with a key of each scope, and ann, who may use plain alone."""
    from tests.server.live_server import fill_hub, serving

    from atoll.serving.keys import add_key

    root = tmp_path_factory.mktemp("guarded")
    file = root / "keys.json"
    keys = {scope: add_key(file, scope, [scope]) for scope in ("infer", "publish", "admin")}
    keys["ann"] = add_key(file, "ann", ["infer", "admin"], ["plain", "ann/*"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATOLL_HOME", str(root / "home"))
        with serving(served_base, fill_hub(root, served_base), keys_file=file) as running:
            running.keys.update(keys)
            yield running


def routes(server):
    """(method, path with its parameters filled in, path as declared) of every route."""
    from atoll.server.app import create_app

    for path, method in declared(create_app(server.service).routes):
        filled = path
        for parameter, value in (("{name:path}", "plain"), ("{model:path}", "plain"), ("{tenant}", "t"), ("{deployment}", "d"), ("{job}", "j")):
            filled = filled.replace(parameter, value)
        assert "{" not in filled, f"say here what {path} is filled with"
        yield method, filled, path


def test_every_route_refuses_a_stranger(guarded):
    """A route that was forgotten is open to the world; LoRAX, vLLM and SGLang each had one."""
    for method, filled, path in routes(guarded):
        found = guarded._ask(method, filled, "")
        is_open = path in OPEN or (method, path) == ("GET", "/")
        expected = (200,) if is_open else (401,)
        assert found.status_code in expected, f"{method} {filled} answered {found.status_code}"
        if not is_open:
            assert found.headers["www-authenticate"] == "Bearer"
            wrong = guarded._ask(method, filled, "", headers={"authorization": "Bearer atoll_wrong"})
            assert wrong.status_code == 401


@pytest.mark.parametrize("key", ["infer", "publish", "admin"])
def test_a_key_of_one_scope_does_that_and_nothing_else(guarded, key):
    """Scopes are apart: an operator's key does not read prompts, a client's key does not unload."""
    table = {**RULES, **manage.RULES}
    for method, filled, path in routes(guarded):
        rule = table[path]
        needed = rule if not isinstance(rule, dict) else rule[method]
        if needed is None:
            continue
        found = guarded._ask(method, filled, key)
        if needed == key:
            assert found.status_code not in (401, 403), f"{method} {filled}: {found.text}"
        else:
            assert found.status_code == 403, f"{method} {filled} with {key} answered {found.status_code}"


@pytest.mark.parametrize("path", list(BODIES))
def test_an_allow_list_holds_on_every_route(guarded, path):
    """What is not on it does not exist: the same status and the same words as for a name that nobody has."""

    def asked(adapter):
        body = dict(BODIES[path])
        if "model" in body:
            body["model"] = adapter
        else:
            body["parameters"] = {**body["parameters"], "adapter_id": adapter}
        found = guarded.post(path, body, key="ann")
        return found.status_code, found.text.replace(adapter, "X")

    fine, forbidden, missing = asked("plain"), asked("sentiment"), asked("nobodys")
    assert forbidden == missing
    assert "no adapter" in forbidden[1]
    assert fine != forbidden


def test_an_allow_list_hides_others_in_lists_and_management(guarded):
    """Not their names, their states, nor their existence."""
    assert {each["name"] for each in guarded.get("/adapters", key="ann").json()["adapters"]} == {"plain"}
    models = {each["id"] for each in guarded.get("/v1/models", key="ann").json()["data"]}
    assert models == {"plain", guarded.base.name}
    for path in ("/adapters/{}", "/v1/models/{}"):
        replies = [guarded.get(path.format(name), key="ann") for name in ("sentiment", "nobodys")]
        assert {reply.status_code for reply in replies} == {404}
        assert replies[0].text.replace("sentiment", "X") == replies[1].text.replace("nobodys", "X")
    for action in ("load", "unload", "pin", "unpin", "reload"):
        replies = [guarded.post(f"/adapters/{name}/{action}", key="ann") for name in ("sentiment", "nobodys")]
        assert {reply.status_code for reply in replies} == {404}
        assert replies[0].text.replace("sentiment", "X") == replies[1].text.replace("nobodys", "X")
    for name in ("sentiment", "nobodys"):
        assert guarded.post("/v1/unload_lora_adapter", {"lora_name": name}, key="ann").status_code == 404
        assert guarded.post("/v1/load_lora_adapter", {"lora_name": "ann/x", "lora_path": name}, key="ann").status_code == 404


def test_merged_adapters_are_each_on_the_list(guarded):
    """A merge of ours with theirs, at weight 0 for ours, is theirs."""
    body = {"inputs": "hello", "parameters": {"max_new_tokens": 2, "merged_adapters": {"ids": ["plain", "sentiment"], "weights": [0.0, 1.0]}}}
    refused = guarded.post("/generate", body, key="ann")
    assert refused.status_code == 424
    assert "no adapter 'sentiment'" in refused.json()["error"]
    assert guarded.post("/generate", body, key="infer").status_code == 200


def test_a_key_of_a_client_is_never_sent_on(guarded):
    """LoRAX takes the bearer token for the adapter's source: our keys must not go to other hosts, nor into replies."""
    found = guarded.post("/generate", {"inputs": "hi", "parameters": {"adapter_id": "nope/x", "adapter_source": "hf"}}, key="infer")
    assert found.status_code == 424
    assert guarded.keys["infer"] not in found.text + str(found.headers)

"""One server, one hub, every kind of adapter: LoRA, ReFT, both and the base are asked for, mixed, listed, loaded and published in the same way."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from tests.server.live_server import LABELS, Live, fill_kinds, serving
from tests.server.test_manage import files_of, folder_of, upload

from adapters import random_reft
from atoll.engine.request import ScoreRequest
from atoll.model.adapter import Adapter
from atoll.model.adapter_files import read_adapter, write_adapter
from atoll.model.apply_edits import edit_rows, edited_parts
from atoll.model.bank import LoraBank
from atoll.model.base import Base
from atoll.model.batch import AdapterBatch, PackedBatch, Segment
from atoll.serving.merging import MergeSpec, merge

NAMES = (None, "plain", "edits", "judge", "both")
PROMPT = "what is a quiet lagoon in the early morning?"
NUM_TOKENS = 12
LIVELY = {"max_new_tokens": NUM_TOKENS, "repetition_penalty": 1.5}  # left to itself, the toy base says one token over and over


@pytest.fixture(scope="module")
def live(served_base: Base, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    root = tmp_path_factory.mktemp("kinds")
    with serving(served_base, fill_kinds(root, served_base)) as running:
        yield running


@pytest.fixture
def fresh(served_base: Base, tmp_path: Path) -> Iterator[Live]:
    """One for a test that changes something."""
    with serving(served_base, fill_kinds(tmp_path / "server", served_base), local_root=tmp_path) as running:
        yield running


# ---- the ways to ask; LoRAX's return token ids, OpenAI's a text ----


def generate(live: Live, name: str | None = None, **parameters: Any) -> list[int]:
    return [token["id"] for token in _details(live, name, **parameters)["tokens"]]


def generate_stream(live: Live, name: str | None) -> list[int]:
    body = {"inputs": PROMPT, "parameters": {"adapter_id": name, **LIVELY}}
    return [event["token"]["id"] for event in _events(live.post("/generate_stream", body))]


def _details(live: Live, name: str | None = None, **parameters: Any) -> Any:
    body = {"inputs": PROMPT, "parameters": {"adapter_id": name, **LIVELY, "details": True, **parameters}}
    return live.post("/generate", body).raise_for_status().json()["details"]


def chat(live: Live, name: str | None = None, prompt: str = PROMPT) -> str:
    reply = live.post("/v1/chat/completions", _chat(name, prompt)).raise_for_status().json()
    return str(reply["choices"][0]["message"]["content"])


def chat_stream(live: Live, name: str | None, prompt: str = PROMPT) -> str:
    events = _events(live.post("/v1/chat/completions", {**_chat(name, prompt), "stream": True}))
    return "".join(event["choices"][0]["delta"].get("content") or "" for event in events if event["choices"])


def _chat(name: str | None, prompt: str) -> dict[str, Any]:
    turns = [{"role": "user", "content": prompt}]
    return {"model": name or "base", "messages": turns, "max_tokens": NUM_TOKENS, "temperature": 0, "frequency_penalty": 1, "prompt_format": "base"}


def _events(reply: httpx.Response) -> list[Any]:
    reply.raise_for_status()
    lines = [line.removeprefix("data:").strip() for line in reply.text.splitlines() if line.startswith("data:")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


WAYS: tuple[Callable[..., Any], ...] = (generate, generate_stream, chat, chat_stream)


# ---- answers ----


def test_every_kind_answers_alike_alone_streamed_and_in_a_mixed_crowd(live: Live):
    """Rows of all kinds and routes stand in one batch: a row whose neighbours leak into it, or whose edits are forgotten, says something else."""
    alone = {name: (generate(live, name), chat(live, name)) for name in NAMES}
    assert len({str(ids) for ids, _ in alone.values()}) == len(NAMES), "an adapter that answers as another one, or as the base, was not applied"
    asked = [(way, name) for way in WAYS for name in NAMES] * 2
    with ThreadPoolExecutor(len(asked)) as pool:
        crowd = list(pool.map(lambda ask: ask[0](live, ask[1]), asked))
    for (way, name), text in zip(asked, crowd, strict=True):
        assert text == alone[name][way in (chat, chat_stream)], (way.__name__, name)


@pytest.mark.parametrize("name", ["edits", "judge", "both"])
def test_the_first_token_is_that_of_the_plain_forward_with_these_edits(live: Live, name: str):
    """The whole way from a published file to a served token, held to the forward itself."""
    hub = live.service.hub
    assert hub is not None
    [token] = _details(live, name, max_new_tokens=1, repetition_penalty=None)["tokens"]
    assert _token_of(live.base, read_adapter(hub.path(name))) == (token["id"], pytest.approx(token["logprob"], abs=1e-4))


def _token_of(base: Base, adapter: Adapter) -> tuple[int, float]:
    """The likeliest first token after PROMPT and its log-probability, by the forward without an engine."""
    decoder, ids = base.decoder, list(base.tokenizer(PROMPT, add_special_tokens=False)["input_ids"])
    slot = LoraBank(decoder.shape.linears, decoder.shape.num_layers, torch.float32).load(adapter)
    edits = edit_rows([(0, 0, len(ids), len(ids), edited_parts(adapter))])
    segments = (Segment(0, len(ids), slot),) if adapter.modules else ()
    with torch.no_grad():
        logits = decoder.logits(decoder.forward(PackedBatch.of([ids], outputs="last"), AdapterBatch(segments, edits=edits)))[0]
    return int(logits.argmax()), float(logits.log_softmax(0).max())


def test_a_reft_adapter_classifies(live: Live):
    """Labels are scored after a prompt that is edited once; what is scored is not."""
    found = live.post("/classify", {"inputs": "fine", "parameters": {"adapter_id": "judge"}}).raise_for_status().json()
    prompt = live.ids("Good or bad?\n\nText: fine\nLabel:")
    options = [live.ids(" " + label) for label in LABELS]
    shares = {}
    for key in (live.digest("judge"), None):
        sums = live.run(lambda engine, key=key: engine.score([ScoreRequest(prompt, options, key)]))[0]
        shares[key] = {label: math.exp(value) / sum(map(math.exp, sums)) for label, value in zip(LABELS, sums, strict=True)}
    scores = {entity["entity_group"]: entity["score"] for entity in found}
    assert scores == pytest.approx(shares[live.digest("judge")], abs=1e-5)
    assert scores["good"] != pytest.approx(shares[None]["good"], rel=0.05)


def test_a_suffix_only_edit_shares_the_prompt_s_pages_with_the_base_and_says_what_it_would_without(fresh: Live, live: Live):
    """Pages before the first edited token are the base's own; taking a page too many would drop the edit without a word."""
    long = "a quiet lagoon in the early morning, " * 3
    usage = {}
    for name in ("base", "judge", "edits"):
        body = {**_chat(name, long), "max_tokens": 2}
        usage[name] = fresh.post("/v1/chat/completions", body).raise_for_status().json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert usage["judge"] > 0 and usage["base"] == usage["edits"] == 0
    for name in ("judge", "edits", "base"):
        assert chat(fresh, name, long) == chat(fresh, name, long) == chat(live, name, long)


def test_keys_do_not_share_each_other_s_pages(served_base: Base, tmp_path: Path):
    """How fast an answer comes must not tell one customer what another one asked, whatever the kind of adapter; nor must a count of kinds."""
    from atoll.serving.keys import add_key

    keys = {name: add_key(tmp_path / "keys.json", name, scopes=["infer"]) for name in ("ann", "bob")}
    keys["eve"] = add_key(tmp_path / "keys.json", "eve", scopes=["infer"], adapters=["edits"])
    with serving(served_base, fill_kinds(tmp_path / "server", served_base), keys_file=tmp_path / "keys.json") as server:
        server.keys.update(keys)

        def cached(key: str, name: str) -> int:
            body = {**_chat(name, "a quiet lagoon in the early morning, " * 3), "max_tokens": 2}
            return int(server.post("/v1/chat/completions", body, key=key).json()["usage"]["prompt_tokens_details"]["cached_tokens"])

        assert [cached("ann", name) > 0 for name in ("edits", "edits", "both", "both", "judge")] == [False, True, False, True, False]
        assert [cached("bob", name) for name in ("edits", "both", "judge")] == [0, 0, 0]
        assert server.get("/info", key="eve").json()["adapter_kinds"] == {"reft": 1}


# ---- mixtures ----


def test_a_request_stacks_a_lora_and_a_reft_adapter(live: Live):
    """The sum of both, computed once for the request, is one adapter with LoRA modules and edits."""
    hub = live.service.hub
    assert hub is not None
    stacked = merge(MergeSpec(("plain", "edits"), (1.0, 1.0)), [read_adapter(hub.path(name)) for name in ("plain", "edits")])
    assert stacked.spec.kind == "lora+reft"
    [token] = _details(live, merged_adapters={"ids": ["plain", "edits"], "weights": [1.0, 1.0]}, max_new_tokens=1, repetition_penalty=None)["tokens"]
    assert _token_of(live.base, stacked) == (token["id"], pytest.approx(token["logprob"], abs=1e-4))
    assert generate(live, merged_adapters={"ids": ["edits"], "weights": [1.0]}) == generate(live, "edits")


@pytest.mark.parametrize("extra", [{"merge_strategy": "ties", "density": 0.5}, {"merge_strategy": "product"}, {"merge_strategy": "svd", "rank": 2}])
def test_what_has_no_meaning_for_edits_is_refused_by_name(live: Live, extra: dict[str, Any]):
    """A merge that silently left the edits out would be another adapter. On streams too, before they begin."""
    merged = {"ids": ["plain", "edits"], "weights": [0.5, 0.5], **extra}
    for path in ("/generate", "/generate_stream"):
        reply = live.post(path, {"inputs": PROMPT, "parameters": {"merged_adapters": merged, "max_new_tokens": 2}})
        assert reply.status_code == 422 and reply.json()["error_type"] == "validation"
        assert extra["merge_strategy"] in reply.json()["error"] and "'edits'" in reply.json()["error"] and "ReFT" in reply.json()["error"]


# ---- what is there ----


def test_lists_say_which_kind_everything_is(live: Live):
    """A user who chooses, and a program that routes, must not take edits for a LoRA."""
    expected = {"plain": "lora", "sentiment": "lora", "pair": "lora", "edits": "reft", "judge": "reft", "both": "lora+reft"}
    listed = {each["name"]: each for each in live.get("/adapters").json()["adapters"]}
    assert {name: each["kind"] for name, each in listed.items()} == expected
    models = {each["id"]: each["lineage"] for each in live.get("/v1/models").json()["data"]}
    assert {name: lineage["kind"] for name, lineage in models.items()} == {live.base.name: "base", **expected}
    hub = live.service.hub
    assert hub is not None
    for name in expected:
        counted = hub.resolve(name).num_parameters
        assert listed[name]["num_parameters"] == models[name]["num_parameters"] == counted
    assert live.get("/info").json()["adapter_kinds"] == {"lora": 3, "reft": 2, "lora+reft": 1}


def test_edits_are_loaded_pinned_and_unloaded_as_factors_are(fresh: Live):
    """Management, and the bytes that the limits count, which are of the edits too."""
    assert fresh.post("/adapters/edits/load").json()["state"] == "ready"
    hub = fresh.service.hub
    assert hub is not None
    entry = fresh.service.registry.entries[fresh.digest("edits")]
    assert entry.num_bytes == 4 * (hub.resolve("edits").num_parameters or 0)
    assert 'atoll_adapters_loaded{kind="reft"} 1.0' in fresh.get("/metrics").text
    pinned = fresh.post("/adapters/edits/pin").json()
    assert pinned["pinned"] and pinned["engine"]["resident"] and 0 < pinned["engine"]["bytes"] < 10 * entry.num_bytes
    assert fresh.post("/adapters/edits/unload").status_code == 409
    assert not fresh.post("/adapters/edits/unpin").json()["pinned"]
    assert fresh.post("/adapters/edits/unload", {"wait_s": 5}).json()["state"] == "known"
    assert 'kind="reft"' not in fresh.get("/metrics").text
    assert generate(fresh, "edits") == generate(fresh, "edits")


def test_a_folder_of_edits_is_served_by_name_and_known_only_when_read(fresh: Live, tmp_path: Path):
    """vLLM's route takes any kind; of what nobody has read, the kind is not guessed."""
    folder_of(fresh, tmp_path / "lora", seed=90)
    write_adapter(tmp_path / "mine", random_reft(fresh.base.decoder, 91))
    assert fresh.get("/adapters/local:mine", params={"source": "local"}).json()["kind"] is None
    assert fresh.post("/v1/load_lora_adapter", {"lora_name": "mine", "lora_path": "mine"}).status_code == 200
    assert fresh.get("/v1/models/mine").json()["lineage"]["kind"] == "reft"
    assert generate(fresh, "mine") != generate(fresh, None)
    assert fresh.post("/adapters/local:mine/unload", {"source": "local", "wait_s": 5}).json()["kind"] == "reft"


# ---- publishing ----


def test_edits_are_published_over_http_and_servable_at_once(fresh: Live, tmp_path: Path):
    """An upload is an upload, whatever it holds."""
    from dataclasses import replace

    for seed, lora in ((71, 0), (72, 4)):
        made = random_reft(fresh.base.decoder, seed, lora=lora)
        kind, folder = made.spec.kind, tmp_path / f"new{lora}"
        write_adapter(folder, replace(made, manifest={"format": 1, "kind": kind, "base": fresh.base.describe(), "prompt": None}))
        done = upload(fresh, folder, {"name": f"acme/new{lora}"})
        assert (done.status_code, done.json()["kind"], done.json()["num_parameters"]) == (201, kind, made.num_parameters)
        assert generate(fresh, f"acme/new{lora}") != generate(fresh, None)
        again = fresh.post("/adapters", {"name": f"acme/new{lora}", "folder": folder.name})
        assert again.json()["version"] == f"acme/new{lora}@1"


def test_a_hostile_upload_of_edits_is_one_sentence_and_publishes_nothing(fresh: Live, tmp_path: Path):
    """What a strict reader refuses is the client's mistake, told in the shape of our routes."""
    folder = tmp_path / "bad"
    write_adapter(folder, random_reft(fresh.base.decoder, 73))
    config = json.loads((folder / "adapter_config.json").read_text())
    good = files_of(folder)
    part = config["reft"][0]
    for changed in (
        {**config, "peft_type": "LORA"},
        {**config, "reft": []},
        {**config, "code": "import os"},
        {**config, "reft": [{**part, "rank": 5}]},
        {**config, "reft": [{**part, "method": "no"}]},
        {**config, "reft": [{**part, "layers": [0]}]},
        {**config, "reft": [part] * 500},
    ):
        reply = upload(fresh, folder, {"name": "bad"}, files=[("files", ("adapter_config.json", json.dumps(changed).encode())), *good[1:]])
        assert reply.status_code == 422, reply.text
        message = reply.json()["error"]["message"]
        assert message and "\n" not in message and "Traceback" not in message
    assert fresh.get("/adapters/bad").status_code == 404
    hub = fresh.service.hub
    assert hub is not None
    assert not list((hub.root / "staging").iterdir())


def test_edits_for_another_base_are_refused_when_asked_for(fresh: Live, tmp_path: Path):
    """Published elsewhere, named here: the first tensor that does not fit, and no 500."""
    from adapters import decoder_of
    from conftest import tiny_model

    write_adapter(tmp_path / "wide", random_reft(decoder_of(tiny_model("llama", hidden_size=32)), 74))
    write_adapter(tmp_path / "deep", random_reft(decoder_of(tiny_model("llama", num_hidden_layers=4)), 75))
    for name, words in (("wide", "width 64"), ("deep", "no layer 3")):
        body = {"inputs": PROMPT, "parameters": {"adapter_id": name, "adapter_source": "local", "max_new_tokens": 2}}
        reply = fresh.post("/generate", body)
        assert (reply.status_code, reply.json()["error_type"]) == (424, "generation") and words in reply.json()["error"]

"""What a request's adapters are refused for at once: their kind, their base, their ranks. Whoever is refused here has not waited for minutes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from tests.conftest import tiny_model
from tests.server.live_server import Live, fill_kinds, serving

from adapters import decoder_of, publish, random_adapter
from atoll.config_compose import ComposeSettings
from atoll.model.base import Base
from atoll.server.compose_adapters import check_adapters

UNEQUAL = "the product form needs adapters of equal rank"
ROWS = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]


@pytest.fixture(scope="module")
def kinds(served_base: Base, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A server over adapters of every kind; none of its compositions is ever begun."""
    root = tmp_path_factory.mktemp("kinds")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATOLL_HOME", str(root / "home"))
        hub, base = fill_kinds(root, served_base), served_base.describe()
        publish(hub, random_adapter(served_base.decoder, 2, seed=8), "thin", root, base=base)
        publish(hub, random_adapter(served_base.decoder, 2, seed=9, use_dora=True), "dora", root, base=base)
        wide = decoder_of(tiny_model("llama", hidden_size=96))
        publish(hub, random_adapter(wide, 4, seed=10), "wide", root, base={"name": "wide-base"})
        with serving(served_base, hub) as running:
            yield running


def refused(live: Live, **body: Any) -> httpx.Response:
    reply = live.post("/compose", {"name": "new", "examples": ROWS, **body})
    assert live.get("/compose").json() == {"jobs": []}, "nothing was queued"
    return reply


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"adapters": ["plain", "edits"]}, "edits@1 is reft: it edits hidden states, and only LoRA factors are weighed"),
        ({"adapters": ["both@1"]}, "both@1 is lora+reft: it edits hidden states, and only LoRA factors are weighed"),
        ({"adapters": ["dora"]}, "dora@1: DoRA's magnitudes belong to one update alone, and cannot be weighed"),
        ({"adapters": ["dora", "plain"], "exclude": ["plain"]}, "dora@1: DoRA's magnitudes belong to one update alone, and cannot be weighed"),
        (
            {"adapters": ["plain", "thin"], "form": "product"},
            f"{UNEQUAL}, but plain@1 has rank 4 where thin@1 has 2",
        ),
    ],
)
def test_adapters_that_cannot_be_weighed_are_refused_at_once(kinds: Live, body: dict[str, Any], message: str) -> None:
    """The hub's index and the files' headers say it; before, the job was accepted and failed after its turn had come."""
    reply = refused(kinds, **body)
    assert (reply.status_code, reply.json()["error"]["message"]) == (422, message)
    assert reply.json()["error"]["hint"]


def test_an_adapter_of_another_base_is_refused_with_the_reason(kinds: Live) -> None:
    reply = refused(kinds, adapters=["plain", "wide"])
    assert reply.status_code == 422
    assert reply.json()["error"]["code"] == "base_mismatch"
    assert reply.json()["error"]["message"].startswith("wide@1 does not fit the base")


@pytest.mark.parametrize(
    ("body", "message", "hint"),
    [
        ({"topk": 3}, "topk is not a key that Atoll knows", "did you mean top_k?"),
        ({"form": "prodct"}, "form is 'prodct': must be 'cat' or 'product'", "did you mean product?"),
        ({"adapters": "plain"}, "adapters is 'plain': must be a list, but this is text", "adapters: Compose only these"),
        ({"from": 3}, "from is 3: must be a list, but this is a number", "from: Compose only these"),
    ],
)
def test_a_wrong_key_or_value_gets_the_words_and_the_hint_of_a_compose_file(kinds: Live, body: dict[str, Any], message: str, hint: str) -> None:
    """The same mistake has the same answer on the command line and over HTTP."""
    error = refused(kinds, **body).json()["error"]
    assert error["message"] == message
    assert error["hint"].startswith(hint)


@pytest.mark.parametrize(
    "body",
    [
        {"adapters": ["plain", "dora"]},
        {"adapters": ["plain", "thin"]},
        {"adapters": ["plain", "thin", "dora"], "form": "product", "top_k": 1},
        {"adapters": ["plain", "edits"], "exclude": ["EDITS"]},
    ],
    ids=str,
)
def test_what_may_still_go_well_is_accepted(kinds: Live, body: dict[str, Any]) -> None:
    """DoRA beside others is left out with a warning, and of many ranks the ranking may choose equal ones."""
    check_adapters(ComposeSettings(**body), kinds.service)

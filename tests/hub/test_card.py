"""The card: complete, and harmless whatever strangers wrote."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime

import pytest

from atoll.hub.card import escape

HOSTILE = "<script>alert(1)</script> ![x](http://evil.example/p.png) [a](javascript:x) | `b` **c** www.evil.example # d"


def test_a_card_says_what_the_adapter_is_made_of_and_how_good_it_is(hub, make):
    """A colleague decides by the card whether to trust an adapter: spec, base, data, scores and parents must be on it."""
    parent = hub.publish(make(1), "parent")
    training = {"data_version": "0123", "steps": 40, "seconds": 12.5, "seed": 17, "losses": [3.0, 1.0]}
    manifest = {"kind": "composed", "training": training, "parents": [{"digest": parent.digest, "weight": 0.5}, {"name": "elsewhere", "weight": -1}]}
    child = hub.publish(make(2, manifest=manifest), "child", licence="MIT", message="first try", tags=("beta",))
    hub.record_score(child.digest, "intents", "v1", "accuracy", 0.925, stderr=0.01, n=300)
    hub.record_run("compose", {"k": 5}, status="finished", started=datetime.now(UTC), digest=child.digest)
    card = hub.show("child")
    page = card.markdown()
    for words in (
        "# child",
        f"sha256:{child.digest}",
        "composed",
        "toy/base",
        "d" * 64,
        "MIT",
        "beta",
        "0.9250",
        "300",
        "40",
        "parent@1",
        "elsewhere",
        "0.5000",
    ):
        assert escape(words) in page or words in page
    assert card.training["steps"] == 40 and card.config["r"] == 2 and card.runs[0].config == {"k": 5}
    assert hub.show("parent").children == ("child@1",) and "child@1" in hub.show("parent").markdown()
    assert json.loads(json.dumps(card.to_json()))["files"][0]["name"] == "adapter_config.json"


def test_nothing_a_stranger_writes_becomes_html_a_link_an_image_or_a_column(hub, make):
    """Cards are shown in a browser beside the user's keys."""
    source = make(1, manifest={"description": HOSTILE, "task": HOSTILE[:200], "base": {"name": HOSTILE}, "training": {HOSTILE: HOSTILE}})
    (source / "README.md").write_text(f"---\nlicense: '{HOSTILE[:40]}'\n---\n````\n{HOSTILE}\n```\n")
    hub.publish(source, "a", message=HOSTILE)
    page = hub.show("a").markdown()
    head, _, readme = page.partition("## README of its author")
    assert "<" not in head and not re.search(r"(?<!\\)[\[\]`*]", head) and "http:" not in head and "www." not in head
    assert all(len(re.findall(r"(?<!\\)\|", line)) in (3, 4) for line in head.splitlines() if line.startswith("|"))
    fence = re.search(r"^(`+)text$", readme, re.MULTILINE)
    assert fence is not None and len(fence[1]) == 5 and readme.rstrip().endswith("`````")


@pytest.mark.parametrize("text, line", [("a\nb", "a b"), ("a_b", "a\\_b"), ("&lt;", "&amp;lt;"), (3, "3")])
def test_escaping_keeps_one_line(text, line):
    """A newline in a cell ends the table."""
    assert escape(text) == line

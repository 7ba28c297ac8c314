"""Given texts under ReFT adapters: log-probabilities of prompts, scores of options and vectors are those of the whole edited text at once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tests.engine.conftest import used_by
from tests.engine.test_reft_rows import REFT, MakeEngine, ask, prompt

from atoll.engine.request import EmbedRequest, ScoreRequest
from atoll.model.adapter import Adapter
from atoll.model.base import Base
from atoll.model.batch import PackedBatch


def test_log_probabilities_of_a_prompt_are_those_of_the_edited_prompt(
    make_reft_engine: MakeEngine, reft_adapters: dict[str, Adapter], reference_logits: Callable[..., torch.Tensor]
) -> None:
    """Echo shows what the adapter makes of the prompt: states before the first edited token are the base's, those behind it are not."""
    engine = make_reft_engine(max_step_tokens=65)
    tokens = prompt(70)
    found = dict(zip(REFT, engine.generate([ask(tokens, key, prompt_logprobs=0) for key in REFT]), strict=True))
    for key, completion in found.items():
        expected = torch.log_softmax(reference_logits(tokens, reft_adapters[key]), -1)
        assert completion.prompt_logprobs is not None
        for place, logprob in enumerate(completion.prompt_logprobs[1:]):
            assert logprob is not None and logprob.logprob == pytest.approx(float(expected[place, tokens[place + 1]]), abs=1e-4)
    base = torch.log_softmax(reference_logits(tokens), -1)
    for key, is_base in (("suffix", True), ("all", False)):
        before = [logprob.logprob for logprob in (found[key].prompt_logprobs or ())[1:67] if logprob is not None]
        assert (before == pytest.approx([float(base[place, tokens[place + 1]]) for place in range(66)], abs=1e-4)) == is_base


@pytest.mark.parametrize("settings", [{}, {"max_rows": 2, "max_step_tokens": 12}], ids=str)
def test_options_are_scored_behind_the_edited_prompt(
    make_reft_engine: MakeEngine, reft_adapters: dict[str, Adapter], reference_logits: Callable[..., torch.Tensor], settings: dict[str, int]
) -> None:
    """The prompt without the option is what has a first and a last token; an option's tokens are never edited."""
    engine = make_reft_engine(**settings)
    options = [[8, 9, 10, 11], [12], [13, 14]]
    asked = [ScoreRequest(prompt(length, i), options, key) for i, key in enumerate(REFT) for length in (1, 3, 20, 45)]
    for item, sums in zip(asked, engine.score(asked), strict=True):
        length = len(item.prompt_ids)
        for option, found in zip(options, sums, strict=True):
            logits = reference_logits([*item.prompt_ids, *option], reft_adapters[str(item.adapter)], length)
            expected = torch.log_softmax(logits, -1)[length - 1 :]
            assert found == pytest.approx(sum(float(expected[i, token]) for i, token in enumerate(option)), abs=1e-3), item.adapter
    engine.check()


def test_a_text_is_embedded_as_an_edited_prompt(make_reft_engine: MakeEngine, base: Base, reft_adapters: dict[str, Adapter]) -> None:
    """All of the text is the prompt, in one forward or in many."""
    asked = [EmbedRequest(prompt(length, i), key, "mean" if i % 2 else "last") for i, key in enumerate(REFT) for length in (1, 33, 50)]
    engine = make_reft_engine(max_rows=2, max_step_tokens=23)
    for item, vector in zip(asked, engine.embed(asked), strict=True):
        with torch.inference_mode():
            use = used_by(base, reft_adapters[str(item.adapter)], len(item.prompt_ids), len(item.prompt_ids))
            hidden = base.decoder.forward(PackedBatch.of([item.prompt_ids]), use).float()
        expected = hidden[-1] if item.pooling == "last" else hidden.mean(0)
        torch.testing.assert_close(torch.tensor(vector), expected, rtol=0, atol=1e-4)

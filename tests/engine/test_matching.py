"""Answers that must match a grammar: they always do, whatever the model says, and nothing else about a request changes."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch

from atoll.engine.grammar import GrammarCompiler
from atoll.engine.request import Completion, Grammar, Request, SamplingParams, TokenEvent
from atoll.engine.sampler import choices_of, choose, plain_greedy
from atoll.engine.sequence import Sequence
from atoll.errors import EngineError
from conftest import tiny_tokenizer

V = 320  # the tiny models' logits; their tokenizer knows 261 tokens
EOS, CHAT_END = 2, 4

PERSON: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "Person",
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8, "description": "who"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["ant", "bee", "été", None, 3]},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 3}, "minItems": 1, "maxItems": 3},
        "place": {"$ref": "#/$defs/place"},
    },
    "required": ["name", "age", "kind", "tags"],
    "additionalProperties": False,
    "$defs": {"place": {"type": "object", "properties": {"x": {"type": "number", "exclusiveMinimum": -5, "maximum": 5}}, "required": ["x"]}},
}
SCHEMAS: dict[str, dict[str, Any]] = {
    "person": PERSON,
    "enum": {"enum": ["a", "bb", {"c": [1, None]}, 2.5, True]},
    "const": {"const": {"päth": 'a "quoted"\n\\line 🙂'}},
    "one of": {
        "oneOf": [
            {"type": "object", "properties": {"t": {"const": "n"}, "v": {"type": "integer"}}, "required": ["t", "v"], "additionalProperties": False},
            {
                "type": "object",
                "properties": {"t": {"const": "s"}, "v": {"maxLength": 2, "type": "string"}},
                "required": ["t"],
                "additionalProperties": False,
            },
        ]
    },
    "pattern": {"type": "string", "pattern": "^[A-Zé]{2,4}-[0-9]+$", "maxLength": 12},
    "pattern anywhere": {"type": "string", "pattern": "[xy]z", "maxLength": 6},
    "min items": {"type": "array", "items": {"type": "boolean"}, "minItems": 3, "maxItems": 5},
    "tuple": {
        "type": "array",
        "prefixItems": [{"type": "null"}, {"type": "integer", "multipleOf": 5, "maximum": 50, "minimum": 0}],
        "items": False,
        "minItems": 2,
    },
    "types": {"type": ["integer", "null", "boolean"], "minimum": -3, "maximum": 3},
    "map": {"type": "object", "additionalProperties": {"type": "integer", "maximum": 9, "minimum": 0}, "maxProperties": 2, "minProperties": 1},
    "pattern map": {"type": "object", "patternProperties": {"^k[0-9]$": {"type": "null"}}, "additionalProperties": False, "maxProperties": 2},
    "all of": {
        "allOf": [
            {"type": "object", "properties": {"a": {"type": "integer", "minimum": 1}}, "required": ["a"]},
            {"type": "object", "properties": {"a": {"maximum": 9}, "b": {"enum": [1, 2]}}, "required": ["b"]},
        ],
        "additionalProperties": False,
        "properties": {"a": True, "b": True},
    },
    "tree": {
        "$ref": "#/definitions/node",
        "definitions": {
            "node": {
                "type": "object",
                "properties": {"v": {"type": "boolean"}, "next": {"anyOf": [{"$ref": "#/definitions/node"}, {"type": "null"}]}},
                "required": ["v", "next"],
                "additionalProperties": False,
            }
        },
    },
    "format": {"type": "string", "format": "date"},
    "no effect": {
        "type": "array",
        "items": {"type": "integer", "minimum": 0, "maximum": 9},
        "uniqueItems": False,
        "maxItems": 2,
        "x-order": 3,
        "examples": [{"unknown": 1}],
    },
}


def schema(value: dict[str, Any]) -> Grammar:
    return Grammar("json_schema", json.dumps(value))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def compiler(tokenizer: Any) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, V, (EOS,))


@pytest.fixture(scope="module")
def make(tokenizer: Any, compiler: GrammarCompiler) -> Callable[..., Sequence]:
    """A sequence after the prompt "x", with a matcher if its settings name a grammar."""

    def decode(ids: list[int]) -> str:
        return str(tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=True))

    def sequence(max_new_tokens: int = 400, **settings: Any) -> Sequence:
        sampling = SamplingParams(max_new_tokens=max_new_tokens, **settings)
        matcher = compiler.compile(sampling.grammar) if sampling.grammar is not None else None
        return Sequence("s", Request((93,), None, sampling), max_new_tokens, (EOS,), decode, matcher=matcher)

    return sequence


def next_logits(sequence: Sequence, seed: int = 0) -> torch.Tensor:
    """[1, V]: a model that likes to stop and to use special and padding tokens; a function of the sequence's tokens and the seed."""
    values = torch.randn(1, V, generator=torch.Generator().manual_seed(hash((seed, *sequence.tokens[-6:], len(sequence.tokens)))))
    values[0, [0, 1, EOS, 3, CHAT_END, 300]] += 4.0
    values[0, [6, 97, 98, 130]] += 0.7  # a quote and closing brackets, so that answers end
    return values


def run(sequences: Seq[Sequence], seeds: Seq[int] = ()) -> list[list[TokenEvent]]:
    """Step all sequences together until each has ended; their events."""
    events: list[list[TokenEvent]] = [[] for _ in sequences]
    seeds = seeds or [0] * len(sequences)
    while active := [i for i, s in enumerate(sequences) if s.completion is None]:
        rows = torch.cat([next_logits(sequences[i], seeds[i]) for i in active])
        for i, choice in zip(active, choose(rows, [sequences[i] for i in active]), strict=True):
            assert choice is not None
            events[i].append(sequences[i].append(choice.token, choice.logprob))
    return events


def answer(sequence: Sequence, seed: int = 0) -> Completion:
    """The completion, after checking that the streamed texts are the whole text."""
    [events] = run([sequence], [seed])
    assert sequence.completion is not None
    assert "".join(event.text for event in events) == sequence.completion.text
    return sequence.completion


@pytest.mark.parametrize("name", SCHEMAS)
def test_sampled_answers_always_fit_the_schema(make: Callable[..., Sequence], name: str) -> None:
    """At temperature 1.5 a random model says anything; an answer that is complete must parse and validate, every time."""
    validator = jsonschema.Draft202012Validator(SCHEMAS[name])
    complete = 0
    for seed in range(12):
        completion = answer(make(250, grammar=schema(SCHEMAS[name]), temperature=1.5, seed=seed), seed)
        assert completion.finish_reason in ("stop", "length")
        if completion.finish_reason == "stop":
            validator.validate(json.loads(completion.text))
            complete += 1
    assert complete >= 8


def test_the_other_kinds_are_followed(make: Callable[..., Sequence]) -> None:
    """A regular expression matches the whole answer, json_object is any object, and a Lark grammar may hold schemas."""
    for seed in range(12):
        found = answer(make(grammar=Grammar("regex", r"(yes|no|é{2}): [0-9]{1,3}"), temperature=1.5, seed=seed), seed)
        assert re.fullmatch(r"(yes|no|é{2}): [0-9]{1,3}", found.text) and found.finish_reason == "stop"
        found = answer(make(800, grammar=Grammar("json_object"), temperature=1.5, seed=seed), seed)
        assert found.finish_reason == "length" or isinstance(json.loads(found.text), dict)
        lark = Grammar("lark", 'start: ("go" | "stop") " " args\nargs: %json {"type": "array", "items": {"enum": [1, 22]}, "maxItems": 3}')
        found = answer(make(grammar=lark, temperature=1.5, seed=seed), seed)
        word, rest = found.text.split(" ", 1)
        assert word in ("go", "stop") and set(json.loads(rest)) <= {1, 22}


def test_white_space_in_json_has_an_end(make: Callable[..., Sequence]) -> None:
    """Without a bound, a model that likes spaces fills the whole answer with them and never comes to the point."""
    found = answer(make(grammar=schema(PERSON), logit_bias={224: 90.0, 192: 90.0, 201: 90.0, 189: 90.0, 225: 90.0}))
    assert found.finish_reason == "stop"
    jsonschema.validate(json.loads(found.text), PERSON)


def test_special_and_padding_tokens_never_come_inside_a_text(make: Callable[..., Sequence]) -> None:
    """Chat markers in the middle of an answer would be swallowed from its text, and tokens past the tokenizer's last have none."""
    for settings in ({}, {"temperature": 1.5, "seed": 1}, {"ignore_eos": True}, {"temperature": 1.0, "seed": 2, "min_new_tokens": 30}):
        sequence = make(60, grammar=Grammar("regex", r"(?s:.*)"), **settings)
        run([sequence])
        tokens = sequence.tokens[sequence.num_prompt :]
        assert all(5 <= token < 261 for token in tokens[:-1]) and (5 <= tokens[-1] < 261 or tokens[-1] == EOS)
    with pytest.raises(EngineError, match="allows no token"):  # a Lark grammar may name one; the request fails, and nobody else's
        run([make(grammar=Grammar("lark", 'start: "a" <|im_start|> "b"'))])


def test_the_answer_ends_where_the_grammar_does(make: Callable[..., Sequence]) -> None:
    """Nothing can follow a closed object: no end-of-text token is waited for, not even with ignore_eos or min_new_tokens."""
    for settings in ({}, {"ignore_eos": True}, {"min_new_tokens": 50}):
        found = answer(make(grammar=schema({"const": "ab"}), **settings))
        assert (found.text, found.finish_reason, found.stopped_by, len(found.token_ids)) == ('"ab"', "stop", None, 4)
    assert answer(make(3, grammar=schema({"const": "ab"}))).finish_reason == "length"
    assert answer(make(4, grammar=schema({"const": "ab"}))).finish_reason == "stop"
    empty = answer(make(grammar=Grammar("lark", 'start: ""'), min_new_tokens=2, ignore_eos=True))
    assert (empty.text, empty.stopped_by) == ("", EOS)


def test_the_end_of_text_comes_only_where_the_text_matches(make: Callable[..., Sequence]) -> None:
    """The model wants to stop at once: it may after one letter, not before, not before min_new_tokens, and never with ignore_eos."""
    letters = Grammar("regex", "[ab]+")
    wish = {EOS: 100.0}
    assert len(answer(make(grammar=letters, logit_bias=wish)).text) == 1
    assert len(answer(make(grammar=letters, logit_bias=wish, min_new_tokens=5)).text) == 5
    assert answer(make(40, grammar=letters, logit_bias=wish, ignore_eos=True)).finish_reason == "length"
    limited = answer(make(grammar=Grammar("regex", "[ab]{3}"), logit_bias=wish, min_new_tokens=5))
    assert (len(limited.text), limited.finish_reason) == (3, "stop")


def test_an_adapters_own_stop_token_ends_a_matching_answer(make: Callable[..., Sequence]) -> None:
    """An adapter trained to close its turn with <|im_end|> never says the base's end-of-text token; its own counts as well."""
    found = answer(make(grammar=Grammar("regex", "[ab]+"), stop_token_ids=(CHAT_END,), logit_bias={CHAT_END: 100.0, EOS: -100.0}))
    assert (len(found.text), found.stopped_by) == (1, CHAT_END)
    found = answer(make(grammar=Grammar("regex", "a{3}b+"), stop_token_ids=(CHAT_END, 69), logit_bias={CHAT_END: 100.0}))  # 69 is "a"
    assert (found.text, found.stopped_by, found.token_ids) == ("", 69, (69,))  # a stop token that is text stops as it always does


def test_a_stop_string_ends_a_constrained_answer_as_any_other(make: Callable[..., Sequence]) -> None:
    """Tool calls are often cut at a marker inside the JSON; the text ends before it."""
    found = answer(make(grammar=schema({"const": {"key": "value"}}), stop=("lue", "never")))
    assert (found.text.replace(" ", ""), found.finish_reason, found.stopped_by) == ('{"key":"va', "stop", "lue")
    found = answer(make(grammar=schema({"const": "abc"}), stop=('c"!', "zz")))
    assert (found.text, found.stopped_by) == ('"abc"', None)  # the beginning of a stop string is given out when the grammar is complete


def test_no_setting_brings_back_a_forbidden_token(make: Callable[..., Sequence]) -> None:
    """Penalties and biases act before the grammar, limits after it: whatever they say, one of the allowed tokens is chosen."""
    allowed = dict.fromkeys(range(5, 261), -100.0)
    for settings in (
        {"logit_bias": {**allowed, 20: 100.0}},
        {"logit_bias": {**allowed, 20: 100.0}, "temperature": 1.5, "seed": 3, "top_k": 1},
        {"repetition_penalty": 1e6, "frequency_penalty": 2.0, "presence_penalty": 2.0},
        {"repetition_penalty": 1e-6, "temperature": 1e-20, "seed": 5, "top_p": 0.01},
        {"temperature": 100.0, "seed": 7, "min_p": 0.9, "typical_p": 0.05, "top_p": 0.2, "top_k": 2},
    ):
        found = answer(make(grammar=schema({"enum": ["abcabc", "cbacba"]}), logprobs=2, **settings))
        assert json.loads(found.text) in ("abcabc", "cbacba"), settings
        assert found.logprobs is not None and all(np.isfinite(entry.logprob) for entry in found.logprobs)


def test_log_probabilities_stay_the_models_own(make: Callable[..., Sequence]) -> None:
    """Masked distributions would give every forced token a probability of one, and comparing answers would be meaningless."""
    sequence = make(grammar=schema({"const": "a"}), logprobs=1)
    expected = torch.log_softmax(next_logits(sequence), -1)[0]
    [events] = run([sequence])
    assert events[0].logprob is not None
    assert events[0].logprob.logprob == pytest.approx(float(expected[events[0].token_id]))
    assert events[0].logprob.top[0][0] == int(expected.argmax())


def test_a_row_without_one_finite_allowed_logit_fails_alone(make: Callable[..., Sequence]) -> None:
    """Where the model gives minus infinity to all that the grammar allows there is nothing to choose: that is said, not guessed."""
    rows = [make(grammar=schema({"const": "a"})), make(), make(grammar=Grammar("regex", "[a-z]"))]
    values = torch.cat([next_logits(row) for row in rows])
    values[0, 5:261] = -torch.inf
    found = choose(values, rows)
    assert found[0] is None and found[1] is not None and found[2] is not None


def test_constrained_and_free_rows_answer_in_one_batch_as_alone(make: Callable[..., Sequence]) -> None:
    """Masks are made and applied for all constrained rows at once; each must get its own, and free rows none."""
    settings: list[dict[str, Any]] = [
        {"grammar": schema(PERSON)},
        {},
        {"grammar": schema(PERSON), "temperature": 1.2, "seed": 4, "top_p": 0.9},
        {"temperature": 1.0, "seed": 5, "min_new_tokens": 9},
        {"grammar": Grammar("regex", "[a-f]{2,9}"), "logprobs": 2, "min_new_tokens": 4},
        {"grammar": Grammar("json_object"), "repetition_penalty": 1.3, "temperature": 0.8, "seed": 8, "typical_p": 0.7},
    ]
    together = [make(80, **s) for s in settings]
    alone = [make(80, **s) for s in settings]
    seeds = list(range(len(settings)))
    run(together, seeds)
    for sequence, seed in zip(alone, seeds, strict=True):
        run([sequence], [seed])
    for one, other in zip(together, alone, strict=True):
        assert one.completion is not None and other.completion is not None
        assert (one.completion.token_ids, one.completion.text, one.completion.logprobs) == (
            other.completion.token_ids,
            other.completion.text,
            other.completion.logprobs,
        )


def test_choosing_twice_changes_nothing(make: Callable[..., Sequence]) -> None:
    """A step that raised is computed again adapter by adapter, so choosing must not move a matcher; only taking the token does."""
    sequence = make(grammar=schema(PERSON), temperature=1.0, seed=1)
    for _ in range(20):
        first, second = (choose(next_logits(sequence), [sequence])[0] for _ in range(2))
        assert first is not None and first == second
        sequence.append(first.token, None)


def test_a_matcher_that_fails_ends_its_own_request_only(make: Callable[..., Sequence]) -> None:
    """Tokens that the grammar does not allow can only come from a bug or a limit inside the compiler: one clear error, and neighbours go on."""
    broken, good = make(grammar=schema({"const": "ab"})), make(grammar=schema({"const": "ab"}))
    with pytest.raises(EngineError, match="the request's JSON schema could not be followed"):
        broken.append(100, None)
    assert broken.tokens == [93]  # nothing was taken
    choice, other = choose(torch.cat([next_logits(broken), next_logits(good)]), [broken, good])
    assert choice is not None and other is not None
    with pytest.raises(EngineError):
        broken.append(EOS, None)
    end = broken.end("error", "reason").completion
    assert end is not None and end.finish_reason == "error" and end.token_ids == ()
    assert answer(good).text == '"ab"'


def test_a_sentencepiece_tokenizer_is_followed_too() -> None:
    """Other families write a space as a sign of its own and bytes as <0x0A>; texts must still be those of the grammar."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *'▁ abcdefghijklmnopqrstuvwxyz{}[]:,"0123456789', "▁a", '":']
    raw = Tokenizer(models.BPE({piece: i for i, piece in enumerate(dict.fromkeys(pieces))}, merges=[], byte_fallback=True, unk_token="<unk>"))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    grammar = schema(
        {"type": "object", "properties": {"a b": {"type": "string", "maxLength": 4}}, "required": ["a b"], "additionalProperties": False}
    )
    compiler = GrammarCompiler(tokenizer, V, (EOS,))
    for seed in range(5):
        sampling = SamplingParams(grammar=grammar, temperature=1.5, seed=seed)
        prompt = tuple(tokenizer("say")["input_ids"])
        sequence = Sequence("s", Request(prompt, None, sampling), 200, (EOS,), raw.decode, matcher=compiler.compile(grammar))
        run([sequence], [seed])
        assert sequence.completion is not None
        jsonschema.validate(json.loads(sequence.completion.text), json.loads(grammar.text))


def test_plain_greedy_rows_need_their_largest_logit_only(make: Callable[..., Sequence]) -> None:
    """The fast path may serve exactly those rows whose choice it cannot change."""
    assert plain_greedy(make())
    for settings in (
        {"temperature": 1.0},
        {"logprobs": 0},
        {"repetition_penalty": 1.1},
        {"frequency_penalty": 0.1},
        {"presence_penalty": 0.1},
        {"logit_bias": {5: 1.0}},
        {"grammar": Grammar("json_object")},
    ):
        assert not plain_greedy(make(**settings)), settings
    late = make(min_new_tokens=2)
    for expected in (False, False, True):
        assert plain_greedy(late) is expected
        late.append(70, None)
    rows = [make() for _ in range(4)]
    values = torch.cat([next_logits(row, seed) for seed, row in enumerate(rows)])
    values[2, 7] = torch.nan
    assert choices_of(*values.max(-1)) == choose(values.clone(), rows)
    assert choices_of(*values.max(-1))[2] is None


@pytest.mark.slow
@pytest.mark.parametrize("name", ["person", "const", "one of", "pattern", "all of"])  # those without texts that may go on for ever
def test_answers_over_the_real_tokenizer_fit_the_schema(name: str) -> None:
    """49,152 tokens of many characters each: quotes, brackets and escapes come in the middle of tokens, which one-byte tokens never show."""
    home = Path(os.environ.get("ATOLL_TEST_BASE_HOME", Path("~/.atoll").expanduser()))
    folder = home / "bases" / "smollm2-135m-instruct"
    if not (folder / "tokenizer.json").is_file():
        pytest.skip("the embedded base is not on this machine: run `atoll pull smollm2-135m-instruct`, or set ATOLL_TEST_BASE_HOME")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    width = len(tokenizer) + 64
    compiler = GrammarCompiler(tokenizer, width, (EOS, 0))
    validator, complete = jsonschema.Draft202012Validator(SCHEMAS[name]), 0
    for seed in range(10):
        sampling = SamplingParams(grammar=schema(SCHEMAS[name]), temperature=1.5, seed=seed)
        matcher = compiler.compile(sampling.grammar or Grammar("json_object"))
        sequence = Sequence("s", Request((28,), None, sampling), 200, (EOS, 0), tokenizer.backend_tokenizer.decode, matcher=matcher)
        source = torch.Generator().manual_seed(seed)
        while sequence.completion is None:
            [choice] = choose(torch.randn(1, width, generator=source) * 3, [sequence])
            assert choice is not None and choice.token < len(tokenizer)
            sequence.append(choice.token, None)
        if sequence.completion.finish_reason == "stop":
            validator.validate(json.loads(sequence.completion.text))
            complete += 1
    assert complete >= 5

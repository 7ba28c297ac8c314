"""Grammars for a tokenizer: what is compiled, what is refused, what is kept."""

from __future__ import annotations

import json
import random
import re
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from atoll.engine import grammar as grammar_module
from atoll.engine.grammar import GrammarCompiler
from atoll.engine.request import Grammar
from atoll.errors import EngineError, RequestRefused
from conftest import tiny_tokenizer

V, EOS = 320, 2  # the width of the tiny models' logits; their tokenizer knows 261 tokens


def schema(value: dict[str, Any]) -> Grammar:
    return Grammar("json_schema", json.dumps(value))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def compiler(tokenizer: Any) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, V, (EOS,))


@pytest.mark.parametrize(
    ("grammar", "reason"),
    [
        (Grammar("regex", "("), "regular expression cannot be used: unclosed group"),
        (Grammar("regex", "(?=a)b"), "look-around"),
        (Grammar("regex", "[z-a]"), "invalid character class range"),
        (Grammar("regex", "a" * 70000), "at most 65536"),
        (Grammar("lark", "start: x"), 'line 1, column 8: unknown name: "x"'),
        (Grammar("lark", 'begin: "a"'), "no start rule"),
        (Grammar("lark", "start: start"), "Lark grammar"),
        (Grammar("lark", "start: <|nothing|>"), "unknown special token"),
        (Grammar("lark", 'start: <|im_start|> "a"'), "allows no first token"),
        (Grammar("lark", 'start: A\nA: A "b"'), "line 2, column 4: circular"),
        (Grammar("lark", 'start: %json {"type":"strin"}'), "Invalid type: strin"),
        (Grammar("lark", "start: " + "(" * 5000 + '"a"' + ")" * 5000), "too deeply nested"),
    ],
)
def test_other_grammars_are_refused_with_the_reason(compiler: GrammarCompiler, grammar: Grammar, reason: str) -> None:
    """As for schemas: one sentence, with the place where there is one."""
    with pytest.raises(RequestRefused, match=re.escape(reason)):
        compiler.check(grammar)


@pytest.mark.parametrize(
    "grammar",
    [
        schema({"$ref": "#/$defs/0", "$defs": {**{str(i): {"items": {"$ref": f"#/$defs/{i + 1}"}} for i in range(1450)}, "1450": {}}}),
        Grammar("lark", "start: r0\n" + "".join(f'r{i}: "a" r{i + 1}\n' for i in range(3900)) + 'r3900: "b"'),
    ],
    ids=["schema", "lark"],
)
def test_a_chain_as_long_as_the_text_may_be_does_not_end_the_process(compiler: GrammarCompiler, grammar: Grammar) -> None:
    """The compiler is recursive: on a thread's usual stack these overflow it, and one client's request would end everybody's server."""
    compiler.check(grammar)
    assert threading.stack_size() == 0  # other threads keep the usual one


def test_a_grammar_that_takes_too_long_to_compile_is_refused(compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody may hold up a service with a grammar that takes a minute."""
    monkeypatch.setattr(grammar_module, "_MAX_COMPILE_S", 0.01)
    monkeypatch.setattr(grammar_module, "_compile_into", lambda *_: time.sleep(0.1))
    with pytest.raises(RequestRefused, match=r"takes more than 0\.01 seconds to compile"):
        compiler.check(Grammar("regex", "slow"))


def test_a_lexer_that_is_full_is_replaced(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of a compiled grammar share its lexer, whose states are bounded to bound memory: one long answer must not end everybody's."""
    monkeypatch.setattr(grammar_module, "_MAX_LEXER_STATES", 500)
    compiler = GrammarCompiler(tokenizer, V, (EOS,))
    renewed: list[Grammar] = []
    fresh = compiler.fresh
    monkeypatch.setattr(compiler, "fresh", lambda grammar: renewed.append(grammar) or fresh(grammar))
    long = Grammar("json_schema", json.dumps({"type": "string", "maxLength": 300, "minLength": 300}))
    text = json.dumps("".join(random.Random(3).choices("abcdefghij é🙂", k=300)), ensure_ascii=False)
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    words = np.zeros(V // 32, dtype=np.uint32)
    for _ in range(2):
        first, second = compiler.compile(long), compiler.compile(long)
        for token in tokens:
            for matcher in (first, second):
                matcher.allow(words, (EOS,), may_stop=True)
                assert words[token >> 5] >> np.uint32(token & 31) & 1
                matcher.advance(token)
        assert first.is_done and second.is_done
    assert renewed


def test_a_lexer_that_cannot_be_replaced_ends_its_own_request(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling again may fail where it worked before; that must not come up in the middle of a step that has other rows."""
    monkeypatch.setattr(grammar_module, "_MAX_LEXER_STATES", 40)
    compiler = GrammarCompiler(tokenizer, V, (EOS,))
    matcher = compiler.compile(Grammar("regex", "[a-f]{300}x"))
    monkeypatch.setattr(grammar_module, "_MAX_COMPILE_S", 0.0)
    monkeypatch.setattr(grammar_module, "_compile_into", lambda *_: None)
    words = np.zeros(V // 32, dtype=np.uint32)
    with pytest.raises(EngineError, match="too many states"):
        for _ in range(300):
            matcher.allow(words, (EOS,), may_stop=True)
            matcher.advance(70)


def test_compiled_grammars_are_kept_and_bounded(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling takes milliseconds, following microseconds: a service asks for the same few schemas again, and must not grow."""
    compiler = GrammarCompiler(tokenizer, V, (EOS,))
    built: list[Grammar] = []
    build = compiler._build
    monkeypatch.setattr(compiler, "_build", lambda grammar: built.append(grammar) or build(grammar))
    for _ in range(3):
        compiler.check(schema({"const": 1}))
        compiler.compile(schema({"const": 1}))
    assert len(built) == 1
    for number in range(100):
        compiler.check(Grammar("regex", f"a{{{number}}}b"))
    assert len(built) == 101 and len(compiler._cache) <= 32
    with pytest.raises(RequestRefused):
        compiler.check(Grammar("regex", "("))
    assert len(compiler._cache) <= 32


def test_without_the_package_only_structured_output_is_refused(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes with the server's extra; an engine without it must start and say what is missing only when a grammar is asked for."""
    monkeypatch.setitem(sys.modules, "llguidance.hf", None)
    with pytest.raises(RequestRefused, match="needs a package that is not installed") as caught:
        GrammarCompiler(tokenizer, V, (EOS,)).check(Grammar("json_object"))
    assert "atoll[serve]" in caught.value.hint


def test_a_tokenizer_that_cannot_be_looked_into_is_a_refusal() -> None:
    """Structured output needs the bytes of every token; a base whose tokenizer does not tell them refuses it and serves everything else."""

    class Slow:
        def __len__(self) -> int:
            return 3

    with pytest.raises(RequestRefused, match="tokenizer cannot be used for structured output"):
        GrammarCompiler(Slow(), V, (EOS,)).check(Grammar("json_object"))


def test_several_threads_may_compile_at_once(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A service compiles ahead in its workers while the engine's thread makes matchers; each grammar is compiled once."""
    compiler = GrammarCompiler(tokenizer, V, (EOS,))
    built: list[Grammar] = []
    build = compiler._build
    monkeypatch.setattr(compiler, "_build", lambda grammar: built.append(grammar) or build(grammar))
    grammars = [schema({"const": number % 4}) for number in range(24)]
    with ThreadPoolExecutor(6) as pool:
        matchers = list(pool.map(compiler.compile, grammars))
    assert len(built) == 4 and len(matchers) == 24

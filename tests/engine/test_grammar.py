"""Grammars for a tokenizer: what is compiled, what is refused, what is kept."""

from __future__ import annotations

import json
import random
import re
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
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


def test_a_grammar_that_took_too_long_is_refused_at_once_for_a_while(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked again and again it would hold up every other grammar for the whole time that is allowed; what is remembered is bounded."""
    compiler = GrammarCompiler(tokenizer, V, (EOS,))
    tried: list[str] = []
    with monkeypatch.context() as slow:
        slow.setattr(grammar_module, "_MAX_COMPILE_S", 0.0)
        slow.setattr(grammar_module, "_MAX_SLOW", 3)
        slow.setattr(grammar_module, "_compile_into", lambda found, tokenizer, source, words: tried.append(source))
        for name in ("a", "a", "b", "a"):
            with pytest.raises(RequestRefused, match="takes more than"):
                compiler.check(Grammar("regex", name))
        assert len(tried) == 2
        for name in "cdefg":
            with pytest.raises(RequestRefused, match="takes more than"):
                compiler.check(Grammar("regex", name))
        assert len(compiler._slow) == 3
    with pytest.raises(RequestRefused, match="takes more than"):
        compiler.check(Grammar("regex", "g"))
    monkeypatch.setattr(grammar_module, "time", SimpleNamespace(monotonic=lambda: 1e12))  # not the whole process's clock: event loops use it
    compiler.check(Grammar("regex", "g"))


def test_a_compiler_that_breaks_down_is_said_so(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not as a timeout after ten seconds: a panic is a fault of the grammar, and the next one compiles."""

    class Panic(BaseException):
        pass

    def broken(*_: Any) -> Any:
        raise Panic("index out of bounds")

    compiler = GrammarCompiler(tokenizer, V, (EOS,))
    with monkeypatch.context() as patch:
        patch.setattr(grammar_module, "_compile", broken)
        with pytest.raises(RequestRefused, match="regular expression cannot be used: index out of bounds"):
            compiler.check(Grammar("regex", "a"))
        patch.setattr(grammar_module, "_compile", lambda *_: [0] * (1 << 60))
        with pytest.raises(EngineError, match="no memory"):
            compiler.check(Grammar("regex", "a"))
    compiler.check(Grammar("regex", "a"))


def test_compilers_do_not_leave_each_others_stack_size(tokenizer: Any) -> None:
    """The size is the process's: two that restore it out of order would give every later thread 256 MB."""
    compilers = [GrammarCompiler(tokenizer, V, (EOS,)) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda compiler: [compiler.check(Grammar("regex", f"a{{{i}}}")) for i in range(30)], compilers))
    assert threading.stack_size() == 0


def test_a_lexer_that_is_full_is_replaced(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of a compiled grammar share its lexer, whose states are bounded to bound memory: one long answer must not end everybody's."""
    monkeypatch.setattr(grammar_module, "_MAX_LEXER_STATES", 500)
    compiler = GrammarCompiler(tokenizer, V, (EOS,))
    renewed: list[Grammar] = []
    fresh = compiler.fresh
    monkeypatch.setattr(compiler, "fresh", lambda *how: renewed.append(how[0]) or fresh(*how))
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
    monkeypatch.setattr(grammar_module, "_MAX_RESTART_S", 0.01)
    matcher = compiler.compile(Grammar("regex", "[a-f]{300}x"))
    monkeypatch.setattr(grammar_module, "_compile_into", lambda *_: None)
    words = np.zeros(V // 32, dtype=np.uint32)
    with pytest.raises(EngineError, match="too many states"):
        for _ in range(300):
            matcher.allow(words, (EOS,), may_stop=True)
            matcher.advance(70)


def test_a_full_lexer_is_replaced_once_for_all_and_not_for_ever(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that share a lexer find it full in the same step: they share the next one too; and one answer cannot stop the step again and again."""
    monkeypatch.setattr(grammar_module, "_MAX_LEXER_STATES", 120)
    compiler = GrammarCompiler(tokenizer, V, (EOS,))
    grammar = Grammar("regex", "[a-f]{100}x")
    matchers = [compiler.compile(grammar) for _ in range(8)]
    built: list[Grammar] = []
    build = compiler._build
    monkeypatch.setattr(compiler, "_build", lambda grammar, max_s: built.append(grammar) or build(grammar, max_s))
    words = np.zeros(V // 32, dtype=np.uint32)
    for _ in range(99):
        for matcher in matchers:
            matcher.allow(words, (EOS,), may_stop=True)
            matcher.advance(70)
    assert len(built) < len(matchers)
    monkeypatch.setattr(grammar_module, "_MAX_LEXER_STATES", 40)
    monkeypatch.setattr(grammar_module, "_MAX_RESTART_S", 0.01)
    matcher = GrammarCompiler(tokenizer, V, (EOS,)).compile(Grammar("regex", "[a-f]{3000}x"))
    with pytest.raises(EngineError, match="too many states"):
        for _ in range(3000):
            matcher.allow(words, (EOS,), may_stop=True)
            matcher.advance(70)


def test_compiled_grammars_are_kept_and_bounded(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling takes milliseconds, following microseconds: a service asks for the same few schemas again, and must not grow."""
    compiler = GrammarCompiler(tokenizer, V, (EOS,))
    built: list[Grammar] = []
    build = compiler._build
    monkeypatch.setattr(compiler, "_build", lambda grammar, max_s: built.append(grammar) or build(grammar, max_s))
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
    monkeypatch.setattr(compiler, "_build", lambda grammar, max_s: built.append(grammar) or build(grammar, max_s))
    grammars = [schema({"const": number % 4}) for number in range(24)]
    with ThreadPoolExecutor(6) as pool:
        matchers = list(pool.map(compiler.compile, grammars))
    assert len(built) == 4 and len(matchers) == 24

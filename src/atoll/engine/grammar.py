"""Answers that must match a grammar: which tokens may come next, row by row.

A grammar (JSON Schema, any JSON object, regular expression, Lark) is compiled once by llguidance over the base's tokenizer and kept; each sequence
has a Matcher of its own, a cheap copy that follows the sequence's tokens. Its state depends on those tokens only, so batching, chunked prefill and
preemption do not touch it. Special tokens never come inside the text, and what ends an answer comes only where the text is complete.

JSON comes with at most one space, or a line break and an indentation, wherever white space may stand: without a bound, a model can fill an answer
with it. Property names follow the schema's order.

Used by engine.py (compiling), sequence.py (following) and sampler.py (forbidding). llguidance is imported with the first grammar.
"""

from __future__ import annotations

import re
import threading
import time
from collections import OrderedDict
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from atoll.engine.request import Grammar
from atoll.engine.schema import MAX_GRAMMAR_BYTES, read_schema
from atoll.errors import AtollError, EngineError, RequestRefused

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

Words = NDArray[np.uint32]  # one bit a token, 32 tokens a word

_STACK_BYTES = 256 << 20  # for compiling, which is recursive: the worst grammars of that size were seen to take half of it
_MAX_COMPILE_S = 10.0
_MAX_RESTART_S = 0.5  # of one answer, for compiling again in the middle of it, while the step waits
_MAX_CACHED = 32  # compiled grammars
_SLOW_FOR_S = 300.0  # how long a grammar that took too long is refused without another try
_MAX_SLOW = 256  # of them
_MAX_LEXER_STATES = 30_000  # of one compiled grammar: about 0.4 kB each
_SPACE = r"(?: |\n(?: {0,24}|\t{0,8}))"
_MAX_REASON = 300  # characters of the compiler's complaint that are passed on
_ALL = 0xFFFFFFFF  # a word with every bit set
_STACK_SIZE = threading.Lock()  # over threading.stack_size, which is the process's: two compilers must not restore each other's
_NAMES = {"json_schema": "JSON schema", "json_object": "JSON object", "regex": "regular expression", "lark": "Lark grammar"}


class GrammarCompiler:
    """Compiles grammars for one tokenizer and keeps the last ones. May be used from several threads."""

    def __init__(self, tokenizer: Any, vocabulary: int, eos_ids: Sequence[int]) -> None:
        """vocabulary: the width of a row of logits, which may be more than the tokenizer knows. Nothing is built before the first grammar."""
        self._tokenizer, self._vocabulary, self._eos_ids = tokenizer, vocabulary, tuple(eos_ids)
        self._lock = threading.Lock()  # over the cache and what is built once
        self._building = threading.Lock()
        self._cache: OrderedDict[bytes, LLMatcher] = OrderedDict()
        self._slow: OrderedDict[bytes, float] = OrderedDict()  # grammars that took too long, and until when that is remembered
        self._built: _Known | None = None

    def check(self, grammar: Grammar) -> None:
        """Raise RequestRefused unless the grammar can be followed; what was compiled is kept, so that `compile` is quick afterwards."""
        self._compiled(grammar)

    def knows(self, grammar: Grammar) -> bool:
        """Whether the grammar is compiled and kept. Waits for no lock: an event loop asks."""
        return grammar.digest in self._cache

    def compile(self, grammar: Grammar) -> Matcher:
        """A matcher at the beginning of an answer. Raises RequestRefused naming what is wrong with the grammar."""
        compiled = self._compiled(grammar)
        return Matcher(self, grammar, compiled, self._known())

    def fresh(self, grammar: Grammar, used: LLMatcher, max_s: float) -> LLMatcher:
        """The grammar compiled anew, unless somebody did that since `used` was; to be copied. Raises RequestRefused where that takes longer."""
        with self._lock:
            found = self._cache.get(grammar.digest)
        if found is None or found is used:
            found = self._build(grammar, max_s)
            self._keep(grammar.digest, found)
        return found

    def _compiled(self, grammar: Grammar) -> LLMatcher:
        found = self._cached(grammar)
        if found is not None:
            return found
        with self._building:  # one at a time: a second request for the same grammar finds what became of the first
            found = self._cached(grammar)
            if found is None:
                try:
                    found = self._build(grammar, _MAX_COMPILE_S)
                except _TooSlow:
                    self._note_slow(grammar.digest)
                    raise
                self._keep(grammar.digest, found)
            return found

    def _cached(self, grammar: Grammar) -> LLMatcher | None:
        """The compiled grammar, if it is kept. Raises RequestRefused if it is known to take too long."""
        with self._lock:
            found = self._cache.get(grammar.digest)
            if found is not None:
                self._cache.move_to_end(grammar.digest)
            elif time.monotonic() < self._slow.get(grammar.digest, 0.0):
                raise _too_slow(grammar, _MAX_COMPILE_S)
            return found

    def _note_slow(self, key: bytes) -> None:
        with self._lock:
            self._slow[key] = time.monotonic() + _SLOW_FOR_S
            self._slow.move_to_end(key)
            while len(self._slow) > _MAX_SLOW:
                self._slow.popitem(last=False)

    def _keep(self, key: bytes, compiled: LLMatcher) -> None:
        with self._lock:
            self._cache[key] = compiled
            self._cache.move_to_end(key)
            while len(self._cache) > _MAX_CACHED:
                self._cache.popitem(last=False)

    def _build(self, grammar: Grammar, max_s: float) -> LLMatcher:
        known, source = self._known(), _source(grammar)
        words = np.zeros_like(known.texts)
        found: list[LLMatcher | BaseException] = []
        thread = threading.Thread(target=_compile_into, args=(found, known.tokenizer, source, words), name="atoll-grammar", daemon=True)
        with _STACK_SIZE:
            before = threading.stack_size(_STACK_BYTES)  # a chain of some thousand references would overflow the usual one and end the process
            try:
                thread.start()
            except RuntimeError as error:
                raise EngineError(f"the {_NAMES[grammar.kind]} could not be compiled: {error}", hint="memory for a thread is missing") from error
            finally:
                threading.stack_size(before)
        thread.join(max_s)
        if not found:
            raise _too_slow(grammar, max_s)
        [compiled] = found
        if isinstance(compiled, MemoryError):
            raise EngineError(f"the {_NAMES[grammar.kind]} could not be compiled: no memory") from compiled
        if isinstance(compiled, BaseException):
            raise RequestRefused(f"the {_NAMES[grammar.kind]} cannot be used: {_reason(str(compiled)) or type(compiled).__name__}") from compiled
        if compiled.is_error():
            raise _refusal(grammar, compiled.get_error())
        if not compiled.is_accepting() and not (words & known.texts).any():
            raise RequestRefused(f"the {_NAMES[grammar.kind]} allows no first token", hint="special tokens cannot be part of an answer")
        return compiled

    def _known(self) -> _Known:
        with self._lock:
            if self._built is None:
                self._built = _Known(self._tokenizer, self._vocabulary, self._eos_ids)
            return self._built


class Matcher:
    """Follows one answer through a grammar. Fails for itself alone, and reports that when it is advanced."""

    def __init__(self, compiler: GrammarCompiler, grammar: Grammar, compiled: LLMatcher, known: _Known) -> None:
        """compiled: the grammar at its beginning, of which this one follows a copy."""
        self._compiler, self._grammar, self._compiled, self._known = compiler, grammar, compiled, known
        self._state = compiled.deep_copy()
        self._tokens: list[int] = []
        self._restarts: list[int] = []  # after how many tokens each was
        self._restart_s = _MAX_RESTART_S  # left of it
        self._failure = ""

    @property
    def num_words(self) -> int:
        return self._known.texts.size

    @property
    def is_accepting(self) -> bool:
        """The text matches as it is; the answer may end here."""
        return not self._failure and self._state.is_accepting()

    @property
    def is_done(self) -> bool:
        """The text matches and nothing can follow it; the answer ends here."""
        return self.is_accepting and self._state.is_stopped()

    def ended_by(self, token: int) -> bool:
        """Whether the token is an end-of-text token, which comes only where the grammar lets the answer end."""
        return token in self._known.eos_ids

    def allow(self, words: Words, stop_ids: Collection[int], *, may_stop: bool) -> None:
        """Set one bit for each token that may come next; words [num_words] is overwritten.

        Where the text matches, the tokens that end the sequence (stop_ids) may come as well. With may_stop False none of them may, and an end-of-text
        token that is not among them never; but the grammar wins: if nothing else is left, the answer may end after all. A matcher that failed allows
        everything, so that the row gets as far as `advance`, which says so.
        """
        self._fill(words)
        np.bitwise_and(words, self._known.texts, out=words)
        if may_stop:
            if self.is_accepting:
                _set(words, stop_ids)
        else:
            texts = words.copy()
            _clear(words, stop_ids)
            if not words.any() and not self.is_accepting:
                words[:] = texts
        if not words.any():
            if self.is_accepting:
                _set(words, self._known.eos_ids)
            else:
                self._failure = self._failure or "it allows no token that may be generated"
                words.fill(_ALL)

    def advance(self, token: int, *, ends: bool = False) -> None:
        """Follow a token of the answer; one that ends it (`ends`) is not part of the text. Raises EngineError if the grammar cannot be followed."""
        if not self._failure and not ends:
            consumed = self._state.consume_token(token)
            while not consumed and self._restart():
                consumed = self._state.consume_token(token)
            if consumed:
                self._tokens.append(token)
            else:
                self._failure = _reason(self._state.get_error())
        if self._failure:
            raise EngineError(f"the request's {_NAMES[self._grammar.kind]} could not be followed: {self._failure}", hint="ask for a simpler one")

    def _fill(self, words: Words) -> None:
        """The compiler's own mask; nothing after a failure."""
        if not self._failure:
            self._state.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
            while self._state.is_error() and self._restart():
                self._state.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
            if self._state.is_error():
                self._failure = _reason(self._state.get_error())
        if self._failure:
            words.fill(0)

    def _restart(self) -> bool:
        """Copies of a compiled grammar share its lexer, whose states are bounded: where it is full, go on with a new one, which others may share.

        That happens in the middle of a step, so an answer that takes too much time for it, or gets no further by it, fails with what it ran into.
        """
        place = len(self._tokens)
        if "too many states" not in self._state.get_error() or self._restart_s <= 0 or self._restarts[-2:] == [place, place]:
            return False
        self._restarts.append(place)
        started = time.monotonic()
        try:
            self._compiled = self._compiler.fresh(self._grammar, self._compiled, self._restart_s)
        except AtollError:
            return False
        state = self._compiled.deep_copy()
        if state.try_consume_tokens(self._tokens) == place or state.is_error():  # an error here is that the new one is full already
            self._state = state
        self._restart_s -= time.monotonic() - started
        return self._state is state


def forbidden(matchers: Sequence[Matcher], stops: Sequence[tuple[Collection[int], bool]], vocabulary: int) -> NDArray[np.bool_]:
    """[n, V]: the tokens that may not come next in each row. stops: each row's stop_ids and may_stop (see Matcher.allow)."""
    words = np.empty((len(matchers), matchers[0].num_words), dtype=np.uint32)
    for row, matcher, (stop_ids, may_stop) in zip(words, matchers, stops, strict=True):
        matcher.allow(row, stop_ids, may_stop=may_stop)
    bits = np.unpackbits(np.invert(words, out=words).view(np.uint8), axis=1, bitorder="little")
    return bits[:, :vocabulary].view(np.bool_)


class _Known:
    """What is built once: llguidance's view of the tokenizer, and the tokens that may stand inside a text (no special ones, none of the padding)."""

    def __init__(self, tokenizer: Any, vocabulary: int, eos_ids: Sequence[int]) -> None:
        try:
            from llguidance.hf import from_tokenizer
        except ImportError as error:
            raise RequestRefused(f"structured output needs a package that is not installed ({error})", hint="pip install 'atoll[serve]'") from error

        self.eos_ids = frozenset(eos_ids)
        try:
            self.tokenizer: LLTokenizer = from_tokenizer(tokenizer, n_vocab=max(vocabulary, len(tokenizer)), eos_token=list(eos_ids))
        except ValueError as error:
            raise RequestRefused(f"this base's tokenizer cannot be used for structured output: {_reason(str(error))}") from None
        size = self.tokenizer.vocab_size
        inside = np.zeros(-(-size // 32) * 32, dtype=np.bool_)
        inside[:vocabulary] = [not self.tokenizer.is_special_token(token) for token in range(vocabulary)]
        inside[list(eos_ids)] = False
        self.texts: Words = np.packbits(inside, bitorder="little").view(np.uint32)


class _TooSlow(RequestRefused):
    """A grammar was not compiled in the time that it had."""


def _too_slow(grammar: Grammar, max_s: float) -> _TooSlow:
    return _TooSlow(f"the {_NAMES[grammar.kind]} takes more than {max_s:g} seconds to compile", hint="ask for a simpler one")


def _compile_into(found: list[LLMatcher | BaseException], tokenizer: LLTokenizer, source: str, words: Words) -> None:
    """Compile, compute the first mask (which warms the first step of all copies), and put the result, or what was raised, into `found`."""
    try:
        found.append(_compile(tokenizer, source, words))
    except BaseException as error:  # a panic of the compiler is no Exception
        found.append(error)


def _compile(tokenizer: LLTokenizer, source: str, words: Words) -> LLMatcher:
    from llguidance import LLMatcher, LLParserLimits

    limits = LLParserLimits(max_lexer_states=_MAX_LEXER_STATES, verbose_errors=False)
    compiled = LLMatcher(tokenizer, source, log_level=0, limits=limits)
    if not compiled.is_error():
        compiled.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
    return compiled


def _source(grammar: Grammar) -> str:
    """llguidance's description of a grammar. Raises RequestRefused where it is too large, or a schema is not one that can be enforced."""
    from llguidance import LLMatcher

    size = len(grammar.text.encode())
    if size > MAX_GRAMMAR_BYTES:
        raise RequestRefused(f"the {_NAMES[grammar.kind]} has {size} bytes, but at most {MAX_GRAMMAR_BYTES} are accepted")
    if grammar.kind == "regex":
        return LLMatcher.grammar_from_regex(grammar.text)
    if grammar.kind == "lark":
        return LLMatcher.grammar_from_lark(grammar.text)
    schema = read_schema(grammar.text) if grammar.kind == "json_schema" else '{"type":"object"}'
    try:
        return LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": _SPACE})
    except ValueError as error:
        raise RequestRefused(f"the JSON schema cannot be used: {_reason(str(error))}") from None


def _refusal(grammar: Grammar, message: str) -> RequestRefused:
    """The compiler's complaint about a grammar as ours."""
    reason, hint = _reason(message), ""
    if "coerce_one_of" in reason:
        reason, hint = "the choices of a oneOf are not exclusive beyond doubt", "use anyOf, or give each choice a property with a const of its own"
    elif grammar.kind == "json_schema" and "NoExtensionBias" in message:
        reason = "no text satisfies it"
    return RequestRefused(f"the {_NAMES[grammar.kind]} cannot be used: {reason}", hint=hint)


def _reason(message: str) -> str:
    """The one line that matters of a message of llguidance: without its picture of the place and its own state."""
    regex = re.search(r"^error: (.+)$", message, re.MULTILINE)
    line = regex.group(1) if regex else message.strip().split("\n")[0].split("; following special tokens")[0]
    line = re.sub(r"^(?:at )?(\d+)\((\d+)\): ", r"line \1, column \2: ", line).rstrip(": ")
    return line if len(line) <= _MAX_REASON else line[: _MAX_REASON - 3] + "..."


def _set(words: Words, tokens: Collection[int]) -> None:
    for token in tokens:
        words[token >> 5] |= np.uint32(1 << (token & 31))


def _clear(words: Words, tokens: Collection[int]) -> None:
    for token in tokens:
        words[token >> 5] &= np.uint32(_ALL ^ (1 << (token & 31)))

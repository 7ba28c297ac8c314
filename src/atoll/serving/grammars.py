"""Grammars are compiled here, beside the engine, before a request that has one is queued: a schema may take seconds, and a step waits for nobody.

Equal grammars share one compilation. What was refused is remembered for a while, so that asking again costs nothing; a key has a few compilations
at once and no more, so that it cannot keep all others waiting.

Used by service.py. What compiles is the engine's own compiler, which keeps the result.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, OrderedDict
from functools import partial
from typing import TYPE_CHECKING

from atoll.engine.request import Grammar
from atoll.errors import AtollError, QueueFull, RequestRefused
from atoll.serving.entries import fresh
from atoll.serving.workers import Workers

if TYPE_CHECKING:
    from atoll.engine.grammar import GrammarCompiler

KEPT_S = 300.0  # how long a refusal is believed
MAX_KEPT = 1024  # refusals
MAX_OF_KEY = 8  # compilations of one key, running or waiting
TIMEOUT_S = 60.0  # the compiler gives up long before; building its view of a large vocabulary may take some seconds

_log = logging.getLogger(__name__)


class Grammars:
    """What the compiler knows, and what is being compiled. Used on the event loop."""

    def __init__(self, compiler: GrammarCompiler) -> None:
        self._compiler = compiler
        self._workers = Workers(1, "atoll-grammars")  # the compiler does one at a time
        self._refused: OrderedDict[bytes, tuple[float, AtollError]] = OrderedDict()
        self._compiling: dict[bytes, asyncio.Task[None]] = {}
        self._of_key = Counter[str]()

    def knows(self, grammar: Grammar) -> bool:
        """Whether a request with this grammar can be queued at once."""
        return self._compiler.knows(grammar)

    async def check(self, grammar: Grammar, key_id: str = "") -> None:
        """Until the grammar is compiled. Raises RequestRefused for one that cannot be followed, QueueFull if the key has too many in hand."""
        if self.knows(grammar):
            return
        digest = grammar.digest
        refused = self._refused.get(digest)
        if refused is not None and time.monotonic() < refused[0]:
            raise fresh(refused[1])
        task = self._compiling.get(digest)
        if task is None:
            if self._of_key[key_id] >= MAX_OF_KEY:
                raise QueueFull(f"{MAX_OF_KEY} grammars of this key are being compiled already", hint="wait until some are", retry_after_s=5)
            self._of_key[key_id] += 1
            task = self._compiling[digest] = asyncio.create_task(self._compile(grammar, digest))
            task.add_done_callback(partial(self._done, digest, key_id))
        await asyncio.shield(task)

    async def warm_up(self) -> None:
        """Build what the first grammar needs, before somebody waits for it."""
        try:
            await self.check(Grammar("json_object"))
        except AtollError as error:
            _log.info("structured output is not to be had: %s", error.message)

    async def _compile(self, grammar: Grammar, digest: bytes) -> None:
        try:
            await self._workers.run(lambda: self._compiler.check(grammar), TIMEOUT_S, "compiling a grammar")
        except RequestRefused as error:
            self._refused[digest] = (time.monotonic() + KEPT_S, error)
            self._refused.move_to_end(digest)
            while len(self._refused) > MAX_KEPT:
                self._refused.popitem(last=False)
            raise

    def _done(self, digest: bytes, key_id: str, task: asyncio.Task[None]) -> None:
        self._compiling.pop(digest, None)
        self._of_key[key_id] -= 1
        if not self._of_key[key_id]:
            del self._of_key[key_id]
        if not task.cancelled():
            task.exception()  # seen: whoever asked may have gone

"""The engine: one continuous batch in this process, any adapter in any row.

A step is schedule, run, finish: the scheduler names the rows, the runner gives their hidden states, the sampler their next tokens, and what has ended gives
back its KV row and its hold on its adapter. Nothing runs in the background: whoever calls `step`, `stream`, `generate` or `score` drives all requests, and
events of requests that somebody else waits for are kept for them. One thread at a time.

    add ─► waiting ─admit─► running (KV row + hold on adapter) ─► finished: both given back, last event carries the Completion

Used by eval, workflows and cli directly, and by the server.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from atoll.engine.config import EngineConfig
from atoll.engine.pool import AdapterPool
from atoll.engine.request import Completion, FinishReason, Request, SamplingParams, ScoreRequest, TokenEvent
from atoll.engine.runner import Row, Runner, StepOutput
from atoll.engine.sampler import choose, token_logprobs
from atoll.engine.scheduler import Scheduler, Work
from atoll.engine.scoring import Scoring, score_batch
from atoll.engine.sequence import Sequence as Running
from atoll.engine.stops import Decode
from atoll.errors import AtollError, PoolFull, RequestRefused
from atoll.model.bank import LoraBank

if TYPE_CHECKING:
    from atoll.model.adapter import Adapter
    from atoll.model.base import Base

Progress = Callable[[str, int, int], None]

_log = logging.getLogger(__name__)

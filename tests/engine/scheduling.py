"""What the scheduler's tests share: pages of four tokens, fake adapters, and a bench that does with a plan what the engine does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Seq
from typing import Any

from atoll.engine.pages import Pages, Prefix
from atoll.engine.request import Request, SamplingParams
from atoll.engine.scheduler import Plan, Scheduler
from atoll.engine.sequence import Sequence
from atoll.errors import PoolFull

PAGE = 4  # tokens


class FakeAdapters:
    """Room for `room` different adapters at once; some pinned, some broken."""

    def __init__(self, room: int = 8, pinned: tuple[str, ...] = (), broken: tuple[str, ...] = ()) -> None:
        self.room, self.pinned, self.broken = room, pinned, broken
        self.holds: Counter[str] = Counter()
        self.epoch = 0
        self.num_asked = 0

    def hold(self, adapter: str) -> bool:
        self.num_asked += 1
        if adapter in self.broken:
            raise PoolFull(f"{adapter} is broken")
        busy = sum(n > 0 for key, n in self.holds.items() if key not in self.pinned)
        if adapter not in self.pinned and self.holds[adapter] == 0 and busy >= self.room:
            return False
        self.holds[adapter] += 1
        return True

    def release(self, adapter: str) -> None:
        self.holds[adapter] -= 1
        self.epoch += self.holds[adapter] == 0

    def is_pinned(self, adapter: str) -> bool:
        return adapter in self.pinned


class Bench:
    """A scheduler over its own pages and fake adapters; zeroed lists the pages that were cleaned."""

    def __init__(self, adapters: FakeAdapters | None = None, *, pages: int = 1000, **settings: Any) -> None:
        self.pages, self.adapters = Pages(pages, PAGE), adapters or FakeAdapters()
        self.zeroed: list[int] = []
        limits: dict[str, Any] = {"max_rows": 100, "max_step_tokens": 100, "max_overtakes": 4, **settings}
        self.scheduler = Scheduler(self.pages, self.adapters, self._zero, **limits)
        self.add, self.remove = self.scheduler.add, self.scheduler.remove

    @property
    def running(self) -> list[str]:
        return list(self.scheduler.running)

    @property
    def waiting(self) -> list[str]:
        return [s.request_id for s in self.scheduler.waiting]

    def _zero(self, pages: Seq[int]) -> None:
        self.zeroed += pages

    def step(self, **settings: bool) -> list[tuple[str, int, int]]:
        """Plan a step, do what the engine does with it, and say what was planned."""
        plan = self.scheduler.schedule(**settings)
        self.run(plan)
        return [(item.sequence.request_id, item.start, item.stop) for item in plan.work]

    def run(self, plan: Plan) -> None:
        """Cache the tokens, append one where the last was among them, end who has enough."""
        assert len({item.sequence.request_id for item in plan.work}) == len(plan.work)
        for item in plan.work:
            assert len(item.sequence.pages) * PAGE >= item.stop
            wants_token = item.wants_token
            self.scheduler.computed(item, sound=wants_token)
            if wants_token and item.sequence.append(9, None).completion is not None:
                self.remove(item.sequence.request_id)
        self.check()

    def check(self) -> None:
        self.scheduler.check()
        self.pages.check([s.pages for s in self.scheduler.running.values()])
        held = Counter(s.adapter for s in self.scheduler.running.values() if s.adapter is not None)
        assert held == +self.adapters.holds


def sequence(
    name: str,
    prompt: int | list[int] = 4,
    adapter: str | None = None,
    max_new: int = 8,
    scope: str = "",
    prefix: Prefix | None = None,
    **sampling: Any,
) -> Sequence:
    tokens = [7] * prompt if isinstance(prompt, int) else prompt
    request = Request(tokens, adapter, SamplingParams(max_new_tokens=max_new, **sampling), scope=scope)
    return Sequence(name, request, max_new, (2,), lambda ids: "x" * len(ids), prefix=prefix)

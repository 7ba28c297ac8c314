"""Does a server stay right, whole and small while everything happens to it at once?

    .venv/bin/python bench/soak.py --base smollm2-135m-instruct --minutes 10 [--seed N]
    .venv/bin/python bench/soak.py --base tiny --minutes 0.5

Starts a real `atoll serve` with room for little (rows, pages, adapters, requests), and drives it from one process: users of every route, streams cut
by clients, bad requests, broken adapters, crowds beyond the queue, adapters loaded, unloaded, pinned and republished meanwhile; and at last SIGTERM
with requests inside. Every answer is compared with the same question asked alone. The engine checks itself every few seconds, and at the end nothing
may be left: no request, page, hold, task, file or growing memory. The table goes to stderr; the only line on stdout is one JSON object, whose `ok`
says it all; the exit code is 1 if it is false.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from soaking.cases import Case, make_cases
from soaking.client import Client, Tally
from soaking.ending import drain
from soaking.leaks import growth, left_at_end, left_behind, log_problems
from soaking.operators import History, Operators
from soaking.process import Server, ServerFailed
from soaking.reference import Reference
from soaking.tiny import TINY
from soaking.users import User, burst
from soaking.world import World, make_world

USERS, BURST, BURST_EVERY_S = 14, 90, 6.0
DRAIN_S = 30.0
LOOK_EVERY_S, MEASURE_EVERY_S = 2.0, 1.0
MAX_TIES = 0.005  # of all answers, where the forward is plain
MAX_SHOWN = 12


def main() -> None:
    arguments = read_arguments()
    with tempfile.TemporaryDirectory(prefix="atoll-soak-") as scratch:
        folder = Path(arguments.keep or scratch).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        result = Soak(arguments, folder).run()
    print(json.dumps(result))
    sys.exit(0 if result["ok"] else 1)


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", default="smollm2-135m-instruct", help='folder or alias of the base model, or "tiny", a random one')
    parser.add_argument("--minutes", type=float, default=10.0, help="how long the traffic lasts (default: 10)")
    parser.add_argument("--seed", type=int, default=0, help="draws questions and behaviour; times still differ from run to run")
    parser.add_argument("--keep", help="keep hub and log in this empty folder")
    return parser.parse_args()


class Soak:
    """One run: what is served, what was asked, what was found."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self._seconds, self._seed, self._folder = 60 * arguments.minutes, arguments.seed, folder
        self._world: World = make_world(arguments.base, folder)
        self._cases: list[Case] = make_cases(self._world.good, self._seed)
        self._tally, self._history = Tally(), History()
        self._looks: list[dict[str, Any]] = []
        self._adapters: list[tuple[float, int]] = []  # seconds, and the bytes of the adapters that the server held then
        self._drained: dict[str, int] = {}
        self._problems: list[str] = []
        self._server: Server | None = None

    def run(self) -> dict[str, Any]:
        """All of it: the object for stdout."""
        say(f"{self._world.base.name}: {self._seconds:g} s of {USERS} users, {len(self._cases)} questions, seed {self._seed}")
        try:
            asyncio.run(self._drive())
        except* ServerFailed as failures:
            self._problems += [str(error) for error in failures.exceptions]
        finally:
            if self._server is not None:
                self._server.kill()
        return self._result(*self._compare())

    # ---- while the server runs ----

    async def _drive(self) -> None:
        server = self._server = await Server.start(self._world, self._settings(), self._folder / "server.log")
        say(server.text().rstrip())
        async with Client(server.url, self._world.keys, self._tally) as client:
            await client.ask("look", "GET", "/adapters")
        before = await server.look()
        async with Client(server.url, self._world.keys, self._tally) as client:
            await self._traffic(server, client)
        after = await self._quiet(server)
        self._problems += left_behind(before, after)
        async with Client(server.url, self._world.keys, self._tally) as client:
            user = User(client, self._world, self._cases, self._history, self._seed)
            self._drained = await drain(server, client, user, self._cases, DRAIN_S)
        last = await server.last_look()
        self._keep(last, "after the end")
        self._problems += left_at_end(last, server.leftovers())

    def _settings(self) -> list[str]:
        """Little of everything, so that all of it runs out."""
        adapters = 5 * self._world.largest_bytes  # about ten of more than twenty, two of them pinned and one of any version
        engine = {"max_rows": 12, "max_row_tokens": 320, "max_step_tokens": 96, "max_overtakes": 8, "adapter_bytes": adapters}
        engine["num_pages"] = 44 if self._world.base_ref.endswith(TINY) else 14  # the tiny base has a token for each letter
        own = {"max_concurrent_requests": 56, "per_key_requests": 44, "max_registered": 14, "negative_cache_s": 0.5, "drain_s": DRAIN_S}
        return [f"{key}={value}" for key, value in {**own, **{f"engine.{name}": value for name, value in engine.items()}}.items()]

    async def _traffic(self, server: Server, client: Client) -> None:
        """Everybody at once, until the time is over."""
        until = time.monotonic() + self._seconds
        users = [User(client, self._world, self._cases, self._history, self._seed * 1000 + number) for number in range(USERS)]
        operators = Operators(client, self._world, self._history, self._seed)
        work = [user.run(until) for user in users] + [operators.run(until), self._crowds(users[0], until), self._watch(server, until)]
        async with asyncio.TaskGroup() as group:
            for each in work:
                group.create_task(each)

    async def _crowds(self, user: User, until: float) -> None:
        draw = random.Random(self._seed)
        while time.monotonic() + BURST_EVERY_S < until:
            await asyncio.sleep(draw.uniform(0.5, 1.5) * BURST_EVERY_S)
            await burst(user, self._cases, BURST, draw)

    async def _watch(self, server: Server, until: float) -> None:
        """Measure the process, and have the engine check itself in the middle of it all."""
        began, looked = time.monotonic(), 0.0
        while (now := time.monotonic()) < until:
            server.measure(now - began)
            if now - looked > LOOK_EVERY_S:
                looked = now
                look = await server.look()
                self._keep(look, "under load")
                self._adapters.append((now - began, look["registered_bytes"] + look["stats"]["adapter_bytes"]))
            await asyncio.sleep(MEASURE_EVERY_S)

    async def _quiet(self, server: Server) -> dict[str, Any]:
        """The first look that finds nobody inside, or the last one tried."""
        found: dict[str, Any] = {}
        for _ in range(100):
            found = await server.look()
            if not (found["places"] or found["loading"] or found["looking"] or found["stats"]["running"]):
                break
            await asyncio.sleep(0.1)
        self._keep(found, "at rest")
        server.measure(self._seconds)
        return found

    def _keep(self, look: dict[str, Any], when: str) -> None:
        self._looks.append(look)
        if problem := look["integrity"]:
            self._problems.append(f"integrity, {when}: {problem}")

    # ---- afterwards ----

    def _compare(self) -> tuple[Counter[str], list[str], bool]:
        """Every answer against its reference: counts, the first that are wrong, and whether equality was to the last bit."""
        say(f"comparing {self._tally.seen.total()} answers, {len(self._tally.seen)} of them different, with their references")
        reference, counts, wrong = Reference(self._world, self._cases), Counter[str](), list[str]()
        for seen, number in self._tally.seen.items():
            verdict = reference.verdict(seen)
            counts[verdict] += number
            if verdict == "wrong" and len(wrong) < MAX_SHOWN:
                right = reference.answer(seen.case, (seen.contents or (None,))[-1], seen.seed)[0]
                wrong.append(f"{self._cases[seen.case]}\n    came      {seen!s:.1500}\n    reference {right!s:.1500}")
        return counts, wrong, reference.exact

    def _result(self, verdicts: Counter[str], wrong: list[str], exact: bool) -> dict[str, Any]:
        """The JSON object; the table goes to stderr."""
        answers, server = verdicts.total(), self._server
        memory = growth(server.usage, self._adapters, self._world.largest_bytes) if server is not None else {}
        log = log_problems(server.text()) if server is not None else []
        few_ties = verdicts["tie"] <= MAX_TIES * answers
        covered = self._covered()
        ok = not (wrong or verdicts["wrong"] or self._problems or self._tally.num_surprises or log or covered["missing"])
        ok = ok and answers > 0 and few_ties and memory.get("bounded", True)
        self._report(wrong, log)
        replies = {f"{kind} {status}": count for (kind, status), count in sorted(self._tally.replies.items())}
        return {
            "bench": "soak",
            "ok": ok,
            "base": self._world.base.name,
            "minutes": self._seconds / 60,
            "seed": self._seed,
            "exact": exact,
            "answers": answers,
            "wrong_answers": verdicts["wrong"],
            "ties": verdicts["tie"],
            "surprises": self._tally.num_surprises,
            "problems": self._problems,
            "log_problems": len(log),
            "integrity_checks": len(self._looks),
            "memory": memory,
            "drain": self._drained,
            "covered": covered,
            "replies": replies,
        }

    def _covered(self) -> dict[str, Any]:
        """What has to have happened for the soak to have been one."""
        stats = next((look["stats"] for look in reversed(self._looks) if "stats" in look), {})
        told = ("steps", "preemptions", "prefix_hits", "adapter_evictions", "finished_cancelled", "finished_error")
        found: dict[str, Any] = {name: stats.get(name, 0) for name in told}
        found["overloaded"] = sum(count for (_, status), count in self._tally.replies.items() if status == "429")
        found["published"] = self._tally.replies["publish", "201"]
        found["unloaded"] = self._tally.replies["unload", "200"]
        return {**found, "missing": [name for name, count in found.items() if not count]}

    def _report(self, wrong: list[str], log: list[str]) -> None:
        kinds = sorted({kind for kind, _ in self._tally.replies})
        for kind in kinds:
            found = {status: count for (other, status), count in self._tally.replies.items() if other == kind}
            say(f"  {kind:28} " + "  ".join(f"{status}: {count}" for status, count in sorted(found.items())))
        for title, lines in (
            ("wrong answers", wrong),
            ("surprises", self._tally.surprises[:MAX_SHOWN]),
            ("problems", self._problems[:MAX_SHOWN]),
            ("the server's log", log[:MAX_SHOWN]),
        ):
            if lines:
                say(f"{title}:\n" + "\n".join(f"  {line}" for line in lines))


def say(text: str) -> None:
    """Everything but the JSON line goes to stderr."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()

"""`atoll serve`, with an ear on stdin: run as `python child.py serve ...`, it is that command in its own process and nothing else.

Each line on stdin is answered with one JSON line on stdout (which `atoll serve` leaves empty): what the process holds at this moment, after the
engine has checked itself between two steps. The answers after the server has stopped come from the same objects. Nothing in Atoll knows of it.

Used by process.py.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from atoll.engine.engine import Engine
    from atoll.serving.service import Service

WAIT_S = 60


class Ear:
    """Answers lines of stdin in a thread of its own."""

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)
        self._service: Service | None = None
        self._engine: Engine | None = None

    def listen(self) -> None:
        for _ in iter(sys.stdin.readline, ""):
            self.tell()
        os._exit(3)  # the soak has gone: nobody would stop this server

    def watch(self) -> None:
        """Know the service as soon as it is made."""
        from atoll.serving.service import Service

        make = Service.__init__

        def remember(service: Service, *args: Any, **more: Any) -> None:
            make(service, *args, **more)
            self._service = service

        Service.__init__ = remember  # type: ignore[method-assign]

    def tell(self) -> None:
        """One answer."""
        try:
            found = self._look()
        except Exception as error:  # told to the soak, which counts it as a finding
            found = {"error": f"{type(error).__name__}: {error}"}
        self._answers.write(json.dumps(found) + "\n")

    def _look(self) -> dict[str, Any]:
        assert self._service is not None, "no server has been made yet"
        thread = self._service._thread
        if thread is None or thread.dead is not None:
            return {**self._held(self._service, []), **(_checked(self._engine) if self._engine is not None else {})}
        return asyncio.run_coroutine_threadsafe(self._ask(self._service), thread._loop).result(WAIT_S)

    async def _ask(self, service: Service) -> dict[str, Any]:
        """On the event loop."""
        self._engine = await service.run(lambda engine: engine)
        found = await service.run(_checked)
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        return {**self._held(service, tasks), **found}

    @staticmethod
    def _held(service: Service, tasks: list[Any]) -> dict[str, Any]:
        registry = service.registry
        return {
            "tasks": len(tasks),
            "task_names": sorted(getattr(task.get_coro(), "__qualname__", "?") for task in tasks),
            "tickets": len(service._tickets),
            "places": service.places.taken,
            "keys_with_places": len(service.places._by_key),
            "holds": sum(entry.holds for entry in registry.entries.values()),
            "loading": registry.num_loading,
            "looking": len(registry.lookups._looking),
            "entries": len(registry.entries),
            "registered_bytes": sum(entry.loaded.num_bytes for entry in registry.entries.values() if entry.loaded is not None),
            "failures": len(registry.failures),
            "lookups": len(registry.lookups._kept),
            "given_up": registry._near.num_given_up + registry._far.num_given_up,
            "threads": threading.active_count(),
        }


def _checked(engine: Engine) -> dict[str, Any]:
    """The engine's integrity check and counts. On its thread, or after that has ended."""
    problem = ""
    try:
        engine.check()
    except AssertionError as error:
        problem = str(error) or "an assertion without words"
    users = sum(int(stats["in_use"]) for stats in engine.adapter_stats().values())
    return {"integrity": problem, "users": users, "stats": engine.stats()}


def main() -> None:
    ear = Ear()
    threading.Thread(target=ear.listen, name="soak-ear", daemon=True).start()
    ear.watch()
    from atoll.cli.main import main as atoll

    try:
        atoll()
    finally:
        if ear._engine is not None:
            ear.tell()


if __name__ == "__main__":
    main()

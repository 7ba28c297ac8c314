"""The end of a soak: a full house, SIGTERM, and what becomes of those who are inside, of those who come later, and of the process.

Used by soak.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import aiohttp

from soaking.cases import Case, Route
from soaking.client import Client, Tally
from soaking.process import Server
from soaking.reading import Malformed
from soaking.users import User

NUM_INSIDE = 16
NEW_TOKENS = 100
INSIDE: tuple[Route, ...] = ("generate", "generate_stream", "completions", "root")


async def drain(server: Server, client: Client, user: User, cases: Sequence[Case], drain_s: float) -> dict[str, int]:
    """Ask for long answers, then tell the server to stop; every one of them must come, whole. Returns counts."""
    tally = client.tally
    long = [replace(case, routes=INSIDE) for case in cases if case.kind == "text" and case.sampling["max_new_tokens"] >= 24 and not case.chat]
    inside = [asyncio.create_task(_inside(user, long[number % len(long)], INSIDE[number % len(INSIDE)], tally)) for number in range(NUM_INSIDE)]
    done = 0
    while (await server.look())["tickets"] + done < NUM_INSIDE:
        done = sum(task.done() for task in inside)  # counted before the look: who leaves in between is counted by neither
    server.ask_to_stop()
    refused = await _knock(client, server)
    answered = sum(await asyncio.gather(*inside))
    if answered < NUM_INSIDE:
        tally.surprise(f"drain: {NUM_INSIDE - answered} of {NUM_INSIDE} requests that were running did not get their answer")
    try:
        async with asyncio.timeout(drain_s + 30):
            await server.process.wait()
    except TimeoutError:
        tally.surprise(f"drain: the server still runs {drain_s + 30:g} s after it was asked to stop")
        server.kill()
    if server.process.returncode != 0:
        tally.surprise(f"drain: the server ended with exit code {server.process.returncode}")
    return {"inside": NUM_INSIDE, "answered": answered, "refused_meanwhile": refused}


async def _inside(user: User, case: Case, route: Route, tally: Tally) -> bool:
    try:
        return await user.question(case, route, kind="drain")
    except (aiohttp.ClientError, TimeoutError, Malformed) as error:
        tally.surprise(f"drain: {type(error).__name__}: {error}")
        return False


async def _knock(client: Client, server: Server) -> int:
    """New requests until the door is closed: 503, or no connection. How many were refused."""
    refused = late = 0
    while server.process.returncode is None and late < 200:
        try:
            reply = await client.ask("late", "POST", "/generate", {"inputs": "a", "parameters": {"max_new_tokens": 1}})
        except (aiohttp.ClientError, TimeoutError):
            return refused + 1
        late += 1
        if reply.status == 503:
            refused += 1
        elif refused or reply.status != 200:
            client.tally.surprise(f"drain: a late request answered {reply.status}: {reply.text[:200]}")
        health = await _health(client)
        if refused and health not in (503, None):
            client.tally.surprise(f"drain: /health answers {health} while the server stops")
        await asyncio.sleep(0.02)
    return refused


async def _health(client: Client) -> int | None:
    try:
        return (await client.ask("late", "GET", "/health", key="")).status
    except (aiohttp.ClientError, TimeoutError):
        return None

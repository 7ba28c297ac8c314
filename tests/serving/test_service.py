"""The service under many callers: right answers, admission, cancelling, deadlines, draining, and a dying engine."""

from __future__ import annotations

import asyncio

import pytest

from atoll.engine.engine import Engine
from atoll.engine.request import EmbedRequest, ScoreRequest
from atoll.errors import NotAllowed, QueueFull, RequestRefused
from atoll.serving.keys import Caller
from atoll.serving.observer import Observer
from atoll.serving.service import AdapterRef, Unavailable
from serving.scenes import ME, answer, ask, key_of, play, running, settled

PROMPTS = [[5 + n, 6, 7, 8, 9] for n in range(4)]
LONG = 400


def test_requests_of_many_adapters_at_once_get_their_answers_alone(base, hub):
    """Threads, queues and batching must not mix anybody's tokens up with anybody else's."""

    async def scenario():
        async with running(base, hub) as service:
            asked = [(name, prompt) for prompt in PROMPTS for name in (None, "red", "green", "blue")]
            together = await asyncio.gather(*(answer(service, name, prompt) for name, prompt in asked))
            keys = [await key_of(service, name) if name else None for name, _ in asked]
            adapters = {key: entry.loaded.adapter for key, entry in service.registry.entries.items()}
        alone = Engine(base, service.config.engine)
        for key, adapter in adapters.items():
            alone.register(key, adapter)
        for (_, prompt), key, found in zip(asked, keys, together, strict=True):
            assert found.token_ids == alone.generate([ask(prompt, key)])[0].token_ids
        assert len({found.token_ids for found in together}) > 4

    play(scenario())


def test_a_stream_says_what_generate_says(base, hub):
    """The pieces of a stream are the answer: none lost, none twice, the completion on the last."""

    async def scenario():
        async with running(base, hub) as service:
            key = await key_of(service, "red")
            [whole] = await service.generate([ask(PROMPTS[0], key, 12)], ME)
            events = [event async for event in service.stream(ask(PROMPTS[0], key, 12), ME)]
            assert tuple(event.token_id for event in events) == whole.token_ids
            assert "".join(event.text for event in events) == whole.text
            assert [event.completion is not None for event in events] == [False] * 11 + [True]
            stream, batches = service.stream(ask(PROMPTS[0], key, 12), ME), []
            await stream.accepted()
            while batch := await stream.next_events():
                batches += batch
            assert [event.token_id for event in batches] == [event.token_id for event in events]
            assert await stream.next_events() == []

    play(scenario())


@pytest.mark.parametrize("how", ["close", "forget"])
def test_closing_a_stream_ends_its_request_within_a_step(base, hub, how):
    """A client that hung up must not keep a row, pages and an adapter for minutes."""

    async def scenario():
        async with running(base, hub) as service:
            stream = service.stream(ask(PROMPTS[0], await key_of(service, "red"), LONG), ME)
            await anext(stream)
            before = (await service.run(lambda engine: engine.stats()))["generated_tokens"]
            if how == "close":
                await stream.aclose()
            del stream
            after = (await service.run(lambda engine: engine.stats()))["generated_tokens"]
            await settled(service)
            stats = await service.run(lambda engine: engine.stats())
            assert stats["finished_cancelled"] == 1
            assert stats["running"] == 0
            assert stats["generated_tokens"] <= after + 1
            assert before < LONG / 2

    play(scenario())


def test_cancelling_generate_ends_all_its_requests(base, hub):
    """best_of=8 of a client that went away is eight rows."""

    async def scenario():
        async with running(base, hub) as service:
            task = asyncio.create_task(service.generate([ask(prompt, None, LONG) for prompt in PROMPTS], ME))
            while (await service.run(lambda engine: engine.stats()))["running"] < len(PROMPTS):
                await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await settled(service)
            assert (await service.run(lambda engine: engine.stats()))["finished_cancelled"] == len(PROMPTS)

    play(scenario())


def test_what_does_not_fit_is_refused_before_anything_is_queued(base, hub):
    """A bad request costs nobody a place."""

    async def scenario():
        async with running(base, hub) as service:
            with pytest.raises(RequestRefused, match="tokens"):
                service.stream(ask([5] * 600), ME)
            with pytest.raises(RequestRefused):
                await service.generate([ask([5, 6]), ask([10_000])], ME)
            with pytest.raises(RequestRefused, match="not registered"):
                await service.generate([ask([5, 6], "no such key")], ME)
            refused = service.stream(ask([5, 6], "no such key"), ME)
            with pytest.raises(RequestRefused, match="not registered"):
                await refused.accepted()
            assert service.stats()["active_requests"] == 0
            assert service.counts["refused_RequestRefused"] == 4

    play(scenario())


def test_requests_beyond_the_limits_are_told_when_to_come_back(base, hub):
    """An unbounded queue answers nobody in time; one key must not take every place."""

    async def scenario():
        async with running(base, hub, max_concurrent_requests=3, per_key_requests=2) as service:
            ann, bob = Caller("ann"), Caller("bob")
            streams = [service.stream(ask(PROMPTS[0], None, LONG), ann) for _ in range(2)]
            with pytest.raises(QueueFull, match="this key") as caught:
                service.stream(ask(PROMPTS[0]), ann)
            assert caught.value.retry_after_s >= 1
            streams.append(service.stream(ask(PROMPTS[0], None, LONG), bob))
            with pytest.raises(QueueFull, match="overloaded"):
                service.stream(ask(PROMPTS[0]), Caller("carl"))
            with pytest.raises(QueueFull):
                await service.generate([ask(PROMPTS[0])], bob)
            with pytest.raises(QueueFull):
                await service.embed([EmbedRequest(PROMPTS[0])], bob)
            await streams[0].aclose()
            await asyncio.sleep(0)
            while service.stats()["active_requests"] > 2:
                await asyncio.sleep(0.002)
            assert len((await service.generate([ask(PROMPTS[0])], ann))[0].token_ids) == 8
            for stream in streams:
                await stream.aclose()

    play(scenario())


def test_a_request_ends_at_its_deadline_with_what_it_has(base, hub):
    """A request that takes for ever would keep its row for ever."""

    async def scenario():
        async with running(base, hub, request_timeout_s=0.05) as service:
            [found] = await service.generate([ask(PROMPTS[0], None, 500)], ME)
            assert found.finish_reason == "deadline"
            assert len(found.token_ids) < 500

    play(scenario())


def test_scores_and_vectors_come_beside_streams(base, hub):
    """Classifying and embedding must not stop generation, nor be stopped by it."""

    async def scenario():
        async with running(base, hub) as service:
            key = await key_of(service, "green")
            stream = service.stream(ask(PROMPTS[0], key, LONG), ME)
            await anext(stream)
            items = [ScoreRequest(prompt, [[7], [8, 9]], key) for prompt in PROMPTS]
            sums, vectors = await asyncio.gather(service.score(items, ME), service.embed([EmbedRequest(p, key) for p in PROMPTS], ME))
            assert [len(each) for each in sums] == [2] * 4
            assert {len(vector) for vector in vectors} == {base.decoder.shape.hidden}
            await stream.aclose()
            await settled(service)
            assert [pytest.approx(each) for each in sums] == await service.score(items, ME)
            with pytest.raises(RequestRefused):
                await service.score([ScoreRequest([], [[7]])], ME)

    play(scenario())


def test_a_job_that_nobody_waits_for_ends(base, hub):
    """64 long texts of a client that hung up are work for nobody."""

    async def scenario():
        async with running(base, hub) as service:
            task = asyncio.create_task(service.embed([EmbedRequest([5 + n % 200] * 500) for n in range(60)], ME))
            await asyncio.sleep(0.02)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert not await service.run(lambda engine: engine._jobs) or service.stats()["active_requests"] == 0
            while await service.run(lambda engine: len(engine._jobs)):
                await asyncio.sleep(0)

    play(scenario())


def test_a_key_without_the_scope_may_not_ask(base, hub):
    """A key for publishing in CI is not one for using the model."""

    async def scenario():
        async with running(base, hub) as service:
            publisher = Caller("ci", frozenset({"publish"}))
            with pytest.raises(NotAllowed):
                service.stream(ask(PROMPTS[0]), publisher)
            with pytest.raises(NotAllowed):
                await service.score([ScoreRequest(PROMPTS[0], [[7]])], publisher)

    play(scenario())


def test_a_prompt_is_reused_for_its_own_key_only(base, hub):
    """The time to the first token would tell one key what another has asked."""

    async def scenario():
        async with running(base, hub) as service:
            prompt = [5 + n % 100 for n in range(130)]
            for caller, reused in ((ME, False), (ME, True), (Caller("other"), False)):
                [found] = await service.generate([ask(prompt, None, 2)], caller)
                assert (found.num_reused_tokens > 0) is reused

    play(scenario())


def test_draining_finishes_what_runs_and_admits_nothing(base, hub):
    """A rolling restart must not cut an answer in half."""

    async def scenario():
        async with running(base, hub) as service:
            stream = service.stream(ask(PROMPTS[0], None, 60), ME)
            first = await anext(stream)
            stopping = asyncio.create_task(service.stop(30))
            await asyncio.sleep(0)
            assert not service.ready
            with pytest.raises(Unavailable, match="stopping"):
                service.stream(ask(PROMPTS[0]), ME)
            with pytest.raises(Unavailable):
                await service.open(AdapterRef("red"), ME)
            events = [first] + [event async for event in stream]
            assert len(events) == 60
            assert events[-1].finish_reason == "length"
            await stopping
            with pytest.raises(Unavailable):
                await service.generate([ask(PROMPTS[0])], ME)

    play(scenario())


def test_what_does_not_finish_in_time_is_cut(base, hub):
    """A stop that waits for the slowest client is no stop; and a second, shorter one wins over the first."""

    async def scenario():
        async with running(base, hub) as service:
            stream = service.stream(ask(PROMPTS[0], None, LONG), ME)
            await anext(stream)
            patient = asyncio.create_task(service.stop(600))
            await asyncio.sleep(0)
            await service.stop(0)
            await patient
            assert [event async for event in stream][-1].finish_reason == "cancelled"
            assert service.counts["cut"] == 1

    play(scenario())


def test_a_dying_engine_leaves_nobody_waiting(base, hub):
    """A hung server is worse than a dead one: every waiter gets an error, and the health check says so."""

    async def scenario():
        async with running(base, hub) as service:

            def break_it(engine):
                def step():
                    raise ZeroDivisionError("a bug of ours")

                engine.step = step

            stream = service.stream(ask(PROMPTS[0], None, LONG), ME)
            await anext(stream)
            waiting = asyncio.create_task(service.generate([ask(PROMPTS[1], None, LONG)], ME))
            await asyncio.sleep(0)
            await service.run(break_it)
            events = [event async for event in stream]
            assert events[-1].finish_reason == "error"
            assert "ZeroDivisionError" in events[-1].completion.error
            assert (await waiting)[0].finish_reason == "error"
            assert service.failed is not None
            assert not service.ready
            with pytest.raises(Unavailable):
                service.stream(ask(PROMPTS[0]), ME)
            with pytest.raises(Unavailable):
                await service.open(AdapterRef("red"), ME)
            assert service.stats()["active_requests"] == 0

    play(scenario())


def test_observers_are_told_of_every_request_and_load(base, hub):
    """Metrics that miss failures show a healthy server that is not."""

    class Notes(Observer):
        def __init__(self):
            self.lines = []

        def accepted(self, kind, adapter):
            self.lines.append(("accepted", kind, adapter))

        def refused(self, kind, error):
            self.lines.append(("refused", kind, type(error).__name__))

        def finished(self, kind, adapter, seconds, completion):
            self.lines.append(("finished", kind, adapter, completion and completion.finish_reason))

        def loaded(self, adapter, source, seconds):
            self.lines.append(("loaded", adapter, source))

    async def scenario():
        async with running(base, hub) as service:
            notes = Notes()
            service.observers.append(notes)
            await answer(service, "red", PROMPTS[0])
            await service.score([ScoreRequest(PROMPTS[0], [[7]])], ME)
            with pytest.raises(RequestRefused):
                service.stream(ask([]), ME)
            assert notes.lines == [
                ("loaded", "red", "hub"),
                ("accepted", "generate", "red"),
                ("finished", "generate", "red", "length"),
                ("accepted", "score", ""),
                ("finished", "score", "", None),
                ("refused", "stream", "RequestRefused"),
            ]
            counters = service.registry.entries[await key_of(service, "red")].counters
            assert (counters.requests, counters.prompt_tokens, counters.generated_tokens, counters.loads) == (1, 5, 8, 1)
            assert counters.first_tokens == 1

    play(scenario())

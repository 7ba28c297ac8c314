"""On which pages sequences run: growth, preemption, reuse, cleaning. Plain Python, fake adapters."""

from __future__ import annotations

from tests.engine.scheduling import Bench, sequence

from atoll.engine.pages import Prefix


def test_a_sequence_takes_pages_as_it_grows() -> None:
    """Room for an answer that may never come would keep others out: pages are taken for what is there."""
    bench = Bench(pages=100)
    bench.add(sequence("a", prompt=6, max_new=20))
    counts = []
    for _ in range(12):
        bench.step()
        counts.append(100 - bench.pages.num_free)
    assert counts == [2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5]


def test_the_one_admitted_last_is_preempted_and_goes_on_first() -> None:
    """Pages run out while answers grow: somebody has to wait, and those who are nearest to their end should not be the ones."""
    bench = Bench(pages=7)
    for name in "abc":
        bench.add(sequence(name, prompt=4, max_new=12))
    seen = [work for work in bench.step() if work[2] - work[1] > 1]
    assert bench.running == ["a", "b", "c"]
    bench.add(sequence("d", prompt=4, max_new=4))
    while bench.running or bench.waiting:
        seen += [work for work in bench.step() if work[2] - work[1] > 1]
    assert seen[:3] == [("a", 0, 4), ("b", 0, 4), ("c", 0, 4)]
    assert [name for name, start, stop in seen[3:-1] if start == 0 and stop > 4] == ["b", "c"], "prompt and answer so far at once"
    assert seen[-1] == ("d", 0, 4), "later than those who were preempted"
    assert bench.scheduler.counts["preemptions"] == 2
    assert bench.pages.num_free == 7


def test_a_prompt_that_needs_many_pages_is_not_passed_by_small_ones() -> None:
    """They would take each page that comes free, and it would wait for ever."""
    bench = Bench(pages=10)
    bench.add(sequence("a", prompt=12, max_new=9))
    bench.step()
    bench.add(sequence("large", prompt=28, max_new=4))
    bench.add(sequence("small", prompt=4, max_new=4))
    bench.step()
    assert bench.waiting == ["large", "small"]
    while "a" in bench.running:
        bench.step()
    bench.step()
    assert bench.running == ["large", "small"]


def test_a_known_beginning_is_taken_over_and_a_new_one_becomes_known() -> None:
    """Of a prompt that was computed before, only what follows its full pages is computed again."""
    bench = Bench()
    tokens = list(range(100, 130))
    bench.add(sequence("a", tokens, prefix=Prefix(None)))
    assert bench.step() == [("a", 0, 30)]
    bench.add(sequence("b", [*tokens[:22], 5, 5], prefix=Prefix(None)))
    bench.add(sequence("c", tokens, prefix=Prefix(None, "another scope")))
    assert bench.step()[1:] == [("b", 20, 24), ("c", 0, 30)]
    assert bench.scheduler.counts["prefix_hits"] == 1
    assert bench.scheduler.counts["reused_tokens"] == 20
    assert bench.scheduler.running["b"].num_reused_tokens == 20


def test_a_beginning_that_is_being_computed_is_waited_for() -> None:
    """Four samples of one long prompt, asked for at once: it is computed once, and the others join a step later."""
    bench = Bench()
    tokens = list(range(100, 130))
    for i in range(4):
        bench.add(sequence(f"n{i}", tokens, prefix=Prefix(None)))
    bench.add(sequence("other", [5, 6, 7], prefix=Prefix(None)))
    assert bench.step() == [("n0", 0, 30), ("other", 0, 3)]
    assert bench.waiting == ["n1", "n2", "n3"]
    assert bench.step()[2:] == [(f"n{i}", 28, 30) for i in (1, 2, 3)]


def test_if_a_beginning_that_is_waited_for_fails_the_next_one_computes_it() -> None:
    """A request that was cancelled or failed must not take along those who hoped for its work."""
    bench = Bench(max_step_tokens=10)
    for name in "abc":
        bench.add(sequence(name, list(range(100, 130)), prefix=Prefix(None)))
    assert bench.step() == [("a", 0, 10)]
    assert bench.remove("a", failed=True) is not None
    assert len(bench.zeroed) == 8
    assert bench.step() == [("b", 0, 10)]
    bench.check()


def test_pages_of_a_prompt_that_has_not_proved_sound_are_cleaned_and_never_known() -> None:
    """A NaN shows at the prompt's end only: until then its pages may hold one, and the next owner would get it."""
    bench = Bench(max_step_tokens=10)
    bench.add(sequence("a", list(range(100, 130)), prefix=Prefix(None)))
    bench.step()
    bench.remove("a")
    assert len(bench.zeroed) == 8
    assert bench.pages.num_cached == 0
    bench.zeroed.clear()
    bench.add(sequence("b", list(range(100, 130)), prefix=Prefix(None)))
    for _ in range(5):
        bench.step()
    bench.scheduler.schedule()
    bench.remove("b", failed=True)
    assert bench.pages.num_cached == 8
    assert len(bench.zeroed) == 1, "only what was computed after the last good result"


def test_prompts_that_want_log_probabilities_compute_every_token() -> None:
    """A reused page has no hidden states, so its tokens would have none."""
    bench = Bench()
    tokens = list(range(100, 120))
    bench.add(sequence("a", tokens, prefix=Prefix(None)))
    bench.step()
    bench.add(sequence("b", tokens, prefix=Prefix(None), prompt_logprobs=1))
    assert bench.step()[1:] == [("b", 0, 20)]


def test_where_angles_depend_on_the_length_chunks_keep_to_one_regime() -> None:
    """A preempted answer is computed again with the angles it was computed with at first, and reuse stops at the prompt's end."""
    bench = Bench(regime=lambda length: int(length > 10), max_step_tokens=50)
    s = sequence("a", list(range(100, 107)), max_new=12, prefix=Prefix(None, 0))
    bench.add(s)
    for _ in range(8):
        bench.step()
    assert len(s.tokens) == 15
    bench.scheduler._preempt(s)
    assert bench.pages.num_cached == 1, "of the answer's pages none is known"
    chunks = [bench.step()[0] for _ in range(4)]
    assert [chunk[1] for chunk in chunks] == [4, 7, 9, 10], "never over 7, where the answer begins, nor over 10, where the angles change"
    assert chunks[-1] == ("a", 10, 15)

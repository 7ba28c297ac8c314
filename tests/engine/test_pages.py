"""engine/pages.py: every page has its owners, and a known page is found by those alone whose beginning and root are the same."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest

from atoll.engine.pages import Edits, Pages, Prefix

TOKENS = list(range(100, 120))  # five pages of four


def known(pages: Pages, prefix: Prefix, tokens: list[int]) -> list[int]:
    """Take pages for tokens, fill them and make them known, as a sequence does."""
    table = pages.take(pages.pages_for(len(tokens)))
    pages.index(prefix, tokens, table, 0, len(tokens) // pages.page_tokens)
    return table


def test_the_accounts_of_pages_need_no_torch() -> None:
    """Scheduling is testable and fast because it is plain Python."""
    code = "import sys, atoll.engine.pages, atoll.engine.waiting; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_page_cannot_be_given_back_twice() -> None:
    """The second giver would free a page that by then belongs to somebody else: two users in one memory."""
    pages = Pages(4, 4)
    table = pages.take(2)
    pages.release(table)
    with pytest.raises(AssertionError, match="nobody holds it"):
        pages.release(table)
    with pytest.raises(AssertionError, match="5 pages are taken but 4 are free"):
        pages.take(5)


def test_a_shared_page_is_free_when_its_last_holder_goes() -> None:
    """Earlier, and a running sequence would read what a new one writes; never, and the cache would fill up."""
    pages = Pages(4, 4)
    table = pages.take(2)
    pages.share(table)
    pages.release(table)
    assert pages.num_free == 2
    pages.check([table])
    pages.release(table)
    assert pages.num_free == 4
    pages.check([])


def test_a_beginning_is_found_up_to_where_it_differs_and_never_as_a_whole() -> None:
    """The last token must be computed to know what follows it; a page with one other token holds other keys from there on."""
    pages = Pages(16, 4)
    prefix = Prefix("a", "scope")
    table = known(pages, prefix, TOKENS)
    for tokens, found in (
        (TOKENS, 4),
        ([*TOKENS, 7], 5),
        (TOKENS[:9], 2),
        (TOKENS[:8], 1),
        (TOKENS[:3], 0),
        ([*TOKENS[:6], 7, *TOKENS[7:]], 1),
        ([7, *TOKENS[1:]], 0),
    ):
        match = pages.match(Prefix("a", "scope"), tokens)
        assert match == table[:found]
        pages.check([table, match])
        pages.release(match)


def test_equal_tokens_of_another_adapter_or_scope_are_others() -> None:
    """Keys and values depend on the adapter; and who may see the scope's prompts is nobody outside it, not even by the time an answer takes."""
    pages = Pages(32, 4)
    roots = [("a", 1, "x"), ("b", 1, "x"), ("a", 1, "y"), ("a", 2, "x"), (None, 1, "x"), ("None", 1, "x"), ("a", 1, "x', 'y"), ("a, 1", "x")]
    for owner, *root in roots:
        assert pages.match(Prefix(owner, *root), TOKENS) == []  # type: ignore[arg-type]
        pages.release(known(pages, Prefix(owner, *root), TOKENS[:12]))  # type: ignore[arg-type]
    assert pages.num_cached == 24
    pages.check([])


def reft(places: Sequence[int], adapter: str = "a", serial: int = 1, side: int = 0, scope: str = "x") -> Prefix:
    """The prefix of a prompt of which an adapter edits these places and does nothing else."""
    return Prefix(None, scope, edits=Edits(adapter, serial, [(0, side, places)]))


def test_pages_before_the_first_edited_token_are_the_bases_own() -> None:
    """An adapter that edits the end of a prompt shares all before with the base and with every other such adapter; with another scope nothing."""
    pages = Pages(32, 4)
    table = known(pages, Prefix(None, "x"), TOKENS)
    for prefix, found in (
        (reft(range(18, 20)), 4),
        (reft(range(9, 20), "b"), 2),
        (reft((8,)), 2),
        (reft((7,)), 1),
        (reft((0, 19)), 0),
        (reft((1000,)), 4),
        (reft(()), 4),
        (reft(range(18, 20), scope="y"), 0),
        (Prefix("a", "x", edits=Edits("a", 1, [(0, 0, (19,))])), 0),
    ):
        match = pages.match(prefix, TOKENS)
        assert match == table[:found]
        pages.release(match)
    pages.check([table])


def test_a_page_is_found_by_those_alone_whose_edits_of_it_and_before_are_the_same() -> None:
    """Equal tokens edited elsewhere, by other tensors, by another adapter or by an older one of that name have other keys and values."""
    pages = Pages(64, 4)
    table = known(pages, reft((5, 6)), TOKENS)
    for prefix, found in (
        (reft((5, 6)), 4),
        (reft((5, 6, 19)), 4),
        (reft((5, 6, 15)), 3),
        (reft((5,)), 1),
        (reft((6, 7)), 1),
        (reft((5, 6, 7)), 1),
        (reft(()), 1),
        (reft((5, 6), side=1), 1),
        (reft((5, 6), "b"), 1),
        (reft((5, 6), serial=2), 1),
        (Prefix(None, "x", edits=Edits("a", 1, [(1, 0, (5, 6))])), 1),
        (Prefix(None, "x", edits=Edits("a", 1, [(0, 0, (5,)), (0, 1, (6,))])), 1),
        (Prefix(None, "x", edits=Edits("a", 1, [(0, 0, (5, 6)), (1, 0, (19,))])), 4),
        (Prefix("a", "x", edits=Edits("a", 1, [(0, 0, (5, 6))])), 0),
        (Prefix(None, "x"), 1),
    ):
        match = pages.match(prefix, TOKENS)
        assert match == table[:found]
        pages.release(match)
    with_lora = known(pages, Prefix("l", 1, "x", edits=Edits("l", 1, [(0, 0, (6,))])), TOKENS)
    assert pages.match(Prefix("l", 1, "x", edits=Edits("l", 1, [(0, 0, (7,))])), TOKENS) == with_lora[:1]
    pages.check([table, with_lora, with_lora[:1]])


def test_forgetting_an_adapter_leaves_the_bases_pages() -> None:
    """What it computed before its first edit is the base's, and others use it."""
    pages = Pages(16, 4)
    pages.release(known(pages, reft((9, 19)), [*TOKENS, 7]))
    assert pages.num_cached == 5
    pages.forget("a")
    assert pages.num_cached == 2
    assert len(pages.match(Prefix(None, "x"), TOKENS)) == 2
    pages.forget(None)
    assert pages.match(reft((9, 19)), TOKENS) == []


def test_keys_cost_little_for_prompts_edited_from_end_to_end() -> None:
    """The work for a page must not grow with the prompt: ten thousand edited places are a page's few, page after page."""
    asked: list[slice] = []

    class Watched(Sequence[int]):
        """Places that say which of them were looked at."""

        def __len__(self) -> int:
            return 40_000

        def __getitem__(self, index: Any) -> Any:
            if isinstance(index, slice):
                asked.append(index)
            return range(40_000)[index]

    prefix = reft(Watched())
    prefix.key(9_999, [0] * 40_000, 4)
    assert len(asked) == 10_000
    assert all(part.stop - part.start == 4 for part in asked)


def test_a_page_keeps_its_contents_until_it_is_needed() -> None:
    """Free pages go first, then the least recently used; of one sequence its end before its beginning, which more prompts share."""
    pages = Pages(6, 4)
    one, two = Prefix("a"), Prefix("b")
    pages.release(known(pages, one, TOKENS[:8]))
    pages.release(known(pages, two, TOKENS[:12]))
    assert (pages.num_free, pages.num_cached) == (6, 5)
    [free] = pages.take(1)
    assert pages.num_cached == 5
    evicted = pages.take(2)
    assert pages.match(one, TOKENS) == []
    found = pages.match(two, TOKENS)
    assert len(found) == 3
    pages.check([[free], evicted, found])
    pages.release(found)
    pages.take(1)
    assert len(pages.match(two, TOKENS)) == 2


def test_a_page_is_known_once_however_many_computed_it() -> None:
    """Two requests that began together both have the beginning; the second's pages are free when it ends, not kept for nobody."""
    pages = Pages(8, 4)
    first, second = known(pages, Prefix("a"), TOKENS[:8]), known(pages, Prefix("a"), TOKENS[:8])
    pages.release(second)
    assert pages.num_cached == 0
    pages.release(first)
    assert pages.num_cached == 2
    pages.check([])


def test_what_is_forgotten_is_found_no_more() -> None:
    """An adapter that is gone: its cached pages are free at once, its held ones when they are given back."""
    pages = Pages(8, 4)
    cached, held = Prefix("a", "x"), Prefix("a", "y")
    pages.release(known(pages, cached, TOKENS[:8]))
    table = known(pages, held, TOKENS[:8])
    other = known(pages, Prefix("b", "x"), TOKENS[:8])
    pages.release(other)
    pages.forget("a")
    assert pages.num_cached == 2
    assert pages.match(held, TOKENS) == pages.match(cached, TOKENS) == []
    pages.release(table)
    pages.forget("nobody")
    assert (pages.num_free, pages.num_cached) == (8, 2)
    pages.check([])


def test_a_fork_shares_full_pages_and_copies_the_one_it_would_write_into() -> None:
    """Two continuations of one prompt: the same page for both to write into would mix their keys."""
    pages = Pages(8, 4)
    table = pages.take(3)
    fork, copied = pages.fork(table, 9, 11)
    assert fork[:2] == table[:2] and fork[2] not in table
    assert copied == (table[2], fork[2])
    even, nothing = pages.fork(table, 8, 13)
    assert even[:2] == table[:2] and len(even) == 4 and nothing is None
    pages.check([table, fork, even])
    assert pages.unknown(table) == [table[2]]


def test_the_check_finds_leaks_double_owners_and_lost_pages() -> None:
    """The engine runs this on itself; a check that passes on a leak would let a server fill up over days."""
    pages = Pages(4, 4)
    table = pages.take(2)
    with pytest.raises(AssertionError, match="leak"):
        pages.check([])
    with pytest.raises(AssertionError, match="leak"):
        pages.check([table, table])
    with pytest.raises(AssertionError, match="twice in one"):
        pages.check([[*table, table[0]]])
    pages._free.pop()
    with pytest.raises(AssertionError, match="4 pages, but"):
        pages.check([table])


@pytest.mark.parametrize("seed", range(8))
def test_random_traffic_keeps_the_accounts_and_never_finds_a_wrong_page(seed: int) -> None:
    """Takes, matches, forks, releases and forgetting in any order: a found page holds exactly the tokens, edits and root that were asked for."""
    source = random.Random(seed)
    pages = Pages(20, 4)
    contents: dict[int, tuple[object, ...]] = {}  # what was written into a page last

    def content(owner: str | None, edited: Sequence[int], tokens: Sequence[int]) -> tuple[object, ...]:
        edited = [place for place in edited if place < len(tokens)]
        return (owner if owner in (None, "a", "b") or edited else None, tuple(edited), tuple(tokens))

    held: list[list[int]] = []
    for _ in range(600):
        action = source.random()
        if action < 0.5:
            owner = source.choice((None, "a", "b", "reft a", "reft b"))
            tokens = [source.randrange(2) for _ in range(source.randrange(1, 30))]
            places = sorted(source.sample(range(30), source.choice((0, 1, 2)))) if owner not in (None, "a") else []
            edits = Edits(owner, 0, [(0, 0, places)]) if owner is not None and places else None
            prefix = Prefix(owner if owner in ("a", "b") else None, 0, edits=edits)
            table = pages.match(prefix, tokens)
            for place, page in enumerate(table):
                assert contents[page] == content(owner, places, tokens[: 4 * place + 4])
            if pages.pages_for(len(tokens)) - len(table) > pages.num_free:
                pages.release(table)
                continue
            first = len(table)
            table += pages.take(pages.pages_for(len(tokens)) - first)
            for place in range(first, len(table)):
                contents[table[place]] = content(owner, places, tokens[: 4 * place + 4])
            if source.random() < 0.8:
                pages.index(prefix, tokens, table, first, len(tokens) // 4)
            held.append(table)
        elif action < 0.9 and held:
            pages.release(held.pop(source.randrange(len(held))))
        elif action < 0.95 and held:
            table = source.choice(held)
            length = source.randrange(1, 4 * len(table) + 1)
            if len(table) * 4 + 2 <= 4 * pages.num_free:
                fork, _ = pages.fork(table, length, length + 3)
                contents.update({page: ("fork",) for page in fork if page not in table})
                held.append(fork)
        else:
            pages.forget(source.choice((None, "a", "b", "reft a", "reft b")))
        pages.check(held)

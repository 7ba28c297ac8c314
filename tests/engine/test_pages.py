"""engine/pages.py: every page has its owners, and a known page is found by those alone whose beginning and root are the same."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest

from atoll.engine.pages import Pages, Prefix

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


@pytest.mark.parametrize("seed", range(4))
def test_random_traffic_keeps_the_accounts_and_never_finds_a_wrong_page(seed: int) -> None:
    """Takes, matches, forks, releases and forgetting in any order: a found page holds exactly the tokens and root that were asked for."""
    source = random.Random(seed)
    pages = Pages(20, 4)
    contents: dict[int, tuple[object, tuple[int, ...]]] = {}  # what was written into a page last
    held: list[list[int]] = []
    for _ in range(600):
        action = source.random()
        if action < 0.5:
            owner = source.choice((None, "a", "b"))
            prefix, tokens = Prefix(owner, 0), [source.randrange(2) for _ in range(source.randrange(1, 30))]
            table = pages.match(prefix, tokens)
            for place, page in enumerate(table):
                assert contents[page] == (owner, tuple(tokens[: 4 * place + 4]))
            if pages.pages_for(len(tokens)) - len(table) > pages.num_free:
                pages.release(table)
                continue
            first = len(table)
            table += pages.take(pages.pages_for(len(tokens)) - first)
            for place in range(first, len(table)):
                contents[table[place]] = (owner, tuple(tokens[: 4 * place + 4]))
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
                contents.update({page: ("fork", ()) for page in fork if page not in table})
                held.append(fork)
        else:
            pages.forget(source.choice((None, "a", "b")))
        pages.check(held)

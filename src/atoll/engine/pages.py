"""Who owns which page of the KV cache, and which pages hold a beginning that somebody may ask for again. Plain Python, without torch.

A page is held by any number of page tables. A full page whose contents are known to be good is named by a key: a hash of everything before it and of
its own tokens, on top of a root that says whose it is (adapter and scope). Equal keys mean equal keys and values, so a later sequence with the same
root and beginning takes such pages instead of computing them. Keys come from content: two LoRA adapters, or two scopes, never meet.

ReFT edits some tokens of a prompt only, so what stands before the first of them is the base's own and is shared with it. A page with edited tokens
has them in its key, and since keys build on one another, so has all that follows:

    base             root ─► page 0 ─► page 1 ─► page 2
    ReFT, last two   root ─► page 0 ─► page 1 ─► page 2 + adapter, places 70 71 ─► page 3
                             the base's own      the adapter's

    free ──take──► held (count >= 1) ──release──► free              no key
                     ▲        └──────release────► cached (count 0)  has a key: keeps its contents until a take needs the page
                     └──match / share──────────── cached

Used by scheduler.py and jobs.py. `check` is the engine's integrity test of itself.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence
from hashlib import blake2b

_KEY_BYTES = 16  # 128 bits: no two contents share one by accident


class Edits:
    """Which tokens of one prompt an adapter edits, as the keys of their pages need it."""

    def __init__(self, adapter: str, serial: int, groups: Sequence[tuple[int, int, Sequence[int]]]) -> None:
        """serial: the adapter's registration. groups: (part of the adapter, side whose tensors edit, places in the prompt, ascending)."""
        self.adapter = adapter
        self._name = blake2b(repr((adapter, serial)).encode(), digest_size=_KEY_BYTES).digest()
        self._groups = [group for group in groups if len(group[2])]
        self._num_parts = max((part + 1 for part, _, _ in self._groups), default=0)

    def within(self, start: int, stop: int) -> bytes:
        """What a key must have of the edits of tokens start to stop: whose they are, and a byte a token and part; nothing where none is edited."""
        here = [group for group in self._groups if group[2][0] < stop and group[2][-1] >= start]
        marks = bytearray(self._num_parts * (stop - start) if here else 0)
        for part, side, places in here:
            first = part * (stop - start) - start
            for place in places[bisect_left(places, start) : bisect_left(places, stop)]:
                marks[first + place] = 1 + side
        return self._name + marks.rstrip(b"\0") if any(marks) else b""


class Prefix:
    """The keys of one sequence's full pages, each hashed once. owner: the adapter whose pages they are, for `Pages.forget`."""

    def __init__(self, owner: str | None, *root: object, edits: Edits | None = None) -> None:
        """root: whatever else decides keys and values, or who may reuse them.

        edits: of this prompt, by the owner; or by an adapter that changes nothing else where the owner is None: the base owns the pages before its
        first edit, it those from there on.
        """
        self._owner, self._edits = owner, edits
        self._first_edited: int | None = None  # page
        self._root = blake2b(repr((owner, *root)).encode(), digest_size=_KEY_BYTES).digest()
        self._keys: list[bytes] = []

    def key(self, index: int, tokens: Sequence[int], page_tokens: int) -> bytes:
        """The key of page `index`, which is full: tokens holds at least (index + 1) * page_tokens, and never changes below that."""
        while len(self._keys) <= index:
            start = len(self._keys) * page_tokens
            before = self._keys[-1] if self._keys else self._root
            content = array("q", tokens[start : start + page_tokens]).tobytes()
            edited = self._edits.within(start, start + page_tokens) if self._edits is not None else b""
            if edited and self._first_edited is None:
                self._first_edited = len(self._keys)
            self._keys.append(blake2b(before + content + edited, digest_size=_KEY_BYTES).digest())
        return self._keys[index]

    def owner(self, index: int) -> str | None:
        """Whose page `index` is, once `key` has been asked for it."""
        assert index < len(self._keys)
        if self._edits is not None and self._first_edited is not None and index >= self._first_edited:
            return self._edits.adapter
        return self._owner


class Pages:
    """The accounts of `num_pages` pages of `page_tokens` tokens."""

    def __init__(self, num_pages: int, page_tokens: int) -> None:
        self.num_pages, self.page_tokens = num_pages, page_tokens
        self._counts = [0] * num_pages
        self._free = list(range(num_pages - 1, -1, -1))  # without a key; the one freed last is taken first: its memory is warm
        self._cached: dict[int, None] = {}  # with a key and held by nobody, least recently released first
        self._pages: dict[bytes, int] = {}
        self._keys: dict[int, bytes] = {}
        self._owned: dict[str | None, set[int]] = {}  # pages with a key, by the adapter whose they are
        self._owners: dict[int, str | None] = {}

    @property
    def num_free(self) -> int:
        """Pages that `take` can give, cached ones included."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Pages that nobody holds but whose contents are kept."""
        return len(self._cached)

    def pages_for(self, num_tokens: int) -> int:
        """How many pages hold that many tokens."""
        return -(-num_tokens // self.page_tokens)

    def take(self, count: int) -> list[int]:
        """Hand out pages for writing: free ones first, then cached ones, least recently used first. The caller checks `num_free`."""
        if count > self.num_free:
            raise AssertionError(f"{count} pages are taken but {self.num_free} are free")
        taken = []
        for _ in range(count):
            if self._free:
                page = self._free.pop()
            else:
                page = next(iter(self._cached))
                del self._cached[page]
                self._drop_key(page)
            self._counts[page] = 1
            taken.append(page)
        return taken

    def share(self, pages: Iterable[int]) -> None:
        """One more holder of each page."""
        for page in pages:
            if self._counts[page] == 0:
                del self._cached[page]  # a page that is neither held nor cached cannot be shared: KeyError
            self._counts[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """One holder less. From the end, so that a beginning, which more sequences share, outlives what follows it."""
        for page in reversed(pages):
            count = self._counts[page] - 1
            if count < 0:
                raise AssertionError(f"page {page} is given back but nobody holds it")
            self._counts[page] = count
            if count == 0:
                if page in self._keys:
                    self._cached[page] = None
                else:
                    self._free.append(page)

    def match(self, prefix: Prefix, tokens: Sequence[int]) -> list[int]:
        """Take a hold on the known pages at the beginning of `tokens`, in order. Never all of it: the last token has to be computed."""
        found: list[int] = []
        for index in range((len(tokens) - 1) // self.page_tokens):
            page = self._pages.get(prefix.key(index, tokens, self.page_tokens))
            if page is None:
                break
            found.append(page)
        self.share(found)
        return found

    def index(self, prefix: Prefix, tokens: Sequence[int], table: Sequence[int], start: int, stop: int) -> None:
        """Make pages start to stop of a page table known: they are full, and what they hold is good. Contents known already stay where they are."""
        for place in range(start, stop):
            key, page = prefix.key(place, tokens, self.page_tokens), table[place]
            if key not in self._pages:
                owner = prefix.owner(place)
                self._pages[key], self._keys[page] = page, key
                self._owners[page] = owner
                self._owned.setdefault(owner, set()).add(page)

    def forget(self, owner: str | None) -> None:
        """Drop what is known of an adapter: its cached pages become free."""
        for page in list(self._owned.get(owner, ())):
            self._drop_key(page)
            if self._counts[page] == 0:
                del self._cached[page]
                self._free.append(page)

    def fork(self, table: Sequence[int], num_tokens: int, total: int) -> tuple[list[int], tuple[int, int] | None]:
        """A page table of its own for a continuation of the first num_tokens of `table`, long enough for `total` tokens.

        Full pages are shared; one that is partly filled would be written into, so a new page takes its place, and (source, target) says what to copy.
        """
        full = num_tokens // self.page_tokens
        new = self.take(self.pages_for(total) - full)
        self.share(table[:full])
        copied = num_tokens % self.page_tokens > 0 and total > num_tokens
        return [*table[:full], *new], (table[full], new[0]) if copied else None

    def unknown(self, table: Iterable[int]) -> list[int]:
        """Pages of a table that it alone holds and that have no key: where a failed sequence may have left values that are not finite."""
        return [page for page in table if self._counts[page] == 1 and page not in self._keys]

    def check(self, held: Iterable[Sequence[int]]) -> None:
        """Raise AssertionError unless the page tables in `held` account for every hold, and every page is in exactly one state."""
        tables = list(held)
        if any(len(set(table)) < len(table) for table in tables):
            raise AssertionError("a page stands twice in one page table")
        counted = Counter(page for table in tables for page in table)
        known = {page: count for page, count in enumerate(self._counts) if count}
        if counted != Counter(known):
            wrong = sorted(page for page in counted.keys() | known.keys() if counted[page] != known.get(page, 0))
            raise AssertionError(
                f"pages leak: {wrong[:8]} are held {[counted[p] for p in wrong[:8]]} times, but counted {[known.get(p, 0) for p in wrong[:8]]}"
            )
        states = [*self._free, *self._cached, *known]
        if sorted(states) != list(range(self.num_pages)):
            raise AssertionError(f"{self.num_pages} pages, but {len(self._free)} free, {len(self._cached)} cached and {len(known)} held ones")
        if {key: page for page, key in self._keys.items()} != self._pages or self._keys.keys() != self._owners.keys():
            raise AssertionError("the index of pages and their keys disagree")
        if any(page not in self._keys for page in self._cached) or any(page in self._keys for page in self._free):
            raise AssertionError("a cached page has no key, or a free one has")
        if {page: owner for owner, pages in self._owned.items() for page in pages} != self._owners:
            raise AssertionError("pages are listed under an adapter whose they are not")

    def _drop_key(self, page: int) -> None:
        del self._pages[self._keys.pop(page)]
        owner = self._owners.pop(page)
        owned = self._owned[owner]
        owned.discard(page)
        if not owned:
            del self._owned[owner]

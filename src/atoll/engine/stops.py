"""Tokens to text while they come: whole characters only, and nothing that may turn out to be a stop string.

A token may end in the middle of a UTF-8 character, and a stop string may be spread over many tokens. So text goes out late: a character when its last
byte is there, the beginning of a stop string when it can no longer become one. Texts given out are never taken back.

Used by sequence.py, one TextStream a sequence. Plain Python: decoding is a function passed in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[list[int]], str]

_UNFINISHED = "\ufffd"  # what decoders give for bytes that are no character, or not yet
_LONGEST_UNFINISHED = 3  # bytes of a character that lacks its last: some decoders give one replacement character for each
_WINDOW_TOKENS = 64  # bytes that never make sense are given up after so many tokens, so decoding stays linear in the answer's length


class Detokenizer:
    """Grows a token list and says what text each token makes final.

    Some decoders treat a text's first token differently (a leading space is stripped), so tokens are decoded behind those that were given out last,
    whose own text is cut off.
    """

    def __init__(self, decode: Decode, before: Sequence[int] = ()) -> None:
        """before: the last tokens of the prompt, so that the answer's first token is decoded as the middle of a text."""
        self._decode = decode
        self._before: list[int] = []  # tokens that are given out, decoded for context only
        self._before_text = ""
        self._window: list[int] = []  # tokens whose text is not final
        self._given = 0  # characters of the window's text that are given out already
        self._look_back_to(list(before))

    def push(self, token: int) -> str:
        """Add a token; return the text that is final now."""
        self._window.append(token)
        text = self._text()
        unfinished = len(text) - len(text.rstrip(_UNFINISHED))
        if unfinished and len(self._window) < _WINDOW_TOKENS:
            final = max(self._given, len(text) - min(unfinished, _LONGEST_UNFINISHED))
            out = text[self._given : final]
            self._given = final
            return out
        return self._close(text)

    def flush(self) -> str:
        """The end: whatever is open is given out as it is."""
        return self._close(self._text()) if self._window else ""

    def _text(self) -> str:
        return self._decode(self._before + self._window)[len(self._before_text) :]

    def _close(self, text: str) -> str:
        out = text[self._given :]
        if text:
            self._look_back_to(self._window)
        self._window, self._given = [], 0
        return out

    def _look_back_to(self, tokens: list[int]) -> None:
        """Decode what follows after these tokens; after none if they end inside a character, which would melt into what follows."""
        text = self._decode(tokens) if tokens else ""
        self._before, self._before_text = ([], "") if text.endswith(_UNFINISHED) else (tokens, text)


class TextStream:
    """A Detokenizer with stop strings: `text` is the answer so far, and `push` gives the part of it that can no longer change."""

    def __init__(self, decode: Decode, stop: Sequence[str] = (), before: Sequence[int] = (), *, after_text: bool = False) -> None:
        """after_text: stop strings of white space count only after the first other character."""
        self._is_blank = after_text  # whether stop strings of white space do not count yet
        self._detokenizer = Detokenizer(decode, before)
        self._stop = tuple(stop)
        self._parts: list[str] = []  # given out
        self._held = ""  # decoded, but may become a stop string
        self.stopped_by: str | None = None

    @property
    def text(self) -> str:
        """Everything given out. The whole answer once it is finished."""
        return "".join(self._parts)

    def push(self, token: int, *, may_stop: bool = True) -> str:
        """Add a token; return the text that is final now. `stopped_by` is set when a stop string is complete; what follows it is dropped."""
        return self._advance(self._detokenizer.push(token), may_stop)

    def finish(self, *, may_stop: bool = True) -> str:
        """No more tokens: return what was held back. An open character may still complete a stop string."""
        if self.stopped_by is not None:
            return ""
        out = self._advance(self._detokenizer.flush(), may_stop)
        rest, self._held = self._held, ""
        self._parts.append(rest)
        return out + rest

    def abandon(self) -> str:
        """The request ends without its last token: return what is decoded; an open character is dropped."""
        rest, self._held = self._held, ""
        self._parts.append(rest)
        return rest

    def _advance(self, new: str, may_stop: bool) -> str:
        if not new:
            return ""
        if not self._stop:
            self._parts.append(new)
            return new
        text = self._held + new
        found = self._find(text) if may_stop else None
        if found is not None:
            place, self.stopped_by = found
            self._held = ""
            self._parts.append(text[:place])
            return text[:place]
        keep = self._open_suffix(text)
        self._held = text[len(text) - keep :]
        out = text[: len(text) - keep]
        self._is_blank = self._is_blank and not out.strip()
        self._parts.append(out)
        return out

    def _find(self, text: str) -> tuple[int, str] | None:
        """Where the stop string that is complete first begins, and which it is: what a reader of one character after another would meet."""
        blank = len(text) - len(text.lstrip()) if self._is_blank else 0
        starts = [(stop, blank if blank and not stop.strip() else 0) for stop in self._stop]
        hits = [(place + len(stop), place, stop) for stop, start in starts if (place := text.find(stop, start)) >= 0]
        if not hits:
            return None
        _, place, stop = min(hits)
        return place, stop

    def _open_suffix(self, text: str) -> int:
        """How many characters at the end may be the beginning of a stop string. Only places of its first character are looked at."""
        longest = 0
        for stop in self._stop:
            place = text.find(stop[0], max(0, len(text) - len(stop) + 1))
            while 0 <= place < len(text) - longest:
                if stop.startswith(text[place:]):
                    longest = len(text) - place
                place = text.find(stop[0], place + 1)
        return longest

"""What a single token looks like: its text and its bytes.

A token may be part of a character, so its bytes are the truth and its text an aid to reading. Tokenizers do not say a token's bytes; they are found
by decoding it behind a letter (some decoders strip a text's first space), and for a piece of a character from its spelling in the vocabulary.

Used by the replies that show tokens one by one.
"""

from __future__ import annotations

import re
from typing import Any

_UNFINISHED = "\ufffd"
_HEX_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # how vocabularies with byte fallback spell a byte


class TokenTexts:
    """Text and bytes of a tokenizer's tokens, each found once. Made once a server: it remembers at most the vocabulary."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._fast = getattr(tokenizer, "backend_tokenizer", None)
        self._special = frozenset(token for token, added in tokenizer.added_tokens_decoder.items() if added.special)
        self._bytes: dict[int, bytes] = {}
        [self._anchor] = tokenizer("a", add_special_tokens=False)["input_ids"][:1]
        self._anchor_text = self.decode([self._anchor])
        self._alphabet = byte_alphabet()

    def is_special(self, token: int) -> bool:
        """Whether answers leave the token out of their text."""
        return token in self._special

    def decode(self, ids: list[int]) -> str:
        """The text of tokens, special ones included."""
        if self._fast is not None:
            return str(self._fast.decode(ids, skip_special_tokens=False))
        return str(self._tokenizer.decode(ids, skip_special_tokens=False))

    def bytes_of(self, token: int) -> bytes:
        """The bytes that the token stands for; b"" for an id that the tokenizer does not know (an embedding padded to a round size)."""
        found = self._bytes.get(token)
        if found is None:
            found = self._bytes[token] = self._find(token)
        return found

    def text_of(self, token: int) -> str:
        """The token's text; bytes that are no character alone are written as backslash-x and two digits each, as OpenAI writes them."""
        raw = self.bytes_of(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "".join(f"\\x{byte:02x}" for byte in raw)

    def _find(self, token: int) -> bytes:
        text = self.decode([self._anchor, token])[len(self._anchor_text) :]
        if _UNFINISHED not in text:
            return text.encode()
        piece = self._tokenizer.convert_ids_to_tokens(token) or ""
        if match := _HEX_PIECE.fullmatch(piece):
            return bytes([int(match[1], 16)])
        if piece and all(letter in self._alphabet for letter in piece):
            return bytes(self._alphabet[letter] for letter in piece)
        return text.encode()


def byte_alphabet() -> dict[str, int]:
    """The letters by which byte-level vocabularies spell the 256 bytes: printable ones as themselves, the others from U+0100 on, in order."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(plain)]
    return {chr(byte): byte for byte in plain} | {chr(0x100 + place): byte for place, byte in enumerate(others)}

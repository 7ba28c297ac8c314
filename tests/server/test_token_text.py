"""A token's bytes: what log-probabilities are told by."""

from __future__ import annotations

from atoll.http.token_text import TokenTexts, byte_alphabet
from conftest import tiny_tokenizer


def test_the_bytes_of_tokens_join_to_the_text():
    """OpenAI's clients put a text together from `bytes` when a character is spread over tokens; a wrong byte would be a wrong letter."""
    tokenizer, text = tiny_tokenizer(), "héllo, 世界 \n\t\x00😀"
    texts = TokenTexts(tokenizer)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert b"".join(texts.bytes_of(token) for token in ids).decode() == text
    assert texts.text_of(ids[0]) == "h"
    assert texts.text_of(ids[1]) == "\\xc3"  # half of an é is no text


def test_special_tokens_have_text_and_unknown_ids_have_none():
    """Embeddings are padded beyond the vocabulary, and a log-probability may name such an id: it must not fail the request."""
    texts = TokenTexts(tiny_tokenizer())
    assert texts.text_of(2) == "</s>" and texts.is_special(2)
    assert not texts.is_special(70)
    assert texts.text_of(319) == ""


def test_every_byte_has_a_letter_of_its_own():
    """Two bytes with one letter would make bytes ambiguous."""
    alphabet = byte_alphabet()
    assert sorted(alphabet.values()) == list(range(256))
    assert alphabet["Ġ"] == ord(" ") and alphabet["Ċ"] == ord("\n")

"""Text while it comes: nothing is given out that a later token could change, and nothing is lost."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from atoll.engine.stops import Detokenizer, TextStream

ALPHABET = "ab \n.éß€漢🙂"


def by_bytes(ids: list[int]) -> str:
    """A byte-level tokenizer: an id is a byte, and an incomplete character is one replacement character."""
    return bytes(ids).decode("utf-8", errors="replace")


def by_fallback(ids: list[int]) -> str:
    """A byte-fallback decoder: every byte of an incomplete character is a replacement character of its own."""
    try:
        return bytes(ids).decode("utf-8")
    except UnicodeDecodeError as error:
        return bytes(ids[: error.start]).decode("utf-8") + "\ufffd" * (len(ids) - error.start)


@pytest.mark.parametrize("decode", [by_bytes, by_fallback])
def test_a_character_is_given_out_when_its_last_byte_is_there(decode: Callable[[list[int]], str]) -> None:
    """Half a character shown to a user stays on the screen as a question mark."""
    detokenizer = Detokenizer(decode)
    given = [detokenizer.push(byte) for byte in "é🙂x".encode()]
    assert given == ["", "é", "", "", "", "🙂", "x"]
    assert detokenizer.flush() == ""


def test_bytes_that_never_make_a_character_are_given_out_in_the_end() -> None:
    """A model may well generate nonsense bytes: they are neither swallowed nor held for ever, and what follows is right again."""
    detokenizer = Detokenizer(by_bytes)
    given = [detokenizer.push(byte) for byte in b"a\xff\xfe\xfdb\xc3"]
    assert "".join(given) == "a\ufffd\ufffd\ufffdb"
    assert detokenizer.flush() == "\ufffd"
    endless = [detokenizer.push(0xFF) for _ in range(500)]
    assert sum(map(len, endless)) > 400


def test_a_leading_space_in_the_middle_of_a_text_survives() -> None:
    """Sentencepiece decoders strip a text's first space; decoded apart, every token would lose it."""
    words = ["\u2581hello", "\u2581big", "\u2581world", "!"]

    def decode(ids: list[int]) -> str:
        return "".join(words[i] for i in ids).replace("\u2581", " ").removeprefix(" ")

    fresh = Detokenizer(decode)
    assert "".join(fresh.push(i) for i in (0, 1, 2, 3)) == "hello big world!"
    after_a_prompt = Detokenizer(decode, before=[0])
    assert "".join(after_a_prompt.push(i) for i in (1, 2)) == " big world"


def test_random_texts_come_out_whole_and_never_taken_back() -> None:
    """For any text and stop strings, what was given out is always a beginning of the final text, and the final text ends before the first stop."""
    source = random.Random(5)
    for _ in range(400):
        text = "".join(source.choice(ALPHABET) for _ in range(source.randint(0, 25)))
        stops = tuple("".join(source.choice(ALPHABET) for _ in range(source.randint(1, 4))) for _ in range(source.randint(0, 3)))
        ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
        expected = text[: min(ends)[1]] if ends else text
        stream, given = TextStream(by_bytes, stops), ""
        for byte in text.encode():
            given += stream.push(byte)
            assert expected.startswith(given)
            if stream.stopped_by is not None:
                break
        given += stream.finish()
        assert given == expected == stream.text
        assert (stream.stopped_by is not None) == bool(ends)


def test_the_beginning_of_a_stop_string_is_held_until_it_is_decided() -> None:
    """A client that prints what it gets must never show part of a stop string."""
    stream = TextStream(by_bytes, ("###",))
    assert [stream.push(byte) for byte in b"a##b"] == ["a", "", "", "##b"]
    assert [stream.push(byte) for byte in b"c###"] == ["c", "", "", ""]
    assert stream.stopped_by == "###"
    assert stream.text == "a##bc"


def test_an_open_beginning_is_given_out_when_the_answer_ends() -> None:
    """Text that was held back is part of the answer if no stop string came of it."""
    stream = TextStream(by_bytes, ("###",))
    assert stream.push(ord("#")) == ""
    assert stream.finish() == "#"


def test_the_stop_string_that_is_complete_first_wins() -> None:
    """With "b" and "abc" as stops, a reader meets "b" first; an answer must not depend on how tokens fall."""
    for tokens in ([b"abc"], [b"ab", b"c"], [b"a", b"b", b"c"]):
        stream = TextStream(lambda ids, parts=tokens: b"".join(parts[i] for i in ids).decode(), ("abc", "b"))
        for index in range(len(tokens)):
            stream.push(index)
            if stream.stopped_by:
                break
        assert (stream.text, stream.stopped_by) == ("a", "b")


def test_a_blank_stop_string_may_wait_for_the_first_text() -> None:
    """A base that begins its answer with a line end would otherwise be cut off before the answer, and every adapter would beat it."""
    plain, patient = TextStream(by_bytes, ["\n"]), TextStream(by_bytes, ["\n", "!"], after_text=True)
    plain.push(ord("\n"))
    assert plain.stopped_by == "\n" and plain.text == ""
    for byte in b"\n \nyes\nno":
        patient.push(byte)
        if patient.stopped_by:
            break
    assert patient.stopped_by == "\n" and patient.text.strip() == "yes"
    other = TextStream(by_bytes, ["\n", "!"], after_text=True)
    other.push(ord("\n"))
    other.push(ord("!"))
    assert other.stopped_by == "!"

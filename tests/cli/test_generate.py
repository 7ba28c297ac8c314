"""`atoll generate`: the right prompt, the right words out, one row or many."""

from __future__ import annotations

import json

import pytest

FAST = ["--dtype", "float32", "-n", 4]


@pytest.fixture
def base(tiny_base_dir, atoll_home):
    """Options for the bare tiny base."""
    return ["--base", tiny_base_dir, *FAST]


def test_streamed_text_is_the_text_of_json(atoll, trained):
    """The two ways to print must not be two ways to generate."""
    asked = ["generate", "-a", "colours", *FAST, "a red thing"]
    streamed, whole = atoll(*asked), atoll(*asked, "--json").json()
    assert streamed.out == whole["text"] + "\n"
    assert whole["finish_reason"] == "length"
    assert "cut at 4 tokens" in streamed.err


def test_a_lone_text_fills_the_lone_column_of_the_template(atoll, trained):
    """A user of an adapter should not have to know its template."""
    asked = ["generate", "-a", "colours", *FAST, "--json"]
    bare, named = atoll(*asked, "a red thing").json(), atoll(*asked, "--field", "text=a red thing").json()
    assert bare == named
    assert (bare["prompt"], bare["prompt_style"]) == ("a red thing is", "template")


def test_raw_and_chat_leave_the_template_out(atoll, trained):
    """Asking an adapter in other words must be possible, and visible."""
    asked = ["generate", "-a", "colours", *FAST, "--json", "hello"]
    raw, chat = atoll(*asked, "--raw").json(), atoll(*asked, "--chat").json()
    assert (raw["prompt"], raw["prompt_style"], raw["num_prompt_tokens"]) == ("hello", "raw", len("hello"))
    assert chat["prompt_style"] == "chat"
    assert chat["num_prompt_tokens"] > raw["num_prompt_tokens"]
    assert raw["digest"] == chat["digest"] is not None


def test_a_base_with_a_chat_template_is_asked_in_it(atoll, base):
    """An instruct model continues plain text badly; what was done is in the answer."""
    assert atoll("generate", *base, "--json", "hello").json()["prompt_style"] == "chat"
    assert atoll("generate", *base, "--json", "--raw", "hello").json()["prompt_style"] == "raw"


def test_fields_that_are_missing_or_unknown_are_named(atoll, trained, base):
    """A slip in a field's name must not fill the template with nothing."""
    missing = atoll("generate", "-a", "colours", "--field", "txt=a")
    assert (missing.code, missing.out) == (1, "")
    assert "no column 'txt'" in missing.err
    unused = atoll("generate", *base, "--field", "text=a", "hello")
    assert "--field text has no template to fill" in unused.err


def test_stdin_is_the_prompt_less_its_last_line_end(atoll, base):
    """`echo hi | atoll generate -` means hi."""
    assert atoll("generate", *base, "--json", "-", stdin="two\nlines\n").json()["prompt"] == "two\nlines"


def test_a_seed_makes_a_draw_repeatable_and_is_told(atoll, base):
    """Whoever likes an answer wants it again."""
    asked = ["generate", *base, "--json", "--temperature", 1.5, "hello"]
    first = atoll(*asked).json()
    again = atoll(*asked, "--seed", first["seed"]).json()
    assert again["text"] == first["text"]


def test_log_probabilities_come_with_each_token(atoll, base):
    """One entry a token, with as many others as asked for; without JSON there is no place for them."""
    tokens = atoll("generate", *base, "--json", "--logprobs", 2, "hello").json()["logprobs"]
    assert len(tokens) == 4
    assert all(entry["logprob"] == entry["top"][0]["logprob"] and len(entry["top"]) == 2 for entry in tokens)  # greedy: the likeliest was taken
    assert atoll("generate", *base, "--logprobs", 2, "hello").code == 2


def test_a_stop_text_ends_the_answer(atoll, base):
    """It is not part of the answer."""
    whole = atoll("generate", *base, "--json", "hello").json()["text"]
    stopped = atoll("generate", *base, "--json", "--stop", whole[1], "hello").json()
    assert (stopped["text"], stopped["stopped_by"], stopped["finish_reason"]) == (whole[: whole.index(whole[1])], whole[1], "stop")


@pytest.mark.parametrize(("option", "value"), [("--temperature", -1), ("--top-p", 0), ("-n", 0), ("--seed", -1), ("-n", 100_000)])
def test_sampling_out_of_range_is_a_sentence(atoll, base, option, value):
    """The engine's own words, without a traceback."""
    result = atoll("generate", *base, option, value, "hello")
    assert (result.code, result.out) == (1, "")
    assert "error: " in result.err


def test_rows_of_a_file_are_answered_in_order_each_by_its_adapter(atoll, trained, tmp_path):
    """One batch serves rows of different adapters; each gets what it would have got alone."""
    rows = [
        {"text": "a red thing"},
        {"prompt": "a red thing", "adapter": "colours@1"},
        {"prompt": "a red thing", "adapter": None},
        {"messages": [{"role": "user", "content": "a red thing"}], "adapter": ""},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = atoll("generate", "--input", tmp_path / "rows.jsonl", "-a", "colours", *FAST)
    answers = [json.loads(line) for line in result.out.splitlines()]
    assert [answer["index"] for answer in answers] == [0, 1, 2, 3]
    assert [answer["adapter"] for answer in answers] == ["colours@1", "colours@1", None, None]
    assert answers[0]["text"] == answers[1]["text"] == atoll("generate", "-a", "colours", *FAST, "--json", "a red thing").json()["text"]
    assert answers[2]["text"] == answers[3]["text"]
    assert answers[2]["prompt_style"] == "chat"


@pytest.mark.parametrize(
    ("row", "words"),
    [({"other": 1}, "needs 'text'"), ({"prompt": "x", "adapter": 5}, "adapter is 5"), ({"other": 1, "adapter": None}, "there is no prompt")],
)
def test_a_row_that_cannot_be_asked_is_named_before_any_work(atoll, trained, tmp_path, row, words):
    """Half a file of answers is worse than none."""
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "fine"}) + "\n" + json.dumps(row) + "\n")
    result = atoll("generate", "--input", tmp_path / "rows.jsonl", "-a", "colours", *FAST)
    assert (result.code, result.out) == (1, "")
    assert f"{tmp_path}/rows.jsonl:2" in result.err
    assert words in result.err

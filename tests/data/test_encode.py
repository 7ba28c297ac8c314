"""Encoding: right labels, right end, prompts cut and counted, completions never cut."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from atoll.data.encode import encode_examples, percentile, preview, resolve_max_length
from atoll.data.prompt import encode_prompt
from atoll.data.task import Example
from atoll.errors import ConfigError, DataError

EOS, IM_END = 2, 4


@pytest.fixture(scope="module")
def tokenizer(tiny_base_dir: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_base_dir)


@pytest.fixture(scope="module")
def bos_tokenizer(tokenizer: Any) -> Any:
    """The same with a BOS before every text and an EOS after it, as some bases have it."""
    from tokenizers.processors import TemplateProcessing

    framed = copy.deepcopy(tokenizer)
    framed.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    return framed


def example(prompt: str, completion: str, line: int = 1, messages: tuple[dict[str, str], ...] | None = None) -> Example:
    return Example(prompt, completion, {}, f"f.jsonl:{line}", messages)


def chat(*contents: str, line: int = 1) -> Example:
    """A conversation of user and assistant turns, the last content being the answer."""
    turns = tuple({"role": ("user", "assistant")[number % 2], "content": content} for number, content in enumerate(contents[:-1]))
    return example(contents[-2], contents[-1], line, turns)


def test_prompt_and_completion_are_tokenised_apart_and_joined(tokenizer: Any, bos_tokenizer: Any) -> None:
    """Generation starts after the prompt's last token, so training must too; one EOS stands at the end and none in between."""
    row = encode_examples([example("ab", " cé")], tokenizer, None).rows[0]
    prompt, completion = encode_prompt("ab", tokenizer), tokenizer(" cé", add_special_tokens=False)["input_ids"]
    assert row.token_ids == [*prompt, *completion, EOS]
    assert (row.num_prompt, row.first_label, row.num_labels, row.where) == (2, 2, len(completion) + 1, "f.jsonl:1")
    framed = encode_examples([example("ab", " cé")], bos_tokenizer, None).rows[0]
    assert framed.token_ids == [1, *prompt, *completion, EOS]
    assert framed.num_prompt == 3


def test_training_on_the_prompt_makes_all_but_the_first_token_a_label(tokenizer: Any) -> None:
    """Nothing predicts the first token."""
    row = encode_examples([example("ab", "c")], tokenizer, None, train_on_prompt=True).rows[0]
    assert (row.num_prompt, row.first_label, row.num_labels) == (2, 1, 3)


def test_a_long_prompt_loses_its_beginning_and_is_counted(tokenizer: Any) -> None:
    """The end of a prompt holds "Answer:"; rows cut are reported, not hidden."""
    encoded = encode_examples([example("0123456789", "abc", 1), example("0", "abc", 2)], tokenizer, 8)
    cut, whole = encoded.rows
    assert cut.token_ids == [*encode_prompt("6789", tokenizer), *tokenizer("abc", add_special_tokens=False)["input_ids"], EOS]
    assert (len(cut.token_ids), cut.num_prompt, whole.num_prompt) == (8, 4, 1)
    assert (encoded.num_cut, encoded.cut, encoded.max_length) == (1, ("f.jsonl:1",), 8)


def test_a_cut_prompt_keeps_its_bos(bos_tokenizer: Any) -> None:
    """Llama-like bases lose their bearings without it."""
    row = encode_examples([example("0123456789", "abc")], bos_tokenizer, 8).rows[0]
    assert row.token_ids[: row.num_prompt] == encode_prompt("789", bos_tokenizer)


@pytest.mark.parametrize("max_length", [4, 3])
def test_a_completion_is_never_cut(max_length: int, tokenizer: Any) -> None:
    """A truncated answer trains the model to stop early, or leaves no label at all: an error names the row and the numbers."""
    with pytest.raises(DataError) as caught:
        encode_examples([example("p", "a", 1), example("prompt", "abc", 7)], tokenizer, max_length)
    assert caught.value.message == (
        f"f.jsonl:7: the completion has 4 tokens with its end mark, which leaves no room for its prompt of 6 in a length of {max_length}"
    )
    assert "max_length" in caught.value.hint


def test_a_bos_alone_is_no_prompt(bos_tokenizer: Any) -> None:
    """With every word of the prompt cut away the row would teach the answer to nothing."""
    with pytest.raises(DataError, match="no room"):
        encode_examples([example("prompt", "abc")], bos_tokenizer, 5)
    assert encode_examples([example("", "abc")], bos_tokenizer, 5).num_cut == 0


@pytest.mark.parametrize("completion", ["", " ", "\n"])
def test_an_empty_completion_is_named(completion: str, tokenizer: Any) -> None:
    """A row whose only label is EOS teaches the model to say nothing; it is a mistake in the data."""
    with pytest.raises(DataError, match=r"f\.jsonl:5: the completion is empty"):
        encode_examples([example("p", "fine", 1), example("p", completion, 5)], tokenizer, None)


def test_an_empty_prompt_is_named(tokenizer: Any) -> None:
    """Without a token before it the completion's first token cannot be predicted."""
    with pytest.raises(DataError, match=r"f\.jsonl:5: the prompt is empty"):
        encode_examples([example("", "c", 5)], tokenizer, None)


def test_a_chat_row_is_the_templates_own_text(tokenizer: Any) -> None:
    """Prompt and answer joined are the rendered conversation; the white space after the end of turn is the next turn's."""
    turns = chat("hi", "hello", "how are you?", "fine")
    row = encode_examples([turns], tokenizer, None, eos_ids=(EOS, IM_END)).rows[0]
    whole = tokenizer.apply_chat_template([*(turns.messages or ()), {"role": "assistant", "content": "fine"}], tokenize=False)
    assert tokenizer.decode(row.token_ids) == whole.rstrip()
    assert row.token_ids[: row.num_prompt] == encode_prompt(turns.messages or (), tokenizer)
    assert tokenizer.decode(row.token_ids[row.first_label :]) == "fine<|im_end|>"


def test_a_chat_row_ends_in_eos_even_if_its_template_does_not(tokenizer: Any) -> None:
    """A model that is never shown its own EOS never stops; an end of turn that is EOS is not doubled."""
    assert encode_examples([chat("hi", "fine")], tokenizer, None).rows[0].token_ids[-2:] == [IM_END, EOS]
    ending = copy.deepcopy(tokenizer)
    ending.eos_token = "<|im_end|>"
    assert encode_examples([chat("hi", "fine")], ending, None).rows[0].token_ids[-2:] != [IM_END, IM_END]


def test_a_text_prompt_in_a_chat_is_a_user_turn(tokenizer: Any) -> None:
    """`chat: true` and messages of one user turn mean the same."""
    assert encode_examples([example("hi", "fine")], tokenizer, None, chat=True).rows == encode_examples([chat("hi", "fine")], tokenizer, None).rows


def test_a_cut_chat_keeps_the_end_of_its_last_turn(tokenizer: Any) -> None:
    """The generation prompt is the last thing to lose."""
    row = encode_examples([chat("a long question " * 5, "yes")], tokenizer, 40).rows[0]
    assert len(row.token_ids) == 40
    assert tokenizer.decode(row.token_ids).endswith("question <|im_end|>\n<|im_start|>assistant\nyes<|im_end|></s>")


def test_a_base_without_chat_template_or_eos_says_so(tokenizer: Any) -> None:
    """Both would train silently on something else."""
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    with pytest.raises(ConfigError, match="no chat template"):
        encode_examples([chat("hi", "fine")], bare, None)
    bare.eos_token = None
    with pytest.raises(ConfigError, match="no end-of-sequence token"):
        encode_examples([example("hi", "fine")], bare, None)


def test_the_report_counts_tokens_and_lengths(tokenizer: Any) -> None:
    """What the dry run shows: rows, rows cut, tokens of either side, and how long rows are before cutting."""
    encoded = encode_examples([example("p" * length, "ab") for length in range(1, 101)], tokenizer, 53)
    assert encoded.report() == {
        "rows": 100,
        "rows_cut": 50,
        "max_length": 53,
        "prompt_tokens": sum(range(1, 51)) + 50 * 50,
        "completion_tokens": 300,
        "label_tokens": 300,
        "longest_completion": 3,
        "p50": 53,
        "p95": 98,
        "p99": 102,
        "longest": 103,
    }
    assert encoded.num_tokens == sum(len(row.token_ids) for row in encoded.rows)


def test_no_examples_encode_to_no_rows(tokenizer: Any) -> None:
    """A missing validation part is an empty one, all the way."""
    encoded = encode_examples([], tokenizer, None, context=512)
    assert (encoded.rows, encoded.num_tokens, encoded.max_length, encoded.percentile(95)) == ([], 0, 512, 0)


def test_the_p95_length_cuts_a_twentieth_but_never_a_completion(tokenizer: Any) -> None:
    """LoRA Land's rule, applied to prompts: an outlier with a long answer raises the length instead of failing the run."""
    rows = [example("p" * 10, "a" * 5) for _ in range(99)]
    assert encode_examples([*rows, example("p" * 90, "a" * 5)], tokenizer, "p95").report()["rows_cut"] == 1
    outlier = encode_examples([*rows, example("p" * 90, "a" * 40)], tokenizer, "p95", context=512)
    assert (outlier.max_length, outlier.rows[-1].num_prompt) == (42, 1)


def test_a_length_is_a_number_p95_or_the_context() -> None:
    """Each spelling of max_length, and what is refused."""
    lengths = list(range(1, 101))
    assert resolve_max_length(None, lengths, 512) == 512
    assert resolve_max_length(None, lengths, None) == 100
    assert resolve_max_length("p95", lengths, 512) == 95
    assert resolve_max_length("p95", lengths, 64) == 64
    assert resolve_max_length(128, lengths, 512) == 128
    assert [percentile([1, 2, 3, 4], percent) for percent in (0, 25, 50, 51, 100)] == [1, 1, 2, 3, 4]
    with pytest.raises(ConfigError, match="max_length is 1024, but the base's context is 512"):
        resolve_max_length(1024, lengths, 512)
    for wrong in (0, 1, -5, True, "p90", 1.5):
        with pytest.raises(ConfigError, match="max_length is"):
            resolve_max_length(wrong, lengths, 512)  # type: ignore[arg-type]


def test_the_preview_shows_what_is_masked(tokenizer: Any, bos_tokenizer: Any) -> None:
    """The dry run's proof that the loss falls on the answer and its end, and on nothing else."""
    row = encode_examples([example("Say é:", " yes")], bos_tokenizer, None).rows[0]
    assert preview(row, bos_tokenizer) == [("<s>Say é:", False), (" yes</s>", True)]
    prompt_too = encode_examples([example("Say:", " yes")], tokenizer, None, train_on_prompt=True).rows[0]
    assert preview(prompt_too, tokenizer) == [("S", False), ("ay: yes</s>", True)]

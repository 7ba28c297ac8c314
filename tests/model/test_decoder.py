"""model/decoder.py: the native forward gives transformers' logits for every family, in any cut of the work, and refuses what it does not compute."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.adapters import CLOSE, ROWS, decoder_of, packed_logits, reference
from tests.conftest import tiny_config, tiny_model

from atoll.errors import BaseFormatError
from atoll.model.batch import PackedBatch
from atoll.model.decoder import Decoder
from atoll.model.decoder_shape import DecoderShape
from atoll.model.kernels.decoder import compiled

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, untied head": ("llama", {"tie_word_embeddings": False}),
    "llama, as many key heads as heads": ("llama", {"num_key_value_heads": 4}),
    "llama, one key head": ("llama", {"num_key_value_heads": 1}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, a window that it ignores": ("llama", {"sliding_window": 3}),
    "llama, head size of its own": ("llama", {"head_dim": 24}),
    "mistral, window": ("mistral", {"sliding_window": 5}),
    "mistral, no window": ("mistral", {"sliding_window": None, "tie_word_embeddings": True}),
    "qwen2": ("qwen2", {}),
    "qwen2, sliding layers": ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen2, tied head": ("qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "qwen3": ("qwen3", {}),
    "qwen3, sliding layers": ("qwen3", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2, "tie_word_embeddings": True}),
}


@pytest.fixture(params=VARIANTS)
def model(request: pytest.FixtureRequest) -> Any:
    family, changes = VARIANTS[request.param]
    return tiny_model(family, **changes)


@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
def test_packed_rows_have_transformers_logits(model: Any, grad: bool) -> None:
    """The whole product stands on this: the native forward is the model, for each row of a batch as for the row alone."""
    decoder = decoder_of(model)
    with torch.set_grad_enabled(grad):
        for row, logits in zip(ROWS, packed_logits(decoder, ROWS), strict=True):
            torch.testing.assert_close(logits, reference(model, row).detach(), **CLOSE)


@torch.no_grad()
def test_prefill_in_chunks_and_decode_over_the_cache_equal_one_shot(model: Any) -> None:
    """Serving cuts a sequence into chunks and single tokens, beside rows that are elsewhere in theirs; no cut may move a logit."""
    decoder = decoder_of(model)
    cache = decoder.new_cache(num_pages=5)
    places = [[4], [0], [2]]
    rows = [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14], [20, 21, 22, 23], [30, 31, 32, 33] * 3]
    # Each step: how many tokens of each row go in. Chunks, single tokens and idle rows are mixed.
    steps = [(4, 1, 0), (3, 1, 7), (1, 0, 4), (1, 1, 1), (1, 1, 0)]
    found: list[list[torch.Tensor]] = [[], [], []]
    done = [0, 0, 0]
    for step in steps:
        active = [index for index, count in enumerate(step) if count]
        batch = PackedBatch.of(
            [rows[i][done[i] : done[i] + step[i]] for i in active], context=[done[i] for i in active], pages=[places[i] for i in active]
        )
        for i, logits in zip(active, decoder.logits(decoder.forward(batch, cache=cache)).split(batch.lengths), strict=True):
            found[i].append(logits)
            done[i] += step[i]
    assert done == [len(row) for row in rows]
    for row, parts in zip(rows, found, strict=True):
        torch.testing.assert_close(torch.cat(parts), reference(model, row), **CLOSE)


@torch.no_grad()
def test_the_best_token_is_the_largest_logit() -> None:
    """Greedy decoding asks for no logits; what it gets instead must be their maximum."""
    decoder = decoder_of(tiny_model("llama"))
    hidden = decoder.forward(PackedBatch.of(ROWS))
    values, ids = decoder.best(hidden)
    logits = decoder.logits(hidden)
    assert torch.equal(ids, logits.argmax(-1))
    assert torch.equal(values, logits.amax(-1))


@torch.no_grad()
def test_a_row_does_not_feel_what_stands_beside_it() -> None:
    """A leak between packed rows would show other users' text in the answer: the neighbours' tokens must not move a single bit."""
    decoder = decoder_of(tiny_model("llama"))
    first = packed_logits(decoder, [[5, 6, 7], [20, 21, 22, 23], [30, 31]])
    second = packed_logits(decoder, [[9, 9, 9], [20, 21, 22, 23], [8, 8]])
    assert torch.equal(first[1], second[1])


@torch.no_grad()
def test_only_the_asked_states_are_returned() -> None:
    """Prefill wants a row's last token, training the states before labels: the wrong index would train or sample from the wrong place."""
    decoder = decoder_of(tiny_model("llama"))
    rows = ROWS[:3]
    every = decoder.forward(PackedBatch.of(rows))
    torch.testing.assert_close(decoder.forward(PackedBatch.of(rows, outputs="last")), every[[7, 10, 22]], rtol=0, atol=0)
    torch.testing.assert_close(decoder.forward(PackedBatch.of(rows, outputs=[3, 9])), every[[3, 9]], rtol=0, atol=0)


@torch.no_grad()
def test_a_head_in_the_files_wins_over_a_config_that_says_tied() -> None:
    """Some bases are saved with tie_word_embeddings left on although the head was trained apart; transformers uses the head, and so must we."""
    tied, untied = tiny_model("llama"), tiny_model("llama", tie_word_embeddings=False)
    decoder = Decoder.from_state_dict(tied.config, untied.state_dict(), torch.float32)
    torch.testing.assert_close(packed_logits(decoder, [[5, 6, 7]])[0], reference(untied, [5, 6, 7]), **CLOSE)
    shared = decoder_of(tied)
    assert shared.head is shared.embedding, "an equal head is kept once"
    without = {name: tensor for name, tensor in tied.state_dict().items() if name != "lm_head.weight"}
    assert torch.equal(Decoder.from_state_dict(tied.config, without, torch.float32).head, shared.head)


def test_a_family_that_the_forward_does_not_know_is_refused() -> None:
    """Gemma's names are Llama's but its blocks are not: running it would give fluent nonsense."""
    config = tiny_config("llama")
    config.model_type = "gemma"
    with pytest.raises(BaseFormatError, match="'gemma' model, but the native forward runs llama, mistral, qwen2, qwen3") as found:
        DecoderShape.of(config)
    assert "smollm2-135m-instruct" in found.value.hint


def test_another_activation_is_refused() -> None:
    """The forward computes silu; a gelu base would be silently wrong."""
    with pytest.raises(BaseFormatError, match="activation is 'gelu'"):
        DecoderShape.of(tiny_config("llama", hidden_act="gelu"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "lack 'model.layers.1.mlp.up_proj.weight'"),
        (lambda t: t.pop("lm_head.weight"), "lack 'lm_head.weight'"),
        (lambda t: t.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(16)}), "'model.layers.0.self_attn.q_norm.weight' that the native"),
        (lambda t: t.update({"model.norm.weight": torch.ones(63)}), r"'model.norm.weight' has shape \(63,\), but its config says \(64,\)"),
        (
            lambda t: t.update({"model.layers.2.self_attn.q_proj.bias": torch.ones(64)}),
            "bias on some but not all of q_proj, k_proj, v_proj in layer 2",
        ),
        (lambda t: t.update({"model.layers.3.mlp.up_proj.weight": torch.ones(1)}), "'model.layers.3.mlp.up_proj.weight' that the native forward"),
    ],
    ids=["missing", "missing head", "left over", "shape", "half a bias", "one layer too many"],
)
def test_tensors_that_do_not_fit_the_config_are_named(change: Any, message: str) -> None:
    """A tensor that is missing, left over or misshaped means that the files are not the model the config describes."""
    model = tiny_model("llama", tie_word_embeddings=False)
    tensors = dict(model.state_dict())
    change(tensors)
    with pytest.raises(BaseFormatError, match=message):
        Decoder.from_state_dict(model.config, tensors, torch.float32)


def test_old_checkpoints_with_stored_frequencies_load() -> None:
    """Early Llama files carry rotary_emb.inv_freq buffers, which follow from the config; they are no reason to refuse a base."""
    model = tiny_model("llama")
    tensors = {**model.state_dict(), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    assert Decoder.from_state_dict(model.config, tensors, torch.float32).shape.num_layers == 3


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@torch.no_grad()
def test_bfloat16_stays_near_float32(family: str) -> None:
    """The residual stream is kept in float32: bfloat16 may cost a little precision, but not more than it costs transformers."""
    model = tiny_model(family)
    decoder = decoder_of(model, torch.bfloat16)
    exact = [reference(model, row) for row in ROWS]
    ours = [(logits - truth).abs().mean() for logits, truth in zip(packed_logits(decoder, ROWS), exact, strict=True)]
    half = tiny_model(family).to(torch.bfloat16)
    theirs = [(reference(half, row).float() - truth).abs().mean() for row, truth in zip(ROWS, exact, strict=True)]
    assert sum(ours) / len(ours) < 0.01  # the logits' spread is 0.6
    assert sum(ours) <= 1.1 * sum(theirs)


def _embedded_base() -> Path | None:
    """The folder of the embedded base on this machine. conftest.py hides ATOLL_HOME from tests, so this one has a variable of its own."""
    home = Path(os.environ.get("ATOLL_TEST_BASE_HOME", Path("~/.atoll").expanduser()))
    folder = home / "bases" / "smollm2-135m-instruct"
    return folder if (folder / "config.json").is_file() else None


@pytest.mark.slow
@torch.no_grad()
def test_bfloat16_on_the_real_base_drifts_no_more_than_transformers_does() -> None:
    """Thirty layers of a trained model show what three random ones cannot: rounding must stay at or below transformers' own bfloat16."""
    folder = _embedded_base()
    if folder is None:
        pytest.skip(
            "the embedded base is not on this machine: run `atoll pull smollm2-135m-instruct`, or set ATOLL_TEST_BASE_HOME to a home that has it"
        )
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from atoll.model.base import read_tensors

    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = ["The capital of France is Paris, and the capital of Italy is", "def fibonacci(n):\n    if n < 2:\n        return n\n    return"]
    rows = [tokenizer(text).input_ids for text in texts]
    exact_model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    exact = [reference(exact_model, row) for row in rows]
    decoder = Decoder.from_state_dict(exact_model.config, exact_model.state_dict(), torch.float32)
    for truth, logits in zip(exact, packed_logits(decoder, rows), strict=True):
        torch.testing.assert_close(logits, truth, rtol=0, atol=1e-3)  # the logits' spread is about 5
    half = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    theirs = [(reference(half, row).float() - truth).abs().mean() for row, truth in zip(rows, exact, strict=True)]
    decoder = Decoder.from_state_dict(half.config, read_tensors(folder, torch.bfloat16), torch.bfloat16)
    ours = [(logits - truth).abs().mean() for logits, truth in zip(packed_logits(decoder, rows), exact, strict=True)]
    assert sum(ours) <= sum(theirs)
    fast = compiled(decoder)
    if fast is not None:
        pages = [tuple(range(4 * i, 4 * i + 4)) for i in range(len(rows))]
        hidden = fast.forward(PackedBatch.of(rows, pages=pages), cache=fast.new_cache(4 * len(rows)))
        parts = fast.logits(hidden).split([len(row) for row in rows])
        compiled_errors = [(logits - truth).abs().mean() for logits, truth in zip(parts, exact, strict=True)]
        assert sum(compiled_errors) <= sum(theirs)

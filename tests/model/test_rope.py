"""model/rope.py: every scaling of rotary positions means what it means in transformers, and a row decides for itself how long it is."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.adapters import CLOSE, decoder_of, packed_logits, reference
from tests.conftest import tiny_config, tiny_model

from atoll.errors import BaseFormatError
from atoll.model.batch import PackedBatch
from atoll.model.rope import RotaryTable, rotate

TRAINED = 16  # tokens
HALF_HEAD = 8
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": TRAINED},
    "yarn, own attention factor": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": TRAINED,
        "attention_factor": 1.3,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
    },
    "longrope": {
        "rope_type": "longrope",
        "factor": 4.0,
        "original_max_position_embeddings": TRAINED,
        "short_factor": [1.0 + 0.1 * i for i in range(HALF_HEAD)],
        "long_factor": [2.0 + 0.5 * i for i in range(HALF_HEAD)],
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": TRAINED,
    },
}
SHORT, LONG = [5 + i for i in range(TRAINED - 4)], [40 + i for i in range(2 * TRAINED)]  # on both sides of the trained length


def settings(rope: str) -> dict[str, Any]:
    # dynamic measures against max_position_embeddings itself; the others name the trained length beside the stretched one.
    longest = TRAINED if rope == "dynamic" else 4 * TRAINED
    return {"rope_parameters": {"rope_theta": 100.0, **ROPES[rope]}, "max_position_embeddings": longest}


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("rope", ROPES)
@torch.no_grad()
def test_every_scaling_has_transformers_logits_below_and_beyond_the_trained_length(rope: str, family: str) -> None:
    """A wrong frequency shows only far from the beginning of a text, where nobody looks; so rows of both lengths go through, in one batch."""
    decoder = decoder_of(tiny_model(family, **settings(rope)))
    for row, logits in zip([SHORT, LONG], packed_logits(decoder, [SHORT, LONG]), strict=True):
        alone = tiny_model(family, **settings(rope))  # fresh: transformers' dynamic scaling remembers the longest row it has seen
        torch.testing.assert_close(logits, reference(alone, row), **CLOSE)


@pytest.mark.parametrize("rope", sorted(set(ROPES) - {"default"}))
def test_each_scaling_moves_the_angles(rope: str) -> None:
    """Guards the test above: parameters that are silently ignored on both sides would agree."""
    batch = PackedBatch.of([SHORT, LONG])
    plain = RotaryTable(tiny_config("llama", **settings("default")), "cpu").cos_sin(batch)[0]
    scaled = RotaryTable(tiny_config("llama", **settings(rope)), "cpu").cos_sin(batch)[0]
    assert (plain - scaled).abs().max() > 0.1


@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
def test_a_long_neighbour_does_not_change_a_short_row(rope: str) -> None:
    """In transformers the longest row of a batch decides for all; in a server that would make an answer depend on who else is asking."""
    table = RotaryTable(tiny_config("llama", **settings(rope)), "cpu")
    alone, beside = table.cos_sin(PackedBatch.of([SHORT])), table.cos_sin(PackedBatch.of([LONG, SHORT]))
    for one, two in zip(alone, beside, strict=True):
        assert torch.equal(one, two[len(LONG) :])


def test_longrope_switches_by_the_whole_sequence_not_by_the_new_tokens() -> None:
    """A decode step brings one token of a long sequence; by the token alone the row would look short."""
    table = RotaryTable(tiny_config("llama", **settings("longrope")), "cpu")
    cos, _ = table.cos_sin(PackedBatch.of([LONG]))
    step, _ = table.cos_sin(PackedBatch.of([LONG[-1:]], context=[len(LONG) - 1]))
    assert torch.equal(step[0], cos[-1])


def test_a_rotation_keeps_lengths_and_depends_on_distance_only() -> None:
    """What makes it a position embedding: |q| stays, and q(m) · k(n) depends on m - n."""
    table = RotaryTable(tiny_config("llama"), "cpu")
    q, k = torch.randn(2, 1, 16, generator=torch.Generator().manual_seed(0)).split(1)

    def at(x: torch.Tensor, position: int) -> torch.Tensor:
        cos, sin = table.cos_sin(PackedBatch.of([[5]], context=[position]))
        return rotate(x.view(1, 1, 16), cos, sin).view(-1)

    torch.testing.assert_close(at(q, 9).norm(), q.norm())
    torch.testing.assert_close(at(q, 9) @ at(k, 4), at(q, 105) @ at(k, 100), rtol=0, atol=1e-4)


def test_bfloat16_heads_are_rotated_in_float32() -> None:
    """Angles of thousands of radians in bfloat16 would be off by whole turns; only the result may be rounded."""
    cos, sin = RotaryTable(tiny_config("llama"), "cpu").cos_sin(PackedBatch.of([[5] * 300]))
    assert cos.dtype == torch.float32
    x = torch.randn(300, 2, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(rotate(x, cos, sin), rotate(x.float(), cos, sin).bfloat16())


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"rope_type": "proportional"}, "rope_type 'proportional', but Atoll knows default, linear"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "rotates only a part of each head"),
    ],
)
def test_a_scaling_that_the_forward_does_not_compute_is_refused(parameters: dict[str, Any], message: str) -> None:
    """Taking an unknown scaling for the default one would give right short answers and wrong long ones."""
    config = SimpleNamespace(rope_parameters={"rope_theta": 1e4, **parameters}, max_position_embeddings=64, hidden_size=64, num_attention_heads=4)
    with pytest.raises(BaseFormatError, match=message):
        RotaryTable(config, "cpu")


def test_a_prompt_in_chunks_is_rotated_like_the_whole() -> None:
    """The first chunk took the short frequencies and the last the long ones: how a prompt was cut, thus its neighbours, changed its answer."""
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 24, "factor": 4.0}
    rope |= {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    table = RotaryTable(tiny_config("llama", rope_parameters=rope), "cpu")
    whole = table.cos_sin(PackedBatch.of([list(range(40))]))
    first = table.cos_sin(PackedBatch.of([list(range(20))], final_lengths=[40]))
    second = table.cos_sin(PackedBatch.of([list(range(20))], context=[20], final_lengths=[40]))
    for part in range(2):
        assert torch.equal(torch.cat((first[part], second[part])), whole[part])

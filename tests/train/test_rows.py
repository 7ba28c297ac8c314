"""train/rows.py: a beginning that rows share goes in once, and nothing else about a batch changes."""

from __future__ import annotations

import pytest
import torch
from tests.adapters import random_adapter
from tests.train.jobs import toy_decoder, toy_reft

from atoll.data.encode import EncodedRow
from atoll.model.adapter import Adapter
from atoll.model.decoder import Decoder
from atoll.model.loss import label_losses
from atoll.model.positions import Positions
from atoll.train.rows import RowGroup, adapter_batch, pack_groups, shared_beginning
from atoll.train.weights import TrainableAdapter

INSTRUCTION = list(range(10, 34))


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return toy_decoder()


def rows_of(*tails: int, instruction: list[int] = INSTRUCTION) -> list[EncodedRow]:
    """Prompts that begin alike and go on for so many tokens, with completions of 1 to 3 tokens and EOS."""
    return [
        EncodedRow([*instruction, *range(40 + index, 40 + index + tail), *range(5, 6 + index % 3), 2], len(instruction) + tail, f"row {index}")
        for index, tail in enumerate(tails)
    ]


def gradients(decoder: Decoder, adapters: list[Adapter], groups: list[RowGroup]) -> tuple[list[float], list[torch.Tensor], int]:
    jobs = [TrainableAdapter(adapter, decoder.shape.linears) for adapter in adapters]
    packed = pack_groups(groups, "cpu")
    hidden = decoder.forward(packed.batch, adapter_batch(packed, jobs))
    losses = [label_losses(hidden[start:stop], decoder.head, packed.labels[start:stop]).sum() for start, stop in packed.label_spans]
    torch.stack(losses).sum().backward()
    return [float(loss.detach()) for loss in losses], [job.grads for job in jobs], packed.batch.num_tokens


def test_only_what_all_rows_begin_with_is_shared() -> None:
    """And every row keeps a prompt token of its own, whose state predicts its first label."""
    rows = rows_of(3, 5, 4, 2)
    assert shared_beginning(rows) == 24
    assert shared_beginning([*rows, *rows_of(3, instruction=[*INSTRUCTION[:20], 99])]) == 20
    same = [EncodedRow([*INSTRUCTION, 5, 2], 24, "a")] * 4
    assert shared_beginning(same) == 23


@pytest.mark.parametrize(
    "rows",
    [rows_of(3), rows_of(3, 3, instruction=INSTRUCTION[:9]), [EncodedRow([*INSTRUCTION, 5, 2], 24, "a", train_on_prompt=True)] * 4],
    ids=["one row", "a few tokens", "labels in the prompt"],
)
def test_nothing_is_shared_where_it_would_not_pay_or_not_be_the_same(rows: list[EncodedRow]) -> None:
    """One more block of attention costs more than some tokens; a label in the beginning counts once for every row."""
    assert shared_beginning(rows) == 0


def test_tokens_that_only_some_rows_edit_are_not_shared() -> None:
    """l<n> reaches into the instruction of a short prompt and not of a long one; f<n> is the same everywhere until prompts are very short."""
    rows = rows_of(1, 9, 9, 9)
    assert shared_beginning(rows, [Positions(first=2, last=1)]) == 24
    assert shared_beginning(rows, [Positions(last=4)]) == 21
    assert shared_beginning(rows, [Positions(all_prompt=True)]) == 24


@pytest.mark.parametrize("kind", ["lora", "reft", "both"])
def test_losses_and_gradients_are_those_of_rows_with_copies(decoder: Decoder, kind: str) -> None:
    """Sharing is an optimisation: the sums over rows come out of one row's backward."""
    adapters = {
        "lora": lambda: random_adapter(decoder, 4),
        "reft": lambda: toy_reft(positions=Positions(first=3, last=2)),
        "both": lambda: toy_reft(lora=3, positions=Positions(first=1, last=1)),
    }
    adapter = adapters[kind]()
    rows = rows_of(3, 5, 4, 2, 7)
    shared = shared_beginning(rows, [spec.positions for spec in adapter.spec.reft])
    assert shared == 24
    truth, expected, all_tokens = gradients(decoder, [adapter], [RowGroup(rows)])
    losses, grads, tokens = gradients(decoder, [adapter], [RowGroup(rows, shared)])
    assert tokens == all_tokens - 4 * 24
    assert losses == pytest.approx(truth, rel=1e-5)
    torch.testing.assert_close(grads[0], expected[0], rtol=0, atol=1e-5 * float(expected[0].abs().max()))


def test_groups_of_several_jobs_do_not_meet(decoder: Decoder) -> None:
    """Each has its own beginning, adapter, and gradients."""
    adapters = [random_adapter(decoder, 4, seed=1), toy_reft(positions=Positions(first=2, last=2)), random_adapter(decoder, 2, seed=2)]
    groups = [RowGroup(rows_of(3, 5, 4), 24), RowGroup(rows_of(2, 2, 8), 24), RowGroup(rows_of(6, instruction=[7, 8]))]
    losses, grads, _ = gradients(decoder, adapters, groups)
    for index, (adapter, group) in enumerate(zip(adapters, groups, strict=True)):
        truth, expected, _ = gradients(decoder, [adapter], [group])
        assert losses[index] == pytest.approx(truth[0], rel=1e-5)
        torch.testing.assert_close(grads[index], expected[0], rtol=0, atol=1e-5 * float(expected[0].abs().max()))

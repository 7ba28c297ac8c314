"""BERT and RoBERTa as classifiers: log-odds, gradients and files are PEFT's."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.adapters import CLOSE, ROWS
from tests.families import encoder_model, write_encoder_base

from atoll.data.encode import EncodedRow
from atoll.model.adapter_files import read_adapter, write_adapter
from atoll.model.base import load_base
from atoll.model.batch import AdapterBatch, PackedBatch, Segment
from atoll.model.encoder import EncoderClassifier
from atoll.model.sites import peft_key
from atoll.train.rows import RowGroup, adapter_batch, pack_groups
from atoll.train.weights import TrainableAdapter

TARGETS = ["query", "value", "attention.output.dense", "intermediate.dense"]


def peft_classifier(family: str, seed: int = 5, **options: Any) -> Any:
    """PEFT's own LoRA with a classifier over the toy encoder, its B moved away from zero."""
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = get_peft_model(encoder_model(family), LoraConfig(task_type="SEQ_CLS", r=4, target_modules=TARGETS, **options))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                parameter.normal_(0, 0.1, generator=generator)
    return theirs.eval()


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_what_peft_saved_gives_its_logits_beside_other_rows(family: str, tmp_path: Path) -> None:
    """Head and factors of PEFT's folder, in a packed batch of rows of other lengths and of another adapter with other classes."""
    theirs = peft_classifier(family)
    theirs.save_pretrained(tmp_path / "theirs")
    adapter, decoder = read_adapter(tmp_path / "theirs"), EncoderClassifier(encoder_model(family))
    adapter.check_fits(decoder.shape.linears, decoder.shape.num_layers)
    assert adapter.spec.classifies and len(adapter.head) == len(decoder.head_shapes(3))
    slot = decoder.new_bank().load(adapter)
    batch = PackedBatch.of(ROWS, outputs="last")
    segments = (Segment(0, batch.row_starts[2], slot), Segment(batch.row_starts[3], batch.num_tokens, slot))
    with torch.no_grad():
        found = decoder.forward(batch, AdapterBatch(segments))
        for place in (0, 1, 3):
            assert found[place, 3:].isneginf().all()
            torch.testing.assert_close(found[place, :3], theirs(torch.tensor([ROWS[place]])).logits[0], **CLOSE)
    assert not found[2].any()  # the base alone knows no classes
    write_adapter(tmp_path / "ours", adapter)
    again = read_adapter(tmp_path / "ours")
    assert again.spec == adapter.spec and all(torch.equal(again.head[name], tensor) for name, tensor in adapter.head.items())
    reloaded = of_peft(family, tmp_path / "ours")
    with torch.no_grad():
        torch.testing.assert_close(reloaded(torch.tensor([ROWS[0]])).logits, theirs(torch.tensor([ROWS[0]])).logits, **CLOSE)


def of_peft(family: str, folder: Path, num_labels: int = 3) -> Any:
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(encoder_model(family, num_labels=num_labels), folder).eval()


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_gradients_of_factors_and_head_are_pefts(family: str, tmp_path: Path) -> None:
    """A training batch: a row's class is its last number, and the loss is cross-entropy over its adapter's classes."""
    theirs = peft_classifier(family)
    theirs.save_pretrained(tmp_path / "theirs")
    decoder, classes = EncoderClassifier(encoder_model(family)), [2, 0, 1]
    weights = TrainableAdapter(read_adapter(tmp_path / "theirs"), decoder.shape.linears, groups=decoder.shape.groups)
    rows = [EncodedRow([*row, number], len(row), "") for row, number in zip(ROWS[:3], classes, strict=True)]
    packed = pack_groups([RowGroup(rows)], "cpu")
    loss = decoder.label_losses(decoder.forward(packed.batch, adapter_batch(packed, [weights])), packed.labels).sum()
    loss.backward()
    expected = sum(F.cross_entropy(theirs(torch.tensor([row])).logits, torch.tensor([number])) for row, number in zip(ROWS[:3], classes, strict=True))
    assert isinstance(expected, torch.Tensor)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    grads = {name: parameter.grad for name, parameter in theirs.named_parameters() if parameter.grad is not None}
    ours = weights.adapter(weights.grads)
    for site, module in ours.modules.items():
        for factor, found in (("A", module.a), ("B", module.b)):
            torch.testing.assert_close(found, grads[peft_key(site, factor).replace(".weight", ".default.weight")], rtol=1e-4, atol=2e-5)
    for name, found in ours.head.items():
        wanted = grads[f"base_model.model.{name.replace('classifier.', 'classifier.modules_to_save.default.', 1)}"]
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=2e-5)


def test_a_base_folder_without_a_classifier_is_loaded(tmp_path: Path) -> None:
    """The usual encoder has none; the adapter brings it."""
    base = load_base(str(write_encoder_base(tmp_path / "base", "roberta")), dtype="float32")
    assert base.decoder.classifies and base.context_length == 511

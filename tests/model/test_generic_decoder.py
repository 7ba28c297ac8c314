"""Other families than Llama's, by transformers' blocks: equal to transformers and PEFT, packed, cached, edited and trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.adapters import CLOSE, ROWS, new_peft_model, packed_logits, peft_model, random_adapter, random_reft, reference
from tests.families import FAMILIES, family_model, write_family_base

from atoll.errors import ConfigError
from atoll.model.adapter_files import read_adapter, write_adapter
from atoll.model.base import load_base
from atoll.model.batch import AdapterBatch, PackedBatch
from atoll.model.generic_decoder import GenericDecoder
from atoll.model.kv_cache import PAGE_TOKENS
from atoll.model.loss import label_losses
from atoll.model.positions import Positions
from atoll.model.sharded import Share
from atoll.model.sites import peft_key
from atoll.reft.convert import from_adapter, locations
from atoll.train.weights import TrainableAdapter

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set")  # PEFT says so of every Conv1D


def weights_of(decoder: GenericDecoder, adapter: Any) -> TrainableAdapter:
    return TrainableAdapter(adapter, decoder.shape.linears, groups=decoder.shape.groups)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_give_transformers_logits(family: str) -> None:
    """Rows of one batch must not see each other, and windows, scales and caps are the family's own."""
    theirs, decoder = family_model(family), GenericDecoder(family_model(family))
    for row, found in zip(ROWS, packed_logits(decoder, ROWS), strict=True):
        torch.testing.assert_close(found, reference(theirs, row), **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_pefts(family: str, tmp_path: Path) -> None:
    """The adapter's files are read by PEFT, and give its logits and its gradients in float32."""
    decoder = GenericDecoder(family_model(family))
    adapter = random_adapter(decoder, 4, target_modules=tuple(dict.fromkeys(t.rsplit(".", 1)[-1] for t in decoder.shape.linears)))
    adapter = replace(adapter, spec=replace(adapter.spec, fan_in_fan_out=decoder.shape.fan_in_fan_out))
    theirs = peft_model(family_model(family), adapter, tmp_path / "adapter")
    weights = weights_of(decoder, adapter)
    batch = PackedBatch.of([row[:-1] for row in ROWS[:3]])
    hidden = decoder.forward(batch, AdapterBatch.single(weights, batch.num_tokens))
    labels = torch.tensor([token for row in ROWS[:3] for token in row[1:]])
    loss = label_losses(hidden, decoder.head, labels, decoder.softcap).sum()
    loss.backward()
    expected = torch.tensor(0.0)
    for row in ROWS[:3]:
        expected = expected + F.cross_entropy(reference(theirs, row)[:-1].float(), torch.tensor(row[1:]), reduction="sum")
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    grads = {name: parameter.grad for name, parameter in theirs.named_parameters() if parameter.grad is not None}
    ours = weights.adapter(weights.grads)
    assert len(grads) == 2 * len(ours.modules)
    for site, module in ours.modules.items():
        for factor, found in (("A", module.a), ("B", module.b)):
            wanted = grads[peft_key(site, factor).replace(".weight", ".default.weight")]
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_that_peft_saved_is_read_and_written_as_it_was(family: str, tmp_path: Path) -> None:
    """Names of tensors and the config are PEFT's: what it saves, gives its logits here and comes out with the same bytes of weights."""
    model = new_peft_model(family_model(family), r=3, target_modules="all-linear")
    model.save_pretrained(tmp_path / "theirs")
    adapter = read_adapter(tmp_path / "theirs")
    decoder = GenericDecoder(family_model(family))
    assert adapter.spec.fan_in_fan_out == decoder.shape.fan_in_fan_out
    adapter.check_fits(decoder.shape.linears, decoder.shape.num_layers)
    found = packed_logits(decoder, ROWS[:2], [decoder.new_bank().load(adapter)] * 2)
    with torch.no_grad():
        for row, logits in zip(ROWS[:2], found, strict=True):
            torch.testing.assert_close(logits, reference(model, row), **CLOSE)
    write_adapter(tmp_path / "ours", adapter)
    again = read_adapter(tmp_path / "ours")
    assert again.spec == adapter.spec
    assert all(torch.equal(again.modules[site].a, module.a) for site, module in adapter.modules.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cached_row_gives_the_logits_of_the_whole(family: str) -> None:
    """A prompt in chunks and then token by token, beside another row and under an adapter, is the row computed at once."""
    decoder = GenericDecoder(family_model(family))
    slot = decoder.new_bank().load(random_adapter(decoder, 4, target_modules=tuple(t.rsplit(".", 1)[-1] for t in decoder.shape.linears)))
    row = [(7 * i) % 300 + 5 for i in range(PAGE_TOKENS + 20)]
    whole = packed_logits(decoder, [row], [slot])[0]
    cache = decoder.new_cache(4)
    done = 0
    with torch.inference_mode():
        for count in (9, 21, 1, 1, 3, len(row) - 35):
            batch = PackedBatch.of([row[done : done + count]], context=[done], pages=[[1, 3]])
            found = decoder.logits(decoder.forward(batch, AdapterBatch.single(slot, count), cache))
            torch.testing.assert_close(found, whole[done : done + count], **CLOSE)
            done += count


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "gemma2", "phi3"])
@pytest.mark.parametrize("component", ["block_input", "attention_output", "mlp_input", "block_output"])
def test_edits_are_pyrefts_interventions(family: str, component: str) -> None:
    """What our edits change at a place is what atoll.reft, which follows PyReFT, changes there on the plain transformers model."""
    decoder = GenericDecoder(family_model(family))
    adapter = random_reft(decoder, rank=2, layers=(0, 2), component=component, positions=Positions.parse("f2+l1"))
    theirs = from_adapter(adapter, family_model(family))
    slot = decoder.new_bank().load(adapter)
    for row, found in zip(ROWS[:3], packed_logits(decoder, ROWS[:3], [slot] * 3), strict=True):
        places = {"sources->base": (None, locations(adapter, [len(row)]))}
        with torch.no_grad():
            wanted = theirs({"input_ids": torch.tensor([row])}, unit_locations=places)[1].logits[0]
        torch.testing.assert_close(found, wanted, **CLOSE)
        assert not torch.allclose(found, packed_logits(decoder, [row])[0], atol=1e-3)


def test_a_base_folder_of_another_family_is_loaded(tmp_path: Path) -> None:
    """load_base takes the family from the config, and its fingerprint sees a change of what the forward computes."""
    base = load_base(str(write_family_base(tmp_path / "a", "gpt2")), dtype="float32")
    other = load_base(str(write_family_base(tmp_path / "b", "gpt2", layer_norm_epsilon=1e-3)), dtype="float32")
    torch.testing.assert_close(packed_logits(base.decoder, ROWS)[0], reference(family_model("gpt2"), ROWS[0]), **CLOSE)
    assert base.context_length == 512
    assert base.fingerprint.weights == other.fingerprint.weights
    assert base.fingerprint.config_hash != other.fingerprint.config_hash


def test_a_base_of_another_family_is_not_shared_out(tmp_path: Path) -> None:
    """Each process would hold all of it, which nobody who asks for fsdp expects."""
    share = Share(0, 2, lambda out, part: pytest.fail("nothing is gathered"))
    with pytest.raises(ConfigError, match=r"trainer\.fsdp shares out the blocks of Llama's family, but the base is a 'gpt2' model"):
        load_base(str(write_family_base(tmp_path / "a", "gpt2")), share=share)

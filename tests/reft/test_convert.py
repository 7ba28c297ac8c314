"""Adapters of ours and ReftModels are the same edits: logits agree, in both directions, and with PyReFT's folders."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.adapters import CLOSE, ROWS, decoder_of, packed_logits, random_adapter, random_reft
from tests.conftest import tiny_model
from tests.written_reft import EVERY_FORM
from torch import Tensor

import atoll.reft as pyreft
from atoll.errors import ConfigError, UnsupportedAdapter
from atoll.model.adapter import Adapter
from atoll.model.adapter_files import read_adapter, write_adapter
from atoll.model.decoder import Decoder
from atoll.model.positions import Positions
from atoll.model.reft import COMPONENTS, EditSite, ReftSpec
from atoll.reft import importer, unpickle
from atoll.reft.convert import from_adapter, import_adapter, locations, native_site, to_adapter
from pyreft_files import METHODS, write_folder

PLACES = Positions.parse("f2+l3")


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return decoder_of(tiny_model("llama"))


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The files of this test are harmless: read them in this process, since starting another takes seconds."""
    monkeypatch.setattr(importer, "_in_a_process", lambda job, folder, wall_s: unpickle.convert(job["files"], job["out"]))


def native(decoder: Decoder, adapter: Adapter) -> list[Tensor]:
    slot = decoder.new_bank().load(adapter)
    with torch.no_grad():
        return packed_logits(decoder, ROWS, [slot] * len(ROWS))


def edited(reft_model: Any, adapter: Adapter) -> list[Tensor]:
    """A ReftModel's logits of each row, edited where the adapter says."""
    reft_model.eval()
    found = []
    for row in ROWS:
        places = {"sources->base": (None, locations(adapter, [len(row)]))}
        with torch.no_grad():
            found.append(reft_model({"input_ids": torch.tensor([row])}, unit_locations=places)[1].logits[0])
    return found


def assert_same(one: list[Tensor], other: list[Tensor]) -> None:
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


def unedited(decoder: Decoder) -> list[Tensor]:
    with torch.no_grad():
        return packed_logits(decoder, ROWS)


@pytest.mark.parametrize("form", EVERY_FORM, ids=str)
def test_an_adapter_and_its_reft_model_give_the_same_logits(decoder: Decoder, form: dict[str, Any]) -> None:
    if form.get("weight", 1) != 1 and form.get("activation") and form["method"] in ("loreft", "noreft"):
        pytest.skip("refused, see below")
    adapter = random_reft(decoder, **{"positions": PLACES, "layers": (0, 2), **form})
    model = from_adapter(adapter, tiny_model("llama"))
    expected = native(decoder, adapter)
    assert_same(edited(model, adapter), expected)
    assert not torch.allclose(expected[0], unedited(decoder)[0], atol=1e-3)
    assert_same(native(decoder, to_adapter(model, "tiny", "f2+l3")), expected)


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("tied", [True, False])
def test_every_place_and_both_sides_carry_over(decoder: Decoder, component: str, tied: bool) -> None:
    adapter = random_reft(decoder, positions=PLACES, tied=tied, component=component, rank=3, rank_pattern={1: 5})
    model = from_adapter(adapter, tiny_model("llama"))
    assert len(model.interventions) == (3 if tied else 6)
    assert_same(edited(model, adapter), native(decoder, adapter))
    back = to_adapter(model, "tiny", "f2+l3")
    assert back.spec.reft == (ReftSpec(rank=5, layers=(0, 1, 2), component=component, positions=PLACES, tied=tied, rank_pattern={0: 3, 2: 3}),)
    assert set(back.edits) == set(adapter.edits)
    for site, found in adapter.edits.items():
        for name, tensor in found.tensors.items():
            assert torch.equal(back.edits[site].tensors[name], tensor), (site, name)


def test_a_model_trained_here_is_served_from_files(decoder: Decoder, tmp_path: Path) -> None:
    """The whole way: build with PyReFT's names, convert, write, read strictly, run in the shared forward."""
    representations = [
        {"layer": layer, "component": "block_output", "intervention": pyreft.LoreftIntervention(embed_dim=64, low_rank_dimension=4)}
        for layer in (0, 1)
    ]
    model = pyreft.get_reft_model(tiny_model("llama"), pyreft.ReftConfig(representations=representations))
    optimizer = torch.optim.SGD(model.interventions.parameters(), lr=1.0)
    model({"input_ids": torch.tensor([ROWS[0]])}, labels=torch.tensor([ROWS[0]]))[1].loss.backward()
    optimizer.step()  # nobody retracts here: to_adapter must
    adapter = to_adapter(model, "tiny", "l2")
    write_adapter(tmp_path, adapter)
    read = read_adapter(tmp_path)
    assert read.spec.kind == "reft"
    assert_same(native(decoder, read), edited(model, adapter))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_lora_goes_with_the_edits(decoder: Decoder, tmp_path: Path) -> None:
    adapter = random_reft(decoder, lora=4, positions=PLACES)
    model = from_adapter(adapter, tiny_model("llama"))
    expected = native(decoder, adapter)
    assert_same(edited(model, adapter), expected)
    back = to_adapter(model, "tiny", "f2+l3")
    assert back.spec.kind == "lora+reft"
    assert set(back.modules) == set(adapter.modules)
    assert_same(native(decoder, back), expected)


def test_parts_that_edit_other_tokens_become_interventions_in_order(decoder: Decoder) -> None:
    first, last = ReftSpec(positions=Positions.parse("f2")), ReftSpec(method="direft", positions=Positions.parse("l2"), layers=(1,))
    adapter = random_adapter(decoder, 4, reft=(first, last), target_modules=())
    assert_same(edited(from_adapter(adapter, tiny_model("llama")), adapter), native(decoder, adapter))
    twice = random_adapter(decoder, 4, reft=(first, ReftSpec(positions=Positions.parse("f1"))), target_modules=())
    with pytest.raises(UnsupportedAdapter, match="edit the same tokens"):
        from_adapter(twice, tiny_model("llama"))


def test_a_weighted_edit_with_a_bend_between_has_no_pyreft_form(decoder: Decoder) -> None:
    adapter = random_reft(decoder, activation="silu", weight=0.5)
    with pytest.raises(UnsupportedAdapter, match="weighted loreft"):
        from_adapter(adapter, tiny_model("llama"))


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("method", METHODS)
def test_pyrefts_folder_runs_in_the_shared_forward(decoder: Decoder, tmp_path: Path, method: str) -> None:
    write_folder(tmp_path, [(method, 0, "block_output"), (method, 2, "block_output")])
    adapter = import_adapter(tmp_path, "tiny", "f2+l3")
    loaded = pyreft.ReftModel.load(str(tmp_path), tiny_model("llama"))
    assert_same(native(decoder, adapter), edited(loaded, adapter))
    assert adapter.spec.reft[0].method == method
    write_adapter(tmp_path / "ours", adapter)
    assert_same(native(decoder, read_adapter(tmp_path / "ours")), native(decoder, adapter))


@pytest.mark.usefixtures("here")
def test_layers_listed_twice_are_the_two_sides(tmp_path: Path) -> None:
    tensors = write_folder(tmp_path, [("loreft", layer, "block_output") for layer in (0, 2, 0, 2)])
    adapter = import_adapter(tmp_path, "tiny", "f2+l3")
    assert not adapter.spec.reft[0].tied
    for number, (layer, side) in enumerate([(0, 0), (2, 0), (0, 1), (2, 1)]):
        assert torch.equal(adapter.edits[EditSite(0, layer, "block_output", side)].r, tensors[number]["r"])
    with pytest.raises(ConfigError, match="positions l1 have one side"):
        import_adapter(tmp_path, "tiny", "l1")
    write_folder(tmp_path / "odd", [("loreft", layer, "block_output") for layer in (0, 2, 0)])
    with pytest.raises(UnsupportedAdapter, match=r"0: 2, 2: 1"):
        import_adapter(tmp_path / "odd", "tiny", "f2+l3")


@pytest.mark.usefixtures("here")
def test_positions_that_nobody_gave_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_folder(tmp_path, [("loreft", 0, "block_output")])
    with caplog.at_level(logging.WARNING):
        adapter = import_adapter(tmp_path, "tiny")
    assert "does not say which positions were trained; taken to be f7+l7" in caplog.text
    assert adapter.spec.reft[0].positions == Positions(7, 7)


@pytest.mark.usefixtures("here")
def test_an_r_that_pyrefts_resumed_training_bent_keeps_its_logits(decoder: Decoder, tmp_path: Path) -> None:
    """Its R is not orthonormal any more, which a loreft's must be: the same formula with a free R takes it."""
    for method, free in (("loreft", "noreft"), ("orthogonal_direft", "direft"), ("consreft", "noreft"), ("lobireft", "direft")):
        folder = tmp_path / method
        tensors = write_folder(folder, [(method, 1, "block_output")])[0]
        file = next(folder.glob("*.bin"))
        state = torch.load(file, weights_only=True)
        name = "rotate_layer" if method == "loreft" else "rotate_layer.parametrizations.weight.0.base"
        torch.save({**state, name: state[name] * 1.1}, file)
        adapter = import_adapter(folder, "tiny", "f2+l3")
        assert adapter.spec.reft[0].method == free
        torch.testing.assert_close(adapter.edits[EditSite(0, 1, "block_output", 0)].r, 1.1 * tensors["r"])
        loaded = pyreft.ReftModel.load(str(folder), tiny_model("llama"))
        assert_same(native(decoder, adapter), edited(loaded, adapter))
        write_adapter(folder / "ours", adapter)
        read_adapter(folder / "ours")


def test_places_are_found_by_name_and_by_path() -> None:
    assert native_site(3, "block_output") == (3, "block_output")
    assert native_site(None, "model.layers[7].output") == (7, "block_output")
    assert native_site(None, "base_model.model.model.layers[0].self_attn.input") == (0, "attention_input")
    assert native_site(None, "model.layers[2].mlp.output") == (2, "mlp_output")
    for layer, component in ((None, "roberta.encoder.layer[3].output"), (1, "mlp_activation"), (None, "model.layers[2].mlp.gate_proj.output")):
        with pytest.raises(UnsupportedAdapter, match="cannot be edited in Atoll's own forward"):
            native_site(layer, component)


def test_what_has_no_form_in_files_is_refused() -> None:
    class Mine(pyreft.LoreftIntervention):
        pass

    def model(*interventions: Any) -> Any:
        entries = [{"layer": 0, "component": "block_output", "intervention": intervention} for intervention in interventions]
        return pyreft.get_reft_model(tiny_model("llama"), pyreft.ReftConfig(representations=entries))

    size = {"embed_dim": 64, "low_rank_dimension": 2}
    with pytest.raises(UnsupportedAdapter, match="Mine is a class of its own"):
        to_adapter(model(Mine(**size)), "tiny", "l1")
    with pytest.raises(UnsupportedAdapter, match="act_fn is 'mish'"):
        to_adapter(model(pyreft.LoreftIntervention(**size, act_fn="mish")), "tiny", "l1")
    with pytest.raises(UnsupportedAdapter, match="interventions of two kinds"):
        to_adapter(model(pyreft.LoreftIntervention(**size), pyreft.LobireftIntervention(**size)), "tiny", "l1")
    shared = pyreft.LoreftIntervention(**size)
    assert to_adapter(model(shared, shared), "tiny", "f1+l1").spec.reft[0].tied

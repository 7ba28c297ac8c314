"""model/reft_files.py: edits on disk, bit for bit there and back; what is hostile, incomplete or of something else is refused in one sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.adapters import decoder_of, random_adapter, random_reft
from tests.conftest import tiny_model
from tests.damaged import change_config, change_header, change_tensors, refused
from tests.written_reft import EVERY_FORM

from atoll.errors import AdapterFormatError, AtollError, UnsupportedAdapter
from atoll.model import reft_files
from atoll.model.adapter import Adapter
from atoll.model.adapter_files import CONFIG_FILE, WEIGHTS_FILE, read_adapter, write_adapter
from atoll.model.composed import cat
from atoll.model.decoder import Decoder
from atoll.model.positions import Positions
from atoll.model.reft import MAX_PARTS, Intervention, ReftSpec
from atoll.model.sites import Site, peft_key

R0 = "reft.0.layers.0.block_output.both.r"


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return decoder_of(tiny_model("llama"))


@pytest.fixture
def folder(decoder: Decoder, tmp_path: Path) -> Path:
    """A LoReFT of rank 4 on three layers, to damage."""
    write_adapter(tmp_path / "adapter", random_reft(decoder))
    return tmp_path / "adapter"


@pytest.fixture
def both(decoder: Decoder, tmp_path: Path) -> Path:
    """The same beside a LoRA."""
    write_adapter(tmp_path / "both", random_reft(decoder, lora=2))
    return tmp_path / "both"


def same(one: Adapter, other: Adapter) -> bool:
    def tensors(adapter: Adapter) -> dict[Any, torch.Tensor]:
        lora = {(site, name): getattr(module, name) for site, module in adapter.modules.items() for name in "ab"}
        return lora | {(site, name): tensor for site, found in adapter.edits.items() for name, tensor in found.tensors.items()}

    mine, its = tensors(one), tensors(other)
    return one.spec == other.spec and mine.keys() == its.keys() and all(torch.equal(mine[k], its[k]) and mine[k].dtype == its[k].dtype for k in mine)


# --- there and back -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [0, 4])
@pytest.mark.parametrize(
    "part",
    [
        *EVERY_FORM,
        {"tied": False},
        {"tied": False, "positions": Positions(last=1)},
        {"positions": Positions(listed=(0, 3, -1)), "layers": (2, 0), "rank_pattern": {2: 7}, "dropout": 0.05},
        {"positions": Positions(all_prompt=True), "component": "attention_input", "rank": 1},
    ],
    ids=str,
)
def test_every_field_and_bit_comes_back(decoder: Decoder, part: dict[str, Any], lora: int, tmp_path: Path) -> None:
    """PyReFT loses dtype, activation, dropout and bias on the way to disk (and then cannot load); here all of a spec is written, and canonical."""
    adapter = random_reft(decoder, lora=lora, **part)
    write_adapter(tmp_path / "one", adapter)
    back = read_adapter(tmp_path / "one")
    assert same(back, adapter)
    back.check_fits(decoder.shape.linears, decoder.shape.num_layers)
    write_adapter(tmp_path / "two", back)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_tensors_stay_narrow_and_pass_as_orthonormal(decoder: Decoder, dtype: torch.dtype, tmp_path: Path) -> None:
    """Rounding bends R a little; that is no reason to refuse, and no reason to write other bits than were read."""
    adapter = random_reft(decoder, rank=8)
    cast = {site: Intervention(**{name: tensor.to(dtype) for name, tensor in found.tensors.items()}) for site, found in adapter.edits.items()}
    narrow = replace(adapter, edits=cast)
    write_adapter(tmp_path, narrow)
    assert same(read_adapter(tmp_path), narrow)


def test_the_form_on_disk_is_pinned(decoder: Decoder, tmp_path: Path) -> None:
    """Files outlive the program: names of keys and tensors may not move without a new atoll_format."""
    write_adapter(tmp_path, random_reft(decoder, rank=2, layers=(1,), tied=False, method="noreft", bias=True))
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    part = {
        "method": "noreft",
        "rank": 2,
        "layers": [1],
        "component": "block_output",
        "positions": "f7+l7",
        "tied": False,
        "activation": None,
        "dropout": 0.0,
        "bias": True,
        "rank_pattern": {},
        "weight": 1.0,
    }
    assert config == {"peft_type": "REFT", "base_model_name_or_path": "tiny", "reft": [part], "atoll_format": 1}
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(tmp_path / WEIGHTS_FILE).items()}
    sides = {"r": (2, 64), "w": (2, 64), "b": (2,), "c": (2,)}
    assert shapes == {f"reft.0.layers.1.block_output.{side}.{name}": shape for side in ("prefix", "suffix") for name, shape in sides.items()}


def test_a_lora_is_written_as_before_and_peft_refuses_one_with_edits(decoder: Decoder, both: Path, tmp_path: Path) -> None:
    """PEFT applying the LoRA half of an adapter would be silently wrong; a LoRA alone stays PEFT's, without a key of ours."""
    from peft import PeftModel

    write_adapter(tmp_path / "lora", random_adapter(decoder, 2))
    config, lora = (json.loads((folder / CONFIG_FILE).read_text()) for folder in (both, tmp_path / "lora"))
    assert not {"reft", "atoll_format"} & set(lora)
    assert {key: value for key, value in config.items() if key not in ("reft", "atoll_format")} == {**lora, "peft_type": "LORA_REFT", "lora_alpha": 4}
    with pytest.raises((KeyError, ValueError)):
        PeftModel.from_pretrained(tiny_model("llama"), both)


def test_the_largest_composition_fits_the_header(decoder: Decoder, tmp_path: Path) -> None:
    """What can be composed and stored must be readable: as many parts as there may be, untied, on all layers."""
    apart = [random_reft(decoder, seed, rank=1, tied=False, positions=Positions(seed, 2)) for seed in range(1, MAX_PARTS + 1)]
    merged = cat(apart, [1.0] * MAX_PARTS)
    assert len(merged.spec.reft) == MAX_PARTS
    write_adapter(tmp_path, merged)
    assert same(read_adapter(tmp_path), merged)
    header = (tmp_path / WEIGHTS_FILE).read_bytes()[:8]
    assert int.from_bytes(header, "little") / 3 * 80 < 2**21, "80 layers of it"


# --- tensors --------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["folder", "both"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(R0), ("has no tensor", R0)),
        (lambda t: [t.pop(name) for name in list(t) if ".layers.1." in name and name.startswith("reft.")], ("has no tensor reft.0.layers.1",)),
        (lambda t: t.update({R0.replace("both.r", "both.c"): torch.zeros(4)}), ("has a tensor that its config does not cover", "both.c")),
        (lambda t: t.update({R0.replace("both", "prefix"): torch.zeros(4, 64)}), ("does not cover", "prefix.r")),
        (lambda t: t.update({R0.replace("reft.0", "reft.1"): torch.zeros(4, 64)}), ("does not cover", "reft.1.")),
        (lambda t: t.update({R0.replace("layers.0", "layers.9"): torch.zeros(4, 64)}), ("layers.",)),
        (lambda t: t.update({R0: torch.zeros(5, 64)}), (R0, "has shape (5, 64), but", "say (4, 64)")),
        (lambda t: t.update({R0: torch.zeros(256)}), (R0, "has shape (256,)")),
        (lambda t: t.update({R0: torch.zeros(4, 0)}), (R0, "has shape")),
        (lambda t: t.update({R0.replace("layers.0", "layers.1"): torch.eye(4, 32)}), ("layers.1", "has shape (4, 32)")),
        (lambda t: t.update({R0.replace(".r", ".b"): torch.zeros(4, 1)}), ("both.b has shape (4, 1)",)),
        (lambda t: t[R0].view(-1)[-1:].fill_(float("nan")), (R0, "not finite")),
        (lambda t: t[R0.replace(".r", ".b")].fill_(float("inf")), ("both.b", "not finite")),
        (lambda t: t[R0].mul_(1.01), (R0, "not orthonormal", "R Rᵀ - I reaches 0.02", "loreft needs")),
        (lambda t: t[R0].zero_(), (R0, "not orthonormal")),
        (lambda t: t[R0][1].copy_(t[R0][0]), (R0, "not orthonormal")),
    ],
)
def test_tensors_that_are_not_the_configs_are_named(
    where: str, change: Callable[[dict[str, torch.Tensor]], Any], words: tuple[str, ...], request: pytest.FixtureRequest
) -> None:
    """Half an adapter, two adapters' files in one folder, or an R that a careless resume bent: none is served as what it is not."""
    folder: Path = request.getfixturevalue(where)
    change_tensors(folder, change)
    refused(folder, AdapterFormatError, WEIGHTS_FILE, *words)


def test_free_rows_are_free(decoder: Decoder, tmp_path: Path) -> None:
    """noreft and direft are defined without orthonormal rows; what is far from them is no damage there."""
    for method in ("noreft", "direft"):
        write_adapter(tmp_path, random_reft(decoder, method=method))
        change_tensors(tmp_path, lambda tensors: tensors[R0].mul_(3))
        assert read_adapter(tmp_path).spec.reft[0].method == method


@pytest.mark.parametrize(
    "name",
    [
        R0.replace("reft.0", "reft.00"),
        R0.replace("reft.0", "reft.100"),
        R0.replace("layers.0", "layers.-1"),
        R0.replace("layers.0", "layers.10000"),
        R0.replace("both.r", "both.u"),
        R0.replace("both", "left"),
        R0.replace("block_output", "lm_head"),
        "reft",
        R0 + ".weight",
    ],
)
def test_a_name_of_no_edit_is_refused(name: str, folder: Path) -> None:
    """An adapter applied without one of its tensors is another adapter."""
    change_tensors(folder, lambda tensors: tensors.update({name: torch.zeros(4, 64)}))
    refused(folder, UnsupportedAdapter, repr(name), "nor part of a ReFT edit")


def test_a_header_that_lies_is_refused_for_edits_too(folder: Path) -> None:
    """The same checks, before the file is mapped."""
    change_header(folder, lambda header: header[R0].update(shape=[4, 65]))
    refused(folder, AdapterFormatError, R0, "says shape (4, 65) but spans 1024 bytes")


def test_files_of_two_kinds_do_not_pass_for_one(folder: Path, both: Path, decoder: Decoder, tmp_path: Path) -> None:
    """A config of one kind over the tensors of another."""
    write_adapter(tmp_path / "lora", random_adapter(decoder, 2))
    configs = {name: (found / CONFIG_FILE).read_text() for name, found in (("reft", folder), ("both", both), ("lora", tmp_path / "lora"))}
    for found, config, words in (
        (tmp_path / "lora", "reft", "has no tensor reft.0"),
        (folder, "lora", "has a tensor that its config does not cover: reft.0"),
        (both, "lora", "has a tensor that its config does not cover: reft.0"),
        (both, "reft", "has LoRA factors, but its config says REFT"),
        (folder, "both", "has no factors for layer 0"),
        (tmp_path / "lora", "both", "has no tensor reft.0"),
    ):
        kept = (found / CONFIG_FILE).read_text()
        (found / CONFIG_FILE).write_text(configs[config])
        refused(found, AdapterFormatError, words)
        (found / CONFIG_FILE).write_text(kept)


def test_the_last_layer_missing_is_found_against_the_other_half(both: Path) -> None:
    """Layers are "all", so only LoRA's factors tell that the edits of the last layer are not there."""
    change_tensors(both, lambda t: [t.pop(name) for name in list(t) if name.startswith("reft.0.layers.2.")])
    refused(both, AdapterFormatError, "has no tensor reft.0.layers.2")
    change_tensors(both, lambda t: [t.pop(name) for name in list(t) if ".layers.2." in name or ".layers.1." in name])
    assert len(read_adapter(both).edits) == 1, "layers 0 alone: complete for a base of one layer, which check_fits knows"


def test_a_layer_of_the_config_that_the_file_lacks_is_named(decoder: Decoder, tmp_path: Path) -> None:
    """Named layers need no other half to be counted."""
    write_adapter(tmp_path, random_reft(decoder, layers=(0, 1)))
    change_part(tmp_path, layers=[0, 1, 7])
    refused(tmp_path, AdapterFormatError, "has no tensor reft.0.layers.7")


def test_a_small_file_that_claims_many_layers_is_refused_at_its_first_gap(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen parts of "all" layers and one tensor of layer 9999 mean a million tensors; none of them is written down before one is missed."""
    config = json.loads((folder / CONFIG_FILE).read_text())
    change_config(folder, reft=config["reft"] * MAX_PARTS)
    change_tensors(folder, lambda tensors: tensors.update({R0.replace("layers.0", "layers.9999"): torch.zeros(4, 64)}))
    asked = list[str]()
    write = reft_files.edit_key
    monkeypatch.setattr(reft_files, "edit_key", lambda *site: asked.append(write(*site)) or asked[-1])
    refused(folder, AdapterFormatError, "has no tensor reft.0.layers.3.")
    assert len(asked) < 50


# --- the config -----------------------------------------------------------------------------------------------------------------------------------


def change_part(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / CONFIG_FILE).read_text())
    config["reft"][0].update(changes)
    (folder / CONFIG_FILE).write_text(json.dumps(config))


@pytest.mark.parametrize("where", ["folder", "both"])
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "reft"}, ("method is 'reft'", "loreft")),
        ({"method": ["loreft"]}, ("method is",)),
        ({"rank": 0}, ("rank is 0", "from 1 to 1024")),
        ({"rank": 4.0}, ("rank is 4.0",)),
        ({"rank": True}, ("rank is True",)),
        ({"rank": 5}, ("has shape (4, 64)",)),
        ({"layers": []}, ("layers are []",)),
        ({"layers": [0, 0]}, ("layers are [0, 0]",)),
        ({"layers": [-1]}, ("layers is [-1]",)),
        ({"layers": [10_000]}, ("layers is [10000]",)),
        ({"layers": ["0"]}, ("layers is ['0']",)),
        ({"layers": 2}, ("layers is 2",)),
        ({"component": "block_output.output"}, ("component is",)),
        ({"component": None}, ("component is None",)),
        ({"positions": "f0"}, ("positions 'f0' cannot be read",)),
        ({"positions": []}, ("positions []",)),
        ({"positions": [0, "1"]}, ("positions [0, '1']",)),
        ({"positions": list(range(2000))}, ("lists 2000 places",)),
        ({"positions": None}, ("positions is None",)),
        ({"positions": {"first": 3}}, ("positions is",)),
        ({"tied": 1}, ("tied is 1", "true or false")),
        ({"tied": None}, ("tied is None",)),
        ({"activation": "softmax"}, ("activation is 'softmax'",)),
        ({"activation": {"a": 1}}, ("activation is",)),
        ({"dropout": 1.0}, ("dropout is 1.0",)),
        ({"dropout": "0"}, ("dropout is '0'",)),
        ({"dropout": float("nan")}, ("dropout is nan",)),
        ({"bias": True}, ("loreft has no second bias",)),
        ({"rank_pattern": {"x": 4}}, ("rank_pattern is",)),
        ({"rank_pattern": {"01": 4}}, ("rank_pattern is",)),
        ({"rank_pattern": [[0, 4]]}, ("rank_pattern is",)),
        ({"rank_pattern": {"0": -3}}, ("rank_pattern.0 is -3",)),
        ({"weight": float("inf")}, ("weight is inf",)),
        ({"weight": 10**400}, ("weight is 1000",)),
        ({"weight": None}, ("weight is None",)),
        ({"prompt": 1}, ("has 'prompt'", "an object with exactly activation")),
    ],
    ids=str,
)
def test_a_value_out_of_range_is_named(where: str, changes: dict[str, Any], words: tuple[str, ...], request: pytest.FixtureRequest) -> None:
    """No guessed default for a bad value, no traceback, and the file and the part in every message."""
    folder: Path = request.getfixturevalue(where)
    change_part(folder, **changes)
    refused(folder, AdapterFormatError, *words)


@pytest.mark.parametrize("name", sorted(ReftSpec().to_json()))
def test_a_field_left_out_is_named(name: str, folder: Path) -> None:
    """A default that changes between versions would change what old files mean."""
    config = json.loads((folder / CONFIG_FILE).read_text())
    del config["reft"][0][name]
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    refused(folder, AdapterFormatError, CONFIG_FILE, f"reft[0] lacks {name!r}")


@pytest.mark.parametrize("where", ["folder", "both"])
@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"reft": []}, AdapterFormatError, ("reft is []", "1 to 16 parts")),
        ({"reft": {}}, AdapterFormatError, ("reft is {}",)),
        ({"reft": None}, AdapterFormatError, ("reft is None",)),
        ({"reft": [7]}, AdapterFormatError, ("reft[0] is 7",)),
        ({"reft": [{}] * 17}, AdapterFormatError, ("reft is", "1 to 16 parts")),
        ({"atoll_format": 2}, UnsupportedAdapter, ("atoll_format is 2",)),
        ({"atoll_format": None}, UnsupportedAdapter, ("atoll_format is None",)),
        ({"atoll_format": True}, UnsupportedAdapter, ("atoll_format is True",)),
        ({"peft_type": "LOREFT"}, UnsupportedAdapter, ("peft_type is 'LOREFT'", "REFT and LORA_REFT")),
        ({"peft_type": ["REFT"]}, UnsupportedAdapter, ("peft_type is ['REFT']",)),
        ({"steering": 1}, AtollError, ("steering",)),
    ],
    ids=str,
)
def test_a_config_of_another_form_is_refused(
    where: str, changes: dict[str, Any], error: type[AtollError], words: tuple[str, ...], request: pytest.FixtureRequest
) -> None:
    """Newer formats, other tools, and keys that nobody would apply."""
    folder: Path = request.getfixturevalue(where)
    change_config(folder, **changes)
    if error is AtollError:  # a LoRA config is PEFT's, whose unknown keys are options; ours has none
        error = AdapterFormatError if where == "folder" else UnsupportedAdapter
    refused(folder, error, CONFIG_FILE, *words)


def test_a_base_that_is_no_name_is_refused(folder: Path) -> None:
    """Null means that nobody wrote it down."""
    change_config(folder, base_model_name_or_path=3)
    refused(folder, AdapterFormatError, "base_model_name_or_path is 3")
    change_config(folder, base_model_name_or_path=None)
    assert read_adapter(folder).spec.base == ""


def test_the_lora_half_is_held_to_what_a_lora_is(both: Path) -> None:
    """The same refusals as for a LoRA alone."""
    change_config(both, use_dora=True)
    refused(both, AdapterFormatError, "lora_magnitude_vector")
    change_config(both, use_dora=False)
    q = peft_key(Site(0, "q_proj"), "A")
    change_tensors(both, lambda tensors: tensors.pop(q))
    refused(both, AdapterFormatError, "layer 0 q_proj has only factor B")

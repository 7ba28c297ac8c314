"""PyReFT's folders: what they say is read exactly, and what they try is refused."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import tiny_model
from tests.written_reft import written

import atoll.reft as pyreft
from atoll.errors import AdapterFormatError, UnsupportedAdapter
from atoll.model.reft import Intervention, ReftSpec
from atoll.reft import importer, unpickle
from atoll.reft.importer import ImportLimits, is_pyreft_folder, read_pyreft
from pyreft_files import METHODS, saved_state, write_folder

ROW = [5, 6, 7, 8, 9, 10, 11, 12]
PLACES = [0, 1, 7]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The files of this test are harmless: read them in this process, since starting another takes seconds."""
    monkeypatch.setattr(importer, "_in_a_process", lambda job, folder, wall_s: unpickle.convert(job["files"], job["out"]))


def test_all_six_kinds_are_read_with_the_r_that_torch_computes(tmp_path: Path) -> None:
    """Three of them store a parametrization, d x d and all, in place of R."""
    expected = write_folder(tmp_path, [(method, layer, "block_output") for layer, method in enumerate(METHODS)])
    found = read_pyreft(tmp_path)
    assert is_pyreft_folder(tmp_path)
    assert [(saved.layer, saved.component, saved.method) for saved in found.saved] == [(n, "block_output", m) for n, m in enumerate(METHODS)]
    for saved, tensors in zip(found.saved, expected, strict=True):
        assert set(saved.tensors.tensors) == set(tensors)
        for name, tensor in tensors.items():
            torch.testing.assert_close(saved.tensors.tensors[name], tensor, rtol=0, atol=1e-6)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("method", METHODS)
def test_a_loaded_folder_edits_as_its_formula_says(tmp_path: Path, method: str) -> None:
    tensors = write_folder(tmp_path, [(method, 1, "block_output")])[0]
    spec = ReftSpec(method=method, bias=method == "noreft")
    plain = Intervention(**{name: tensor for name, tensor in tensors.items() if spec.bias or name != "c"})

    def edit(module: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
        out = out.clone()
        out[0, PLACES] += written(spec, plain, out[0, PLACES]).float()
        return out

    model = tiny_model("llama")
    with torch.no_grad():
        handle = model.model.layers[1].register_forward_hook(edit)
        expected = model(torch.tensor([ROW])).logits
        handle.remove()
        loaded = pyreft.ReftModel.load(str(tmp_path), model)
        _, out = loaded({"input_ids": torch.tensor([ROW])}, unit_locations={"sources->base": (None, [[PLACES]])})
    torch.testing.assert_close(out.logits, expected, rtol=0, atol=1e-5)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(("joint", "word"), [("_", "comp"), (".", "comp"), (".", "repr")])
def test_file_names_of_older_versions_are_found(tmp_path: Path, joint: str, word: str) -> None:
    """The separator changed in 2025; PyReFT itself no longer finds its own older files."""
    places = [("loreft", 0, "block_output"), ("loreft", 0, "block_output"), ("loreft", 0, "model.layers[2].output")]
    expected = write_folder(tmp_path, places, joint, word)
    found = read_pyreft(tmp_path).saved
    assert [saved.layer for saved in found] == [0, 0, None]
    for saved, tensors in zip(found, expected, strict=True):
        assert torch.equal(saved.tensors.r, tensors["r"])


@pytest.mark.usefixtures("here")
def test_shared_interventions_stay_shared(tmp_path: Path) -> None:
    write_folder(tmp_path, [("loreft", 0, "block_output"), ("loreft", 2, "block_output")])
    config = json.loads((tmp_path / "config.json").read_text())
    for entry in config["representations"]:
        entry[9] = 0
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = pyreft.ReftModel.load(str(tmp_path), tiny_model("llama"))
    one, two = model.interventions.values()
    assert one is two
    assert model.count_parameters() == 2 * 64 * 4 + 4


@pytest.mark.usefixtures("here")
def test_the_bases_own_tensors_come_if_they_are_asked_for(tmp_path: Path) -> None:
    write_folder(tmp_path, [("loreft", 0, "block_output")])
    with pytest.raises(AdapterFormatError, match=r"has no pytorch_model\.bin"):
        read_pyreft(tmp_path, include_model=True)
    torch.save({"lm_head.weight": torch.ones(3, 2)}, tmp_path / "pytorch_model.bin")
    assert read_pyreft(tmp_path).base_tensors == {}
    assert torch.equal(read_pyreft(tmp_path, include_model=True).base_tensors["lm_head.weight"], torch.ones(3, 2))


@pytest.mark.usefixtures("here")
def test_a_checkpoint_of_pyrefts_trainer_is_read_onto_a_model_built_as_it_was(tmp_path: Path) -> None:
    """They have no config.json, so there they can be read neither by load nor, without a GPU, by load_intervention."""
    expected = write_folder(tmp_path, [("loreft", 0, "block_output"), ("direft", 2, "block_output")])
    (tmp_path / "config.json").unlink()
    with pytest.raises(AdapterFormatError, match=r"has no config\.json") as caught:
        pyreft.ReftModel.load(str(tmp_path), tiny_model("llama"))
    assert "load_intervention" in caught.value.hint
    size = {"embed_dim": 64, "low_rank_dimension": 4, "add_bias": True}
    entries = [
        {"layer": 0, "component": "block_output", "intervention": pyreft.LoreftIntervention(**size)},
        {"layer": 2, "component": "block_output", "intervention": pyreft.NodireftIntervention(**size)},
    ]
    model = pyreft.get_reft_model(tiny_model("llama"), pyreft.ReftConfig(representations=entries))
    model.load_intervention(str(tmp_path))
    one, two = model.interventions.values()
    assert torch.equal(one.rotate_layer.weight, expected[0]["r"].T)
    assert torch.equal(two.proj_layer.weight, expected[1]["r"])
    entries[1]["intervention"] = pyreft.NoreftIntervention(embed_dim=64, low_rank_dimension=2, add_bias=True)
    other = pyreft.get_reft_model(tiny_model("llama"), pyreft.ReftConfig(representations=entries))
    with pytest.raises(AdapterFormatError, match="does not fit"):
        other.load_intervention(str(tmp_path))


class Trap:
    """Unpickled, it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def test_a_pickle_that_would_run_code_is_refused_and_does_not(tmp_path: Path) -> None:
    write_folder(tmp_path / "bad", [("loreft", 0, "block_output")])
    file = next((tmp_path / "bad").glob("*.bin"))
    torch.save({**saved_state("loreft")[0], "extra": Trap(tmp_path / "ran")}, file)
    with pytest.raises(AdapterFormatError, match=r"intkey_.*is no file of plain tensors"):
        read_pyreft(tmp_path / "bad")
    assert not (tmp_path / "ran").exists()


@pytest.mark.usefixtures("here")
def test_a_class_name_is_looked_up_and_never_imported(tmp_path: Path) -> None:
    (tmp_path / "trap.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass LoreftIntervention: pass\n")
    for name in ("<class 'trap.Other'>", "<class 'os.system'>", "os.system", None, 3):
        write_folder(tmp_path / "bad", [("loreft", 0, "block_output")], intervention_types=[name])
        with pytest.raises(UnsupportedAdapter, match="none of PyReFT's six"):
            read_pyreft(tmp_path / "bad")
    write_folder(tmp_path / "bad", [("loreft", 0, "block_output")], intervention_types=["<class 'trap.LoreftIntervention'>"])
    assert read_pyreft(tmp_path / "bad").saved[0].method == "loreft"  # the name says which formula; whose class it was does not matter
    assert not (tmp_path / "ran").exists()


def test_a_file_that_unfolds_to_more_than_its_size_is_stopped(tmp_path: Path) -> None:
    """A megabyte of file, a quarter of a gigabyte of zeros: the limit is the child's, and this process never sees them."""
    write_folder(tmp_path, [("loreft", 0, "block_output")])
    file = next(tmp_path.glob("*.bin"))
    torch.save({"weight": torch.zeros(1 << 26)}, tmp_path / "large")
    with zipfile.ZipFile(tmp_path / "large") as large, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as small:
        for entry in large.infolist():
            small.writestr(entry.filename, large.read(entry))
    (tmp_path / "large").unlink()
    assert file.stat().st_size < 1 << 23
    with pytest.raises(AdapterFormatError, match=r"within 32 MB|memory"):
        read_pyreft(tmp_path, limits=ImportLimits(memory_bytes=32 << 20))


def test_reading_does_not_take_forever(tmp_path: Path) -> None:
    write_folder(tmp_path, [("loreft", 0, "block_output")])
    with pytest.raises(AdapterFormatError, match=r"0\.01 s on the clock"):
        read_pyreft(tmp_path, limits=ImportLimits(wall_s=0.01))


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"weight": torch.zeros(4, 63)}, r"weight has shape \(4, 63\)"),
        ({"bias": torch.zeros(5)}, r"bias has shape \(5,\)"),
        ({"weight": torch.full((4, 64), float("nan"))}, "not finite"),
        ({"weight": torch.zeros(4, 64, dtype=torch.int64)}, "dense float tensor"),
        ({"weight": torch.zeros(4, 64).to_sparse()}, "dense float tensor"),
        ({"rotate_layer": torch.zeros(64)}, "rotate_layer has shape"),
        ({"stranger": torch.zeros(1)}, "has tensors"),
        ({"weight": "text"}, "a tensor was expected"),
    ],
)
def test_damaged_tensors_are_named(tmp_path: Path, change: dict[str, Any], sentence: str) -> None:
    write_folder(tmp_path, [("loreft", 0, "block_output")])
    torch.save({**saved_state("loreft")[0], **change}, next(tmp_path.glob("*.bin")))
    with pytest.raises(AdapterFormatError, match=sentence):
        read_pyreft(tmp_path)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("config", "error", "sentence"),
    [
        ({"representations": []}, AdapterFormatError, "no list of representations"),
        ({"representations": [["0", "block_output", "pos", 1]]}, AdapterFormatError, "no list of representations"),
        ({"representations": [[9, "block_output", "pos", 1]]}, AdapterFormatError, "has no intkey_layer_9"),
        ({"representations": [[0, "../x", "pos", 1]]}, AdapterFormatError, "has no intkey"),
        ({"representations": [[0, "block_output", "h.pos", 1]]}, UnsupportedAdapter, "unit is"),
        ({"intervention_types": ["a", "b"]}, AdapterFormatError, "2 intervention types"),
        ({"mode": "serial"}, UnsupportedAdapter, "mode is 'serial'"),
    ],
)
def test_a_config_that_is_not_pyrefts_is_refused(tmp_path: Path, config: dict[str, Any], error: type[Exception], sentence: str) -> None:
    write_folder(tmp_path, [("loreft", 0, "block_output")], **config)
    with pytest.raises(error, match=sentence):
        read_pyreft(tmp_path)


@pytest.mark.usefixtures("here")
def test_files_that_are_not_there_or_not_json_are_refused(tmp_path: Path) -> None:
    assert not is_pyreft_folder(tmp_path)
    with pytest.raises(AdapterFormatError, match=r"has no config\.json"):
        read_pyreft(tmp_path)
    for text in ("[" * 100_000, "{", "[]"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(AdapterFormatError, match=r"config\.json"):
            read_pyreft(tmp_path)
    (tmp_path / "config.json").write_text(" " * ((1 << 20) + 1))
    with pytest.raises(AdapterFormatError, match="larger than"):
        read_pyreft(tmp_path)
    write_folder(tmp_path, [("loreft", 0, "block_output")])
    next(tmp_path.glob("*.bin")).write_bytes(b"not a pickle at all")
    with pytest.raises(AdapterFormatError, match="is no file of plain tensors"):
        read_pyreft(tmp_path)

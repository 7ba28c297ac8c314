"""Saving and loading: the same logits to the bit and the same settings, for every class, path and wrapper; strict about everything else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from atoll.errors import AdapterFormatError, BaseMismatch, ConfigError
from atoll.reft import LoreftIntervention, NodireftIntervention, ReftConfig, ReftModel, get_reft_model
from atoll.reft.config import CONFIG_FILE
from atoll.reft.folder import WEIGHTS_FILE
from atoll.reft.interventions import CLASSES
from reft_bases import WIDTH, batch, toy, with_lora


def reft_of(model: Any, components: Any = ((0, "block_output"), (2, "block_output")), cls: Any = LoreftIntervention, **kwargs: Any) -> ReftModel:
    torch.manual_seed(3)
    entries = [
        {"layer": layer, "component": component, "intervention": cls(**{"embed_dim": WIDTH, "low_rank_dimension": 4, **kwargs})}
        for layer, component in components
    ]
    return get_reft_model(model, ReftConfig(representations=entries)).eval()


def logits(reft_model: ReftModel, base: Any = None) -> Tensor:
    with torch.no_grad():
        _, outputs = reft_model(base or batch(), unit_locations={"base": [0, 3]})
    found: Tensor = outputs.logits
    return found


@pytest.mark.parametrize("name", CLASSES)
def test_what_is_saved_comes_back_to_the_bit(name: str, tmp_path: Path) -> None:
    """PyReFT loses dtype, act_fn, dropout and add_bias: a float32 model comes back as bfloat16 and fails, NoReFT does not come back at all."""
    kwargs = {"dtype": torch.float32, "act_fn": "silu", "dropout": 0.3, "add_bias": True}
    reft_model = reft_of(toy("llama"), cls=CLASSES[name], **kwargs)
    reft_model.save(tmp_path / "saved")
    assert sorted(file.name for file in (tmp_path / "saved").iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]
    again = ReftModel.load(tmp_path / "saved", toy("llama"))
    assert not any(module.training for module in again.modules())
    assert torch.equal(logits(again), logits(reft_model))
    assert again.config.to_dict() == reft_model.config.to_dict()
    for before, after in zip(reft_model.interventions.values(), again.interventions.values(), strict=True):
        assert (type(after), after.settings, after.dropout.p) == (type(before), before.settings, 0.3)


@pytest.mark.parametrize("family", ["gpt2", "qwen2", "bert", "roberta"])
def test_every_family_comes_back(family: str, tmp_path: Path) -> None:
    """Also by paths, which PyReFT cannot load."""
    paths = {"gpt2": "transformer.h[1].output", "qwen2": "model.layers[1].output"}
    path = paths.get(family, f"{family}.encoder.layer[1].output")
    reft_model = reft_of(toy(family), [(0, path), (2, "block_output"), (1, "mlp_output")], dtype="float32")
    reft_model.save(tmp_path)
    again = ReftModel.load(str(tmp_path), toy(family))
    assert torch.equal(logits(again), logits(reft_model))
    assert [entry.component for entry in again.representations] == [path, "block_output", "mlp_output"]


def test_a_trained_model_comes_back_and_trains_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    """R in the file is R in memory, orthonormal; the next step is the same step."""

    def step(reft_model: ReftModel) -> None:
        optimizer = torch.optim.SGD(reft_model.get_trainable_parameters(), lr=0.5, weight_decay=0.1)
        _, outputs = reft_model.train()(batch(), unit_locations={"base": 3}, labels=batch()["input_ids"])
        outputs.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        reft_model.eval()

    reft_model = reft_of(toy("llama"))
    for _ in range(3):
        step(reft_model)
    reft_model.save(tmp_path)
    again = ReftModel.load(tmp_path, toy("llama"))
    assert torch.equal(logits(again), logits(reft_model))
    for _ in range(20):
        step(again)
        step(reft_model)
    assert torch.equal(logits(again), logits(reft_model))
    assert all(intervention.rotate_layer.deviation() < 1e-6 for intervention in again.interventions.values())


def test_one_file_serves_plain_and_wrapped_bases(tmp_path: Path) -> None:
    """Saved over PEFT's wrapper, loaded onto the plain base, and the other way round."""
    wrapped = reft_of(with_lora(toy("llama")), [(0, "base_model.model.model.layers[1].output")])
    wrapped.save(tmp_path / "a")
    plain = ReftModel.load(tmp_path / "a", toy("llama"))
    with wrapped.model.disable_adapter():
        assert torch.equal(logits(plain), logits(wrapped))
    plain.save(tmp_path / "b")
    again = ReftModel.load(tmp_path / "b", with_lora(toy("llama")))
    assert torch.equal(logits(again), logits(wrapped))


def test_lora_factors_and_heads_are_saved_with_it_if_asked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """include_model: what of the base is trained. Without it a warning says what is left out."""
    reft_model = reft_of(with_lora(toy("llama"), seed=1))
    reft_model.model.enable_adapter_layers()
    reft_model.save(tmp_path / "without")
    assert "include_model=True" in caplog.text
    reft_model.save(tmp_path / "with", include_model=True)
    other = with_lora(toy("llama"), seed=2)
    again = ReftModel.load(tmp_path / "with", other, include_model=True)
    assert torch.equal(logits(again), logits(reft_model))
    assert not torch.equal(logits(ReftModel.load(tmp_path / "without", with_lora(toy("llama"), seed=2))), logits(reft_model))
    with pytest.raises(AdapterFormatError, match="lora_A"):
        ReftModel.load(tmp_path / "with", toy("llama"), include_model=True)
    roberta = reft_of(toy("roberta"))
    roberta.model.classifier.requires_grad_(True)
    roberta.save(tmp_path / "head", include_model=True)
    fresh = toy("roberta")
    torch.nn.init.zeros_(fresh.classifier.out_proj.weight)
    assert torch.equal(logits(ReftModel.load(tmp_path / "head", fresh, include_model=True)), logits(roberta))


def test_weights_alone_load_onto_a_model_built_alike(tmp_path: Path) -> None:
    """save_intervention and load_intervention; PyReFT's reader has cuda:0 written into it."""
    reft_model = reft_of(toy("llama"))
    reft_model.save_intervention(tmp_path, include_model=False)
    assert [file.name for file in tmp_path.iterdir()] == [WEIGHTS_FILE]
    other = reft_of(toy("llama"))
    for tensor in other.interventions.parameters():
        tensor.data.mul_(0.5)
    other.load_intervention(tmp_path)
    assert torch.equal(logits(other), logits(reft_model))


def test_linked_interventions_are_written_once_and_come_back_linked(tmp_path: Path) -> None:
    intervention = LoreftIntervention(embed_dim=WIDTH, low_rank_dimension=4)
    entries = [{"layer": layer, "intervention": intervention, "intervention_link_key": 0} for layer in (0, 1)]
    reft_model = get_reft_model(toy("llama"), ReftConfig(representations=entries)).eval()
    reft_model.save(tmp_path)
    assert len(load_file(tmp_path / WEIGHTS_FILE)) == 3
    again = ReftModel.load(tmp_path, toy("llama"))
    first, second = again.interventions.values()
    assert first is second
    assert torch.equal(logits(again), logits(reft_model))


class Stronger(LoreftIntervention):
    """A user's own class with a keyword of its own."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.strength = kwargs.get("strength", 1.0)

    def forward(self, base: Tensor, source: Any = None, subspaces: Any = None) -> Tensor:
        return base + self.strength * (super().forward(base, source, subspaces) - base)


def test_a_users_own_class_comes_back(tmp_path: Path) -> None:
    """The class is found where the program has it; a keyword that JSON cannot hold is an error when saving."""
    reft_model = reft_of(toy("llama"), cls=Stronger, strength=2.5)
    reft_model.save(tmp_path)
    again = ReftModel.load(tmp_path, toy("llama"))
    assert torch.equal(logits(again), logits(reft_model))
    assert next(iter(again.interventions.values())).strength == 2.5
    with pytest.raises(ConfigError, match="strength"):
        reft_of(toy("llama"), cls=Stronger, strength=object()).save(tmp_path / "other")


def test_another_base_is_named(tmp_path: Path) -> None:
    reft_of(toy("llama")).save(tmp_path)
    with pytest.raises(BaseMismatch, match="num_hidden_layers is 3, but this one's is 4"):
        ReftModel.load(tmp_path, toy("llama", num_hidden_layers=4))
    with pytest.raises(ConfigError, match="act_fn"):
        ReftModel.load(tmp_path, toy("llama"), act_fn="relu")


@pytest.mark.parametrize("damage", ["missing", "further", "shape", "nan", "cut", "gone", "config"])
def test_damaged_folders_are_refused_and_change_nothing(damage: str, tmp_path: Path) -> None:
    reft_model = reft_of(toy("llama"))
    reft_model.save(tmp_path)
    file = tmp_path / WEIGHTS_FILE
    tensors = load_file(file)
    name = next(name for name in tensors if "rotate" in name)
    if damage == "missing":
        del tensors[name]
    elif damage == "further":
        tensors["interventions/other"] = torch.ones(1)
    elif damage == "shape":
        tensors[name] = tensors[name][:, :2].contiguous()
    elif damage == "nan":
        tensors[name][0, 0] = float("nan")
    save_file(tensors, file)
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-9])
    elif damage == "gone":
        file.unlink()
    elif damage == "config":
        (tmp_path / CONFIG_FILE).unlink()
    with pytest.raises(AdapterFormatError):
        ReftModel.load(tmp_path, toy("llama"))
    if damage != "config":
        before = logits(reft_model)
        with pytest.raises(AdapterFormatError):
            reft_model.load_intervention(tmp_path)
        assert torch.equal(logits(reft_model), before)


def test_the_hugging_face_hub_gets_and_gives_two_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """save_to_hf_hub and from_huggingface_hub; what else lies in the folder stays there."""
    import huggingface_hub

    repository, asked = tmp_path / "hub", {}

    class Api:
        def create_repo(self, name: str, exist_ok: bool) -> None:
            asked["made"] = (name, exist_ok)

        def upload_folder(self, repo_id: str, folder_path: str, allow_patterns: list[str]) -> None:
            repository.mkdir()
            for pattern in allow_patterns:
                for file in Path(folder_path).glob(pattern):
                    (repository / file.name).write_bytes(file.read_bytes())

    def snapshot_download(name: str, local_dir: Any, allow_patterns: list[str]) -> str:
        asked["fetched"] = (name, local_dir, sorted(pattern for pattern in allow_patterns if "*" not in pattern))
        return str(repository)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    reft_model = reft_of(toy("llama"))
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "secret.txt").write_text("mine", encoding="utf-8")
    reft_model.save(tmp_path / "saved", save_to_hf_hub=True, hf_repo_name="me/emoji")
    assert sorted(file.name for file in repository.iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]
    again = ReftModel.load("me/emoji", toy("llama"), local_directory="here", from_huggingface_hub=True)
    assert torch.equal(logits(again), logits(reft_model))
    assert asked == {"made": ("me/emoji", True), "fetched": ("me/emoji", "here", [CONFIG_FILE, "pytorch_model.bin", WEIGHTS_FILE])}


def _pyreft_folder(folder: Path, reft_model: ReftModel) -> None:
    """The model as PyReFT 0.1.0 writes it: positional lists, class names, one pickle an intervention, no act_fn."""
    folder.mkdir()
    types, entries = [], []
    for key, entry, module in zip(reft_model.interventions, reft_model.representations, reft_model.interventions.values(), strict=True):
        types.append(f"<class 'pyreft.interventions.{type(module).__name__}'>")
        entries.append([entry.layer, entry.component, "pos", 1, module.low_rank_dimension, None, None, None, None, None, None, None, None, None])
        tensors = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        if type(module) is LoreftIntervention:
            tensors = {
                "weight": tensors["learned_source.weight"],
                "bias": tensors["learned_source.bias"],
                "rotate_layer": tensors["rotate_layer.weight"],
            }
        torch.save(tensors, folder / f"intkey_{key}.bin")
    config = {"representations": entries, "intervention_types": types, "mode": "parallel", "sorted_keys": list(reft_model.interventions)}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


@pytest.mark.parametrize(("cls", "act_fn"), [(LoreftIntervention, "relu"), (NodireftIntervention, None)])
def test_pyrefts_folders_are_read(cls: Any, act_fn: str | None, tmp_path: Path) -> None:
    """By load, with what its files do not say, and by load_intervention."""
    reft_model = reft_of(toy("llama"), cls=cls, act_fn=act_fn)
    _pyreft_folder(tmp_path / "theirs", reft_model)
    again = ReftModel.load(tmp_path / "theirs", toy("llama"), act_fn=act_fn)
    assert torch.equal(logits(again), logits(reft_model))
    if act_fn is None:
        return  # a reader in a process of its own takes seconds to start
    other = reft_of(toy("llama"), cls=cls, act_fn=act_fn)
    for tensor in other.interventions.parameters():
        tensor.data.mul_(0.5)
    other.load_intervention(tmp_path / "theirs", include_model=False)
    assert torch.equal(logits(other), logits(reft_model))
    again.save(tmp_path / "ours")
    assert torch.equal(logits(ReftModel.load(tmp_path / "ours", toy("llama"))), logits(reft_model))


def test_an_r_that_pyreft_let_drift_edits_as_it_did_there(tmp_path: Path) -> None:
    """Its resumed training leaves R off the manifold by 0.1: reading and saving keep those numbers, and a step of ours brings it back."""
    reft_model = reft_of(toy("llama"))
    for intervention in reft_model.interventions.values():
        intervention.rotate_layer.weight.data.mul_(1.1)
    expected = logits(reft_model)
    _pyreft_folder(tmp_path / "theirs", reft_model)
    again = ReftModel.load(tmp_path / "theirs", toy("llama"))
    assert torch.equal(logits(again), expected)
    again.save(tmp_path / "ours")
    assert torch.equal(logits(ReftModel.load(tmp_path / "ours", toy("llama"))), expected)

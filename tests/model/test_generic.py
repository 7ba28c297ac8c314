"""LoRA on transformers' encoder-decoder models from outside: the same numbers as merged weights and as PEFT, and nothing left behind."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.tiny_t5 import OUTPUTS, PAIRS, generic_model, linear_shapes, random_t5_adapter, t5_tokenizer, tiny_t5, write_tiny_t5
from torch import Tensor

from atoll.errors import AdapterFormatError, AtollError, BaseFormatError, BaseMismatch, BaseNotFound, ConfigError, UnsupportedAdapter
from atoll.model.generic import GenericModel, Pairs, base_folder, greedy_answers, load_encoder_decoder
from atoll.model.generic_adapter import GenericAdapter, read_generic_adapter, write_generic_adapter
from atoll.model.generic_pool import GenericPool

CLOSE = {"rtol": 0, "atol": 2e-5}  # float32 on CPU; losses are about 6


def rows() -> list[tuple[list[int], list[int]]]:
    tokenizer = t5_tokenizer()
    return [(tokenizer(given).input_ids, tokenizer(wanted).input_ids) for given, wanted in PAIRS]


def mixed(model: GenericModel) -> list[GenericAdapter]:
    """Adapters that differ in rank, alpha, rsLoRA, patterns and targets."""
    shapes = dict(model.linears)
    return [
        random_t5_adapter(shapes, 1),
        random_t5_adapter(shapes, 2, rank=3, alpha=1.5, targets=("q", "k", "wi_0")),
        random_t5_adapter(shapes, 3, rank=6, targets=("o", "wo", "v"), use_rslora=True, rank_pattern={"block.1.layer.0.SelfAttention.v": 2}),
        random_t5_adapter(shapes, 4, targets=("EncDecAttention.q",), alpha_pattern={"q": 3.0}),
    ]


def equal(model: GenericModel, num: int = 4) -> list[GenericAdapter]:
    """Adapters of one rank with different alphas, one of them with targets of its own."""
    shapes = dict(model.linears)
    return [random_t5_adapter(shapes, 10 + index, alpha=4.0 + index, targets=("q", "wi_1") if index == 1 else ("q", "v")) for index in range(num)]


def pool_of(model: GenericModel, adapters: list[GenericAdapter]) -> GenericPool:
    return GenericPool.of(adapters, model, [f"m{index}" for index in range(len(adapters))])


def merged_losses(adapter: GenericAdapter) -> list[float]:
    """transformers' own loss of each pair alone, with the adapter merged into a fresh model."""
    model = generic_model()
    model.merge(adapter)
    found = []
    for row in rows():
        alone = Pairs.of([row], 0)
        found.append(float(model.model(input_ids=alone.input_ids, attention_mask=alone.attention_mask, labels=alone.labels).loss))
    return found


@pytest.mark.parametrize("form", ["cat", "product"])
def test_candidates_in_one_batch_equal_each_merged_alone(form: str) -> None:
    """The search compares these numbers: another candidate in the batch, padding, or the head at labels only must not move them."""
    model = generic_model()
    pool = pool_of(model, mixed(model) if form == "cat" else equal(model))
    weights = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    together = model.label_losses(Pairs.of(rows(), 0), pool.changes(weights, form), 3)
    assert together.shape == (3, len(PAIRS))
    for row, candidate in zip(together, weights, strict=True):
        torch.testing.assert_close(row, torch.tensor(merged_losses(pool.compose(candidate, form))), **CLOSE)


def test_weights_of_zero_are_the_base_and_leave_no_trace() -> None:
    """An adapter that stayed in the model after a candidate would be part of all that come later."""
    model = generic_model()
    pool, pairs = pool_of(model, mixed(model)), Pairs.of(rows(), 0)
    before = model.label_losses(pairs, {})
    torch.testing.assert_close(model.label_losses(pairs, pool.changes(torch.zeros(1, 4))), before, **CLOSE)
    with pytest.raises(RuntimeError, match="stop"), model.changed(pool.changes(torch.ones(1, 4))):
        raise RuntimeError("stop")
    assert torch.equal(model.label_losses(pairs, {}), before)


@pytest.mark.parametrize("form", ["cat", "product"])
def test_gradients_of_the_weights_are_those_of_finite_differences(form: str) -> None:
    """A search by gradients would walk somewhere else."""
    model = GenericModel("double", Path(), tiny_t5().double(), t5_tokenizer())
    pool, pairs = pool_of(model, equal(model)), Pairs.of(rows()[:3], 0)
    weights = torch.rand(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()

    def value(at: Tensor) -> Tensor:
        return model.label_losses(pairs, pool.changes(at, form), 2).double().sum()

    value(weights).backward()
    step = torch.zeros(2, 4, dtype=torch.float64)
    step[1, 2] = 2e-3
    with torch.no_grad():
        slope = (value(weights + step) - value(weights - step)) / 4e-3
    assert weights.grad is not None
    assert float(slope) == pytest.approx(float(weights.grad[1, 2]), rel=0.01)


def test_a_weight_for_each_layer_acts_in_its_layer_alone() -> None:
    """Blocks are numbered through the encoder and the decoder; a wrong number would weight another block."""
    model = generic_model()
    pool, pairs = pool_of(model, mixed(model)), Pairs.of(rows(), 0)
    assert model.num_layers == 4
    assert model.layer_of["decoder.block.1.layer.1.EncDecAttention.k"] == 3
    weights = torch.rand(1, 4, 4, generator=torch.Generator().manual_seed(1))
    expected = torch.tensor(merged_losses(pool.compose(weights[0])))
    torch.testing.assert_close(model.label_losses(pairs, pool.changes(weights))[0], expected, **CLOSE)
    same = torch.full((1, 4, 4), 0.3)
    torch.testing.assert_close(model.label_losses(pairs, pool.changes(same)), model.label_losses(pairs, pool.changes(same[:, :, 0])), **CLOSE)


def test_encoder_states_are_reused_where_only_the_decoder_is_adapted() -> None:
    model = generic_model()
    shapes = {place: shape for place, shape in model.linears.items() if place.startswith("decoder.")}
    targets = tuple(place for place in shapes if place.endswith((".q", ".v")))
    pool, pairs = pool_of(model, [random_t5_adapter(shapes, seed, targets=targets) for seed in (1, 2)]), Pairs.of(rows(), 0)
    assert not model.in_encoder(pool.places)
    assert model.in_encoder(pool_of(model, mixed(model)).places)
    weights = torch.tensor([[0.5, -0.5], [1.0, 0.2]])
    expected = model.label_losses(pairs, pool.changes(weights), 2)
    torch.testing.assert_close(model.label_losses(pairs, pool.changes(weights), 2, model.encode(pairs)), expected, **CLOSE)


def test_greedy_answers_follow_a_candidate() -> None:
    """What a search scores and what is written must be the same model."""
    model = generic_model()
    pool = pool_of(model, mixed(model))
    weights = torch.tensor([0.5, 1.0, -0.5, 0.3])
    inputs = [given for given, _ in PAIRS[:3]]
    with model.changed(pool.changes(weights.unsqueeze(0))):
        answers = greedy_answers(model.model, model.tokenizer, inputs, max_new_tokens=6, max_tokens=64)
    model.merge(pool.compose(weights))
    assert answers == greedy_answers(model.model, model.tokenizer, inputs, max_new_tokens=6, max_tokens=64)
    assert answers != greedy_answers(tiny_t5(), model.tokenizer, inputs, max_new_tokens=6, max_tokens=64)


def test_the_product_form_refuses_unequal_ranks_and_cat_takes_them() -> None:
    model = generic_model()
    pool = pool_of(model, mixed(model))
    with pytest.raises(ConfigError, match=r"equal rank, but at .* ranks 3, 4"):
        pool.changes(torch.ones(1, 4), "product")
    with pytest.raises(ConfigError, match="equal rank"):
        pool.compose(torch.ones(4), "product")
    assert pool.compose(torch.ones(4)).max_rank == 11  # at the cross-attention's q, which three of them change


def test_an_adapter_of_another_base_is_refused_by_name() -> None:
    model = generic_model()
    wide = random_t5_adapter(linear_shapes(tiny_t5(d_model=40)), 1)
    with pytest.raises(BaseMismatch, match=r"adapter 'm1': encoder.block.0.*are for a 32 x 40 linear"):
        pool_of(model, [random_t5_adapter(dict(model.linears), 1), wide])
    deep = random_t5_adapter(linear_shapes(tiny_t5(num_layers=3)), 1)
    with pytest.raises(BaseMismatch, match=r"encoder.block.2.* which the base does not have"):
        pool_of(model, [deep])
    shallow = random_t5_adapter(linear_shapes(tiny_t5(num_layers=1)), 1)
    with pytest.raises(BaseMismatch, match=r"config covers encoder.block.1"):
        pool_of(model, [shallow])


def test_files_are_pefts_and_come_back_the_same(tmp_path: Path) -> None:
    """PEFT reads what we write, with the same losses; and what was read is what was written."""
    from peft import PeftModel

    model = generic_model()
    pool = pool_of(model, mixed(model))
    composed = pool.compose(torch.tensor([0.5, -1.0, 0.25, 1.0]))
    write_generic_adapter(tmp_path, replace(composed, manifest={"kind": "composed"}))
    again = read_generic_adapter(tmp_path)
    assert again.manifest == {"kind": "composed"}
    assert again.modules.keys() == composed.modules.keys()
    assert all(torch.equal(again.modules[place].b, module.b) for place, module in composed.modules.items())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT still uses names that transformers has deprecated
        theirs = PeftModel.from_pretrained(tiny_t5(), tmp_path)
    pairs = Pairs.of(rows(), 0)
    for row, ours in zip(rows(), model.label_losses(pairs, pool.changes(torch.tensor([[0.5, -1.0, 0.25, 1.0]])))[0], strict=True):
        alone = Pairs.of([row], 0)
        assert float(theirs(input_ids=alone.input_ids, labels=alone.labels).loss) == pytest.approx(float(ours), abs=2e-5)


def test_what_peft_writes_is_read_as_peft_means_it(tmp_path: Path) -> None:
    """rank_pattern, alpha_pattern and rsLoRA decide the scaling of each linear."""
    from peft import LoraConfig, get_peft_model

    options = {"r": 4, "lora_alpha": 6, "target_modules": ["q", "wo"], "use_rslora": True}
    patterns = {"rank_pattern": {"decoder.block.0.layer.0.SelfAttention.q": 2}, "alpha_pattern": {"wo": 3}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = get_peft_model(tiny_t5(), LoraConfig(task_type="SEQ_2_SEQ_LM", **options, **patterns))
        with torch.no_grad():
            for name, parameter in theirs.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 0.1)
        theirs.eval().save_pretrained(tmp_path)
    model = generic_model()
    pool, pairs = pool_of(model, [read_generic_adapter(tmp_path)]), Pairs.of(rows()[:1], 0)
    expected = theirs(input_ids=pairs.input_ids, labels=pairs.labels).loss
    torch.testing.assert_close(model.label_losses(pairs, pool.changes(torch.ones(1, 1)))[0, 0], expected, **CLOSE)


def spoilt(folder: Path, how: str) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    weights = folder / "adapter_model.safetensors"
    if how == "pattern":
        config["target_modules"] = ".*SelfAttention.q"
    elif how == "uncovered":
        config["target_modules"] = ["v"]
    elif how == "rank":
        config["r"] = 5
    elif how == "dora":
        config["use_dora"] = True
    elif how == "pickle":
        weights.rename(folder / "adapter_model.bin")
    else:
        from safetensors.torch import load_file, save_file

        tensors = load_file(weights)
        name = next(iter(tensors))
        if how == "nan":
            tensors[name][0, 0] = float("nan")
        elif how == "half":
            del tensors[name]
        elif how == "embedding":
            tensors["base_model.model.shared.lora_embedding_A"] = torch.zeros(2, 2)
        save_file(tensors, weights)
    (folder / "adapter_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("how", "error", "said"),
    [
        ("pattern", UnsupportedAdapter, "patterns from files are never run"),
        ("uncovered", AdapterFormatError, "which its config does not cover"),
        ("rank", AdapterFormatError, "the config says rank 5"),
        ("dora", UnsupportedAdapter, "use_dora is true"),
        ("pickle", AdapterFormatError, "as a pickle"),
        ("nan", AdapterFormatError, "not finite"),
        ("half", AdapterFormatError, "A and B are both needed"),
        ("embedding", UnsupportedAdapter, "no LoRA factor of a linear"),
    ],
)
def test_a_spoilt_folder_is_refused(tmp_path: Path, how: str, error: type[AtollError], said: str) -> None:
    """Applying the half of an adapter that is understood would be silently wrong."""
    write_generic_adapter(tmp_path, random_t5_adapter(linear_shapes(tiny_t5()), 1))
    spoilt(tmp_path, how)
    with pytest.raises(error, match=said):
        read_generic_adapter(tmp_path)


def test_bases_are_loaded_from_their_folder_or_refused(tmp_path: Path, tiny_base_dir: Path) -> None:
    folder = write_tiny_t5(tmp_path / "base")
    model = load_encoder_decoder(str(folder))
    assert len(model.linears) == 2 * 7 + 2 * 11
    assert "lm_head" not in model.linears
    assert OUTPUTS[0] == model.tokenizer.decode(model.tokenizer(OUTPUTS[0]).input_ids, skip_special_tokens=True)
    with pytest.raises(BaseFormatError, match="no encoder-decoder model"):
        load_encoder_decoder(str(tiny_base_dir))
    with pytest.raises(BaseNotFound, match="neither a folder"):
        base_folder("no such base")
    (folder / "model.safetensors").unlink()
    with pytest.raises(BaseFormatError, match=r"no \*\.safetensors"):
        load_encoder_decoder(str(folder))
    (folder / "config.json").unlink()
    with pytest.raises(BaseFormatError, match=r"no config.json"):
        load_encoder_decoder(str(folder))

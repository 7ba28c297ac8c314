"""LoRA's relatives in training: rsLoRA, DoRA, LoRA+, PiSSA and OLoRA take PEFT's steps; NEFTune's noise is drawn as its paper says."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.adapters import CLOSE, ROWS, packed_logits, peft_model, reference
from tests.conftest import tiny_model
from tests.train.jobs import log_lines, toy_config, toy_decoder, toy_job, toy_rows

from atoll.config import TrainConfig, TrainerConfig
from atoll.config_adapter import LoraAdapterConfig
from atoll.data.batches import epoch_batches
from atoll.errors import ConfigError
from atoll.model.adapter import AdapterSpec
from atoll.model.adapter_files import read_adapter, write_adapter
from atoll.model.decoder import Decoder
from atoll.train.job import entering_states
from atoll.train.plan import _LATER_ADAPTER, _LATER_TRAINER, _without_defaults
from atoll.train.schedule import learning_rate
from atoll.train.start import Start, converted, start_adapter

STEPS = 6
SPEC = AdapterSpec("tiny", 4, 8.0)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return toy_decoder()


def their_steps(model: Any, groups: list[dict[str, Any]], config: TrainerConfig) -> Iterator[float]:
    """The losses of PEFT's model under AdamW, on the rows and at the rates of the toy job; each group has its share of the rate."""
    rows, optimizer = toy_rows(), torch.optim.AdamW(groups, lr=0.0, weight_decay=config.weight_decay)
    for step in range(STEPS):
        epoch, place = divmod(step, 4)
        chosen = [rows[i] for i in epoch_batches([len(row.token_ids) for row in rows], 6, 0, epoch)[place]]
        losses = []
        for row in chosen:
            labels = torch.tensor(row.token_ids[row.num_prompt :])
            losses.append(F.cross_entropy(reference(model, row.token_ids[:-1])[row.num_prompt - 1 :], labels, reduction="sum"))
        loss = torch.stack(losses).sum() / sum(row.num_labels for row in chosen)
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, STEPS, config) * group["share"]
        optimizer.step()
        yield float(loss.detach())


def trained(model: Any) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def own_losses(folder: Path) -> list[float]:
    return [line["loss"] for line in log_lines(folder) if "loss" in line]


def job_of(decoder: Decoder, folder: Path, start: Start, b_ratio: float | None = None, **config: Any) -> Any:
    settings = {"max_steps": STEPS, "max_grad_norm": 0, "weight_decay": 0.1, **config}
    job = toy_job(folder, decoder=decoder, adapter=start.adapter, **settings)
    return type(job)(
        decoder,
        start.adapter,
        toy_rows(),
        config.pop("validation", ()),
        toy_config(**settings),
        folder,
        "job",
        removed=start.removed,
        b_ratio=b_ratio,
    )


@pytest.mark.parametrize("method", ["rslora", "dora", "loraplus"])
def test_six_steps_are_pefts_six_steps(decoder: Decoder, tmp_path: Path, method: str) -> None:
    """From the same start, with the same rows and rates: a gradient, a scale or a rate that differs shows in the losses after it."""
    spec = AdapterSpec("tiny", 4, 8.0, use_rslora=method == "rslora", use_dora=method == "dora")
    start, ratio = start_adapter(spec, decoder, 0), 16.0 if method == "loraplus" else None
    decay = 0.0 if method == "dora" else 0.1  # PEFT's users decay magnitudes too; here they are not
    job = job_of(decoder, tmp_path / "ours", start, ratio, weight_decay=decay)
    result = job.run()
    model = peft_model(tiny_model("llama"), start.adapter, tmp_path / "start")
    groups: list[dict[str, Any]] = [{"params": trained(model), "share": 1.0}]
    if ratio is not None:
        from peft.optimizers import create_loraplus_optimizer

        theirs = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1.0, loraplus_lr_ratio=ratio, loraplus_weight_decay=decay)
        groups = [{"params": group["params"], "share": group["lr"]} for group in theirs.param_groups if group["params"]]
        assert sorted({group["share"] for group in groups}) == [1.0, ratio]
    expected = list(their_steps(model, groups, toy_config(max_steps=STEPS, weight_decay=decay)))
    assert own_losses(tmp_path / "ours") == pytest.approx(expected, rel=1e-3)
    write_adapter(tmp_path / "end", result.adapter)
    base = decoder.new_bank().load(read_adapter(tmp_path / "end"))
    with torch.no_grad():
        for found, row in zip(packed_logits(decoder, ROWS, [base] * len(ROWS)), ROWS, strict=True):
            torch.testing.assert_close(found, reference(model, row), rtol=0, atol=2e-3)  # six steps of AdamW amplify rounding


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_starts_in_the_base_are_pefts_and_are_saved_for_the_unchanged_base(decoder: Decoder, tmp_path: Path, init: str) -> None:
    """PEFT changes the base and converts when it saves; here the base is shared. Before training both are the base; what they save agrees."""
    from peft import LoraConfig, get_peft_model

    start = start_adapter(SPEC, decoder, 0, init)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(
            tiny_model("llama"), LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=init)
        )
    for site, module in start.adapter.modules.items():
        layer = model.get_submodule(
            f"base_model.model.model.layers.{site.layer}.{'mlp' if 'proj' in site.target and site.target[0] in 'gud' else 'self_attn'}.{site.target}"
        )
        theirs = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        torch.testing.assert_close(module.b @ module.a, theirs.detach(), rtol=0, atol=1e-5)
    model.save_pretrained(tmp_path / "initial")
    job = job_of(decoder, tmp_path / "ours", start)
    before = packed_logits(decoder, ROWS, [job.weights] * len(ROWS))
    for found, row in zip(before, ROWS, strict=True):
        torch.testing.assert_close(found.detach(), reference(tiny_model("llama"), row).detach(), **CLOSE)
    result = job.run()
    expected = list(their_steps(model, [{"params": trained(model), "share": 1.0}], toy_config(max_steps=STEPS, weight_decay=0.1)))
    assert own_losses(tmp_path / "ours") == pytest.approx(expected, rel=2e-3)
    assert result.adapter.spec.rank == 8
    assert all(module.rank == 8 and module.scaling == 2.0 for module in result.adapter.modules.values())
    write_adapter(tmp_path / "saved", result.adapter)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    ours, theirs_converted = read_adapter(tmp_path / "saved"), read_adapter(tmp_path / "converted")
    assert (ours.spec.rank, ours.spec.alpha) == (theirs_converted.spec.rank, theirs_converted.spec.alpha)
    bank = decoder.new_bank()
    slots = [bank.load(adapter) for adapter in (ours, theirs_converted)]
    with torch.no_grad():
        one, other = (torch.cat(packed_logits(decoder, ROWS, [slot] * len(ROWS))) for slot in slots)
        trained_here = torch.cat(packed_logits(decoder, ROWS, [job.weights] * len(ROWS)))
        exact = torch.cat([reference(model, row) for row in ROWS])
    torch.testing.assert_close(one, trained_here, rtol=0, atol=2e-5)
    torch.testing.assert_close(other, exact, rtol=0, atol=2e-5)
    torch.testing.assert_close(one, other, rtol=0, atol=5e-3)  # six steps of AdamW amplify rounding


def test_the_saved_scale_is_the_trained_one_under_every_rule(decoder: Decoder) -> None:
    """Twice the rank with twice alpha, or with √2 of it for rsLoRA; patterns too."""
    for rslora in (False, True):
        spec = AdapterSpec("tiny", 4, 8.0, use_rslora=rslora, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3.0})
        start = start_adapter(spec, decoder, 0, "olora")
        assert start.removed is not None
        saved = converted(start.adapter, start.removed)
        for site, module in saved.modules.items():
            assert module.scaling == pytest.approx(start.adapter.modules[site].scaling)
            assert module.rank == 2 * start.adapter.modules[site].rank
            assert float((module.b @ module.a).abs().max()) < 1e-5  # nothing has been trained yet


def test_a_random_sketch_is_near_the_exact_start_and_follows_the_seed(decoder: Decoder) -> None:
    """pissa_niter_N is for large bases: nearly the same directions, and the same for the same seed."""
    exact, fast, again = (start_adapter(SPEC, decoder, 3, init).adapter.modules for init in ("pissa", "pissa_niter_16", "pissa_niter_16"))
    for site, module in exact.items():
        assert torch.equal(fast[site].a, again[site].a)
        weight = decoder.weight(site)
        left, least = (float((weight - found.scaling * found.b @ found.a).norm()) for found in (fast[site], module))
        assert least <= left <= 1.01 * least


def test_a_rank_beyond_a_linears_width_is_refused_by_the_starts_that_need_it(decoder: Decoder) -> None:
    """There are no more directions than that."""
    with pytest.raises(ConfigError, match="cannot start with rank 48"):
        start_adapter(AdapterSpec("tiny", 48, 48.0), decoder, 0, "pissa")


def test_a_gaussian_start_has_pefts_spread(decoder: Decoder) -> None:
    """A normal of deviation 1 / r, B zero."""
    modules = start_adapter(SPEC, decoder, 0, "gaussian").adapter.modules
    drawn = torch.cat([module.a.flatten() for module in modules.values()])
    assert float(drawn.std()) == pytest.approx(1 / 4, rel=0.05)
    assert not any(bool(module.b.any()) for module in modules.values())


@pytest.mark.parametrize("method", ["dora", "loraplus", "pissa", "neftune"])
def test_a_resumed_run_ends_as_one_in_peace(decoder: Decoder, tmp_path: Path, method: str) -> None:
    """Lengths, starts and noise follow from config, step and values: nothing of a method is lost with the process."""
    spec = AdapterSpec("tiny", 4, 8.0, use_dora=method == "dora", dropout=0.1)
    changes = {"neftune_noise_alpha": 5.0} if method == "neftune" else {}

    def make(folder: str) -> Any:
        start = start_adapter(spec, decoder, 0, "pissa" if method == "pissa" else "default")
        return job_of(decoder, tmp_path / folder, start, 4.0 if method == "loraplus" else None, checkpoint_every=3, **changes)

    whole = make("peace").run().adapter
    from atoll.train.loop import _round, _Running

    halved = make("halved")
    halved.open()
    for _ in range(3):
        _round([halved], {id(halved): _Running(0, halved)})
    halved.close()
    resumed = make("halved")
    adapter = resumed.run().adapter
    assert resumed.progress.step == STEPS
    for site, module in whole.modules.items():
        assert all(torch.equal(one, other) for one, other in zip(module.tensors, adapter.modules[site].tensors, strict=True))


# ---- NEFTune


def test_noise_keeps_no_states(decoder: Decoder) -> None:
    """What enters a block differs in every step; a dry run counts on the same."""
    config = TrainerConfig(epochs=3, batch_size=2)
    assert entering_states(decoder, 1, 8, config) is not None
    assert entering_states(decoder, 1, 8, config.model_copy(update={"neftune_noise_alpha": 5.0})) is None


def test_noise_has_the_papers_size_and_is_for_training_alone(decoder: Decoder, tmp_path: Path) -> None:
    """Uniform in ± alpha / √(L D) of the row's own length; another in every row, step and job, the same when drawn again."""
    job = job_of(decoder, tmp_path, start_adapter(SPEC, decoder, 0), neftune_noise_alpha=5.0)
    groups = job.begin_step()
    assert all(group.shared == 0 for group in groups)
    assert not job.enters_above
    job.enter(groups[0], 0)
    drawn, bound = job.noise(63, 0), 5.0 / math.sqrt(64 * 64)
    assert drawn.shape == (63, 64)
    assert 0.98 * bound < float(drawn.abs().max()) <= bound
    assert torch.equal(drawn, job.noise(63, 0))
    assert not torch.equal(drawn, job.noise(63, 1))
    job.enter(groups[0], 1)
    assert not torch.equal(drawn, job.noise(63, 0))
    job.enter(groups[0], None)
    assert job.noise(63, 0) is None


def test_noise_changes_training_and_a_job_beside_it_keeps_its_own_steps(decoder: Decoder, tmp_path: Path) -> None:
    """Jobs that share a forward: the noise of one must not reach the rows of the other."""
    from atoll.train.loop import train_jobs

    start = start_adapter(SPEC, decoder, 0)
    alone = job_of(decoder, tmp_path / "alone", start).run().adapter
    noisy = job_of(decoder, tmp_path / "noisy", start, neftune_noise_alpha=5.0).run().adapter
    found: dict[int, Any] = {}
    makers = [lambda: job_of(decoder, tmp_path / "a", start), lambda: job_of(decoder, tmp_path / "b", start, neftune_noise_alpha=5.0)]
    train_jobs(makers, lambda index, result: found.update({index: result}))
    for index, wanted in enumerate((alone, noisy)):
        for site, module in found[index].adapter.modules.items():
            torch.testing.assert_close(module.b, wanted.modules[site].b, rtol=0, atol=2e-4)
    site = next(iter(alone.modules))
    assert float((alone.modules[site].b - noisy.modules[site].b).abs().max()) > 1e-3


# ---- Settings


def test_jobs_of_before_keep_their_identity_and_each_method_has_another() -> None:
    """Keys that came later are in a job's identity only where they change its weights."""
    plain = _without_defaults(LoraAdapterConfig(), _LATER_ADAPTER)
    assert not plain.keys() & set(_LATER_ADAPTER)
    assert "neftune_noise_alpha" not in _without_defaults(TrainerConfig(), _LATER_TRAINER)
    for change in ({"use_dora": True}, {"init_lora_weights": "pissa"}, {"loraplus_lr_ratio": 16}):
        assert _without_defaults(LoraAdapterConfig(**change), _LATER_ADAPTER) == plain | change
    assert _without_defaults(TrainerConfig(neftune_noise_alpha=5), _LATER_TRAINER)["neftune_noise_alpha"] == 5


@pytest.mark.parametrize(
    ("adapter", "said"),
    [
        (
            {"use_dora": True, "init_lora_weights": "pissa"},
            "and pissa begins by taking a part out of these weights; leave one",
        ),
        ({"use_dora": True, "init_lora_weights": "olora"}, "use_dora cannot start"),
        ({"r": 600, "init_lora_weights": "pissa"}, "saves twice the rank 600"),
        ({"rank_pattern": {"q_proj": 513}, "init_lora_weights": "olora"}, "saves twice the rank 513"),
        ({"init_lora_weights": "loftq"}, "must be default, gaussian, pissa"),
        ({"init_lora_weights": False}, "must be default, gaussian, pissa"),
        ({"loraplus_lr_ratio": 0.5}, "loraplus_lr_ratio"),
        ({"type": "loreft", "use_dora": True}, "use_dora is a key of LoRA"),
    ],
)
def test_combinations_that_make_no_sense_are_refused(adapter: dict[str, Any], said: str) -> None:
    """One sentence, before anything is loaded."""
    with pytest.raises(ConfigError) as refused:
        TrainConfig(base="x", adapter=adapter)  # type: ignore[arg-type]
    assert said in refused.value.message


def test_pefts_word_for_the_default_start_is_read() -> None:
    """`init_lora_weights: true` stands in many files."""
    assert LoraAdapterConfig(init_lora_weights=True).init_lora_weights == "default"  # type: ignore[arg-type]

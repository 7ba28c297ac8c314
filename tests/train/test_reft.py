"""ReFT in the training loop: alone and beside LoRA, with projections that stay orthonormal and lower blocks that run once."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.adapters import decoder_of, packed_logits, random_adapter, random_reft
from tests.conftest import tiny_model
from tests.train.jobs import log_lines, toy_config, toy_decoder, toy_job, toy_reft, toy_rows
from tests.written_reft import EVERY_FORM, hooked, moved_intervention
from torch import Tensor

from atoll.config import TrainerConfig
from atoll.data.encode import EncodedRow
from atoll.errors import Interrupted, TrainingError
from atoll.model.adapter import Adapter, AdapterSpec
from atoll.model.batch import PackedBatch
from atoll.model.decoder import Decoder
from atoll.model.loss import label_losses
from atoll.model.positions import PREFIX, Positions
from atoll.model.reft import COMPONENTS, METHODS, ORTHONORMAL, EditSite, Intervention, ReftSpec
from atoll.train.entering import Room
from atoll.train.job import TrainingJob, TrainResult
from atoll.train.loop import train, train_jobs
from atoll.train.reft_masters import ReftMasters
from atoll.train.rows import RowGroup, adapter_batch, label_batch, pack_groups
from atoll.train.weights import TrainableAdapter

# Prompts of 6, 3 and 1 tokens, so that sides are cut; the first learns its prompt too, since first tokens behind the last block decide nothing else.
ROWS = [
    EncodedRow([5, 6, 7, 8, 9, 10, 40, 41, 2], 6, "a", train_on_prompt=True),
    EncodedRow([20, 21, 22, 42, 43, 44, 2], 3, "b"),
    EncodedRow([30, 45, 2], 1, "c"),
]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def decoder(model: Any) -> Decoder:
    return decoder_of(model)


def gradients(decoder: Decoder, adapter: Adapter, rows: list[EncodedRow]) -> TrainableAdapter:
    """A job's masters with the gradient of the rows' summed loss."""
    weights = TrainableAdapter(adapter, decoder.shape.linears)
    summed_loss(decoder, [weights] * len(rows), rows).backward()
    return weights


def summed_loss(decoder: Decoder, weights: list[TrainableAdapter], rows: list[EncodedRow]) -> Tensor:
    packed = pack_groups([RowGroup([row]) for row in rows], "cpu")
    return label_losses(decoder.forward(packed.batch, adapter_batch(packed, weights)), decoder.head, packed.labels).sum()


def asymmetry(adapter: Adapter) -> float:
    """How far the R's are from orthonormal rows: the largest element of R Rᵀ - I, over all sites."""
    worst = 0.0
    for found in adapter.edits.values():
        r = found.r.double()
        worst = max(worst, float((r @ r.T - torch.eye(len(r), dtype=torch.float64)).abs().max()))
    return worst


def assert_close(found: Tensor, truth: Tensor, rtol: float = 1e-4) -> None:
    """To a share of the largest element."""
    torch.testing.assert_close(found, truth, rtol=0, atol=rtol * float(truth.abs().max()) + 1e-7)


# ---- Gradients


@pytest.mark.parametrize("form", EVERY_FORM, ids=str)
def test_gradients_are_autograds_through_transformers(model: Any, decoder: Decoder, form: dict[str, Any]) -> None:
    """The masters lie stacked and are fused once a forward; what comes back must be each tensor's own gradient, method by method."""
    spec = ReftSpec(rank=2, positions=Positions(first=2, last=3), tied=False, rank_pattern={1: 3}, **form)
    asked = AdapterSpec.reft_only("tiny", [spec])
    sites = asked.edit_sites(3)
    adapter = Adapter(asked, {}, edits={site: moved_intervention(spec, 64, seed, site.layer) for seed, site in enumerate(sites)})
    ours = gradients(decoder, adapter, ROWS)
    found = ours.adapter(ours.grads)
    leaves = {site: Intervention(**{n: t.clone().requires_grad_() for n, t in edit.tensors.items()}) for site, edit in adapter.edits.items()}
    total = torch.zeros(())
    for row in ROWS:
        with hooked(model, Adapter(asked, {}, edits=leaves), row.num_prompt):
            logits = model(torch.tensor([row.token_ids[:-1]])).logits[0]
        labels = torch.tensor(row.token_ids[row.first_label :])
        total = total + torch.nn.functional.cross_entropy(logits[row.first_label - 1 :], labels, reduction="sum")
    total.backward()
    for site in sites:
        for name, leaf in leaves[site].tensors.items():
            assert leaf.grad is not None, (site, name)
            assert_close(found.edits[site].tensors[name], leaf.grad)


def test_jobs_in_one_batch_get_the_gradients_of_each_alone(decoder: Decoder) -> None:
    """Five jobs over one base share a forward: LoRA, ReFT of two kinds, both, and rows of one job apart from each other."""
    adapters = [
        random_adapter(decoder, 4, seed=1),
        random_reft(decoder, seed=2, rank=2, positions=Positions(first=2, last=2)),
        random_reft(decoder, seed=3, method="direft", rank=3, layers=(1,), component="mlp_input", positions=Positions(all_prompt=True)),
        random_reft(decoder, seed=4, lora=2, rank=2, tied=False, positions=Positions(first=1, last=1)),
    ]
    rows = [*ROWS, *toy_rows(7)]
    jobs = [TrainableAdapter(adapter, decoder.shape.linears) for adapter in adapters]
    owners = [i % 4 for i in range(len(rows))]
    summed_loss(decoder, [jobs[owner] for owner in owners], rows).backward()
    for index, job in enumerate(jobs):
        alone = gradients(decoder, adapters[index], [row for row, owner in zip(rows, owners, strict=True) if owner == index])
        assert job.grads.any()
        assert_close(job.grads, alone.grads, rtol=1e-5)


def test_edits_are_fused_once_a_forward(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many rows a job has in a batch."""
    weights = TrainableAdapter(toy_reft(), decoder.shape.linears)
    fuse, calls = ReftMasters.parts, list[int | None]()
    monkeypatch.setattr(ReftMasters, "parts", lambda self, seed: calls.append(seed) or fuse(self, seed))
    adapter_batch(label_batch(ROWS, "cpu"), [weights] * 3)
    assert len(calls) == 1


def test_nothing_below_the_first_changed_block_has_a_gradient(decoder: Decoder) -> None:
    """The backward pass ends where the job begins: an edit of the last block must not cost a walk through the base."""
    weights = TrainableAdapter(toy_reft(layers=(2,)), decoder.shape.linears)
    packed = label_batch(ROWS, "cpu")
    loss = label_losses(decoder.forward(packed.batch, adapter_batch(packed, [weights] * 3)), decoder.head, packed.labels).sum()
    seen, waiting = set[Any](), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [parent for parent, _ in node.next_functions]
    names = [type(node).__name__ for node in seen]
    assert sum("LoraLinear" in name for name in names) == 0, "the edit stands behind the last block's linears"
    assert sum("RmsNorm" in name for name in names) == 1


# ---- Masters


@pytest.mark.parametrize("form", [*EVERY_FORM, {"tied": False, "rank_pattern": {0: 1, 2: 5}}], ids=str)
def test_a_reft_adapter_goes_in_and_comes_out_bit_for_bit(decoder: Decoder, form: dict[str, Any]) -> None:
    """Stacking by rank and flattening lose nothing, and the vector holds the adapter's parameters and no others."""
    adapter = random_reft(decoder, lora=2, **{"rank": 3, **form})
    weights = TrainableAdapter(adapter, decoder.shape.linears)
    out = weights.adapter()
    assert weights.values.numel() == adapter.num_parameters == out.num_parameters
    assert out.spec == adapter.spec
    assert out.edits.keys() == adapter.edits.keys()
    with torch.no_grad():
        weights.values.zero_()
    for site, found in adapter.edits.items():
        assert out.edits[site].tensors.keys() == found.tensors.keys()
        assert all(torch.equal(out.edits[site].tensors[name], tensor) for name, tensor in found.tensors.items())
    assert all(torch.equal(out.modules[site].b, module.b) for site, module in adapter.modules.items())


def test_training_forwards_are_those_of_the_served_adapter(decoder: Decoder) -> None:
    """What is trained must be what a bank serves: fused, at the same tokens."""
    adapter = random_reft(decoder, lora=3, rank=2, tied=False, positions=Positions(first=1, last=2))
    weights = TrainableAdapter(adapter, decoder.shape.linears)
    slot = decoder.new_bank().load(adapter)
    with torch.no_grad():
        for trained, served in zip(
            *(packed_logits(decoder, [row.token_ids for row in ROWS], [w] * 3, [6, 3, 1]) for w in (weights, slot)), strict=True
        ):
            torch.testing.assert_close(trained, served, rtol=0, atol=1e-5)


def groups_of(adapter: Adapter, **config: Any) -> list[tuple[int, float, float]]:
    """(elements, learning rate, weight decay) of each group of the optimizer."""
    weights = TrainableAdapter(adapter, toy_decoder().shape.linears)
    return [(group["params"][0].numel(), group["lr"], group["weight_decay"]) for group in weights.parameter_groups(TrainerConfig(**config))]


def test_only_factors_and_w_decay_and_reft_beside_lora_has_its_own_rate() -> None:
    """A decayed R is no projection any more; a rate for LoRA's factors hardly moves an edit of a few thousand numbers."""
    alone, both = toy_reft(), toy_reft(lora=2)
    num_w, num_kept = 3 * 2 * 64, 3 * (2 * 64 + 2)
    lora = both.num_parameters - num_w - num_kept
    assert groups_of(alone, learning_rate=1e-3) == [(num_w + num_kept, 1e-3, 0.0)], "one group is one operation"
    assert groups_of(alone, learning_rate=1e-3, weight_decay=0.1) == [(num_w + num_kept, 1e-3, 0.0)]
    assert groups_of(alone, learning_rate=1e-3, reft_weight_decay=0.1) == [(num_w, 1e-3, 0.1), (num_kept, 1e-3, 0.0)]
    rates = {"learning_rate": 1e-3, "reft_learning_rate": 5e-3, "weight_decay": 0.1, "reft_weight_decay": 0.2}
    assert groups_of(both, **rates) == [(lora, 1e-3, 0.1), (num_w, pytest.approx(5e-3), 0.2), (num_kept, pytest.approx(5e-3), 0.0)]


def test_every_step_and_site_draws_its_own_dropout_mask(decoder: Decoder) -> None:
    """On the edit, only while training, and apart from LoRA's masks."""
    weights = TrainableAdapter(random_reft(decoder, rank=2, dropout=0.5, tied=False), decoder.shape.linears)

    def edits() -> list[Any]:
        return [side.edit(layer, COMPONENTS.index("block_output")) for part in weights.parts for side in part.sides for layer in range(3)]

    assert [edit.dropout for edit in edits()] == [0.0] * 6
    seeds = set()
    for step in range(50):
        weights.dropout_seed = (17 * 1_000_003 + step) * 1024
        found = edits()
        assert [edit.dropout for edit in found] == [0.5] * 6
        seeds |= {edit.dropout_seed for edit in found}
    assert len(seeds) == 50 * 6
    assert max(seeds) < 2**32


# ---- Training


@pytest.mark.parametrize("method", METHODS)
def test_each_method_learns(method: str, tmp_path: Path) -> None:
    """The loss of a toy task falls from the base's, and the adapter comes out with everything a method must have."""
    job = toy_job(tmp_path, adapter=toy_reft(method=method, rank=4), epochs=15, learning_rate=3e-2)
    result = job.run()
    losses = [line["loss"] for line in log_lines(tmp_path)]
    assert sum(losses[-4:]) < {"lobireft": 0.9, "consreft": 0.75}.get(method, 0.7) * sum(losses[:4])
    result.adapter.check_fits(toy_decoder().shape.linears, 3)
    if method in ORTHONORMAL:
        assert asymmetry(result.adapter) < 1e-5


def test_projections_stay_orthonormal_whatever_decays_and_resumes(tmp_path: Path) -> None:
    """PyReFT's are zeroed by weight decay and drift after a resume (0.13 after 50 steps)."""

    class Stop:
        def __call__(self, headline: str, step: int, total: int) -> None:
            if step == 20:
                import signal

                signal.raise_signal(signal.SIGINT)

    def job() -> TrainingJob:
        adapter = toy_reft(rank=4, rank_pattern={1: 2}, tied=False)
        return toy_job(tmp_path, adapter=adapter, max_steps=60, learning_rate=2e-2, weight_decay=0.5, reft_weight_decay=0.5)

    first = job()
    with pytest.raises(Interrupted):
        first.run(Stop())
    half = first.weights.adapter()
    assert asymmetry(half) < 1e-5
    result = job().run()
    assert result.progress.step == 60
    assert asymmetry(result.adapter) < 1e-5
    moved = {site: float((result.adapter.edits[site].r - found.r).abs().max()) for site, found in half.edits.items()}
    del moved[EditSite(0, 2, "block_output", PREFIX)]  # nothing reads first tokens behind the last block
    assert min(moved.values()) > 1e-3, "the projections must have been trained, or nothing is tested"


def test_decay_shrinks_w_and_nothing_else(tmp_path: Path) -> None:
    """Steps without a gradient (no edited token in their rows) leave decay alone: W gets smaller, every other tensor keeps its bits."""
    start = toy_reft(method="noreft", bias=True, positions=Positions(listed=(30,)))
    rows = [*toy_rows(), EncodedRow([*range(5, 40), 2], 35, "long")]  # one batch an epoch has a prompt of more than 30 tokens
    job = toy_job(tmp_path, adapter=start, rows=rows, max_steps=3, learning_rate=0.1, reft_weight_decay=0.5, seed=1)
    assert all(24 not in job._rows_of_step(step) for step in range(3)), "choose another seed"
    for site, found in job.run().adapter.edits.items():
        for name, tensor in found.tensors.items():
            before = start.edits[site].tensors[name]
            assert torch.equal(tensor, before) is (name != "w"), name
        assert found.w is not None and found.w.norm() < 0.95 * start.edits[site].tensors["w"].norm()


def test_lora_and_reft_train_together(tmp_path: Path) -> None:
    """One adapter, one vector, two rates: all tensors of both move, and together they fit better than either share alone does."""
    start = toy_reft(lora=2)
    result = toy_job(tmp_path / "both", adapter=start, epochs=3, reft_learning_rate=1e-2).run()
    assert result.adapter.spec.kind == "lora+reft"
    for site, module in start.modules.items():
        assert not torch.equal(result.adapter.modules[site].b, module.b)
    for edit_site, found in start.edits.items():
        changed = result.adapter.edits[edit_site].tensors
        assert all(not torch.equal(changed[name], tensor) for name, tensor in found.tensors.items())
    still = dataclasses.replace(start, edits={})
    lora = toy_job(tmp_path / "lora", adapter=dataclasses.replace(still, spec=dataclasses.replace(start.spec, reft=())), epochs=3).run()
    assert result.progress.train_loss is not None and lora.progress.train_loss is not None
    assert result.progress.train_loss < lora.progress.train_loss


def test_dropout_on_the_edit_changes_training_and_follows_the_seed(tmp_path: Path) -> None:
    """As LoRA's does."""
    ends = []
    for name, dropout, seed in (("none", 0.0, 0), ("some", 0.3, 0), ("same", 0.3, 0), ("other", 0.3, 1)):
        job = toy_job(tmp_path / name, adapter=toy_reft(dropout=dropout), max_steps=3, seed=seed)
        job.run()
        ends.append(job.weights.values.detach().clone())
    assert not torch.equal(ends[0], ends[1])
    assert torch.equal(ends[1], ends[2])
    assert not torch.equal(ends[1], ends[3])


def test_the_best_step_comes_out_with_its_projections(tmp_path: Path) -> None:
    """The best values are a copy of the vector after its retraction, not of the step that was half done."""
    validation = toy_rows(6, shift=80)
    result = toy_job(
        tmp_path, adapter=toy_reft(rank=4), validation=validation, epochs=15, eval_every=1, learning_rate=1e-2, early_stop_patience=None
    ).run()
    assert result.progress.best_step < result.progress.step
    assert asymmetry(result.adapter) < 1e-5
    decoder = toy_decoder()
    with torch.no_grad():
        weights = TrainableAdapter(result.adapter, decoder.shape.linears)
        loss = float(summed_loss(decoder, [weights] * 6, validation)) / sum(row.num_labels for row in validation)
    assert loss == pytest.approx(result.progress.best_loss, rel=1e-5)


def test_positions_that_no_prompt_has_are_refused_before_the_first_step(tmp_path: Path) -> None:
    """Some rows without an edited token are the user's business; a job in which nothing can change is a mistake."""
    with pytest.raises(TrainingError, match=r"no prompt of the 24 training rows has a token at \[400\]") as found:
        toy_job(tmp_path, adapter=toy_reft(positions=Positions(listed=(400,))))
    assert "l1" in found.value.hint
    toy_job(tmp_path, adapter=toy_reft(lora=2, positions=Positions(listed=(400,))), max_steps=1).run()


def test_edits_that_no_answer_depends_on_are_refused_before_the_first_step(tmp_path: Path) -> None:
    """Behind the last block's keys and values a token is its own reader: its gradient is zero, and the loss would stand still without a word."""
    first = Positions(first=1)
    for component in ("attention_output", "mlp_input", "mlp_output", "block_output"):
        with pytest.raises(TrainingError, match=f"no answer depends on the tokens at f1 behind the last block's {component}"):
            toy_job(tmp_path, adapter=toy_reft(layers=(2,), component=component, positions=first))
    whole = [dataclasses.replace(row, train_on_prompt=True) for row in toy_rows()]
    for name, rows, part in (
        ("input", None, {"component": "attention_input"}),
        ("lower", None, {"layers": (1, 2)}),
        ("last", None, {"positions": Positions(first=1, last=1)}),
        ("prompt", whole, {}),
    ):
        adapter = toy_reft(**{"layers": (2,), "positions": first, **part})
        toy_job(tmp_path / name, adapter=adapter, rows=rows, max_steps=1, batch_size=24).run()
        assert log_lines(tmp_path / name)[0]["grad_norm"] > 0, name


# ---- What enters the first changed block


@pytest.mark.parametrize("kind", ["reft", "lora"])
def test_kept_states_change_no_bit_of_the_end(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows kept, some, or none: the job ends with the same vector, and the lower blocks ran once a row, or again and again."""
    adapter = toy_reft(layers=(1, 2)) if kind == "reft" else random_adapter(toy_decoder(), 2, layers_to_transform=(2,))
    calls = list[int]()
    below = Decoder.residual_before

    def counted(self: Decoder, layer: int, batch: PackedBatch) -> Tensor:
        calls.append(layer)
        return below(self, layer, batch)

    monkeypatch.setattr(Decoder, "residual_before", counted)
    ends, counts = [], []
    for name, budget in (("all", 1 << 20), ("some", 4096), ("none", 0)):
        monkeypatch.setattr("atoll.train.job.MIB", 1)  # so that the budget below is in bytes
        calls.clear()
        job = toy_job(tmp_path / name, adapter=adapter, validation=toy_rows(5, shift=33), epochs=3, reuse_mib=budget)
        job.run()
        ends.append(job.weights.values.detach().clone())
        counts.append(len(calls))
        assert set(calls) == {1 if kind == "reft" else 2}
    assert torch.equal(ends[0], ends[1])
    assert torch.equal(ends[0], ends[2])
    distinct = {tuple(row.token_ids[:-1]) for row in [*toy_rows(), *toy_rows(5, shift=33)]}
    assert counts[0] == len(distinct) < counts[1] < counts[2] == 3 * (24 + 5)


def test_kept_states_are_the_forwards_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to rounding, a job that starts at block 2 is the job that runs all blocks."""
    ends = []
    for name, keeps in (("kept", True), ("whole", False)):
        if not keeps:
            monkeypatch.setattr("atoll.train.job.entering_states", lambda *_: None)
        job = toy_job(tmp_path / name, adapter=toy_reft(layers=(2,), component="block_input"), validation=toy_rows(5), epochs=2)
        result = job.run()
        ends.append((job.weights.values.detach().clone(), result.progress.best_loss))
    torch.testing.assert_close(ends[0][0], ends[1][0], rtol=0, atol=1e-4)
    assert ends[0][1] == pytest.approx(ends[1][1], abs=1e-4)


def test_nothing_is_kept_where_it_does_not_pay(decoder: Decoder, tmp_path: Path) -> None:
    """A job that changes the first block has nothing below it, and in a single epoch no row comes twice."""
    assert toy_job(tmp_path, adapter=toy_reft())._entering is None
    assert toy_job(tmp_path, adapter=toy_reft(layers=(1,)), epochs=1)._entering is None
    assert toy_job(tmp_path, adapter=toy_reft(layers=(1,)), epochs=2)._entering is not None


def test_jobs_that_train_at_once_share_the_room_for_kept_rows(tmp_path: Path) -> None:
    """Eight jobs with a budget of 1 GiB each would take 8 GiB; what one that has ended kept is free again, and no weight depends on it."""
    room, decoder, most = Room(), toy_decoder(), list[int]()
    one_row = 64 * 4 * 9  # more than the longest has

    def job(name: str, given: Room | None) -> TrainingJob:
        adapter = toy_reft(layers=(2,))
        made = TrainingJob(decoder, adapter, toy_rows(), [], toy_config(epochs=3), tmp_path / name, name, room=given)
        assert made._entering is not None
        made._entering._budget = 3 * one_row
        return made

    found: dict[int, TrainResult | Exception] = {}
    train_jobs([lambda name=name: job(name, room) for name in "abc"], found.__setitem__, at_once=2, report=lambda _: most.append(room.taken))  # type: ignore[misc]
    assert 0 < max(most) <= 3 * one_row
    assert room.taken == 0
    alone = train(job("alone", None)).adapter
    for outcome in found.values():
        assert isinstance(outcome, TrainResult)
        for site, edit in alone.edits.items():
            for name, tensor in edit.tensors.items():
                torch.testing.assert_close(outcome.adapter.edits[site].tensors[name], tensor, rtol=1e-4, atol=1e-5)

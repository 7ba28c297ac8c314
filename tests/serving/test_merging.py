"""A request's merged adapters: what is refused and in which words, what makes two requests the same merge, and the adapter that comes out."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.adapters import CLOSE, ROWS, decoder_of, packed_logits, random_adapter, random_reft, reference
from tests.conftest import tiny_model

from atoll.engine.config import EngineConfig
from atoll.engine.engine import Engine
from atoll.engine.request import Request, SamplingParams
from atoll.errors import BaseMismatch, RequestRefused
from atoll.hub.intake import read_manifest
from atoll.model.adapter import Adapter, LoraModule
from atoll.model.adapter_files import read_adapter, write_adapter
from atoll.model.bank import LoraBank
from atoll.model.base import load_base
from atoll.model.decoder import Decoder
from atoll.model.sites import module_path
from atoll.serving.merging import STRATEGIES, MergeSpec, merge, merge_digest

IDS, WEIGHTS, DIGESTS = ("tickets", "sql"), (0.75, -0.5), ("a" * 64, "b" * 64)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return decoder_of(tiny_model("llama"))


@pytest.fixture(scope="module")
def parents(decoder: Decoder) -> list[Adapter]:
    return [random_adapter(decoder, 8, seed=1), random_adapter(decoder, 8, seed=2, alpha=5.0)]


def spec(**changes: Any) -> MergeSpec:
    return MergeSpec(**{"ids": IDS, "weights": WEIGHTS, **changes})


# --- what is asked ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ids": (), "weights": ()}, "at least one adapter ID must be provided when setting `adapters`"),
        ({"weights": (1.0,)}, "number of adapter IDs must match number of adapter weights"),
        ({"ids": ("tickets", "")}, "empty id"),
        ({"weights": (1.0, float("nan"))}, "weights holds nan"),
        ({"weights": (1.0, float("inf"))}, "weights holds inf"),
        ({"weights": (1.0, -1e30)}, "weights holds -1e+30, expected numbers from -1000.0 to 1000.0"),
        ({"strategy": "tie"}, "merge_strategy is 'tie', expected one of linear, cat, svd, "),
        ({"strategy": "ties"}, "'ties' needs a density above 0, found None"),
        ({"strategy": "dare_linear", "density": 0.0}, "needs a density above 0, found 0.0"),
        ({"strategy": "knots"}, "needs a density"),
        ({"strategy": "ties", "density": 1.5}, "density is 1.5, expected a number from 0 to 1"),
        ({"density": float("nan")}, "density is nan"),
        (
            {"strategy": "ties", "density": 0.5, "majority_sign_method": "loudest"},
            "majority_sign_method is 'loudest', expected one of total, frequency",
        ),
        ({"rank": 0}, "rank is 0"),
        ({"rank": 4096}, "rank is 4096"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_a_merge_that_means_nothing_is_refused(changes: dict[str, Any], message: str) -> None:
    """Found when the request is read, not in a worker thread: LoRAX's router dies of an unknown strategy. Messages are LoRAX's where it has one."""
    with pytest.raises(RequestRefused) as refused:
        spec(**changes)
    assert message in refused.value.message


def test_a_mistyped_strategy_names_the_nearest() -> None:
    """The list says what there is; the hint what was probably meant."""
    with pytest.raises(RequestRefused) as refused:
        spec(strategy="dare-ties")
    assert all(name in refused.value.message for name in STRATEGIES)
    assert refused.value.hint == "did you mean 'dare_ties'?"


def test_nulls_of_a_request_are_the_defaults() -> None:
    """lorax-client sends every field, null where nothing was said, and a density even to strategies that have none."""
    made = MergeSpec.of(list(IDS), [1, 2], merge_strategy=None, density=0.0, majority_sign_method=None, max_merged=2)
    assert made == MergeSpec(IDS, (1.0, 2.0), density=0.0)
    assert made.strategy == "linear"
    with pytest.raises(RequestRefused, match="names 3 adapters, but at most 2"):
        MergeSpec.of(["a", "b", "c"], [1, 1, 1], max_merged=2)


# --- its identity -------------------------------------------------------------------------------------------------------------------------------


def test_everything_that_changes_the_result_changes_the_digest() -> None:
    """The digest is the cache's key and the engine's: two merges that share one would answer for each other."""
    full = spec(strategy="dare_ties", density=0.5, seed=1, rank=4)
    changed = [
        (full, DIGESTS),
        (full, ("a" * 64, "c" * 64)),
        (full, DIGESTS[::-1]),
        (dataclasses.replace(full, weights=(0.75, 0.5)), DIGESTS),
        (dataclasses.replace(full, strategy="ties"), DIGESTS),
        (dataclasses.replace(full, density=0.6), DIGESTS),
        (dataclasses.replace(full, majority_sign_method="frequency"), DIGESTS),
        (dataclasses.replace(full, seed=2), DIGESTS),
        (dataclasses.replace(full, rank=5), DIGESTS),
        (dataclasses.replace(full, rank=None), DIGESTS),
        *((spec(strategy=name, density=0.5), DIGESTS) for name in STRATEGIES if name not in ("cat", "lorahub", "dare_ties", "ties")),
    ]
    digests = {merge_digest(*one) for one in changed}
    assert len(digests) == len(changed)
    assert all(len(digest) == 64 for digest in digests)


def test_what_does_not_change_the_result_does_not_change_the_digest() -> None:
    """One merge, merged once: names of adapters, synonyms of strategies, unused parameters and the sign of zero are not content."""
    one = merge_digest(spec(), DIGESTS)
    for same in (
        spec(ids=("tickets@1", "sql@latest")),
        spec(strategy="cat"),
        spec(density=0.3),
        spec(majority_sign_method="frequency"),
        spec(seed=7),
    ):
        assert merge_digest(same, DIGESTS) == one
    assert merge_digest(spec(strategy="product"), DIGESTS) == merge_digest(spec(strategy="lorahub"), DIGESTS)
    assert merge_digest(spec(weights=(0.0, 1.0)), DIGESTS) == merge_digest(spec(weights=(-0.0, 1)), DIGESTS)
    whole = {"strategy": "dare_linear", "density": 1.0}
    assert merge_digest(spec(**whole, seed=1), DIGESTS) == merge_digest(spec(**whole, seed=2), DIGESTS), "nothing is drawn"


def test_the_digest_is_pinned() -> None:
    """It outlives the process, in caches and records. If a merge gives other factors now, raise _DIGEST_FORM and pin the new one."""
    assert merge_digest(spec(), DIGESTS) == "ca2f9f8f3d7d9d1106ce60eb567a46a1c0475f428e93ae3f4b3fec397bfc83a8"


# --- the adapter it means -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_gives_an_adapter_that_serves_and_stores(decoder: Decoder, parents: list[Adapter], strategy: str, tmp_path: Path) -> None:
    """What the registry does with it: load it into the bank beside its parents; what a user may do: keep it. Twice merged, the same bits."""
    asked = spec(strategy=strategy, density=0.5, seed=3)
    merged = merge(asked, parents, DIGESTS)
    assert all(module.a.dtype == torch.float32 for module in merged.modules.values())
    write_adapter(tmp_path / "merged", merged)
    back, again = read_adapter(tmp_path / "merged"), merge(asked, parents, DIGESTS)
    assert (back.spec, back.manifest) == (merged.spec, merged.manifest)
    for site, module in merged.modules.items():
        assert torch.equal(module.a, again.modules[site].a)
        assert torch.equal(module.b, again.modules[site].b)
    with torch.no_grad():
        bank = LoraBank(decoder.shape.linears, decoder.shape.num_layers, torch.float32)
        slots = [bank.load(back), None, bank.load(parents[0]), bank.load(merged)]
        together = packed_logits(decoder, ROWS, slots)
        for row, slot, mixed in zip(ROWS, slots, together, strict=True):
            torch.testing.assert_close(mixed, packed_logits(decoder, [row], [slot])[0], **CLOSE)
        assert (together[0] - packed_logits(decoder, ROWS[:1])[0]).abs().max() > 0.01


def test_linear_is_the_exact_sum_where_lorax_multiplies(parents: list[Adapter]) -> None:
    """A weight of 2 is twice the update: LoRAX's linear makes it four times, and adds what nobody trained."""
    merged = merge(MergeSpec(("tickets",), (2.0,)), parents[:1])
    for site, module in parents[0].modules.items():
        found = merged.modules[site]
        torch.testing.assert_close(found.b @ found.a, 2 * module.scaling * (module.b @ module.a), rtol=1e-5, atol=1e-6)


def test_the_engine_serves_a_merge_as_it_would_the_merged_weights(parents: list[Adapter], tiny_base_dir: Path, tmp_path: Path) -> None:
    """The whole way: registered under its digest, decoded in one batch with base and parents, against transformers with W + Σ wᵢ ΔWᵢ by hand."""
    base = load_base(str(tiny_base_dir), dtype="float32", home=tmp_path)
    model, asked, prompt = tiny_model("llama"), spec(), [100, 3, 200]
    key = merge_digest(asked, DIGESTS)
    engine = Engine(base, EngineConfig(max_rows=4))
    for name, adapter in zip((*DIGESTS, key), (*parents, merge(asked, parents, DIGESTS)), strict=True):
        engine.register(name, adapter)
    greedy = SamplingParams(max_new_tokens=12, temperature=0.0, ignore_eos=True)
    done = engine.generate([Request(prompt, adapter=adapter, sampling=greedy) for adapter in (None, *DIGESTS, key)])
    with torch.no_grad():
        for site in parents[0].modules:
            weight = model.get_submodule(module_path(site)).weight
            for parent, share in zip(parents, WEIGHTS, strict=True):
                weight.add_(share * parent.modules[site].scaling * (parent.modules[site].b @ parent.modules[site].a))
        tokens = list(prompt)
        for _ in range(12):
            tokens.append(int(reference(model, tokens)[-1].argmax()))
    answers = [tuple(completion.token_ids) for completion in done]
    assert answers[3] == tuple(tokens[len(prompt) :])
    assert len(set(answers)) == 4, "base, parents and merge all say something else"


def test_the_manifest_says_how_it_was_made(parents: list[Adapter], tmp_path: Path) -> None:
    """So that any merge can be made again, and the hub's card shows its lineage."""
    asked = spec(strategy="svd", rank=3)
    merged = merge(asked, parents, DIGESTS)
    write_adapter(tmp_path, merged)
    manifest = read_manifest(tmp_path / "manifest.json")  # the hub takes it
    assert manifest["kind"] == "composed"
    assert manifest["parents"] == [
        {"digest": digest, "name": name, "weight": weight} for digest, name, weight in zip(DIGESTS, IDS, WEIGHTS, strict=True)
    ]
    made = manifest["composition"]
    assert (made["method"], made["rank"], made["weights"]) == ("svd", 3, list(WEIGHTS))
    assert 0 < made["least_energy_kept"] <= made["energy_kept"] < 1
    assert merged.max_rank == 3
    assert "density" not in made
    plain = merge(spec(), parents)
    assert [parent["digest"] for parent in plain.manifest["parents"]] == [None, None]
    assert plain.manifest["composition"] == {"method": "cat", "weights": list(WEIGHTS)}


def test_a_merge_keeps_the_prompt_its_parents_share(parents: list[Adapter]) -> None:
    """Asked in words that no parent knows it would answer badly; asked in one parent's words, by chance."""
    prompt = {"template": "Q: {q}\nA:", "stop": ["\n"]}
    manifests = [{"prompt": prompt, "stop_token_ids": [7], "labels": ["a", "b"]}, {"prompt": prompt, "labels": ["a", "b"]}]
    one, other = (Adapter(parent.spec, parent.modules, manifest) for parent, manifest in zip(parents, manifests, strict=True))
    merged = merge(spec(), [one, other]).manifest
    assert merged["prompt"] == prompt
    assert merged["labels"] == ["a", "b"]
    assert "stop_token_ids" not in merged, "only one parent stops there"
    assert merge(spec(), [one, parents[1]]).manifest["prompt"] is None
    assert merge(spec(), [one, Adapter(other.spec, other.modules, {"prompt": {"template": "{q}"}})]).manifest["prompt"] is None


def test_adapters_of_different_bases_are_not_added(parents: list[Adapter]) -> None:
    """Equal shapes prove nothing: the update of one base means nothing to another. A parent without a record is taken at its shapes."""
    one, other = (Adapter(parent.spec, parent.modules, {"base": {"weights_fingerprint": c * 64}}) for parent, c in zip(parents, "cd", strict=True))
    with pytest.raises(BaseMismatch, match="'tickets' and 'sql' were made for bases with other weights"):
        merge(spec(), [one, other])
    assert merge(spec(), [one, parents[1]]).manifest["base"] == {"weights_fingerprint": "c" * 64}
    assert merge(spec(), [parents[0], parents[1]]).manifest["base"] == {"name": "tiny"}


def test_a_merge_beyond_the_rank_limit_is_refused_before_any_work(decoder: Decoder, parents: list[Adapter]) -> None:
    """Ranks add up: a few ids in a request could ask for an adapter larger than the bank. Compressed, the same request is served."""
    with pytest.raises(RequestRefused, match="merging 2 adapters with 'linear' stacks their ranks to 16; the limit is 15") as refused:
        merge(spec(), parents, max_rank=15)
    assert "give a rank" in refused.value.hint
    assert merge(spec(), parents, max_rank=16).max_rank == 16
    assert merge(spec(rank=12), parents, max_rank=15).max_rank == 12
    assert merge(spec(strategy="svd"), parents, max_rank=15).max_rank == 8, "svd without a rank has the largest of the parents'"
    with pytest.raises(RequestRefused, match="would have rank 12; the limit is 10"):
        merge(spec(rank=12), parents, max_rank=10)
    big = [random_adapter(decoder, 600, target_modules=("k_proj",))] * 2
    with pytest.raises(RequestRefused, match="stacks their ranks to 1200; the limit is 1024"):
        merge(spec(strategy="knots", density=0.5, rank=8), big)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_merge_that_overflows_is_refused(parents: list[Adapter], strategy: str) -> None:
    """Good files with huge values can add up to infinity, which would reach every row of a batch as NaN, or fail deep inside a decomposition."""
    modules = {site: LoraModule((m.a.double() * 2e39).float(), m.b * 1e37, m.scaling) for site, m in parents[0].modules.items()}
    assert all(bool(m.a.isfinite().all()) and bool(m.b.isfinite().all()) for m in modules.values())
    huge = Adapter(parents[0].spec, modules)
    with pytest.raises(RequestRefused, match="merging tickets, sql overflows at layer 0 q_proj"):
        merge(spec(strategy=strategy, density=0.9, weights=(900.0, 900.0), rank=4), [huge, huge])


def test_unequal_ranks_are_refused_by_the_methods_on_factors(decoder: Decoder, parents: list[Adapter]) -> None:
    """LoRAX answers this with a failed generation; it is the client's choice of strategy, and the hint says which ones take any ranks."""
    mixed = [parents[0], random_adapter(decoder, 4)]
    for strategy in ("product", "lorahub", "ties", "dare_linear", "dare_ties", "magnitude_prune"):
        with pytest.raises(RequestRefused, match=r"needs adapters of equal rank.*ranks 8, 4"):
            merge(spec(strategy=strategy, density=0.5), mixed)
    for strategy in ("linear", "svd", "knots"):
        assert merge(spec(strategy=strategy, density=0.5), mixed).max_rank in (8, 12)


def test_adapters_with_edits_merge_exactly_and_store(decoder: Decoder, tmp_path: Path) -> None:
    """A LoRA and a ReFT adapter on one request: linear of the two, served, kept and described like any merge."""
    given = [random_adapter(decoder, 4), random_reft(decoder, 2, rank=3)]
    for strategy in ("linear", "cat"):
        merged = merge(spec(strategy=strategy, weights=(1.0, -0.5)), given, DIGESTS)
        assert merged.spec.kind == "lora+reft"
        assert (merged.manifest["kind"], merged.manifest["composition"]) == ("composed", {"method": "cat", "weights": [1.0, -0.5]})
    write_adapter(tmp_path / "merged", merged)
    bank = decoder.new_bank()
    with torch.no_grad():
        kept, made = (packed_logits(decoder, ROWS, [bank.load(adapter)] * 4) for adapter in (read_adapter(tmp_path / "merged"), merged))
        once = packed_logits(decoder, ROWS, [bank.load(given[0])] * 4)
    assert all(torch.equal(one, other) for one, other in zip(kept, made, strict=True))
    assert all((one - other).abs().max() > 0.01 for one, other in zip(kept, once, strict=True))


@pytest.mark.parametrize("changes", [{"strategy": name} for name in STRATEGIES if name not in ("linear", "cat")] + [{"rank": 4}], ids=str)
def test_other_strategies_refuse_edits_by_name(decoder: Decoder, changes: dict[str, Any]) -> None:
    """Averaging or thinning R and W, or cutting ranks of them, is no merge of edits; the hint says what is."""
    asked = spec(density=0.5, **changes)
    for given in ([random_adapter(decoder, 4), random_reft(decoder, 2)], [random_adapter(decoder, 4), random_reft(decoder, 2, lora=4)]):
        with pytest.raises(RequestRefused, match=f"{asked.strategy}.* cannot merge adapter 'sql', which has ReFT edits") as refused:
            merge(asked, given)
        assert "linear and cat" in refused.value.hint


def test_edits_beyond_what_a_file_holds_are_refused(decoder: Decoder) -> None:
    """Ranks of joined parts add up, and parts that cannot be joined are counted."""
    wide = [random_reft(decoder, rank=60)] * 18
    many = {"ids": ("a",) * 18, "weights": (0.1,) * 18}
    with pytest.raises(RequestRefused, match="merging 18 adapters stacks the ranks of ReFT edits to 1080; the limit is 1024"):
        merge(spec(**many), wide)
    with pytest.raises(RequestRefused, match="merging 18 adapters gives ReFT parts that cannot be joined: 18; the limit is 16"):
        merge(spec(**many), [random_reft(decoder, rank=1, activation="relu")] * 18)


def test_a_merge_of_edits_that_overflows_is_refused(decoder: Decoder) -> None:
    """As with factors: no infinity reaches a batch."""
    huge = random_reft(decoder, method="direft")
    for found in huge.edits.values():
        found.r.mul_(1e38)
    with pytest.raises(RequestRefused, match="overflows at the edit of layer 0's block_output"):
        merge(spec(weights=(900.0, 900.0)), [huge, huge])


def test_reading_a_merge_request_imports_no_torch() -> None:
    """A spec is made by whoever reads a request, before anything heavy is needed."""
    program = "import sys, atoll.serving.merging as m; m.merge_digest(m.MergeSpec(('a',), (1.0,)), ['x']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0

"""train/cost.py: what jobs are charged adds up to what was used, shared by tokens, over all resumptions."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from tests.train.jobs import toy_decoder, toy_job, toy_rows

from atoll.config import LandConfig
from atoll.config_cost import CURRENCY, PER_CPU_HOUR, PER_HOUR, CostConfig, Rates
from atoll.errors import ConfigError
from atoll.train.checkpoint import Progress
from atoll.train.cost import Cost, Meter, Spent, Used, charge, price_text
from atoll.train.job import TrainResult
from atoll.train.loop import train_jobs

UNREADABLE = Path("/nowhere/at/all")


def powercap(root: Path, *, name: str = "package-0", microjoules: int = 1000, zone: str = "intel-rapl:0") -> Path:
    """A zone as Linux shows it; returns the file of its counter."""
    folder = root / zone
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "name").write_text(f"{name}\n")
    (folder / "max_energy_range_uj").write_text("10000000\n")
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    return folder / "energy_uj"


def test_a_round_is_shared_out_in_proportion_and_adds_up(tmp_path: Path) -> None:
    """Two jobs, one charged three times what the other is: whatever else the round took goes 3 to 1, and nothing is lost or counted twice."""
    counter = powercap(tmp_path)
    one, other = Used(), Used()
    started = Spent.now()
    with Meter(tmp_path).round([one, other]):
        time.sleep(0.02)
        charge(one, Spent(0.003, 0.003))
        charge(other, Spent(0.001, 0.001))
        counter.write_text(str(1000 + 4_000_000))
    whole = Spent.now() - started
    assert one.seconds == pytest.approx(3 * other.seconds) and 0.02 <= one.seconds + other.seconds <= whole.seconds
    assert one.peak_memory_bytes == other.peak_memory_bytes > 1 << 20
    assert one.energy_joules == pytest.approx(3.0) and other.energy_joules == pytest.approx(1.0)


def test_energy_counters_wrap_and_parts_of_a_package_are_not_counted_again(tmp_path: Path) -> None:
    """The kernel's counter starts over at its range; `intel-rapl:0:0` is inside `intel-rapl:0`, and psys around it."""
    counter, used = powercap(tmp_path, microjoules=9_000_000), Used()
    inner = powercap(tmp_path, name="core", zone="intel-rapl:0:0")
    around = powercap(tmp_path, name="psys", zone="intel-rapl:1")
    with Meter(tmp_path).round([used]):
        counter.write_text("1000000")
        inner.write_text("900000")
        around.write_text("900000")
    assert used.energy_joules == pytest.approx(2.0)


def test_energy_that_was_unreadable_once_is_unknown_for_good(tmp_path: Path) -> None:
    """A job that was resumed on another machine has no energy on record, rather than that of its second half."""
    used = Used()
    with Meter(UNREADABLE).round([used]):
        pass
    assert used.energy_joules is None
    powercap(tmp_path)
    with Meter(tmp_path).round([used]):
        pass
    assert used.energy_joules is None


def test_memory_without_proc_is_what_the_system_says_of_the_process() -> None:
    """macOS has no /proc."""
    used = Used()
    with Meter(UNREADABLE, UNREADABLE).round([used]):
        pass
    assert used.peak_memory_bytes > 1 << 20


def test_jobs_that_train_together_are_charged_what_the_process_took(tmp_path: Path) -> None:
    """All of it, and no more."""
    decoder = toy_decoder()
    makers = [
        functools.partial(toy_job, tmp_path / "small", decoder=decoder, rows=toy_rows(6), batch_size=2, max_steps=6),
        functools.partial(toy_job, tmp_path / "large", decoder=decoder, rows=toy_rows(48), batch_size=16, max_steps=6),
    ]
    found: dict[int, Progress] = {}

    def ended(index: int, outcome: TrainResult | Exception) -> None:
        assert isinstance(outcome, TrainResult)
        found[index] = outcome.progress

    started = Spent.now()
    train_jobs(makers, ended)
    whole = Spent.now() - started
    small, large = found[0], found[1]
    assert small.tokens < large.tokens
    assert 0 < small.seconds + large.seconds <= whole.seconds
    assert 0 < small.cpu_seconds + large.cpu_seconds <= whole.cpu_seconds
    assert small.peak_memory_bytes > 1 << 20


def test_a_resumed_job_adds_to_what_it_had_spent(tmp_path: Path) -> None:
    """Cancelled after some rounds and started again: the second result has the first part's time and tokens in it."""
    decoder, polls = toy_decoder(), list[int]()

    def cancelled(index: int) -> bool:
        polls.append(index)
        return len(polls) == 3

    outcomes: list[TrainResult | Exception] = []
    make = functools.partial(toy_job, tmp_path, decoder=decoder, max_steps=6)
    parts = []

    def remembered() -> object:
        parts.append(make())
        return parts[-1]

    train_jobs([remembered], lambda index, outcome: outcomes.append(outcome), cancelled=cancelled)  # type: ignore[list-item]
    assert isinstance(outcomes[0], Exception)
    train_jobs([remembered], lambda index, outcome: outcomes.append(outcome))  # type: ignore[list-item]
    result = outcomes[1]
    assert isinstance(result, TrainResult)
    first = parts[0].progress
    assert first.step == 3 and result.progress.step == 6 and result.progress.tokens > first.tokens > 0
    assert result.progress.seconds > first.seconds > 0 and result.progress.cpu_seconds > first.cpu_seconds > 0


def test_the_price_is_the_formula_on_the_record() -> None:
    """Anybody can compute it again from the figures beside it."""
    used = Used(seconds=7200.0, cpu_seconds=10_800.0, energy_joules=None)
    cost = Cost.of(1000, used, Rates(price_per_hour=0.5, price_per_cpu_hour=0.1, currency="EUR"))
    assert cost.price == pytest.approx(0.5 * 2 + 0.1 * 3) and cost.currency == "EUR" and price_text(cost) == "1.30 EUR"
    assert cost.formula == "0.5 EUR an hour * 2.0000 hours + 0.1 EUR a CPU-hour * 3.0000 CPU-hours"
    assert Cost.from_json(json.loads(json.dumps(cost.to_json()))) == cost
    unpriced = Cost.of(1000, used, Rates())
    assert unpriced.price is None and unpriced.currency is None and price_text(unpriced) is None and unpriced.formula == ""
    assert price_text(Cost.of(1, Used(3.6, 3.6), Rates(price_per_cpu_hour=0.04))) == "4e-05 USD"


@pytest.mark.parametrize(
    ("file", "environment", "expected"),
    [
        ({}, {}, Rates()),
        ({}, {PER_CPU_HOUR: "0.04", CURRENCY: "EUR"}, Rates(None, 0.04, "EUR")),
        ({"price_per_hour": 2.0}, {PER_CPU_HOUR: "0.04", CURRENCY: "EUR"}, Rates(2.0, None, "EUR")),
        ({"price_per_hour": 0.0, "currency": "USD"}, {CURRENCY: "EUR"}, Rates(0.0, None, "USD")),
    ],
)
def test_the_file_goes_before_the_environment(file: dict[str, object], environment: dict[str, str], expected: Rates) -> None:
    """A machine has its rate, a file may know better; never half of the one and half of the other."""
    assert CostConfig(**file).rates(environment) == expected


@pytest.mark.parametrize("text", ["cheap", "-1", "nan"])
def test_a_rate_that_is_no_price_is_refused_by_name(text: str) -> None:
    """Before anything is trained: a record without a price cannot be repaired."""
    with pytest.raises(ConfigError, match=PER_HOUR):
        CostConfig().rates({PER_HOUR: text})


def accounts(count: int) -> Sequence[Used]:
    return [Used() for _ in range(count)]


def test_a_round_in_which_nothing_could_be_booked_is_shared_alike() -> None:
    """All failed at once: somebody has used that time all the same."""
    used = accounts(2)
    with Meter(UNREADABLE).round(used):
        time.sleep(0.002)
    assert used[0].seconds == used[1].seconds > 0.0005


def test_a_shared_forward_is_charged_by_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that goes on by a second whenever it is read, only the split of the forwards differs between two jobs of equal steps."""
    ticks = iter(range(1_000_000))
    monkeypatch.setattr(Spent, "now", classmethod(lambda cls: Spent(float(tick := next(ticks)), 2.0 * tick)))
    decoder = toy_decoder()
    makers = [
        functools.partial(toy_job, tmp_path / str(rows), decoder=decoder, rows=toy_rows(rows), batch_size=rows, max_steps=4) for rows in (4, 16)
    ]
    found: dict[int, Progress] = {}

    def ended(index: int, outcome: TrainResult | Exception) -> None:
        assert isinstance(outcome, TrainResult)
        found[index] = outcome.progress

    train_jobs(makers, ended)
    small, large = found[0], found[1]
    assert small.seconds < large.seconds and large.cpu_seconds == pytest.approx(2 * large.seconds)
    assert small.seconds + large.seconds == pytest.approx(int(small.seconds + large.seconds + 0.5))  # whole ticks: nothing got lost


def test_a_lands_rate_is_that_of_every_task_and_no_part_of_what_they_are() -> None:
    """One machine, one rate; and a cheaper hour trains no other adapter, so it is no key of what an adapter's manifest says of its training."""
    land = LandConfig.model_validate(
        {"base": "tiny", "tasks": ["builtin:dates", "builtin:clauses"], "cost": {"price_per_hour": 1.5, "currency": "EUR"}}
    )
    assert [job.cost.rates({}) for job in land.jobs()] == [Rates(1.5, None, "EUR")] * 2
    with pytest.raises(ConfigError, match=r"cost\.price_per_cpu_hours is not a key"):
        LandConfig(base="tiny", tasks=["builtin:dates"], cost={"price_per_cpu_hours": 1})

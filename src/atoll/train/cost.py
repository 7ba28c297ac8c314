"""What a run has used: seconds, CPU-seconds, memory, energy, and the price that follows from rates.

Jobs that share a process share its time. Of each forward a job is charged its share of the tokens; its own optimizer step, validation and checkpoints
it is charged alone; and what remains of a round (joining, drawing the table) goes to all in proportion to that. So the seconds of all jobs add up to
the time that the process trained, and so do the CPU-seconds and the energy. Loading the base, reading rows, publishing and measuring are not training
and are not counted; what a kill throws away after the last checkpoint is not either.

Energy is what the processor packages drew meanwhile (Linux's powercap, RAPL), whoever used them; None where that cannot be read.

Used by loop.py and job.py while training, by workflows for the record.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol

from atoll.config_cost import Rates

POWERCAP = Path("/sys/class/powercap")
STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Spent:
    """Some time of the process: on the clock, and of all its threads."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0

    @classmethod
    def now(cls) -> Spent:
        """Readings that mean something beside an earlier one."""
        return cls(time.perf_counter(), time.process_time())

    def __sub__(self, earlier: Spent) -> Spent:
        return Spent(self.seconds - earlier.seconds, self.cpu_seconds - earlier.cpu_seconds)

    def __add__(self, other: Spent) -> Spent:
        return Spent(self.seconds + other.seconds, self.cpu_seconds + other.cpu_seconds)

    def share(self, part: float) -> Spent:
        return Spent(self.seconds * part, self.cpu_seconds * part)

    def of_each(self, num_processes: int) -> Spent:
        """What a team has spent, where every one of its processes did the same as this one."""
        return Spent(self.seconds, self.cpu_seconds * num_processes)

    def at_least_none(self) -> Spent:
        """Without what would be given back."""
        return Spent(max(0.0, self.seconds), max(0.0, self.cpu_seconds))


class Account(Protocol):
    """What a job has used so far, see checkpoint.Progress."""

    seconds: float
    cpu_seconds: float
    energy_joules: float | None
    peak_memory_bytes: int


@dataclass
class Used:
    """The account of work that is no training job."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    energy_joules: float | None = 0.0
    peak_memory_bytes: int = 0


def charge(account: Account, spent: Spent) -> None:
    """Add time to an account."""
    account.seconds += spent.seconds
    account.cpu_seconds += spent.cpu_seconds


class Meter:
    """Shares the time, energy and memory of rounds out among the jobs that were in them."""

    def __init__(self, powercap: Path = POWERCAP, status: Path = STATUS) -> None:
        self._counters, self._status = _counters(powercap), status

    @contextmanager
    def round(self, accounts: Sequence[Account]) -> Iterator[None]:
        """A round of these jobs. What they are charged inside is their part of it; the rest of the round follows in that proportion."""
        before = [Spent(account.seconds, account.cpu_seconds) for account in accounts]
        energy, peak, started = _energy(self._counters), _memory(self._status)[0], Spent.now()
        try:
            yield
        finally:
            whole = Spent.now() - started
            joules = _drawn(self._counters, energy)
            highest, resident = _memory(self._status)
            memory = highest if highest > peak else resident  # freed memory stays with the process between rounds (model.memory)
            booked = [Spent(account.seconds, account.cpu_seconds) - start for account, start in zip(accounts, before, strict=True)]
            total = Spent(sum(each.seconds for each in booked), sum(each.cpu_seconds for each in booked))
            for account, own in zip(accounts, booked, strict=True):
                part = own.seconds / total.seconds if total.seconds else 1 / len(accounts)
                charge(account, (whole - total).at_least_none().share(part))  # a team's processes are booked together, and may be more than whole
                account.energy_joules = None if account.energy_joules is None or joules is None else account.energy_joules + joules * part
                account.peak_memory_bytes = max(account.peak_memory_bytes, memory)


@dataclass(frozen=True)
class Cost:
    """The record of a run, over all its resumptions. tokens: those gone through in training steps. None stands for what is not known.

    peak_memory_bytes is the whole process's: base, activations, and the jobs beside this one. Of a job that several processes train together the
    CPU-seconds are those of all, memory and energy those of the first and its machine.
    """

    tokens: int | None
    seconds: float
    cpu_seconds: float | None
    peak_memory_bytes: int | None = None
    energy_joules: float | None = None
    price: float | None = None
    currency: str | None = None
    price_per_hour: float | None = None
    price_per_cpu_hour: float | None = None

    @classmethod
    def of(cls, tokens: int | None, account: Account, rates: Rates) -> Cost:
        """What a job has cost so far, all of it at the rates of now."""
        price = rates.price(account.seconds, account.cpu_seconds)
        known = {"price": price, "currency": rates.currency, "price_per_hour": rates.price_per_hour, "price_per_cpu_hour": rates.price_per_cpu_hour}
        energy = None if account.energy_joules is None else round(account.energy_joules, 3)
        return cls(
            tokens,
            round(account.seconds, 3),
            round(account.cpu_seconds, 3),
            account.peak_memory_bytes or None,
            energy,
            **({} if price is None else known),  # type: ignore[arg-type]
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Cost:
        """The inverse of to_json; keys of a later version are left out."""
        names = {each.name for each in fields(cls)}
        return cls(**{"tokens": None, "cpu_seconds": None, **{key: item for key, item in value.items() if key in names}})

    @property
    def formula(self) -> str:
        """How the price came about, in figures; "" without one."""
        parts = []
        if self.price_per_hour is not None:
            parts.append(f"{self.price_per_hour:g} {self.currency} an hour * {self.seconds / 3600:.4f} hours")
        if self.price_per_cpu_hour is not None and self.cpu_seconds is not None:
            parts.append(f"{self.price_per_cpu_hour:g} {self.currency} a CPU-hour * {self.cpu_seconds / 3600:.4f} CPU-hours")
        return " + ".join(parts)


def price_text(cost: Cost) -> str | None:
    """The price for people: two digits that say something, and the currency; None without one."""
    if cost.price is None:
        return None
    return f"{cost.price:.2f} {cost.currency}" if cost.price >= 1 or not cost.price else f"{cost.price:.2g} {cost.currency}"


def _counters(powercap: Path) -> list[tuple[Path, int]]:
    """(file of microjoules, where it wraps around) of each processor package that may be read."""
    found = []
    for zone in sorted(powercap.glob("*:*")) if powercap.is_dir() else []:
        try:
            if zone.name.count(":") != 1 or not (zone / "name").read_text().startswith("package"):
                continue  # a part of a package, or the whole machine beside it: counted already
            int((zone / "energy_uj").read_text())
            found.append((zone / "energy_uj", int((zone / "max_energy_range_uj").read_text())))
        except (OSError, ValueError):
            return []  # one package unread is a sum too small
    return found


def _energy(counters: Sequence[tuple[Path, int]]) -> list[int] | None:
    try:
        return [int(path.read_text()) for path, _ in counters] or None
    except (OSError, ValueError):
        return None


def _drawn(counters: Sequence[tuple[Path, int]], earlier: list[int] | None) -> float | None:
    """Joules since `earlier`; a counter that fell has wrapped around once."""
    now = _energy(counters)
    if now is None or earlier is None:
        return None
    return sum((end - start) % limit for end, start, (_, limit) in zip(now, earlier, counters, strict=True)) / 1e6


def _memory(status: Path) -> tuple[int, int]:
    """(most bytes that the process has held so far, bytes that it holds now)."""
    try:
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        return int(lines["VmHWM"].split()[0]) << 10, int(lines["VmRSS"].split()[0]) << 10
    except (OSError, KeyError, ValueError):
        pass
    if sys.platform == "win32":
        return 0, 0
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return most, most

"""What computing costs here: the rates that turn hours into a price.

A machine that is rented by the hour and one whose processors are billed apart are priced alike:

    price = price_per_hour * seconds / 3600 + price_per_cpu_hour * cpu_seconds / 3600

Rates come from the file, or for a machine as a whole from the environment. They decide no weight, so they are part of no job's identity. Used by
config.py and train/cost.py.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import Field

from atoll.config_section import Section
from atoll.errors import ConfigError

PER_HOUR, PER_CPU_HOUR, CURRENCY = "ATOLL_PRICE_PER_HOUR", "ATOLL_PRICE_PER_CPU_HOUR", "ATOLL_CURRENCY"


@dataclass(frozen=True)
class Rates:
    """What an hour costs; None where no rate is known. See the formula above."""

    price_per_hour: float | None = None
    price_per_cpu_hour: float | None = None
    currency: str = "USD"

    def price(self, seconds: float, cpu_seconds: float) -> float | None:
        """The price of so much work, in `currency`; None without a rate."""
        if self.price_per_hour is None and self.price_per_cpu_hour is None:
            return None
        return ((self.price_per_hour or 0.0) * seconds + (self.price_per_cpu_hour or 0.0) * cpu_seconds) / 3600


class CostConfig(Section):
    """What computing costs, for the record of each run."""

    price_per_hour: float | None = Field(
        default=None, ge=0, description=f"Price of an hour of this machine, for each second of a run. Without any rate, {PER_HOUR} counts."
    )
    price_per_cpu_hour: float | None = Field(
        default=None, ge=0, description=f"Price of an hour of one processor, for each CPU-second of a run. Without any rate, {PER_CPU_HOUR} counts."
    )
    currency: str | None = Field(
        default=None, pattern=r"^\S{1,8}$", description=f"What prices are in. Without it, {CURRENCY} or else USD.", examples=["USD", "EUR"]
    )

    def rates(self, environment: Mapping[str, str] | None = None) -> Rates:
        """The file's rates, or where it names none the environment's. Raises ConfigError for one there that is no price."""
        found = os.environ if environment is None else environment
        currency = self.currency or found.get(CURRENCY) or "USD"
        if self.price_per_hour is not None or self.price_per_cpu_hour is not None:
            return Rates(self.price_per_hour, self.price_per_cpu_hour, currency)
        return Rates(_rate(found, PER_HOUR), _rate(found, PER_CPU_HOUR), currency)


def _rate(environment: Mapping[str, str], name: str) -> float | None:
    text = environment.get(name, "").strip()
    if not text:
        return None
    try:
        rate = float(text)
    except ValueError:
        rate = math.nan
    if not (math.isfinite(rate) and rate >= 0):
        raise ConfigError(f"{name} is {text!r}, expected a price such as 0.05", hint=f"unset {name}, or write the price with a decimal point")
    return rate

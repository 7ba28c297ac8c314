"""Where PyReFT's interventions act in a row: its two functions for `f7+l7`, answered by the one that training and serving use.

`Positions.resolve` says which prompt tokens are meant; here its answer takes PyReFT's form, a list of places for each intervention. Rows of a batch
need lists of one length, so short prompts are padded, with `NO_EDIT`, which ReftModel passes over: a padding place edits nothing, where PyReFT lets
it fall on a sink token or on the first token of the answer.

Used by data.py, collators.py and convert.py.
"""

from __future__ import annotations

from atoll.errors import DataError
from atoll.model.positions import Positions

NO_EDIT = -1  # a place that stands for none; any negative place does


def parse_positions(positions: str) -> tuple[int, int]:
    """(7, 7) for `f7+l7`, (3, 0) for `f3`, (0, 1) for `l1`. Raises AdapterFormatError for what cannot be read, DataError for all_prompt or a list."""
    parsed = Positions.parse(positions)
    if parsed.all_prompt or parsed.listed:
        raise DataError(f"positions {positions!r} have no numbers of first and last tokens", hint="write f<n>, l<n> or f<n>+l<n>")
    return parsed.first, parsed.last


def get_intervention_locations(
    *,
    last_position: int,
    num_interventions: int,
    positions: str | None = None,
    first_n: int | None = None,
    last_n: int | None = None,
    share_weights: bool = False,
    pad_mode: str = "first",
    **_: object,
) -> list[list[int]]:
    """[num_interventions][n] places of a prompt of `last_position` tokens, as PyReFT orders them.

    Shared, one-sided, or a single intervention: each gets first and last places together, n = first_n + last_n. Otherwise the first half of the
    interventions gets the first places and the second half the last ones, n = max(first_n, last_n). What a short prompt lacks is NO_EDIT.

    Two things differ from PyReFT: the last place is the prompt's last token (there: the one before, in its data sets), and `pad_mode`, which chose
    between two harmful kinds of padding, is read and changes nothing. Other keywords are passed over, since data sets hand on all that they got.

    Raises DataError if untied places cannot be shared out, or if neither `positions` nor both numbers are given.
    """
    if pad_mode not in ("first", "last"):
        raise DataError(f"pad_mode is {pad_mode!r}, but must be 'first' or 'last'")
    if positions is not None:
        first_n, last_n = parse_positions(positions)
    if first_n is None or last_n is None:
        raise DataError("the locations need positions, or both first_n and last_n", hint='for example positions="f7+l7"')
    asked = Positions(first=first_n, last=last_n)
    first, last = (list(side) for side in asked.resolve(last_position))
    if share_weights or not asked.has_sides or num_interventions == 1:
        return [_padded(first + last, first_n + last_n) for _ in range(num_interventions)]
    if num_interventions % 2:
        raise DataError(
            f"untied positions {asked} need an even number of interventions, half for the first tokens and half for the last, but there are "
            f"{num_interventions}",
            hint="list every layer twice, first all for the first tokens, then all for the last; or say share_weights=True",
        )
    half, width = num_interventions // 2, max(first_n, last_n)
    return [_padded(first, width) for _ in range(half)] + [_padded(last, width) for _ in range(half)]


def _padded(places: list[int], width: int) -> list[int]:
    return places + [NO_EDIT] * (width - len(places))

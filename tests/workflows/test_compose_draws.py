"""Which examples a seed gets: no search is done twice for the same answer, and what chooses among seeds was seen by none of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.workflows.scenes import config_of, rows, write_rows

from atoll.data.task import load_task
from atoll.hub.store import Hub
from atoll.model.base import Base
from atoll.workflows import compose_and_publish
from atoll.workflows.compose_draws import ALL_ALIKE, NOTHING_TO_DRAW, Draws, draw_examples

NO_FOLDS = {"folds": None}


@pytest.fixture
def both(examples: Path, tests_file: Path) -> dict[str, Any]:
    return {"train": str(examples), "test": str(tests_file)}


def drawn(base: Base, data: dict[str, Any], settings: dict[str, Any]) -> Draws:
    config = config_of(base, data, compose={**NO_FOLDS, **settings})
    return draw_examples(config, load_task(config.require_data(), name="warmth"), base)


def test_where_nothing_is_drawn_one_seed_is_searched_and_the_report_says_why(base: Base, hub: Hub, both: dict[str, Any], tmp_path: Path) -> None:
    """Three seeds would be three copies with a spread of 0; the error of the scores is then that over rows."""
    report = compose_and_publish(config_of(base, both, compose=NO_FOLDS), out=tmp_path / "out", hub=hub, publish=False).report
    assert report.seeds == (0,) and report.chosen_by == NOTHING_TO_DRAW and report.examples == 4
    line = report.line("composed")
    assert line is not None and line.spread is None and line.score_stderr is not None
    assert len(drawn(base, both, {"k": 4}).draws) == 1, "all that there are"
    for settings in ({"k": 2}, {"hold_out": 0.25}, {"folds": 2}):
        assert len(drawn(base, both, settings).draws) == 3, settings


def test_seeds_that_were_asked_for_leave_a_part_out_each_and_are_chosen_by_it(base: Base, hub: Hub, both: dict[str, Any], tmp_path: Path) -> None:
    found = drawn(base, both, {"seeds": 3})
    assert [(len(draw.examples), len(draw.left_out)) for draw in found.draws] == [(3, 1)] * 3 and found.undrawn == ()
    assert len({draw.left_out[0].where for draw in found.draws}) == 3
    assert all(draw.left_out[0].where not in {example.where for example in draw.examples} for draw in found.draws)
    assert len(drawn(base, both, {"seeds": 9}).draws) == 4, "a fifth one would repeat the first"
    assert len(drawn(base, both, {"method": "cma", "seeds": 9}).draws) == 9
    assert all(draw.left_out for draw in drawn(base, both, {"method": "cma"}).draws), "or the least training loss would choose"
    report = compose_and_publish(config_of(base, both, compose={**NO_FOLDS, "seeds": 2}), out=tmp_path / "out", hub=hub, publish=False).report
    assert report.seeds == (0, 1) and report.chosen_by == "loss, less the base's, on the examples that each leaves out"


def test_one_example_is_one_seed(base: Base, tmp_path: Path) -> None:
    one = {"path": str(write_rows(tmp_path / "one.jsonl", rows(1)))}
    found = drawn(base, one, {"seeds": 3})
    assert len(found.draws) == 1 and found.note == NOTHING_TO_DRAW
    same = {"path": str(write_rows(tmp_path / "same.jsonl", rows(1) * 4))}
    found = drawn(base, same, {"seeds": 3})
    assert len(found.draws) == 1 and found.note == ALL_ALIKE and not found.draws[0].left_out


def test_drawn_examples_leave_the_rest_to_choose_by(base: Base, tmp_path: Path) -> None:
    data = {"path": str(write_rows(tmp_path / "many.jsonl", rows(20)))}
    found = drawn(base, data, {"k": 2, "seeds": 3})
    seen = {example.where for draw in found.draws for example in draw.examples}
    assert len(found.undrawn) == 20 - len(seen) and not seen & {example.where for example in found.undrawn}
    assert not any(draw.left_out for draw in found.draws)


def test_where_seeds_leave_too_few_rows_in_common_each_is_chosen_by_those_it_did_not_draw(base: Base, hub: Hub, tmp_path: Path) -> None:
    """Else the least loss on the rows that were searched on would choose, or one row that happens to be left."""
    data = {"path": str(write_rows(tmp_path / "many.jsonl", rows(7)))}
    found = drawn(base, data, {"k": 5, "seeds": 3})
    assert found.undrawn == () and [len(draw.left_out) for draw in found.draws] == [2, 2, 2]
    assert all(not {row.where for row in draw.left_out} & {row.where for row in draw.examples} for draw in found.draws)
    config = config_of(base, data, compose={**NO_FOLDS, "k": 5, "seeds": 2}, controls=False)
    report = compose_and_publish(config, out=tmp_path / "out", hub=hub, publish=False).report
    assert report.chosen_by == "loss, less the base's, on the examples that each leaves out"

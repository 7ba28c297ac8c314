"""From a plan to weights: rank the candidates and search, once for each seed, and choose among the seeds.

Every seed's result is judged by rows that it has not seen where there are any: by those that no seed drew, else by those that it left out, else by
the held-out value of its own search. Never by test rows.

Used by compose.py; compose_controls.py measures what comes out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from atoll.compose.base_losses import base_losses
from atoll.compose.controls import Controls, Search
from atoll.compose.losses import LabelLosses
from atoll.compose.objective import FewShot, Objective, l1
from atoll.compose.pool import Pool
from atoll.compose.result import compose, losses_of, rank_limit, record_of
from atoll.compose.retrieval import Ranked, Ranking, rank
from atoll.compose.run import Report
from atoll.compose.run import Settings as SearchSettings
from atoll.compose.search import BUDGETS, Found, search
from atoll.config_compose import ComposeSettings
from atoll.data.encode import EncodedRow
from atoll.errors import Interrupted
from atoll.model.adapter import Adapter
from atoll.workflows.compose_clock import Clock
from atoll.workflows.compose_draws import Draw, encoded
from atoll.workflows.compose_plan import ComposePlan
from atoll.workflows.start import Progress, prefixed


@dataclass(frozen=True)
class Searched:
    """What one seed found. shortlist: the candidates that were searched over, best first. choice: what it is chosen by, smaller is better."""

    draw: Draw
    ranking: Ranking
    shortlist: tuple[Ranked, ...]
    found: Found
    choice: float
    seconds: float

    @property
    def was_stopped(self) -> bool:
        """Whether Ctrl-C or a caller ended the search before it was done."""
        return self.found.stopped_by == "interrupted"


def search_all(plan: ComposePlan, clock: Clock, progress: Progress, stop_asked: Callable[[], bool]) -> list[Searched]:
    """One result for each seed; fewer where the work was stopped after the first. Raises Interrupted before there is one."""
    done: list[Searched] = []
    for number, draw in enumerate(plan.draws, 1):
        named = prefixed(progress, f"seed {number}/{len(plan.draws)},") if len(plan.draws) > 1 else progress
        try:
            done.append(_searched(plan, draw, clock, named, stop_asked))
        except Interrupted:
            if not done:
                raise
            break
        if done[-1].was_stopped or stop_asked():
            break
    return done


def chosen(searched: Sequence[Searched]) -> Searched:
    """The seed that is kept: the least loss on rows that it has not seen, the first of equals."""
    return min(searched, key=lambda one: one.choice)


def controls_of(plan: ComposePlan, searched: Searched) -> Controls:
    """The contestants of one seed; `Controls.pool()` is what its search ran over."""
    settings, draw = plan.config.compose, searched.draw
    return Controls(
        plan.base,
        plan.data.task,
        draw.examples,
        draw.few.rows,
        plan.candidates,
        searched.ranking,
        searcher(plan),
        top_k=settings.top_k,
        form=settings.form,
        rank=settings.rank,
        seed=draw.seed,
    )


def adapter_of(plan: ComposePlan, pool: Pool, found: Found, few: FewShot) -> Adapter:
    """The adapter of a search's weights, compressed where the settings ask for it or a file could not hold it."""
    settings = plan.config.compose
    limit = settings.rank or rank_limit(pool, settings.form, None)
    return compose(pool, found.weights, form=settings.form, rank=limit, record=record_of(found, examples_digest=few.digest)).adapter


def fold_groups(plan: ComposePlan, draw: Draw) -> tuple[tuple[int, ...], ...]:
    """The folds of the cross-validation over a draw's examples; none where there is one example, or all have the same input."""
    k = len(draw.few)
    return draw.few.folds(min(plan.config.compose.control_folds, k), draw.seed) if k > 1 else ()


def searcher(plan: ComposePlan, report: Report | None = None) -> Search:
    """The search that the settings describe, as a function of a pool and examples: the same for the result, in every fold, and for the controls."""

    def run(pool: Pool, rows: Sequence[EncodedRow], seed: int, stop_asked: Callable[[], bool]) -> Found:
        settings, few = plan.config.compose, FewShot(rows)
        held_out, folds = _held_out(settings, few, seed)
        scores = LabelLosses(plan.base.decoder, pool, rows, form=settings.form)
        objective = Objective(scores, l1(settings.l1, pool.acts), held_out=held_out, folds=folds)
        return search(
            objective,
            pool.num,
            settings.method,
            budget=settings.budget or _budget(settings, len(folds)),
            time_s=settings.time_s,
            seed=seed,
            settings=SearchSettings(bounds=settings.bounds, reach=pool.reach),
            report=report,
            stop_asked=stop_asked,
        )

    return run


def _held_out(settings: ComposeSettings, few: FewShot, seed: int) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """(examples held out once, folds), at least one of them empty. In a cross-validation there are fewer examples than the settings were made for."""
    k = len(few)
    if few.all_alike:
        return (), ()
    if settings.hold_out is not None:
        return few.hold_out(settings.hold_out, seed), ()
    return (), few.folds(min(settings.folds, k), seed) if settings.folds else ()


def _budget(settings: ComposeSettings, num_folds: int) -> int | None:
    """The method's own budget is for one search; each fold is one more."""
    usual = BUDGETS.get(settings.method.partition(":")[0])
    return usual * (1 + num_folds) if usual is not None and num_folds else None


def _searched(plan: ComposePlan, draw: Draw, clock: Clock, progress: Progress, stop_asked: Callable[[], bool]) -> Searched:
    settings, rows, start = plan.config.compose, draw.few.rows, clock.total
    folds = fold_groups(plan, draw) if plan.config.controls else ()
    learn = [[example for example in range(len(rows)) if example not in set(fold)] for fold in folds]
    with clock.part("ranking"):
        ranking = rank(
            plan.candidates,
            plan.base.decoder,
            rows,
            by=settings.retrieve,
            description=plan.description,
            subsets=learn,
            report=lambda what, at, total: progress(f"ranking adapters: {what}", at, total),
            stop_asked=stop_asked,
        )
    shortlist = tuple(ranking.best(settings.top_k))
    with clock.part("search"):
        pool = _pool(plan, shortlist)
        found = searcher(plan, lambda what, at, total: progress(f"searching weights: {what}", at, total))(pool, rows, draw.seed, stop_asked)
        choice = _choice(plan, draw, pool, found)
    return Searched(draw, ranking, shortlist, found, choice, clock.total - start)


def _pool(plan: ComposePlan, shortlist: Sequence[Ranked]) -> Pool:
    picked = [plan.candidates[ranked.index] for ranked in shortlist]
    names, digests = [candidate.name for candidate in picked], [candidate.digest for candidate in picked]
    return Pool.of([candidate.load() for candidate in picked], plan.base.decoder, names, digests)


def _choice(plan: ComposePlan, draw: Draw, pool: Pool, found: Found) -> float:
    """What a seed is chosen by: its loss on rows that no seed drew, else on those that it left out, else what the search itself goes by.

    Each seed leaves others out, which may be easier or harder: of those the base's own loss is taken off.
    """
    own = found.value if found.held_out is None else found.held_out
    unseen = plan.dev or draw.left_out
    if not unseen or len(plan.draws) == 1:
        return own
    few, _ = encoded(unseen, plan.data, plan.base)
    settings = plan.config.compose
    mine = losses_of(pool, found.weights, plan.base.decoder, few.rows, form=settings.form, rank=settings.rank).mean()
    return float(mine) if plan.dev else float(mine - base_losses(plan.base.decoder, few.rows).mean())

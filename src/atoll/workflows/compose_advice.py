"""What the figures of a composition say one should do, in plain sentences.

A difference counts as one where it is clear (Gain.is_clear: beyond about two of its standard errors, and of scores on enough rows); else the sentence
says that the figures cannot tell the two apart, and of two that cannot be told apart the simpler one is recommended. Nothing is recommended that is
not itself clearly better than the base, and no cause is named that was not measured.

Used by compose_lines.py.
"""

from __future__ import annotations

from atoll.compose.controls import BASE, BEST_SINGLE, COMPOSED, IN_CONTEXT, RANDOM, TRAINED, UNIFORM
from atoll.workflows.compose_report import Gain, Report

MAJORITY = "majority"

_ALL = (BASE, BEST_SINGLE, UNIFORM, RANDOM, TRAINED, IN_CONTEXT)  # what must have been met for "use it"
_INSTEAD = {  # what may be used in place of the composition, the simplest first
    BEST_SINGLE: "{name} alone is better ({gain}): use it.",
    UNIFORM: "Equal weights are better ({gain}): use the method uniform.",
    IN_CONTEXT: "The base with the examples in its prompt is better ({gain}): put them there (each with its answer and an empty line before the "
    "question; in a chat, as earlier turns), if longer prompts are affordable.",
    TRAINED: "LoRA trained on the same examples is better ({gain}): train instead{seconds}.",
}
# docs/notebook.md, "composing, what it is worth"
_WITH_FIVE = (
    "With 5 examples each, composing was far better than training on them where the hub held the task's skills (56 % against 25 % over 16 generated "
    "tasks), and a little worse where it did not (35 % against 38 % over 16 real ones)."
)
_WITH_MORE = (
    "With 20 examples, training on them was better than composing over 17 real tasks (43 % against 35 %), with 100 by more (50 % against "
    "39 %); composing is for what the hub's adapters know already."
)
_MANY = 15  # examples, from which the second is said
_FEWEST_ROWS = 20  # test rows; of fewer a standard error says little
_KNOWS_MORE = 0.15  # by how much the likeliest label must be right more often than the written answer, to be worth a sentence


def advice(report: Report) -> tuple[str, ...]:
    """The sentences, the most important first; where nothing was compared, what is known of such compositions."""
    over_base = report.versus.get(BASE)
    if over_base is None:
        known = _WITH_MORE if report.examples >= _MANY else _WITH_FIVE
        return (f"Nothing was compared. {known} Measure it on this task: with controls, and with test rows or two examples at least.",)
    if report.measure == "score" and report.test_rows < _FEWEST_ROWS:
        rows = f"There {'is' if report.test_rows == 1 else 'are'} {report.test_rows} test row{'' if report.test_rows == 1 else 's'}"
        return (f"{rows}, too few to tell contestants apart: give {_FEWEST_ROWS} or more.", *_by_loss(report))
    if _none_right(report):
        where = "look at the form of the answers (template, label_set, max_new_tokens, stop)"
        return (f"No contestant gets a single test row right, so the scores tell nothing: {where}.", *_by_loss(report))
    if _is_better(over_base):
        return (*_verdict(report), *_as_good(report), *_better_ones(report), *_form_and_knowledge(report))
    if _is_worse(over_base):
        first, way_out = f"The composition is worse than the base ({_shown(report, over_base)})", ": use the base as it is"
    else:
        first, way_out = f"The figures cannot tell the composition from the base ({_shown(report, over_base)})", ": give more examples or test rows"
    instead = _better_than_base(report)
    return (f"{first}{'' if instead else way_out}.", *instead, *_form_and_knowledge(report))


def is_training_as_good(report: Report) -> bool:
    """Whether LoRA on the same examples was measured, and the composition is not clearly better than it."""
    gain = report.versus.get(TRAINED)
    return gain is not None and not _is_better(gain)


def _verdict(report: Report) -> list[str]:
    """Against all: only a composition that is clearly better than every control is recommended without an if."""
    others = {name: gain for name, gain in report.versus.items() if name != BASE}
    if not others or not all(_is_better(gain) for gain in others.values()):
        return [f"The composition is better than the base ({_shown(report, report.versus[BASE])})."]
    nearest = min(others, key=lambda name: others[name].value)
    which = f"The nearest is {_name(report, nearest)} ({_shown(report, others[nearest])})."
    missing = [name for name in _ALL if name not in report.versus]
    if missing:
        return [f"The composition is better than all that was measured. {which} Not measured: {', '.join(missing)}."]
    return [f"Use it: the composition is better than every control. {which}"]


def _as_good(report: Report) -> list[str]:
    """Controls that do as well as far as the figures can tell."""
    words = {
        BEST_SINGLE: "{name} alone does as well{tell} ({gain}): use it instead, it is simpler.",
        UNIFORM: "Equal weights do as well{tell} ({gain}): the search has added nothing that shows.",
        RANDOM: "Random adapters of the same shapes do as well{tell} ({gain}): that it helps what these adapters know is not shown.",
        TRAINED: "LoRA trained on the same examples does as well{tell} ({gain}){seconds}.",
        IN_CONTEXT: "The base with the examples in its prompt does as well{tell} ({gain}), at the price of longer prompts.",
        MAJORITY: "Always giving the most common answer does as well{tell} ({gain}): nothing has been learned that counts.",
    }
    tell = ", as far as these figures can tell"
    return [
        text.format(name=_name(report, name), gain=_shown(report, report.versus[name]), seconds=_seconds(report, name), tell=tell)
        for name, text in words.items()
        if name in report.versus and not _is_better(report.versus[name]) and not _is_worse(report.versus[name])
    ]


def _better_ones(report: Report) -> list[str]:
    """Controls that are clearly better than a composition that is better than the base."""
    words = {
        **_INSTEAD,
        RANDOM: "Random adapters of the same shapes are better ({gain}): what helps here is not what these adapters know.",
        MAJORITY: "Always giving the most common answer is better ({gain}).",
    }
    return [
        text.format(name=_name(report, name), gain=_shown(report, report.versus[name]), seconds=_seconds(report, name))
        for name, text in words.items()
        if name in report.versus and _is_worse(report.versus[name])
    ]


def _better_than_base(report: Report) -> list[str]:
    """What is clearly better than the base, where the composition is not: the best of it alone."""
    found = {name: line.gain for name in _INSTEAD if (line := report.line(name)) is not None and line.gain is not None and _is_better(line.gain)}
    if not found:
        return []
    best = max(found, key=lambda name: found[name].value)
    gain = f"over the base: {_shown(report, found[best])}"
    return [_INSTEAD[best].format(name=_name(report, best), gain=gain, seconds=_seconds(report, best))]


def _form_and_knowledge(report: Report) -> list[str]:
    """What the likeliest label says beside the written answer."""
    mine, base, gain = report.line(COMPOSED), report.line(BASE), report.options_gain
    if report.measure != "score" or gain is None or mine is None or base is None or mine.option is None or base.option is None:
        return []
    said = []
    figures = f"{base.option:.3f} against {mine.option:.3f}"
    if _is_worse(gain):
        said.append(f"Choosing the likeliest label, the composition is worse than the base ({figures}): it has lost some of what the base knows.")
    elif _is_better(report.versus[BASE]) and not _is_better(gain):
        said.append(
            f"The gain is in the form of the answers: choosing the likeliest label, the base is as good ({figures}). "
            "A clearer prompt or a constrained answer may do as much."
        )
    if mine.score is not None and mine.option - mine.score > _KNOWS_MORE:
        said.append(
            f"It knows more than it writes: its likeliest label is right in {mine.option:.0%} of the rows, its written answer in {mine.score:.0%}. "
            "Constrain answers to the labels, or train for their form."
        )
    return said


def _by_loss(report: Report) -> list[str]:
    """The held-out losses of composition and base, where scores say nothing."""
    mine, base = report.line(COMPOSED), report.line(BASE)
    if mine is None or base is None or mine.loss is None or base.loss is None:
        return []
    errors = "" if mine.loss_stderr is None or base.loss_stderr is None else f" (± {mine.loss_stderr:.3f} and {base.loss_stderr:.3f})"
    return [f"By held-out loss the composition has {mine.loss:.3f} nats a label token, the base {base.loss:.3f}{errors}."]


def _none_right(report: Report) -> bool:
    scores = [score for line in report.lines if line.name != MAJORITY for score in line.scores]
    return report.measure == "score" and bool(scores) and not any(scores)


def _is_better(gain: Gain) -> bool:
    return gain.is_clear and gain.value > 0


def _is_worse(gain: Gain) -> bool:
    return gain.is_clear and gain.value < 0


def _name(report: Report, name: str) -> str:
    """A contestant in a sentence: the best single adapter by its own name, or names where seeds differ."""
    line = report.line(name)
    if name != BEST_SINGLE or line is None or not line.what:
        return name
    return line.what if ", " not in line.what else f"The best single adapter ({line.what}: seeds differ)"


def _seconds(report: Report, name: str) -> str:
    line = report.line(name)
    if line is None or not line.seconds:
        return ""
    return f", made in {line.seconds:.0f} s" if line.seconds >= 1 else ", made in less than a second"


def _shown(report: Report, gain: Gain) -> str:
    """A difference seen from the composition: difference +0.120 ± 0.031, or held-out loss less by 0.310 ± 0.050."""
    error = "" if gain.stderr is None else f" ± {gain.stderr:.3f}"
    if report.measure == "score":
        return f"difference {gain.value:+.3f}{error}"
    return f"held-out loss {'less' if gain.value >= 0 else 'more'} by {abs(gain.value):.3f}{error}"

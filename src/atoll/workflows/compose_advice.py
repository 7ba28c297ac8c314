"""What the figures of a composition say one should do, in plain sentences.

A difference counts as one where it is clear (Gain.is_clear: beyond about two of its standard errors); else the sentence says that the figures cannot
tell the two apart, and of two that cannot be told apart the simpler one is recommended.

Used by compose_lines.py.
"""

from __future__ import annotations

from atoll.compose.controls import BASE, BEST_SINGLE, COMPOSED, IN_CONTEXT, RANDOM, TRAINED, UNIFORM
from atoll.workflows.compose_report import Gain, Report

MAJORITY = "majority"


def advice(report: Report) -> tuple[str, ...]:
    """The sentences, the most important first; none where nothing was compared."""
    over_base = report.versus.get(BASE)
    if over_base is None:
        return ()
    if not _is_better(over_base):
        worse = _is_worse(over_base)
        first = (
            f"The composition is worse than the base ({_shown(report, over_base)}): use the base as it is."
            if worse
            else f"The figures cannot tell the composition from the base ({_shown(report, over_base)}): give more examples or test rows, or train."
        )
        return (first, *_better_ones(report))
    return (*_verdict(report), *_simpler_ones(report), *_better_ones(report), *_format_only(report))


def _verdict(report: Report) -> list[str]:
    """Against all: only a composition that is clearly better than every control is recommended without an if."""
    over_base = report.versus[BASE]
    others = {name: gain for name, gain in report.versus.items() if name != BASE}
    if others and all(_is_better(gain) for gain in others.values()):
        nearest = min(others, key=lambda name: others[name].value)
        return [f"Use it: the composition is better than every control. The nearest is {_name(report, nearest)} ({_shown(report, others[nearest])})."]
    return [f"The composition is better than the base ({_shown(report, over_base)})."]


def _simpler_ones(report: Report) -> list[str]:
    """Controls that do as well as far as the figures can tell."""
    words = {
        BEST_SINGLE: "{name} alone does as well{tell} ({gain}): use it instead, it is one adapter and not several.",
        UNIFORM: "Equal weights do as well{tell} ({gain}): the search has added nothing that shows.",
        RANDOM: "Random adapters of the same shapes do as well{tell} ({gain}): what is gained is not what the adapters know.",
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
    """Controls that are clearly better."""
    words = {
        BEST_SINGLE: "{name} alone is better ({gain}): use it.",
        UNIFORM: "Equal weights are better ({gain}): use the method uniform; the search has fitted the examples too closely.",
        RANDOM: "Random adapters of the same shapes are better ({gain}): these adapters have nothing to give to this task.",
        TRAINED: "LoRA trained on the same examples is better ({gain}): train instead{seconds}.",
        IN_CONTEXT: "The base with the examples in its prompt is better ({gain}): put them there, if longer prompts are affordable.",
        MAJORITY: "Always giving the most common answer is better ({gain}).",
    }
    return [
        text.format(name=_name(report, name), gain=_shown(report, report.versus[name]), seconds=_seconds(report, name))
        for name, text in words.items()
        if name in report.versus and _is_worse(report.versus[name])
    ]


def _format_only(report: Report) -> list[str]:
    """Whether the gain is in the form of the answers: then the base chooses the likeliest label as well."""
    by_options = report.options_gain
    if report.measure != "score" or by_options is None or _is_better(by_options):
        return []
    mine, base = report.line(COMPOSED), report.line(BASE)
    if mine is None or base is None or mine.option is None or base.option is None:
        return []
    return [
        f"The gain is in the form of the answers: choosing the likeliest label, the base is as good ({base.option:.3f} against {mine.option:.3f}). "
        "A clearer prompt or a constrained answer may do as much."
    ]


def _is_better(gain: Gain) -> bool:
    return gain.is_clear and gain.value > 0


def _is_worse(gain: Gain) -> bool:
    return gain.is_clear and gain.value < 0


def _name(report: Report, name: str) -> str:
    line = report.line(name)
    return line.what if name == BEST_SINGLE and line is not None and line.what else name


def _seconds(report: Report, name: str) -> str:
    line = report.line(name)
    return f", made in {line.seconds:.0f} s" if line is not None and line.seconds else ""


def _shown(report: Report, gain: Gain) -> str:
    """A difference seen from the composition: difference +0.120 ± 0.031, or held-out loss less by 0.310 ± 0.050."""
    error = "" if gain.stderr is None else f" ± {gain.stderr:.3f}"
    if report.measure == "score":
        return f"difference {gain.value:+.3f}{error}"
    return f"held-out loss {'less' if gain.value >= 0 else 'more'} by {abs(gain.value):.3f}{error}"

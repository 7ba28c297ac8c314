"""What a composition starts from: its base, its rows, the adapters that may be composed, and the digest of all that.

The digest is over everything that decides the result, so a finished composition is found again, and one whose examples, hub or settings have changed
is done anew.

Used by compose.py.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

from atoll.compose.measuring import Candidate
from atoll.compose.population import check_method
from atoll.config import BUILTIN
from atoll.config_compose import ComposeConfig
from atoll.data.prompt import PromptFormat
from atoll.data.task import Example, TaskData, load_task
from atoll.errors import BaseMismatch, ConfigError, DataError
from atoll.eval.arena import limits
from atoll.eval.metrics import metric_for
from atoll.hub.names import check_name, name_key, parse_reference
from atoll.model.adapter_files import read_adapter, read_manifest
from atoll.model.base import load_base
from atoll.model.fingerprint import tensor_shapes
from atoll.workflows.compose_draws import Draw, Draws, draw_examples
from atoll.workflows.compose_report import counted
from atoll.workflows.start import Progress, require, silent

if TYPE_CHECKING:
    from atoll.hub.compatibility import Verdict
    from atoll.hub.records import Version
    from atoll.hub.store import Hub
    from atoll.model.adapter import Adapter
    from atoll.model.base import Base

_FORMAT = 2  # raise when the same inputs would give another result than before, so that old results are not taken for new ones


@dataclass(frozen=True)
class ComposePlan:
    """A composition ready to run. candidates[i] was made of versions[i]. draws: the examples of each seed. dev: rows that no seed drew.

    seeds_note: why there are so many seeds, where that is to be said.
    """

    config: ComposeConfig
    base: Base
    data: TaskData
    versions: tuple[Version, ...]
    candidates: tuple[Candidate, ...]
    draws: tuple[Draw, ...]
    dev: tuple[Example, ...]
    prompt: PromptFormat
    max_new_tokens: int
    warnings: tuple[str, ...]
    seeds_note: str = ""

    @property
    def name(self) -> str:
        return self.config.name or self.data.task.name

    @property
    def description(self) -> str:
        """What the task says of itself, for text retrieval."""
        task = self.data.task
        told = (self.config.description, task.name.replace("_", " "), task.title, task.family, task.instruction, task.template or "")
        return "\n".join(text for text in told if text)

    @cached_property
    def digest(self) -> str:
        """sha256 in hex over all that decides the result: base, examples, test rows, candidates in their order, prompt and settings."""
        config = self.config
        identity = {
            "format": _FORMAT,
            "base": [self.base.fingerprint.digest, str(self.base.dtype)],
            "name": self.name,
            "description": config.description,
            "examples": [draw.few.digest for draw in self.draws],
            "left_out": [[[example.turns, example.completion] for example in draw.left_out] for draw in self.draws],
            "dev": [[example.turns, example.completion] for example in self.dev],
            "test": self.data.test_version,
            "candidates": [[candidate.name, candidate.digest] for candidate in self.candidates],
            "prompt": self.prompt.to_json(),
            "compose": config.compose.model_dump(mode="json", exclude={"adapters", "exclude", "device", "dtype"}),
            "controls": config.controls,
            "eval": config.eval.model_dump(mode="json", exclude={"batch_size"}),
            "generation": config.generation.model_dump(mode="json"),
        }
        return hashlib.sha256(json.dumps(identity, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def plan_composition(
    config: ComposeConfig,
    hub: Hub,
    *,
    root: Path | None = None,
    base: Base | None = None,
    data: TaskData | None = None,
    progress: Progress = silent,
) -> ComposePlan:
    """Load data and base (those not given), find the candidates, draw the examples. Nothing is written.

    Raises DataError, TaskError, ConfigError (settings, a package that is missing, no adapter that fits, too few examples), AdapterNotFound,
    NameRefused, BaseMismatch, and what loading a base raises; bad settings and rows before the base is loaded.
    """
    settings = config.compose
    data = data or _load(config, root)
    check_composable(config, data)
    versions, left_out = _named(config, hub)
    base = base or load_base(config.base, dtype=settings.dtype, device=settings.device, quantization=config.quantization, progress=progress)
    if base.decoder.classifies:
        raise ConfigError(
            f"{base.name} is an encoder: its adapters have classifiers of their own, which cannot be composed",
            hint="train one adapter on all classes, or compose over a base that writes text",
        )
    versions, more = _fitting(versions, hub, base, named=bool(settings.adapters))
    max_new_tokens, stop = limits(config.generation, data, base.tokenizer)
    drawn = draw_examples(config, data, base)
    return ComposePlan(
        config=config,
        base=base,
        data=data,
        versions=versions,
        candidates=tuple(_candidate(version, hub) for version in versions),
        draws=drawn.draws,
        dev=drawn.undrawn,
        prompt=data.task.prompt_format(stop),
        max_new_tokens=max_new_tokens,
        warnings=(*left_out, *more, *_cut(drawn, base), *_repeats(data), *_leaks(data)),
        seeds_note=drawn.note,
    )


def check_composable(config: ComposeConfig, data: TaskData) -> None:
    """What can be told before a base is loaded: raises ConfigError (settings, a package that is missing), DataError, TaskError or NameRefused."""
    settings = config.compose
    check_method(settings.method)
    check_name(config.name or data.task.name)
    if data.test:
        require("scipy", "rouge_score")
        metric_for(data.task)
    _check_examples(config, len(data.train))


def _load(config: ComposeConfig, root: Path | None) -> TaskData:
    """The task and its rows. A task folder and a built-in task have names of their own; a file of rows is called as the result will be."""
    asked = config.require_data()
    named = asked.path is not None and (asked.path.startswith(BUILTIN) or ((root or Path()) / Path(asked.path).expanduser()).is_dir())
    return load_task(asked, name=None if named else config.name, root=root)


def _check_examples(config: ComposeConfig, num: int) -> None:
    """Settings that the number of examples does not allow, before any work."""
    settings = config.compose
    if settings.k is not None and settings.k > num:
        raise DataError(
            f"k is {settings.k}, but there {'is' if num == 1 else 'are'} {counted(num, 'example')}", hint="give more examples, or a smaller k"
        )
    k = settings.k or num
    if settings.takes_folds and settings.folds is not None and settings.folds > k:
        raise ConfigError(
            f"{counted(k, 'example')} cannot be cut into {settings.folds} folds", hint=f"set folds to {k} or less, or give more examples"
        )
    if settings.hold_out is not None and k < 2:
        raise ConfigError("one example cannot be held out of one", hint="give more examples, or leave hold_out away")
    if settings.folds == 1:
        raise ConfigError("folds is 1, which holds out everything", hint="use 2 or more, or 0 for none")
    if settings.folds and not settings.takes_folds:
        reason = "hold_out is given" if settings.hold_out is not None else f"the method {settings.method} knows no folds"
        raise ConfigError(f"folds is {settings.folds}, but {reason}", hint="leave folds away")


def _named(config: ComposeConfig, hub: Hub) -> tuple[tuple[Version, ...], tuple[str, ...]]:
    """The versions that the settings mean, and sentences about those left out for their kind. Raises ConfigError where none is left."""
    settings = config.compose
    excluded = {text: parse_reference(text) for text in settings.exclude}
    if settings.adapters:
        foreign = next((text for text in settings.adapters if text.startswith("hf:") or "://" in text), None)
        if foreign is not None:
            hint = f"bring it in first: atoll hub pull {foreign}"
            raise ConfigError(f"{foreign[:120]!r} names an adapter of elsewhere, and only adapters of the hub are composed", hint=hint)
        found = [hub.resolve(reference) for reference in settings.adapters]
        for version in found:
            if version.kind not in ("lora", "composed"):
                raise ConfigError(
                    f"{version.ref} is {version.kind}: it edits hidden states, and only LoRA factors are weighed",
                    hint="leave it out; merged_adapters of a request adds edits up with weights of your own",
                )
        sentences: list[str] = []
        listed = found
    else:
        listed = list(hub.list())
        found, older = _newest_loras(listed, hub)
        edits = sum(version.kind in ("reft", "lora+reft") for version in listed)
        sentences = [f"{edits} adapter{'s' if edits > 1 else ''} with ReFT edits left out: only LoRA factors are weighed"] if edits else []
        if older:
            sentences.append(
                f"the newest of {_listed([version.name for version in older])} is composed: {_listed([v.ref for v in older])} used instead"
            )
    for text, reference in excluded.items():
        if not any(reference.means(version) for version in (*listed, *found)):
            there = [version.ref for version in found if name_key(version.name) == name_key(reference.name or "")]
            among = "none of the adapters named is that one" if settings.adapters else "there is no such adapter"
            sentences.append(f"{text} is excluded, but {f'it is {there[0]} that is composed' if there else among}")
    kept: dict[str, Version] = {}
    for version in found:
        if not any(reference.means(version) for reference in excluded.values()):
            kept.setdefault(version.digest, version)  # one content may have several names
    if not found:
        raise ConfigError(
            "the hub has no LoRA adapters to compose", hint="train some first (atoll train, atoll land), or bring them in with atoll hub pull"
        )
    if not kept:
        where = "named" if settings.adapters else "of the hub"
        raise ConfigError(f"every LoRA adapter {where} is excluded, so none is left to compose", hint="exclude fewer")
    return tuple(kept.values()), tuple(sentences)


def _newest_loras(listed: Sequence[Version], hub: Hub) -> tuple[list[Version], list[Version]]:
    """The newest LoRA of each name, and which of them are older than a composition that was published under their name."""
    found: list[Version] = []
    older: list[Version] = []
    for version in listed:
        if version.kind == "lora":
            found.append(version)
        elif version.kind == "composed" and version.number > 1:
            before = [one for one in hub.list(version.name, all_versions=True) if one.kind == "lora" and one.name == version.name and not one.yanked]
            older += sorted(before, key=lambda one: one.number)[-1:]
    return [*found, *older], older


def _fitting(versions: Sequence[Version], hub: Hub, base: Base, *, named: bool) -> tuple[tuple[Version, ...], tuple[str, ...]]:
    """The versions that belong to the base, and sentences about the rest.

    Of other weights, where the shapes fit, only those that were asked for by name. Raises BaseMismatch for one that was and does not fit,
    ConfigError for none.
    """
    fingerprint, shapes = base.fingerprint.to_json(), tensor_shapes(base.path)
    fitting: list[Version] = []
    doubtful: dict[str, list[str]] = {}  # what is to be said of them -> references
    strange: list[tuple[Version, Verdict]] = []
    for version in versions:
        verdict = hub.check_base(version.ref, fingerprint, shapes)
        if named and not verdict.usable:
            hint = verdict.hint("name the base that it was trained on with --base", can_ignore=False)
            raise BaseMismatch(f"{version.ref} does not fit {base.title}: {verdict.reason}", hint=hint)
        if not verdict.usable or (verdict.is_of_other_weights and not named):
            strange.append((version, verdict))
            continue
        fitting.append(version)
        if verdict.kind == "compatible":
            doubtful.setdefault(_doubt(verdict), []).append(version.ref)
    rounded = [(version, verdict) for version, verdict in strange if verdict.quantization is not None]
    alike = [version for version, verdict in strange if verdict.usable]
    if not fitting:
        raise _none_fits(versions, base, rounded, alike)
    sentences = [f"{_listed(refs)} composed, {'each of them ' if len(refs) > 1 else ''}{doubt}" for doubt, refs in doubtful.items()]
    for name in dict.fromkeys(verdict.quantization for _, verdict in rounded):
        refs = [version.ref for version, verdict in rounded if verdict.quantization == name]
        sentences.append(f"{_listed(refs)} left out: trained on the base rounded to {name} (--quantization {name} composes on it)")
    for other in dict.fromkeys(version.base for version in alike):
        refs = [version.ref for version in alike if version.base == other]
        sentences.append(
            f"{_listed(refs)} left out: made for other weights{f' ({other})' if other else ''} than {base.title}'s (--from names adapters to compose "
            "all the same)"
        )
    others = [version.ref for version, verdict in strange if not verdict.usable and verdict.quantization is None]
    if others:
        sentences.append(f"{_listed(others)} left out: made for another base than {base.title}")
    return tuple(fitting), tuple(sentences)


def _doubt(verdict: Verdict) -> str:
    """Why an adapter that fits may still not belong to the base."""
    if verdict.differing:
        return f"though its base had another {' and '.join(verdict.differing)}"
    return "though not known to have been trained on exactly this base"


def _none_fits(versions: Sequence[Version], base: Base, rounded: Sequence[tuple[Version, Verdict]], alike: Sequence[Version]) -> ConfigError:
    """The error where no version is left: with the nearest reason, and its way out."""
    first, hint = "", "name the base that they were trained on with --base, or train some"
    if rounded:
        version, verdict = rounded[0]
        first, hint = f" ({version.ref}: {verdict.reason})", verdict.hint(hint, can_ignore=False)
    elif alike:
        made = f" (made for {alike[0].base!r})" if alike[0].base else ""
        first = f" ({alike[0].ref} fits in shape, but was made for other weights{made})"
        hint = "name the base that they were trained on with --base, or adapters to compose all the same with --from"
    return ConfigError(f"none of the hub's {len(versions)} LoRA adapters was made for {base.title}{first}", hint=hint)


def _cut(drawn: Draws, base: Base) -> tuple[str, ...]:
    """A sentence about the examples that are too long."""
    if not drawn.cut:
        return ()
    num = counted(len(drawn.cut), "example")
    return (f"{num} lost the beginning of their prompt to fit {base.context_length} tokens (first: {drawn.cut[0]})",)


def _repeats(data: TaskData) -> tuple[str, ...]:
    """Sentences about examples that say less than their number."""
    rows, said = data.train, []
    inputs = {json.dumps(row.turns) for row in rows}
    if len(inputs) < len(rows):
        same = "all have the same input" if len(inputs) == 1 else f"only {len(inputs)} have different inputs"
        said.append(f"of {len(rows)} examples {same}: equal ones are held out together")
    if len(rows) > 1 and len({row.completion for row in rows}) == 1:
        said.append(f"all {len(rows)} examples have the same answer, so what is found may be no more than always giving it")
    return tuple(said)


def _leaks(data: TaskData) -> tuple[str, ...]:
    """A sentence about test rows that are examples too: what is scored on them was learned by heart."""

    def content(row: Example) -> str:
        return json.dumps([row.turns, row.completion])

    known = {content(example) for example in data.train}
    leaked = [row.where for row in data.test if content(row) in known]
    if not leaked:
        return ()
    what = "1 test row equals an example" if len(leaked) == 1 else f"{len(leaked)} of {len(data.test)} test rows equal examples"
    return (f"{what} (first: {leaked[0]}), so scores are too good: leave them out of one of the two",)


def _candidate(version: Version, hub: Hub) -> Candidate:
    """A version as retrieval knows it. Its text is what its card says of its task; the prompt that it was trained with says more than most titles."""
    words = [version.name.replace("_", " ").replace("-", " "), version.description, version.task.replace("_", " "), *version.tags]
    return Candidate(version.ref, version.digest, "\n".join(dict.fromkeys([*words, *_prompt_texts(version, hub)])), partial(_read, version, hub))


def _prompt_texts(version: Version, hub: Hub) -> list[str]:
    prompt = read_manifest(hub.path(version)).get("prompt")
    texts = [prompt.get(key) for key in ("instruction", "template")] if isinstance(prompt, dict) else []
    return [text for text in texts if isinstance(text, str) and text]


def _read(version: Version, hub: Hub) -> Adapter:
    return read_adapter(hub.path(version))


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")

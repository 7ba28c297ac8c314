"""Run one model on one task through an engine: prompts to requests, completions to a Score.

The one idea: planning, generating and scoring are apart. `plan_run` renders and tokenises, `requests_for` gives engine requests, `score_completions`
turns what came back into a Score. So a caller can put the requests of many models and tasks into one continuous batch and hand each run its own
completions; `evaluate` is that for a single run. Options (the likelihood of every label of a closed set) go the same way through `option_requests`
and `with_options`.

Used by workflows and the command line. Imports no torch: the engine and the tokenizer come as arguments.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from atoll.errors import EngineError, TaskError
from atoll.eval.matching import normalise_label
from atoll.eval.metrics import Metric, metric_for
from atoll.eval.score import Kind, RowOutput, Score
from atoll.eval.stats import bootstrap_stderr, mean_stderr

if TYPE_CHECKING:
    from atoll.data.prompt import PromptFormat
    from atoll.data.task import Example, Task, TaskData
    from atoll.engine.request import Completion, Request, ScoreRequest

Progress = Callable[[str, int, int], None] | None
PromptStyle = Literal["plain", "chat"]
Part = Literal["validation", "test"]
CUT = "length"  # the finish reason of an output that hit its token limit
BROKEN = frozenset({"error", "cancelled"})  # finish reasons that leave no answer, whatever was generated before


class Generates(Protocol):
    """What evaluation asks of an engine."""

    def generate(self, requests: list[Request], progress: Progress = None) -> list[Completion]:
        """One completion a request, with its request_id."""

    def score(self, items: list[ScoreRequest], progress: Progress = None) -> list[list[float]]:
        """For each item the sum of log-probabilities (natural log) of each of its continuations."""


@dataclass(frozen=True)
class Contestant:
    """Whose score it is. digest: identity of its content. adapter: its key in the engine, None for the base."""

    model: str
    kind: Kind
    digest: str
    adapter: str | None = None


@dataclass(frozen=True)
class TaskRun:
    """One contestant on one task in one prompt style, ready to be asked. Made by plan_run.

    prompts: token ids a row. prefixes: what stands between prompt and label when a label is scored. end_id: the end-of-text token.
    labels: scored as options, or None. run_id: begins every request_id, distinct for distinct contestants, tasks and styles.
    """

    data: TaskData
    examples: tuple[Example, ...]
    contestant: Contestant
    style: PromptStyle
    metric: Metric
    prompts: tuple[tuple[int, ...], ...]
    prefixes: tuple[str, ...]
    prompts_cut: int
    max_new_tokens: int
    stop: tuple[str, ...]
    labels: tuple[str, ...] | None
    end_id: int | None
    run_id: str


def prompt_styles(task: Task, tokenizer: Any) -> tuple[PromptStyle, ...]:
    """The styles in which a base is asked: plain and inside its chat template; only the latter for chat data, only the former without a template."""
    if task.chat:
        return ("chat",)
    return ("plain", "chat") if getattr(tokenizer, "chat_template", None) else ("plain",)


def generation_limits(data: TaskData, tokenizer: Any, *, slack: float = 1.25) -> tuple[int, tuple[str, ...]]:
    """(max_new_tokens, stop) that fit the task's training answers, the same for base and adapters.

    The longest training completion and its end, times `slack`, plus 8. Stop: a line end where no training answer has one, else an empty line where
    none has one, since a base that does not know when to end would otherwise run to the limit with its answer already given.
    """
    from atoll.data.prompt import tokenize

    answers = [example.completion.strip() for example in data.train] or [example.completion.strip() for example in data.test]
    longest = max((len(token_ids) for token_ids in tokenize(answers, tokenizer)), default=0) + 1
    stop = next(((mark,) for mark in ("\n", "\n\n") if not any(mark in answer for answer in answers)), ())
    return int(longest * slack) + 8, stop


def choose_examples(data: TaskData, num_rows: int | None, part: Part = "test") -> tuple[Example, ...]:
    """The rows to score: all of `part`, or `num_rows` of them drawn by a hash of their content, in the part's order.

    A smaller draw is a subset of a larger one. Raises TaskError when the part is empty or num_rows is not positive.
    """
    examples: tuple[Example, ...] = getattr(data, part)
    if not examples:
        raise TaskError(f"task {data.task.name!r} has no {part} rows to score", hint="give it a test file or a split that leaves rows for one")
    if num_rows is None or num_rows >= len(examples):
        return examples
    if num_rows < 1:
        raise TaskError(f"{num_rows} test rows were asked for task {data.task.name!r}, expected 1 or more", hint="leave it out for all of them")
    order = sorted(range(len(examples)), key=lambda i: hashlib.sha256(f"{examples[i].prompt}\n{examples[i].completion}".encode()).digest())
    return tuple(examples[i] for i in sorted(order[:num_rows]))


def plan_run(
    data: TaskData,
    contestant: Contestant,
    tokenizer: Any,
    *,
    style: PromptStyle = "plain",
    prompt_format: PromptFormat | None = None,
    max_new_tokens: int | None = None,
    stop: tuple[str, ...] | None = None,
    num_rows: int | None = None,
    part: Part = "test",
    context_length: int | None = None,
    metric: str | None = None,
    max_options: int = 40,
    allow_code: bool = False,
) -> TaskRun:
    """Everything needed to ask `contestant` the rows of a task.

    style: "chat" puts each prompt into the tokenizer's chat template. prompt_format: the one the adapter was trained with, which then renders the
    rows, decides the style and adds its stop texts; None takes the task's own prompts. max_new_tokens, stop: from generation_limits where None.
    context_length: prompts longer than it, less max_new_tokens, lose their beginning, and are counted. max_options: label sets up to this size are
    scored as options too; 0 turns that off. Raises TaskError, DataError (a row lacks a column) or ConfigError (no chat template).
    """
    from atoll.data.prompt import encode_prompts

    examples = choose_examples(data, num_rows, part)
    limit, default_stop = generation_limits(data, tokenizer)
    limit = max_new_tokens or limit
    stops = default_stop if stop is None else stop
    if prompt_format is not None:
        style = "chat" if prompt_format.chat else "plain"
        stops = tuple(dict.fromkeys((*stops, *prompt_format.stop)))
    own = prompt_format if prompt_format is not None and examples[0].messages is None else None
    turns = [example.turns if own is None else own.render(example.row, example.where) for example in examples]
    encoded = encode_prompts(turns, tokenizer, style == "chat", [example.where for example in examples])
    prompts, num_cut = _fit(encoded, None if context_length is None else context_length - limit, tokenizer)
    labels = data.task.label_set
    return TaskRun(
        data=data,
        examples=examples,
        contestant=contestant,
        style=style,
        metric=metric_for(data.task, metric, allow_code=allow_code),
        prompts=prompts,
        prefixes=tuple(_prefix(example, own, style) for example in examples),
        prompts_cut=num_cut,
        max_new_tokens=limit,
        stop=stops,
        labels=tuple(labels) if labels and 2 <= len(labels) <= max_options else None,
        end_id=tokenizer.eos_token_id,
        run_id="|".join((contestant.kind, contestant.model, contestant.digest, data.task.name, style)),
    )


def requests_for(run: TaskRun) -> list[Request]:
    """One greedy request a row; request_id is `run_id|row`, so completions of many runs can be told apart."""
    from atoll.engine.request import Request, SamplingParams

    sampling = SamplingParams(max_new_tokens=run.max_new_tokens, temperature=0.0, stop=run.stop, stop_after_text=True)
    return [
        Request(prompt_ids=list(prompt), adapter=run.contestant.adapter, sampling=sampling, request_id=f"{run.run_id}|{row}")
        for row, prompt in enumerate(run.prompts)
    ]


def score_completions(run: TaskRun, completions: Sequence[Completion], *, seconds: float | None = None) -> tuple[Score, list[RowOutput]]:
    """The run's score and raw outputs; `completions` may hold those of other runs too, in any order.

    A row fails when its output is empty, broken off, cut at the token limit (unless the metric can use it), or not readable as an answer; it then
    gets the metric's failure evidence and is counted. Raises EngineError when a row has no completion.
    """
    by_id = {completion.request_id: completion for completion in completions}
    metric = run.metric
    hashes = [_hash(prompt) for prompt in run.prompts]
    evidence, outputs = [], []
    for row, example in enumerate(run.examples):
        completion = by_id.get(f"{run.run_id}|{row}")
        if completion is None:
            raise EngineError(
                f"the engine returned no completion for {example.where} of task {run.data.task.name!r}",
                hint="pass the completions of every request of requests_for(run)",
            )
        prediction = completion.text.strip()
        readable = prediction and completion.finish_reason not in BROKEN and (completion.finish_reason != CUT or metric.usable_when_cut(prediction))
        found = metric.read(prediction, example) if readable else None
        failed = found is None
        row_evidence = metric.failure(example) if found is None else found
        evidence.append(row_evidence)
        value = metric.row_value(row_evidence)
        outputs.append(
            RowOutput(
                index=row,
                where=example.where,
                prompt_hash=hashes[row],
                prediction=completion.text,
                gold=metric.gold(example),
                value=0.0 if failed and value is not None else value,
                failed=failed,
                finish_reason=str(completion.finish_reason),
                num_tokens=len(completion.token_ids),
                error=completion.error,
            )
        )
    matrix = np.array(evidence, dtype=np.float64)
    stderr = mean_stderr(matrix[:, 0]) if metric.is_mean else bootstrap_stderr(metric.aggregate, matrix)
    score = Score(
        task=run.data.task.name,
        task_version=run.data.test_version,
        metric=metric.name,
        metric_version=metric.version,
        match=run.data.task.match if metric.name == "exact_match" else None,
        n=len(evidence),
        value=metric.aggregate(matrix),
        stderr=stderr,
        failures=sum(output.failed for output in outputs),
        model=run.contestant.model,
        kind=run.contestant.kind,
        digest=run.contestant.digest,
        prompt_style=run.style,
        prompt_hash=_hash(hashes),
        rows_hash=_hash([[output.gold, example.prompt] for output, example in zip(outputs, run.examples, strict=True)]),
        prompts_cut=run.prompts_cut,
        max_new_tokens=run.max_new_tokens,
        stop=run.stop,
        seconds=seconds,
        values=tuple(output.value for output in outputs),
        evidence=tuple(evidence),
    )
    return score, outputs


def option_requests(run: TaskRun, tokenizer: Any) -> list[ScoreRequest]:
    """One item a row with every label as a continuation, or [] when the task has no closed label set of fitting size.

    A label is tokenised as training would write it: after the completion's own prefix (a space), or bare in a chat. The sum of its tokens'
    log-probabilities is its score. Where one label's tokens begin another's ("New", "New York"), the shorter could never lose, so then every label
    is followed by the end-of-text token; elsewhere the end is left out, since a base that was not trained to stop would be judged by that instead of
    by its choice.
    """
    from atoll.data.prompt import tokenize
    from atoll.engine.request import ScoreRequest

    if run.labels is None:
        return []
    by_prefix: dict[str, tuple[tuple[int, ...], ...]] = {}
    for prefix in set(run.prefixes):
        token_ids = [tuple(ids) for ids in tokenize([prefix + label for label in run.labels], tokenizer)]
        if _one_begins_another(token_ids) and run.end_id is not None:
            token_ids = [(*ids, run.end_id) for ids in token_ids]
        by_prefix[prefix] = tuple(token_ids)
    return [
        ScoreRequest(prompt_ids=list(prompt), continuations=by_prefix[prefix], adapter=run.contestant.adapter)
        for prompt, prefix in zip(run.prompts, run.prefixes, strict=True)
    ]


def with_options(score: Score, outputs: Sequence[RowOutput], run: TaskRun, log_probs: Sequence[Sequence[float]]) -> tuple[Score, list[RowOutput]]:
    """The score with options_value: accuracy of the label with the highest log-probability (the first of equals), and outputs that name it.

    log_probs: one list a row, one number a label, as the engine gives for option_requests(run); empty leaves both as they were.
    """
    if run.labels is None or not log_probs:
        return score, list(outputs)
    if len(log_probs) != len(run.examples) or any(len(row) != len(run.labels) for row in log_probs):
        raise EngineError(
            f"the engine scored {len(log_probs)} rows of options for the {len(run.examples)} rows of task {score.task!r}",
            hint="pass what engine.score returned for option_requests(run)",
        )
    chosen = [run.labels[int(np.argmax(row))] for row in log_probs]
    right = np.array([float(normalise_label(label) == normalise_label(output.gold)) for label, output in zip(chosen, outputs, strict=True)])
    named = [replace(output, option=label) for label, output in zip(chosen, outputs, strict=True)]
    return replace(score, options_value=float(right.mean()), options_stderr=mean_stderr(right)), named


def evaluate(
    engine: Generates, data: TaskData, contestant: Contestant, tokenizer: Any, *, progress: Progress = None, **options: Any
) -> tuple[Score, list[RowOutput]]:
    """Score one contestant on one task: plan_run(**options), generate, score, and score the options where there are any.

    Errors: those of plan_run, and what the engine raises.
    """
    start = time.perf_counter()
    run = plan_run(data, contestant, tokenizer, **options)
    completions = engine.generate(requests_for(run), progress=progress)
    items = option_requests(run, tokenizer)
    log_probs = engine.score(items, progress=progress) if items else []
    score, outputs = score_completions(run, completions, seconds=time.perf_counter() - start)
    return with_options(score, outputs, run, log_probs)


def _fit(prompts: Sequence[list[int]], room: int | None, tokenizer: Any) -> tuple[tuple[tuple[int, ...], ...], int]:
    """The prompts in at most `room` tokens each, what is too long cut at its beginning but for the token that opens a text; and how many were cut."""
    from atoll.data.prompt import added_tokens

    if room is None:
        return tuple(tuple(prompt) for prompt in prompts), 0
    front = added_tokens(tokenizer)[0]
    if room <= len(front):
        raise TaskError("the answers' token limit leaves no room for a prompt in the base's context", hint="lower max_new_tokens")
    fitted, num_cut = [], 0
    for prompt in prompts:
        if len(prompt) > room:
            kept = front if prompt[: len(front)] == front else []
            prompt, num_cut = kept + prompt[len(prompt) - (room - len(kept)) :], num_cut + 1
        fitted.append(tuple(prompt))
    return tuple(fitted), num_cut


def _prefix(example: Example, prompt_format: PromptFormat | None, style: PromptStyle) -> str:
    """The white space that training puts between the prompt and the answer."""
    if style == "chat" or example.messages is not None:
        return ""
    text = example.completion if prompt_format is None else prompt_format.completion_for(example.row, example.where)
    return text[: len(text) - len(text.lstrip())]


def _one_begins_another(token_ids: Sequence[tuple[int, ...]]) -> bool:
    # In sorted order whatever begins with a sequence follows it directly.
    ordered = sorted(token_ids)
    return any(longer[: len(shorter)] == shorter for shorter, longer in pairwise(ordered))


def _hash(parts: Sequence[Any]) -> str:
    """First 16 hex digits of the sha256 of the parts' repr: a name for equal inputs, not a seal."""
    return hashlib.sha256(repr(list(parts)).encode("utf-8", "surrogatepass")).hexdigest()[:16]

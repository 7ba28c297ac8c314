"""`atoll generate`: continue one prompt as it is written, or a file of prompts in one batch."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from atoll.cli.options import BaseOption, DtypeOption, JsonOption, usage
from atoll.cli.output import say, warn, write, write_json
from atoll.cli.progress import progress_bar
from atoll.cli.rounding import BlocksOption, IgnoreOption, QuantizationOption, Rounding
from atoll.errors import DataError, EngineError, RequestRefused

if TYPE_CHECKING:
    from atoll.cli.prompting import Prompt, Style
    from atoll.cli.session import OpenAdapter, Session
    from atoll.data.rows import Row
    from atoll.engine.request import Completion, Request, SamplingParams

DEFAULT_NEW_TOKENS = 256
Form: TypeAlias = tuple[str, Rounding]  # the base's number format, and how it is rounded


def generate(
    prompt: Annotated[str | None, typer.Argument(metavar="PROMPT", help="The prompt; - reads it from stdin.", show_default=False)] = None,
    adapter: Annotated[str | None, typer.Option("--adapter", "-a", metavar="REF", help="An adapter of the hub.", show_default=False)] = None,
    base: BaseOption = None,
    field: Annotated[
        list[str] | None, typer.Option("--field", "-f", metavar="NAME=VALUE", help="Fill a column of the adapter's template; repeatable.")
    ] = None,
    rows: Annotated[
        Path | None,
        typer.Option("--input", metavar="FILE", help="Rows (.jsonl, .csv) to answer in one batch, as JSONL.", show_default=False),
    ] = None,
    chat: Annotated[
        bool | None, typer.Option("--chat/--raw", help="Use the base's chat template, or the text as it is, instead of the adapter's template.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", metavar="N", help="Most tokens of an answer.")] = DEFAULT_NEW_TOKENS,
    temperature: Annotated[
        float, typer.Option("--temperature", "-t", metavar="X", help="0 takes the likeliest token; above, tokens are drawn.")
    ] = 0.0,
    top_p: Annotated[float, typer.Option("--top-p", metavar="X", help="Draw from the likeliest tokens that have this share together.")] = 1.0,
    top_k: Annotated[int, typer.Option("--top-k", metavar="N", help="Draw from this many of the likeliest tokens; 0 is all.")] = 0,
    repetition_penalty: Annotated[
        float, typer.Option("--repetition-penalty", metavar="X", help="Above 1, tokens that were used get less likely.")
    ] = 1.0,
    seed: Annotated[int | None, typer.Option("--seed", metavar="N", help="Seed of the draw; the one used is in --json.", show_default=False)] = None,
    stop: Annotated[list[str] | None, typer.Option("--stop", metavar="TEXT", help="End the answer before this text; repeatable.")] = None,
    logprobs: Annotated[
        int | None, typer.Option("--logprobs", metavar="K", help="With --json or --input: log-probabilities of each token and K others.")
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, metavar="N", help="Rows of --input answered at the same time.")] = 32,
    dtype: DtypeOption = "bfloat16",
    quantization: QuantizationOption = None,
    quantized_memory: BlocksOption = False,
    ignore_quantization: IgnoreOption = False,
    as_json: JsonOption = False,
) -> None:
    """Continue a prompt with the base or an adapter, streaming.

    An adapter is asked in the words it was trained with: its template, filled with --field, and PROMPT in the one column left. Without a template the
    base's chat template is used if it has one. Rows of --input hold a prompt, messages or the template's columns, and may name their "adapter".

    \b
    Examples:
      atoll generate "What is the capital of France?"
      atoll generate --adapter support_intents "where is my parcel?"
      atoll generate --adapter dates -f question="Today is May 1. What is tomorrow?" -f options="(A) May 2 (B) May 3"
      atoll generate --raw --temperature 0.8 --seed 7 --max-new-tokens 40 "Once upon a time"
      echo "one prompt" | atoll generate --json -
      atoll generate --input rows.jsonl --adapter support_intents > answers.jsonl
    """
    from atoll.engine.request import SamplingParams

    if rows is not None and (prompt is not None or field):
        raise usage("--input takes its prompts from the file: leave PROMPT and --field out")
    if rows is None and prompt is None and not field:
        raise usage("give a PROMPT, - to read it from stdin, --field for an adapter's template, or --input FILE")
    if logprobs is not None and not as_json and rows is None:
        raise usage("--logprobs needs --json or --input")
    sampling = SamplingParams(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=tuple(stop or ()),
        logprobs=logprobs,
    )
    style: Style | None = None if chat is None else "chat" if chat else "raw"
    rounding = Rounding(quantization, quantized_memory, ignore_quantization)
    if rows is not None:
        _answer_rows(rows, adapter, base, (dtype, rounding), style, sampling, batch_size)
    else:
        _answer_one(fields_of(prompt, field), adapter, base, (dtype, rounding), style, sampling, as_json)


# ---- one prompt ----


def _answer_one(
    fields: dict[str, str], ref: str | None, base: str | None, form: Form, style: Style | None, sampling: SamplingParams, as_json: bool
) -> None:
    from atoll.cli.prompting import make_prompt
    from atoll.cli.session import open_session

    session = open_session([ref] if ref else [], base, *form)
    adapter = session.adapters[ref] if ref else None
    _check_fields(adapter, fields, style)
    prompt = make_prompt(session.base, adapter, fields, style)
    engine = session.start(1, session.base.context_length)
    request = _request(prompt, adapter, sampling)
    if as_json:
        with progress_bar() as progress:
            [completion] = engine.generate([request], progress=progress)
        _raise_if_failed(completion)
        write_json(_as_json(session, prompt, adapter, completion))
        return
    completion = stream(session, request, trims=prompt.trims)
    _raise_if_failed(completion)
    if completion.finish_reason == "length":
        say(f"(cut at {len(completion.token_ids)} tokens; --max-new-tokens allows more)")


def stream(session: Session, request: Request, *, trims: bool = False) -> Completion:
    """Write a request's text to stdout as it comes, with a line end, and return its completion; trims: leave out the white space it begins with."""
    engine = session.start(1, session.base.context_length)
    started = not trims
    completion: Completion | None = None
    for event in engine.stream(request):
        text = event.text if started else event.text.lstrip()
        started = started or bool(text)
        if text:
            write(text, end="")
        completion = event.completion
    write("")
    assert completion is not None
    return completion


def fields_of(prompt: str | None, field: Sequence[str] | None) -> dict[str, str]:
    """PROMPT as the field "prompt", and the fields of --field."""
    fields: dict[str, str] = {}
    for text in field or ():
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise usage(f"--field {text!r} is not NAME=VALUE")
        fields[name] = value
    if prompt == "-":
        prompt = sys.stdin.read().removesuffix("\n")
    return fields if prompt is None else {"prompt": prompt, **fields}


def _check_fields(adapter: OpenAdapter | None, fields: dict[str, str], style: Style | None) -> None:
    """A field that nothing uses is a slip of the user's."""
    form = adapter.prompt if adapter is not None and style is None else None
    unused = [name for name in fields if name != "prompt" and (form is None or name not in form.columns)]
    if unused and form is None:
        raise RequestRefused(f"--field {unused[0]} has no template to fill", hint="name an adapter that has one, and leave --chat and --raw out")
    if unused and form is not None and adapter is not None:
        raise RequestRefused(
            f"the prompt of {adapter.version.ref} has no column {unused[0]!r}", hint=f"its columns are {', '.join(form.columns) or 'none'}"
        )


def _request(prompt: Prompt, adapter: OpenAdapter | None, sampling: SamplingParams) -> Request:
    from dataclasses import replace

    from atoll.engine.request import Request

    stops = tuple(dict.fromkeys((*sampling.stop, *prompt.stop)))
    return Request(prompt.token_ids, adapter=adapter.version.digest if adapter else None, sampling=replace(sampling, stop=stops))


def _raise_if_failed(completion: Completion) -> None:
    if completion.finish_reason == "error":
        raise EngineError(f"the engine could not answer: {completion.error}", hint="run again with ATOLL_DEBUG=1 for more")


def _as_json(session: Session, prompt: Prompt, adapter: OpenAdapter | None, completion: Completion) -> dict[str, Any]:
    tokenizer = session.base.tokenizer
    facts: dict[str, Any] = {
        "text": completion.text.lstrip() if prompt.trims else completion.text,
        "adapter": adapter.version.ref if adapter else None,
        "digest": adapter.version.digest if adapter else None,
        "base": session.base.name,
        "prompt": prompt.text,
        "prompt_style": prompt.style,
        "finish_reason": completion.finish_reason,
        "stopped_by": completion.stopped_by,
        "num_prompt_tokens": completion.num_prompt_tokens,
        "num_tokens": len(completion.token_ids),
        "seed": completion.seed,
    }
    if completion.error:
        facts["error"] = completion.error
    if completion.logprobs is not None:
        facts["logprobs"] = [
            {
                "token": tokenizer.decode([entry.token_id]),
                "token_id": entry.token_id,
                "logprob": entry.logprob,
                "top": [{"token": tokenizer.decode([token]), "token_id": token, "logprob": value} for token, value in entry.top],
            }
            for entry in completion.logprobs
        ]
    return facts


# ---- a file of prompts ----


def _answer_rows(file: Path, ref: str | None, base: str | None, form: Form, style: Style | None, sampling: SamplingParams, batch_size: int) -> None:
    """Answer every row in one continuous batch; one JSON object a row to stdout, in the file's order. Rows that failed give exit code 1."""
    from atoll.cli.prompting import make_prompt
    from atoll.cli.session import open_session
    from atoll.data.rows import read_rows

    rows = read_rows(file)
    refs = [_adapter_of(row, ref) for row in rows]
    session = open_session(list(dict.fromkeys(name for name in refs if name)), base, *form)
    adapters = [session.adapters[name] if name else None for name in refs]
    prompts = [make_prompt(session.base, adapter, row.values, style, row.where) for row, adapter in zip(rows, adapters, strict=True)]
    longest = max(len(prompt.token_ids) for prompt in prompts) + (sampling.max_new_tokens or DEFAULT_NEW_TOKENS)
    engine = session.start(min(batch_size, len(rows)), max(2, longest))
    requests = [_request(prompt, adapter, sampling) for prompt, adapter in zip(prompts, adapters, strict=True)]
    with progress_bar() as progress:
        completions = engine.generate(requests, progress=progress)
    failed = 0
    for index, (prompt, adapter, completion) in enumerate(zip(prompts, adapters, completions, strict=True)):
        write_json({"index": index, **_as_json(session, prompt, adapter, completion)}, indent=None)
        failed += completion.finish_reason == "error"
    if failed:
        warn(f"{failed} of {len(rows)} rows failed; their lines have an error")
        raise typer.Exit(1)


def _adapter_of(row: Row, default: str | None) -> str | None:
    """The row's own adapter; null or an empty text is the base."""
    named = row.values.get("adapter", default)
    if named is not None and not isinstance(named, str):
        raise DataError(f"{row.where}: adapter is {named!r}, expected a name, or null for the base", hint='for example "adapter": "dates@1"')
    return named or None

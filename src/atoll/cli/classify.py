"""`atoll classify`: which of its classes an adapter over an encoder gives a text, and how sure it is; and how any adapter is tried."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated

import typer

from atoll.cli.generate import fields_of
from atoll.cli.options import BaseOption, DtypeOption, JsonOption, usage
from atoll.cli.output import Column, write_json, write_table
from atoll.cli.rounding import BlocksOption, IgnoreOption, QuantizationOption, Rounding
from atoll.errors import RequestRefused

if TYPE_CHECKING:
    from atoll.hub.records import Version
    from atoll.model.adapter import Adapter


def classify(
    adapter: Annotated[str, typer.Option("--adapter", "-a", metavar="REF", help="An adapter of the hub.", show_default=False)],
    text: Annotated[str | None, typer.Argument(metavar="TEXT", help="The text; - reads it from stdin.", show_default=False)] = None,
    base: BaseOption = None,
    field: Annotated[
        list[str] | None, typer.Option("--field", "-f", metavar="NAME=VALUE", help="Fill a column of the adapter's template; repeatable.")
    ] = None,
    dtype: DtypeOption = "bfloat16",
    quantization: QuantizationOption = None,
    quantized_memory: BlocksOption = False,
    ignore_quantization: IgnoreOption = False,
    as_json: JsonOption = False,
) -> None:
    """Give a text the classes of an adapter over an encoder.

    Prints each class with its probability, the likeliest first. The text stands in the template that the adapter was trained with, as in
    `atoll generate`. Over a base that writes text, a class is written: ask `atoll generate`.

    \b
    Examples:
      atoll classify --adapter ticket-router-bert "the parcel never came"
      echo "one text" | atoll classify --adapter ticket-router-bert --json -
    """
    from atoll.cli.prompting import make_prompt
    from atoll.cli.session import open_session
    from atoll.engine.request import ScoreRequest

    if text is None and not field:
        raise usage("give a TEXT, - to read it from stdin, or --field for an adapter's template")
    session = open_session([adapter], base, dtype, Rounding(quantization, quantized_memory, ignore_quantization))
    opened = session.adapters[adapter]
    if not session.base.decoder.classifies:
        raise RequestRefused(
            f"the base {session.base.name!r} writes text and has no classes of its own", hint=f'atoll generate --adapter {adapter} "..."'
        )
    labels = _labels(opened.adapter, adapter)
    prompt = make_prompt(session.base, opened, fields_of(text, field), None if opened.prompt is not None else "raw")
    engine = session.start(1, session.base.context_length)
    [odds] = engine.score([ScoreRequest(prompt.token_ids, [(number,) for number in range(len(labels))], adapter=opened.version.digest)])
    found = sorted(((label, math.exp(value)) for label, value in zip(labels, odds, strict=True)), key=lambda pair: -pair[1])
    if as_json:
        write_json({"label": found[0][0], "probability": found[0][1], "classes": dict(found), "adapter": opened.version.ref, "prompt": prompt.text})
    else:
        write_table([Column("class"), Column("probability", right=True)], [(label, f"{probability:.3f}") for label, probability in found])


def _labels(adapter: Adapter, name: str) -> tuple[str, ...]:
    """The names of its classes, numbered as transformers does where nobody named them."""
    if not adapter.head:
        raise RequestRefused(f"{name} has no classifier, so it has no classes", hint="it may have learned hidden tokens (trainer.mlm_probability)")
    return tuple(adapter.manifest.get("labels") or (f"LABEL_{number}" for number in range(adapter.num_classes)))


def trial_of(version: Version) -> str:
    """The command that tries an adapter that was just trained; "" for one that learned hidden tokens, which answers nothing."""
    from atoll.hub.intake import read_json_object
    from atoll.model.adapter_files import MANIFEST_FILE

    manifest = read_json_object(version.path / MANIFEST_FILE)
    if manifest["training"]["config"]["trainer"].get("mlm_probability") is not None:
        return ""
    return f'try it: atoll {"classify" if manifest.get("labels") else "generate"} --adapter {version.name} "..."'

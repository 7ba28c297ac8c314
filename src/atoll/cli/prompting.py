"""From what a user typed to the tokens that are asked: the adapter's own template, the base's chat template, or the text as it is.

    --raw                          the text, nothing added
    --chat                         the text as a user turn of the base's chat template
    an adapter with a template     its template, filled with the fields (a lone text fills the one column that no field fills)
    otherwise                      --chat if the base has a chat template, else --raw

Used by generate, for one prompt and for rows of a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from atoll.errors import RequestRefused

if TYPE_CHECKING:
    from atoll.cli.session import OpenAdapter
    from atoll.data.prompt import PromptFormat
    from atoll.model.base import Base

Style = Literal["template", "chat", "raw"]


@dataclass(frozen=True)
class Prompt:
    """A prompt ready to be asked. stop: texts at which the adapter's answers end. trims: the answer's first white space belongs to the template."""

    text: str
    token_ids: list[int]
    style: Style
    stop: tuple[str, ...] = ()
    trims: bool = False


def make_prompt(base: Base, adapter: OpenAdapter | None, fields: Mapping[str, Any], style: Style | None = None, where: str = "") -> Prompt:
    """The prompt for some fields (a lone text is the field "prompt"; a conversation is the field "messages").

    style None: the adapter's template if it has one, else the base's chat template if it has one, else raw. `where` names the row in errors.
    Raises RequestRefused when the fields do not fill the template, ConfigError for a chat without a chat template.
    """
    form = adapter.prompt if adapter is not None else None
    if style is None:
        style = "template" if form is not None else "chat" if base.tokenizer.chat_template else "raw"
    if style != "template" or form is None:
        return _plain(base, fields, style, where)
    assert adapter is not None
    if form.chat and "messages" in fields:
        return replace(_plain(base, fields, "chat", where), style="template", stop=form.stop)
    from atoll.data.prompt import encode_prompt

    row = {**fields, **_last_column(form, fields)}
    missing = [name for name in form.columns if name not in row]
    if missing:
        needs = f"needs {_listed(form.columns)}, and {_listed(missing)} {'is' if len(missing) == 1 else 'are'} missing"
        raise RequestRefused(
            f"{where + ': ' if where else ''}the prompt of {adapter.version.ref} {needs}",
            hint=" ".join(f"--field {name}=..." for name in form.columns) + ", a row with these keys, or --raw to leave its template out",
        )
    text = form.render(row, where)
    return Prompt(text, encode_prompt(text, base.tokenizer, form.chat), "template", form.stop, trims=form.completion_prefix != "" and not form.chat)


def _plain(base: Base, fields: Mapping[str, Any], style: Style, where: str) -> Prompt:
    """The field "prompt" (or "messages"), in the chat template or as it is."""
    from atoll.data.prompt import as_text, encode_prompt, read_conversation

    at = f"{where}: " if where else ""
    if "messages" in fields and style != "raw":
        turns = [turn for turn, _ in read_conversation(fields, where or "messages")]
        return Prompt(as_text(turns), encode_prompt(turns, base.tokenizer), "chat")
    if "prompt" not in fields:
        raise RequestRefused(
            f"{at}there is no prompt; the fields are {_listed(fields) or 'none'}", hint="give a prompt; other fields fill an adapter's template"
        )
    text = as_text(fields["prompt"])
    return Prompt(text, encode_prompt(text, base.tokenizer, style == "chat"), "chat" if style == "chat" else "raw")


def _last_column(form: PromptFormat, fields: Mapping[str, Any]) -> dict[str, Any]:
    """A lone text fills the one column of the template that no field fills, whatever that is called."""
    empty = [name for name in form.columns if name not in fields]
    return {empty[0]: fields["prompt"]} if len(empty) == 1 and "prompt" in fields and "prompt" not in form.columns else {}


def _listed(names: Any) -> str:
    return ", ".join(repr(name) for name in names)

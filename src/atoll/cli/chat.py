"""`atoll chat`: a conversation in the terminal, in the base's chat template.

The history is a list of turns, asked anew each time. Ctrl-C ends an answer between two tokens and keeps what was said; the program goes on.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from atoll.cli.options import BaseOption, DtypeOption
from atoll.cli.output import print_error, say, write
from atoll.cli.rounding import BlocksOption, IgnoreOption, QuantizationOption, Rounding
from atoll.errors import AtollError, ConfigError, EngineError, RequestRefused

if TYPE_CHECKING:
    from atoll.cli.session import OpenAdapter, Session
    from atoll.engine.request import SamplingParams

HELP = "/adapter NAME (or base)   /reset   /help   /exit;  Ctrl-C stops an answer, Ctrl-D leaves"


def chat(
    adapter: Annotated[str | None, typer.Option("--adapter", "-a", metavar="REF", help="An adapter of the hub.", show_default=False)] = None,
    base: BaseOption = None,
    system: Annotated[str | None, typer.Option("--system", metavar="TEXT", help="A system turn to begin with.", show_default=False)] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, metavar="N", help="Most tokens of an answer.")] = 512,
    temperature: Annotated[
        float, typer.Option("--temperature", "-t", metavar="X", help="0 takes the likeliest token; above, tokens are drawn.")
    ] = 0.0,
    top_p: Annotated[float, typer.Option("--top-p", metavar="X", help="Draw from the likeliest tokens that have this share together.")] = 1.0,
    repetition_penalty: Annotated[
        float, typer.Option("--repetition-penalty", metavar="X", help="Above 1, tokens that were used get less likely.")
    ] = 1.1,
    seed: Annotated[int | None, typer.Option("--seed", metavar="N", help="Seed of the draw.", show_default=False)] = None,
    dtype: DtypeOption = "bfloat16",
    quantization: QuantizationOption = None,
    quantized_memory: BlocksOption = False,
    ignore_quantization: IgnoreOption = False,
) -> None:
    """Talk to the base or to an adapter.

    In the conversation: /adapter NAME changes the adapter (/adapter base takes none), /reset forgets what was said, /exit or Ctrl-D leaves, and
    Ctrl-C stops the answer at hand. Without a terminal, each line of stdin is a turn.

    \b
    Examples:
      atoll chat
      atoll chat --adapter support_intents --temperature 0.7
      atoll chat --base HuggingFaceTB/SmolLM2-135M-Instruct --system "Answer in one sentence."
    """
    from atoll.cli.session import open_session
    from atoll.engine.request import SamplingParams

    sampling = SamplingParams(temperature=temperature, top_p=top_p, repetition_penalty=repetition_penalty, seed=seed)
    rounding = Rounding(quantization, quantized_memory, ignore_quantization)
    session = open_session([adapter] if adapter else [], base, dtype, rounding)
    if not session.base.tokenizer.chat_template:
        raise ConfigError(
            f"the base {session.base.name!r} has no chat template", hint="use an instruct base, or continue plain text: atoll generate --raw"
        )
    talk = Conversation(session, sampling, max_new_tokens, system)
    if adapter:
        talk.change_adapter(adapter)
    say(f"{session.base.name}{f' with {talk.adapter.version.ref}' if talk.adapter else ''};  {HELP}")
    for line in _lines():
        if not talk.take(line):
            break


class Conversation:
    """Turns so far, and the adapter that answers. `take` carries out one line."""

    def __init__(self, session: Session, sampling: SamplingParams, max_new_tokens: int, system: str | None = None) -> None:
        self._session, self._sampling, self._max_new_tokens = session, sampling, max_new_tokens
        self._system = [{"role": "system", "content": system}] if system else []
        self.turns: list[dict[str, str]] = list(self._system)
        self.adapter: OpenAdapter | None = None

    def take(self, line: str) -> bool:
        """Carry out a command or answer a turn; errors are printed. Returns whether the conversation goes on."""
        word, _, rest = line.strip().partition(" ")
        try:
            if word in ("/exit", "/quit"):
                return False
            if word == "/reset":
                self.turns = list(self._system)
                say("(what was said is forgotten)")
            elif word == "/adapter":
                self.change_adapter(rest.strip())
                say(f"(now {self.adapter.version.ref if self.adapter else self._session.base.name} answers)")
            elif word.startswith("/"):
                say(HELP)
            elif word:
                self._answer(line.strip())
        except AtollError as error:
            print_error(error)
        return True

    def change_adapter(self, ref: str) -> None:
        """Let an adapter answer, or for "", "base" and "none" the base itself."""
        if ref in ("", "base", "none"):
            self.adapter = None
            return
        self.adapter = self._session.open(ref)
        if self.adapter.prompt is not None and not self.adapter.prompt.chat:
            say(f"({self.adapter.version.ref} was trained on a template of its own, not on conversations: atoll generate asks it in that)")

    def _answer(self, text: str) -> None:
        """Stream the answer to a turn; both join the history, unless nothing was said."""
        turns = [*self.turns, {"role": "user", "content": text}]
        said = self._stream(turns)
        if said:
            self.turns = [*turns, {"role": "assistant", "content": said}]

    def _stream(self, turns: list[dict[str, str]]) -> str:
        from dataclasses import replace

        from atoll.data.prompt import encode_prompt
        from atoll.engine.request import Request

        prompt_ids = encode_prompt(turns, self._session.base.tokenizer, chat=True)
        engine = self._session.start(1, self._session.base.context_length)
        room = engine.limits.row_tokens - len(prompt_ids)
        if room < 1:
            raise RequestRefused("the conversation no longer fits the base's context", hint="/reset forgets what was said")
        sampling = replace(self._sampling, max_new_tokens=min(self._max_new_tokens, room))
        events = engine.stream(Request(prompt_ids, adapter=self.adapter.version.digest if self.adapter else None, sampling=sampling))
        said: list[str] = []
        with _ctrl_c_noted() as asked:
            for event in events:
                write(event.text, end="")
                said.append(event.text)
                if event.completion is not None and event.completion.finish_reason == "error":
                    raise EngineError(f"the engine could not answer: {event.completion.error}")
                if asked():
                    break
            stopped = asked() and event.completion is None
        del events  # closing the stream cancels what is left of it
        write("")
        if stopped:
            say("(stopped)")
        return "".join(said)


def _lines() -> Iterator[str]:
    """What the user types, line by line, until Ctrl-D; Ctrl-C drops the line."""
    asks = sys.stdin.isatty()
    if asks:
        import readline  # noqa: F401  (gives input() history and editing)
    while True:
        try:
            yield input("> " if asks else "")
        except EOFError:
            if asks:
                say()  # so that the shell's prompt begins a line
            return
        except KeyboardInterrupt:
            say("\n(Ctrl-D or /exit leaves)")


@contextmanager
def _ctrl_c_noted() -> Iterator[Callable[[], bool]]:
    """Ctrl-C becomes a question that is asked between tokens, so that it never breaks a step of the engine; a second one interrupts at once."""
    asked = threading.Event()

    def on_signal(number: int, frame: object) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return
    previous = signal.signal(signal.SIGINT, on_signal)
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGINT, previous)

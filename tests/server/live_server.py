"""A live server on a free port, with a tiny base and a hub of three adapters.

    plain        random tensors, no prompt format
    sentiment    a template of its own, ending at a line end, with the closed label set good, bad, mixed
    pair         a template of two columns

`fill_kinds` adds one of each other kind:

    edits        ReFT of the first two and the last two tokens, no prompt format
    judge        ReFT of the last six tokens, with sentiment's template and labels
    both         LoRA and ReFT in one

conftest.py makes fixtures of it.
"""

from __future__ import annotations

import asyncio
import io
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from adapters import publish, random_adapter, random_reft
from atoll.data.prompt import PromptFormat
from atoll.engine.config import EngineConfig
from atoll.engine.request import Completion, Request, SamplingParams
from atoll.hub import Hub
from atoll.model.adapter_files import write_adapter
from atoll.model.base import Base
from atoll.model.positions import Positions
from atoll.server.run import CLOSE_S
from atoll.serving.config import ServeConfig
from atoll.serving.service import Service

SENTIMENT = PromptFormat(template="Text: {text}\nLabel:", instruction="Good or bad?", target="label", stop=("\n",))
PAIR = PromptFormat(template="{first} or {second}?", target="answer")
LABELS = ("good", "bad", "mixed")
ENGINE = {"max_rows": 8, "max_row_tokens": 256, "max_step_tokens": 128}


@dataclass
class Live:
    """A running server, and its inside to compare with."""

    url: str
    service: Service
    loop: asyncio.AbstractEventLoop
    keys: dict[str, str] = field(default_factory=dict)  # API keys by their names, where a test made some

    @property
    def base(self) -> Base:
        return self.service.base

    def run(self, work: Any) -> Any:
        """work(engine) on the engine's thread."""
        return self.wait(self.service.run(work))

    def wait(self, coroutine: Any) -> Any:
        """A coroutine's result, on the server's event loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(60)

    def digest(self, name: str) -> str:
        """What the engine calls an adapter of the hub."""
        assert self.service.hub is not None
        return self.service.hub.resolve(name).digest

    def generate(self, prompt: list[int], adapter: str | None = None, **sampling: Any) -> Completion:
        """What the engine answers without HTTP; adapter: a name that has been served already."""
        request = Request(prompt, adapter=self.digest(adapter) if adapter else None, sampling=SamplingParams(**sampling))
        return self.run(lambda engine: engine.generate([request]))[0]

    def ids(self, text: str) -> list[int]:
        return list(self.base.tokenizer(text, add_special_tokens=False)["input_ids"])

    def post(self, path: str, body: Any = None, *, key: str = "", **options: Any) -> httpx.Response:
        """POST a JSON body. key: the name of one of `keys`."""
        return self._ask("POST", path, key, json=body, **options)

    def get(self, path: str, *, key: str = "", **options: Any) -> httpx.Response:
        return self._ask("GET", path, key, **options)

    def _ask(self, method: str, path: str, key: str, **options: Any) -> httpx.Response:
        if key:
            options["headers"] = {**options.get("headers", {}), "authorization": f"Bearer {self.keys[key]}"}
        return httpx.request(method, self.url + path, timeout=60, **options)


def fill_hub(root: Path, base: Base) -> Hub:
    """The hub of the module's header."""
    hub = Hub(root / "hub")
    record = {"name": base.name, **base.fingerprint.to_json()}
    forms: dict[str, dict[str, Any]] = {
        "plain": {"prompt": None},
        "sentiment": {"prompt": SENTIMENT.to_json(), "labels": list(LABELS)},
        "pair": {"prompt": PAIR.to_json()},
    }
    for number, (name, manifest) in enumerate(forms.items()):
        made = random_adapter(base.decoder, rank=4, seed=number + 1)
        folder = root / "folders" / name
        write_adapter(folder, replace(made, manifest={"format": 1, "kind": "lora", "base": record, **manifest}))
        hub.publish(folder, name)
    return hub


def fill_kinds(root: Path, base: Base) -> Hub:
    """The same, with the adapters that have edits."""
    hub = fill_hub(root, base)
    made = {
        "edits": random_reft(base.decoder, 31, positions=Positions.parse("f2+l2"), tied=False),
        "judge": random_reft(base.decoder, 32, positions=Positions.parse("l6")),
        "both": random_reft(base.decoder, 33, lora=4, method="direft", component="mlp_output", rank=3),
    }
    for name, adapter in made.items():
        words = {"prompt": SENTIMENT.to_json(), "labels": list(LABELS)} if name == "judge" else {"prompt": None}
        publish(hub, adapter, name, root / "folders", base=base.describe(), **words)
    return hub


@contextmanager
def serving(base: Base, hub: Hub | None, **settings: Any) -> Iterator[Live]:
    """A server on a free port, in a thread of its own; stopped at the end. settings: ServeConfig's."""
    from atoll.server.app import create_app

    config = ServeConfig(**{"base": str(base.path), "port": 0, "engine": EngineConfig(**ENGINE), "drain_s": 1.0, **settings})
    service = Service(base, config, hub)
    http = uvicorn.Config(create_app(service), host="127.0.0.1", port=0, log_level="warning", ws="none", timeout_graceful_shutdown=CLOSE_S)
    server = uvicorn.Server(http)
    loops: list[asyncio.AbstractEventLoop] = []

    def run() -> None:
        with asyncio.Runner() as runner:
            loops.append(runner.get_loop())
            runner.run(server.serve())

    thread = threading.Thread(target=run, name="server", daemon=True)  # else one that hangs keeps the whole test run from ending
    thread.start()
    while not server.started and thread.is_alive():
        thread.join(0.01)
    assert server.started, "the server did not start"
    try:
        yield Live(f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", service, loops[0])
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive(), f"the server did not stop\n{_what_runs(loops[0])}"


def _what_runs(loop: asyncio.AbstractEventLoop) -> str:
    """Where every task of a loop and every thread stands."""
    text = io.StringIO()
    for task in asyncio.all_tasks(loop):
        task.print_stack(file=text)
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    for ident, frame in sys._current_frames().items():
        print(f"Thread {names.get(ident, ident)}:", *traceback.format_stack(frame), sep="\n", file=text)
    return text.getvalue()

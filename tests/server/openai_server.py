"""The tests' live server with what OpenAI's routes need beside it: two more adapters, and OpenAI's own client.

    talk        trained on plain conversations
    org/mix     composed of plain and sentiment

The other adapters are live_server's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import openai
from tests.server.live_server import Live, fill_hub, serving

from adapters import random_adapter
from atoll.data.prompt import PromptFormat
from atoll.engine.request import EmbedRequest, ScoreRequest
from atoll.hub import Hub
from atoll.model.adapter_files import write_adapter
from atoll.model.base import Base
from atoll.serving.keys import add_key

TALK = PromptFormat(template="{prompt}", chat=True)


@dataclass
class OpenAILive(Live):
    """A running server, OpenAI's client of it, and the engine's own answers to compare with."""

    clients: dict[str, openai.OpenAI] = field(default_factory=dict)

    def client(self, key: str = "") -> openai.OpenAI:
        """OpenAI's own client, which never tries again. key: the name of one of `keys`, or a key."""
        if key not in self.clients:
            secret = self.keys.get(key, key) or "none"
            self.clients[key] = openai.OpenAI(base_url=self.url + "/v1", api_key=secret, max_retries=0, timeout=60)
        return self.clients[key]

    def score(self, prompt: list[int], continuation: list[int], adapter: str | None = None) -> float:
        """Engine.score of one continuation; adapter: a name that has been served already."""
        item = ScoreRequest(prompt, [continuation], self.digest(adapter) if adapter else None)
        return float(self.run(lambda engine: engine.score([item]))[0][0])

    def embed(self, ids: list[int], adapter: str | None, pooling: Any) -> list[float]:
        """Engine.embed of one text."""
        item = EmbedRequest(ids, self.digest(adapter) if adapter else None, pooling)
        return list(self.run(lambda engine: engine.embed([item]))[0])


def filled_hub(root: Path, base: Base) -> Hub:
    """live_server's hub and the two adapters of the module's header."""
    hub = fill_hub(root, base)
    record = {"name": base.name, **base.fingerprint.to_json()}
    parents = [{"digest": hub.resolve(name).digest, "name": name, "weight": 0.5} for name in ("plain", "sentiment")]
    talk = {"kind": "lora", "prompt": TALK.to_json()}
    mix = {"kind": "composed", "prompt": None, "parents": parents}
    for seed, (name, manifest) in enumerate({"talk": talk, "org/mix": mix}.items()):
        made = random_adapter(base.decoder, rank=4, seed=20 + seed)
        folder = root / "folders" / name.replace("/", "-")
        write_adapter(folder, replace(made, manifest={"format": 1, "base": record, **manifest}))
        hub.publish(folder, name)
    return hub


@contextmanager
def openai_serving(base: Base, root: Path, keys: dict[str, dict[str, Any]] | None = None, **settings: Any) -> Iterator[OpenAILive]:
    """A server over `filled_hub`. keys: the arguments of add_key by name; settings: ServeConfig's."""
    made = {name: add_key(root / "keys.json", name, **options) for name, options in (keys or {}).items()}
    if made:
        settings["keys_file"] = root / "keys.json"
    with ExitStack() as stack:
        running = stack.enter_context(serving(base, filled_hub(root, base), **settings))
        live = OpenAILive(running.url, running.service, running.loop, made)
        stack.callback(lambda: [client.close() for client in live.clients.values()])
        yield live

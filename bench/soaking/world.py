"""What the soaked server serves: a base, a hub of adapters of many ranks and targets, contents to republish, and adapters that are broken.

    a00 … a17        good, ranks 1 to 32, targets from two linears to all seven
    labels           good, with a prompt of its own and the closed label set yes, no, maybe
    moving           republished while it is asked for: another of CONTENTS each time
    huge             finite factors whose products are not: its requests fail, its neighbours' must not
    torn, headless, faded   damaged in the hub's own files after they were published: cut, overwritten, one bit
    local/…          below the server's local root: one good, the others broken in ways that people's folders are

Used by soak.py. Needs torch; nothing here talks to the server.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from soaking.tiny import TINY, write_tiny_base

if TYPE_CHECKING:
    from atoll.hub import Hub
    from atoll.model.adapter import Adapter
    from atoll.model.base import Base

NUM_GOOD = 18
CONTENTS = 4  # that `moving` can have
RANKS = (1, 4, 8, 16, 32)
TARGETS = (
    ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    ("q_proj", "v_proj"),
    ("gate_proj", "up_proj", "down_proj"),
    ("q_proj", "k_proj", "v_proj", "o_proj"),
)
LABELS = ("yes", "no", "maybe")
LABEL_TEMPLATE = "Is it so? {text}\nAnswer:"
PINNED = ("a00", "a01")  # the pinner's; small ones
SPREAD = {True: 0.05, False: 0.02}  # of B: for the tiny base, for a real one
BROKEN_LOCAL = ("nan", "shape", "garbage", "pickle", "empty", "link", "../outside", "nowhere")


@dataclass(frozen=True)
class World:
    """Everything on disk, and the base to compute references with. kernel: "plain" or the compiled forward's name, what the server will use."""

    base: Base
    base_ref: str
    dtype: str
    home: Path
    local: Path
    keys_file: Path
    keys: Mapping[str, str]
    hub: Hub
    good: tuple[str, ...]
    broken: tuple[str, ...]
    contents: tuple[Path, ...]  # folders that `moving` is published from
    largest_bytes: int  # of an adapter's numbers in the base's dtype


def make_world(base: str, folder: Path) -> World:
    """Write everything into the empty folder. base: "tiny", an alias or a folder."""
    from atoll.hub import Hub
    from atoll.model.base import load_base
    from atoll.serving.keys import add_key

    tiny = base == "tiny"
    ref = str(write_tiny_base(folder / TINY)) if tiny else base
    home, local, keys_file = folder / "home", folder / "local", folder / "keys.json"
    loaded, dtype = load_base(ref), "bfloat16"
    if not _is_compiled(loaded):  # plain torch in bfloat16 rounds by the shape of a batch: answers alone and in a crowd could differ
        loaded, dtype = load_base(ref, dtype="float32"), "float32"
    writer = Writer(loaded, SPREAD[tiny], folder / "folders")
    hub = Hub(home / "hub")
    good = tuple(f"a{number:02d}" for number in range(NUM_GOOD))
    for number, name in enumerate(good):
        hub.publish(writer.good(name, number), name)
    hub.publish(writer.good("labels", 50, prompt=_label_format(), labels=list(LABELS)), "labels")
    contents = tuple(writer.good(f"moving-{number}", 60 + number) for number in range(CONTENTS))
    hub.publish(contents[0], "moving")
    hub.publish(writer.scaled("huge", 90, 1e38), "huge")
    broken = _damage(hub, writer)
    _fill_local(local, writer, folder)
    keys = {
        "full": add_key(keys_file, "full", ["infer"]),
        "other": add_key(keys_file, "other", ["infer"]),
        "narrow": add_key(keys_file, "narrow", ["infer"], ["a00", "a1*"]),
        "admin": add_key(keys_file, "admin", ["infer", "publish", "admin"]),
    }
    largest = max(version.size_bytes for version in hub.list()) // (2 if dtype == "bfloat16" else 1)  # files are float32
    return World(loaded, ref, dtype, home, local, keys_file, keys, hub, good, broken, contents, largest)


def _is_compiled(base: Base) -> bool:
    from atoll.engine.runner import serving_decoder

    return getattr(serving_decoder(base, "auto"), "kernel", "plain") != "plain"


def _label_format() -> dict[str, Any]:
    from atoll.data.prompt import PromptFormat

    return PromptFormat(template=LABEL_TEMPLATE, target="answer", stop=("\n",)).to_json()


class Writer:
    """Writes adapters for one base as folders."""

    def __init__(self, base: Base, spread: float, root: Path) -> None:
        self._base, self._spread, self._root = base, spread, root

    def good(self, name: str, seed: int, **manifest: Any) -> Path:
        """A random adapter whose B is not zero; rank and targets follow from the seed."""
        return self._write(name, self._random(seed, self._spread), manifest)

    def scaled(self, name: str, seed: int, spread: float) -> Path:
        """One whose B has that spread."""
        return self._write(name, self._random(seed, spread), {})

    def _random(self, seed: int, spread: float) -> Adapter:
        import torch

        from atoll.model.adapter import Adapter, AdapterSpec, LoraModule, new_adapter

        shape, generator = self._base.decoder.shape, torch.Generator().manual_seed(1000 + seed)
        rank = RANKS[seed % len(RANKS)]
        spec = AdapterSpec(self._base.name, rank, 2.0 * rank, TARGETS[seed % len(TARGETS)])
        fresh = new_adapter(spec, shape.linears, shape.num_layers, generator)
        modules = {
            site: LoraModule(module.a, (spread * torch.randn(module.b.shape, generator=generator)).clamp(-3e38, 3e38), module.scaling)
            for site, module in fresh.modules.items()
        }
        return Adapter(spec, modules)

    def _write(self, name: str, adapter: Adapter, manifest: Mapping[str, Any]) -> Path:
        from atoll.model.adapter_files import write_adapter

        record = {"format": 1, "kind": "lora", "base": {"name": self._base.name, **self._base.fingerprint.to_json()}, "prompt": None}
        write_adapter(self._root / name, replace(adapter, manifest={**record, **manifest}))
        return self._root / name


def _damage(hub: Hub, writer: Writer) -> tuple[str, ...]:
    """Publish three adapters and then write over what the hub stored, as a failing disk would."""
    names = ("torn", "headless", "faded")
    for seed, name in enumerate(names):
        version = hub.publish(writer.good(name, 70 + seed), name)
        weights = version.path / "adapter_model.safetensors"
        whole = weights.read_bytes()
        weights.chmod(0o644)
        with weights.open("r+b") as file:  # in place: the blob is the same file
            if name == "torn":
                file.truncate(len(whole) // 2)
            elif name == "headless":
                file.write(b"\xff" * 64)
            else:  # one number is another one, and everything still has its form
                file.seek(len(whole) - 1000)
                file.write(bytes([whole[-1000] ^ 1]))
    return names


def _fill_local(local: Path, writer: Writer, folder: Path) -> None:
    """The local root: `fine`, and one folder for each of BROKEN_LOCAL that can exist."""
    shutil.copytree(writer.good("fine", 5), local / "fine")
    shutil.copytree(writer.scaled("nan", 80, float("nan")), local / "nan")
    shutil.copytree(writer.good("outside", 81), folder / "outside")
    (local / "link").symlink_to(folder / "outside", target_is_directory=True)
    for name, file, content in (
        ("garbage", "adapter_config.json", b'{"r": 8, "peft_type": "LORA",'),
        ("shape", "adapter_config.json", None),
        ("pickle", "adapter_model.bin", b"\x80\x04not a pickle"),
    ):
        shutil.copytree(writer.good(name, 82), local / name)
        if content is None:
            config = json.loads((local / name / file).read_text())
            (local / name / file).write_text(json.dumps({**config, "r": config["r"] + 1}))
        else:
            (local / name / file).write_bytes(content)
    (local / "pickle" / "adapter_model.safetensors").unlink()
    (local / "empty").mkdir()

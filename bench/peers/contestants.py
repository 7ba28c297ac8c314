"""Who takes part, how each is started, and which cells each measures.

A peer gets the best settings found for it: see vllm_environment for vLLM's. What is slow is measured less often: a peer's mixed batch takes a minute
where Atoll's takes two seconds.

Used by serve.py.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .workers import Contestant

NAMES = ("atoll", "atoll_http", "vllm", "vllm_lora", "transformers", "peft", "llama")

_HERE = Path(__file__).parent
_BASE_CELLS = ("base_32", "base_128", "single")
_MIXED = ("mixed1", "mixed8", "mixed32", "registered256")


@dataclass(frozen=True)
class Entry:
    """A contestant, the cells it measures, and in how many of the rounds (None: all)."""

    contestant: Contestant
    cells: tuple[str, ...]
    rounds: int | None = None


@dataclass(frozen=True)
class Setting:
    """What the command line gave."""

    base: Path
    adapters: Sequence[str]  # folders; peers get the first 32
    cold_adapter: str
    home: Path  # an empty ATOLL_HOME for the server
    threads: int
    full: bool
    vllm: Path | None
    vllm_mode: str
    peft: Path | None
    llama_server: Path | None
    gguf: Path | None


def make_entries(setting: Setting) -> dict[str, Entry]:
    """Everyone whose environment was given, by name, in the order of a round."""
    common = {"base": str(setting.base), "threads": setting.threads}
    loras = list(setting.adapters[:32])
    quiet = {"OMP_NUM_THREADS": str(setting.threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    fresh = {**quiet, "ATOLL_HOME": str(setting.home)}  # a server with a hub of its own: nobody's published or pinned adapters
    own = tuple(f"{kind}_{label}" for kind in ("base", *_MIXED) for label in ("32", "128"))
    entries = [
        _entry("atoll", sys.executable, "atoll_worker", {**common, "adapters": list(setting.adapters)}, quiet, ("single", "cold_load", *own)),
        _entry("atoll_http", sys.executable, "http_worker", {**common, "server": "atoll", "adapters": loras}, fresh, (*_BASE_CELLS, "mixed32_128")),
    ]
    if setting.vllm is not None:
        python, environment = setting.vllm / "bin" / "python", {**quiet, **vllm_environment(setting.vllm)}
        options = {**common, "eager": setting.vllm_mode == "eager", "adapters": loras}
        slow = ("mixed1_32", "mixed8_32", "mixed32_32", "mixed32_128") if setting.full else ("mixed32_32",)
        entries.append(_entry("vllm", python, "vllm_worker", {**options, "lora": False}, environment, _BASE_CELLS))
        entries.append(_entry("vllm_lora", python, "vllm_worker", {**options, "lora": True}, environment, slow, None if setting.full else 1))
    if setting.peft is not None:
        python = setting.peft / "bin" / "python"
        slow = ("mixed1_32", "mixed8_32", "mixed32_32") if setting.full else ("mixed32_32",)
        base_cells = _BASE_CELLS if setting.full else ("base_32", "single")
        entries.append(_entry("transformers", python, "peft_worker", {**common, "peft": False}, quiet, base_cells))
        entries.append(_entry("peft", python, "peft_worker", {**common, "peft": True, "adapters": loras}, quiet, slow, None if setting.full else 2))
    if setting.llama_server is not None:
        options = {**common, "server": "llama", "binary": str(setting.llama_server), "gguf": str(setting.gguf), "adapters": []}
        entries.append(_entry("llama", sys.executable, "http_worker", options, quiet, _BASE_CELLS))
    return {entry.contestant.name: entry for entry in entries}


def vllm_environment(venv: Path) -> dict[str, str]:
    """The fastest settings found for vLLM 0.32 on two cores, each against its alternative in interleaved runs of W without adapters.

    Everything in one process (3 to 6% over an engine process of its own); all cores for the engine (by default it leaves one to the front-end);
    Intel's OpenMP preloaded (15% over GNU's) and tcmalloc, where the environment or the system has them. And torch.compile, see --vllm-mode: 1.2 to
    1.4 times eager.
    """
    system = [Path(folder) / "libtcmalloc_minimal.so.4" for folder in ("/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64")]
    preload = [str(library) for library in (venv / "lib" / "libiomp5.so", *system) if library.exists()]
    return {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB: W needs 0.2
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        **({"LD_PRELOAD": ":".join(preload)} if preload else {}),
    }


def _entry(
    name: str,
    python: str | Path,
    program: str,
    options: dict[str, object],
    environment: dict[str, str],
    cells: tuple[str, ...],
    rounds: int | None = None,
) -> Entry:
    command = [str(python), str(_HERE / f"{program}.py")]
    return Entry(Contestant(name, command, options, environment), cells, rounds)

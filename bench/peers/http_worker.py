"""A live HTTP server and a lean client beside it, as a contestant: `atoll` (`atoll serve`) or `llama` (llama.cpp's llama-server).

Both are asked through /v1/completions, streaming, prompts as token ids. The server is a child in this worker's process group, so pausing and ending
the worker does the same to the server.
"""

from __future__ import annotations

import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from http_client import Answer, complete
from protocol import die_with_parent, run_worker, stream_times

_START_S = 600.0


class HttpContestant:
    """One server on a free port of this machine."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._name = options["server"]
        self._is_atoll = self._name == "atoll"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port: int = free.getsockname()[1]
        command = _atoll_command(options, self._port) if self._is_atoll else _llama_command(options, self._port)
        self._server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sys.stderr, preexec_fn=die_with_parent)
        self._wait_until_ready()

    def details(self) -> dict[str, Any]:
        return {"server": self._name, "port": self._port}

    def batch(self, prompts: list[list[int]], adapters: list[str | None], new_tokens: int) -> dict[str, Any]:
        started, answers = self._complete([self._body(prompt, adapter, new_tokens) for prompt, adapter in zip(prompts, adapters, strict=True)])
        return {
            "seconds": max(answer.moments[-1] for answer in answers) - started,
            "tokens": sum(answer.num_tokens for answer in answers),
            "texts": [answer.text for answer in answers],
            "ttft_ms": 1000 * (statistics.median(answer.moments[0] for answer in answers) - started),
        }

    def stream(self, prompt: list[int], new_tokens: int) -> dict[str, Any]:
        started, [answer] = self._complete([self._body(prompt, None, new_tokens)])
        return {**stream_times(started, answer.moments), "tokens": answer.num_tokens}

    def _complete(self, bodies: list[dict[str, Any]]) -> tuple[float, list[Answer]]:
        started, answers = complete(self._port, bodies)
        wrong = {answer.num_tokens for answer in answers} - {bodies[0]["max_tokens"]}
        if wrong:
            raise RuntimeError(f"answers of {sorted(wrong)} tokens where {bodies[0]['max_tokens']} were asked for")
        return started, answers

    def _body(self, prompt: list[int], adapter: str | None, new_tokens: int) -> dict[str, Any]:
        body = {
            "model": adapter or "",
            "prompt": prompt,
            "max_tokens": new_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if not self._is_atoll:
            return {**body, "cache_prompt": False}
        return body if adapter is None else {**body, "adapter_source": "local"}

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + _START_S
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self._port}/health", timeout=5) as answer:
                    if answer.status == 200:
                        return
            except (urllib.error.URLError, OSError):
                if self._server.poll() is not None or time.monotonic() > deadline:
                    raise
            time.sleep(0.2)


def _atoll_command(options: dict[str, Any], port: int) -> list[str]:
    """`atoll serve` with its default settings and one folder of adapters that requests may name."""
    start = "from atoll.cli.main import main; main()"
    root = ["--local-root", str(Path(options["adapters"][0]).parent)] if options["adapters"] else []
    return [sys.executable, "-c", start, "serve", options["base"], "--port", str(port), *root]


def _llama_command(options: dict[str, Any], port: int) -> list[str]:
    """32 rows of 512 tokens, prompts in batches as large as W's, threads as for everyone."""
    return [
        *(options["binary"], "-m", options["gguf"], "--host", "127.0.0.1", "--port", str(port), "--no-webui"),
        *("-t", str(options["threads"]), "-tb", str(options["threads"]), "-np", "32", "-c", str(32 * 512), "-b", "4096", "-ub", "512"),
    ]


if __name__ == "__main__":
    run_worker(HttpContestant)

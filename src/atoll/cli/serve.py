"""`atoll serve`: one base and every adapter of the hub, over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from atoll.cli.keys import default_file
from atoll.cli.options import DEFAULT_BASE, DtypeOption, SetOption, overrides
from atoll.cli.output import say, size
from atoll.cli.progress import progress_bar
from atoll.cli.rounding import BlocksOption, IgnoreOption, QuantizationOption, Rounding
from atoll.errors import ConfigError, Interrupted

if TYPE_CHECKING:
    from atoll.config_quantization import QuantizationConfig
    from atoll.hub.store import Hub
    from atoll.serving.config import ServeConfig
    from atoll.serving.service import Service


def serve(
    base: Annotated[
        str | None,
        typer.Argument(metavar="BASE", help="Base model: an alias, a folder, a .gguf file or a Hugging Face id.", show_default=False),
    ] = None,
    host: Annotated[
        str | None, typer.Option("--host", metavar="ADDRESS", help="Address to listen on (default 127.0.0.1).", show_default=False)
    ] = None,
    port: Annotated[int | None, typer.Option("--port", metavar="N", help="Port (default 3000; 0 takes a free one).", show_default=False)] = None,
    adapter: Annotated[
        list[str] | None, typer.Option("--adapter", "-a", metavar="REF", help="Load and pin this adapter before answering; repeatable.")
    ] = None,
    default_adapter: Annotated[
        str | None, typer.Option("--default-adapter", metavar="REF", help="Adapter of requests that name none.", show_default=False)
    ] = None,
    keys: Annotated[
        Path | None, typer.Option("--keys", metavar="FILE", help="Keys file (default: that of `atoll keys`, if it is there).", show_default=False)
    ] = None,
    local_root: Annotated[
        Path | None,
        typer.Option("--local-root", metavar="DIR", help="Folder whose adapters requests may name with source local.", show_default=False),
    ] = None,
    allow_hf: Annotated[bool, typer.Option("--allow-hf", help="Let requests name adapters of the Hugging Face hub.")] = False,
    s3_prefix: Annotated[
        list[str] | None, typer.Option("--s3-prefix", metavar="URL", help="Let requests name adapters below this s3:// URL; repeatable.")
    ] = None,
    deployment_name: Annotated[
        list[str] | None, typer.Option("--deployment-name", metavar="NAME", help="Another name of the base in Predibase's path; repeatable.")
    ] = None,
    max_rows: Annotated[
        int | None, typer.Option("--max-rows", metavar="N", help="Requests that are computed at once (default 64).", show_default=False)
    ] = None,
    max_row_tokens: Annotated[
        int | None, typer.Option("--max-row-tokens", metavar="N", help="Tokens of a prompt and its answer together.", show_default=False)
    ] = None,
    cors_origin: Annotated[
        list[str] | None, typer.Option("--cors-origin", metavar="URL", help="Let pages of this origin call the server; repeatable.")
    ] = None,
    dtype: DtypeOption = "bfloat16",
    quantization: QuantizationOption = None,
    quantized_memory: BlocksOption = False,
    ignore_quantization: IgnoreOption = False,
    settings: SetOption = None,
    access_log: Annotated[
        bool, typer.Option("--access-log", help="Log a line for each request: method, path and status, never what it says.")
    ] = False,
    json_log: Annotated[bool, typer.Option("--json-log", help="Log JSON lines.")] = False,
) -> None:
    """Serve a base and all adapters of the hub over HTTP.

    Speaks LoRAX's API and OpenAI's. Every adapter of the hub that fits the base can be asked for by name, also one that is published while the server
    runs. Without keys it answers this machine only. Ctrl-C lets running requests finish; a second one cuts them. --set sets any limit, such as
    max_concurrent_requests=64 or engine.kernel=plain.

    \b
    Examples:
      atoll serve
      atoll serve smollm2-135m-instruct --adapter support_intents --adapter dates@1
      atoll serve --host 0.0.0.0 --port 8080 --keys keys.json
      atoll serve --quantization nf4 --adapter my-qlora
      atoll serve --local-root ./adapters --set request_timeout_s=60 --json-log
    """
    from atoll.cli.logs import logging_to_stderr
    from atoll.server.run import bind
    from atoll.serving.keys import Keys

    hub = _open_hub()
    given = {
        "host": host,
        "port": port,
        "preload": tuple(adapter) if adapter else None,
        "default_adapter": default_adapter,
        "keys_file": keys or (default_file() if default_file().exists() else None),
        "local_root": local_root,
        "allow_hf": allow_hf or None,
        "s3_prefixes": tuple(s3_prefix) if s3_prefix else None,
        "deployment_names": tuple(deployment_name) if deployment_name else None,
        "engine__max_rows": max_rows,
        "engine__max_row_tokens": max_row_tokens,
        "ignore_quantization": ignore_quantization or None,
        "cors_origins": tuple(cors_origin) if cors_origin else None,
    }
    config = _config({"base": base or _recorded_base(hub, adapter), **overrides(settings, **given)})
    Keys(config.keys_file)  # what is wrong with it should be said before anything is loaded; so with the adapters' names
    for name in config.preload:
        hub.resolve(name)
    rounded = Rounding(quantization, quantized_memory).of(hub, config.preload)
    listener = bind(config.host, config.port)
    with listener, logging_to_stderr(as_json=json_log, access=access_log):
        _run(_load(config, hub, dtype, rounded), listener, access_log)


def _config(values: dict[str, Any]) -> ServeConfig:
    """The settings by dotted key as a ServeConfig. Raises ConfigError."""
    from atoll.serving.config import ServeConfig

    whole: dict[str, Any] = {}
    for key, value in values.items():
        section, dot, name = key.partition(".")
        if not dot:
            whole[key] = value
        elif section in ("engine", "compose") and "." not in name:
            whole.setdefault(section, {})[name] = value
        else:
            raise ConfigError(f"--set {key}: a server has no section {section!r}", hint="for example --set engine.max_rows=32 or --set drain_s=5")
    return ServeConfig(**whole)


def _load(config: ServeConfig, hub: Hub, dtype: str, rounded: QuantizationConfig | None) -> Service:
    from atoll.model.base import load_base
    from atoll.serving.service import Service

    with progress_bar() as progress:
        loaded = load_base(config.base, dtype=dtype, quantization=rounded, progress=progress)
    return Service(loaded, config, hub)


def _run(service: Service, listener: Any, access_log: bool) -> None:
    from atoll.server.run import run

    say("starting the engine" + (f" and loading {', '.join(service.config.preload)}" if service.config.preload else ""))
    if not run(service, listener, access_log=access_log, started=lambda url: _greet(service, url), stopping=say):
        raise Interrupted("stopped; requests that were running have been cut")
    say("stopped")


def _greet(service: Service, url: str) -> None:
    """Where the server is, and the first thing to try."""
    config, stats = service.config, service.stats()["engine"]
    adapter = next(iter(config.preload), None)
    key = "" if config.keys_file is None else " -H 'authorization: Bearer KEY'"
    access = f"keys of {config.keys_file}" if config.keys_file is not None else "without keys, this machine only"
    held = f", linears held as blocks in {size(service.base.decoder.linear_bytes)}" if service.base.decoder.holds_blocks else ""
    say(f"serving {service.base.title}{held} at {url} ({access}; {service.kernel} kernel, {config.engine.max_rows} rows)")
    if stats.get("adapters_registered"):
        say(f"  {stats['adapters_registered']} adapter(s) loaded, {size(stats['adapter_bytes'])}; others are loaded when a request names them")
    if service.base.decoder.classifies:
        route, text, parameters = "classify", "the parcel never came", f'"adapter_id": "{adapter or "NAME"}"'
    else:
        route, text, parameters = "generate", "Once upon a time", '"max_new_tokens": 40' + (f', "adapter_id": "{adapter}"' if adapter else "")
    body = f'{{"inputs": "{text}", "parameters": {{{parameters}}}}}'
    say(f"  try: curl {url}/{route}{key} -H 'content-type: application/json' -d '{body}'")
    say(f"  OpenAI clients: {url}/v1   routes: {url}/docs   adapters: {url}/adapters   stop: Ctrl-C")


def _recorded_base(hub: Hub, adapters: list[str] | None) -> str:
    """The base that the first adapter was trained on; the embedded one where none is named."""
    if not adapters:
        return DEFAULT_BASE
    version = hub.resolve(adapters[0])
    if version.base is None:
        raise ConfigError(f"{version.ref} does not say what base it was trained on", hint="name it: atoll serve BASE --adapter ...")
    return version.base


def _open_hub() -> Hub:
    from atoll.hub import Hub

    return Hub()

"""A base model in memory: `load_base(name)` gives the shared decoder, its tokenizer and its identity.

The one idea: a base is loaded once and shared by everything (training, serving, evaluation), so what those need to agree on is found here once: which
ids end a text, how long a context may be, and which fingerprint adapters are bound to.

Used by train, engine, eval and workflows. Where the files come from is model.pull; what they hash to is model.fingerprint.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atoll.errors import BaseFormatError, ConfigError
from atoll.model.families import ENCODERS, GENERIC, SEQ2SEQ
from atoll.model.fingerprint import BaseFingerprint, describe_base, load_config, read_json, stored_tensors, tensor_shapes
from atoll.model.memory import bound_prepared_products
from atoll.model.pull import EMBEDDED, Progress, pull

if TYPE_CHECKING:
    import torch

    from atoll.config_quantization import QuantizationConfig
    from atoll.model.decoder import Decoder
    from atoll.model.sharded import Share

__all__ = ["EMBEDDED", "Base", "BaseFingerprint", "describe_base", "load_base", "pull", "read_tensors", "tensor_shapes"]


@dataclass
class Base:
    """One loaded base.

    `name` as the user gave it (an alias or hub id in its own spelling), `path` its folder, `config` the transformers config, `dtype` that of the
    decoder's weights, `eos_ids` every id that ends a text (first the tokenizer's own, which training writes), `context_length` in tokens.
    """

    name: str
    path: Path
    fingerprint: BaseFingerprint
    config: Any
    tokenizer: Any
    decoder: Decoder
    dtype: torch.dtype
    eos_ids: tuple[int, ...]
    context_length: int

    @property
    def title(self) -> str:
        """The name, and how the base was rounded where it was: what is shown to people beside scores."""
        return f"{self.name} ({self.fingerprint.quantization})" if self.fingerprint.quantization else self.name

    def describe(self) -> dict[str, str]:
        """Name and hashes: the "base" entry of an adapter's manifest."""
        return {"name": self.name, **self.fingerprint.to_json()}


def load_base(
    name: str,
    *,
    dtype: str = "bfloat16",
    device: str = "cpu",
    quantization: QuantizationConfig | None = None,
    share: Share | None = None,
    home: Path | None = None,
    progress: Progress | None = None,
) -> Base:
    """Load the base `name` (alias, folder, .gguf file or hub id; see model.pull), fetching it first when it is not on this disk.

    dtype is "bfloat16" or "float32"; stored weights are cast to it, and then rounded as `quantization` says, which becomes part of the fingerprint.
    share: hold only this process's part of the blocks (model.sharded), which the native forward's families alone can.
    No code from the base's folder is run.
    Raises BaseNotFound, BaseFormatError, StorageError, and ConfigError for a dtype, device or package that is not there.
    """
    from atoll.model.quant import require_bitsandbytes

    if quantization is not None:
        require_bitsandbytes()
    torch_dtype, torch_device = checked_dtype(dtype), checked_device(device)
    path = pull(name, home=home, progress=progress)
    if progress is not None:
        progress(f"loading {name}", 0, 1)
    config = load_config(path)
    tokenizer = load_tokenizer(path)
    if config.model_type in (*ENCODERS, *SEQ2SEQ):
        tokenizer.reads_whole_texts = True
    if len(tokenizer) > config.vocab_size:
        raise BaseFormatError(
            f"{path}: the tokenizer has {len(tokenizer)} tokens, but the embedding holds {config.vocab_size}",
            hint="use the tokenizer this base was saved with",
        )
    base = Base(
        name=EMBEDDED[name.lower()].name if name.lower() in EMBEDDED else name,
        path=path,
        fingerprint=replace(describe_base(path, home=home), quantization=quantization.name if quantization is not None else ""),
        config=config,
        tokenizer=tokenizer,
        decoder=load_decoder(path, config, torch_dtype, torch_device, quantization, share),
        dtype=torch_dtype,
        eos_ids=find_eos_ids(path, config, tokenizer),
        context_length=context_length(config),
    )
    if progress is not None:
        progress(f"loading {name}", 1, 1)
    return base


def load_decoder(
    path: Path, config: Any, dtype: torch.dtype, device: torch.device, quantization: QuantizationConfig | None = None, share: Share | None = None
) -> Decoder:
    """The native forward where it computes this family, else transformers' blocks under the same contract."""
    bound_prepared_products()
    if config.model_type in GENERIC:
        from atoll.model.generic_decoder import load_generic_decoder

        if share is not None:
            raise ConfigError(
                f"trainer.fsdp shares out the blocks of Llama's family, but the base is a {config.model_type!r} model",
                hint="leave it out: then each process holds the whole base",
            )
        return load_generic_decoder(path, dtype, device, quantization)
    from atoll.model.decoder import Decoder

    if share is not None and quantization is not None and quantization.holds_blocks:
        raise ConfigError(
            f"trainer.fsdp shares out weights that lie in memory as bf16, but quantization.resident is {quantization.resident}",
            hint="leave one of them out",
        )
    tensors = read_tensors(path, dtype if share is None else None)  # a share is converted weight by weight: the whole may not fit
    return Decoder.from_state_dict(config, tensors, dtype, device, quantization, share)


def context_length(config: Any) -> int:
    """The longest row that a base takes, in tokens."""
    if config.model_type in GENERIC:
        from atoll.model.generic_decoder import context_of

        return context_of(config)
    return int(config.max_position_embeddings)


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of a base folder, by transformers, without running code from the folder."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # the Rust reader raises plain Exception for a damaged tokenizer.json
        raise BaseFormatError(
            f"{path}: the tokenizer cannot be loaded: {error}", hint="restore tokenizer.json from where the base came from"
        ) from error


def read_tensors(path: Path, dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    """Every tensor of the base at `path`, cast to `dtype` (None: as it is stored).

    Those already of that dtype stay mapped from the file and take no memory of their own.
    """
    from safetensors import safe_open

    tensors: dict[str, torch.Tensor] = {}
    stored = stored_tensors(path)
    for file in sorted({tensor.file for tensor in stored.values()}):
        with safe_open(file, framework="pt") as reader:
            for name in (name for name, tensor in stored.items() if tensor.file == file):
                if stored[name].dtype not in ("F64", "F32", "F16", "BF16"):
                    raise BaseFormatError(
                        f"{file}: tensor {name!r} is stored as {stored[name].dtype}, expected plain floats", hint="use the unquantised version"
                    )
                tensors[name] = reader.get_tensor(name) if dtype is None else reader.get_tensor(name).to(dtype)
    return tensors


def find_eos_ids(path: Path, config: Any, tokenizer: Any) -> tuple[int, ...]:
    """Ids that end a text: the tokenizer's own first, then those of generation_config.json, or of the config where that file names none."""
    generation: Any = None
    if (path / "generation_config.json").is_file():
        generation = read_json(path / "generation_config.json").get("eos_token_id")
    if generation is None:
        generation = getattr(config, "eos_token_id", None)
    listed = generation if isinstance(generation, list) else [generation]
    own = tokenizer.eos_token_id
    if own is None and config.model_type in ENCODERS:
        own = tokenizer.sep_token_id  # what ends a text for an encoder
    ids = tuple(dict.fromkeys(token for token in (own, *listed) if token is not None))
    if not ids:
        raise BaseFormatError(f"{path} names no end-of-text token, so no answer would ever end", hint='set "eos_token" in tokenizer_config.json')
    return ids


def checked_dtype(name: str) -> torch.dtype:
    """The dtype of that name. Raises ConfigError for one that no base is loaded in."""
    import torch

    dtypes = {"bfloat16": torch.bfloat16, "float32": torch.float32}
    if name not in dtypes:
        raise ConfigError(f"dtype {name!r} is not one of {', '.join(dtypes)}", hint="bfloat16 is half the memory; float32 is exact on a CPU")
    return dtypes[name]


def checked_device(name: str) -> torch.device:
    """The device of that name. Raises ConfigError for one that is not there."""
    import torch

    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts when it was built without CUDA
        raise ConfigError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}", hint="device cpu works everywhere") from error
    return device

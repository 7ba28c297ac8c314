"""What a base is, as four hashes: config, weights, tokenizer, chat template.

The one idea: identity is content. Two folders with equal fingerprints compute the same function of the same text, wherever they lie and whatever they
are called, and an adapter is bound to those hashes, never to a name. Each hash is taken over a canonical form, so that a copy or a re-save that keeps
the values keeps the hash, and one changed weight, merge or template character changes it.

Hashing weights reads every byte once, so results are kept in ATOLL_HOME, keyed by path, inode, size and times of the files; nothing is ever written
into the base's own folder. Used by model.base (load_base), and by the hub to give its verdicts.
"""

from __future__ import annotations

import hashlib
import json
import logging
import mmap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from atoll.errors import BaseFormatError, StorageError
from atoll.files import write_file
from atoll.model.families import GENERIC, as_in_model

# Bytes an element of the dtypes that a safetensors header may name.
ITEM_BYTES = {
    **{"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "BOOL": 1},
    **{"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1},
}

# The config's values that decide what the forward pass computes. Names, paths, versions, storage dtype, dropout and token ids are not among them.
ARCHITECTURE_KEYS = (
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "hidden_act", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings", "attention_bias", "mlp_bias", "sliding_window", "rope_parameters",
)  # fmt: skip

_NAMES = {"_name_or_path", "architectures", "transformers_version", "dtype", "torch_dtype", "use_cache", "task_specific_params"}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")
DESCRIBED_FILES = ("config.json", *TOKENIZER_FILES, "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "chat_template.json")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BaseFingerprint:
    """The identity of a base: four sha256 digests in hex, and how its weights were rounded when it was loaded.

    `config_hash` the architecture, `weights` every tensor as stored, `tokenizer_hash` text to ids, `chat_template_hash` messages to text,
    `quantization` a name of config_quantization, empty for the weights as they are.
    """

    config_hash: str
    weights: str
    tokenizer_hash: str
    chat_template_hash: str
    quantization: str = ""

    @property
    def digest(self) -> str:
        """One sha256 over all of it, in the order of the fields: the key for caches and the leaderboard."""
        rounded = (self.quantization,) if self.quantization else ()
        return _sha256("\n".join((self.config_hash, self.weights, self.tokenizer_hash, self.chat_template_hash, *rounded)).encode())

    def to_json(self) -> dict[str, str]:
        """The four hashes by name, as a manifest keeps them, and "quantization" where the base was rounded."""
        return {
            "config_hash": self.config_hash,
            "weights_fingerprint": self.weights,
            "tokenizer_hash": self.tokenizer_hash,
            "chat_template_hash": self.chat_template_hash,
            **({"quantization": self.quantization} if self.quantization else {}),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> BaseFingerprint:
        """The inverse of `to_json`; further keys are ignored, a missing or malformed hash is a BaseFormatError."""
        names = {
            "config_hash": "config_hash",
            "weights": "weights_fingerprint",
            "tokenizer_hash": "tokenizer_hash",
            "chat_template_hash": "chat_template_hash",
        }
        for key in names.values():
            value = data.get(key)
            if not (isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")):
                raise BaseFormatError(
                    f"a base fingerprint needs {key!r} as 64 hex digits, found {value!r}", hint="train or publish the adapter again"
                )
        return cls(**{field: data[key] for field, key in names.items()}, quantization=str(data.get("quantization") or ""))


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies in a safetensors file: dtype as the header names it, shape, and the byte range [start, end) in `file`."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def describe_base(path: Path, *, home: Path | None = None) -> BaseFingerprint:
    """The fingerprint of the base folder at `path`; taken from the cache in `home` (default ATOLL_HOME) when no file has changed since."""
    path = Path(path)
    files = [*weight_files(path), *(path / name for name in DESCRIBED_FILES if (path / name).is_file())]

    def compute() -> dict[str, Any]:
        fingerprint = BaseFingerprint(config_hash(load_config(path)), weights_hash(path), tokenizer_hash(path), chat_template_hash(path))
        return fingerprint.to_json()

    return BaseFingerprint.from_json(cached_by_files("fingerprint", path, files, compute, home=home))


def load_config(path: Path) -> Any:
    """The transformers config in `path`, never running code from the folder."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except (ValueError, OSError, TypeError, KeyError) as error:
        raise BaseFormatError(
            f"{path / 'config.json'} is not a config that transformers reads: {error}", hint="restore the file from where the base came from"
        ) from error


def config_hash(config: Any) -> str:
    """sha256 over canonical JSON of ARCHITECTURE_KEYS of a transformers config.

    Values are taken after transformers filled its defaults, so files of different ages (`rope_theta` beside or inside `rope_parameters`) agree.
    None is left out, and 10000 equals 10000.0.
    """
    if config.model_type in GENERIC:
        return _sha256(json.dumps(_canonical(_all_but_names(config)), sort_keys=True, separators=(",", ":")).encode())
    values = {key: getattr(config, key, None) for key in ARCHITECTURE_KEYS}
    if values["head_dim"] is None:
        values["head_dim"] = config.hidden_size // config.num_attention_heads
    layer_types = getattr(config, "layer_types", None)
    if layer_types and set(layer_types) != {"full_attention"}:
        values["layer_types"] = list(layer_types)
    return _sha256(json.dumps(_canonical(values), sort_keys=True, separators=(",", ":")).encode())


def _all_but_names(config: Any) -> dict[str, Any]:
    """Every value of a config of another family than Llama's that the family itself has: which of them decide the forward is transformers' business.

    Left out is what every config has (it comes and goes with transformers' versions) but for what a forward reads, and ids of tokens but for those
    that one reads: where a decoder starts, and RoBERTa's padding, from which its positions count.
    """
    from transformers import PreTrainedConfig

    common = set(PreTrainedConfig().to_dict())
    values = {key: value for key, value in config.to_dict().items() if not (key in _NAMES or key in common or key.endswith("_token_id"))}
    read = [
        "model_type",
        *(["decoder_start_token_id"] if config.is_encoder_decoder else []),
        *(["pad_token_id"] if config.model_type == "roberta" else []),
    ]
    return values | {key: getattr(config, key, None) for key in read}


def weights_hash(path: Path) -> str:
    """sha256 over one line a tensor, sorted by name: name, dtype, shape, sha256 of the bytes. Sharding and order in the file do not matter.

    A head that repeats the embedding byte for byte is left out: some folders store a tied head, others do not.
    """
    digests = tensor_digests(path)
    lines = {name: f"{json.dumps(name)} {dtype} {list(shape)} {digest}\n" for name, (dtype, shape, digest) in digests.items()}
    if "lm_head.weight" in digests and digests["lm_head.weight"] == digests.get("model.embed_tokens.weight"):
        del lines["lm_head.weight"]
    return _sha256("".join(lines[name] for name in sorted(lines)).encode())


def tensor_digests(path: Path) -> dict[str, tuple[str, tuple[int, ...], str]]:
    """name -> (dtype, shape, sha256 of the bytes) of every tensor in the base; reads all bytes once."""
    tensors = stored_tensors(path)
    digests = {}
    for file in sorted({tensor.file for tensor in tensors.values()}):
        with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as view:
            for name, tensor in tensors.items():
                if tensor.file == file:
                    digests[name] = (tensor.dtype, tensor.shape, hashlib.sha256(view[tensor.start : tensor.end]).hexdigest())
    return digests


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """name -> shape of every tensor of the base at `path` (a folder, or one safetensors file), read from the headers only.

    Names are those in the language model, linears are [d_out, d_in], however another family than Llama's stores them.
    """
    shapes = {name: tensor.shape for name, tensor in stored_tensors(path).items()}
    model_type = read_json(path / "config.json").get("model_type") if (path / "config.json").is_file() else None
    return as_in_model(shapes, str(model_type))


def tokenizer_hash(path: Path) -> str:
    """sha256 over how text becomes ids: tokenizer.json in canonical form, and the special tokens of tokenizer_config.json.

    Padding and truncation are settings of a call, not of the vocabulary, and are left out; merges are compared as pairs however they are spelled.
    A folder without tokenizer.json is hashed by the bytes of its vocabulary files.
    """
    if not (path / "tokenizer.json").is_file():
        raw = {name: _sha256((path / name).read_bytes()) for name in TOKENIZER_FILES if (path / name).is_file()}
        if not raw:
            raise BaseFormatError(
                f"{path} holds no tokenizer: expected one of {', '.join(TOKENIZER_FILES)}", hint="copy the tokenizer's files beside config.json"
            )
        return _sha256(_canonical_json({"files": raw, "special": _special_tokens(path)}))
    content = {key: value for key, value in read_json(path / "tokenizer.json").items() if key not in ("version", "truncation", "padding")}
    post = content.get("post_processor")
    if isinstance(post, dict) and post.get("type") == "TemplateProcessing" and not post.get("special_tokens"):
        content["post_processor"] = None  # a template that adds no token: written by some savers where others write null
    model = content.get("model")
    if isinstance(model, dict) and isinstance(model.get("merges"), list):
        merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
        content["model"] = {**model, "merges": merges}
    return _sha256(_canonical_json({"tokenizer": content, "special": _special_tokens(path)}))


def chat_template_hash(path: Path) -> str:
    """sha256 over the chat template's text, wherever the folder keeps it; of the empty string when there is none."""
    template: Any = ""
    if (path / "chat_template.jinja").is_file():
        template = (path / "chat_template.jinja").read_text(encoding="utf-8")
    elif (path / "chat_template.json").is_file():
        template = read_json(path / "chat_template.json").get("chat_template") or ""
    elif (path / "tokenizer_config.json").is_file():
        template = read_json(path / "tokenizer_config.json").get("chat_template") or ""
    return _sha256(template.encode() if isinstance(template, str) else _canonical_json(template))  # a list holds several named templates


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of a base folder (or of one safetensors file) with its place; checks the headers, reads no weights."""
    files = [path] if path.is_file() else weight_files(path)
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for name, tensor in _read_header(file).items():
            if name in tensors:
                raise BaseFormatError(f"tensor {name!r} is in both {tensors[name].file} and {file}", hint="keep one of the two files")
            tensors[name] = tensor
    # rotary frequencies follow from the config; old savers stored them too, and nobody reads them
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(".rotary_emb.inv_freq")}


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a base folder: those its index names, else model.safetensors, else all there are."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(name, str) for name in weight_map.values()):
            raise BaseFormatError(f"{index} has no weight_map from tensor to file", hint="restore the file from where the base came from")
        names = sorted(set(weight_map.values()))
        for name in names:
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise BaseFormatError(
                    f"{index} names {name!r}; expected a safetensors file of the same folder", hint="restore the file from its origin"
                )
            if not (path / name).is_file():
                raise BaseFormatError(f"{index} names {name}, which is not in the folder", hint="fetch the missing file again")
        return [path / name for name in names]
    if (path / "model.safetensors").is_file():
        return [path / "model.safetensors"]
    return sorted(path.glob("*.safetensors"))


def cached_by_files(kind: str, path: Path, files: list[Path], compute: Callable[[], dict[str, Any]], *, home: Path | None = None) -> dict[str, Any]:
    """`compute()`, or what it gave last time if the files are the same by name, inode, size, mtime and ctime.

    ctime cannot be set back by a program, so a file that was replaced under its old mtime is noticed too.
    """
    from atoll.config import atoll_home

    key = [[str(file), *_identity(file)] for file in files]
    entry = (home or atoll_home()) / "bases" / ".cache" / f"{kind}-{_sha256(str(path.resolve()).encode())[:32]}.json"
    try:
        saved = json.loads(entry.read_text())
        if saved["files"] == key:
            return dict(saved["value"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.debug("no usable cache entry %s: %s", entry, error)
    value = compute()
    try:
        write_file(entry, json.dumps({"files": key, "value": value}))
    except StorageError as error:  # the answer is right all the same; the next call computes it again
        log.warning("could not keep %s of %s in %s: %s", kind, path, entry, error)
    return value


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file of a base, or BaseFormatError naming the file."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BaseFormatError(f"{file} cannot be read as JSON: {error}", hint="restore the file from where the base came from") from error
    if not isinstance(data, dict):
        raise BaseFormatError(f"{file} holds a JSON {type(data).__name__}, expected an object", hint="restore the file from where the base came from")
    return data


def _read_header(file: Path) -> dict[str, StoredTensor]:
    """Parse and check a safetensors header: 8 bytes of length, JSON, then tensors that fill the rest of the file exactly."""
    size = file.stat().st_size
    damaged = BaseFormatError(f"{file} ({size} bytes) is not a whole safetensors file", hint="fetch or copy the file again")
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise damaged
        try:
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            tensors = {
                name: StoredTensor(
                    file, entry["dtype"], tuple(map(int, entry["shape"])), *(8 + length + int(offset) for offset in entry["data_offsets"])
                )
                for name, entry in header.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise damaged from error
    end = 8 + length
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].start):
        num_bytes = prod(tensor.shape) * ITEM_BYTES.get(tensor.dtype, 0)
        if tensor.dtype not in ITEM_BYTES or tensor.start != end or tensor.end - tensor.start != num_bytes:
            raise BaseFormatError(
                f"{file}: tensor {name!r} ({tensor.dtype}, {list(tensor.shape)}) does not match its bytes", hint="fetch or copy the file again"
            )
        end = tensor.end
    if end != size:
        raise damaged
    return tensors


def _special_tokens(path: Path) -> dict[str, Any]:
    """The special tokens that a folder names, as text; flags count only where they are on, since savers differ in writing the default."""
    named: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):  # the second wins, as in transformers
        if (path / name).is_file():
            named.update(read_json(path / name))
    tokens = {key: named.get(key) for key in ("bos_token", "eos_token", "pad_token", "unk_token")}
    texts = {key: token.get("content") if isinstance(token, dict) else token for key, token in tokens.items()}
    flags = {key: True for key in ("add_bos_token", "add_eos_token") if named.get(key) is True}
    return {**{key: text for key, text in texts.items() if text is not None}, **flags}


def _canonical(value: Any) -> Any:
    """Drop None inside dicts, and write a whole float as an int, so that equal values have equal JSON."""
    if isinstance(value, dict):
        return {key: _canonical(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_canonical(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _canonical_json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def _identity(file: Path) -> list[int]:
    stat = file.stat()
    return [stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()

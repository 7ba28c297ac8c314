"""Requests that must be refused, each with one clear sentence and never a 500.

Used by users.py.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class BadRequest:
    """body: bytes as they are, or what JSON is made of. content_type "" sends the usual one."""

    path: str
    body: Any
    method: str = "POST"
    content_type: str = ""

    def content(self) -> bytes:
        return self.body if isinstance(self.body, bytes) else json.dumps(self.body).encode()


def _native(**parameters: Any) -> BadRequest:
    return BadRequest("/generate", {"inputs": "a", "parameters": parameters})


def _stream(**parameters: Any) -> BadRequest:
    return BadRequest("/generate_stream", {"inputs": "a", "parameters": parameters})


def _completion(**fields: Any) -> BadRequest:
    return BadRequest("/v1/completions", {"prompt": "a", **fields})


def _chat(**fields: Any) -> BadRequest:
    return BadRequest("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], **fields})


def _schema(schema: Any) -> BadRequest:
    return _native(response_format={"type": "json_object", "schema": schema})


BAD_REQUESTS: tuple[BadRequest, ...] = (
    *(BadRequest(path, body) for path in ("/generate", "/", "/v1/completions", "/v1/chat/completions", "/embed", "/tokenize")
      for body in (b"", b"{", b"null", b"[]", b'"a"', b"\xff\xfe{", b"[" * 5000, b'{"inputs": "\\ud800"}', {}, {"inputs": 1}, {"inputs": None})),
    BadRequest("/generate", b'{"inputs": "a"}', content_type="text/plain"),
    BadRequest("/generate", {"inputs": ""}),
    BadRequest("/generate", {"inputs": "a" * 20_000}),
    BadRequest("/generate", {"inputs": "a" * 5_000_000}),
    BadRequest("/generate", b"", method="GET"),
    BadRequest("/nowhere", {}),
    BadRequest("/x/deployments/v2/llms/another/generate", {"inputs": "a"}),
    _native(max_new_tokens=0),
    _native(max_new_tokens=10**12),
    _native(max_new_tokens="4"),
    _native(temperature=-1),
    _native(temperature="warm"),
    _native(top_p=0),
    _native(top_p=1.5),
    _native(top_k=-3),
    _native(typical_p=1.0),
    _native(repetition_penalty=0),
    _native(seed=-1),
    _native(seed=1 << 64),
    _native(best_of=99, do_sample=True),
    _native(best_of=2),
    _native(stop=["x"] * 1000),
    _native(stop=[""]),
    _native(stop="x"),
    _native(truncate=0),
    _native(watermark=True),
    _native(return_k_alternatives=10**6),
    _native(adapter_id="a00", merged_adapters={"ids": ["a00"], "weights": [1]}),
    _native(merged_adapters={"ids": ["a00", "a01"], "weights": [1]}),
    _native(merged_adapters={"ids": ["a00"] * 50, "weights": [1] * 50}),
    _native(merged_adapters={"ids": ["a00", "a01"], "weights": [1, 1], "merge_strategy": "blend"}),
    _native(merged_adapters={"ids": ["a00", "a01"], "weights": [1, 1], "merge_strategy": "ties"}),
    _native(merged_adapters={"ids": ["a00", "a01"], "weights": [1e9, 1]}),
    _native(merged_adapters={"ids": ["a00", "a01"], "weights": [1, 1], "merge_strategy": "product"}),  # of unequal ranks
    _native(merged_adapters={"ids": ["a00", "never-was"], "weights": [1, 1]}),
    _native(adapter_id="a00", adapter_source="ftp"),
    _native(adapter_id="a00", adapter_source="s3"),
    _native(adapter_id="../../etc/passwd", adapter_source="local"),
    _native(adapter_id="/etc", adapter_source="local"),
    _native(adapter_id="a00\r\nx-evil: 1"),
    _native(adapter_id="a" * 100_000),
    _native(adapter_id="a00@999"),
    _native(fields={"a": 1}),
    _schema({"type": "nothing"}),
    _schema({"$ref": "#/definitions/gone"}),
    _schema({"pattern": "(", "type": "string"}),
    _stream(best_of=2, do_sample=True),
    _stream(decoder_input_details=True),
    _stream(adapter_id="never-was"),
    _completion(model="never-was"),
    _completion(n=100),
    _completion(logprobs=50),
    _completion(max_tokens=-1),
    _completion(temperature=1e9),
    _completion(suffix="b"),
    _completion(logit_bias={"x": 1}),
    _completion(logit_bias={"99999999": 1}),
    _completion(stop=["a"] * 100),
    _completion(best_of=2, n=4),
    _completion(stream=True, echo=True, logprobs=1),
    BadRequest("/v1/completions", {"prompt": [[]]}),
    BadRequest("/v1/completions", {"prompt": [-1]}),
    BadRequest("/v1/completions", {"prompt": [10**9]}),
    BadRequest("/v1/completions", {"prompt": ["a"] * 1000}),
    _chat(top_logprobs=3),
    _chat(tools=[{"type": "magic"}]),
    _chat(tools=[{"type": "function", "function": {"name": "f", "parameters": {"type": "nothing"}}}], tool_choice="required"),
    _chat(response_format={"type": "json_schema"}),
    _chat(response_format={"type": "yaml"}),
    _chat(modalities=["audio"]),
    BadRequest("/v1/chat/completions", {"messages": []}),
    BadRequest("/v1/chat/completions", {"messages": [{"role": "wizard", "content": "a"}]}),
    BadRequest("/v1/embeddings", {"input": []}),
    BadRequest("/v1/embeddings", {"input": "a", "dimensions": 3}),
    BadRequest("/embed", {"inputs": "a", "parameters": {"adapter_id": "never-was"}}),
    BadRequest("/classify_batch", {"inputs": ["a"] * 10_000, "parameters": {"adapter_id": "labels"}}),
)  # fmt: skip

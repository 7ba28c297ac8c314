"""Bodies and replies of LoRAX's routes: what its clients send, and what they parse.

Every optional field may be null, since the client sends all of them; fields that we do not know are ignored, as LoRAX does. Types are strict: a
number in quotes is no number. The limits of values are in rules, which says them in LoRAX's words; replies are described here for the OpenAPI
document and written by reply as plain JSON.

Used by generate, texts and, for merged adapters, by the OpenAI routes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from atoll.serving.merging import MergeSpec


class Part(BaseModel):
    """A piece of a body."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True, allow_inf_nan=False, populate_by_name=True)


class MergedAdapters(Part):
    """Adapters to merge for this request."""

    ids: list[str] = Field(description="Adapters to merge, each as adapter_id names one.", examples=[["dates", "clauses@2"]])
    weights: list[float] = Field(default=[], description="One weight an adapter.", examples=[[0.7, 0.3]])
    merge_strategy: str | None = Field(
        default=None,
        description="linear (default; the exact weighted sum of the updates), cat, svd, product, lorahub, magnitude_prune, ties, dare_linear, "
        "dare_ties or knots.",
    )
    density: float | None = Field(default=None, description="Share of entries that ties, dare, magnitude_prune and knots keep, above 0 and up to 1.")
    majority_sign_method: str | None = Field(default=None, description="total (default) or frequency: how ties, dare_ties and knots elect signs.")
    seed: int | None = Field(default=None, description="Draws the masks of the dare strategies. Atoll's addition.")
    rank: int | None = Field(default=None, description="Compress the result to this rank. Atoll's addition.")

    def spec(self, max_merged: int) -> MergeSpec:
        """What the registry merges. Raises RequestRefused for values that no strategy takes, and beyond max_merged adapters."""
        from atoll.serving.merging import MergeSpec

        return MergeSpec.of(
            self.ids,
            self.weights,
            merge_strategy=self.merge_strategy.lower() if self.merge_strategy else None,
            density=self.density,
            majority_sign_method=self.majority_sign_method.lower() if self.majority_sign_method else None,
            seed=self.seed,
            rank=self.rank,
            max_merged=max_merged,
        )


class ResponseFormat(Part):
    """What the generated text must be."""

    type: Literal["text", "json_object", "json_schema"] = Field(
        default="json_object", description="Accepted and not used: the schema decides, as in LoRAX."
    )
    schema_: dict[str, Any] | bool | None = Field(
        default=None, alias="schema", description="A JSON Schema that the text must fit. Default: any JSON object."
    )


class AdapterChoice(Part):
    """What answers: the base, an adapter, or a merge of adapters."""

    adapter_id: str | None = Field(default=None, description='An adapter: "name", "name@version", "name:tag". null or "": the base.')
    adapter_source: str | None = Field(default=None, description="hub (default), local, s3, hf or pbase, in any case.")
    merged_adapters: MergedAdapters | None = Field(default=None, description="Adapters to merge for this request, instead of adapter_id.")
    api_token: str | None = Field(default=None, description="A token for the adapter's source, where that needs one.")


class Parameters(AdapterChoice):
    """`parameters` of the generate routes."""

    best_of: int | None = Field(default=None, description="Generate that many sequences and return the one with the highest mean log-probability.")
    temperature: float | None = Field(default=None, description="0: always the likeliest token. Default 1; giving it turns sampling on.")
    repetition_penalty: float | None = Field(default=None, description="Above 1: tokens of prompt and answer become less likely. Default 1.")
    frequency_penalty: float | None = Field(default=None, description="-2 to 2: subtracted once for each time the answer has a token. Default 0.")
    presence_penalty: float | None = Field(default=None, description="-2 to 2: subtracted from tokens that the answer has. Default 0.")
    top_k: int | None = Field(default=None, description="Sample from that many likeliest tokens; turns sampling on.")
    top_p: float | None = Field(default=None, description="Sample from the likeliest tokens that together reach this probability; turns sampling on.")
    typical_p: float | None = Field(default=None, description="Mass of locally typical sampling, between 0 and 1; turns sampling on.")
    do_sample: bool | None = Field(default=None, description="Sample instead of always taking the likeliest token. Default false.")
    max_new_tokens: int | None = Field(default=None, description="Tokens of the answer at most. Default: what there is room for after the prompt.")
    ignore_eos_token: bool | None = Field(default=None, description="Go on after the end-of-text token, and after the adapter's own stop texts.")
    watermark: bool | None = Field(default=None, description="Refused when true: answers are not watermarked.")
    return_full_text: bool | None = Field(default=None, description="Put `inputs` before the generated text. Default false.")
    stop: list[str] | None = Field(default=None, description="Texts at which the answer ends; they are not part of it.")
    truncate: int | None = Field(default=None, description="Keep only the last so many tokens of the prompt.")
    seed: int | None = Field(default=None, description="The same seed gives the same answer. Default: drawn, and told in details.")
    details: bool | None = Field(default=None, description="Tell tokens, counts and why the answer ended. Default false.")
    decoder_input_details: bool | None = Field(default=None, description="Tell the prompt's tokens and their log-probabilities too. Default false.")
    return_k_alternatives: int | None = Field(default=None, description="Tell that many likeliest tokens in each token's place.")
    apply_chat_template: bool | None = Field(
        default=None, description="Put `inputs` into the adapter's own prompt format, or else into the base's chat template, as the user's text."
    )
    fields: dict[str, Any] | None = Field(
        default=None,
        description="With apply_chat_template: the columns of the adapter's prompt besides the one that `inputs` fills. Atoll's addition.",
    )
    response_format: ResponseFormat | None = Field(default=None, description="Constrain the text to JSON.")


class GenerateBody(Part):
    """POST /generate and /generate_stream."""

    inputs: str = Field(description="The prompt, taken as it is.", examples=["What is a lagoon?"])
    parameters: Parameters | None = Field(default=None, description="How to generate.")


class CompatGenerateBody(GenerateBody):
    """POST / and /invocations."""

    stream: bool | None = Field(default=None, description="Answer with server-sent events. Default false.")


class PooledChoice(AdapterChoice):
    """`parameters` of /embed."""

    pooling: Literal["mean", "last"] | None = Field(
        default=None, description="The mean of all tokens' last hidden states (default), or that of the last token. Atoll's addition."
    )


class FieldsChoice(AdapterChoice):
    """`parameters` of /classify and /classify_batch."""

    fields: dict[str, Any] | None = Field(
        default=None, description="The columns of the adapter's prompt besides the one that `inputs` fills. Atoll's addition."
    )


class EmbedBody(Part):
    """POST /embed."""

    inputs: str = Field(description="The text to embed.", examples=["a quiet lagoon"])
    parameters: PooledChoice | None = None


class ClassifyBody(Part):
    """POST /classify."""

    inputs: str = Field(description="The text to classify: it fills the adapter's own prompt format.", examples=["My card was stolen"])
    parameters: FieldsChoice | None = None


class ClassifyBatchBody(Part):
    """POST /classify_batch."""

    inputs: list[str] = Field(description="The texts to classify.", examples=[["My card was stolen", "Where is my parcel?"]])
    parameters: FieldsChoice | None = None


class TokenizeBody(Part):
    """POST /tokenize."""

    inputs: str = Field(description="The text to split into tokens.", examples=["a quiet lagoon"])
    add_special_tokens: bool | None = Field(default=None, description="Add what the tokenizer puts around a text. Default true.")


# Replies. They describe; reply writes.


class PrefillToken(BaseModel):
    id: int
    text: str
    logprob: float | None = Field(description="null for the first token, which nothing predicts.")


class AlternativeToken(BaseModel):
    id: int
    text: str
    logprob: float


class Token(BaseModel):
    id: int
    text: str
    logprob: float
    special: bool
    alternative_tokens: list[AlternativeToken] | None = None
    skipped: bool


Reason = Literal["length", "eos_token", "stop_sequence"]


class BestOfSequence(BaseModel):
    generated_text: str
    finish_reason: Reason
    generated_tokens: int
    seed: int | None
    prefill: list[PrefillToken]
    tokens: list[Token]


class Details(BaseModel):
    finish_reason: Reason
    prompt_tokens: int
    generated_tokens: int
    skipped_tokens: int
    seed: int | None
    prefill: list[PrefillToken]
    tokens: list[Token]
    best_of_sequences: list[BestOfSequence] | None = None


class GenerateResponse(BaseModel):
    generated_text: str
    details: Details | None = None


class StreamDetails(BaseModel):
    finish_reason: Reason
    prompt_tokens: int
    generated_tokens: int
    skipped_tokens: int
    seed: int | None


class StreamResponse(BaseModel):
    """One event of a stream; the last one has generated_text and, if asked for, details."""

    token: Token
    generated_text: str | None
    details: StreamDetails | None


class EmbedResponse(BaseModel):
    embeddings: list[float]


class Entity(BaseModel):
    entity_group: str
    score: float
    word: str
    start: int
    end: int


class SimpleToken(BaseModel):
    id: int
    text: str
    start: int
    stop: int


class Info(BaseModel):
    """LoRAX's fields; where Atoll has no such thing they are null or 0. The last ones are Atoll's own."""

    model_config = ConfigDict(protected_namespaces=())

    model_id: str
    model_sha: str | None
    model_dtype: str
    model_device_type: str
    model_pipeline_tag: str | None
    max_concurrent_requests: int
    max_best_of: int
    max_stop_sequences: int
    max_input_length: int
    max_total_tokens: int
    waiting_served_ratio: float
    max_batch_total_tokens: int
    max_waiting_tokens: int
    validation_workers: int
    eager_prefill: bool
    version: str
    sha: str | None
    docker_label: str | None
    request_logger_url: str | None
    base: dict[str, str] = Field(description="The base's name and hashes.")
    adapters: int = Field(description="How many adapters this caller may use.")
    adapter_kinds: dict[str, int] = Field(description="How many of them the hub has of each kind: lora, reft, lora+reft, composed.")
    kernel: str = Field(description="Which forward computes: plain, or the target that the compiled one was built for.")


class ErrorBody(BaseModel):
    """Every error of LoRAX's routes."""

    error: str
    error_type: str
    hint: str | None = None

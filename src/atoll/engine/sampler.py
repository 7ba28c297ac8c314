"""Logits to tokens, one row a sequence, so that a row's token depends on that row alone.

A batch of plain greedy rows is one maximum over all of them, and a step that has only those needs no logits here (`plain_greedy`, `choices_of`).
Everything else is done for the rows that ask for it, in this order: log-probabilities of the raw distribution, penalties, logit_bias, the ban on
stopping early, the row's grammar, then argmax or, for sampled rows, temperature, top_k, top_p, min_p, typical_p and one random number of the
sequence's own, looked up in the cumulative distribution in vocabulary order (so that near-equal tokens do not swap places with rounding). The grammar
comes last before choosing, so nothing can bring back a token that it forbids, and every limit counts among the tokens that it allows. The order of
the limits is that of transformers, where typical_p sees what the others left.

Used by step.py once a step.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import NamedTuple

import torch
from torch import Tensor

from atoll.engine.grammar import forbidden
from atoll.engine.request import SamplingParams, TokenLogprob
from atoll.engine.sequence import Sequence

_NUCLEUS = 256  # tokens looked at first for top_p and typical_p; the whole vocabulary is sorted only where they do not suffice


class Choice(NamedTuple):
    """The next token of a sequence, and its log-probability if asked for."""

    token: int
    logprob: TokenLogprob | None


def plain_greedy(sequence: Sequence) -> bool:
    """Whether the sequence's next token is its largest logit and nothing else is asked of its logits."""
    return sequence.is_plain and sequence.may_stop


def choices_of(values: Tensor, ids: Tensor) -> list[Choice | None]:
    """The choices of rows that are all `plain_greedy`, from their largest logits [n] and the ids of those [n]; None where one is not finite."""
    pairs = zip(torch.isfinite(values).tolist(), ids.tolist(), strict=True)
    return [Choice(token, None) if is_finite else None for is_finite, token in pairs]


Draw = Callable[[Tensor, Seq[tuple[float, int, float, float, float]]], Tensor]  # a faster `_sample` without typical_p: CompiledDecoder.draw


@torch.inference_mode()
def choose(logits: Tensor, sequences: Seq[Sequence], draw: Draw | None = None) -> list[Choice | None]:
    """The next token of each sequence; None where a row's logits are not finite. logits [n, V] float32 is written into."""
    best, greedy = logits.max(-1)
    finite = torch.isfinite(best).tolist()
    logprob_rows = [i for i, s in enumerate(sequences) if s.sampling.logprobs is not None and finite[i]]
    raw = torch.log_softmax(logits[logprob_rows], -1) if logprob_rows else None
    changed = [i for i, s in enumerate(sequences) if s.sampling.has_penalties or s.sampling.logit_bias or not s.may_stop]
    if changed:
        _penalise(logits, changed, sequences)
        _bias(logits, changed, sequences)
        greedy[changed] = logits[changed].argmax(-1)
    constrained = [i for i, s in enumerate(sequences) if s.matcher is not None and finite[i]]
    if constrained:
        best, greedy[constrained] = _constrain(logits, constrained, sequences)
        for i, is_finite in zip(constrained, torch.isfinite(best).tolist(), strict=True):
            finite[i] = is_finite
    sampled = [i for i, s in enumerate(sequences) if not s.sampling.is_greedy and finite[i]]
    if sampled:
        rows = logits if len(sampled) == len(sequences) else logits[sampled]
        greedy[sampled] = _drawn(rows, [sequences[i].sampling for i in sampled], [sequences[i].draw() for i in sampled], draw)
    tokens = greedy.tolist()
    logprobs: dict[int, TokenLogprob] = {}
    if raw is not None:
        chosen = [tokens[i] for i in logprob_rows]
        counts = [sequences[i].sampling.logprobs or 0 for i in logprob_rows]
        logprobs = dict(zip(logprob_rows, _logprobs(raw, chosen, counts), strict=True))
    return [Choice(token, logprobs.get(i)) if finite[i] else None for i, token in enumerate(tokens)]


@torch.inference_mode()
def token_logprobs(logits: Tensor, token_ids: Seq[int], num_top: int) -> list[TokenLogprob]:
    """The log-probability of given tokens and the num_top likeliest. logits [n, V] float32, token_ids n."""
    return _logprobs(torch.log_softmax(logits, -1), token_ids, [num_top] * len(token_ids))


def _logprobs(log_probs: Tensor, token_ids: Seq[int], num_top: Seq[int]) -> list[TokenLogprob]:
    """log_probs [n, V]; one entry a row."""
    chosen = log_probs.gather(1, torch.tensor(token_ids, device=log_probs.device).unsqueeze(1)).squeeze(1).tolist()
    widest = min(max(num_top), log_probs.shape[1])
    values, indices = (t.tolist() for t in log_probs.topk(widest)) if widest else ([[]] * len(chosen), [[]] * len(chosen))
    return [
        TokenLogprob(token, value, tuple(zip(ids[:count], tops[:count], strict=True)))
        for token, value, ids, tops, count in zip(token_ids, chosen, indices, values, num_top, strict=True)
    ]


def _penalise(logits: Tensor, rows: Seq[int], sequences: Seq[Sequence]) -> None:
    """Repetition penalty on prompt and answer tokens (divide above zero, multiply below), then frequency and presence penalties on answer tokens."""
    scaled: list[tuple[int, int, float]] = []
    lowered: list[tuple[int, int, float]] = []
    for row in rows:
        sequence, sampling = sequences[row], sequences[row].sampling
        if sampling.repetition_penalty != 1.0:
            scaled += [(row, token, sampling.repetition_penalty) for token in sequence.prompt_set | sequence.counts.keys()]
        if sampling.frequency_penalty or sampling.presence_penalty:
            lowered += [(row, token, sampling.frequency_penalty * n + sampling.presence_penalty) for token, n in sequence.counts.items()]
    if scaled:
        place, factor = _entries(scaled, logits)
        values = logits[place]
        logits[place] = torch.where(values < 0, values * factor, values / factor)
    if lowered:
        place, amount = _entries(lowered, logits)
        logits[place] -= amount


def _bias(logits: Tensor, rows: Seq[int], sequences: Seq[Sequence]) -> None:
    """Add logit_bias; forbid the stopping tokens where the answer may not end yet."""
    added = [(row, token, bias) for row in rows for token, bias in sequences[row].sampling.logit_bias.items()]
    if added:
        place, amount = _entries(added, logits)
        logits[place] += amount
    early = [row for row in rows if not sequences[row].may_stop and sequences[row].matcher is None]  # a grammar knows better: see Matcher.allow
    banned = [(row, token, 0.0) for row in early for token in sequences[row].stop_ids]
    if banned:
        logits[_entries(banned, logits)[0]] = float("-inf")


def _constrain(logits: Tensor, rows: Seq[int], sequences: Seq[Sequence]) -> tuple[Tensor, Tensor]:
    """Forbid what the rows' grammars do not allow; returns the largest logit left in each row and its token."""
    matchers = [matcher for row in rows if (matcher := sequences[row].matcher) is not None]
    stops = [(sequences[row].stop_ids, sequences[row].may_stop) for row in rows]
    mask = torch.from_numpy(forbidden(matchers, stops, logits.shape[1])).to(logits.device)
    if len(rows) == logits.shape[0]:
        return logits.masked_fill_(mask, float("-inf")).max(-1)
    part = logits[rows].masked_fill_(mask, float("-inf"))
    logits[rows] = part
    return part.max(-1)


def _entries(entries: Seq[tuple[int, int, float]], logits: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """((row, token) index tensors, values) of a list of logits to change; each appears once."""
    rows, tokens, values = zip(*entries, strict=True)
    device = logits.device
    return (torch.tensor(rows, device=device), torch.tensor(tokens, device=device)), torch.tensor(values, dtype=logits.dtype, device=device)


def _drawn(logits: Tensor, settings: Seq[SamplingParams], randoms: Seq[float], draw: Draw | None) -> Tensor:
    """[n] int64, by the faster way where there is one and all rows can go it."""
    if draw is None or any(s.typical_p < 1.0 for s in settings):
        return _sample(logits, settings, randoms)
    wants = [(_temperature(s), min(s.top_k, logits.shape[1]), s.top_p, s.min_p, random) for s, random in zip(settings, randoms, strict=True)]
    return draw(logits, wants)


def _temperature(sampling: SamplingParams) -> float:
    """Held where float32 can divide by it: beyond these, sampling is greedy or uniform anyway."""
    return min(max(sampling.temperature, 1e-6), 1e6)


def _sample(logits: Tensor, settings: Seq[SamplingParams], draws: Seq[float]) -> Tensor:
    """[n] int64: for each row the first token whose cumulative probability, among the tokens kept, exceeds its draw. logits [n, V]."""
    temperature = torch.tensor([_temperature(s) for s in settings], device=logits.device).unsqueeze(1)
    scaled = logits - logits.amax(-1, keepdim=True)  # before the division: a tiny temperature must not overflow
    probs = torch.softmax(scaled.div_(temperature), -1)
    floor = _floor(probs, settings)
    if floor is not None:
        probs.masked_fill_(probs < floor.unsqueeze(1), 0.0)
    typical = [i for i, s in enumerate(settings) if s.typical_p < 1.0]
    if typical:
        probs[typical] = _typical(probs[typical], [settings[i].typical_p for i in typical])
    cumulative = probs.cumsum(-1, dtype=torch.float64)
    total = cumulative[:, -1]
    wanted = torch.tensor(draws, dtype=torch.float64, device=logits.device) * total
    wanted = torch.minimum(wanted, torch.nextafter(total, torch.zeros_like(total)))  # a draw just below 1 may round up to the total
    return torch.searchsorted(cumulative, wanted.unsqueeze(1), right=True).squeeze(1)


def _floor(probs: Tensor, settings: Seq[SamplingParams]) -> Tensor | None:
    """[n]: the least probability that top_k, top_p and min_p leave in each row (ties stay); None if no row limits anything."""
    ranked = [i for i, s in enumerate(settings) if s.top_k or s.top_p < 1.0]
    minimum = [s.min_p for s in settings]
    if not ranked and not any(minimum):
        return None
    floor = probs.new_zeros(probs.shape[0])
    if ranked:
        floor[ranked] = _nucleus_floor(probs[ranked], [settings[i] for i in ranked])
    if any(minimum):
        floor = torch.maximum(floor, torch.tensor(minimum, device=probs.device) * probs.amax(-1))
    return floor


def _nucleus_floor(probs: Tensor, settings: Seq[SamplingParams]) -> Tensor:
    """[n]: the probability of the last token kept by top_k, then top_p of what top_k left (the fewest likeliest tokens whose mass reaches it)."""
    vocabulary, device = probs.shape[1], probs.device
    limit = torch.tensor([min(s.top_k or vocabulary, vocabulary) for s in settings], device=device).unsqueeze(1)
    top_p = torch.tensor([s.top_p for s in settings], dtype=torch.float64, device=device).unsqueeze(1)
    width = min(vocabulary, max(_NUCLEUS, *(s.top_k for s in settings)))
    while True:
        ranked = probs.topk(width).values
        inside = torch.arange(width, device=device) < limit
        mass = torch.where(inside, ranked, 0.0).cumsum(-1, dtype=torch.float64)
        target = top_p * torch.where(limit <= width, mass[:, -1:], 1.0)
        if width == vocabulary or bool(((limit <= width) | (mass[:, -1:] >= target)).all()):
            kept = inside & (mass - ranked < target)
            return ranked.gather(1, (kept.sum(-1, keepdim=True) - 1).clamp_(min=0)).squeeze(1)
        width = min(vocabulary, 8 * width)


def _typical(probs: Tensor, masses: Seq[float]) -> Tensor:
    """probs [n, V] with only the typical tokens left: the fewest whose surprise, -log p, is nearest to the row's entropy, and whose mass reaches the
    row's share (Meister et al. 2022, arXiv 2202.00666). Ties stay; p is normalised here, probs need not be."""
    vocabulary = probs.shape[1]
    p = probs.double()
    p /= p.sum(-1, keepdim=True)
    distance = (-p.log() - torch.special.entr(p).sum(-1, keepdim=True)).abs_()  # infinite where p is 0
    target = torch.tensor(masses, dtype=torch.float64, device=probs.device).unsqueeze(1)
    width = min(vocabulary, _NUCLEUS)
    while True:
        nearest = distance.topk(width, largest=False)
        mass = p.gather(1, nearest.indices).cumsum(-1)
        if width == vocabulary or bool((mass[:, -1:] >= target).all()):
            last = (mass < target).sum(-1, keepdim=True).clamp_(max=width - 1)
            return probs.masked_fill(distance > nearest.values.gather(1, last), 0.0)
        width = min(vocabulary, 8 * width)

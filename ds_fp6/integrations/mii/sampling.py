"""Choosing tokens for sequences that each have settings of their own, and the log probabilities of tokens.

A sequence with a seed draws from its own generator, and no row depends on another, so the same logits give the same
token whatever else is in the batch. The order is that of other servers: bias and penalties, temperature,
top-k, top-p.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ds_fp6.integrations.deepspeed.argmax import argmax
from ds_fp6.integrations.deepspeed.batch import to_device
from ds_fp6.integrations.mii.handover import Reading

#: A temperature that leaves nothing to chance, and below which dividing by it would overflow.
GREEDY_BELOW = 1e-4


#: Rows that are in fp32 at a time: a few copies of them are made.
ROWS_AT_A_TIME = 64

#: Told in place of lesser log probabilities.
LEAST_LOGPROB = -9999.0


@dataclass(frozen=True)
class Sampling:
    """How the tokens of one sequence are chosen.

    Args:
        temperature: 0, or less than ``GREEDY_BELOW``, takes the likeliest token.
        top_p: the likeliest tokens whose probabilities first add up to this share, in (0, 1].
        top_k: the likeliest so many tokens; 0 for all.
        seed: of this sequence's generator; None to share the process's.
        presence_penalty: taken off the logits of tokens that were generated already.
        frequency_penalty: the same, times how often they were.
        logit_bias: added to the logits of tokens.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    @property
    def truncates(self) -> bool:
        return self.top_p < 1 or self.top_k > 0


class Sampler:
    """What sampling remembers of one sequence: its generator and how often each token was generated."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._generator: torch.Generator | None = None
        self._generated: Counter[int] = Counter()

    def generator(self, device: torch.device) -> torch.Generator | None:
        """The sequence's own generator; None without a seed."""
        if self._generator is None and self.sampling.seed is not None:
            self._generator = torch.Generator(device).manual_seed(self.sampling.seed)
        return self._generator

    def saw(self, token: int) -> None:
        if self.sampling.presence_penalty or self.sampling.frequency_penalty:
            self._generated[token] += 1

    def offsets(self) -> dict[int, float]:
        """What to add to the logits, by token."""
        offsets = dict(self.sampling.logit_bias)
        for token, times in self._generated.items():
            penalty = self.sampling.presence_penalty + times * self.sampling.frequency_penalty
            offsets[token] = offsets.get(token, 0.0) - penalty
        return offsets


def choose(logits: torch.Tensor, samplers: Sequence[Sampler]) -> torch.Tensor:
    """A token for each row: logits [n, vocabulary] of any float dtype; int64 [n] on their device.

    Does not wait for the device. What was chosen is to be told to the samplers (``Sampler.saw``) before the next time.
    """
    device = logits.device
    offsets = [sampler.offsets() for sampler in samplers]
    sampled = [sampler.sampling.temperature >= GREEDY_BELOW for sampler in samplers]
    chosen = argmax(logits)
    changed = [row for row in range(len(samplers)) if sampled[row] or offsets[row]]
    for start in range(0, len(changed), ROWS_AT_A_TIME):
        rows = changed[start : start + ROWS_AT_A_TIME]
        on_device = to_device(rows, device)
        some = logits[on_device].float()
        added = [(i, token, value) for i, row in enumerate(rows) for token, value in offsets[row].items()]
        if added:
            places = to_device([place[:2] for place in added], device).unbind(dim=1)
            some[places] += to_device([place[2] for place in added], device, torch.float32)
        chosen[on_device] = argmax(some)
        drawn = [i for i, row in enumerate(rows) if sampled[row]]
        if drawn:
            drawn_rows = [rows[i] for i in drawn]
            tokens = _sample(some[to_device(drawn, device)], [samplers[row] for row in drawn_rows])
            chosen[to_device(drawn_rows, device)] = tokens
    return chosen


def _column(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    return to_device(values, like.device, torch.float32)[:, None]


def _sample(logits: torch.Tensor, samplers: Sequence[Sampler]) -> torch.Tensor:
    """The Gumbel-max trick: the likeliest token after independent noise on each logit is a sample.

    A change of a logit in its last bit, as other shapes of a batch cause it, hardly ever changes such a sample.
    """
    settings = [sampler.sampling for sampler in samplers]
    scaled = logits / _column([s.temperature for s in settings], logits)
    truncated = [row for row, s in enumerate(settings) if s.truncates]
    if truncated:
        rows = to_device(truncated, logits.device)
        scaled[rows] = _truncate(scaled[rows], [settings[row] for row in truncated])
    noise = torch.empty_like(scaled).exponential_()
    for row, sampler in enumerate(samplers):
        generator = sampler.generator(logits.device)
        if generator is not None:
            noise[row].exponential_(generator=generator)
    return argmax(scaled - noise.log())


def _truncate(logits: torch.Tensor, settings: Sequence[Sampling]) -> torch.Tensor:
    """Logits with those outside top-k, then outside top-p of what is left, at minus infinity."""
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    size = ordered.shape[-1]
    rank = torch.arange(size, device=logits.device)
    ordered = ordered.masked_fill(rank >= _column([s.top_k or size for s in settings], logits), -torch.inf)
    probabilities = ordered.double().softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    # All of a distribution adds up to 1 only up to rounding.
    share = _column([s.top_p if s.top_p < 1 else 2 for s in settings], logits)
    ordered = ordered.masked_fill((before >= share) & (rank > 0), -torch.inf)
    return torch.empty_like(ordered).scatter_(1, order, ordered)


@dataclass(frozen=True)
class TokenLogprobs:
    """The log probability of ``token``, and the likeliest tokens at its place with theirs, likeliest first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class LogprobsUnderWay:
    """The log probabilities of each row's token by the model's own distribution, on their way from the device.

    Args:
        logits: [n, vocabulary].
        tokens: int64 [n], on the device.
        counts: how many of the likeliest tokens each row reports.
    """

    def __init__(self, logits: torch.Tensor, tokens: torch.Tensor, counts: Sequence[int]) -> None:
        # JSON has no infinities.
        logprobs = logits.float().log_softmax(dim=-1).clamp(min=LEAST_LOGPROB)
        likeliest = logprobs.topk(min(max(counts), logits.shape[-1]), dim=-1)
        own = logprobs.gather(1, tokens[:, None])[:, 0]
        self._counts = counts
        self._found = [Reading(found) for found in (tokens, own, likeliest.indices, likeliest.values)]

    def get(self) -> list[TokenLogprobs]:
        """Them, by row."""
        rows = zip(*(found.get().tolist() for found in self._found), self._counts, strict=True)
        return [
            TokenLogprobs(token, logprob, tuple(zip(indices[:count], values[:count], strict=True)))
            for token, logprob, indices, values, count in rows
        ]


def token_logprobs(logits: torch.Tensor, tokens: Sequence[int], counts: Sequence[int]) -> list[TokenLogprobs]:
    """Of each row's token: logits [n, vocabulary]. Waits for the device, see ``LogprobsUnderWay``."""
    return LogprobsUnderWay(logits, to_device(tokens, logits.device), counts).get()

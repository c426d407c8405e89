"""One request's sequences: every choice of every prompt, from their submission to their last text."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ds_fp6.integrations.mii.sampling import Sampling, TokenLogprobs
from ds_fp6.integrations.mii.serving import ServedSequence, Step
from ds_fp6.serving.engine import Engine, Mailbox
from ds_fp6.serving.metrics import Metrics
from ds_fp6.serving.text import Piece, StoppableText, Token

#: Prompt tokens that decide how the first generated ones are written.
CONTEXT_TOKENS = 5


@dataclass(frozen=True)
class Wanted:
    """How a request's sequences are generated and what is told of them.

    ``logprobs`` and ``prompt_logprobs`` are the numbers of likeliest tokens that are told beside each generated and
    each prompt token; None for no log probabilities.
    """

    sampling: Sampling
    max_new_tokens: int
    choices: int = 1
    stops: tuple[str, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None


@dataclass
class Choice:
    """A sequence, and what is known of it so far."""

    index: int
    sequence: ServedSequence
    text: StoppableText
    prompt_tokens: int
    generated_tokens: int = 0
    finish: str | None = None
    first_token_at: float | None = None


@dataclass
class Usage:
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def json(self) -> dict[str, int]:
        total = self.prompt_tokens + self.completion_tokens
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": total,
        }


class Generation:
    """The sequences of ``prompts`` (token ids), ``wanted.choices`` of each, in the order of OpenAI's indices.

    Raises ``ValueError`` for a prompt that does not fit; none of the sequences is left behind then.
    """

    def __init__(
        self, engine: Engine, metrics: Metrics, tokenizer: Any, prompts: Sequence[Sequence[int]], wanted: Wanted
    ) -> None:
        self._engine, self._metrics, self._tokenizer, self.wanted = engine, metrics, tokenizer, wanted
        self._mailbox = Mailbox()
        self._start = time.monotonic()
        self.choices: list[Choice] = []
        self._by_uid: dict[int, Choice] = {}
        self.usage = Usage(prompt_tokens=sum(map(len, prompts)))
        try:
            for prompt in prompts:
                for number in range(wanted.choices):
                    self._submit(prompt, number)
        except BaseException:
            self.cancel()
            raise
        metrics.prompt_tokens.inc(self.usage.prompt_tokens)

    def _submit(self, prompt: Sequence[int], number: int) -> None:
        wanted, sampling = self.wanted, self.wanted.sampling
        if sampling.seed is not None and number:
            sampling = replace(sampling, seed=(sampling.seed + number) % 2**63)
        sequence = self._engine.submit(
            self._mailbox, prompt, sampling, max(1, wanted.max_new_tokens), ignore_eos=wanted.ignore_eos,
            logprobs=wanted.logprobs, prompt_logprobs=wanted.prompt_logprobs,
        )  # fmt: skip
        text = StoppableText(self._decode, wanted.stops, prompt[-CONTEXT_TOKENS:])
        choice = Choice(len(self.choices), sequence, text, len(prompt))
        self.choices.append(choice)
        self._by_uid[sequence.uid] = choice

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True)

    async def pieces(self) -> AsyncIterator[tuple[Choice, Piece]]:
        """The text of all choices as it is generated; ``choice.finish`` is set with the last piece of each.

        Sequences that have not finished when the iteration ends, whatever ends it, are cancelled.
        """
        running = len(self.choices)
        try:
            while running:
                uid, step = await self._mailbox.get()
                choice = self._by_uid[uid]
                if choice.finish is not None:
                    continue
                piece = self._advance(choice, step)
                running -= choice.finish is not None
                yield choice, piece
        finally:
            self.cancel()

    def cancel(self) -> None:
        """Cancels what has not finished."""
        reason = "cancelled" if self._engine.failure is None else "failed"
        for choice in self.choices:
            if choice.finish is None:
                choice.finish = reason
                self._metrics.finished.labels(reason).inc()
                self._engine.cancel(choice.sequence.uid)

    def _advance(self, choice: Choice, step: Step) -> Piece:
        if choice.first_token_at is None:
            choice.first_token_at = time.monotonic()
            self._metrics.ttft.observe(choice.first_token_at - self._start)
        if self.wanted.max_new_tokens == 0:
            self._finish(choice, "length")
            return Piece("", ())
        choice.generated_tokens += 1
        self.usage.completion_tokens += 1
        self._metrics.generation_tokens.inc()
        token = None if step.logprobs is None else self.described(step.logprobs)
        if step.finish == "stop":
            piece = choice.text.end(token)
        else:
            piece = choice.text.add(step.token, token)
            if step.finish is not None and not choice.text.stopped:
                rest = choice.text.end()
                piece = Piece(piece.text + rest.text, piece.tokens + rest.tokens)
        if choice.text.stopped:
            self._engine.cancel(choice.sequence.uid)
        finish = "stop" if choice.text.stopped else step.finish
        if finish is not None:
            self._finish(choice, finish)
        return piece

    def _finish(self, choice: Choice, reason: str) -> None:
        choice.finish = reason
        now = time.monotonic()
        self._metrics.finished.labels(reason).inc()
        self._metrics.e2e.observe(now - self._start)
        if choice.generated_tokens > 1:
            self._metrics.tpot.observe((now - choice.first_token_at) / (choice.generated_tokens - 1))

    def token_text(self, token: int) -> str:
        """A single token as text. What is no valid UTF-8 by itself shows replacement characters."""
        return self._tokenizer.decode([token])

    def described(self, logprobs: TokenLogprobs) -> Token:
        """A token with its log probability and, beside it, those of the likeliest tokens."""
        top = tuple((self.token_text(token), value) for token, value in logprobs.top)
        return Token(self.token_text(logprobs.token), logprobs.logprob, top)

    def prompt_tokens(self, choice: Choice, prompt: Sequence[int]) -> list[Token]:
        """The prompt's tokens with their log probabilities, once ``choice`` has its first piece."""
        scores = choice.sequence.prompt_logprobs
        return [
            Token(self.token_text(token), None, None) if score is None else self.described(score)
            for token, score in zip(prompt, scores, strict=True)
        ]

    def token_text_of(self, tokens: Sequence[int]) -> str:
        """Token ids as text, special ones included."""
        return self._tokenizer.decode(list(tokens))

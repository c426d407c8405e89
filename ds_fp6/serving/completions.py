"""``/v1/completions``."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from ds_fp6.serving.generation import Choice, Generation
from ds_fp6.serving.protocol import CompletionRequest
from ds_fp6.serving.text import Token


class Logprobs:
    """OpenAI's four parallel lists; offsets count characters from the beginning of the choice's text."""

    def __init__(self) -> None:
        self._offset = 0

    def json(self, tokens: Sequence[Token]) -> dict[str, list]:
        offsets = []
        for token in tokens:
            offsets.append(self._offset)
            self._offset += len(token.text)
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [None if token.top is None else _top(token) for token in tokens],
            "text_offset": offsets,
        }


def _top(token: Token) -> dict[str, float]:
    """By text, the chosen token always among them. Of tokens with one text, the likeliest is told."""
    told: dict[str, float] = {}
    for text, logprob in (*token.top, (token.text, token.logprob)):
        told[text] = max(logprob, told.get(text, logprob))
    return told


class Completion:
    """The answer to one request. ``prompts`` are its token ids."""

    def __init__(self, request: CompletionRequest, prompts: Sequence[Sequence[int]], generation: Generation) -> None:
        self._request, self._prompts, self._generation = request, prompts, generation
        self._id, self._created = f"cmpl-{uuid.uuid4().hex}", int(time.time())
        self._logprobs = [Logprobs() for _ in generation.choices]

    def _prompt_of(self, choice: Choice) -> int:
        return choice.index // self._request.n

    def _echo(self, choice: Choice) -> tuple[str, list[Token]]:
        """The prompt's text and tokens."""
        number = self._prompt_of(choice)
        given, tokens = self._request.prompts[number], self._prompts[number]
        text = given if isinstance(given, str) else self._generation.token_text_of(tokens)
        wanted = self._request.logprobs is not None
        return text, self._generation.prompt_tokens(choice, tokens) if wanted else []

    def _choice(self, choice: Choice, text: str, tokens: Sequence[Token]) -> dict[str, Any]:
        wanted = self._request.logprobs is not None
        logprobs = self._logprobs[choice.index].json(tokens) if wanted else None
        return {"index": choice.index, "text": text, "logprobs": logprobs, "finish_reason": choice.finish}

    def _body(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        head = {"id": self._id, "object": "text_completion", "created": self._created, "model": self._request.model}
        return head | {"choices": choices} | more

    async def whole(self) -> dict[str, Any]:
        texts = ["" for _ in self._generation.choices]
        tokens: list[list[Token]] = [[] for _ in texts]
        async for choice, piece in self._generation.pieces():
            texts[choice.index] += piece.text
            tokens[choice.index] += piece.tokens
        choices = []
        for choice in self._generation.choices:
            text, echoed = self._echo(choice) if self._request.echo else ("", [])
            choices.append(self._choice(choice, text + texts[choice.index], echoed + tokens[choice.index]))
        return self._body(choices, usage=self._generation.usage.json())

    async def chunks(self) -> AsyncIterator[dict[str, Any]]:
        """The bodies of a stream's events."""
        usage = {"usage": None} if self._request.wants_usage else {}
        begun: set[int] = set()
        async for choice, piece in self._generation.pieces():
            text, tokens = piece.text, list(piece.tokens)
            if self._request.echo and choice.index not in begun:
                begun.add(choice.index)
                prompt, echoed = self._echo(choice)
                text, tokens = prompt + text, echoed + tokens
            if text or tokens or choice.finish is not None:
                yield self._body([self._choice(choice, text, tokens)], **usage)
        if self._request.wants_usage:
            yield self._body([], usage=self._generation.usage.json())

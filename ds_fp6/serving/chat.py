"""``/v1/chat/completions``: the chat template, and answers as messages."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from ds_fp6.serving.errors import ApiError
from ds_fp6.serving.generation import Choice, Generation
from ds_fp6.serving.protocol import ChatRequest, Message
from ds_fp6.serving.text import Token


def render(tokenizer: Any, template: str | None, messages: Sequence[Message]) -> str:
    """The prompt that ``messages`` make. Raises ``ApiError`` 400 without a template, or if it refuses them."""
    if template is None and getattr(tokenizer, "chat_template", None) is None:
        raise ApiError(
            400,
            "the model's tokenizer has no chat template: start the server with --chat-template, or use /v1/completions",
            "messages",
            "no_chat_template",
        )
    turns = [message.for_template() for message in messages]
    try:
        return tokenizer.apply_chat_template(
            turns, chat_template=template, tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # A template is a program, whose errors have no common type.
        raise ApiError(400, f"the chat template refuses the messages: {error}", "messages") from error


def _described(text: str, logprob: float | None) -> dict[str, Any]:
    # A token that ends inside a character has no text of its own, and its bytes are not known.
    data = None if "\ufffd" in text else list(text.encode())
    return {"token": text, "logprob": logprob, "bytes": data}


def _logprobs(tokens: Sequence[Token]) -> dict[str, Any]:
    content = [
        _described(token.text, token.logprob) | {"top_logprobs": [_described(*one) for one in token.top or ()]}
        for token in tokens
    ]
    return {"content": content, "refusal": None}


class ChatCompletion:
    """The answer to one request."""

    def __init__(self, request: ChatRequest, generation: Generation) -> None:
        self._request, self._generation = request, generation
        self._id, self._created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())

    def _body(self, kind: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        head = {"id": self._id, "object": kind, "created": self._created, "model": self._request.model}
        return head | {"choices": choices} | more

    def _choice(self, choice: Choice, content: dict[str, Any], tokens: Sequence[Token]) -> dict[str, Any]:
        logprobs = _logprobs(tokens) if self._request.logprobs else None
        return {"index": choice.index} | content | {"logprobs": logprobs, "finish_reason": choice.finish}

    async def whole(self) -> dict[str, Any]:
        texts = ["" for _ in self._generation.choices]
        tokens: list[list[Token]] = [[] for _ in texts]
        async for choice, piece in self._generation.pieces():
            texts[choice.index] += piece.text
            tokens[choice.index] += piece.tokens
        choices = [
            self._choice(
                choice,
                {"message": {"role": "assistant", "content": texts[choice.index], "refusal": None}},
                tokens[choice.index],
            )
            for choice in self._generation.choices
        ]
        return self._body("chat.completion", choices, usage=self._generation.usage.json())

    async def chunks(self) -> AsyncIterator[dict[str, Any]]:
        """The bodies of a stream's events. The first of each choice carries its role."""
        kind, usage = "chat.completion.chunk", {"usage": None} if self._request.wants_usage else {}
        begun: set[int] = set()
        async for choice, piece in self._generation.pieces():
            if choice.index not in begun:
                begun.add(choice.index)
                first = {"index": choice.index, "delta": {"role": "assistant", "content": ""}}
                yield self._body(kind, [first | {"logprobs": None, "finish_reason": None}], **usage)
            if piece.text or piece.tokens or choice.finish is not None:
                delta = {"content": piece.text} if piece.text else {}
                yield self._body(kind, [self._choice(choice, {"delta": delta}, piece.tokens)], **usage)
        if self._request.wants_usage:
            yield self._body(kind, [], usage=self._generation.usage.json())

"""Prompts as token ids, and the limits that they must keep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ds_fp6.serving.errors import ApiError

#: Sequences that one HTTP request may ask for: prompts times choices.
MOST_SEQUENCES = 1024


class Prompts:
    """Turns what clients send into token ids.

    Args:
        tokenizer: transformers' tokenizer of the model.
        vocabulary: the model's number of token ids.
        max_model_len: tokens of the longest sequence, prompt and answer together.
    """

    def __init__(self, tokenizer: Any, vocabulary: int, max_model_len: int) -> None:
        self.tokenizer, self.vocabulary, self.max_model_len = tokenizer, vocabulary, max_model_len

    def encode(self, prompt: str | list[int], *, add_special_tokens: bool = True) -> list[int]:
        """Raises ``ApiError`` 400 for text or ids that the tokenizer or the model does not know."""
        if not isinstance(prompt, str):
            wrong = [token for token in prompt if not 0 <= token < self.vocabulary]
            if wrong:
                known = f"from 0 to {self.vocabulary - 1}"
                raise ApiError(400, f"token ids of this model are {known}, got {wrong[0]}", "prompt")
            return prompt
        try:
            encoded = self.tokenizer.encode(prompt, add_special_tokens=add_special_tokens)
        except (TypeError, ValueError) as error:
            raise ApiError(400, str(error), "prompt") from error
        return [int(token) for token in encoded]

    def new_tokens(self, prompts: Sequence[Sequence[int]], wanted: int | None, choices: int) -> int:
        """How many tokens may be generated: ``wanted``, or as many as all prompts leave room for.

        Raises ``ApiError`` 400 for prompts that leave less room, or too many of them.
        """
        if len(prompts) * choices > MOST_SEQUENCES:
            asked = f"{len(prompts)} prompts with n = {choices}"
            raise ApiError(400, f"{asked} are more than {MOST_SEQUENCES} sequences in one request", "n")
        if not all(prompts):
            raise ApiError(400, "a prompt has no tokens: give it some text", "prompt")
        longest = max(map(len, prompts))
        room = self.max_model_len - longest
        if room < (1 if wanted is None else wanted) or longest > self.max_model_len:
            asked = "an answer" if wanted is None else f"{wanted} more"
            raise ApiError(
                400,
                f"the prompt has {longest} tokens, which leaves no room for {asked} in a context of "
                f"{self.max_model_len} tokens",
                "prompt",
                "context_length_exceeded",
            )
        return room if wanted is None else wanted

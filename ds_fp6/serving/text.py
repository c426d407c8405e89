"""From tokens to text as they come, and the strings that end it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ds_fp6.integrations.mii.stream import TextStream


@dataclass(frozen=True)
class Token:
    """A generated or echoed token as a client sees it. ``logprob`` and ``top`` are None where nothing is known."""

    text: str
    logprob: float | None
    top: tuple[tuple[str, float], ...] | None


@dataclass(frozen=True)
class Piece:
    """Text that can be given out, and the tokens that begin in it."""

    text: str
    tokens: tuple[Token, ...]


class StoppableText:
    """The text of one sequence. What may be the beginning of a stop string is held back until it is known.

    Args:
        decode: token ids to text.
        context: the last tokens before the text.
        stops: the text ends before that of them which ends first in it.
    """

    def __init__(
        self, decode: Callable[[list[int]], str], stops: Sequence[str] = (), context: Sequence[int] = ()
    ) -> None:
        self._stream = TextStream(decode, context)
        self._stops = tuple(stops)
        self._held = ""
        self._tokens: list[tuple[int, Token]] = []
        self.stopped = False

    def add(self, token_id: int, token: Token | None) -> Piece:
        """What ``token_id`` lets out. ``token`` goes with the text that it begins in; None if nobody asks."""
        if token is not None:
            self._tokens.append((len(self._held), token))
        return self._let_out(self._stream.add(token_id))

    def end(self, token: Token | None = None) -> Piece:
        """What is left. ``token`` is that which ended the sequence without being part of its text."""
        piece = self._let_out(self._stream.finish())
        if self.stopped:
            return piece
        rest = Piece(piece.text + self._held, (*piece.tokens, *(token for _, token in self._tokens)))
        self._held, self._tokens = "", []
        return rest if token is None else Piece(rest.text, (*rest.tokens, token))

    def _let_out(self, new: str) -> Piece:
        self._held += new
        # The one that ends first, so that the outcome does not depend on where tokens begin.
        found = sorted((place + len(s), place) for s in self._stops if (place := self._held.find(s)) >= 0)
        self.stopped = bool(found)
        count = found[0][1] if found else len(self._held) - self._longest_beginning()
        text, self._held = self._held[:count], "" if found else self._held[count:]
        tokens = tuple(token for place, token in self._tokens if place < count)
        self._tokens = [] if found else [(place - count, token) for place, token in self._tokens if place >= count]
        return Piece(text, tokens)

    def _longest_beginning(self) -> int:
        """Length of the longest end of the held text that a stop string begins with."""
        longest = min(len(self._held), max((len(stop) - 1 for stop in self._stops), default=0))
        for length in range(longest, 0, -1):
            end = self._held[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0

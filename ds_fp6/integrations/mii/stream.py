"""MII's streams: text from tokens as they come, where a token may end inside a character."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from ds_fp6.integrations.mii.pipeline import check_running
from ds_fp6.integrations.patching import Hook

#: A UTF-8 character has at most 4 bytes, and a token at least one: an older incomplete one is not valid UTF-8.
LONGEST_CHARACTER = 4
REPLACEMENT = "\ufffd"


class TextStream:
    """The text of one stream. Decoding restarts from a token whose text has been given out already.

    ``context`` are tokens before the stream's first: some tokenizers give a text's first token no leading space.
    """

    def __init__(self, decode, context: Sequence[int] = ()) -> None:
        self._decode = decode
        self._context = list(context)
        self._pending: list[int] = []

    def add(self, token: int) -> str:
        """The text that ``token`` completes, which may be none yet."""
        self._pending.append(token)
        text = self._new_text()
        if text.endswith(REPLACEMENT) and len(self._pending) < LONGEST_CHARACTER:
            return ""
        return self._give_out(text)

    def finish(self) -> str:
        """What is still held back."""
        return self._give_out(self._new_text()) if self._pending else ""

    def _new_text(self) -> str:
        known = self._decode(self._context) if self._context else ""
        text = self._decode(self._context + self._pending)
        return text[len(known) :]

    def _give_out(self, text: str) -> str:
        self._context, self._pending = self._pending, []
        return text


def _decode(self, thread_id: int, token_ids: list[int]) -> str:
    stream = self.stream_state.setdefault(thread_id, TextStream(self.tokenizer.decode))
    return "".join(stream.add(int(token)) for token in token_ids)


def _finish(self, thread_id: int) -> str:
    """The end of a stream's text; forgets the stream."""
    stream = self.stream_state.pop(thread_id, None)
    return stream.finish() if stream is not None else ""


def _get_response(upstream):
    from mii.batching.data_classes import Response

    def get_response(self) -> tuple[int, Response]:
        if not self.is_rank_0:
            return upstream(self)
        tid = threading.get_ident()
        result = self.result_queues[tid].get()
        if isinstance(result, BaseException):
            check_running(self)
        uid, tokens, prompt_length, generated_length, finish_reason, streaming = result
        if streaming:
            text = self.readable_stream.decode(tid, tokens) if len(tokens) else self.readable_stream.finish(tid)
        else:
            text = self.tokenizer.decode(tokens) if len(tokens) else ""
        return uid, self.make_response(text, prompt_length, generated_length, finish_reason)

    return get_response


def _replace_stream() -> None:
    from mii.batching.ragged_batching import MIIAsyncPipeline, ReadableStream

    ReadableStream.decode = _decode
    ReadableStream.finish = _finish
    MIIAsyncPipeline.get_response = _get_response(MIIAsyncPipeline.get_response)


HOOKS = (Hook("mii.batching.ragged_batching.ReadableStream", "streams went mute", _replace_stream),)

"""MII's requests: which are accepted, and what becomes of one that has to give its KV cache back."""

from __future__ import annotations

import copy
import itertools

import torch

from ds_fp6.integrations.mii.pipeline import kv_capacity
from ds_fp6.integrations.patching import Hook, wrap

_arrivals = itertools.count(1)


def _make_request(original, self, tid, uid, input_tokens, kwargs):
    """Raises ``ValueError`` for a prompt without tokens, or one that leaves no room for an answer."""
    tokens = len(input_tokens)
    longest = min(self.max_length, kv_capacity(self.inference_engine))
    max_length = kwargs.get("max_length", longest)
    if tokens == 0:
        raise ValueError("the prompt has no tokens: give it some text")
    if max_length > longest:
        raise ValueError(f"max_length {max_length} is more than the {longest} tokens that this pipeline can hold")
    if tokens >= max_length:
        raise ValueError(
            f"the prompt has {tokens} tokens, which leaves no room for an answer within max_length {max_length}"
        )
    new_tokens = kwargs.get("max_new_tokens")
    if new_tokens is not None and new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {new_tokens}")
    request = original(self, tid, uid, input_tokens, kwargs)
    # Who came first keeps its KV cache longest. Copies keep the number, so who starts over keeps its place.
    request.arrival = next(_arrivals)
    _leave_out_what_greedy_ignores(request)
    return request


def _leave_out_what_greedy_ignores(request) -> None:
    """Top-p, for which MII sorts the vocabulary, top-k and temperature leave the likeliest token the likeliest."""
    from mii.batching.constants import SAMPLER_NAME, TEMP_NAME, TOP_K_NAME, TOP_P_NAME

    if f"{SAMPLER_NAME}_greedy" in request.post_processing:
        ignored = (TOP_P_NAME, TOP_K_NAME, TEMP_NAME)
        request.post_processing = [name for name in request.post_processing if not name.startswith(ignored)]


def split(request, tokens: int):
    """Leaves a prompt its first ``tokens`` tokens for the next step. Returns the request of the rest, None if there is
    none."""
    rest = None
    if tokens < len(request.input_tokens):
        rest = copy.copy(request)
        rest.input_tokens, rest.last_in_prompt = request.input_tokens[tokens:], True
        rest.seq_length = request.seq_length + tokens
    request.input_tokens, request.last_in_prompt = request.input_tokens[:tokens], rest is None
    return rest


def start_over(pipeline, request) -> None:
    """Takes the KV cache of a request in ``pipeline.buffer``, all of whose tokens have been read: it waits with those
    as part of its prompt."""
    new = copy.copy(request)
    new.first_prompt = getattr(request, "first_prompt", request.prompt_tokens)
    new.earlier_tokens = getattr(request, "earlier_tokens", []) + request.generated_tokens
    new.prompt_tokens = torch.cat([request.prompt_tokens, *(token.unsqueeze(0) for token in request.generated_tokens)])
    new.input_tokens, new.seq_length, new._generated_tokens = new.prompt_tokens, 0, []
    new.max_new_tokens = request.max_new_tokens - len(request.generated_tokens)
    pipeline.buffer = type(pipeline.buffer)(new if r is request else r for r in pipeline.buffer)
    flush = copy.copy(request)
    flush.input_tokens = None
    pipeline.scheduled_requests.append(flush)


def _flush(_original, self, uids) -> None:
    """Sequences are flushed when they end: where clients ask for it later, there is nothing left to do."""
    for uid in uids:
        if self.inference_engine._state_manager.get_sequence(uid) is not None:
            self.inference_engine.flush(uid)


def _generate_output(original, self, r):
    if hasattr(r, "first_prompt"):
        r = copy.copy(r)
        r.prompt_tokens, r._generated_tokens = r.first_prompt, r.earlier_tokens + r.generated_tokens
    return original(self, r)


def _wrap_requests() -> None:
    from mii.batching.ragged_batching import RaggedBatchBase

    wrap(RaggedBatchBase, "make_request", _make_request)
    wrap(RaggedBatchBase, "flush", _flush)
    wrap(RaggedBatchBase, "_generate_output", _generate_output)


HOOKS = (
    Hook("mii.batching.ragged_batching.RaggedBatchBase", "request checks, starting over", _wrap_requests),
)

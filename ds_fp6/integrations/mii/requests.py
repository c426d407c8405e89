"""MII's requests: which are accepted, and what becomes of one that has to give its KV cache back."""

from __future__ import annotations

import copy

from ds_fp6.integrations.mii.pipeline import kv_capacity
from ds_fp6.integrations.patching import Hook, wrap


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
    _leave_out_what_greedy_ignores(request)
    return request


def _leave_out_what_greedy_ignores(request) -> None:
    """Top-p, for which MII sorts the vocabulary, top-k and temperature leave the likeliest token the likeliest."""
    from mii.batching.constants import SAMPLER_NAME, TEMP_NAME, TOP_K_NAME, TOP_P_NAME

    if f"{SAMPLER_NAME}_greedy" in request.post_processing:
        ignored = (TOP_P_NAME, TOP_K_NAME, TEMP_NAME)
        request.post_processing = [name for name in request.post_processing if not name.startswith(ignored)]


def _reset_request_status(original, self) -> None:
    """Takes the KV cache of the last request that waits with one, which starts over with what it generated so far
    as part of its prompt. If none does, finished sequences are about to give theirs back; MII asserted instead.
    Nothing is taken while tokens are on their way from the device: they would be missing from that prompt.
    """
    if self._flight is not None:
        return
    holders = [r for r in self.buffer if not r.is_flush_request and r.seq_length > 0]
    if not holders and self.inference_engine._state_manager.n_tracked_sequences:
        return
    if not holders:
        waiting = [len(r.input_tokens) for r in self.buffer if not r.is_flush_request]
        raise RuntimeError(
            f"no waiting request can be scheduled: prompts of {waiting} tokens, a KV cache of "
            f"{kv_capacity(self.inference_engine)} tokens with {self.inference_engine.free_blocks} blocks free"
        )
    last = holders[-1]
    last.first_prompt = getattr(last, "first_prompt", last.prompt_tokens)
    last.earlier_tokens = getattr(last, "earlier_tokens", []) + list(last.generated_tokens)
    original(self)


def _schedule_prompts(self, requests) -> None:
    """Schedules waiting prompts in their order, as far as batch and KV cache have room for each as a whole.

    MII's own stops where no block is free, even for the rest of a prompt that needs none any more. With all blocks
    taken by such a prompt it starts it over, and over again.
    """
    engine = self.inference_engine
    limits = engine._config.state_manager
    free_blocks = min(engine.free_blocks)
    for request in requests:
        if request.max_length <= request.seq_length:
            continue
        room = limits.max_ragged_batch_size - self.scheduled_length
        if room <= 0 or len(self.scheduled_requests.requests_to_run) >= limits.max_ragged_sequence_count:
            break
        blocks, waiting = free_blocks - self.scheduled_req_blocks, request.input_tokens
        if engine.query(request.uid, len(waiting), blocks)[0] < len(waiting):
            break
        tokens, new_blocks = engine.query(request.uid, min(len(waiting), room), blocks)
        request.input_tokens, rest = waiting[:tokens], waiting[tokens:]
        request.last_in_prompt = len(rest) == 0
        self.scheduled_requests.append(request)
        self.scheduled_req_blocks += new_blocks
        self.scheduled_length += tokens
        if len(rest):
            remainder = copy.copy(request)
            remainder.input_tokens, remainder.last_in_prompt = rest, True
            remainder.seq_length = request.seq_length + tokens
            self.buffer.appendleft(remainder)


def _generate_output(original, self, r):
    if hasattr(r, "first_prompt"):
        r = copy.copy(r)
        r.prompt_tokens, r._generated_tokens = r.first_prompt, r.earlier_tokens + r.generated_tokens
    return original(self, r)


def _wrap_requests() -> None:
    from mii.batching.ragged_batching import RaggedBatchBase

    wrap(RaggedBatchBase, "make_request", _make_request)
    wrap(RaggedBatchBase, "reset_request_status", _reset_request_status)
    wrap(RaggedBatchBase, "_generate_output", _generate_output)
    RaggedBatchBase._schedule_prompts = _schedule_prompts


HOOKS = (
    Hook("mii.batching.ragged_batching.RaggedBatchBase", "request checks, full caches, starting over", _wrap_requests),
)

"""Which sequences take part in the next step, and which give their share of the KV cache back.

MII lets prompts in as long as a block is free. A sequence that then finds none for its next token stands still, and
only when all of them do does one give its blocks back, to two or three others, which run alone until they want more.
Here

- blocks go to who arrived first;
- who finds none stands still until others end, which costs nothing but its place in the batch. Where more than a
  third would stand still, the one that arrived last gives its blocks back and starts over later, in front of all
  that arrived after it;
- a prompt is let in only if all sequences would then find room for a quarter block's tokens more, so that few have to
  start over. Not for all that they may ever want: they seldom get that long, and never all at once.

So the batch is never much smaller than the cache allows, and whoever arrived first can take what all others have.
"""

from __future__ import annotations

from collections import deque
from operator import attrgetter

from ds_fp6.integrations.mii import cancelling, requests
from ds_fp6.integrations.mii.pipeline import kv_block_size, kv_capacity
from ds_fp6.integrations.patching import Hook, wrap

#: One of so many sequences may stand still: with fewer, more start over; with more, fewer run.
STANDING = 3
#: Newcomers leave others room for one of so many parts of a block: with less, more start over; with more, fewer run.
AHEAD = 4


def schedule_requests(self) -> None:
    """Fills ``scheduled_requests``: first what is flushed, then what goes on from token to token, then prompts."""
    cancelling.drop_cancelled(self)
    while not self.request_queue.empty():
        self.buffer.append(self.request_queue.get_nowait())
    self.scheduled_requests.requests += [request for request in self.buffer if request.is_flush_request]
    waiting = sorted((r for r in self.buffer if not r.is_flush_request), key=attrgetter("arrival"))
    holders = [request for request in waiting if request.seq_length > 0]
    generating = [request for request in holders if request.num_generated_tokens > 0]
    wanting = [r for r in generating if self.inference_engine.get_remaining_block_capacity(r.uid) == 0]
    gave_way = _make_room(self, holders, generating, wanting)
    free = _free_blocks(self, holders)
    _schedule_next_tokens(self, generating, wanting, free)
    prompts = [request for request in holders if request.seq_length < request.prompt_length]
    if not gave_way:  # They come first, and wait for the next step.
        prompts += [request for request in waiting if request.seq_length == 0]
    _schedule_prompts(self, prompts, holders, free)
    if self.buffer and not len(self.scheduled_requests):
        _end_standstill(self, holders)
    scheduled = set(map(id, self.scheduled_requests))
    self.buffer = deque(request for request in self.buffer if id(request) not in scheduled)


def _free_blocks(pipeline, holders: list) -> int:
    """Blocks that are free once the scheduled sequences have been flushed, which comes before a step takes any."""
    engine = pipeline.inference_engine
    flushed = {request.uid for request in pipeline.scheduled_requests.requests_to_flush}
    # A client may ask for a flush and not wait for its end: that one goes on, with new blocks.
    flushed -= {request.uid for request in holders}
    sequences = [engine._state_manager.get_sequence(uid) for uid in flushed]
    return min(engine.free_blocks) + sum(s.cur_allocated_blocks for s in sequences if s is not None)


def _make_room(self, holders: list, generating: list, wanting: list) -> bool:
    """Takes those that are to give way out of the lists, and says whether there are any.

    The lists are by arrival: sequences with blocks, those of them that generate, those of these that want a block.
    """
    free, before = _free_blocks(self, holders), len(holders)
    while STANDING * (len(wanting) - free) > len(holders) and holders[-1] is not wanting[free]:
        last = holders.pop()
        for others in (generating, wanting):
            if others and others[-1] is last:
                others.pop()
        free += _blocks(last.seq_length, kv_block_size(self.inference_engine))
        # While its token is on the way from the device, it only sits the step out.
        if last.fed_row is None:
            requests.start_over(self, last)
    return len(holders) < before


def _schedule_next_tokens(self, generating: list, wanting: list, free: int) -> None:
    """Schedules sequences that generate, as far as there are blocks."""
    limits = self.inference_engine._config.state_manager
    most = min(limits.max_ragged_sequence_count, limits.max_ragged_batch_size)
    waiting = set(map(id, wanting[free:]))
    going = [request for request in generating if id(request) not in waiting][:most]
    self.scheduled_requests.requests += going
    self.scheduled_length += len(going)
    self.scheduled_req_blocks += min(len(wanting), free)


def _schedule_prompts(self, prompts: list, holders: list, free: int) -> None:
    """Schedules prompts in their order, the rests of split ones first, as far as batch and KV cache have room for each
    as a whole."""
    engine = self.inference_engine
    limits, block_size = engine._config.state_manager, kv_block_size(engine)
    running, spare = self.scheduled_length, None
    for request in prompts:
        room = limits.max_ragged_batch_size - self.scheduled_length
        if room <= 0 or running >= limits.max_ragged_sequence_count:
            break
        blocks, prompt = free - self.scheduled_req_blocks, request.input_tokens
        if engine.query(request.uid, len(prompt), blocks)[0] < len(prompt):
            break
        if request.seq_length == 0:
            if spare is None:
                spare = free - sum(_growth(holder, block_size) for holder in holders)
            spare -= _growth(request, block_size)
            if spare < 0 and (running or holders):
                break
        tokens, new_blocks = engine.query(request.uid, min(len(prompt), room), blocks)
        self.scheduled_requests.append(request)
        self.scheduled_req_blocks += new_blocks
        self.scheduled_length += tokens
        running += 1
        rest = requests.split(request, tokens)
        if rest is not None:
            self.buffer.appendleft(rest)


def _blocks(tokens: int, block_size: int) -> int:
    return -(-tokens // block_size)


def _growth(request, block_size: int) -> int:
    """Blocks that a request wants beside its own until the KV cache holds a part of a block's tokens more of it, or all
    that it may have."""
    tokens = max(request.seq_length, request.prompt_length) + block_size // AHEAD
    held = _blocks(request.seq_length, block_size)
    if tokens <= held * block_size:
        return 0
    longest = min(request.prompt_length + request.max_new_tokens - 1, request.max_length)
    return _blocks(min(tokens, longest), block_size) - held


def _end_standstill(self, holders: list) -> None:
    """Nothing can be scheduled, not even a flush. Raises ``RuntimeError`` where that cannot change.

    Nothing is taken while tokens are on their way from the device. If no sequence waits with blocks, finished ones are
    about to give theirs back; MII asserted instead.
    """
    if self._flight is not None:
        return
    if holders:
        requests.start_over(self, holders[-1])
    elif not self.inference_engine._state_manager.n_tracked_sequences:
        waiting = [len(request.input_tokens) for request in self.buffer]
        raise RuntimeError(
            f"no waiting request can be scheduled: prompts of {waiting} tokens, a KV cache of "
            f"{kv_capacity(self.inference_engine)} tokens with {self.inference_engine.free_blocks} blocks free"
        )


def _replace_scheduler() -> None:
    from mii.batching.ragged_batching import RaggedBatchBase

    wrap(RaggedBatchBase, "schedule_requests", lambda upstream, self: schedule_requests(self))


HOOKS = (
    Hook("mii.batching.ragged_batching.RaggedBatchBase.schedule_requests", "a full KV cache", _replace_scheduler),
)

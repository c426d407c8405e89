"""MII's generation loop, with what clients wait for handed over while the device works on the next step.

MII reads a step's tokens, wakes every stream that gets one, decides what runs next, and only then starts it: the
device idles meanwhile, and the woken threads compete with this one for the interpreter. Here a step is started first,
and the tokens of the one before are given out while it runs. What ends a request is given out at once, and its cache
blocks are free for the next step, whenever its client asks for that.
"""

from __future__ import annotations

import functools

from ds_fp6.integrations.mii import cancelling, handover, lookahead
from ds_fp6.integrations.patching import Hook, wrap


def _init(original, self, *args, **kwargs) -> None:
    #: Requests whose last token has yet to be given out.
    self._to_hand_over: list = []
    #: The step whose tokens have not been read, with lookahead.
    self._flight = None
    #: On ranks other than the first, the tokens of the last step, on the device.
    self._last_tokens = None
    cancelling.start(self)
    original(self, *args, **kwargs)
    self._ahead = lookahead.agreed(self.inference_engine)


def _bcast_requests(original, self, force=False):
    """Without other ranks nobody listens: nothing is written as JSON and published."""
    if self.model_config.tensor_parallel == 1:
        return self.scheduled_requests, force
    return original(self, force)


def _from_msg_dict(original, message: dict):
    request = original(message)
    request.fed_row = message.get("fed_row")
    return request


def step(self) -> bool | None:
    """One step of the model. On ranks other than 0, whether it was the last."""
    scheduled, force = self._bcast_requests()
    self.flush(scheduled.requests_to_flush.uids)
    running = scheduled.requests_to_run
    logits = self.put(running.uids, running.tokens) if len(running) else None
    if not self.is_rank_0:
        return force
    self._hand_over()
    self._reset_scheduler_bookkeeping()
    if len(running):
        running.update_seq_length()
        self._accept(running, self._read_later(self._choose_tokens(logits, running)).get())
    self.schedule_requests()
    if not len(self.scheduled_requests.requests_to_run):
        self._hand_over()
    return None


def generate(self) -> bool | None:
    try:
        if self._ahead:
            force = lookahead.step_ahead(self) if self.is_rank_0 else lookahead.follow(self)
        else:
            force = step(self)
    except BaseException:
        self._flight = None
        # What has been generated reaches those who wait for it before the failure does.
        self._hand_over()
        raise
    if self.is_rank_0 and self.profile_model_time:
        self._print_profiled_times()
    return force


def _replace_loop() -> None:
    from mii.batching.data_classes import Request, RequestMsg
    from mii.batching.ragged_batching import RaggedBatchBase
    from mii.batching.utils import profiler

    # Asked for some ten times a step and request; len() of a tensor takes a microsecond.
    Request.prompt_length = property(lambda self: self.prompt_tokens.numel())
    Request.num_generated_tokens = property(lambda self: max(0, self.seq_length - self.prompt_tokens.numel() + 1))
    #: Whether it has ended or was cancelled, though a step with it may be under way.
    Request.has_left = False
    #: The row of the step before whose token it goes on with, where that is on the device only.
    Request.fed_row = RequestMsg.fed_row = None
    wrap(Request, "to_msg_dict", lambda upstream, self: {**upstream(self), "fed_row": self.fed_row})
    RequestMsg.from_msg_dict = staticmethod(functools.partial(_from_msg_dict, RequestMsg.from_msg_dict))
    timed = profiler(generate)
    wrap(RaggedBatchBase, "__init__", _init)
    wrap(RaggedBatchBase, "_bcast_requests", _bcast_requests)
    RaggedBatchBase._forget = cancelling.forget
    RaggedBatchBase._hand_over = handover.hand_over
    RaggedBatchBase._choose_tokens = handover.choose_tokens
    RaggedBatchBase._ended = handover.ended
    RaggedBatchBase._accept = handover.accept
    RaggedBatchBase._read_later = handover.read_later
    wrap(RaggedBatchBase, "generate", lambda upstream, self: timed(self))


HOOKS = (Hook("mii.batching.ragged_batching.RaggedBatchBase.generate", "the device idled", _replace_loop),)

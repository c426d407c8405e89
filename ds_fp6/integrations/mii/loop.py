"""MII's generation loop, with what clients wait for handed over while the device works on the next step.

MII reads a step's tokens, wakes every stream that gets one, decides what runs next, and only then starts it: the
device idles meanwhile, and the woken threads compete with this one for the interpreter. Here a step is started first,
and the tokens of the one before are given out while it runs. What ends a request is given out at once, so its cache
blocks are free as early as ever.
"""

from __future__ import annotations

import torch

from ds_fp6.integrations.deepspeed.batch import device_mark
from ds_fp6.integrations.patching import Hook, wrap


def _init(original, self, *args, **kwargs) -> None:
    #: Requests whose last token has yet to be given out.
    self._to_hand_over: list = []
    original(self, *args, **kwargs)


def _bcast_requests(original, self, force=False):
    """Without other ranks nobody listens: nothing is written as JSON and published."""
    if self.model_config.tensor_parallel == 1:
        return self.scheduled_requests, force
    return original(self, force)


def hand_over(self) -> None:
    """Gives out the tokens that streams are waiting for."""
    requests, self._to_hand_over = self._to_hand_over, []
    for request in requests:
        self._generate_output(request)


def is_idle(pipeline) -> bool:
    """Whether nothing runs or waits for its turn; there may be new requests in the queue."""
    return not len(pipeline.scheduled_requests) and not pipeline.buffer


def choose_tokens(self, logits: torch.Tensor, requests) -> torch.Tensor:
    """A token for each row of ``logits`` [requests, vocabulary], int64 on the device; does not wait for it."""
    logits = self.logit_processor(logits[:, : self.vocab_size], requests, self._post_processors)
    return self.sampler(logits, requests, self._post_processors)


class Reading:
    """A tensor on its way to the host, which is free meanwhile."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._host = tensor.to("cpu", non_blocking=True)
        self._copied = device_mark() if tensor.device.type != "cpu" else None

    def get(self) -> torch.Tensor:
        """The tensor on the host, once it is there."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._host


def read_later(self, tokens: torch.Tensor) -> Reading:
    return Reading(tokens)


def ended(self, tokens: torch.Tensor, requests) -> list[bool]:
    """Whether each of ``tokens``, int64 on the host, fulfils a stop criterion of its request."""
    return self.stop_criterion(tokens, requests, self._post_processors).tolist()


def accept(self, requests, tokens: torch.Tensor) -> None:
    """Gives requests their tokens, int64 [requests] on the host. Those that go on have theirs as their next input."""
    done = self._ended(tokens, requests)
    rows = zip(requests, tokens.unbind(), tokens.split(1), done, strict=True)
    for request, token, as_input, is_done in rows:
        if not request.last_in_prompt:
            continue
        request.next_token, request.is_done = token, is_done
        request.accumulate_generated_token()
        self._num_generated_tokens += 1
        if request.stop_generation:
            self._generate_output(request)
            continue
        request.input_tokens, request.is_done = as_input, False
        self.request_queue.put(request)
        if request.stream:
            self._to_hand_over.append(request)


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
        force = step(self)
    except BaseException:
        # What has been generated reaches those who wait for it before the failure does.
        self._hand_over()
        raise
    if self.is_rank_0 and self.profile_model_time:
        self._print_profiled_times()
    return force


def _replace_loop() -> None:
    from mii.batching.data_classes import Request
    from mii.batching.ragged_batching import RaggedBatchBase
    from mii.batching.utils import profiler

    # Asked for some ten times a step and request; len() of a tensor takes a microsecond.
    Request.prompt_length = property(lambda self: self.prompt_tokens.numel())
    timed = profiler(generate)
    wrap(RaggedBatchBase, "__init__", _init)
    wrap(RaggedBatchBase, "_bcast_requests", _bcast_requests)
    RaggedBatchBase._hand_over = hand_over
    RaggedBatchBase._choose_tokens = choose_tokens
    RaggedBatchBase._ended = ended
    RaggedBatchBase._accept = accept
    RaggedBatchBase._read_later = read_later
    wrap(RaggedBatchBase, "generate", lambda upstream, self: timed(self))


HOOKS = (Hook("mii.batching.ragged_batching.RaggedBatchBase.generate", "the device idled", _replace_loop),)

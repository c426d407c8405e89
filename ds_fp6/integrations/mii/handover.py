"""What a step's tokens go through: they are chosen, read, compared with stop criteria and handed over."""

from __future__ import annotations

import torch

from ds_fp6.integrations.deepspeed.batch import device_mark


def hand_over(self) -> None:
    """Gives out the tokens that streams are waiting for."""
    requests, self._to_hand_over = self._to_hand_over, []
    for request in requests:
        self._generate_output(request)


def is_idle(pipeline) -> bool:
    """Whether nothing runs or waits for its turn; there may be new requests in the queue."""
    return not len(pipeline.scheduled_requests) and not pipeline.buffer and pipeline._flight is None


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


def ends_by_length(request) -> bool:
    """Whether a request may not go on after the token that it gets next."""
    return request.seq_length >= request.max_length or request.num_generated_tokens >= request.max_new_tokens


def accept(self, requests, tokens: torch.Tensor, queue: bool = True) -> None:
    """Gives requests their tokens, int64 [requests] on the host. Those that go on have theirs as their next input.

    ``queue``: whether those are to be queued; they have been otherwise. Requests that left before are passed over.
    """
    done = self._ended(tokens, requests)
    rows = zip(requests, tokens.unbind(), tokens.split(1), done, strict=True)
    for request, token, as_input, is_done in rows:
        if not request.last_in_prompt or request.has_left:
            continue
        request.next_token, request.is_done = token, is_done
        request.accumulate_generated_token()
        self._num_generated_tokens += 1
        if request.stop_generation:
            request.has_left = True
            # Not when its client gets round to it: others wait for its blocks.
            self._queue_flush_request(request.uid)
            self._generate_output(request)
            continue
        request.input_tokens, request.is_done = as_input, False
        if queue:
            # Other threads' requests come by way of a queue, which costs more.
            self.buffer.append(request)
        if request.stream:
            self._to_hand_over.append(request)

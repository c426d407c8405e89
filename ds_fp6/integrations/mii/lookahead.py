"""Steps that are started before the tokens of the step ahead of them are known on the host.

A request goes on unless its token ends it, which is rare. So the next step is scheduled as if all went on, and takes
the tokens on the device, where they were chosen; the host reads them, looks for ends and hands them over while that
step runs. A request that turns out to have ended has one row too many in that step: its result is dropped, and its
cache blocks are freed as usual, after the step on the device's queue. Ends by length are known beforehand.

A request cannot lose its cache while its token is unread, since it starts over with all of them: one that is to sits a
step out first. Where nothing can be scheduled, nothing is, and the tokens are read.

With tensor parallelism the first rank's tokens are broadcast from device to device, and the other ranks are told with
the schedule which of them go where.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass

import torch

from ds_fp6.integrations.deepspeed.accelerator import on_cpu
from ds_fp6.integrations.deepspeed.batch import fed, to_device
from ds_fp6.integrations.mii.handover import Reading, ends_by_length

#: ``1`` or ``0``; unset is 1 on GPUs.
VARIABLE = "DS_FP6_LOOKAHEAD"

#: Stands in for a token that is not known on the host yet.
_UNKNOWN = torch.zeros(1, dtype=torch.int64)


def chosen(cpu: bool) -> tuple[bool, str]:
    """Whether steps are started ahead of their tokens, and why. ``cpu``: whether the engine runs on a CPU, where
    nothing runs beside the host and a token would only come later.

    Raises ``ValueError`` for another value of the variable.
    """
    text = os.environ.get(VARIABLE, "").strip()
    if text not in ("", "0", "1"):
        raise ValueError(f"{VARIABLE} must be 0 or 1, got {text!r}")
    if text:
        return text == "1", f"{VARIABLE}={text}"
    return not cpu, "the engine runs on a CPU" if cpu else "default on a GPU"


def agreed(engine) -> bool:
    """What was chosen. Raises ``ValueError`` in every rank where ranks chose differently."""
    group, use = engine._base_mp_group, chosen(on_cpu())[0]
    ranks = torch.distributed.get_world_size(group=group)
    if ranks > 1:
        choices = [use] * ranks
        torch.distributed.all_gather_object(choices, use, group=group)
        if len(set(choices)) > 1:
            raise ValueError(f"{VARIABLE} must be the same for all ranks, got {[int(choice) for choice in choices]}")
    return use


@dataclass(frozen=True)
class Flight:
    """A step that was started: its requests and how many tokens each of them put in, and the tokens it chooses."""

    requests: list
    lengths: list[int]
    tokens: torch.Tensor
    reading: Reading


def _expect_to_go_on(pipeline, flight: Flight) -> None:
    """Queues the requests of a step that its length does not end; each knows its row in it."""
    for row, (request, length) in enumerate(zip(flight.requests, flight.lengths, strict=True)):
        request.seq_length += length
        if request.last_in_prompt and not request.has_left and not ends_by_length(request):
            request.input_tokens, request.fed_row = _UNKNOWN, row
            pipeline.buffer.append(request)


def _feed(tokens: torch.Tensor | None, requests) -> tuple[torch.Tensor | slice, torch.Tensor] | None:
    """Where ``tokens`` of the step before go among those of the next step's requests, and which of them."""
    places, sources, start = [], [], 0
    for request in requests:
        if request.fed_row is not None:
            places.append(start)
            sources.append(request.fed_row)
        start += len(request.input_tokens)
    if not places:
        return None
    if sources != list(range(len(tokens))):
        tokens = tokens[to_device(sources, tokens.device)]
    if places == list(range(len(places))):
        return slice(len(places)), tokens
    return to_device(places, tokens.device), tokens


def _share(engine, tokens: torch.Tensor) -> torch.Tensor:
    """The first rank's tokens, on every rank's device."""
    if torch.distributed.get_world_size(group=engine._base_mp_group) > 1:
        torch.distributed.broadcast(tokens, src=0, group=engine._base_mp_group)
    return tokens


def _finish(pipeline, flight: Flight | None) -> None:
    """Reads the tokens of a step that was started earlier. Who has ended is not among those who wait any more."""
    pipeline._flight = None
    if flight is not None:
        for request in flight.requests:
            request.fed_row = None
        pipeline._accept(flight.requests, flight.reading.get(), queue=False)
        waiting = (request for request in pipeline.buffer if not request.has_left)
        pipeline.buffer = type(pipeline.buffer)(waiting)


def follow(self) -> bool:
    """A step on a rank other than the first. Whether it was the last."""
    scheduled, force = self._bcast_requests()
    self.flush(scheduled.requests_to_flush.uids)
    running = scheduled.requests_to_run
    if len(running):
        engine = self.inference_engine
        with fed(engine, _feed(self._last_tokens, running)):
            device = self.put(running.uids, running.tokens).device
        self._last_tokens = _share(engine, torch.empty(len(running), dtype=torch.int64, device=device))
    return force


def step_ahead(self) -> None:
    """Starts a step, and finishes the one before. For the first rank."""
    engine, flight = self.inference_engine, self._flight
    if flight is not None:
        _expect_to_go_on(self, flight)
    self._reset_scheduler_bookkeeping()
    self.schedule_requests()
    scheduled, _ = self._bcast_requests()
    self.flush(scheduled.requests_to_flush.uids)
    running = scheduled.requests_to_run
    logits = None
    if len(running):
        lengths = running.lengths
        try:
            with fed(engine, _feed(None if flight is None else flight.tokens, running)):
                logits = self.put(running.uids, running.tokens)
        except BaseException:
            with contextlib.suppress(Exception):
                _finish(self, flight)
            raise
    self._reset_scheduler_bookkeeping()
    _finish(self, flight)
    if logits is not None:
        tokens = _share(engine, self._choose_tokens(logits, running))
        self._flight = Flight(running.requests, lengths, tokens, self._read_later(tokens))
    self._hand_over()

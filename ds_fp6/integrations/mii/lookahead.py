"""Steps that are started before the tokens of the step ahead of them are known on the host.

A request goes on unless its token ends it, which is rare. So the next step is scheduled as if all went on, and takes
the tokens on the device, where they were chosen; the host reads them, looks for ends and hands them over while that
step runs. A request that turns out to have ended has one row too many in that step: its result is dropped, and its
cache blocks are freed as usual, after the step on the device's queue. Ends by length are known beforehand.

A request cannot lose its cache while a step's tokens are unread, since it starts over with all of them: where nothing
else can be scheduled, nothing is, and the tokens are read first.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass

import torch

from ds_fp6.integrations.deepspeed.batch import fed, to_device
from ds_fp6.integrations.mii.handover import Reading, ends_by_length

#: ``1`` or ``0``; unset is 0.
VARIABLE = "DS_FP6_LOOKAHEAD"

#: Stands in for a token that is not known on the host yet.
_UNKNOWN = torch.zeros(1, dtype=torch.int64)


def chosen(ranks: int = 1) -> tuple[bool, str]:
    """Whether steps are started ahead of their tokens, and why or why not. ``ranks``: of the model.

    Raises ``ValueError`` for another value of the variable.
    """
    text = os.environ.get(VARIABLE, "").strip()
    if text not in ("", "0", "1"):
        raise ValueError(f"{VARIABLE} must be 0 or 1, got {text!r}")
    if text != "1":
        return False, f"{VARIABLE}=0" if text else "default"
    if ranks > 1:
        return False, f"only the first of {ranks} ranks has the tokens on its device"
    return True, f"{VARIABLE}=1, without tensor parallelism"


@dataclass(frozen=True)
class Flight:
    """A step that was started: its requests and how many tokens each of them put in, and the tokens it chooses."""

    requests: list
    lengths: list[int]
    tokens: torch.Tensor
    reading: Reading


def _expect_to_go_on(pipeline, flight: Flight) -> dict[int, int]:
    """Queues the requests of a step that its length does not end; their rows in it, by the requests' ids."""
    rows = {}
    for row, (request, length) in enumerate(zip(flight.requests, flight.lengths, strict=True)):
        request.seq_length += length
        if request.last_in_prompt and not request.has_left and not ends_by_length(request):
            request.input_tokens = _UNKNOWN
            pipeline.request_queue.put(request)
            rows[id(request)] = row
    return rows


def _feed(flight: Flight | None, rows: dict[int, int], requests) -> tuple[torch.Tensor | slice, torch.Tensor] | None:
    """Where the tokens of ``flight`` go among those of the next step's requests, and these tokens."""
    places, sources, start = [], [], 0
    for request in requests:
        if id(request) in rows:
            places.append(start)
            sources.append(rows[id(request)])
        start += len(request.input_tokens)
    if not places:
        return None
    tokens = flight.tokens
    if sources != list(range(len(tokens))):
        tokens = tokens[to_device(sources, tokens.device)]
    if places == list(range(len(places))):
        return slice(len(places)), tokens
    return to_device(places, tokens.device), tokens


def _finish(pipeline, flight: Flight | None) -> None:
    """Reads the tokens of a step that was started earlier. Who has ended is not among those who wait any more."""
    pipeline._flight = None
    if flight is not None:
        pipeline._accept(flight.requests, flight.reading.get(), queue=False)
        waiting = (request for request in pipeline.buffer if not request.has_left)
        pipeline.buffer = type(pipeline.buffer)(waiting)


def step_ahead(self) -> None:
    """Starts a step, and finishes the one before."""
    flight = self._flight
    rows = _expect_to_go_on(self, flight) if flight is not None else {}
    self._reset_scheduler_bookkeeping()
    self.schedule_requests()
    self.flush(self.scheduled_requests.requests_to_flush.uids)
    running = self.scheduled_requests.requests_to_run
    logits = None
    if len(running):
        lengths = running.lengths
        try:
            with fed(self.inference_engine, _feed(flight, rows, running)):
                logits = self.put(running.uids, running.tokens)
        except BaseException:
            with contextlib.suppress(Exception):
                _finish(self, flight)
            raise
    self._reset_scheduler_bookkeeping()
    _finish(self, flight)
    if logits is not None:
        tokens = self._choose_tokens(logits, running)
        self._flight = Flight(running.requests, lengths, tokens, self._read_later(tokens))
    self._hand_over()

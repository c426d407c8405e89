"""MII's generation loop with a device that is played, to see how long a device would wait for it.

The engine is a real one, and so are its batches, MII's scheduler and the threads that wait for text. Only the model's
forward is played: by a device that works through its steps one after the other, each for the same time, and whose
tokens can be read once it is done with theirs.
"""

from __future__ import annotations

import os
import statistics
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import mii
import torch
from mii.batching.ragged_batching import MIIAsyncPipeline, RaggedBatchBase
from mii.constants import GenerationFinishReason
from mii.modeling.models import load_model
from mii.modeling.tokenizers import load_tokenizer

from ds_fp6.integrations import load_format as formats
from ds_fp6.integrations import mii as hooks
from ds_fp6.integrations.mii import lookahead

PROMPT_TOKENS, VOCABULARY = 100, 64
#: Seconds before the end of a wait from which on the clock is watched.
WATCH = 3e-4


@dataclass(frozen=True)
class Figure:
    """``idle_us``: the device's wait before a step, the median; ``idle_share``: of such a step and its wait."""

    loop: str
    sequences: int
    stream: bool
    steps: int
    idle_us: float
    idle_share: float


class Device:
    """Works for ``seconds`` on each step it is given, in their order. Counts those of ``sequences`` sequences."""

    def __init__(self, seconds: float, sequences: int) -> None:
        self._seconds, self._sequences = seconds, sequences
        self._free_at, self._steady = 0.0, False
        self.idle: list[float] = []

    def launch(self, sequences: int) -> None:
        now = time.perf_counter()
        if self._steady and sequences == self._sequences:
            self.idle.append(max(0.0, now - self._free_at))
        self._steady = sequences == self._sequences
        self._free_at = max(now, self._free_at) + self._seconds

    @property
    def done_at(self) -> float:
        """When it will have worked through all that it has been given."""
        return self._free_at


def wait(until: float) -> None:
    """Other threads run meanwhile, as they do while CUDA waits."""
    left = until - time.perf_counter()
    if left > WATCH:
        time.sleep(left - WATCH)
    while time.perf_counter() < until:
        time.sleep(0)


class Reading:
    """Stands in for tokens on their way from the device."""

    def __init__(self, tokens: torch.Tensor, until: float) -> None:
        self._tokens, self._until = tokens, until

    def get(self) -> torch.Tensor:
        wait(self._until)
        return self._tokens


def _pipeline(engine, tokenizer, model_config, loop: str, device: Device):
    """A pipeline whose model is played by ``device``. ``loop``: "upstream", MII's own, "plain" or "lookahead"."""

    class Played(MIIAsyncPipeline):
        def _read_later(self, tokens: torch.Tensor) -> Reading:
            return Reading(tokens, device.done_at)

        def _process_logits(self, logits, requests):
            found = super()._process_logits(logits, requests)
            wait(device.done_at)
            return found

    if loop == "upstream":
        Played.generate = RaggedBatchBase.generate.__wrapped__
        Played._bcast_requests = RaggedBatchBase._bcast_requests.__wrapped__
    logits = torch.randn(engine._config.state_manager.max_ragged_sequence_count, VOCABULARY)

    def forward(batch) -> torch.Tensor:
        device.launch(batch.current_sequences)
        return logits[: batch.current_sequences]

    model = engine.model()
    model.forward, model.prepare_batch = forward, lambda batch: None
    before = os.environ.get(lookahead.VARIABLE)
    os.environ[lookahead.VARIABLE] = str(int(loop == "lookahead"))
    try:
        return Played(engine, tokenizer, model_config)
    finally:
        del os.environ[lookahead.VARIABLE]
        if before is not None:
            os.environ[lookahead.VARIABLE] = before


def _client(pipeline, prompt: str, settings: dict) -> None:
    uid = pipeline.put_request(prompt, dict(settings))
    while pipeline.get_response()[1].finish_reason == GenerationFinishReason.NONE:
        pass
    pipeline.flush_uid(uid)


class Bench:
    """An engine of ``model``'s shape with random weights, for up to ``most`` sequences.

    Args:
        new_tokens: of each sequence.
        step_seconds: what the device takes for a step.
    """

    def __init__(self, model: Path, most: int, new_tokens: int, step_seconds: float) -> None:
        hooks.install()
        longest = PROMPT_TOKENS + new_tokens + 64
        limits = {
            "max_ragged_batch_size": most * longest, "max_ragged_sequence_count": most, "max_tracked_sequences": most,
            "max_context": longest, "memory_config": {"mode": "allocate", "size": most * (longest // 64 + 1)},
        }  # fmt: skip
        self._config = mii.config.ModelConfig(
            model_name_or_path=str(model), tokenizer=str(model), inference_engine_config={"state_manager": limits}
        )
        with formats.selected("dummy"):
            self._engine, self._tokenizer = load_model(self._config), load_tokenizer(self._config)
        self._prompt = self._tokenizer.decode(torch.arange(10, 10 + PROMPT_TOKENS) % VOCABULARY)
        self._new_tokens, self._step_seconds = new_tokens, step_seconds

    def measure(self, loop: str, sequences: int, stream: bool) -> Figure:
        """Generates with so many clients. Raises ``ValueError`` if they never all generated in one step."""
        device = Device(self._step_seconds, sequences)
        pipeline = _pipeline(self._engine, self._tokenizer, self._config, loop, device)
        settings = {"max_new_tokens": self._new_tokens, "do_sample": False, "ignore_eos": True, "stream": stream}
        arguments = pipeline, self._prompt, settings
        clients = [threading.Thread(target=_client, args=arguments) for _ in range(sequences)]
        for client in clients:
            client.start()
        pipeline.start()
        for client in clients:
            client.join()
        pipeline.shutdown()
        for uid in list(self._engine._state_manager.tracked_sequences):
            self._engine.flush(uid)
        if not device.idle:
            raise ValueError(f"no step had all {sequences} sequences in {self._new_tokens} steps")
        idle = statistics.median(device.idle)
        return Figure(loop, sequences, stream, len(device.idle), idle * 1e6, idle / (idle + self._step_seconds))

"""MII's async pipeline as a server needs it: requests of token ids with sampling settings of their own, their tokens
one by one, log probabilities, cancellation, and an end.

Rank 0 schedules and samples; other ranks only ``follow``.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mii
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.inference.v2.logging import inference_logger
from deepspeed.inference.v2.ragged.manager_configs import DSStateManagerConfig
from mii.api import _parse_kwargs_to_model_config
from mii.batching.data_classes import RequestBatch
from mii.batching.ragged_batching import MIIAsyncPipeline
from mii.constants import GenerationFinishReason
from mii.modeling.models import load_model
from mii.modeling.tokenizers import load_tokenizer
from transformers import AutoConfig, GenerationConfig

from ds_fp6.integrations import load_format as formats
from ds_fp6.integrations import mii as hooks
from ds_fp6.integrations.deepspeed.batch import to_device
from ds_fp6.integrations.mii import cancelling
from ds_fp6.integrations.mii.handover import is_idle
from ds_fp6.integrations.mii.pipeline import kv_block_size, kv_capacity
from ds_fp6.integrations.mii.prompt_logits import prompt_logits
from ds_fp6.integrations.mii.sampling import LogprobsUnderWay, Sampler, Sampling, TokenLogprobs, choose, token_logprobs

FINISH_REASONS = {GenerationFinishReason.STOP: "stop", GenerationFinishReason.LENGTH: "length"}


@dataclass(frozen=True)
class Step:
    """One generated token. ``finish`` is ``"stop"`` if it ends the text without being part of it, ``"length"`` if
    the sequence may not grow further, else None."""

    token: int
    logprobs: TokenLogprobs | None
    finish: str | None


@dataclass
class ServedSequence:
    """A sequence that is waiting or running. ``prompt_logprobs`` is filled before its first step is delivered."""

    uid: int
    sampler: Sampler
    logprobs: int | None
    top_of_prompt: int | None
    prompt_logprobs: list[TokenLogprobs | None]


_LIKELIEST = Sampler(Sampling(temperature=0.0))

#: Ranks know a sequence by its uid alone, but all must pass the same rows of it through the LM head: the uid's lower
#: bits are the number of its prompt's tokens whose log probabilities are wanted.
SCORED_BITS = 32


def _scored_tokens(uid: int) -> int:
    return uid & ((1 << SCORED_BITS) - 1)


class ServingPipeline(MIIAsyncPipeline):
    """``deliver`` is called in the generation thread, once a step, with (uid, ``Step`` or exception) pairs."""

    def __init__(self, inference_engine, tokenizer, model_config) -> None:
        super().__init__(inference_engine=inference_engine, tokenizer=tokenizer, model_config=model_config)
        limits = inference_engine._config.state_manager
        self.max_length = min(self.max_length, limits.max_context)
        self.vocab_size = min(self.vocab_size, inference_engine.model().vocab_size)
        self.deliver: Callable[[list[tuple[int, Step | BaseException]]], None] = lambda outputs: None
        self.eos_token_ids = eos_token_ids(model_config.model_name_or_path, tokenizer)
        self.failure: BaseException | None = None
        self._numbers = itertools.count(1)
        self._sequences: dict[int, ServedSequence] = {}
        self._outputs: list[tuple[int, Step | BaseException]] = []
        #: Of the last tokens chosen: rows that want log probabilities, and these.
        self._logprobs: tuple[list[int], LogprobsUnderWay] | None = None
        self._work = threading.Event()
        self._ending = False
        self._meet()

    def _meet(self) -> None:
        """Waits until rank 0's requests reach every rank: what is published before that is lost."""
        if self.model_config.tensor_parallel == 1:
            return
        heard = self.is_rank_0
        device = get_accelerator().current_device()
        while True:
            if self.is_rank_0:
                self.socket.send_string(json.dumps({"data": [], "force": False}))
                time.sleep(0.05)
            else:
                heard = heard or bool(self.socket.poll(50))
            everyone = torch.tensor([int(heard)], device=device)
            torch.distributed.all_reduce(everyone, op=torch.distributed.ReduceOp.MIN)
            if everyone.item():
                return

    # Called by other threads.

    def submit(
        self,
        tokens: Sequence[int],
        sampling: Sampling,
        max_new_tokens: int,
        *,
        ignore_eos: bool = False,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
    ) -> ServedSequence:
        """Queues a prompt. Its steps are delivered under the uid of what is returned.

        ``logprobs`` and ``prompt_logprobs`` say how many of the likeliest tokens are reported beside each generated
        and each prompt token; None for no log probabilities. Raises ``ValueError`` for a prompt that does not fit.
        """
        uid = (next(self._numbers) << SCORED_BITS) + (0 if prompt_logprobs is None else len(tokens))
        settings = {"max_new_tokens": max_new_tokens, "ignore_eos": ignore_eos, "stream": True, "do_sample": False}
        settings["max_length"] = self.max_length
        # Constant sampling parameters: MII keeps a processor for every value that it has ever seen.
        request = self.make_request(None, uid, torch.tensor(tokens, dtype=torch.int64), {**settings, "top_p": 1.0})
        sequence = ServedSequence(uid, Sampler(sampling), logprobs, prompt_logprobs, [None] * len(tokens))
        request.sequence = sequence
        with self.lock:
            if self.failure is not None:
                raise RuntimeError(f"generation stopped because of {self.failure}") from self.failure
            self._sequences[uid] = sequence
        self.request_queue.put(request)
        self._work.set()
        return sequence

    def cancel(self, uid: int) -> None:
        """Forgets a sequence and frees its KV blocks, soon. Nothing happens if it has finished."""
        cancelling.cancel(self, uid)
        self._work.set()

    def end(self) -> None:
        """Ends the generation thread, and the loops of other ranks, after the current step."""
        self._ending = True
        self._work.set()

    def fail(self, failure: BaseException) -> None:
        """Gives ``failure`` to all who wait for a sequence, and to all who submit one from now on."""
        with self.lock:
            if self.failure is None:
                self.failure = failure
            waiting, self._sequences = list(self._sequences), {}
        self.deliver([(uid, self.failure) for uid in waiting])

    @property
    def live(self) -> int:
        """Sequences that are waiting or running."""
        return len(self._sequences)

    @property
    def running(self) -> int:
        """Sequences that hold KV blocks."""
        return self.inference_engine._state_manager.n_tracked_sequences

    @property
    def free_blocks(self) -> int:
        return int(min(self.inference_engine.free_blocks))

    @property
    def blocks(self) -> int:
        """KV blocks in all."""
        return kv_capacity(self.inference_engine) // self.block_size

    @property
    def block_size(self) -> int:
        """Tokens that a KV block holds."""
        return kv_block_size(self.inference_engine)

    # The generation thread.

    def __call__(self) -> None:
        try:
            self._run()
        except BaseException as error:
            mii.logging.logger.exception("ds_fp6: generation stopped")
            self.fail(error)

    def _run(self) -> None:
        get_accelerator().set_device(self.local_rank)
        # Sequences without a seed differ from one start of the server to the next.
        torch.seed()
        while not self._ending:
            self._work.clear()
            if self._idle():
                self._work.wait()
                continue
            self.generate()
        self._hand_over()
        self.scheduled_requests = RequestBatch()
        self._bcast_requests(force=True)

    def _idle(self) -> bool:
        busy = self._cancelled or self._ending or not is_idle(self)
        return not busy and self.request_queue.empty()

    def follow(self) -> None:
        """The loop of ranks other than 0, until rank 0 ends."""
        while not self.generate():
            pass

    def _forget(self, uid: int) -> None:
        with self.lock:
            self._sequences.pop(uid, None)
        super()._forget(uid)

    def put(self, uids: list[int], tokenized_input: list[torch.Tensor]) -> torch.Tensor:
        rows, targets = self._scored_rows(uids, tokenized_input)
        if not rows:
            return super().put(uids, tokenized_input)
        read = (lambda start, logits: _read(targets[start : start + len(logits)], logits)) if self.is_rank_0 else None
        with prompt_logits(self.inference_engine, rows, read):
            return super().put(uids, tokenized_input)

    def _scored_rows(self, uids, tokenized_input) -> tuple[list[int], list[_Target]]:
        """The batch's rows after which a scored token comes, and on rank 0 which token that is."""
        rows: list[int] = []
        targets: list[_Target] = []
        start = 0
        for request, uid, tokens in zip(self.scheduled_requests.requests_to_run, uids, tokenized_input, strict=True):
            descriptor = self.inference_engine._state_manager.get_sequence(uid)
            seen = 0 if descriptor is None else descriptor.seen_tokens
            count = max(0, min(len(tokens), _scored_tokens(uid) - 1 - seen))
            rows += range(start, start + count)
            if self.is_rank_0 and count:
                targets += _targets(request, seen + 1, count)
            start += len(tokens)
        return rows, targets

    def _choose_tokens(self, logits: torch.Tensor, requests) -> torch.Tensor:
        """Tokens int64 [requests] on the device. What parts of prompts before the last choose means nothing."""
        samplers = [request.sequence.sampler if request.last_in_prompt else _LIKELIEST for request in requests]
        tokens = choose(logits[:, : self.vocab_size], samplers)
        wanted = [
            row for row, request in enumerate(requests)
            if request.last_in_prompt and request.sequence.logprobs is not None
        ]  # fmt: skip
        if wanted:
            sequences = [request.sequence for request in requests]
            rows = to_device(wanted, logits.device)
            counts = [sequences[row].logprobs for row in wanted]
            self._logprobs = wanted, LogprobsUnderWay(logits[rows], tokens[rows], counts)
        return tokens

    def _accept(self, requests, tokens: torch.Tensor, queue: bool = True) -> None:
        requests = list(requests)
        for request, token in zip(requests, tokens.tolist(), strict=True):
            if request.last_in_prompt:
                request.sequence.sampler.saw(token)
        if self._logprobs is not None:
            (rows, under_way), self._logprobs = self._logprobs, None
            for row, logprobs in zip(rows, under_way.get(), strict=True):
                requests[row].next_logprobs = logprobs
        super()._accept(requests, tokens, queue)

    def _ended(self, tokens: torch.Tensor, requests) -> list[bool]:
        return [token in self.eos_token_ids for token in tokens.tolist()]

    def _hand_over(self) -> None:
        super()._hand_over()
        if self._outputs:
            outputs, self._outputs = self._outputs, []
            self.deliver(outputs)

    def _generate_output(self, r) -> None:
        finish = FINISH_REASONS.get(r.finish_reason)
        self._outputs.append((r.uid, Step(int(r.next_token), getattr(r, "next_logprobs", None), finish)))
        if finish is not None:
            with self.lock:
                self._sequences.pop(r.uid, None)


@dataclass(frozen=True)
class _Target:
    """The prompt token at ``position`` of a sequence."""

    sequence: ServedSequence
    position: int
    token: int


def _targets(request, first: int, count: int) -> list[_Target]:
    """``count`` tokens of a request's prompt, from position ``first``."""
    prompt = getattr(request, "first_prompt", request.prompt_tokens)
    tokens = prompt[first : first + count].tolist()
    return [_Target(request.sequence, first + i, token) for i, token in enumerate(tokens)]


def _read(targets: list[_Target], logits: torch.Tensor) -> None:
    counts = [target.sequence.top_of_prompt for target in targets]
    found = token_logprobs(logits, [target.token for target in targets], counts)
    for target, logprobs in zip(targets, found, strict=True):
        target.sequence.prompt_logprobs[target.position] = logprobs


def eos_token_ids(model: str, tokenizer) -> frozenset[int]:
    """The tokens that end a text: the tokenizer's, and those of the checkpoint's generation_config.json."""
    found = {tokenizer.eos_token_id}
    with contextlib.suppress(OSError):
        more = GenerationConfig.from_pretrained(model).eos_token_id
        found |= set(more) if isinstance(more, (list, tuple)) else {more}
    return frozenset(token for token in found if isinstance(token, int))


def check_length(model: str, max_length: int | None) -> None:
    """Raises ``ValueError`` for sequences longer than the model's positions, before it is loaded."""
    longest = getattr(AutoConfig.from_pretrained(model), "max_position_embeddings", None)
    if None not in (max_length, longest) and max_length > longest:
        raise ValueError(f"max_length {max_length} is more than the model's {longest}")


def open_serving_pipeline(
    model: str | Path,
    quantization_mode: str | None = None,
    *,
    load_format: str = "auto",
    tokenizer: str | Path | None = None,
    tensor_parallel: int = 1,
    max_length: int | None = None,
    state_manager: Mapping[str, Any] | None = None,
) -> ServingPipeline:
    """A pipeline for a server; its generation thread is not started.

    Args:
        model: a checkpoint's directory or a Hugging Face model name.
        load_format: ``"auto"``, or ``"dummy"`` for random weights of the config.json's shapes.
        tokenizer: a directory or name; None for the model's own.
        max_length: most tokens of a sequence, prompt and answer; None for as many as model and KV cache allow.
        state_manager: fields of DeepSpeed's ``DSStateManagerConfig``.

    Raises ``ValueError`` for an unknown mode, load format, model family or degree of tensor parallelism.
    """
    hooks.install()
    inference_logger(logging.WARNING).setLevel(logging.WARNING)
    limits = dict(state_manager or {})
    if max_length is not None:
        limits.setdefault("max_context", max(max_length, DSStateManagerConfig().max_context))
    model_config, _ = _parse_kwargs_to_model_config(
        str(model),
        quantization_mode=quantization_mode,
        tokenizer=str(tokenizer or model),
        tensor_parallel=tensor_parallel,
        max_length=max_length,
        inference_engine_config={"state_manager": limits},
    )
    check_length(model_config.model_name_or_path, max_length)
    with formats.selected(load_format):
        engine = load_model(model_config)
        return ServingPipeline(engine, load_tokenizer(model_config), model_config)

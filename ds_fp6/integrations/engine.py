"""Building a FastGen engine and driving it directly, for tests and benchmarks that need no server or tokenizer."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from deepspeed.inference.v2 import engine_factory
from deepspeed.inference.v2.config_v2 import RaggedInferenceEngineConfig
from deepspeed.inference.v2.engine_v2 import InferenceEngineV2

from ds_fp6.integrations import deepspeed as deepspeed_hooks
from ds_fp6.integrations import load_format as formats
from ds_fp6.integrations.deepspeed.argmax import argmax
from ds_fp6.integrations.deepspeed.batch import fed
from ds_fp6.integrations.mii.handover import Reading


def build_engine(
    model: str | Path,
    quantization_mode: str | None = None,
    load_format: str = "auto",
    tensor_parallel: int = 1,
    **state_manager,
) -> InferenceEngineV2:
    """A FastGen engine of the checkpoint in ``model``, or of its config.json with random weights.

    Args:
        model: a checkpoint's directory; ``load_format="dummy"`` needs only its config.json.
        quantization_mode: such as ``"wf6af16"``; None leaves the linear layers in the checkpoint's dtype.
        tensor_parallel: ranks; the process group must have been started with as many.
        state_manager: fields of DeepSpeed's ``DSStateManagerConfig``, e.g. ``max_context``.

    Raises ``ValueError`` for an unknown mode, load format or model family before weights are read.
    """
    deepspeed_hooks.install()
    config = RaggedInferenceEngineConfig(
        tensor_parallel={"tp_size": tensor_parallel},
        state_manager=state_manager,
        quantization={"quantization_mode": quantization_mode},
    )
    with formats.selected(load_format):
        return engine_factory.build_hf_engine(str(model), config)


def step(engine: InferenceEngineV2, tokens: dict[int, torch.Tensor]) -> torch.Tensor:
    """One forward of new ``tokens`` (int64 [n]) by sequence id; logits [sequences, vocabulary]."""
    return engine.put(list(tokens), list(tokens.values()), do_checks=False)


def fill_cache(engine: InferenceEngineV2, contexts: dict[int, int]) -> None:
    """Starts sequences of random keys and values, as if so many tokens by sequence id had been computed. For
    benchmarks of long contexts: what the sequences then generate means nothing.
    """
    for cache in engine._state_manager._kv_cache._caches:
        cache.normal_()
    for uid, tokens in contexts.items():
        sequence = engine._state_manager.get_or_create_sequence(uid)
        engine.model().maybe_allocate_kv(sequence, tokens)
        sequence.pre_forward(tokens)
        sequence.post_forward()


def greedy_steps(
    engine: InferenceEngineV2, tokens: dict[int, torch.Tensor], prompt: torch.Tensor | None = None, ahead: bool = False
) -> Iterator[torch.Tensor]:
    """Steps without end, each with the tokens int64 [sequences] that the one before chose; yields them on the host.

    Args:
        tokens: the first step's, one by sequence id, of sequences that are in the cache.
        prompt: tokens of one more sequence that each step begins anew; what it chooses comes last and is dropped.
        ahead: whether a step is started before the one before has been read, as the generation loop does with
            lookahead.
    """
    uids, fresh = list(tokens), max(tokens, default=-1) + 1
    batch = {**tokens, **({} if prompt is None else {fresh: prompt})}
    chosen = unread = None
    while True:
        with fed(engine, (slice(len(uids)), chosen[: len(uids)]) if chosen is not None and uids else None):
            chosen = argmax(step(engine, batch))
        if prompt is not None:
            engine.flush(fresh)
        reading = Reading(chosen)
        if not ahead:
            yield reading.get()
        elif unread is not None:
            yield unread.get()
        unread = reading


def generate(
    engine: InferenceEngineV2, prompts: Sequence[torch.Tensor], new_tokens: int
) -> tuple[torch.Tensor, list[float]]:
    """Greedy tokens int64 [sequences, new_tokens], and the seconds that each step took, the prompts' first.

    All prompts must fit in one batch (``max_ragged_batch_size``). The sequences are flushed afterwards.
    """
    tokens = {uid: prompt for uid, prompt in enumerate(prompts)}
    generated, seconds = [], []
    try:
        for _ in range(new_tokens):
            start = time.perf_counter()
            # Reading the chosen tokens waits for the device, which also frees FastGen's pinned batch buffers.
            chosen = argmax(step(engine, tokens)).cpu()
            seconds.append(time.perf_counter() - start)
            generated.append(chosen)
            tokens = {uid: chosen[i : i + 1] for i, uid in enumerate(tokens)}
    finally:
        for uid in range(len(prompts)):
            engine.flush(uid)
    return torch.stack(generated, dim=1), seconds


def parameter_bytes(engine: InferenceEngineV2) -> int:
    """Bytes that the engine's parameters take on this rank, packed codes and their scales included."""
    model = engine.model()
    containers = [*model._transformer, model._non_transformer]
    parameters = [getattr(container, name) for container in containers for name in container.annotation_attrs]
    return sum(
        parameter.nbytes + sum(extra.nbytes for extra in parameter.aux_attrs.values())
        for parameter in parameters
        if parameter is not None
    )

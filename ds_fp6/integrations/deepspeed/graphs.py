"""CUDA graphs of steps.

A batch is filled up to one of some sizes (``filling``). The first step of a size runs as usual and is then captured;
later ones replay it, which spares the host a thousand launches. Steps that take prompts in have many sizes: one that
has come once runs as usual, and is captured when it comes again. Every address that a step uses is the same each time:
the batch's tensors, the modules' outputs and the KV cache are allocated once, and what the step allocates itself lies
in the graphs' own pool.

Steps of models with experts are never captured.
"""

from __future__ import annotations

import contextlib
import os
import re
import weakref
from collections.abc import Callable, Hashable, Iterator
from typing import Protocol

import torch

from ds_fp6.integrations.deepspeed import attention
from ds_fp6.integrations.deepspeed.accelerator import on_cpu
from ds_fp6.integrations.deepspeed.argmax import argmax
from ds_fp6.integrations.deepspeed.filling import Filler, Size, scratch_entries
from ds_fp6.integrations.patching import Hook, wrap

#: ``1``, ``decode`` for steps without prompts only, or ``0``; unset is 1.
VARIABLE = "DS_FP6_CUDA_GRAPHS"

#: How much memory of a GPU graphs may take, such as ``512M``, those of steps with prompts half of it: once they have, no
#: other size is captured. The KV cache leaves it free.
MEMORY_VARIABLE = "DS_FP6_CUDA_GRAPHS_MEMORY"
DEFAULT_MEMORY = "1G"
#: Bytes that a capture leaves free, for steps that run as usual.
HEADROOM = 256 << 20

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}


def chosen(cpu: bool) -> tuple[bool, str]:
    """Whether steps are captured, and why or why not. ``cpu``: whether the engine runs on a CPU.

    Raises ``ValueError`` for another value of the variable, or one that asks for what cannot be had.
    """
    text = os.environ.get(VARIABLE, "").strip()
    if text not in ("", "0", "1", "decode"):
        raise ValueError(f"{VARIABLE} must be 0, 1 or decode, got {text!r}")
    if text == "0":
        return False, f"{VARIABLE}=0"
    choice, why = attention.chosen(cpu)
    problem = "the engine runs on a CPU" if cpu else None
    if problem is None and choice != "triton":
        problem = f"DeepSpeed's attention cannot be captured ({why})"
    if problem and text:
        raise ValueError(f"{VARIABLE}={text} cannot be had: {problem}")
    if problem:
        return False, problem
    return True, f"{VARIABLE}={text}" if text else "default on a GPU"


def takes_prompts() -> bool:
    """Whether steps with prompts are captured as well, where any are."""
    return os.environ.get(VARIABLE, "").strip() != "decode"


def memory_budget() -> int:
    """Bytes that graphs may take. Raises ``ValueError`` for a variable that is no size."""
    text = os.environ.get(MEMORY_VARIABLE, "").strip() or DEFAULT_MEMORY
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMG]?)(i?B)?", text, re.IGNORECASE)
    if match is None:
        raise ValueError(f"{MEMORY_VARIABLE} must be a size such as 512M or 2G, got {text!r}")
    return int(float(match[1]) * _UNITS[match[2].upper()])


class Device(Protocol):
    """What captures a step, and what it costs."""

    def capture(self, run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        """A function that does again what ``run`` does, without calling it, and returns the tensor that it did."""

    def free_bytes(self) -> int:
        """Memory of the device that nobody has, or could not do without."""

    def agree(self, ready: bool) -> bool:
        """Whether all ranks are ready."""


class CudaDevice:
    """Graphs that share one pool of memory: only one of them runs at a time."""

    def __init__(self, group) -> None:
        self._group = group
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()

    def capture(self, run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            # Other threads of this process may call CUDA meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                captured = run()
        finally:
            # NOTE: torch does not come back from a capture that fails at its end, and what is cached for a stream is of
            # no use to another one.
            torch.cuda.set_stream(stream)

        def replay() -> torch.Tensor:
            graph.replay()
            return captured

        return replay

    def free_bytes(self) -> int:
        # As every capture does: what it frees is not to be taken for what it costs.
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]

    def agree(self, ready: bool) -> bool:
        if torch.distributed.get_world_size(group=self._group) == 1:
            return ready
        flag = torch.tensor(int(ready), device="cuda")
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MIN, group=self._group)
        return bool(flag.item())


class StepGraphs:
    """Captured steps of one engine.

    Args:
        run: the model's own forward, from a batch to logits [sequences, vocabulary].
        filler: what fills batches up.
        device: what captures.
        budget: bytes that graphs may take, those of steps with prompts half of it.
        prompts: whether steps with prompts are captured too.
        launches: what a step launches besides what the sizes of its batch say.
    """

    def __init__(
        self, run: Callable, filler: Filler, device: Device, budget: int, prompts: bool = True,
        launches: Callable[[], Hashable] = lambda: None,
    ) -> None:  # fmt: skip
        self._run, self._filler, self._device, self._budget = run, filler, device, budget
        self._prompts, self._launches = prompts, launches
        self._captured: dict[tuple[Size, Hashable], Callable[[], torch.Tensor]] = {}
        #: Steps with prompts that have come once.
        self._seen: set[tuple[Size, Hashable]] = set()
        #: Of all graphs, and of the one that took most.
        self._bytes = self._most_bytes = 0
        #: Whether steps run as usual for now.
        self.paused = False
        #: Why nothing more is captured, None while it is; and why no more steps with prompts are.
        self.closed: str | None = None
        self.closed_to_prompts: str | None = None
        #: Sequences and tokens of the batch in hand that are not filling; None where it has not been filled up.
        self._real: Size | None = None

    @property
    def captured(self) -> tuple[Size, ...]:
        """The sizes that have been captured."""
        return tuple(sorted({size for size, _ in self._captured}))

    def pad(self, batch) -> None:
        """Fills a batch up to a size that is captured or will be.

        To be called once the batch is complete and before it is sent to the device.
        """
        self._real = None
        if self.paused or batch._current_sequences == 0:
            return
        counts = batch._inflight_seq_descriptors_shadow_buf[1::4]
        if not self._prompts and sum(counts) != len(counts):
            return
        size = self._filler.size(counts)
        if size is None or (self._closed(_has_prompts(size)) and size not in self.captured):
            return
        self._real = Size(batch._current_sequences, batch._current_tokens)
        self._filler.fill(batch, size)

    def forward(self, batch) -> torch.Tensor:
        """The model's logits for the batch, from a captured step where there is one."""
        if self._real is None:
            return self._run(batch)
        step = Size(batch._current_sequences, batch._current_tokens), self._launches()
        replay = self._captured.get(step)
        try:
            logits = replay() if replay is not None else self._first(batch, step)
        finally:
            batch._current_sequences, batch._current_tokens = self._real
        return logits[: self._real.sequences]

    def _first(self, batch, step: tuple[Size, Hashable]) -> torch.Tensor:
        """Runs a new step, which also compiles and allocates what it needs, then captures it, if it is to be."""
        logits = self._run(batch)
        size = step[0]
        has_prompts, comes_again = _has_prompts(size), step in self._seen
        self._seen.add(step)
        if self._closed(has_prompts) or (has_prompts and not comes_again):
            return logits
        free = self._device.free_bytes()
        problem = self._shortage(free, has_prompts)
        if not self._device.agree(problem is None):
            self._close(problem or "another rank lacks memory", has_prompts)
            return logits
        try:
            replay = self._device.capture(lambda: self._run(batch))
        except Exception as error:
            problem = f"a step of {size.sequences} sequences, {size.tokens} tokens could not be captured: {error}"
        if not self._device.agree(problem is None):
            self._close(problem or "another rank could not capture", False)
            return logits
        # Once more: a graph gets part of its memory when it is first replayed.
        logits = replay()
        taken = max(0, free - self._device.free_bytes())
        self._bytes, self._most_bytes = self._bytes + taken, max(self._most_bytes, taken)
        self._captured[step] = replay
        return logits

    def _shortage(self, free: int, has_prompts: bool) -> str | None:
        """Why there may be no memory for one more graph, None where there is."""
        budget = self._budget // 2 if has_prompts else self._budget
        if self._bytes + self._most_bytes > budget or self._bytes >= budget:
            return f"they take {self._bytes >> 20} MiB of {budget >> 20} ({MEMORY_VARIABLE})"
        if free < self._most_bytes + HEADROOM:
            return f"{free >> 20} MiB of the GPU's memory are left"
        return None

    def _closed(self, has_prompts: bool) -> bool:
        return self.closed is not None or (has_prompts and self.closed_to_prompts is not None)

    def _close(self, why: str, only_prompts: bool) -> None:
        from deepspeed.utils import logger

        if only_prompts:
            self.closed_to_prompts = why
        else:
            self.closed = why
        kind = " of steps with prompts" if only_prompts else ""
        logger.warning(f"ds_fp6: no more CUDA graphs{kind} than these {len(self._captured)}: {why}")


def _has_prompts(size: Size) -> bool:
    return size.tokens != size.sequences


def model_problem(model) -> str | None:
    """Why the steps of a model cannot be captured, None where they can."""
    from deepspeed.inference.v2.model_implementations.inference_transformer_base import DSMoETransformerModelBase

    if isinstance(model, DSMoETransformerModelBase):
        return "the model has experts"
    if type(model.attn).__name__ != "TritonAttention":
        return "the model runs DeepSpeed's attention"
    return None


def attach(engine, device: Device, budget: int | None = None) -> StepGraphs:
    """Lets an ``InferenceEngineV2`` capture and replay its steps from now on.

    Takes one block of the engine's KV cache. Raises ``ValueError`` where none is free.
    """
    state = engine._state_manager
    limits = engine._config.state_manager
    block = state.allocate_blocks(1)
    state._kv_cache._reserved_blocks = 1
    tokens = limits.max_ragged_batch_size
    entries = scratch_entries(tokens, engine._model.attn.kv_block_size)
    scratch = block.to(device=state.get_cache(0).device, dtype=torch.int32).repeat(entries)
    # The model has the graphs, so these must not keep it alive.
    model = weakref.ref(engine._model)
    graphs = StepGraphs(
        lambda batch: type(model()).forward(model(), batch),
        Filler(limits.max_ragged_sequence_count, tokens, scratch.data_ptr(), engine._model.max_sequence_length), device,
        memory_budget() if budget is None else budget, takes_prompts(),
        lambda: getattr(model().attn, "launches", None),
    )  # fmt: skip
    graphs.scratch_list = scratch
    engine._batch._padder = graphs
    engine._model.forward = graphs.forward
    return graphs


@contextlib.contextmanager
def paused(engine) -> Iterator[None]:
    """Within it, no step of an ``InferenceEngineV2`` is captured or replayed."""
    graphs = getattr(engine._batch, "_padder", None)
    if graphs is None:
        yield
        return
    graphs.paused = True
    try:
        yield
    finally:
        graphs.paused = False


def warm_up(engine) -> None:
    """Runs a batch of every kind, so that kernels are compiled before the first request rather than by it.

    Leaves no sequence behind. Every rank must call it.
    """
    limits = engine._config.state_manager
    most = min(limits.max_ragged_sequence_count, limits.max_tracked_sequences, min(engine.free_blocks))
    room = limits.max_ragged_batch_size
    prompt, token = torch.zeros(2, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    batches = [{0: prompt}] * (room >= 2) + [{0: token}] + [{0: token, 1: prompt}] * (room >= 3 and most >= 2)
    for batch in batches:
        logits = engine.put(list(batch), list(batch.values()), do_checks=False)
    # Tokens are chosen among logits as they are, or in fp32 where there is more to it than the largest.
    for values in (logits, logits.float()):
        argmax(values)
    if room >= 2 and hasattr(engine._model.attn, "long_prompt"):
        # The kernel for long prompts has another tile.
        kept, engine._model.attn.long_prompt = engine._model.attn.long_prompt, 0
        engine.put([0], [prompt], do_checks=False)
        engine._model.attn.long_prompt = kept
    for uid in list(engine._state_manager.tracked_sequences):
        engine.flush(uid)


def reserved_blocks(kv_cache) -> int:
    """Blocks of a ``BlockedKVCache`` that no sequence can have."""
    return getattr(kv_cache, "_reserved_blocks", 0)


def _init_engine(original, self, policy, engine_config) -> None:
    original(self, policy, engine_config)
    from deepspeed.utils import logger

    use, why = chosen(on_cpu())
    problem = model_problem(self._model) if use else why
    if use and problem is None and min(self._state_manager.free_blocks) < 2:
        problem = "the KV cache has no block to spare"
    if problem is None:
        attach(self, CudaDevice(self._base_mp_group))
    elif use:
        logger.warning(f"ds_fp6: steps are not captured: {problem}")
    if not on_cpu():
        warm_up(self)


def _init_cache(original, self, configs, memory_config, mp_group=None, offload=False) -> None:
    """A cache of a given number of blocks gets one more for filling; one that takes what is there leaves graphs theirs."""
    from deepspeed.inference.v2.ragged.manager_configs import AllocationMode, MemoryConfig

    if chosen(on_cpu())[0]:
        mode = AllocationMode(memory_config.mode)
        more = 1 if mode is AllocationMode.ALLOCATE else memory_budget()
        memory_config = MemoryConfig(mode=mode, size=memory_config.size + more)
    original(self, configs, memory_config, mp_group=mp_group, offload=offload)


def blas_linear(out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``out = x · weightᵀ`` on torch's current stream: x [..., K], weight [N, K], out [..., N or wider].

    DeepSpeed's own always runs on the default stream, where it would not be captured.
    """
    weight = weight.as_subclass(torch.Tensor)
    torch.mm(
        x.reshape(-1, x.shape[-1]), weight.t(), out=out.view(-1, out.shape[-1])[:, : weight.shape[0]]
    )  # fmt: skip
    return out


def _init_blas(original, self, fp_dtype) -> None:
    original(self, fp_dtype)
    if chosen(on_cpu())[0]:
        self.kernel = blas_linear


def _wrap_engine() -> None:
    from deepspeed.inference.v2.engine_v2 import InferenceEngineV2
    from deepspeed.inference.v2.kernels.core_ops import BlasLibLinear
    from deepspeed.inference.v2.ragged.kv_cache import BlockedKVCache

    wrap(InferenceEngineV2, "__init__", _init_engine)
    wrap(BlockedKVCache, "__init__", _init_cache)
    wrap(BlasLibLinear, "__init__", _init_blas)


HOOKS = (
    Hook("InferenceEngineV2.__init__, BlasLibLinear", "GPU: steps are captured and replayed", _wrap_engine),
)

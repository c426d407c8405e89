"""``python -m ds_fp6.bench attention``: the attention kernels by themselves, against what the hardware would need.

A decode case is one launch for a batch of sequences: rotary embedding, cache write and attention; its floor is reading
the keys and values. A prompt case is the attention of sequences that begin; its floor is its operations, half of them
masked. Caches take turns, so that none is read from the L2. Every case is checked against fp64.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from ds_fp6.bench import models
from ds_fp6.bench.linear_cuda import CACHES, measure_ceilings, race_replays

#: Batch and context of decode cases, sequences and tokens of prompt cases.
DECODE = "1x128,1x700,1x8192,8x4096,32x700,128x500"
PROMPTS = "1x512,32x100,1x2048"

#: Largest error over the largest value, by type.
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


class Heads(NamedTuple):
    """Query heads, key/value heads and channels of a head."""

    query: int
    kv: int
    size: int

    @classmethod
    def of(cls, model: str) -> Heads:
        config = models.CONFIGS[model]
        query = config["num_attention_heads"]
        return cls(query, config.get("num_key_value_heads", query), config["hidden_size"] // query)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="llama-2-70b", choices=sorted(models.CONFIGS), help="whose heads to take")
    decode = "batches and contexts of decode steps; default %(default)s"
    parser.add_argument("--decode", type=_pairs, default=_pairs(DECODE), metavar="NxN,NxN", help=decode)
    prompts = "sequences and tokens of prompts; default %(default)s"
    parser.add_argument("--prompts", type=_pairs, default=_pairs(PROMPTS), metavar="NxN,NxN", help=prompts)
    parser.add_argument("--dtype", choices=DTYPES, default="fp16")
    parser.add_argument("--json", type=Path, help="write the figures to this file")


def _pairs(text: str) -> list[tuple[int, int]]:
    try:
        pairs = [tuple(int(number) for number in part.split("x")) for part in text.split(",") if part]
        if all(len(pair) == 2 and min(pair) > 0 for pair in pairs):
            return pairs
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"must be pairs such as 1x128,32x700, got {text!r}")


def run(args: argparse.Namespace) -> int:
    """Prints the table; 1 if a result is wrong, 2 without a GPU or Triton."""
    from ds_fp6 import triton_ops

    problem = None if torch.cuda.is_available() else "torch sees no NVIDIA GPU"
    problem = problem or triton_ops.problem()
    if problem:
        print(f"attention: {problem}", file=sys.stderr)
        return 2
    heads, dtype = Heads.of(args.model), DTYPES[args.dtype]
    ceilings = measure_ceilings(dtype)
    torch.cuda.empty_cache()
    print(f"{torch.cuda.get_device_name()}: {heads.query}/{heads.kv} heads of {heads.size}, {args.dtype}")
    print(f"{'case':8} {'batch':>6} {'tokens':>7} {'µs':>9} {'floor':>9} {'of floor':>9}")
    figures, wrong = [], 0
    for case, pairs in (("decode", args.decode), ("prompt", args.prompts)):
        for batch, tokens in pairs:
            work = Work(heads, batch, tokens, case == "decode", dtype, "cuda", _copies(heads, batch, tokens))
            seconds = race_replays({case: work.launch}, work.copies)[case]
            floor = floor_seconds(heads, batch, tokens, case == "decode", ceilings.bandwidth, ceilings.operations)
            error = work.error()
            agrees = error <= TOLERANCE[dtype]
            wrong += not agrees
            print(
                f"{case:8} {batch:6} {tokens:7} {seconds * 1e6:9.2f} {floor * 1e6:9.2f} {floor / seconds:9.1%}"
                + ("" if agrees else f"  wrong by {error:.2g} of the largest value"),
                flush=True,
            )
            figures.append({"case": case, "batch": batch, "tokens": tokens, "seconds": seconds, "floor": floor})
            del work
            torch.cuda.empty_cache()
    if args.json:
        report = {"heads": heads._asdict(), "dtype": args.dtype, "ceilings": dataclasses.asdict(ceilings), "cases": figures}
        args.json.write_text(json.dumps(report, indent=2))
    return 1 if wrong else 0


def floor_seconds(
    heads: Heads, batch: int, tokens: int, decode: bool, bandwidth: float, operations: float
) -> float:  # fmt: skip
    """Of a decode step with ``tokens`` in each cache, or of prompts of as many tokens."""
    if decode:
        return batch * tokens * heads.kv * heads.size * 2 * 2 / bandwidth
    return 4 * batch * heads.query * heads.size * (tokens * (tokens + 1) / 2) / operations


def _copies(heads: Heads, batch: int, tokens: int) -> int:
    """Caches that together exceed the L2."""
    cache = torch.cuda.get_device_properties().L2_cache_size
    return max(4, min(40, 1 + CACHES * cache // (batch * tokens * heads.kv * heads.size * 4)))


class Work:
    """A batch of equal sequences on random caches, and the kernel that serves it.

    Args:
        tokens: positions of each sequence; all but the last are in the cache where ``decode``, none where not.
        copies: caches that launches take in turn.
    """

    def __init__(
        self, heads: Heads, batch: int, tokens: int, decode: bool, dtype: torch.dtype, device: str, copies: int
    ) -> None:  # fmt: skip
        from ds_fp6.triton_ops.decode import DecodeWorkspace

        self.heads, self.tokens, self.decode, self.copies = heads, tokens, decode, copies
        page = 128 if heads.size <= 64 else 64
        blocks, new = math.ceil(tokens / page), 1 if decode else tokens
        self._lists = torch.randperm(batch * blocks, device=device).int().view(batch, blocks)
        addresses = [self._lists[i].data_ptr() for i in range(batch)]
        self._pointers = torch.tensor(addresses, dtype=torch.int64, device=device)
        sequences = [[i * new, new, tokens - new, 0] for i in range(batch)]
        self._sequences = torch.tensor(sequences, dtype=torch.int32, device=device)
        shape = (batch * blocks, page, 2, heads.kv, heads.size)
        self._caches = [torch.randn(shape, device=device).to(dtype) for _ in range(copies)]
        self._qkv = torch.randn((batch * new, (heads.query + 2 * heads.kv) * heads.size), device=device).to(dtype)
        self._q = self._qkv[:, : heads.query * heads.size]
        self._out = torch.empty((batch * new, heads.query * heads.size), dtype=dtype, device=device)
        self._frequencies = 10000.0 ** (-torch.arange(0, heads.size, 2, device=device).float() / heads.size)
        self._workspace = DecodeWorkspace(batch, heads.kv, heads.query // heads.kv, heads.size, device)

    def launch(self, turn: int) -> None:
        """One layer's attention, on the turn's cache."""
        self._launch(turn, self._frequencies)

    def _launch(self, turn: int, frequencies: torch.Tensor | None) -> None:
        from ds_fp6.triton_ops import plan
        from ds_fp6.triton_ops.decode import decode_attention
        from ds_fp6.triton_ops.prefill import prefill_attention

        cache, scale = self._caches[turn % self.copies], self.heads.size**-0.5
        batch = self._sequences, self._pointers
        if self.decode:
            decode_attention(self._out, self._qkv, cache, frequencies, *batch, scale, None, self._workspace)
        else:
            long = self.tokens >= plan.LONG_PROMPT
            prefill_attention(self._out, self._q, cache, *batch, scale, None, long=long)

    def error(self) -> float:
        """Of the last sequence's last query, without rotation, the largest over the largest value, by fp64."""
        self._launch(0, None)
        entries = self._caches[0][self._lists[-1].long()].flatten(0, 1)[: self.tokens].double()
        keys, values = (part.repeat_interleave(self.heads.query // self.heads.kv, 1) for part in entries.unbind(1))
        query = self._q[-1].view(self.heads.query, self.heads.size).double()
        weights = torch.einsum("hd,thd->ht", query, keys).mul(self.heads.size**-0.5).softmax(-1)
        expected = torch.einsum("ht,thd->hd", weights, values)
        found = self._out[-1].view_as(expected).double()
        error = (found - expected).abs().max() / expected.abs().max()
        return error.nan_to_num(math.inf).item()

"""``python -m ds_fp6.bench quantize``: the fused quantize-and-pack kernel, in bytes of 16-bit weights read a second.

Weights alternate between copies that together exceed the cache, a model reads each once. Every layer's result is
checked: the codes, unpacked, times the scales must be the reference's quantization of sampled rows, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from ds_fp6.bench import models
from ds_fp6.formats import Format, Mode
from ds_fp6.quantize import dequantize_reference, quantize, quantize_reference

#: Bytes that the copies of a weight hold together, beyond any cache; runs, of which the median counts; rows checked.
COPIES_BYTES, RUNS, CHECKED_ROWS = 1 << 30, 9, 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="llama-2-70b", choices=sorted(models.CONFIGS))
    parser.add_argument("--tp", type=int, default=1, help="layers of one of so many ranks")
    parser.add_argument(
        "--quantization-mode", default="wf6af16",
        help="format, group size and the 16-bit type of weights and, on a GPU, layout, such as wf6af16g128",
    )  # fmt: skip
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--json", type=Path, help="write the figures to this file")


def run(args: argparse.Namespace) -> int:
    """Prints the table; 1 if a result is wrong, 2 if there is no such device."""
    if args.device == "cuda" and not torch.cuda.is_available():
        print("--device cuda: torch sees no NVIDIA GPU", file=sys.stderr)
        return 2
    mode = Mode.parse(args.quantization_mode)
    fmt, group_size = mode.format, mode.group_size
    dtype = torch.bfloat16 if mode.activation == "bfloat16" else torch.float16
    torch.manual_seed(0)
    clock = _gpu_seconds if args.device == "cuda" else _cpu_seconds
    figures, wrong = [], 0
    print(f"{'layer':8} {'N':>6} {'K':>6} {'µs':>10} {'GB/s of 16-bit weights':>23}")
    for layer in models.linear_shapes(args.model, args.tp):
        count = max(1, COPIES_BYTES // (2 * layer.n * layer.k)) if args.device == "cuda" else 1
        weights = [torch.randn((layer.n, layer.k), device=args.device).to(dtype) for _ in range(count)]
        seconds = clock(lambda copy: quantize(weights[copy % count], fmt, group_size))
        rate = weights[0].nbytes / seconds
        figures.append({"layer": layer.name, "n": layer.n, "k": layer.k, "seconds": seconds, "bytes_per_second": rate})
        print(f"{layer.name:8} {layer.n:6} {layer.k:6} {seconds * 1e6:10.1f} {rate / 1e9:23.1f}")
        wrong += not _agrees(weights[0], fmt, group_size, layer.name)
    total = sum(f["seconds"] for f in figures), sum(2 * f["n"] * f["k"] for f in figures)
    print(f"{'all':22} {total[0] * 1e6:10.1f} {total[1] / total[0] / 1e9:23.1f}")
    if args.json:
        report = {"mode": args.quantization_mode, "device": args.device, "layers": figures}
        args.json.write_text(json.dumps(report, indent=2))
    return 1 if wrong else 0


def _cpu_seconds(work: Callable[[int], object]) -> float:
    times = []
    for turn in range(RUNS):
        start = time.perf_counter()
        work(turn)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def _gpu_seconds(work: Callable[[int], object]) -> float:
    """From the call to its return: quantization reads back whether all weights were finite, so it waits for the GPU."""
    torch.cuda.synchronize()
    return _cpu_seconds(work)


def _agrees(weight: torch.Tensor, fmt: Format, group_size: int, layer: str) -> bool:
    """Whether sampled rows of the kernel's weight are what the reference makes of them."""
    rows = torch.randperm(len(weight))[:CHECKED_ROWS].sort().values.to(weight.device)
    packed, scales = quantize(weight, fmt, group_size)
    actual = torch.ops.ds_fp6.dequantize(
        packed, scales, fmt.exponent_bits, fmt.mantissa_bits, group_size, weight.shape[1], torch.float32
    )[rows].cpu()
    codes, expected_scales = quantize_reference(weight[rows].cpu(), fmt, group_size)
    same = torch.equal(actual, dequantize_reference(codes, expected_scales, fmt, group_size))
    if not same:
        print(f"WRONG: {layer}: rows quantized by the kernel differ from the reference", file=sys.stderr)
    return same

"""``python -m ds_fp6.bench load``: what quantizing while loading adds to reading a checkpoint.

Makes a checkpoint of the size asked for in a scratch directory, then times, from a warm page cache, reading every
tensor onto the device, and building the engine that quantizes and packs them.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch

from ds_fp6.bench import models
from ds_fp6.bench.memory import PeakMemory


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="llama-2-70b", help=f"layers of this shape: {', '.join(models.CONFIGS)}")
    parser.add_argument("--gigabytes", type=float, default=10.0, help="size of the checkpoint, default %(default)s")
    parser.add_argument("--quantization-mode", default="wf6af16")
    parser.add_argument("--directory", type=Path, help="where to make the checkpoint, default a temporary directory")
    parser.add_argument("--json", type=Path, help="write the figures to this file")


def run(args: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory(dir=args.directory) as scratch:
        written = write_checkpoint(Path(scratch), args.model, int(args.gigabytes * 1e9))
        read_seconds = min(_time_reading(Path(scratch)) for _ in range(3))
        memory = PeakMemory()
        load_seconds, packed_bytes = _time_loading(Path(scratch), args.quantization_mode)
        figures = {
            "model": args.model, "mode": args.quantization_mode, "checkpoint_bytes": written,
            "read_seconds": read_seconds, "load_seconds": load_seconds,
            "added": load_seconds / read_seconds - 1, "model_bytes": packed_bytes, "peak_load_bytes": memory.peak(),
        }  # fmt: skip
    print(f"checkpoint         {written / 1e9:8.2f} GB, layers of {args.model}")
    print(f"reading            {read_seconds:8.2f} s  ({written / read_seconds / 1e9:.1f} GB/s to the device)")
    print(f"loading, {args.quantization_mode:9} {load_seconds:8.2f} s  ({figures['added']:+.1%})")
    print(f"model              {packed_bytes / 1e9:8.2f} GB; peak while loading {memory.peak() / 1e9:.2f} GB {memory.kind}")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2))
    return 0


def write_checkpoint(directory: Path, model: str, size: int) -> int:
    """Random bf16 weights of as many layers as ``size`` bytes hold, a shard a layer; returns the bytes written."""
    from safetensors.torch import save_file

    from ds_fp6.integrations.dummy import layer_tensors

    config = dict(models.config(model), torch_dtype="bfloat16")
    weight_map, written = {}, 0
    shards = layer_tensors(config, lambda shape: torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02))
    layers = 0
    for prefix, tensors in shards:
        if prefix is not None and written >= size:
            break
        shard = f"model-{len(set(weight_map.values())):05d}.safetensors"
        save_file(tensors, directory / shard)
        weight_map |= dict.fromkeys(tensors, shard)
        written += sum(tensor.nbytes for tensor in tensors.values())
        layers += prefix is not None
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (directory / "config.json").write_text(json.dumps(dict(config, num_hidden_layers=layers)))
    return written


def _time_reading(directory: Path) -> float:
    from safetensors import safe_open

    device = "cuda" if torch.cuda.is_available() else "cpu"
    start = time.perf_counter()
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                # A copy on either device: a mapped tensor has not been read yet.
                torch.empty_like(file.get_tensor(name), device=device).copy_(file.get_tensor(name))
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _time_loading(directory: Path, mode: str) -> tuple[float, int]:
    from ds_fp6 import ops
    from ds_fp6.integrations.engine import build_engine, parameter_bytes

    # Neither compiling nor loading the kernels is part of reading a checkpoint.
    ops.load("CUDA" if torch.cuda.is_available() else "CPU")
    start = time.perf_counter()
    engine = build_engine(
        directory, None if mode == "none" else mode, max_context=128, max_ragged_sequence_count=1,
        memory_config={"mode": "allocate", "size": 4},
    )  # fmt: skip
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, parameter_bytes(engine)

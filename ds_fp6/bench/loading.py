"""``python -m ds_fp6.bench loading``: how much longer loading a checkpoint takes than reading it.

Writes a random checkpoint of a model's shape, then times, from a warm page cache: reading its files, moving its
tensors to the device one by one, and loading it into an engine, which also joins, quantizes and packs them.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from ds_fp6.bench import models
from ds_fp6.bench.memory import PeakMemory

READ_BYTES = 16 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="llama-2-7b", choices=sorted(models.CONFIGS))
    parser.add_argument("--layers", type=int, help="only the first so many transformer layers")
    parser.add_argument("--quantization-mode", default="wf6af16", help="'none' for 16-bit weights")
    parser.add_argument("--directory", type=Path, help="write the checkpoint there, and keep it; else a temporary one")
    parser.add_argument("--repeat", type=int, default=3, help="take the best of so many runs")
    parser.add_argument("--json", type=Path, help="write the figures to this file")


def run(args: argparse.Namespace) -> int:
    config = dict(models.config(args.model))
    if args.layers:
        config["num_hidden_layers"] = args.layers
    if args.directory:
        return _measure(args, config, args.directory)
    with tempfile.TemporaryDirectory() as scratch:
        return _measure(args, config, Path(scratch))


def _measure(args: argparse.Namespace, config: dict, directory: Path) -> int:
    # DeepSpeed is imported after the arguments have been read.
    from ds_fp6.integrations.engine import build_engine

    mode = None if args.quantization_mode == "none" else args.quantization_mode
    if not (directory / "config.json").exists():
        write_checkpoint(config, directory)
    size = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    state = dict(max_context=128, max_ragged_batch_size=32, max_ragged_sequence_count=2)
    state["memory_config"] = {"mode": "allocate", "size": 2}
    memory = PeakMemory()
    seconds = {
        "read": _best(lambda: _read_files(directory), args.repeat),
        "move": _best(lambda: _move_tensors(directory), args.repeat),
        "load": _best(lambda: build_engine(directory, mode, **state), args.repeat),
    }
    figures = {"model": args.model, "mode": args.quantization_mode, "bytes": size, "seconds": seconds}
    figures["peak_bytes"] = memory.peak()
    print(f"{args.model}, {config['num_hidden_layers']} layers, {size / 1e9:.1f} GB, {args.quantization_mode}")
    for name, elapsed in seconds.items():
        rate, relative = size / elapsed / 1e9, elapsed / seconds["move"]
        print(f"{name:>5} {elapsed:8.2f} s {rate:7.2f} GB/s {relative:6.2f} x the moving of its tensors")
    print(f"peak {memory.peak() / 2**30:.2f} GiB {memory.kind}")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2))
    return 0


def _best(work: Callable[[], object], repeat: int) -> float:
    """Seconds of the fastest of ``repeat`` runs."""
    times = []
    for _ in range(repeat):
        gc.collect()
        start = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


def _read_files(directory: Path) -> None:
    buffer = bytearray(READ_BYTES)
    for path in sorted(directory.glob("*.safetensors")):
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def _move_tensors(directory: Path) -> None:
    from ds_fp6.integrations.checkpoint.files import Checkpoint

    checkpoint = Checkpoint(directory)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name in checkpoint:
        torch.empty_like(stored := checkpoint.read(name), device=device).copy_(stored)


def write_checkpoint(config: dict, directory: Path) -> None:
    """Random weights in fp16 safetensors, a shard to each layer; prints the progress."""
    from safetensors.torch import save_file
    from tqdm import tqdm

    from ds_fp6.integrations.dummy import checkpoint_shapes

    directory.mkdir(parents=True, exist_ok=True)
    shards = list(_shards(checkpoint_shapes(config)))
    noise = torch.randn(max(torch.Size(s).numel() for shard in shards for s in shard.values()), dtype=torch.float16)
    noise *= 0.02
    weight_map = {}
    for i, shard in enumerate(tqdm(shards, desc="writing a checkpoint", unit="shard")):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: noise[: torch.Size(s).numel()].view(s).clone() for name, s in shard.items()}, directory / file)
        weight_map |= dict.fromkeys(shard, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (directory / "config.json").write_text(json.dumps(config))


def _shards(shapes: Iterator[tuple[str, tuple[int, ...]]]) -> Iterator[dict[str, tuple[int, ...]]]:
    """Names and shapes in groups of one layer, the tensors outside of the layers apart."""
    groups: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes:
        numbers = [part for part in name.split(".") if part.isdigit()]
        groups.setdefault(numbers[0] if numbers else "", {})[name] = shape
    yield from groups.values()

"""``python -m ds_fp6.bench generate``: loads a model of any shape with random weights and generates with it.

Prints load time, peak memory and tokens per second at each batch size, so that a claim about a 70B model can be
checked on one device without its checkpoint.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from ds_fp6.bench import arguments, models
from ds_fp6.bench.memory import PeakMemory


def add_arguments(parser: argparse.ArgumentParser) -> None:
    shapes = ", ".join(models.CONFIGS)
    parser.add_argument("--model", default="llama-2-70b", help=f"a directory with config.json, or one of: {shapes}")
    parser.add_argument("--quantization-mode", default="wf6af16", help="'none' for 16-bit weights")
    parser.add_argument("--load-format", default="dummy", choices=["dummy", "auto"])
    parser.add_argument("--batch", type=arguments.integers, default=[1, 8, 32], help="batch sizes, comma-separated")
    parser.add_argument("--prompt-length", type=int, default=100, help="tokens in each prompt")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens to generate for each prompt")
    parser.add_argument("--layers", type=int, help="only the first so many transformer layers")
    parser.add_argument("--json", type=Path, help="write the figures to this file")


def run(args: argparse.Namespace) -> int:
    # DeepSpeed is imported by the first use of the engine, after the arguments have been read.
    from ds_fp6.integrations.engine import build_engine, generate, parameter_bytes

    mode = None if args.quantization_mode == "none" else args.quantization_mode
    longest = args.prompt_length + args.new_tokens
    with tempfile.TemporaryDirectory() as scratch:
        directory = _config_directory(args, Path(scratch))
        memory = PeakMemory()
        start = time.perf_counter()
        engine = build_engine(
            directory, mode, args.load_format,
            max_context=longest, max_ragged_batch_size=max(768, max(args.batch) * args.prompt_length),
            max_ragged_sequence_count=max(args.batch),
            memory_config={"mode": "allocate", "size": max(args.batch) * (longest // 64 + 2)},
        )  # fmt: skip
        load_seconds = time.perf_counter() - start
    vocabulary = engine.model().vocab_size
    figures = {
        "model": args.model, "mode": args.quantization_mode, "layers": args.layers,
        "weight_bytes": parameter_bytes(engine), "load_seconds": load_seconds, "peak_load_bytes": memory.peak(),
        "batches": [],
    }  # fmt: skip
    print(f"{args.model} {args.quantization_mode}: {parameter_bytes(engine) / 2**30:.2f} GiB of weights")
    print(f"loaded in {load_seconds:.1f} s, peak {memory.peak() / 2**30:.2f} GiB {memory.kind}")
    print(f"{'batch':>6} {'ms/step':>9} {'tokens/s':>10} {'prompt ms':>10}")
    for batch in args.batch:
        prompts = [torch.randint(3, vocabulary, (args.prompt_length,)) for _ in range(batch)]
        generate(engine, prompts, 3)
        _, seconds = generate(engine, prompts, args.new_tokens)
        step = statistics.median(seconds[1:])
        measured = {"batch": batch, "step_seconds": step, "tokens_per_second": batch / step}
        figures["batches"].append(measured | {"prompt_seconds": seconds[0]})
        print(f"{batch:>6} {step * 1e3:>9.2f} {batch / step:>10.1f} {seconds[0] * 1e3:>10.1f}")
    figures["peak_bytes"] = memory.peak()
    print(f"peak while generating: {memory.peak() / 2**30:.2f} GiB {memory.kind}")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2))
    return 0


def _config_directory(args: argparse.Namespace, scratch: Path) -> Path:
    directory = models.write_config(args.model, scratch) if args.model in models.CONFIGS else Path(args.model)
    if args.layers:
        config = json.loads((directory / "config.json").read_text())
        config["num_hidden_layers"] = args.layers
        directory = scratch
        (directory / "config.json").write_text(json.dumps(config))
    return directory

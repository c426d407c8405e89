"""``python -m ds_fp6.bench step``: one step of FastGen's engine, against what the hardware would need for it.

A step feeds one token to each of ``--batch`` sequences that have ``--context`` tokens in the KV cache, and with
``--prompt`` the first tokens of one more sequence. Weights and cache are random. Each engine runs in a process of its
own: ``upstream`` is DeepSpeed's attention, launched kernel by kernel, with 16-bit weights; ``none`` is this package's
engine with 16-bit weights; a mode such as ``wf6af16`` also has this package's linear layers.

Steps follow one another as when text is generated: each takes the tokens that the one before chose, and is started before
the host has read them (``DS_FP6_LOOKAHEAD=0``: after). The time of a step is that between two readings.

    floor = max(weights of the linear layers / bandwidth, their operations / peak)
            + (KV cache that attention reads + LM head + logits) / bandwidth

with the bandwidth and the peak that the same GPU reaches in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ds_fp6.bench import kernel_times, models
from ds_fp6.bench.linear_cuda import Ceilings, measure_ceilings
from ds_fp6.formats import Mode

UPSTREAM, UNQUANTIZED = "upstream", "none"
#: What turns this package's parts of the engine off, all but repairs.
UPSTREAM_ENVIRONMENT = {
    "DS_FP6_ATTENTION": "upstream", "DS_FP6_POINTWISE": "upstream", "DS_FP6_CUDA_GRAPHS": "0", "DS_FP6_LOOKAHEAD": "0",
}  # fmt: skip

#: Steps before the clock starts, steps that are timed, and steps that are profiled after them: as many, since both
#: follow a pause, after which the GPU's clock may be higher until its power limit brings it down.
WARM_UP, TIMED, PROFILED = 4, 20, 20
BLOCK = 64


@dataclass(frozen=True)
class Shape:
    """The step that is measured, on each of ``tp`` ranks."""

    model: str
    batch: int
    context: int
    prompt: int = 0
    tp: int = 1
    layers: int | None = None

    def config(self) -> dict:
        """The contents of config.json."""
        config = dict(models.config(self.model))
        if self.layers:
            config["num_hidden_layers"] = self.layers
        return config

    def linear_weights(self) -> int:
        """Weights of all linear layers on a rank."""
        return self.config()["num_hidden_layers"] * sum(s.n * s.k for s in models.linear_shapes(self.model, self.tp))

    def kv_bytes(self) -> int:
        """What attention must read on a rank: the keys and values of all tokens that the step's queries see."""
        config = self.config()
        heads = config["num_attention_heads"]
        kv_heads = max(1, config.get("num_key_value_heads", heads) // self.tp)
        a_token = 2 * 2 * kv_heads * (config["hidden_size"] // heads) * config["num_hidden_layers"]
        return (self.batch * (self.context + 1) + self.prompt) * a_token

    def head_bytes(self) -> int:
        """The LM head's 16-bit weights on a rank, and the logits."""
        config = self.config()
        sequences = self.batch + (self.prompt > 0)
        return 2 * config["vocab_size"] * (config["hidden_size"] // self.tp + sequences)

    def floor(self, ceilings: Ceilings, bits: int) -> float:
        """Seconds below which the step cannot be with linear weights of ``bits`` bits."""
        weights, tokens = self.linear_weights(), self.batch + self.prompt
        linear = max(weights * bits / 8 / ceilings.bandwidth, 2 * weights * tokens / ceilings.operations)
        return linear + (self.kv_bytes() + self.head_bytes()) / ceilings.bandwidth


@dataclass
class Result:
    """Seconds of one engine's step: on the clock, its floor, and on the GPU by class and by name of kernel.

    ``wall`` is the median of the timed steps, the others are means of the profiled ones.

    ``kernels``: (name, runs, seconds) each, those that took most first. ``gaps``: (name before, name after, times,
    seconds) of when nothing ran between the steps' first kernel and their last, likewise.
    """

    engine: str
    wall: float
    floor: float
    classes: dict[str, float]
    kernels: list[tuple[str, float, float]]
    gaps: list[tuple[str, str, float, float]]

    @property
    def busy(self) -> float:
        """Seconds in which the GPU ran something."""
        return sum(self.classes.values())

    @property
    def idle(self) -> float:
        """The share of the step in which the GPU ran nothing."""
        return max(0.0, 1 - self.busy / self.wall)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="llama-2-70b", choices=sorted(models.CONFIGS))
    parser.add_argument("--batch", type=int, default=1, help="sequences that get one token each, 0 with --prompt; default %(default)s")
    parser.add_argument("--context", type=int, default=128, help="tokens of each in the cache; default %(default)s")
    parser.add_argument("--prompt", type=int, default=0, help="tokens of one more sequence's prompt; default none")
    parser.add_argument("--tp", type=int, default=1, help="GPUs that share the model")
    parser.add_argument("--layers", type=int, help="only the first so many transformer layers")
    parser.add_argument(
        "--engines", default=f"{UPSTREAM},{UNQUANTIZED},wf6af16", help="comma-separated; default %(default)s"
    )
    names = "also print the N kernels that take most, by name, and the N gaps: how often in a step, and how long each time"
    parser.add_argument("--kernels", type=int, default=0, metavar="N", help=names)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--plot", type=Path, help="draw where the time goes, with the floors, to this file")
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # the engine that this process is to measure


def run(args: argparse.Namespace) -> int:
    """Prints the table; 1 if an engine failed, 2 without a GPU."""
    shape = Shape(args.model, args.batch, args.context, args.prompt, args.tp, args.layers)
    if args.measure:
        return _measure_here(shape, args.measure, args.json)
    if not torch.cuda.is_available():
        print("step: torch sees no NVIDIA GPU", file=sys.stderr)
        return 2
    engines = args.engines.split(",")
    if args.batch < 0 or not args.batch + args.prompt:
        print(f"step: a step needs sequences or a prompt, got batch {args.batch}", file=sys.stderr)
        return 2
    bits = {engine: _bits(engine) for engine in engines}
    ceilings = measure_ceilings(torch.float16)
    torch.cuda.empty_cache()
    print(
        f"{args.model}, {shape.config()['num_hidden_layers']} layers, {args.tp} x {torch.cuda.get_device_name()}: "
        f"batch {args.batch}, context {args.context}, prompt {args.prompt}; "
        f"{ceilings.bandwidth / 1e12:.2f} TB/s, {ceilings.operations / 1e12:.0f} TFLOP/s"
    )
    titles = "".join(f" {kind:>13}" for kind in _kinds())
    print(f"{'engine':10} {'ms':>8} {'floor':>8} {'x floor':>8}{titles} {'idle':>6}")
    results, failed = [], []
    for engine in engines:
        figures = _measure_apart(args, shape, engine)
        if figures is None:
            failed.append(engine)
            continue
        results.append(Result(engine, floor=shape.floor(ceilings, bits[engine]), **figures))
        print(line(results[-1]), flush=True)
        for text in [*kernel_lines(results[-1], args.kernels), *gap_lines(results[-1], args.kernels)]:
            print(text, flush=True)
    if args.json:
        report = {"shape": asdict(shape), "ceilings": asdict(ceilings)}
        report["results"] = [{**asdict(r), "busy": r.busy, "idle": r.idle} for r in results]
        args.json.write_text(json.dumps(report, indent=2))
    if args.plot:
        plot(results, f"{args.model}: batch {args.batch}, context {args.context}", args.plot)
    for engine in failed:
        print(f"step: {engine} failed; its output is above", file=sys.stderr)
    return 1 if failed else 0


def _kinds() -> list[str]:
    return [*kernel_times.CLASSES, kernel_times.OTHER]


def line(result: Result) -> str:
    """Milliseconds; the share of the step without a running kernel at the end."""
    times = "".join(f" {result.classes[kind] * 1e3:13.3f}" for kind in _kinds())
    return (
        f"{result.engine:10} {result.wall * 1e3:8.3f} {result.floor * 1e3:8.3f} {result.wall / result.floor:8.2f}"
        f"{times} {result.idle:6.1%}"
    )


def kernel_lines(result: Result, count: int) -> list[str]:
    """The ``count`` kernels that take most of a step: runs, microseconds of each and of all, name."""
    return [
        f"  {runs:6.1f} x {seconds / runs * 1e6:8.2f} us = {seconds * 1e3:7.3f} ms  {name[:120]}"
        for name, runs, seconds in result.kernels[:count]
    ]


def gap_lines(result: Result, count: int) -> list[str]:
    """The ``count`` places where nothing ran for longest, as ``kernel_lines`` has kernels."""
    return [
        f"  {times:6.1f} x {seconds / times * 1e6:8.2f} us = {seconds * 1e3:7.3f} ms  nothing between {before[:50]} and {after[:50]}"
        for before, after, times, seconds in result.gaps[:count]
    ]


def plot(results: list[Result], title: str, path: Path) -> None:
    """A bar an engine, of GPU time by class and idle time, and its floor.

    Raises ``RuntimeError`` without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RuntimeError("--plot needs matplotlib: pip install 'ds_fp6[bench]'") from error
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    names, bottom = [r.engine for r in results], [0.0] * len(results)
    parts = {kind: [r.classes[kind] for r in results] for kind in _kinds()}
    parts["idle"] = [r.idle * r.wall for r in results]
    for kind, seconds in parts.items():
        heights = [s * 1e3 for s in seconds]
        axes.bar(names, heights, bottom=bottom, label=kind, width=0.5)
        bottom = [b + h for b, h in zip(bottom, heights)]
    for i, result in enumerate(results):
        axes.hlines(result.floor * 1e3, i - 0.35, i + 0.35, color="black", label="floor" if i == 0 else None)
    axes.set(ylabel="ms", title=title)
    axes.legend()
    figure.savefig(path)


def _bits(engine: str) -> int:
    return 16 if engine in (UPSTREAM, UNQUANTIZED) else Mode.parse(engine).format.bits


def _measure_apart(args: argparse.Namespace, shape: Shape, engine: str) -> dict | None:
    """Figures of ``engine``, measured in a process (one a rank) of its own; None where that failed."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, "figures.json")
        command = [
            "-m", "ds_fp6.bench", "step", "--measure", engine, "--json", str(path), "--model", shape.model, "--tp",
            str(shape.tp), "--batch", str(shape.batch), "--context", str(shape.context), "--prompt", str(shape.prompt),
            *(["--layers", str(shape.layers)] if shape.layers else []),
        ]  # fmt: skip
        if shape.tp > 1:
            command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={shape.tp}", *command]
        environment = {**os.environ, **(UPSTREAM_ENVIRONMENT if engine == UPSTREAM else {})}
        done = subprocess.run(
            [sys.executable, *command], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        if done.returncode or not path.exists():
            print(done.stdout[-4000:], file=sys.stderr)
            return None
        return json.loads(path.read_text())


def _measure_here(shape: Shape, engine_name: str, path: Path) -> int:
    # DeepSpeed is imported after the arguments have been read.
    from ds_fp6.integrations.engine import build_engine, fill_cache, greedy_steps
    from ds_fp6.integrations.mii import lookahead

    mode = None if engine_name in (UPSTREAM, UNQUANTIZED) else engine_name
    longest = max(shape.context + WARM_UP + TIMED + PROFILED + 1, shape.prompt)
    with tempfile.TemporaryDirectory() as scratch:
        Path(scratch, "config.json").write_text(json.dumps(shape.config()))
        engine = build_engine(
            scratch, mode, "dummy", shape.tp,
            max_context=longest, max_ragged_batch_size=max(768, shape.batch + shape.prompt),
            # One more than there are: batches with prompts are filled up with a sequence of their own.
            max_ragged_sequence_count=shape.batch + 2, max_tracked_sequences=shape.batch + 2,
            memory_config={"mode": "allocate", "size": (shape.batch + 1) * (longest // BLOCK + 2)},
        )  # fmt: skip
    fill_cache(engine, dict.fromkeys(range(shape.batch), shape.context))
    vocabulary = engine.model().vocab_size
    tokens = {uid: torch.randint(vocabulary, (1,)) for uid in range(shape.batch)}
    prompt = torch.randint(vocabulary, (shape.prompt,)) if shape.prompt else None
    steps = greedy_steps(engine, tokens, prompt, lookahead.chosen(cpu=False)[0])

    def read(count: int) -> list[float]:
        times = [time.perf_counter()]
        for _ in range(count):
            next(steps)
            times.append(time.perf_counter())
        return [end - begin for begin, end in zip(times, times[1:])]

    read(WARM_UP)
    wall = statistics.median(read(TIMED))
    kernels = kernel_times.profile(lambda: read(PROFILED))
    classes = {kind: seconds / PROFILED for kind, seconds in kernel_times.seconds_by_class(kernels).items()}
    names = [(*name, runs / PROFILED, seconds / PROFILED) for *name, runs, seconds in kernel_times.by_name(kernels)]
    gaps = [(*names, times / PROFILED, seconds / PROFILED) for *names, times, seconds in kernel_times.gaps(kernels)]
    if int(os.environ.get("RANK", 0)) == 0:
        figures = {"wall": wall, "classes": classes, "kernels": names, "gaps": gaps}
        path.write_text(json.dumps(figures))
    return 0

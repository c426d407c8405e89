"""``python -m ds_fp6.bench energy``: what a linear layer draws, FP6 and cuBLAS, in joules a call.

Calls follow one another without a pause, so that a GPU that its power holds back shows it: by the time, by the clock
and by what it names as the reason. Weights take turns as in ``bench linear``. The energy is the GPU's own counter's,
all of the board, from one of its ticks to another.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch

from ds_fp6.bench import arguments, models
from ds_fp6.bench.linear_cuda import DTYPES, Weights, activations, captured
from ds_fp6.formats import Mode

#: Seconds until clock and temperature have settled, at least as many that are measured, and about as many in a graph.
WARM_UP, MEASURED, GRAPH_SECONDS = 0.4, 1.0, 1e-2


@dataclasses.dataclass(frozen=True)
class Draw:
    """Of one contender: seconds and joules a call; the SMs' clock in MHz and the share of time in which power held it."""

    seconds: float
    joules: float
    clock: float
    held: float

    @property
    def watts(self) -> float:
        return self.joules / self.seconds


class Meter(Protocol):
    """What a GPU says of itself."""

    def joules(self) -> float:
        """Drawn since the driver was loaded; moves in ticks of some milliseconds."""

    def clock(self) -> float:
        """Of the SMs, MHz, now."""

    def is_held(self) -> bool:
        """Whether power is why the clock is not higher, now."""


class NvmlMeter:
    """The current CUDA device, by NVML. Raises ``RuntimeError`` without its Python package, or where it has no counter."""

    def __init__(self) -> None:
        try:
            import pynvml
        except ImportError as error:
            raise RuntimeError("needs NVML for Python: pip install nvidia-ml-py") from error
        self._nvml = pynvml
        try:
            pynvml.nvmlInit()
            self._device = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties().uuid}")
            self.joules()
        except pynvml.NVMLError as error:
            raise RuntimeError(f"NVML does not count this GPU's energy: {error}") from error

    def joules(self) -> float:
        return self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._device) / 1e3

    def clock(self) -> float:
        return self._nvml.nvmlDeviceGetClockInfo(self._device, self._nvml.NVML_CLOCK_SM)

    def is_held(self) -> bool:
        nvml = self._nvml
        power = nvml.nvmlClocksThrottleReasonSwPowerCap | nvml.nvmlClocksThrottleReasonHwPowerBrakeSlowdown
        return bool(nvml.nvmlDeviceGetCurrentClocksThrottleReasons(self._device) & power)


class Work:
    """Replays of a graph with so many calls, two of them always ahead of the one that is waited for."""

    def __init__(self, run: Callable[[int], object], calls: int) -> None:
        self._graph, self._calls = captured(run, calls), calls
        self._ahead: collections.deque[torch.cuda.Event] = collections.deque()

    def turn(self) -> int:
        """Returns how many calls have ended since the last turn."""
        self._graph.replay()
        self._ahead.append(torch.cuda.Event())
        self._ahead[-1].record()
        if len(self._ahead) <= 2:
            return 0
        self._ahead.popleft().synchronize()
        return self._calls


def measure(turn: Callable[[], int], meter: Meter, now: Callable[[], float] = time.perf_counter) -> Draw:
    """Takes turns, each of which returns how many calls have ended, until ``WARM_UP`` and ``MEASURED`` are over."""
    start = now()
    while now() - start < WARM_UP:
        turn()
    before = meter.joules()
    while (first := meter.joules()) == before:
        turn()
    calls, clocks, held, start = 0, [], [], now()
    while now() - start < MEASURED:
        calls += turn()
        clocks.append(meter.clock()), held.append(meter.is_held())
    before = meter.joules()
    while (last := meter.joules()) == before:
        calls += turn()
    return Draw((now() - start) / calls, (last - first) / calls, statistics.mean(clocks), statistics.mean(held))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="llama-2-70b", choices=sorted(models.CONFIGS))
    parser.add_argument("--tp", type=int, default=1, help="layers of one of so many ranks")
    parser.add_argument("--quantization-mode", default="wf6af16", help="format and group size, such as wf5af16")
    parser.add_argument("--dtype", choices=DTYPES, default="fp16")
    tokens = "numbers of tokens; default 1,16,64,256,4096"
    parser.add_argument("--m", type=arguments.integers, default=[1, 16, 64, 256, 4096], metavar="M,M", help=tokens)
    parser.add_argument("--zeros", type=arguments.share, default=0.0, metavar="SHARE", help="share of x that is 0")
    parser.add_argument("--json", type=Path, help="write the figures to this file")


def line(layer: models.LinearShape, m: int, draws: dict[str, Draw]) -> str:
    """The last column is how many times cuBLAS's energy is FP6's."""
    columns = "".join(
        f" {d.seconds * 1e6:9.1f} {d.joules * 1e3:8.2f} {d.watts:5.0f} {d.clock:5.0f} {d.held:5.0%}" for d in draws.values()
    )
    return f"{layer.name:8} {m:5}{columns} {draws['cublas'].joules / draws['fp6'].joules:8.2f}"


def header() -> str:
    columns = "".join(f" {name + ' µs':>9} {'mJ':>8} {'W':>5} {'MHz':>5} {'held':>5}" for name in ("fp6", "cublas"))
    return f"{'layer':8} {'M':>5}{columns} {'x energy':>8}"


def summary(draws: dict[int, list[dict[str, Draw]]]) -> list[str]:
    """For each M the geometric mean over the layers of cuBLAS's joules over FP6's."""
    lines = []
    for m, layers in draws.items():
        mean = math.exp(statistics.mean(math.log(d["cublas"].joules / d["fp6"].joules) for d in layers))
        lines.append(f"M = {m:5}: cuBLAS draws {mean:.2f} times FP6's energy")
    return lines


def run(args: argparse.Namespace) -> int:
    """Prints the table; 2 if this machine cannot measure it."""
    try:
        if not torch.cuda.is_available():
            raise RuntimeError("torch sees no NVIDIA GPU")
        meter = NvmlMeter()
    except RuntimeError as error:
        print(f"energy: {error}", file=sys.stderr)
        return 2
    mode = Mode.parse(args.quantization_mode)
    torch.manual_seed(0)
    figures, by_m = [], {m: [] for m in args.m}
    print(f"{torch.cuda.get_device_name()}, {args.quantization_mode}, {args.dtype}\n{header()}")
    for layer in models.linear_shapes(args.model, args.tp):
        weights = Weights(layer.n, layer.k, mode.format, mode.group_size, DTYPES[args.dtype], rivals=False)
        for m in args.m:
            x = activations(m, layer.k, DTYPES[args.dtype], args.zeros)
            draws = {}
            for name, call in sorted(weights.contenders(x).items(), reverse=True):
                draws[name] = measure(Work(call, _calls_of(call)).turn, meter)
            print(line(layer, m, draws), flush=True)
            by_m[m].append(draws)
            figures.append({"layer": layer.name, "m": m, **{name: dataclasses.asdict(d) for name, d in draws.items()}})
        del weights
        torch.cuda.empty_cache()
    print("\n" + "\n".join(summary(by_m)))
    if args.json:
        args.json.write_text(json.dumps({"device": torch.cuda.get_device_name(), "results": figures}, indent=2))
    return 0


def _calls_of(call: Callable[[int], object]) -> int:
    """How many calls take about ``GRAPH_SECONDS``."""
    call(0)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for copy in range(8):
        call(copy)
    end.record()
    end.synchronize()
    return max(8, round(GRAPH_SECONDS / (start.elapsed_time(end) / 1e3 / 8)))

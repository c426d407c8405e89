"""``python -m ds_fp6.bench linear --device cuda``: the FP6 linear layer raced against cuBLAS, and humming where it is.

Every contender's launches are captured in a CUDA graph, a copy of the weight after the other, more of them than the L2
holds, so that a weight is read from memory as it is in a model. Contenders alternate, and rest before each replay for
at least as long as the longest of them worked: the GPU lowers its clock under load, and without a rest one contender
would pay for what the one before it drew. The median of their replays counts. The floor is the larger of what memory
and tensor cores need at the rates that the same GPU reaches in the same run. Every result is checked against fp64.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import torch

from ds_fp6 import ops
from ds_fp6.bench import models
from ds_fp6.formats import Format
from ds_fp6.quantize import number_of_groups

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
DEFAULT_MODEL = "llama-2-70b"
DEFAULT_M = [1, 8, 16, 32, 64, 128, 256, 512, 768, 1024, 4096]

#: Replays of each contender, the least pause before each, and about how much work a graph holds, in seconds.
REPLAYS, PAUSE, GRAPH_SECONDS = 11, 2e-3, 3e-3
#: Copies of a weight hold this many times the L2.
CACHES = 4
#: Channels whose outputs are checked against fp64, and by how much of the terms' magnitudes fp32 sums may be off.
CHECKED_CHANNELS, SUM_TOLERANCE = 96, 2.0**-20


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """What this GPU reaches: bytes read and written a second, 16-bit tensor operations a second."""

    bandwidth: float
    operations: float

    def floor(self, n: int, k: int, m: int, bits: int) -> float:
        """Seconds below which ``y[M, N] = x[M, K] · W[N, K]ᵀ`` cannot be."""
        moved = n * k * bits / 8 + 2 * m * (n + k)
        return max(moved / self.bandwidth, 2 * m * n * k / self.operations)


@dataclasses.dataclass
class Result:
    """Seconds by contender, ``"fp6"``, ``"cublas"`` and perhaps ``"humming"``, of one layer at one M."""

    layer: str
    n: int
    k: int
    m: int
    floor: float
    seconds: dict[str, float]
    errors: list[str]

    def speedup(self, contender: str) -> float:
        return self.seconds["cublas"] / self.seconds[contender]


def captured(run: Callable[[int], object], launches: int) -> torch.cuda.CUDAGraph:
    """A graph of ``run(0), ..., run(launches - 1)``, which have run once before."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        for copy in range(launches):
            run(copy)
        torch.cuda.synchronize()
        graph.capture_begin()
        for copy in range(launches):
            run(copy)
        graph.capture_end()
    return graph


def replay_of(run: Callable[[int], object], launches: int) -> Callable[[], float]:
    """Captures ``launches`` of ``run``; calling the result replays them and returns seconds a launch."""
    graph = captured(run, launches)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def seconds() -> float:
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / launches

    return seconds


def race_replays(contenders: dict[str, Callable[[int], object]], launches: int) -> dict[str, float]:
    """Seconds a launch of each contender: the median of its replays, taken in turns."""
    replays = {name: replay_of(run, launches) for name, run in contenders.items()}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    rest = PAUSE
    for turn in range(REPLAYS + 1):
        for name, replay in replays.items():
            time.sleep(rest)
            taken = replay()
            rest = max(rest, taken * launches)
            if turn:  # the first one warms up
                times[name].append(taken)
    return {name: statistics.median(taken) for name, taken in times.items()}


def measure_ceilings(dtype: torch.dtype) -> Ceilings:
    source = torch.empty(1 << 32, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    copying = race_replays({"copy": lambda _: target.copy_(source)}, 4)["copy"]
    del target
    reader = source.view(torch.int64)
    reading = race_replays({"read": lambda _: reader.amax()}, 4)["read"]
    a, b = (torch.randn((8192, 8192), dtype=dtype, device="cuda") for _ in range(2))
    product = race_replays({"product": lambda _: a @ b}, 4)["product"]
    return Ceilings(max(2 * source.nbytes / copying, source.nbytes / reading), 2 * 8192**3 / product)


class Weights:
    """Copies of one random weight, packed for x of ``dtype`` and dense, and, for ``rivals``, humming's if installed."""

    def __init__(
        self, n: int, k: int, fmt: Format, group_size: int, dtype: torch.dtype, rivals: bool = True
    ) -> None:
        self.n, self.k, self.fmt, self.group_size = n, k, fmt, group_size
        cache = torch.cuda.get_device_properties().L2_cache_size
        shape = ops.packed_shape(torch.device("cuda"), fmt.bits, n, k, dtype)
        size = math.prod(shape)
        # Every code is a number, so random bytes are random weights.
        self.tiles = [
            torch.randint(0, 256, shape, dtype=torch.uint8, device="cuda") for _ in range(1 + CACHES * cache // size)
        ]
        self.scales = torch.rand((n, number_of_groups(k, group_size)), device="cuda") / math.sqrt(k)
        dense = torch.randn((n, k), dtype=dtype, device="cuda")
        self.dense = [dense] + [dense.clone() for _ in range(CACHES * cache // dense.nbytes)]
        races = rivals and fmt == Format(3, 2) and group_size == 0
        self.humming = self._humming(len(self.tiles)) if races else []

    def _humming(self, copies: int) -> list[torch.nn.Module]:
        if importlib.util.find_spec("humming") is None:
            return []
        from humming.layer import HummingLayer

        layers = []
        for _ in range(copies):
            layer = HummingLayer(
                shape_n=self.n, shape_k=self.k, weight_config={"dtype": "float6e3m2"}, torch_dtype=self.dense[0].dtype
            ).cuda()
            layer.load_from_unquantized(self.dense[0])
            layer.transform()
            layers.append(layer)
        return layers

    def contenders(self, x: torch.Tensor) -> dict[str, Callable[[int], object]]:
        runs: dict[str, Callable[[int], object]] = {
            "cublas": lambda copy: torch.nn.functional.linear(x, self.dense[copy % len(self.dense)]),
            "fp6": lambda copy: self.quantized(x, copy),
        }
        if self.humming:
            runs["humming"] = lambda copy: self.humming[copy % len(self.humming)](x)
        return runs

    def quantized(self, x: torch.Tensor, copy: int) -> torch.Tensor:
        fmt, tiles = self.fmt, self.tiles[copy % len(self.tiles)]
        return ops.linear(x, tiles, self.scales, None, fmt.exponent_bits, fmt.mantissa_bits, self.group_size)

    def errors(self, x: torch.Tensor, what: str) -> list[str]:
        """Where ``quantized(x, 0)`` is further from fp64 than fp32 sums and one rounding may be."""
        fmt = self.fmt
        chosen = torch.randperm(self.n)[:CHECKED_CHANNELS].sort().values.cuda()
        weight = torch.ops.ds_fp6.dequantize(
            self.tiles[0], self.scales, fmt.exponent_bits, fmt.mantissa_bits, self.group_size, self.k, torch.float32
        )[chosen].double()
        expected, magnitude = x.double() @ weight.T, x.double().abs() @ weight.abs().T
        actual = self.quantized(x, 0)[:, chosen].double()
        info = torch.finfo(x.dtype)
        allowed = SUM_TOLERANCE * magnitude + info.eps / 2 * expected.abs().clamp(min=info.smallest_normal)
        wrong = (~((actual - expected).abs() <= allowed)).nonzero().tolist()
        return [
            f"{what}: y[{m}, {int(chosen[j])}] is {actual[m, j].item():.9g}, fp64 gives {expected[m, j].item():.9g}, "
            f"allowed to differ by {allowed[m, j].item():.3g}"
            for m, j in wrong[:5]
        ]


def activations(m: int, k: int, dtype: torch.dtype, zeros: float, device: str = "cuda") -> torch.Tensor:
    """Normally distributed x [m, k], of which about the share ``zeros`` is 0."""
    x = torch.randn((m, k), dtype=dtype, device=device)
    return x.masked_fill_(torch.rand((m, k), device=device) < zeros, 0) if zeros else x


def race(shape: models.LinearShape, m: int, weights: Weights, ceilings: Ceilings, zeros: float) -> Result:
    x = activations(m, shape.k, weights.dense[0].dtype, zeros)
    errors = weights.errors(x, f"{shape.name} {shape.n}x{shape.k}, M = {m}")
    dense = ceilings.floor(shape.n, shape.k, m, 16)
    launches = max(2, min(48, int(GRAPH_SECONDS / dense)))
    seconds = race_replays(weights.contenders(x), launches)
    floor = ceilings.floor(shape.n, shape.k, m, weights.fmt.bits)
    return Result(shape.name, shape.n, shape.k, m, floor, seconds, errors)


def header(others: list[str]) -> str:
    titles = "".join(f" {'x ' + name:>9}" for name in others)
    return (
        f"{'layer':8} {'N':>6} {'K':>6} {'M':>5} {'cublas µs':>10} {'fp6 µs':>9} {'TB/s':>6} {'TFLOP/s':>8} "
        f"{'x cublas':>9}{titles} {'of floor':>9}"
    )


def line(result: Result, bits: int, others: list[str]) -> str:
    """The bandwidth is that of the packed weights; ``x humming`` is how many times as fast as humming."""
    n, k, m, fp6 = result.n, result.k, result.m, result.seconds["fp6"]
    rates = f"{n * k * bits / 8 / fp6 / 1e12:6.2f} {2 * m * n * k / fp6 / 1e12:8.1f}"
    ratios = "".join(f" {result.seconds[name] / fp6:9.2f}" for name in others)
    return (
        f"{result.layer:8} {n:6} {k:6} {m:5} {result.seconds['cublas'] * 1e6:10.1f} {fp6 * 1e6:9.1f} {rates} "
        f"{result.speedup('fp6'):9.2f}{ratios} {result.floor / fp6:9.0%}"
    )


def means(results: list[Result], of: Callable[[Result], float]) -> dict[int, float]:
    """Geometric mean over the layers, by M."""
    by_m: dict[int, list[float]] = {}
    for result in results:
        by_m.setdefault(result.m, []).append(of(result))
    return {m: math.exp(sum(map(math.log, values)) / len(values)) for m, values in sorted(by_m.items())}


def summary(results: list[Result], others: list[str]) -> list[str]:
    """For each M: geometric mean and least speed-up over cuBLAS, the others' mean, the floor's."""
    fp6, floor = means(results, lambda r: r.speedup("fp6")), means(results, lambda r: r.seconds["cublas"] / r.floor)
    rivals = {name: means(results, lambda r, name=name: r.speedup(name)) for name in others}
    lines = []
    for m in fp6:
        least = min(r.speedup("fp6") for r in results if r.m == m)
        more = "".join(f", {name} {rival[m]:.2f}" for name, rival in rivals.items())
        lines.append(f"M = {m:5}: {fp6[m]:.2f} times cuBLAS (least {least:.2f}){more}; the floor {floor[m]:.2f}")
    return lines


def plot(results: list[Result], others: list[str], title: str, path: Path) -> None:
    """Speed-up over cuBLAS by M, geometric mean over the layers. Raises ``RuntimeError`` without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RuntimeError("--plot needs matplotlib: pip install 'ds_fp6[bench]'") from error
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for name in ["fp6", *others]:
        curve = means(results, lambda r, name=name: r.speedup(name))
        axes.plot(list(curve), list(curve.values()), marker="o", label=name)
    floor = means(results, lambda r: r.seconds["cublas"] / r.floor)
    axes.plot(list(floor), list(floor.values()), color="black", linestyle="--", label="the hardware's limit")
    axes.axhline(1.0, color="gray", linewidth=0.8, label="cuBLAS")
    axes.set(xscale="log", xlabel="M, tokens", ylabel="times as fast as cuBLAS", title=title)
    axes.set_xticks(list(floor), [str(m) for m in floor])
    axes.legend()
    figure.savefig(path)


def as_json(results: list[Result], ceilings: Ceilings) -> dict:
    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "ceilings": {"bytes_per_second": ceilings.bandwidth, "operations_per_second": ceilings.operations},
        "results": [{**dataclasses.asdict(r), "times_cublas": r.speedup("fp6")} for r in results],
    }


def run(args: Namespace) -> int:
    """Prints the table; 1 if any result is wrong, 2 if this machine or the kernels cannot run it."""
    if args.dtype == "fp32":
        print("--device cuda: x is fp16 or bf16 on a GPU, not fp32", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print("--device cuda: torch sees no NVIDIA GPU", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    dtype = DTYPES["fp16" if args.dtype == "both" else args.dtype]
    shapes = args.shape or models.linear_shapes(args.model or DEFAULT_MODEL, args.tp)
    ceilings = measure_ceilings(dtype)
    print(
        f"{torch.cuda.get_device_name()}: {ceilings.bandwidth / 1e12:.2f} TB/s, "
        f"{ceilings.operations / 1e12:.0f} TFLOP/s; {args.format} weights, {args.format.bits} bits each"
        + (f"; {args.zeros:.0%} of x is 0" if args.zeros else ""),
        flush=True,
    )
    results: list[Result] = []
    others: list[str] = []
    for shape in shapes:
        weights = Weights(shape.n, shape.k, args.format, args.group_size, dtype)
        if not results:
            others = ["humming"] if weights.humming else []
            print(header(others), flush=True)
        for m in args.m or DEFAULT_M:
            results.append(race(shape, m, weights, ceilings, args.zeros))
            print(line(results[-1], args.format.bits, others), flush=True)
        del weights
        torch.cuda.empty_cache()
    print("\n" + "\n".join(summary(results, others)))
    if args.json:
        args.json.write_text(json.dumps(as_json(results, ceilings), indent=2))
    if args.plot:
        plot(results, others, f"{args.format} linear layers on an {torch.cuda.get_device_name()}", args.plot)
    errors = [error for result in results for error in result.errors]
    for error in errors:
        print(f"WRONG: {error}", file=sys.stderr)
    return 1 if errors else 0

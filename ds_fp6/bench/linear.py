"""``python -m ds_fp6.bench linear``: the FP6 linear layer raced against torch's, in one process, on the same threads.

Every contender has its own copies of the weight, more than the last-level cache holds, and takes them in turn, so
that a weight is read from memory as it is in a model. Contenders alternate; the best of many runs counts, because
other work on the machine only ever adds time. GB/s are bytes of *packed* weights over that time, and the ceiling is
the best read bandwidth that the same threads reach in the same run, tried again before each layer; its last value is
the one to judge by. Every result is checked against fp64.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch

from ds_fp6 import ops
from ds_fp6.bench import arguments, models
from ds_fp6.formats import Format
from ds_fp6.pack import row_bytes, unpack
from ds_fp6.quantize import dequantize_reference, number_of_groups

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}

#: fp32 sums of K terms may be off by this many units of 2^-24 of the sum of magnitudes, times sqrt(K).
SUM_TOLERANCE = 4.0

#: Rows of the weight whose outputs are checked against fp64.
CHECKED_ROWS = 96

#: Runs of a contender: at least, at most, and seconds after which the least will do.
LEAST_RUNS, MOST_RUNS, SECONDS = 5, 500, 0.8


@dataclasses.dataclass(frozen=True)
class Case:
    """One line of the table: ``y[M, N] = x[M, K] · W[N, K]ᵀ``."""

    layer: str
    n: int
    k: int
    m: int


@dataclasses.dataclass
class Result:
    """What a run measured. Times in seconds, by contender: ``"fp6 bf16"``, ``"torch fp32"``..."""

    case: Case
    packed_bytes: int
    seconds: dict[str, float]
    errors: list[str]

    def bandwidth(self, contender: str) -> float:
        """Bytes of packed weights a second."""
        return self.packed_bytes / self.seconds[contender]

    def speedup(self, contender: str, baseline: str) -> float:
        return self.seconds[baseline] / self.seconds[contender]


class Device(Protocol):
    """What differs between devices: contenders, the clock and the ceiling."""

    name: str

    def describe(self) -> str: ...

    def ceiling(self) -> float:
        """The best read bandwidth, bytes a second."""

    def seconds(self, run: Callable[[], torch.Tensor]) -> float:
        """How long one run takes, from start to result."""

    def cache_bytes(self) -> int:
        """What the copies of a weight must exceed."""

    def baselines(self) -> list[str]:
        """Names in ``DTYPES`` in which torch's own linear layer competes."""


class Cpu:
    name = "cpu"

    def describe(self) -> str:
        ops.load("CPU")
        return f"cpu, {torch.get_num_threads()} threads, kernels {torch.ops.ds_fp6.cpu_isa().partition(':')[0]}"

    def ceiling(self) -> float:
        data = torch.ones(1 << 28, dtype=torch.uint8)
        readers = [data.view(torch.int64), data.view(torch.float32), data.view(torch.float64)]
        return max(data.nbytes / self.seconds(reader.sum) for _ in range(10) for reader in readers)

    def seconds(self, run: Callable[[], torch.Tensor]) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    def cache_bytes(self) -> int:
        caches = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
        sizes = [int(path.read_text().strip().removesuffix("K")) << 10 for path in caches]
        return max(sizes, default=64 << 20)

    def baselines(self) -> list[str]:
        return ["bf16", "fp32"]


DEVICES: dict[str, Callable[[], Device]] = {"cpu": Cpu}


class Weights:
    """Copies of one random FP6 weight's worth of bytes, and of a dense weight for each of torch's dtypes."""

    def __init__(self, n: int, k: int, fmt: Format, group_size: int, device: Device) -> None:
        self.n, self.k, self.fmt, self.group_size = n, k, fmt, group_size
        self.packed_bytes = n * row_bytes(k, fmt.bits)
        copies = self._copies(self.packed_bytes, device)
        # Every code is a number, so random bytes are random weights.
        self.rows = [
            torch.randint(0, 256, (n, row_bytes(k, fmt.bits)), dtype=torch.uint8, device=device.name)
            for _ in range(copies)
        ]
        self.scales = torch.rand((n, number_of_groups(k, group_size)), device=device.name) / math.sqrt(k)
        self.dense = {name: self._dense(DTYPES[name], device) for name in device.baselines()}

    def _copies(self, size: int, device: Device) -> int:
        return 1 + math.ceil(2 * device.cache_bytes() / size)

    def _dense(self, dtype: torch.dtype, device: Device) -> list[torch.Tensor]:
        first = torch.randn((self.n, self.k), dtype=dtype, device=device.name)
        return [first] + [first.clone() for _ in range(self._copies(first.nbytes, device) - 1)]

    def quantized(self, x: torch.Tensor, copy: int) -> torch.Tensor:
        fmt, rows = self.fmt, self.rows[copy % len(self.rows)]
        return ops.linear(x, rows, self.scales, None, fmt.exponent_bits, fmt.mantissa_bits, self.group_size)

    def torch(self, x: torch.Tensor, name: str, copy: int) -> torch.Tensor:
        weights = self.dense[name]
        return torch.nn.functional.linear(x, weights[copy % len(weights)])

    def errors(self, x: torch.Tensor, what: str) -> list[str]:
        """Where ``quantized(x, 0)`` is further from fp64 than fp32 sums and one rounding may be."""
        chosen = torch.randperm(self.n)[:CHECKED_ROWS].sort().values.to(x.device)
        codes = unpack(self.rows[0][chosen], self.fmt.bits, self.k)
        weight = dequantize_reference(codes, self.scales[chosen], self.fmt, self.group_size).double()
        expected = x.double() @ weight.T
        actual = self.quantized(x, 0)[:, chosen].double()
        magnitude = x.double().abs() @ weight.abs().T
        rounding = torch.finfo(x.dtype).eps / 2 * expected.abs()
        allowed = SUM_TOLERANCE * math.sqrt(self.k) * 2.0**-24 * magnitude + rounding
        wrong = (~((actual - expected).abs() <= allowed)).nonzero().tolist()
        return [
            f"{what}: y[{m}, {int(chosen[j])}] is {actual[m, j].item():.9g}, fp64 gives {expected[m, j].item():.9g}, "
            f"allowed to differ by {allowed[m, j].item():.3g}"
            for m, j in wrong[:5]
        ]


def race(case: Case, weights: Weights, dtypes: list[str], device: Device) -> Result:
    """Times FP6 with x in each of ``dtypes`` against torch in each of the device's baselines."""
    x = torch.randn((case.m, case.k), device=device.name)
    contenders: dict[str, Callable[[int], torch.Tensor]] = {}
    errors = []
    for name in dtypes:
        typed = x.to(DTYPES[name])
        contenders[f"fp6 {name}"] = lambda copy, typed=typed: weights.quantized(typed, copy)
        errors += weights.errors(typed, f"{case.layer} {case.n}x{case.k}, M = {case.m}, x in {name}")
    for name in device.baselines():
        typed = x.to(DTYPES[name])
        contenders[f"torch {name}"] = lambda copy, typed=typed, name=name: weights.torch(typed, name, copy)

    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(MOST_RUNS):
        for name, run in contenders.items():
            if turn < LEAST_RUNS or sum(times[name]) < SECONDS:
                times[name].append(device.seconds(lambda run=run: run(turn)))
    return Result(case, weights.packed_bytes, {name: min(taken) for name, taken in times.items()}, errors)


def header(dtypes: list[str], baselines: list[str]) -> str:
    columns = [f"{'layer':10} {'N':>6} {'K':>6} {'M':>5}"] + [f"{'torch ' + name:>11}" for name in baselines]
    for name in dtypes:
        columns.append(f"| {'fp6 ' + name:>10} {'GB/s':>6} {'ceiling':>8}")
        columns += [f"{'x ' + baseline:>7}" for baseline in baselines]
    return " ".join(columns)


def line(result: Result, dtypes: list[str], baselines: list[str], ceiling: float) -> str:
    case = result.case
    columns = [f"{case.layer:10} {case.n:6} {case.k:6} {case.m:5}"]
    columns += [f"{result.seconds[f'torch {name}'] * 1e6:8.0f} µs" for name in baselines]
    for name in dtypes:
        mine = f"fp6 {name}"
        bandwidth = result.bandwidth(mine)
        columns.append(
            f"| {result.seconds[mine] * 1e6:7.0f} µs {bandwidth / 1e9:6.1f} {bandwidth / ceiling:8.0%}"
        )
        columns += [f"{result.speedup(mine, f'torch {baseline}'):7.2f}" for baseline in baselines]
    return " ".join(columns)


def summary(results: list[Result], dtypes: list[str], baselines: list[str], ceiling: float) -> list[str]:
    """For each M: the share of the ceiling, and the geometric mean and least speed-up over torch in x's dtype."""
    lines = [f"ceiling: {ceiling / 1e9:.1f} GB/s read from memory"]
    for name in dtypes:
        for m in sorted({result.case.m for result in results}):
            reached = [r.bandwidth(f"fp6 {name}") / ceiling for r in results if r.case.m == m]
            lines.append(f"x {name}, M = {m:5}: weights at {min(reached):.0%} to {max(reached):.0%} of the ceiling")
            if name not in baselines:
                continue
            ratios = [r.speedup(f"fp6 {name}", f"torch {name}") for r in results if r.case.m == m]
            mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
            lines[-1] += f", {mean:.2f} times torch's {name} linear (least {min(ratios):.2f})"
    return lines


def as_json(results: list[Result], ceiling: float, device: Device) -> dict:
    return {
        "device": device.describe(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "ceiling_bytes_per_second": ceiling,
        "results": [
            {
                **dataclasses.asdict(result.case),
                "packed_bytes": result.packed_bytes,
                "seconds": result.seconds,
                "fraction_of_ceiling": {
                    name: result.bandwidth(name) / ceiling for name in result.seconds if name.startswith("fp6")
                },
                "errors": result.errors,
            }
            for result in results
        ],
    }


def _shape(text: str) -> models.LinearShape:
    n, separator, k = text.lower().partition("x")
    if not (separator and n.isdigit() and k.isdigit() and int(n) and int(k)):
        raise argparse.ArgumentTypeError(f"a shape is NxK, such as 4096x11008, got {text!r}")
    return models.LinearShape("custom", int(n), int(k))


def _format(text: str) -> Format:
    exponent, _, mantissa = text.removeprefix("e").partition("m")
    if not (text.startswith("e") and exponent.isdigit() and mantissa.isdigit()):
        raise argparse.ArgumentTypeError(f"a format is eXmY, such as e3m2, got {text!r}")
    try:
        return Format(int(exponent), int(mantissa))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu", choices=sorted([*DEVICES, "cuda"]))
    names = ", ".join(models.CONFIGS)
    parser.add_argument("--model", help=f"whose layers to take (default llama-2-7b, on a GPU llama-2-70b): {names}")
    parser.add_argument("--tp", type=int, default=1, help="take a rank's share of the model's layers")
    parser.add_argument("--shape", type=_shape, action="append", metavar="NxK", help="instead of a model's; repeatable")
    parser.add_argument("--m", type=arguments.integers, help="rows of x, comma-separated")
    types = "of x; both: bf16 and fp32, on a GPU fp16"
    parser.add_argument("--dtype", default="both", choices=[*DTYPES, "both"], help=types)
    parser.add_argument("--format", type=_format, default=Format(3, 2), help="of the weights (default %(default)s)")
    parser.add_argument("--group-size", type=int, default=0, help="weights that share a scale; 0: a row")
    parser.add_argument(
        "--zeros", type=arguments.share, default=0.0, metavar="SHARE",
        help="of x that is 0, from 0 to 1 (--device cuda): a GPU at its power limit is faster on zeros",
    )  # fmt: skip
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--plot", type=Path, help="draw the speed-up over M into this file (--device cuda)")


def run(args: argparse.Namespace) -> int:
    """Prints the table; 1 if any result is wrong."""
    if args.device == "cuda":
        from ds_fp6.bench import linear_cuda

        return linear_cuda.run(args)
    if args.zeros:
        print("--zeros: for --device cuda", file=sys.stderr)
        return 2
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device = DEVICES[args.device]()
    dtypes = ["bf16", "fp32"] if args.dtype == "both" else [args.dtype]
    shapes = args.shape or models.linear_shapes(args.model or "llama-2-7b", args.tp)
    print(f"{device.describe()}; {args.format} weights, {row_bytes(8, args.format.bits)} bits each", flush=True)
    ceiling = 0.0
    print(header(dtypes, device.baselines()), flush=True)
    results = []
    for shape in shapes:
        ceiling = max(ceiling, device.ceiling())
        weights = Weights(shape.n, shape.k, args.format, args.group_size, device)
        for m in args.m or [1, 4, 16, 64, 256]:
            results.append(race(Case(shape.name, shape.n, shape.k, m), weights, dtypes, device))
            print(line(results[-1], dtypes, device.baselines(), ceiling), flush=True)
        del weights
    print("\n" + "\n".join(summary(results, dtypes, device.baselines(), ceiling)))
    if args.json:
        args.json.write_text(json.dumps(as_json(results, ceiling, device), indent=2))
    errors = [error for result in results for error in result.errors]
    for error in errors:
        print(f"WRONG: {error}", file=sys.stderr)
    return 1 if errors else 0

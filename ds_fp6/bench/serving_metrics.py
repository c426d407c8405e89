"""What a serving benchmark reports, from the times at which tokens arrived.

For a request sent at s whose n tokens arrived at t_1 … t_n:

    ttft = t_1 - s        e2el = t_n - s        tpot = (t_n - t_1) / (n - 1)        itl = t_i - t_{i-1}, i = 2 … n

Names and units are vLLM's (milliseconds) and, beside them, DeepSpeedExamples' (seconds, see ``deepspeed_examples``).
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

PERCENTILES = (50, 95, 99)


@dataclass
class Request:
    """One request as its client saw it; times in seconds of one monotonic clock.

    ``arrivals`` holds one time for each token that arrived. ``complete`` is False for one that was cut off or failed.
    """

    sent: float
    prompt_tokens: int = 0
    arrivals: list[float] = field(default_factory=list)
    complete: bool = False
    error: str | None = None

    @property
    def ttft(self) -> float:
        return self.arrivals[0] - self.sent

    @property
    def e2el(self) -> float:
        return self.arrivals[-1] - self.sent

    @property
    def itl(self) -> list[float]:
        return [after - before for before, after in zip(self.arrivals, self.arrivals[1:])]


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear interpolation between the closest ranks. Raises ``ValueError`` for no values."""
    if not values:
        raise ValueError("a percentile of no values")
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def _distribution(name: str, seconds: Sequence[float]) -> dict[str, float | None]:
    """``mean_NAME_ms`` and so on; None where there is nothing to tell."""
    milliseconds = [value * 1e3 for value in seconds]
    found: dict[str, float | None] = {
        f"mean_{name}_ms": statistics.fmean(milliseconds) if milliseconds else None,
        f"median_{name}_ms": statistics.median(milliseconds) if milliseconds else None,
    }
    for percent in PERCENTILES:
        found[f"p{percent}_{name}_ms"] = percentile(milliseconds, percent) if milliseconds else None
    return found


def _finished(requests: Sequence[Request]) -> list[Request]:
    return [request for request in requests if request.complete and request.arrivals]


def duration(requests: Sequence[Request]) -> float:
    """Seconds from the first request's sending to the last token's arrival; 0 if none arrived."""
    arrivals = [request.arrivals[-1] for request in requests if request.arrivals]
    return max(arrivals) - min(request.sent for request in requests) if arrivals else 0.0


def vllm(requests: Sequence[Request]) -> dict[str, float | int | None]:
    """Figures by the names of ``vllm bench serve``.

    Throughput counts every token that arrived, also those of requests that were cut off; latencies are those of
    complete requests.
    """
    done, seconds = _finished(requests), duration(requests)
    read = sum(request.prompt_tokens for request in requests if request.arrivals)
    written = sum(len(request.arrivals) for request in requests)
    rate = 1 / seconds if seconds else 0.0
    figures: dict[str, float | int | None] = {
        "duration": seconds,
        "completed": len(done),
        "total_input_tokens": read,
        "total_output_tokens": written,
        "request_throughput": len(done) * rate,
        "output_throughput": written * rate,
        "total_token_throughput": (read + written) * rate,
    }
    figures |= _distribution("ttft", [request.ttft for request in done])
    figures |= _distribution("tpot", [(r.e2el - r.ttft) / (len(r.arrivals) - 1) for r in done if len(r.arrivals) > 1])
    figures |= _distribution("itl", [gap for request in done for gap in request.itl])
    figures |= _distribution("e2el", [request.e2el for request in done])
    return figures


def deepspeed_examples(requests: Sequence[Request], clients: int) -> dict[str, float | None]:
    """Figures by the names and formulas of DeepSpeedExamples' MII benchmark, over complete requests.

    ``latency``: mean e2el, s. ``throughput``: clients / latency, queries/s. ``first_token_latency``: mean ttft, s.
    ``token_gen_latency``: mean itl, s. ``tokens_per_sec``: mean of (prompt + generated tokens) / e2el of a request.
    """
    done = _finished(requests)
    gaps = [gap for request in done for gap in request.itl]
    latency = statistics.fmean(request.e2el for request in done) if done else None
    speeds = [(r.prompt_tokens + len(r.arrivals)) / r.e2el for r in done if r.e2el > 0]
    return {
        "throughput": clients / latency if latency else None,
        "latency": latency,
        "first_token_latency": statistics.fmean(request.ttft for request in done) if done else None,
        "token_gen_latency": statistics.fmean(gaps) if gaps else None,
        "tokens_per_sec": statistics.fmean(speeds) if speeds else None,
    }


def summary(requests: Sequence[Request], clients: int, devices: int) -> dict[str, object]:
    """All figures of one configuration that ran on ``devices`` GPUs (or ranks, on CPUs)."""
    found = vllm(requests)
    return {
        "devices": devices,
        "tokens_per_gpu_second": found["output_throughput"] / devices,
        "vllm": found,
        "deepspeed_examples": deepspeed_examples(requests, clients),
    }

"""The table and the plots of serving benchmarks."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

#: Modes that leave a checkpoint's weights as they are; "upstream" also runs DeepSpeed's own engine.
DENSE = ("upstream", "fp16", "bf16", "none")

#: Headings, and where a result has the figure.
COLUMNS = (
    ("tokens/s", ("vllm", "output_throughput"), ".1f"),
    ("tok/GPU-s", ("tokens_per_gpu_second",), ".1f"),
    ("queries/s", ("vllm", "request_throughput"), ".3f"),
    ("latency s", ("deepspeed_examples", "latency"), ".2f"),
    ("ttft ms", ("vllm", "mean_ttft_ms"), ".1f"),
    ("p99", ("vllm", "p99_ttft_ms"), ".1f"),
    ("tpot ms", ("vllm", "mean_tpot_ms"), ".2f"),
    ("itl p99", ("vllm", "p99_itl_ms"), ".2f"),
)


def require_matplotlib() -> None:
    """Raises ``RuntimeError`` that names what to install."""
    if importlib.util.find_spec("matplotlib") is None:
        raise RuntimeError("plots need matplotlib: pip install 'ds-fp6[bench]'")


def show(results: Sequence[dict[str, Any]], plots: Path | None = None) -> None:
    """Prints the table, the ratios to 16-bit weights, and writes the plots if ``plots`` names a directory."""
    print(table(results))
    for line in ratios(results):
        print(line)
    if plots is not None:
        for path in plot(results, plots):
            print(f"wrote {path}")


def _figure(result: dict[str, Any], path: tuple[str, ...]) -> float | None:
    for key in path:
        result = result.get(key) or {}
    return result if isinstance(result, (int, float)) else None


def table(results: Sequence[dict[str, Any]]) -> str:
    """One line a configuration; failed ones say why, partial ones are marked."""
    head = f"{'mode':<12} {'tp':>3} {'clients':>7} {'gen':>5}"
    lines = [head + "".join(f" {heading:>10}" for heading, _, _ in COLUMNS)]
    for result in results:
        line = f"{result['mode']:<12} {result['tp']:>3} {result['clients']:>7} {result['generation']:>5}"
        if result["status"] == "failed":
            lines.append(f"{line}  failed: {result['error']}")
            continue
        for _, path, form in COLUMNS:
            value = _figure(result, path)
            line += f" {'-' if value is None else format(value, form):>10}"
        if result["status"] == "partial":
            completed = result["vllm"]["completed"]
            line += f"  partial: {completed} of {result['requests']} requests" + "".join(
                f"; {error}" for error in result["errors"]
            )
        lines.append(line)
    return "\n".join(lines)


def ratios(results: Sequence[dict[str, Any]]) -> list[str]:
    """Each mode's tokens per GPU-second, and latency, against those of the modes with 16-bit weights ahead of it, for the
    same clients and generation; without such modes, against the first one's.
    """
    measured = [result for result in results if result["status"] != "failed"]
    modes = list(dict.fromkeys(result["mode"] for result in measured))
    bases = [mode for mode in modes if mode in DENSE] or modes[:1]
    lines = []
    for result in measured:
        for base in measured:
            ahead = base["mode"] in bases and modes.index(base["mode"]) < modes.index(result["mode"])
            if ahead and all(base[key] == result[key] for key in ("clients", "generation")):
                ratio = result["tokens_per_gpu_second"] / base["tokens_per_gpu_second"]
                latency = result["deepspeed_examples"]["latency"], base["deepspeed_examples"]["latency"]
                against = f"{result['mode']} tp {result['tp']} against {base['mode']} tp {base['tp']}"
                point = f"{result['clients']} clients, {result['generation']} tokens"
                line = f"{against}, {point}: {ratio:.2f} x the tokens per GPU-second"
                if None not in latency:
                    line += f", {latency[0] / latency[1]:.2f} x the latency"
                lines.append(line + (" (partial)" if "partial" in (base["status"], result["status"]) else ""))
    return lines


def plot(results: Sequence[dict[str, Any]], directory: Path) -> list[Path]:
    """Writes throughput against latency, and tokens per GPU-second by generation length, as PNG."""
    require_matplotlib()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    measured = [result for result in results if result["status"] != "failed"]
    directory.mkdir(parents=True, exist_ok=True)
    written = []

    def save(name: str, x_label: str, y_label: str) -> None:
        pyplot.xlabel(x_label)
        pyplot.ylabel(y_label)
        pyplot.ylim(bottom=0)
        if measured:
            pyplot.legend(loc="upper left", bbox_to_anchor=(1.02, 1.0))
        pyplot.grid(alpha=0.3)
        path = directory / name
        pyplot.savefig(path, dpi=150, bbox_inches="tight")
        pyplot.close()
        written.append(path)

    for group in _groups(measured, ("mode", "tp", "generation")):
        points = [(r["vllm"]["output_throughput"], r["deepspeed_examples"]["latency"], r["clients"]) for r in group]
        points = sorted(point for point in points if point[1] is not None)
        label = f"{group[0]['mode']}, TP {group[0]['tp']}, {group[0]['generation']} tokens"
        pyplot.plot([x for x, _, _ in points], [y for _, y, _ in points], marker="o", label=label)
        for x, y, clients in points:
            pyplot.annotate(str(clients), (x, y), textcoords="offset points", xytext=(4, 4), fontsize=7)
    save("throughput_latency.png", "generated tokens per second", "mean latency, s (clients beside points)")

    for group in _groups(measured, ("mode", "tp", "clients")):
        points = sorted((r["generation"], r["tokens_per_gpu_second"]) for r in group)
        label = f"{group[0]['mode']}, TP {group[0]['tp']}, {group[0]['clients']} clients"
        pyplot.plot([x for x, _ in points], [y for _, y in points], marker="o", label=label)
    save("tokens_per_gpu_second.png", "tokens generated for each request", "tokens per GPU-second")
    return written


def _groups(results: Sequence[dict[str, Any]], keys: tuple[str, ...]) -> list[list[dict[str, Any]]]:
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault(tuple(result[key] for key in keys), []).append(result)
    return list(groups.values())

"""The serving benchmark: its arithmetic, its table, and a small run of its script."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from ds_fp6.bench import serving, serving_report
from ds_fp6.bench.serving_metrics import Request, deepspeed_examples, percentile, summary, vllm
from ds_fp6.integrations.mii import load_client

ROOT = Path(__file__).parent.parent
#: Two requests whose figures are easy to work out by hand, one cut off, and one that failed at once.
REQUESTS = [
    Request(sent=10.0, prompt_tokens=7, arrivals=[10.5, 10.6, 10.9], complete=True),
    Request(sent=11.0, prompt_tokens=3, arrivals=[12.5, 13.0], complete=True),
    Request(sent=12.0, prompt_tokens=5, arrivals=[14.0]),
    Request(sent=13.0, error="no"),
]


def test_vllm_names_and_values():
    found = vllm(REQUESTS)
    expected = {
        "duration": 4.0, "completed": 2, "total_input_tokens": 15, "total_output_tokens": 6,
        "request_throughput": 0.5, "output_throughput": 1.5, "total_token_throughput": 5.25,
        "mean_ttft_ms": 1000.0, "median_ttft_ms": 1000.0, "p50_ttft_ms": 1000.0,
        "p95_ttft_ms": 1450.0, "p99_ttft_ms": 1490.0,
        # 0.4 s over 2 gaps, and 0.5 s over 1.
        "mean_tpot_ms": 350.0, "median_tpot_ms": 350.0, "p50_tpot_ms": 350.0,
        "p95_tpot_ms": 485.0, "p99_tpot_ms": 497.0,
        # Gaps of 100, 300 and 500 ms.
        "mean_itl_ms": 300.0, "median_itl_ms": 300.0, "p50_itl_ms": 300.0, "p95_itl_ms": 480.0, "p99_itl_ms": 496.0,
        "mean_e2el_ms": 1450.0, "median_e2el_ms": 1450.0, "p50_e2el_ms": 1450.0,
        "p95_e2el_ms": 1945.0, "p99_e2el_ms": 1989.0,
    }  # fmt: skip
    assert found == pytest.approx(expected)


def test_deepspeed_examples_names_and_values():
    assert deepspeed_examples(REQUESTS, clients=3) == pytest.approx({
        "throughput": 3 / 1.45, "latency": 1.45, "first_token_latency": 1.0, "token_gen_latency": 0.3,
        "tokens_per_sec": (10 / 0.9 + 5 / 2.0) / 2,
    })  # fmt: skip


def test_tokens_per_gpu_second_and_nothing_at_all():
    assert summary(REQUESTS, 3, devices=2)["tokens_per_gpu_second"] == pytest.approx(0.75)
    nothing = summary([Request(sent=1.0, error="no")], 1, devices=1)
    assert nothing["vllm"]["output_throughput"] == 0 and nothing["vllm"]["mean_ttft_ms"] is None
    assert nothing["deepspeed_examples"]["latency"] is None
    with pytest.raises(ValueError, match="no values"):
        percentile([], 50)


def arguments(*given: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    serving.add_arguments(parser)
    return parser.parse_args(given)


def test_defaults_are_the_published_experiment_with_a_gpu(monkeypatch):
    monkeypatch.setattr(serving.torch.cuda, "is_available", lambda: True)
    args = arguments()
    found = serving.configurations(args)
    assert args.model == "llama-2-70b" and serving._load_format(args) == "dummy"
    assert {(c.mode, c.tp) for c in found} == {("upstream", 2), ("fp16", 2), ("wf6af16", 1)}
    assert {c.clients for c in found} == {32} and [c.generation for c in found] == [250, 500, 1000] * 3
    assert {(c.requests, c.prompt_length, c.prompt_length_var) for c in found} == {(128, 100, 0.3)}


def test_requests_of_each_client_or_of_all():
    of_each = serving.configurations(arguments("--clients", "1,384", "--requests-per-client", "2"))
    assert {(c.clients, c.requests) for c in of_each} == {(1, 2), (384, 768)}
    of_all = serving.configurations(arguments("--clients", "1,384", "--requests", "7"))
    assert {(c.clients, c.requests) for c in of_all} == {(1, 7), (384, 7)}


def test_prompt_lengths_are_seeded_and_fit():
    configuration = serving.Configuration("fp16", 1, 2, 1000, 10, 100, 0.3)
    lengths = serving.prompt_lengths(configuration, 5, 2000)
    assert lengths == serving.prompt_lengths(configuration, 5, 2000) != serving.prompt_lengths(configuration, 6, 2000)
    mean = sum(lengths) / len(lengths)
    spread = (sum((length - mean) ** 2 for length in lengths) / len(lengths)) ** 0.5
    assert 95 < mean < 105 and 25 < spread < 35
    assert max(serving.prompt_lengths(configuration, 5, 110)) == 110
    with pytest.raises(ValueError, match="prompts of 100 tokens and 10 generated do not fit"):
        serving.prompt_lengths(configuration, 5, 99)


def test_shortened_models_need_dummy_weights(tmp_path):
    with pytest.raises(ValueError, match="--load-format dummy"):
        serving._model_directory(arguments("--model", str(serving.TINY), "--layers", "1"), tmp_path)
    args = arguments("--model", "opt-30b", "--layers", "2")
    config = json.loads((serving._model_directory(args, tmp_path) / "config.json").read_text())
    assert (config["num_hidden_layers"], config["hidden_size"]) == (2, 7168)


@pytest.fixture(scope="module")
def script(tmp_path_factory) -> tuple[subprocess.CompletedProcess, Path]:
    """A run of the script: one mode in one degree that works, and in one that does not divide the model."""
    out = tmp_path_factory.mktemp("results")
    command = [
        str(ROOT / "examples" / "benchmarks" / "run_fp6.sh"), "--modes", "wf6af16", "--tp", "3,1", "--clients", "2,3",
        "--generation", "8,1020", "--requests", "5", "--prompt-length", "12", "--time-limit", "60",
    ]  # fmt: skip
    environment = {**os.environ, "OUT": str(out), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200), out


def test_script_goes_on_after_a_failure_and_says_so(script):
    done, out = script
    assert done.returncode == 1, done.stderr
    results = json.loads((out / "results.json").read_text())["results"]
    by_status = {status: [r for r in results if r["status"] == status] for status in ("complete", "failed")}
    assert len(results) == 8 and len(by_status["complete"]) == 2
    assert {r["error"] for r in by_status["failed"] if r["tp"] == 3} == {
        next(r["error"] for r in by_status["failed"] if "cannot be split over 3 ranks" in r["error"])
    }
    assert all("do not fit" in r["error"] for r in by_status["failed"] if r["tp"] == 1 and r["generation"] == 1020)
    assert done.stdout.count("failed: ") == 6


def test_script_measures_every_request(script):
    done, out = script
    report = json.loads((out / "results.json").read_text())
    complete = [result for result in report["results"] if result["status"] == "complete"]
    assert {"environment", "model", "command", "seed", "load_format"} <= report.keys()
    for result, clients in zip(complete, (2, 3), strict=True):
        found = result["vllm"]
        assert (result["mode"], result["clients"], result["generation"]) == ("wf6af16", clients, 8)
        assert (found["completed"], found["total_output_tokens"]) == (5, 40)
        assert 5 * 12 * 0.5 < found["total_input_tokens"] < 5 * 12 * 1.7
        assert result["tokens_per_gpu_second"] == found["output_throughput"] > 0
        assert found.keys() == vllm(REQUESTS).keys()
        assert result["deepspeed_examples"].keys() == deepspeed_examples(REQUESTS, 1).keys()
        assert 0 < found["mean_ttft_ms"] < found["mean_e2el_ms"]
    assert (out / "server.log").stat().st_size > 0


class ScriptedClient:
    """Streams a token every ``PAUSE`` seconds, for ever to prompts named "endless"; fails for those named "bad"."""

    PAUSE = 0.001

    def __init__(self, port: int) -> None:
        assert port == 1234

    async def stream(self, prompt: str, new_tokens: int):
        if prompt == "bad":
            raise RuntimeError("no such prompt")
        for generated in range(1, new_tokens + 1):
            yield generated, 7
            await asyncio.sleep(3600 if prompt == "endless" and generated == 3 else self.PAUSE)

    async def close(self) -> None:
        pass


@pytest.mark.parametrize(
    "prompt, limit, status, completed, error",
    [
        ("good", None, "complete", 6, []),
        ("bad", None, "partial", 5, ["no such prompt"]),
        ("endless", 3.0, "partial", 5, []),
    ],
)
def test_what_does_not_end_or_fails_leaves_the_rest(prompt, limit, status, completed, error, monkeypatch):
    monkeypatch.setattr(load_client, "LoadClient", ScriptedClient)
    monkeypatch.setattr(serving, "WARM_UP_TOKENS", 2)
    configuration = serving.Configuration("fp16", 2, 3, 6, 4, 7, 0.0)
    args = arguments(*([] if limit is None else ["--time-limit", str(limit)]))
    texts = ["good"] * 5 + [prompt]
    found = serving._measure(args, 1234, configuration, texts)
    assert (found["status"], found["vllm"]["completed"], found["errors"]) == (status, completed, error)
    tokens = 20 + {"good": 4, "bad": 0, "endless": 3}[prompt]
    assert found["vllm"]["total_output_tokens"] == tokens
    assert found["tokens_per_gpu_second"] == pytest.approx(found["vllm"]["output_throughput"] / 2)


def test_nothing_measured_is_a_failure(monkeypatch):
    monkeypatch.setattr(load_client, "LoadClient", ScriptedClient)
    configuration = serving.Configuration("fp16", 1, 1, 2, 4, 7, 0.0)
    found = serving._measure(arguments(), 1234, configuration, ["bad", "bad"])
    assert (found["status"], found["error"]) == ("failed", "RuntimeError: no such prompt")


def test_append_keeps_other_configurations(tmp_path, monkeypatch, capsys):
    file = tmp_path / "results.json"
    ends = iter([False, True])

    def measured(args, directory, todo):
        for configuration in todo:
            yield {"name": str(configuration), **asdict(configuration), "status": "failed", "error": str(next(ends))}

    monkeypatch.setattr(serving, "_measure_all", measured)
    common = ["--json", str(file), "--append", "--generation", "8", "--modes"]
    assert serving.run(arguments(*common, "fp16")) == 1
    assert serving.run(arguments(*common, "wf6af16")) == 1
    results = json.loads(file.read_text())["results"]
    assert [(r["mode"], r["error"]) for r in results] == [("fp16", "False"), ("wf6af16", "True")]
    ends = iter(["again"])
    serving.run(arguments(*common, "fp16"))
    assert [r["error"] for r in json.loads(file.read_text())["results"]] == ["True", "again"]


def result(**changes) -> dict:
    base = {"mode": "fp16", "tp": 2, "clients": 4, "generation": 8, "requests": 4, "status": "complete", "errors": []}
    return base | summary(REQUESTS, 3, devices=2) | changes


def test_upstream_is_the_checkpoint_with_deepspeeds_own_engine(monkeypatch, tmp_path):
    monkeypatch.setattr(load_client, "served", lambda *given: given)
    args = arguments("--generation", "8")
    serving.configurations(args)
    for mode, weights, environment in [("upstream", None, serving.UPSTREAM_ENVIRONMENT), ("wf6af16", "wf6af16", None)]:
        given = serving._server(args, tmp_path, mode, 1)
        assert (given[1], given[-1]) == (weights, environment)
    assert {"DS_FP6_ATTENTION": "upstream", "DS_FP6_LOOKAHEAD": "0"}.items() <= serving.UPSTREAM_ENVIRONMENT.items()


def test_table_and_ratios():
    results = [
        result(), result(mode="wf6af16", tp=1, **summary(REQUESTS, 3, 1)),
        result(mode="wf5af16", status="partial", errors=["gone"]),
        result(mode="wf4e2m1af16", status="failed", error="E"),
    ]  # fmt: skip
    lines = serving_report.table(results).splitlines()
    assert lines[1].split()[:5] == ["fp16", "2", "4", "8", "1.5"]
    assert lines[3].endswith("partial: 2 of 4 requests; gone") and lines[4].endswith("failed: E")
    assert serving_report.ratios(results) == [
        "wf6af16 tp 1 against fp16 tp 2, 4 clients, 8 tokens: 2.00 x the tokens per GPU-second, 1.00 x the latency",
        "wf5af16 tp 2 against fp16 tp 2, 4 clients, 8 tokens: 1.00 x the tokens per GPU-second, 1.00 x the latency (partial)",
    ]


def test_plots_and_what_they_need(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib", reason="plots need matplotlib (extra: bench)")
    file = tmp_path / "results.json"
    file.write_text(json.dumps({"results": [result(), result(clients=8), result(mode="wf6af16", generation=16)]}))
    assert serving.run(arguments("--summarize", str(file), "--plots", str(tmp_path / "plots"))) == 0
    assert {path.read_bytes()[:4] for path in (tmp_path / "plots").iterdir()} == {b"\x89PNG"}
    assert "tokens_per_gpu_second.png" in capsys.readouterr().out
    monkeypatch.setattr(serving_report.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"pip install 'ds-fp6\[bench\]'"):
        serving.run(arguments("--summarize", str(file), "--plots", str(tmp_path / "plots")))

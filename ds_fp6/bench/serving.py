"""``python -m ds_fp6.bench serving``: tokens per GPU-second and latency of a server under load, mode by mode.

Each configuration is a closed loop: so many clients, each with one request at a time, stream answers from ``mii.serve``
until all requests are answered. Prompts' lengths are normally distributed, answers all have the same length.

The defaults are the published experiment's with a GPU, and a small one on the shipped model without.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ds_fp6 import __version__
from ds_fp6.bench import arguments, models, serving_metrics, serving_report
from ds_fp6.bench.serving_metrics import Request
from ds_fp6.bench.serving_report import DENSE
from ds_fp6.bench.step import UPSTREAM, UPSTREAM_ENVIRONMENT
from ds_fp6.formats import Mode

TINY = Path(__file__).resolve().parents[2] / "examples" / "tiny-python-llama"
WARM_UP_TOKENS = 8

PUBLISHED = {
    "model": "llama-2-70b", "modes": [UPSTREAM, "fp16", "wf6af16"], "clients": [32], "requests": 128, "prompt_length": 100,
    "generation": [250, 500, 1000],
}  # fmt: skip
#: About a minute on two cores.
SMALL = {
    "model": str(TINY), "modes": ["fp16", "wf6af16"], "clients": [4], "requests": 16, "prompt_length": 32,
    "generation": [32, 64, 128],
}  # fmt: skip


@dataclass(frozen=True)
class Configuration:
    """What is measured in one go. ``tp`` devices serve."""

    mode: str
    tp: int
    clients: int
    requests: int
    generation: int
    prompt_length: int
    prompt_length_var: float

    def __str__(self) -> str:
        return f"{self.mode} tp {self.tp} clients {self.clients} generation {self.generation}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    default = "default with a GPU {}, without {}"
    shapes = ", ".join(models.CONFIGS)
    parser.add_argument("--model", help=f"a checkpoint's directory, or a shape with dummy weights: {shapes}")
    parser.add_argument("--load-format", choices=["auto", "dummy"], help="default: dummy for a shape, else auto")
    parser.add_argument("--layers", type=int, metavar="N", help="only the first N transformer layers; dummy weights")
    modes = (
        "comma-separated: quantization modes, fp16 for the checkpoint's own weights, upstream for these with DeepSpeed's "
        "own engine; default with a GPU upstream,fp16,wf6af16, without fp16,wf6af16"
    )
    parser.add_argument("--modes", type=_names, help=modes)
    tp = "tensor-parallel degrees; default 1, but 2 for 16-bit weights of the published experiment"
    parser.add_argument("--tp", type=arguments.integers, metavar="N,N", help=tp)
    for name, text in (("clients", "clients"), ("generation", "tokens in each answer")):
        both = default.format(*("/".join(map(str, setting[name])) for setting in (PUBLISHED, SMALL)))
        parser.add_argument(f"--{name}", type=arguments.integers, metavar="N,N", help=f"{text}; {both}")
    for name, text in (("requests", "requests of a configuration"), ("prompt_length", "mean tokens of a prompt")):
        both = default.format(PUBLISHED[name], SMALL[name])
        parser.add_argument(f"--{name.replace('_', '-')}", type=_positive, metavar="N", help=f"{text}; {both}")
    each = "instead of --requests: so many of each client"
    parser.add_argument("--requests-per-client", type=_positive, metavar="N", help=each)
    spread = "standard deviation of prompts' lengths as a part of their mean; default 0.3"
    parser.add_argument("--prompt-length-var", type=float, default=0.3, metavar="X", help=spread)
    parser.add_argument("--seed", type=int, default=0, help="of prompts and their lengths; default 0")
    batch = "most tokens in a batch of the engine (max_ragged_batch_size); default 768"
    parser.add_argument("--batch-tokens", type=_positive, default=768, metavar="N", help=batch)
    cache = "KV blocks to allocate; default: what memory is left"
    parser.add_argument("--kv-blocks", type=_positive, metavar="N", help=cache)
    limit = "stop a configuration after so many seconds, and report what came, marked partial; default: none"
    parser.add_argument("--time-limit", type=float, metavar="SECONDS", help=limit)
    start = "give up on a server that has not started after so many seconds; default 600"
    parser.add_argument("--start-limit", type=float, default=600.0, metavar="SECONDS", help=start)
    parser.add_argument("--direct", action="store_true", help="stream from the rank itself, not by the load balancer")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, after each configuration")
    parser.add_argument("--append", action="store_true", help="keep other configurations that are in --json's file")
    parser.add_argument("--plots", type=Path, metavar="DIRECTORY", help="write plots there; needs matplotlib")
    log = "take what the server prints; default: nothing is kept"
    parser.add_argument("--log", type=Path, metavar="FILE", help=log)
    summarize = "measure nothing: print the table, and plot, what these files of --json hold"
    parser.add_argument("--summarize", type=Path, nargs="+", metavar="FILE", help=summarize)


def _names(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def configurations(args: argparse.Namespace) -> list[Configuration]:
    """All that is to be measured, those of one server after one another. Fills in ``args``' defaults.

    Raises ``ValueError`` for an unknown mode.
    """
    published = torch.cuda.is_available()
    own_experiment = args.model is not None
    for name, value in (PUBLISHED if published else SMALL).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for mode in args.modes:
        if mode not in DENSE:
            Mode.parse(mode)

    def degrees(mode: str) -> list[int]:
        return args.tp or [2 if published and not own_experiment and mode in DENSE else 1]

    def requests(clients: int) -> int:
        return clients * args.requests_per_client if args.requests_per_client else args.requests

    return [
        Configuration(mode, tp, clients, requests(clients), generation, args.prompt_length, args.prompt_length_var)
        for mode in args.modes for tp in degrees(mode) for clients in args.clients for generation in args.generation
    ]  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """0 if every configuration was measured to its end."""
    if args.plots:
        serving_report.require_matplotlib()
    if args.summarize:
        results = [result for file in args.summarize for result in json.loads(file.read_text())["results"]]
        serving_report.show(results, args.plots)
        return 0
    todo = configurations(args)
    report = {"benchmark": "serving", "environment": _environment(), "model": args.model, "layers": args.layers}
    report |= {"load_format": _load_format(args), "seed": args.seed, "command": sys.argv[1:], "results": []}
    if args.append and args.json and args.json.exists():
        again = {str(configuration) for configuration in todo}
        earlier = json.loads(args.json.read_text())["results"]
        report["results"] = [result for result in earlier if result["name"] not in again]
    with tempfile.TemporaryDirectory() as scratch:
        directory = _model_directory(args, Path(scratch))
        for result in _measure_all(args, directory, todo):
            report["results"].append(result)
            if args.json:
                args.json.parent.mkdir(parents=True, exist_ok=True)
                args.json.write_text(json.dumps(report, indent=2) + "\n")
    serving_report.show(report["results"], args.plots)
    return 0 if all(result["status"] == "complete" for result in report["results"]) else 1


def _environment() -> dict[str, Any]:
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] or [platform.processor()]
    return {"ds_fp6": __version__, "torch": torch.__version__, "devices": devices, "time": time.strftime("%FT%T%z")}


def _load_format(args: argparse.Namespace) -> str:
    return args.load_format or ("dummy" if args.model in models.CONFIGS else "auto")


def _model_directory(args: argparse.Namespace, scratch: Path) -> Path:
    """Raises ``ValueError`` for a shape, or fewer layers, with a checkpoint's weights."""
    if _load_format(args) != "dummy" and (args.layers or args.model in models.CONFIGS):
        raise ValueError("a shape's name and --layers go with dummy weights only: --load-format dummy")
    directory = models.write_config(args.model, scratch / "shape") if args.model in models.CONFIGS else Path(args.model)
    if not args.layers:
        return directory
    shortened = scratch / "shortened"
    shortened.mkdir()
    for file in directory.glob("*token*"):
        (shortened / file.name).symlink_to(file.resolve())
    config = json.loads((directory / "config.json").read_text())
    (shortened / "config.json").write_text(json.dumps(config | {"num_hidden_layers": args.layers}))
    return shortened


def _measure_all(
    args: argparse.Namespace, directory: Path, todo: list[Configuration]
) -> Iterator[dict[str, Any]]:
    """Results in order. A server serves neighbouring configurations, until one of them ends early."""
    waiting = list(todo)
    while waiting:
        mode, tp = waiting[0].mode, waiting[0].tp
        start = time.monotonic()
        try:
            with _server(args, directory, mode, tp) as port:
                start_seconds = time.monotonic() - start
                while waiting and (waiting[0].mode, waiting[0].tp) == (mode, tp):
                    configuration = waiting.pop(0)
                    try:
                        texts = _texts(args, directory, configuration)
                    except ValueError as error:
                        yield _failed(configuration, error)
                        continue
                    result = _measure(args, port, configuration, texts) | {"start_seconds": start_seconds}
                    yield result
                    if result["status"] != "complete":
                        break
        except (RuntimeError, ValueError, OSError, AssertionError) as error:
            if not waiting or (waiting[0].mode, waiting[0].tp) != (mode, tp):
                raise
            # The server did not start, and would not for the others either.
            while waiting and (waiting[0].mode, waiting[0].tp) == (mode, tp):
                yield _failed(waiting.pop(0), error)


def _server(args: argparse.Namespace, directory: Path, mode: str, tp: int) -> Any:
    from ds_fp6.integrations.mii.load_client import served

    print(f"starting {args.model} in {mode} on {tp} device{'s' if tp > 1 else ''}", file=sys.stderr, flush=True)
    state: dict[str, Any] = {"max_ragged_batch_size": max(args.batch_tokens, *args.clients)}
    if args.kv_blocks:
        state["memory_config"] = {"mode": "allocate", "size": args.kv_blocks}
    log = args.log or "/dev/null"
    return served(
        directory, None if mode in DENSE else mode, tp, _load_format(args), state, log, args.start_limit,
        UPSTREAM_ENVIRONMENT if mode == UPSTREAM else None,
    )  # fmt: skip


def _failed(configuration: Configuration, error: BaseException) -> dict[str, Any]:
    text = f"{type(error).__name__}: {error}"
    print(f"{configuration}: {text}", file=sys.stderr, flush=True)
    return {"name": str(configuration), **asdict(configuration), "status": "failed", "error": text}


def _texts(args: argparse.Namespace, directory: Path, configuration: Configuration) -> list[str]:
    """A prompt for each request. Raises ``ValueError`` where they are too long for the model."""
    from ds_fp6.integrations.mii.load_client import prompts

    config = json.loads((directory / "config.json").read_text())
    longest = config.get("max_position_embeddings", sys.maxsize) - configuration.generation
    lengths = prompt_lengths(configuration, args.seed, longest)
    return prompts(directory, lengths, config["vocab_size"], args.seed)


def _measure(args: argparse.Namespace, port: int, configuration: Configuration, texts: list[str]) -> dict[str, Any]:
    """A configuration's figures; ``status`` is complete, partial (cut off, or with failed requests) or failed."""
    cpu, wall = time.process_time(), time.monotonic()
    try:
        requests = asyncio.run(_load(port + args.direct, configuration, texts, args.time_limit))
    except RuntimeError as error:
        return _failed(configuration, error)
    share = (time.process_time() - cpu) / (time.monotonic() - wall)
    figures = serving_metrics.summary(requests, configuration.clients, configuration.tp)
    # The first is what the server failed with, later ones that it is gone.
    errors = list(dict.fromkeys(request.error for request in requests if request.error))
    whole = figures["vllm"]["completed"] == configuration.requests
    print(f"{configuration}: {figures['vllm']['output_throughput']:.1f} tokens/s", file=sys.stderr, flush=True)
    if not figures["vllm"]["total_output_tokens"]:
        return _failed(configuration, RuntimeError(errors[0] if errors else "no token came within the time limit"))
    return {
        "name": str(configuration), **asdict(configuration), "status": "complete" if whole else "partial",
        "errors": errors, "client_cpu_share": share, **figures,
    }  # fmt: skip


def prompt_lengths(configuration: Configuration, seed: int, longest: int) -> list[int]:
    """As many lengths as requests, normally distributed within 1 … ``longest``.

    Raises ``ValueError`` where the mean itself is too long.
    """
    mean = configuration.prompt_length
    if mean > longest:
        raise ValueError(f"prompts of {mean} tokens and {configuration.generation} generated do not fit the model")
    draw = random.Random(seed)
    spread = mean * configuration.prompt_length_var
    return [min(longest, max(1, round(draw.gauss(mean, spread)))) for _ in range(configuration.requests)]


async def _load(port: int, configuration: Configuration, texts: list[str], limit: float | None) -> list[Request]:
    """All requests that were sent, by ``clients`` clients, each of which waits for one answer before its next one."""
    from ds_fp6.integrations.mii.load_client import LoadClient

    client = LoadClient(port)
    deadline = None if limit is None else time.monotonic() + limit
    try:
        warm_up = [_send(client, text, WARM_UP_TOKENS, []) for text in texts[: configuration.clients]]
        await _until(deadline, warm_up)
        sent: list[Request] = []
        queue = iter(texts)
        with tqdm(total=len(texts), desc=str(configuration), unit="request", disable=None) as bar:

            async def answer_all() -> None:
                for text in queue:
                    await _send(client, text, configuration.generation, sent)
                    bar.update()

            await _until(deadline, [answer_all() for _ in range(configuration.clients)])
        return sent
    finally:
        await client.close()


async def _until(deadline: float | None, work: list[Any]) -> None:
    """Runs all of ``work`` at once, and cancels what has not ended at ``deadline``."""
    tasks = [asyncio.ensure_future(one) for one in work]
    rest = None if deadline is None else max(0.0, deadline - time.monotonic())
    done, late = await asyncio.wait(tasks, timeout=rest)
    for task in late:
        task.cancel()
    await asyncio.gather(*late, return_exceptions=True)
    for task in done:
        task.result()


async def _send(client: Any, text: str, new_tokens: int, sent: list[Request]) -> None:
    """Streams one answer. What goes wrong is kept with the request: the others go on."""
    request = Request(time.perf_counter())
    sent.append(request)
    try:
        async for generated, prompt in client.stream(text, new_tokens):
            now = time.perf_counter()
            request.prompt_tokens = prompt
            request.arrivals += [now] * (generated - len(request.arrivals))
        request.complete = len(request.arrivals) == new_tokens
        if not request.complete:
            request.error = f"{len(request.arrivals)} tokens came instead of {new_tokens}"
    except RuntimeError as error:
        request.error = str(error)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_arguments(parser)
    sys.exit(run(parser.parse_args()))

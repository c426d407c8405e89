"""The command ``ds-fp6``. Each command imports what it needs when it runs, so that ``--help`` is quick."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import sys
from collections.abc import Sequence

from ds_fp6 import __version__
from ds_fp6.serving import options as serving_options

#: Commands whose arguments belong to modules of ``ds_fp6.bench``.
FORWARDED = {
    "bench": "run a benchmark: ds-fp6 bench COMMAND --help",
    "eval": "evaluate a checkpoint: ds-fp6 eval perplexity --help",
}
EVALUATIONS = ("perplexity",)
#: Modules that ``serve`` imports beyond what the package requires, and the packages that have them.
SERVER_MODULES = {"fastapi": "fastapi", "uvicorn": "uvicorn", "prometheus_client": "prometheus-client"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status: 0, 1 for an error that is printed, 2 for wrong usage."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        if arguments and arguments[0] in FORWARDED:
            return _forward(*arguments)
        options = _parser().parse_args(arguments)
        options.arguments = arguments
        return options.run(options)
    except (ValueError, TypeError, RuntimeError, NotImplementedError, OSError) as error:
        print(f"ds-fp6: {type(error).__name__}: {error}", file=sys.stderr)
        return 1


def _forward(command: str, *arguments: str) -> int:
    from ds_fp6.bench.__main__ import COMMANDS
    from ds_fp6.bench.__main__ import main as bench

    names = [name for name in COMMANDS if (name in EVALUATIONS) == (command == "eval")]
    return bench(arguments, f"ds-fp6 {command}", names)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ds-fp6", description="FP6-centric LLM serving.")
    parser.add_argument("--version", action="version", version=f"ds_fp6 {__version__}")
    # DeepSpeed's launcher puts it before the command; the rank is in the environment as well.
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    env = commands.add_parser("env", help="what this machine has and which quantization modes it can run")
    env.add_argument("--json", action="store_true", help="print JSON")
    env.set_defaults(run=_env)

    generate = commands.add_parser("generate", help="continue prompts with a model")
    generate.add_argument("model", metavar="MODEL", help="a checkpoint's directory or a Hugging Face model name")
    generate.add_argument("prompts", metavar="PROMPT", nargs="+", help="text to continue")
    generate.add_argument("--quantization-mode", default="wf6af16", metavar="MODE", help="'none' for 16-bit weights")
    generate.add_argument("--max-new-tokens", type=_positive, default=128, metavar="N", help="default %(default)s")
    generate.add_argument("--sample", action="store_true", help="sample; without it the likeliest token is taken")
    generate.add_argument("--temperature", type=float, metavar="T", help="for --sample")
    generate.add_argument("--top-p", type=float, metavar="P", help="for --sample")
    generate.add_argument("--top-k", type=_positive, metavar="K", help="for --sample")
    generate.add_argument("--seed", type=int, help="makes --sample repeatable")
    generate.add_argument("--json", action="store_true", help="print JSON")
    generate.set_defaults(run=_generate)

    serve = commands.add_parser("serve", help="serve a model over HTTP with OpenAI's API")
    serving_options.add_arguments(serve)
    serve.set_defaults(run=_serve)

    for name, summary in FORWARDED.items():
        commands.add_parser(name, help=summary, add_help=False)
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


@contextlib.contextmanager
def _stdout_for_results():
    """Keeps what libraries print out of standard output, which a program may read."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def _env(options: argparse.Namespace) -> int:
    with _stdout_for_results():
        from ds_fp6 import environment

        found = environment.report()
    print(json.dumps(found, indent=2) if options.json else environment.render(found))
    return 0


def _generate(options: argparse.Namespace) -> int:
    sampling = {"temperature": options.temperature, "top_p": options.top_p, "top_k": options.top_k}
    sampling = {name: value for name, value in sampling.items() if value is not None}
    if sampling and not options.sample:
        raise ValueError(f"{', '.join('--' + name.replace('_', '-') for name in sampling)} need --sample")
    mode = None if options.quantization_mode == "none" else options.quantization_mode
    with _stdout_for_results():
        import torch

        from ds_fp6.integrations.pipeline import generate, open_pipeline

        if options.seed is not None:
            torch.manual_seed(options.seed)
        pipeline = open_pipeline(options.model, mode)
        result = generate(
            pipeline, options.prompts, max_new_tokens=options.max_new_tokens, do_sample=options.sample, **sampling
        )
    if options.json:
        print(json.dumps(_as_json(options, result), indent=2))
        return 0
    for prompt, response in zip(options.prompts, result.responses, strict=True):
        print(f"{prompt}{response.generated_text}\n")
    print(f"{result.tokens} tokens in {result.seconds:.2f} s, {result.tokens_per_second:.1f} tokens/s", file=sys.stderr)
    return 0


def _serve(options: argparse.Namespace) -> int:
    for module, package in SERVER_MODULES.items():
        if importlib.util.find_spec(module) is None:
            raise RuntimeError(f"ds-fp6 serve needs {package}: pip install 'ds-fp6[serve]'")
    from ds_fp6.serving.lifecycle import serve

    return serve(serving_options.settings(options), [sys.executable, "-m", "ds_fp6.cli", *options.arguments])


def _as_json(options: argparse.Namespace, result) -> dict:
    return {
        "model": options.model,
        "quantization_mode": options.quantization_mode,
        "seconds": result.seconds,
        "tokens_per_second": result.tokens_per_second,
        "responses": [
            {
                "prompt": prompt,
                "generated_text": response.generated_text,
                "prompt_tokens": response.prompt_length,
                "generated_tokens": response.generated_length,
                "finish_reason": response.finish_reason.value,
            }
            for prompt, response in zip(options.prompts, result.responses, strict=True)
        ],
    }


if __name__ == "__main__":
    sys.exit(main())

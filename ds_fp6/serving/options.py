"""The command line of ``ds-fp6 serve``. Flags are named as in MII's and vLLM's servers where they mean the same."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from ds_fp6.serving.settings import Settings

DEFAULTS = Settings(model="", served_model_names=())


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _port(text: str) -> int:
    value = int(text)
    if not 0 <= value < 65536:
        raise argparse.ArgumentTypeError(f"must be from 0 to 65535, got {value}")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number of seconds, got {text}")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a checkpoint's directory or a Hugging Face model name")
    model = parser.add_argument_group("model")
    model.add_argument("--quantization-mode", default=DEFAULTS.quantization_mode, metavar="MODE",
                       help="such as wf6af16 (the default) or wf6abf16; 'none' for the checkpoint's own weights")
    model.add_argument("--load-format", choices=("auto", "dummy"), default=DEFAULTS.load_format,
                       help="dummy: random weights of the config.json's shapes, no checkpoint")
    model.add_argument("--tokenizer", metavar="DIR", help="a tokenizer's directory or name; default: the model's own")
    model.add_argument("--chat-template", metavar="FILE_OR_TEXT",
                       help="a Jinja template for /v1/chat/completions; default: the tokenizer's own")
    model.add_argument("--device", choices=("auto", "cpu", "cuda"), default=DEFAULTS.device,
                       help="default: a GPU if there is one")
    model.add_argument("--tensor-parallel", "--tensor-parallel-size", "-tp", type=_positive, metavar="N",
                       default=int(os.environ.get("WORLD_SIZE", DEFAULTS.tensor_parallel)),
                       help="devices, or processes of a CPU, that share each layer; they are started by this command, "
                       "or by the deepspeed launcher or torchrun (default 1, or the launcher's WORLD_SIZE)")
    model.add_argument("--max-model-len", "--max-length", type=_positive, metavar="TOKENS",
                       help="longest sequence, prompt and answer together; default: the model's, or what the KV cache "
                       "holds if that is less")
    model.add_argument("--max-num-seqs", type=_positive, metavar="N", help="sequences in one batch; default 512")
    model.add_argument("--max-num-batched-tokens", type=_positive, metavar="TOKENS",
                       help="tokens in one batch: longer prompts are split over several; default 768")
    model.add_argument("--num-kv-blocks", "--num-gpu-blocks-override", type=_positive, metavar="N",
                       help="blocks of the KV cache (64 or 128 tokens); default: what fits into the memory")
    server = parser.add_argument_group("server")
    server.add_argument("--host", default=DEFAULTS.host, help="address to listen on, 0.0.0.0 for all; "
                        "default %(default)s")
    server.add_argument("--port", type=_port, default=DEFAULTS.port, help="default %(default)s; 0 for a free one")
    server.add_argument("--served-model-name", nargs="+", metavar="NAME",
                        help="names that clients call the model by; default: MODEL as given")
    server.add_argument("--api-key", "--api-keys", nargs="+", action="extend", metavar="KEY", default=[],
                        help="clients must send one of these keys; others can see them in the list of processes")
    server.add_argument("--api-key-file", metavar="FILE", help="more keys, one a line")
    server.add_argument("--max-request-bytes", type=_positive, metavar="BYTES", default=DEFAULTS.max_request_bytes,
                        help="longer requests get status 413; default %(default)s")
    server.add_argument("--max-concurrent-requests", type=_positive, metavar="N",
                        default=DEFAULTS.max_concurrent_requests,
                        help="requests in flight, beyond which others get status 429; default %(default)s")
    server.add_argument("--drain-seconds", type=_seconds, metavar="SECONDS", default=DEFAULTS.drain_seconds,
                        help="how long what runs may go on after SIGTERM or SIGINT; default %(default)s")


def read_template(given: str | None) -> str | None:
    """A chat template from a file's path or from the template's own text.

    Raises ``FileNotFoundError`` for what is neither: no file, and no Jinja tag in it.
    """
    if given is None or "{{" in given or "{%" in given:
        return given
    path = Path(given)
    if not path.is_file():
        raise FileNotFoundError(f"chat template {given!r} is no file, and no template either")
    return path.read_text()


def settings(options: argparse.Namespace) -> Settings:
    """Raises ``OSError`` for a file of keys or a template that cannot be read, ``ValueError`` without keys in it."""
    keys = list(options.api_key)
    if options.api_key_file is not None:
        found = [line.strip() for line in Path(options.api_key_file).read_text().splitlines() if line.strip()]
        if not found:
            raise ValueError(f"--api-key-file {options.api_key_file} has no keys")
        keys += found
    if not all(keys):
        raise ValueError("--api-key is empty")
    names = options.served_model_name or [options.model]
    taken = {name: getattr(options, name) for name in (
        "model", "host", "port", "load_format", "tokenizer", "device", "tensor_parallel",
        "max_model_len", "max_num_seqs", "max_num_batched_tokens", "num_kv_blocks", "max_request_bytes",
        "max_concurrent_requests", "drain_seconds",
    )}
    mode = None if options.quantization_mode == "none" else options.quantization_mode
    template = read_template(options.chat_template)
    return Settings(
        served_model_names=tuple(names), api_keys=tuple(keys), quantization_mode=mode, chat_template=template, **taken
    )

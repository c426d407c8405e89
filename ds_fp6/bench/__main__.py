"""Runs a benchmark by name. Each module has ``add_arguments(parser)`` and ``run(arguments) -> exit status``."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

#: Name of a command, and of its module; only the one that runs is imported.
COMMANDS = {
    "linear": "the FP6 linear layer against torch's, for shapes of well-known models",
    "energy": "joules that a linear layer draws on a GPU, FP6 and cuBLAS",
    "quantize": "quantization to packed codes, for shapes of well-known models",
    "generate": "loading and generating with a model of any shape and random weights",
    "step": "one step of the engine: time by class of kernel, and the floor",
    "attention": "the attention kernels by themselves, for heads of well-known models",
    "host": "how long a device waits for MII's generation loop between steps; plays the device",
    "loading": "reading, moving and loading a checkpoint of a model's shape",
    "serving": "throughput and latency of a server under load, with real or random weights",
    "perplexity": "held-out perplexity of a checkpoint in each quantization mode",
}


def main(
    arguments: Sequence[str] | None = None,
    program: str = "python -m ds_fp6.bench",
    commands: Sequence[str] = tuple(COMMANDS),
) -> int:
    """Runs ``arguments[0]``, one of ``commands``, with the rest; ``program`` is what its help calls itself."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    name = arguments[0] if arguments else None
    if name not in commands:
        width = max(map(len, commands))
        listing = "\n".join(f"  {command:{width}}  {COMMANDS[command]}" for command in commands)
        parser = argparse.ArgumentParser(
            prog=program, epilog=f"commands:\n{listing}", formatter_class=argparse.RawDescriptionHelpFormatter
        )
        usage = "one of those below; COMMAND --help lists its options"
        parser.add_argument("command", choices=commands, metavar="COMMAND", help=usage)
        parser.parse_args(arguments)
        return 2
    module = importlib.import_module(f"ds_fp6.bench.{name}")
    parser = argparse.ArgumentParser(prog=f"{program} {name}", description=COMMANDS[name])
    module.add_arguments(parser)
    return module.run(parser.parse_args(arguments[1:]))


if __name__ == "__main__":
    sys.exit(main())

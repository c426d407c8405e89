"""``python -m ds_fp6.bench host``: how long a device waits for MII's generation loop, on any machine.

The device is played (``ds_fp6/integrations/mii/played.py``): it takes ``--step-ms`` for each step. Counted is what it
waits between steps in which all sequences generate, each for a client thread of its own. ``upstream`` is MII's own
loop.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

LOOPS = ("upstream", "plain", "lookahead")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    shipped = Path("examples/tiny-python-llama")
    parser.add_argument("--model", type=Path, default=shipped, help="directory with config.json and tokenizer")
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 32, 128], metavar="N")
    parser.add_argument("--step-ms", type=float, default=20.0, help="what the device takes for a step")
    parser.add_argument("--new-tokens", type=int, default=50, metavar="N", help="of each sequence")
    parser.add_argument("--loops", nargs="+", default=list(LOOPS), choices=LOOPS)
    parser.add_argument("--json", type=Path, help="write the figures to this file")


def run(args: argparse.Namespace) -> int:
    """Prints the table. Raises ``ValueError`` where no step had all sequences."""
    from ds_fp6.integrations.mii import played

    bench = played.Bench(args.model, max(args.sequences), args.new_tokens, args.step_ms / 1e3)
    figures = [
        bench.measure(loop, sequences, stream)
        for sequences in args.sequences for stream in (False, True) for loop in args.loops
    ]  # fmt: skip
    print(f"steps of {args.step_ms:g} ms")
    print(f"{'sequences':>9} {'stream':>6} {'loop':10} {'µs idle a step':>14} {'idle':>7}")
    for figure in figures:
        stream = "yes" if figure.stream else "no"
        line = f"{figure.sequences:9} {stream:>6} {figure.loop:10} {figure.idle_us:14.0f} {figure.idle_share:7.2%}"
        print(line)
    if args.json:
        args.json.write_text(json.dumps({"step_ms": args.step_ms, "figures": [asdict(f) for f in figures]}, indent=2))
    return 0

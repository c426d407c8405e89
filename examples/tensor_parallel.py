"""Greedy text from a model that is split over several ranks, each of which holds a part of every layer.

    deepspeed --num_gpus 2 examples/tensor_parallel.py
    torchrun --nproc-per-node 2 examples/tensor_parallel.py

Both start as many processes as there are to be ranks. They talk through NCCL on GPUs, through gloo on CPUs.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from ds_fp6.integrations.pipeline import generate, open_pipeline

MODEL = Path(__file__).parent / "tiny-python-llama"
PROMPTS = ["def main(", "import os\n\ndef read_file("]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", default=PROMPTS, help="text to continue")
    parser.add_argument("--model", default=str(MODEL), help="default: the model beside this script")
    parser.add_argument("--quantization-mode", default="wf6af16", metavar="MODE", help="'none' for 16-bit weights")
    parser.add_argument("--tensor-parallel", type=int, metavar="N", help="ranks; default: all that were started")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="default %(default)s")
    parser.add_argument("--load-format", choices=["auto", "dummy"], default="auto", help="'dummy': random weights")
    # The deepspeed launcher passes it unless it is told --no_local_rank. LOCAL_RANK says the same.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()

    ranks = options.tensor_parallel or int(os.environ.get("WORLD_SIZE", 1))
    mode = None if options.quantization_mode == "none" else options.quantization_mode
    try:
        pipeline = open_pipeline(options.model, mode, tensor_parallel=ranks, load_format=options.load_format)
    except (OSError, ValueError, RuntimeError) as error:
        print(f"rank {os.environ.get('RANK', 0)}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return 1
    result = generate(
        pipeline, options.prompts, max_new_tokens=options.max_new_tokens, do_sample=False, ignore_eos=True
    )
    if pipeline.is_rank_0:
        for prompt, response in zip(options.prompts, result.responses, strict=True):
            print(f"{prompt}{response.generated_text}\n", flush=True)
        speed = f"{result.tokens} tokens in {result.seconds:.2f} s"
        print(f"{speed} on {ranks} rank{'s' if ranks > 1 else ''}, {options.quantization_mode}", file=sys.stderr)
    pipeline.destroy()
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The shipped model, its linear layers once in 16 bits and once in 6, continuing the same prompts: ``make demo``."""

from __future__ import annotations

import argparse
import gc
import textwrap
from pathlib import Path

from ds_fp6.integrations.pipeline import generate, linear_weight_bytes, open_pipeline

MODEL = Path(__file__).parent / "tiny-python-llama"
PROMPTS = ["def main(", "class Stack:\n    def __init__(self", "import os\n\ndef read_file("]


def measure(model: str, mode: str | None, prompts: list[str], new_tokens: int) -> tuple[list[str], float, int]:
    """The continuations, the tokens per second of the best of three runs, and the linear layers' weight bytes."""
    pipeline = open_pipeline(model, mode)
    try:
        runs = [
            generate(pipeline, prompts, max_new_tokens=new_tokens, do_sample=False, ignore_eos=True) for _ in range(3)
        ]  # fmt: skip
        texts = [response.generated_text for response in runs[0].responses]
        return texts, max(run.tokens_per_second for run in runs), linear_weight_bytes(pipeline)
    finally:
        pipeline.destroy()
        del pipeline
        gc.collect()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(MODEL), help="default: the model beside this script")
    parser.add_argument("--quantization-mode", default="wf6af16")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("prompts", nargs="*", default=PROMPTS)
    options = parser.parse_args()

    names = (options.quantization_mode, "FP16")
    runs = [
        measure(options.model, mode, options.prompts, options.new_tokens)
        for mode in (options.quantization_mode, None)
    ]  # fmt: skip
    for i, prompt in enumerate(options.prompts):
        for name, (texts, _, _) in zip(names, runs, strict=True):
            print(f"\n--- {name}\n{textwrap.indent(prompt + texts[i], '    ')}")
    print(f"\n{'linear layers in':18}{'weight bytes':>14}{'tokens/s':>12}")
    for name, (_, tokens_per_second, weight_bytes) in zip(names, runs, strict=True):
        print(f"{name:18}{weight_bytes:>14,}{tokens_per_second:>12.1f}")
    print(f"The weights take {runs[1][2] / runs[0][2]:.2f} times fewer bytes.")


if __name__ == "__main__":
    main()

"""Greedy text of a checkpoint through ``mii.pipeline`` on this process's accelerator, as JSON: run as a program.

    python tests/pipeline_text.py MODEL MODE NEW_TOKENS < prompts.json > texts.json

It imports MII only, which this package hooks by itself where it is installed.
"""

from __future__ import annotations

import contextlib
import json
import sys


def main() -> None:
    model, mode, new_tokens = sys.argv[1], sys.argv[2], int(sys.argv[3])
    prompts = json.load(sys.stdin)
    with contextlib.redirect_stdout(sys.stderr):
        import mii

        pipe = mii.pipeline(model, quantization_mode=mode)
        answers = pipe(prompts, max_new_tokens=new_tokens, do_sample=False, ignore_eos=True)
        texts = [answer.generated_text for answer in answers]
        pipe.destroy()
    json.dump(texts, sys.stdout)


if __name__ == "__main__":
    main()

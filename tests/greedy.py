"""Greedy tokens of a checkpoint on this process's accelerator, as JSON: run as a program, once for each device.

    python tests/greedy.py MODEL MODE NEW_TOKENS < prompts.json > tokens.json
"""

from __future__ import annotations

import contextlib
import json
import sys


def main() -> None:
    model, mode, new_tokens = sys.argv[1], sys.argv[2], int(sys.argv[3])
    prompts = json.load(sys.stdin)
    with contextlib.redirect_stdout(sys.stderr):
        import torch
        from transformers import AutoTokenizer

        from ds_fp6.integrations.engine import build_engine, step

        tokenizer = AutoTokenizer.from_pretrained(model)
        engine = build_engine(
            model, None if mode == "none" else mode, max_context=512, max_ragged_sequence_count=len(prompts),
            memory_config={"mode": "allocate", "size": 8 * len(prompts)},
        )  # fmt: skip
        tokens = {uid: torch.tensor(tokenizer(prompt)["input_ids"]) for uid, prompt in enumerate(prompts)}
        chosen, margins = [[] for _ in prompts], [[] for _ in prompts]
        for _ in range(new_tokens):
            logits = step(engine, tokens).float().cpu()
            best = logits.argmax(dim=-1, keepdim=True)  # of equal ones the first, as MII's pipeline has it
            first, second = logits.topk(2, dim=-1).values.unbind(-1)
            for uid in range(len(prompts)):
                chosen[uid].append(best[uid].item())
                margins[uid].append((first[uid] - second[uid]).item())
            tokens = {uid: best[uid].clone() for uid in tokens}
    json.dump({"tokens": chosen, "margins": margins}, sys.stdout)


if __name__ == "__main__":
    main()

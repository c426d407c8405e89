"""What the engine computes with Triton's kernels in their interpreter, which takes long: a program that runs ahead.

    python tests/interpreted_engine.py FOLDER shipped         # FOLDER/shipped.pt: tokens of the shipped model
    python tests/interpreted_engine.py FOLDER FAMILY ...      # FOLDER/FAMILY, a model, and FOLDER/FAMILY.pt: its logits

The settings in the environment say whose kernels run.
"""

from __future__ import annotations

import sys
from pathlib import Path

import models
import torch
import triton_device  # noqa: F401  (before the kernels)
from transformers import AutoTokenizer

import ds_fp6.integrations.engine as fastgen

SHIPPED = Path(__file__).parent.parent / "examples" / "tiny-python-llama"
STATE = dict(max_ragged_batch_size=96, max_ragged_sequence_count=4, max_tracked_sequences=4)
PROMPTS = [torch.arange(3, 60), torch.arange(5, 9), torch.arange(60, 66)]
TEXTS, NEW_TOKENS = ["for i in range(", "def read_file(path):\n    with open("], 12


def checkpoint(family: str, folder: Path) -> Path:
    size = {} if family == "llama_gqa" else {"hidden_size": 128}
    size |= {"word_embed_proj_dim": 128} if family == "opt" else {}
    folder.mkdir()
    return models.save(models.build(family, torch.float16, **size), folder)


def logits(path: Path, steps: int = 2) -> list[torch.Tensor]:
    """Of the prompts' step and ``steps`` decode steps, whose tokens are given, and of a mixed batch at the end."""
    engine = fastgen.build_engine(path, None, memory_config={"mode": "allocate", "size": 8}, **STATE)
    found = [fastgen.step(engine, dict(enumerate(PROMPTS))).clone()]
    for i in range(steps):
        tokens = {uid: torch.tensor([(7 * uid + i) % 250]) for uid in range(len(PROMPTS))}
        found.append(fastgen.step(engine, tokens).clone())
    found.append(fastgen.step(engine, {0: torch.tensor([9]), 1: torch.arange(3), 2: torch.tensor([8])}).clone())
    return found


def shipped_tokens() -> torch.Tensor:
    """Greedy tokens int64 [texts, NEW_TOKENS] of the shipped model in 6 bits."""
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    prompts = [torch.tensor(tokenizer(text)["input_ids"]) for text in TEXTS]
    engine = fastgen.build_engine(
        SHIPPED, "wf6af16", memory_config={"mode": "allocate", "size": 4}, max_context=256, **STATE
    )  # fmt: skip
    return fastgen.generate(engine, prompts, NEW_TOKENS)[0]


def main() -> None:
    folder = Path(sys.argv[1])
    for what in sys.argv[2:]:
        found = shipped_tokens() if what == "shipped" else logits(checkpoint(what, folder / what))
        torch.save(found, folder / f"{what}.pt")


if __name__ == "__main__":
    main()

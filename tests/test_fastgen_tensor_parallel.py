"""Two ranks over gloo against one: the same tokens, weights quantized or not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import models
import pytest
import torch

TESTS = Path(__file__).parent
MODES = (None, "wf6a32", "wf5a32g4")
PROMPT_LENGTHS = (7, 100, 200)
NEW_TOKENS = 16


def generate(path: str, mode: str | None) -> list[str]:
    """Greedy tokens of the model in ``path`` for fixed prompts, as text; then what an empty prompt raises."""
    import mii

    pipe = mii.pipeline(
        path, quantization_mode=mode, tokenizer=models.number_tokenizer(),
        inference_engine_config={"state_manager": {"memory_config": {"mode": "allocate", "size": 8}}},
    )  # fmt: skip
    prompts = [" ".join(map(str, prompt.tolist())) for prompt in models.random_prompts(*PROMPT_LENGTHS)]
    with pytest.raises(ValueError, match="no tokens"):
        pipe([*prompts, ""])
    responses = pipe(prompts, max_new_tokens=NEW_TOKENS, do_sample=False, ignore_eos=True)
    pipe.destroy()
    return [response.generated_text for response in responses]


@pytest.mark.parametrize("family", ["llama_gqa", "opt"])
def test_two_ranks_generate_what_one_does(family, tmp_path):
    path = models.save(models.build(family), tmp_path / "model")
    ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    environment = {**os.environ, "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}", "OMP_NUM_THREADS": "1"}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    result = tmp_path / "result.json"
    subprocess.run([*ranks, path, str(result)], check=True, env=environment, timeout=200)
    expected = {str(mode): generate(path, mode) for mode in MODES}
    assert json.loads(result.read_text()) == expected


if __name__ == "__main__":
    import ds_fp6  # noqa: F401

    torch.set_num_threads(1)
    texts = {str(mode): generate(sys.argv[1], mode) for mode in MODES}
    if os.environ["RANK"] == "0":
        Path(sys.argv[2]).write_text(json.dumps(texts))

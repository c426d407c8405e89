"""Several ranks over gloo against one: the same tokens and the same codes, by torchrun and the deepspeed launcher."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import models
import psutil
import pytest
import tensor_parallel_rank
import torch

from ds_fp6.integrations.mii import requests
from ds_fp6.integrations.pipeline import generate as generate_text
from ds_fp6.integrations.pipeline import open_pipeline

TESTS = Path(__file__).parent
EXAMPLES = TESTS.parent / "examples"
MODES = (None, "wf6a32", "wf5a32g4")
#: More than three blocks of 128 tokens hold: the fourth waits, and the third starts over.
PROMPT_LENGTHS = (7, 90, 92, 200)
NEW_TOKENS = 44


def generate(path: str, mode: str | None) -> list[str]:
    """Greedy tokens of the model in ``path`` for fixed prompts, as text; then what an empty prompt raises."""
    import mii

    pipe = mii.pipeline(
        path, quantization_mode=mode, tokenizer=models.number_tokenizer(),
        inference_engine_config={"state_manager": {"memory_config": {"mode": "allocate", "size": 3}}},
    )  # fmt: skip
    prompts = [" ".join(map(str, prompt.tolist())) for prompt in models.random_prompts(*PROMPT_LENGTHS)]
    with pytest.raises(ValueError, match="no tokens"):
        pipe([*prompts, ""])
    responses = pipe(prompts, max_new_tokens=NEW_TOKENS, do_sample=False, ignore_eos=True)
    pipe.destroy()
    return [response.generated_text for response in responses]


def rank_environment() -> dict[str, str]:
    """For a launcher."""
    return {**os.environ, "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}", "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize(("family", "ahead"), [("llama_gqa", "0"), ("opt", "1")])
def test_two_ranks_generate_what_one_does(family, ahead, tmp_path, monkeypatch):
    """The second with lookahead, for which the first rank sends the other its tokens."""
    starts_over, start_over = [], requests.start_over
    monkeypatch.setattr(requests, "start_over", lambda *args: (starts_over.append(1), start_over(*args)))
    path = models.save(models.build(family), tmp_path / "model")
    ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    result = tmp_path / "result.json"
    environment = {**rank_environment(), "DS_FP6_LOOKAHEAD": ahead}
    subprocess.run([*ranks, path, str(result)], check=True, env=environment, timeout=200)
    expected = {str(mode): generate(path, mode) for mode in MODES}
    assert json.loads(result.read_text()) == expected
    assert len(starts_over) == len(MODES)


#: Nothing of this model is a multiple of 4 but the layers that the engine does not split.
ODD = dict(
    hidden_size=54, head_dim=10, num_attention_heads=6, num_key_value_heads=6, intermediate_size=75, num_hidden_layers=1
)


def launch(*command: str, ranks: int, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    """Runs a script through the deepspeed launcher, which must end in a minute."""
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks), "--master_port"]
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        launcher.append(str(probe.getsockname()[1]))
    return subprocess.run(
        [*launcher, *command], env={**rank_environment(), **(environment or {})}, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip


def gathered(ranks: list[dict[str, torch.Tensor]], name: str, heads: int) -> torch.Tensor:
    """The full weight of which each rank holds a part."""
    parts = [rank[name] for rank in ranks]
    if ".qkv_w." in name:
        thirds = [part.chunk(3) for part in parts]
        return torch.cat([third[i] for i in range(3) for third in thirds])
    if any(split in name for split in ("attn_out_w", "mlp_2")):
        if name.endswith(".scales"):
            assert all(torch.equal(part, parts[0]) for part in parts), f"{name} differs between ranks"
            return parts[0]
        return torch.cat(parts, dim=1)
    return torch.cat(parts)


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_launcher_changes_neither_text_nor_codes(ranks, tmp_path):
    path = models.save(models.build("llama", **ODD), tmp_path / "model")
    done = launch(str(TESTS / "tensor_parallel_rank.py"), path, "wf6a32", str(tmp_path), ranks=ranks)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(ranks)]
    texts, weights = tensor_parallel_rank.generate(path, "wf6a32", 1)
    assert found[0]["texts"] == texts
    assert len(weights) == 8
    for name, full in weights.items():
        whole = gathered([rank["weights"] for rank in found], name, ODD["num_attention_heads"])
        assert torch.equal(whole, full), f"{name} of {ranks} ranks differs from one rank's"

    y, layers = tensor_parallel_rank.two_layers("wf6a32", 0, 1, lambda _: None)
    for name, full in layers.items():
        assert torch.equal(gathered([rank["layers"] for rank in found], name, 0), full), name
    for rank in found:
        torch.testing.assert_close(rank["y"], y, rtol=1e-5, atol=1e-4)


def test_example_through_the_launcher():
    model = EXAMPLES / "tiny-python-llama"
    prompts = ["def main(", "import os\n"]
    options = ["--quantization-mode", "wf6a32", "--max-new-tokens", "16"]
    done = launch(str(EXAMPLES / "tensor_parallel.py"), *options, *prompts, ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    pipeline = open_pipeline(model, "wf6a32")
    responses = generate_text(pipeline, prompts, max_new_tokens=16, do_sample=False, ignore_eos=True).responses
    pipeline.destroy()
    for prompt, response in zip(prompts, responses, strict=True):
        assert done.stdout.count(f"{prompt}{response.generated_text}\n\n") == 1  # by one rank only


def test_a_degree_that_does_not_divide_the_heads_is_refused_by_every_rank(tmp_path):
    heads = dict(ODD, hidden_size=55, num_attention_heads=5, num_key_value_heads=5)
    odd = models.save(models.build("llama", **heads), tmp_path / "odd")
    marked = {"DS_FP6_TEST_MARK": str(tmp_path)}
    done = launch(str(EXAMPLES / "tensor_parallel.py"), "--model", odd, ranks=2, environment=marked)
    assert done.returncode != 0
    assert "5 key/value heads cannot be split over 2 ranks" in done.stderr
    assert not [p.pid for p in psutil.process_iter() if marked.items() <= environment_of(p).items()]


def environment_of(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except psutil.Error:
        return {}


def test_every_rank_refuses_too_many_ranks(monkeypatch):
    import mii  # noqa: F401  (its hooks are of use once it is there)
    from deepspeed.accelerator import get_accelerator

    from ds_fp6.integrations.mii import api

    monkeypatch.setattr(api, "on_cpu", lambda: False)
    monkeypatch.setattr(type(get_accelerator()), "device_count", lambda self: 2)
    for rank in range(4):
        for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 4, "LOCAL_WORLD_SIZE": 4}.items():
            monkeypatch.setenv(name, str(value))
        with pytest.raises(ValueError, match="4 ranks need as many devices, this machine has 2"):
            api._check_ranks(4)
        with pytest.raises(ValueError, match="tensor_parallel is 2, but the launcher started 4 ranks"):
            api._check_ranks(2)


def test_ranks_need_a_launcher_on_one_machine(monkeypatch):
    import mii

    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match="torchrun --nproc-per-node 2"):
        mii.pipeline(str(EXAMPLES / "tiny-python-llama"), tensor_parallel=2)
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="all 4 ranks of a model must be on one machine"):
        mii.pipeline(str(EXAMPLES / "tiny-python-llama"), tensor_parallel=4)


if __name__ == "__main__":
    import ds_fp6  # noqa: F401

    torch.set_num_threads(1)
    texts = {str(mode): generate(sys.argv[1], mode) for mode in MODES}
    if os.environ["RANK"] == "0":
        Path(sys.argv[2]).write_text(json.dumps(texts))

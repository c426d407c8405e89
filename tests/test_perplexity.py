"""Perplexity's formula, and the shipped model: what FP6 costs it, what it writes, what its directory holds."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import pytest
import torch

from ds_fp6.bench import perplexity
from ds_fp6.bench.perplexity import Window, evaluate, negative_log_likelihood, windows
from ds_fp6.integrations.transformers import continue_greedily, encode

MODEL = Path(__file__).parent.parent / "examples" / "tiny-python-llama"
PROMPTS = ("def main(", "class Stack:\n    def __init__(self", "import os\n\ndef read_lines(path):")


@pytest.fixture(scope="module")
def held_out() -> str:
    return (MODEL / "held_out.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("tokens", [2, 3, 7, 8, 9, 64, 101])
@pytest.mark.parametrize(("context", "stride"), [(2, 1), (8, 1), (8, 4), (8, 7), (200, 100)])
def test_windows_predict_each_token_once_with_enough_context(tokens, context, stride):
    predicted = []
    for window in windows(tokens, context, stride):
        assert 0 <= window.begin < window.scored < window.end <= window.begin + context
        for i in range(window.scored, window.end):
            assert i - window.begin >= min(i, context - stride)
        predicted += range(window.scored, window.end)
    assert predicted == list(range(1, tokens))


def test_negative_log_likelihood_by_hand():
    """A model that gives token 0 the probability k / (k + 1) after k tokens, on six zeros.

    Windows of 4 every 2 see k = 1 | 2, 3 | 2, 3, so the likelihood is 1/2 · (2/3 · 3/4)² = 1/8.
    """

    def logits_of(batch: list[Window]) -> list[torch.Tensor]:
        seen = [torch.arange(w.scored, w.end) - w.begin for w in batch]
        return [torch.stack([k.log(), torch.zeros_like(k)], dim=1) for k in (s.float() for s in seen)]

    likelihood = negative_log_likelihood(logits_of, torch.zeros(6, dtype=torch.int64), context=4, stride=2)
    assert likelihood == pytest.approx(math.log(8), rel=1e-6)


def test_uniform_predictions_have_the_vocabulary_as_perplexity():
    ids = torch.randint(0, 50, (301,), generator=torch.Generator().manual_seed(0))
    total = negative_log_likelihood(lambda batch: [torch.zeros(w.end - w.scored, 50) for w in batch], ids, 32, 16)
    assert math.exp(total / 300) == pytest.approx(50, rel=1e-6)


@pytest.mark.parametrize(("context", "stride"), [(8, 0), (8, 8), (8, 9), (1, 1)])
def test_stride_must_leave_context(context, stride):
    with pytest.raises(ValueError, match=f"got stride {stride} and context {context}"):
        list(windows(10, context, stride))


def test_what_cannot_be_scored_is_refused(tmp_path):
    with pytest.raises(ValueError, match="at least 2 tokens, got 1"):
        evaluate(MODEL, "x", engine="transformers")
    with pytest.raises(ValueError, match="'wf9af16'"):
        evaluate(MODEL, "x = 1", modes=["fp16", "wf9af16"])
    with pytest.raises(ValueError, match="'vllm'"):
        evaluate(MODEL, "x = 1", engine="vllm")
    with pytest.raises(FileNotFoundError, match=r"held_out\.txt"):
        perplexity.run(arguments(str(tmp_path)))


def arguments(*given: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    perplexity.add_arguments(parser)
    return parser.parse_args(given)


def test_six_bits_cost_the_shipped_model_less_than_one_percent(held_out):
    """Over a third of the held-out text; the model card has the whole. Four bits must show in the measurement."""
    modes = ["fp16", "wf6af16", "wf4e2m1af16"]
    dense, six, four = evaluate(MODEL, held_out[:60_000], modes, "transformers", context=1024, stride=768)
    assert dense.perplexity < 8 and dense.bits_per_byte < 1
    assert abs(six.ratio - 1) < 0.01
    assert four.ratio > 1.05
    assert four.weight_bytes < six.weight_bytes < 0.6 * dense.weight_bytes


def test_fastgen_and_transformers_agree(held_out):
    text = held_out[50_000:51_200]
    for mode in ("fp16", "wf6a32"):
        served, reference = (
            evaluate(MODEL, text, [mode], engine, context=128, stride=64)[0] for engine in perplexity.ENGINES
        )
        assert served.perplexity == pytest.approx(reference.perplexity, rel=2e-3), mode


def test_the_command_prints_a_table_and_writes_json(capsys, tmp_path):
    figures = tmp_path / "figures.json"
    given = ["--engine", "transformers", "--characters", "2000", "--modes", "fp16,wf6af16", "--json", str(figures)]
    assert perplexity.run(arguments(str(MODEL), *given)) == 0
    printed = capsys.readouterr().out
    assert "fp32" in printed and "perplexity" in printed
    rows = json.loads(figures.read_text())["modes"]
    assert [row["mode"] for row in rows] == ["fp16", "wf6af16"]
    for row in rows:
        assert f"{row['perplexity']:.4f}" in printed


@pytest.mark.parametrize("mode", [None, "wf6af16"])
def test_the_shipped_model_writes_python_like_text(mode):
    """Lines are indented by fours, and two of three continuations hold code rather than a docstring's prose.

    That the code makes sense is not asserted: it does not.
    """
    texts = continue_greedily(MODEL, PROMPTS, 64, mode)
    for prompt, text in zip(PROMPTS, texts, strict=True):
        lines = [line for line in (prompt + text).split("\n")[:-1] if line.strip()]
        indented = [len(line) - len(line.lstrip()) for line in lines]
        assert sum(width % 4 == 0 for width in indented) >= 0.8 * len(lines), text
    code = ("def ", "return ", "import ", "self.", "raise ")
    assert sum(any(word in text for word in code) for text in texts) >= 2, texts


def test_the_shipped_model_is_small_and_complete(held_out):
    files = {path.name: path.stat().st_size for path in MODEL.iterdir()}
    assert sum(files.values()) <= 7_000_000
    assert {"README.md", "config.json", "generation_config.json", "held_out.LICENSE", "training.json"} <= set(files)
    config = json.loads((MODEL / "config.json").read_text())
    assert config["hidden_size"] // config["num_attention_heads"] == 64
    assert config["num_attention_heads"] // config["num_key_value_heads"] == 2
    assert not config["tie_word_embeddings"] and config["dtype"] == "float16"
    assert 100_000 <= len(held_out.encode()) <= 200_000
    ids = encode(MODEL, held_out)
    assert ids.max() < config["vocab_size"] and len(held_out) / len(ids) > 3

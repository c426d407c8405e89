"""DeepSpeed's engine and MII's scheduler on a CPU against transformers, for every model family."""

from __future__ import annotations

import models
import pytest
import torch

#: fp32 logits whose standard deviation is 1.5: a few units of rounding a layer.
FP32_TOLERANCE = 3e-5
#: Root mean square of the same logits' rounding errors in 16 bits; transformers' own are 0.04 and 0.008.
HALF_TOLERANCE = {torch.bfloat16: 0.06, torch.float16: 0.01}

NEW_TOKENS = 64
CHUNK = 64


@pytest.fixture(autouse=True)
def one_thread():
    """These models are too small for threads to share."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def build_engine(path: str, mode: str | None = None, **state):
    from deepspeed.inference.v2 import RaggedInferenceEngineConfig, build_hf_engine

    manager = {
        "max_ragged_batch_size": 96, "max_ragged_sequence_count": 8, "max_tracked_sequences": 8,
        "memory_config": {"mode": "allocate", "size": 8}, **state,
    }  # fmt: skip
    config = RaggedInferenceEngineConfig(state_manager=manager, quantization={"quantization_mode": mode})
    return build_hf_engine(path, config)


def engine_logits(engine, uid: int, prompt: torch.Tensor) -> torch.Tensor:
    """The logits after ``prompt``, put in chunks as a scheduler would split it."""
    for start in range(0, len(prompt), CHUNK):
        logits = engine.put([uid], [prompt[start : start + CHUNK]])
    return logits[0].float().clone()


def reference_logits(model: torch.nn.Module, prompt: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(prompt.unsqueeze(0)).logits[0, -1].float()


@pytest.fixture(scope="module", params=models.FAMILIES)
def family(request, tmp_path_factory):
    """A transformers model and its checkpoint."""
    model = models.build(request.param)
    return model, models.save(model, tmp_path_factory.mktemp(request.param))


def test_logits(family):
    model, path = family
    engine = build_engine(path)
    for uid, prompt in enumerate(models.random_prompts(1, 17, 200)):
        difference = (engine_logits(engine, uid, prompt) - reference_logits(model, prompt)).abs().max()
        assert difference < FP32_TOLERANCE


def test_greedy_tokens_under_split_prompts_and_exhausted_cache(family, monkeypatch):
    """Quantized to FP6. A cache of 3 blocks of 128 tokens holds three prompts until two of them have
    outgrown their blocks, so that one has to start over; the prompt of 300 tokens is split into batches of 96."""
    import mii

    from ds_fp6.integrations.mii import requests

    starts_over, start_over = [], requests.start_over
    monkeypatch.setattr(requests, "start_over", lambda *args: (starts_over.append(1), start_over(*args)))
    model, path = family
    mode = "wf6a32"
    manager = {
        "max_ragged_batch_size": 96, "max_ragged_sequence_count": 8, "max_tracked_sequences": 8,
        "memory_config": {"mode": "allocate", "size": 3},
    }  # fmt: skip
    pipe = mii.pipeline(
        path, quantization_mode=mode, tokenizer=models.number_tokenizer(),
        inference_engine_config={"state_manager": manager},
    )  # fmt: skip
    prompts = models.random_prompts(80, 90, 95, 300, 7)
    texts = [" ".join(map(str, prompt.tolist())) for prompt in prompts]
    responses = pipe(texts, max_new_tokens=NEW_TOKENS, do_sample=False, ignore_eos=True)
    pipe.destroy()

    assert starts_over
    reference = models.quantize_(model, mode)
    for prompt, response in zip(prompts, responses):
        tokens = [int(word) for word in response.generated_text.split()]
        assert tokens == models.greedy(reference, prompt, NEW_TOKENS)
        assert (response.prompt_length, response.generated_length) == (len(prompt), NEW_TOKENS)


@pytest.mark.parametrize("dtype", HALF_TOLERANCE)
@pytest.mark.parametrize("name", ["llama_gqa", "opt", "falcon_new"])
def test_16_bit_logits(name, dtype, tmp_path):
    from transformers import AutoModelForCausalLM

    path = models.save(models.build(name, dtype), tmp_path)
    engine = build_engine(path)
    assert engine.model().activation_dtype.value == dtype
    exact = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    for uid, prompt in enumerate(models.random_prompts(17, 200)):
        difference = engine_logits(engine, uid, prompt) - reference_logits(exact, prompt)
        assert difference.square().mean().sqrt() < HALF_TOLERANCE[dtype]

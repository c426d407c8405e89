"""``mii.pipeline`` on a CPU: end to end, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import mii
import models
import pytest
import torch

KV_BLOCKS = 4
STATE = {
    "max_ragged_batch_size": 96, "max_ragged_sequence_count": 4, "max_tracked_sequences": 4,
    "memory_config": {"mode": "allocate", "size": KV_BLOCKS},
}  # fmt: skip
KV_TOKENS = 128 * KV_BLOCKS


def pipeline(path: str, **kwargs):
    return mii.pipeline(path, inference_engine_config={"state_manager": STATE}, **kwargs)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    return models.save(models.build("llama_gqa", torch.bfloat16), tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def pipe(checkpoint):
    pipe = pipeline(checkpoint, quantization_mode="wf6af16", tokenizer=models.number_tokenizer())
    yield pipe
    pipe.destroy()


def greedy(pipe, *prompts: str, tokens: int = 8) -> list[str]:
    responses = pipe(list(prompts), max_new_tokens=tokens, do_sample=False, ignore_eos=True)
    return [response.generated_text for response in responses]


@pytest.mark.parametrize(
    ("mode", "dtype"),
    [
        (None, torch.bfloat16), ("wf6af16", torch.float16), ("wf6a16", torch.bfloat16), ("wf5abf16", torch.bfloat16),
        ("wf6e2m3a32g16", torch.float32),
    ],
)  # fmt: skip
def test_quantization_mode_decides_weights_and_activations(checkpoint, mode, dtype):
    pipe = pipeline(checkpoint, quantization_mode=mode)
    model = pipe.inference_engine.model()
    assert model.activation_dtype.value == dtype
    layer, outer = model._transformer[0], model._non_transformer
    for weight in (layer.qkv_w, layer.attn_out_w, layer.mlp_1_w, layer.mlp_2_w):
        assert weight.dtype == (dtype if mode is None else torch.uint8)
    for weight in (outer.word_emb, outer.word_unembed, outer.final_norm, layer.attn_norm_gamma):
        assert weight.dtype == dtype
    response = pipe(["def main("], max_new_tokens=8, do_sample=False, ignore_eos=True)[0]
    assert response.generated_length == 8 and response.generated_text
    pipe.destroy()


@pytest.mark.parametrize("mode", ["wf6", "wf9af16", "wi4af16", "fp6", "wf6e3m3af16", "wf6af16g0"])
def test_unknown_mode_is_refused_before_the_model_is_looked_for(mode):
    with pytest.raises(ValueError, match="a mode is w f BITS"):
        mii.pipeline("no/such/model", quantization_mode=mode)
    with pytest.raises(ValueError, match="a mode is w f BITS"):
        mii.pipeline(model_config={"model_name_or_path": "no/such/model", "quantization_mode": mode})


def test_mode_that_the_checkpoint_cannot_answer(tmp_path):
    path = models.save(models.build("llama"), tmp_path)
    with pytest.raises(ValueError, match="the checkpoint is in torch.float32"):
        pipeline(path, quantization_mode="wf6a16")


def test_unsupported_family(tmp_path):
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="gpt2.*llama"):
        pipeline(str(tmp_path))


def test_missing_checkpoint(tmp_path, checkpoint):
    with pytest.raises(OSError, match="no-model-here"):
        pipeline(str(tmp_path / "no-model-here"))
    (tmp_path / "config.json").write_bytes((Path(checkpoint) / "config.json").read_bytes())
    with pytest.raises(OSError, match=str(tmp_path)):
        pipeline(str(tmp_path))


REFUSED = {
    "empty": ("", {}, "no tokens"),
    "too long": ("1 " * 600, {}, f"600 tokens.*max_length {KV_TOKENS}"),
    "longer than its max_length": ("1 2 3 4", {"max_length": 3}, "4 tokens.*max_length 3"),
    "max_length beyond the cache": ("1", {"max_length": 5000}, f"5000 is more than the {KV_TOKENS}"),
    "no new tokens": ("1", {"max_new_tokens": 0}, "max_new_tokens"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_request_leaves_the_pipeline_as_it_was(pipe, case):
    prompt, kwargs, message = REFUSED[case]
    before = greedy(pipe, "5 6 7")
    with pytest.raises(ValueError, match=message):
        pipe(["9 8", prompt], do_sample=False, **kwargs)
    assert greedy(pipe, "5 6 7") == before
    assert pipe.inference_engine.free_blocks == [KV_BLOCKS]


def test_greedy_requests_leave_the_logits_as_they_are(pipe):
    from mii.batching.ragged_batching import Request

    def processing(**kwargs) -> list[str]:
        settings = {"top_p": 0.7, "top_k": 4, "temperature": 0.5, **kwargs}
        request: Request = pipe.make_request(0, 0, torch.tensor([1, 2]), settings)
        return sorted({name.partition("_")[0] for name in request.post_processing} - {"Stop"})

    assert processing(do_sample=True) == ["Sampler", "Temp", "TopK", "TopP"]
    assert processing(do_sample=False) == ["Sampler"]
    plain = greedy(pipe, "7 1 3", "9")
    narrow = pipe(["7 1 3", "9"], max_new_tokens=8, do_sample=False, ignore_eos=True, top_k=1, top_p=0.1)
    assert [response.generated_text for response in narrow] == plain


def test_failure_while_generating_leaves_the_pipeline_as_it_was(pipe, monkeypatch):
    before = greedy(pipe, "5 6 7")
    forward, calls = type(pipe.inference_engine.model()).forward, []

    def fail_on_third_call(self, batch):
        calls.append(batch)
        if len(calls) == 3:
            raise MemoryError("out of memory")
        return forward(self, batch)

    monkeypatch.setattr(type(pipe.inference_engine.model()), "forward", fail_on_third_call)
    with pytest.raises(MemoryError, match="out of memory"):
        greedy(pipe, "1 2 3", "4 5 6")
    monkeypatch.undo()
    assert greedy(pipe, "5 6 7") == before


def test_max_length_beyond_the_model(checkpoint):
    with pytest.raises(ValueError, match="max_length 9999 is more than the model's 2048"):
        pipeline(checkpoint, max_length=9999)


def test_two_pipelines_live_side_by_side(pipe, checkpoint):
    before = greedy(pipe, "5 6 7", "1 2 3 4 5")
    other = pipeline(checkpoint, quantization_mode="wf6af16", tokenizer=models.number_tokenizer())
    assert greedy(other, "5 6 7", "1 2 3 4 5") == before
    assert greedy(pipe, "5 6 7", "1 2 3 4 5") == before
    other.destroy()


def test_text_in_text_out(checkpoint):
    """With the checkpoint's own tokenizer, against transformers on the dequantized model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    mode, prompt = "wf6a32", "def main(argv):"
    pipe = pipeline(checkpoint, quantization_mode=mode)
    response = pipe(prompt, max_new_tokens=24, do_sample=False, ignore_eos=True)[0]
    pipe.destroy()
    reference = models.quantize_(AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32), mode)
    tokens = AutoTokenizer.from_pretrained(checkpoint)
    expected = models.greedy(reference, tokens(prompt, return_tensors="pt").input_ids[0], 24)
    assert response.generated_text == tokens.decode(expected)


@pytest.fixture
def async_pipe(checkpoint):
    from mii.api import async_pipeline

    config = mii.config.ModelConfig(
        model_name_or_path=checkpoint, tokenizer=models.number_tokenizer(),
        inference_engine_config={"state_manager": STATE},
    )  # fmt: skip
    pipe = async_pipeline(config)
    pipe.start()
    yield pipe
    if pipe.thread.is_alive():
        pipe.shutdown()


def test_failure_in_the_generation_thread_reaches_those_who_wait(async_pipe, monkeypatch):
    def fail(self, batch):
        raise MemoryError("out of memory")

    monkeypatch.setattr(type(async_pipe.inference_engine.model()), "forward", fail)
    async_pipe.put_request("1 2 3", {"max_new_tokens": 4})
    with pytest.raises(RuntimeError, match="MemoryError: out of memory"):
        async_pipe.get_response()
    with pytest.raises(RuntimeError, match="MemoryError: out of memory"):
        async_pipe.put_request("1 2 3", {"max_new_tokens": 4})


def test_stream_gives_out_all_text(async_pipe):
    async_pipe.put_request("1 2 3", {"max_new_tokens": 6, "do_sample": False, "ignore_eos": True, "stream": True})
    texts = []
    while True:
        uid, response = async_pipe.get_response()
        texts.append(response.generated_text)
        if response.finish_reason != mii.constants.GenerationFinishReason.NONE:
            break
    async_pipe.flush_uid(uid)
    async_pipe.put_request("1 2 3", {"max_new_tokens": 6, "do_sample": False, "ignore_eos": True})
    uid, response = async_pipe.get_response()
    async_pipe.flush_uid(uid)
    assert len(texts) == 7 and texts[-1] == ""
    assert "".join(texts).split() == response.generated_text.split()


def test_autoload_off_is_upstream():
    code = (
        "import torch, mii\n"
        "from deepspeed.accelerator import get_accelerator\n"
        "from deepspeed.inference.v2.modules import heuristics\n"
        "assert type(get_accelerator()).__name__ == 'CPU_Accelerator'\n"
        "assert not hasattr(heuristics.instantiate_linear, '__wrapped__')\n"
        "import sys; assert not [name for name in sys.modules if name.startswith('ds_fp6.integrations')]\n"
    )
    environment = {"DS_FP6_AUTOLOAD": "0", "PATH": "/usr/bin:/bin", "HOME": str(Path.home())}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=120)



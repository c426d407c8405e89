"""The generation loop: what overlaps with the device, and that no loop changes what is generated."""

from __future__ import annotations

import queue
import threading

import mii
import models
import pytest
import torch
from mii.batching.ragged_batching import MIIAsyncPipeline, MIIPipeline, RaggedBatchBase
from mii.constants import GenerationFinishReason
from mii.modeling.models import load_model

STATE = {
    "max_ragged_batch_size": 96, "max_ragged_sequence_count": 6, "max_tracked_sequences": 8,
    "memory_config": {"mode": "allocate", "size": 16},
}  # fmt: skip
LOOPS = ("upstream", "default")
PATIENCE = 60


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Engine, tokenizer and configuration of an FP6 model."""
    path = models.save(models.build("llama_gqa"), tmp_path_factory.mktemp("llama"))
    config = mii.config.ModelConfig(
        model_name_or_path=path, tokenizer=models.number_tokenizer(), quantization_mode="wf6a32",
        inference_engine_config={"state_manager": STATE},
    )  # fmt: skip
    return load_model(config), models.number_tokenizer(), config


@pytest.fixture
def build(parts, monkeypatch):
    """Pipelines of a class with one of the loops, on the same engine; all blocks are free again when they are gone."""
    engine, tokenizer, config = parts
    built = []

    def build(cls, loop: str):
        class Pipeline(cls):
            if loop == "upstream":
                generate = RaggedBatchBase.generate.__wrapped__

        arguments = {"inference_engine": engine, "tokenizer": tokenizer, "model_config": config}
        built.append(Pipeline(False, **arguments) if cls is MIIPipeline else Pipeline(**arguments))
        return built[-1]

    yield build
    for pipeline in built:
        if getattr(pipeline, "thread", None) is not None and pipeline.thread.is_alive():
            pipeline.shutdown()
    free = engine.free_blocks
    for uid in list(engine._state_manager.tracked_sequences):
        engine.flush(uid)
    assert free == [STATE["memory_config"]["size"]] or engine.free_blocks == [STATE["memory_config"]["size"]]


def text_of(prompt: torch.Tensor) -> str:
    return " ".join(map(str, prompt.tolist()))


def told(responses) -> list[tuple]:
    return [(r.generated_text, r.prompt_length, r.generated_length, r.finish_reason) for r in responses]


def likely_stop(pipeline, prompt: str) -> int:
    """A token that the model generates in the middle of its answer."""
    tokens = pipeline(prompt, max_new_tokens=12, do_sample=False, ignore_eos=True)[0].generated_text.split()
    return int(tokens[5])


def test_no_loop_changes_the_text(build):
    """More prompts than run together, one of them split; some end by a token, all end after different lengths."""
    prompts = [text_of(prompt) for prompt in models.random_prompts(3, 120, 17, 1, 300, 40, 5, 9, seed=1)]
    answers = {}
    for loop in LOOPS:
        pipe = build(MIIPipeline, loop)
        pipe.tokenizer.eos_token_id = likely_stop(pipe, prompts[0])
        pipe._post_processors.clear()
        try:
            answers[loop] = [
                told(pipe(prompts, max_new_tokens=24, do_sample=False, ignore_eos=ignore)) for ignore in (True, False)
            ]
        finally:
            pipe.tokenizer.eos_token_id = models.EOS
    reasons = {answer[-1] for answer in answers["upstream"][1]}
    assert reasons == {GenerationFinishReason.STOP, GenerationFinishReason.LENGTH}
    for loop in LOOPS:
        assert answers[loop] == answers["upstream"], loop


class Journal(queue.Queue):
    """A queue of results that notes when they come."""

    def __init__(self, events: list) -> None:
        super().__init__()
        self._events = events

    def put(self, item, *args, **kwargs) -> None:
        if not isinstance(item, BaseException):
            self._events.append("end" if item[4] != GenerationFinishReason.NONE else "token")
        super().put(item, *args, **kwargs)

    put_nowait = put


def test_a_step_is_started_before_the_tokens_of_the_last_are_given_out(build):
    pipe, events = build(MIIAsyncPipeline, "default"), []
    pipe.result_queues[threading.get_ident()] = Journal(events)
    put = pipe.put
    pipe.put = lambda *batch: (events.append("step"), put(*batch))[1]
    pipe.put_request("1 2 3", {"max_new_tokens": 3, "do_sample": False, "ignore_eos": True, "stream": True})
    while "end" not in events:
        pipe.generate()
    assert events == ["step", "step", "token", "step", "token", "token", "end"]


@pytest.mark.parametrize("loop", LOOPS[1:])
def test_tokens_reach_their_stream_before_a_failure_does(build, loop):
    pipe = build(MIIAsyncPipeline, loop)
    put, steps = pipe.put, []

    def fail_on_third_step(*batch):
        steps.append(batch)
        if len(steps) == 3:
            raise MemoryError("out of memory")
        return put(*batch)

    pipe.put = fail_on_third_step
    pipe.put_request("1 2 3", {"max_new_tokens": 9, "do_sample": False, "ignore_eos": True, "stream": True})
    pipe.start()
    texts = []
    with pytest.raises(RuntimeError, match="MemoryError: out of memory"):
        while True:
            texts.append(pipe.get_response()[1].generated_text)
    assert len(texts) == 2
    pipe.thread.join(PATIENCE)
    assert not pipe.thread.is_alive()

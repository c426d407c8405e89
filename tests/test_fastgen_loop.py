"""The generation loop: what overlaps with the device, and that no loop changes what is generated."""

from __future__ import annotations

import json
import queue
import threading

import mii
import models
import pytest
import torch
from mii.batching.ragged_batching import MIIAsyncPipeline, MIIPipeline, RaggedBatchBase
from mii.constants import GenerationFinishReason
from mii.modeling.models import load_model
from servers import MODEL

from ds_fp6.integrations.mii import cancelling, lookahead, requests
from ds_fp6.integrations.mii.handover import is_idle
from ds_fp6.integrations.mii.sampling import Sampling
from ds_fp6.integrations.mii.serving import ServingPipeline

STATE = {
    "max_ragged_batch_size": 96, "max_ragged_sequence_count": 6, "max_tracked_sequences": 8,
    "memory_config": {"mode": "allocate", "size": 16},
}  # fmt: skip
LOOPS = ("upstream", "plain", "lookahead")
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
    """Pipelines of a class with one of the loops, on the same engine. All blocks are free again when one has ended."""
    engine, tokenizer, config = parts
    built = []

    def clear() -> None:
        if built and getattr(built[-1], "thread", None) is not None and built[-1].thread.is_alive():
            built[-1].shutdown()
        # What nobody has asked to be freed.
        for uid in list(engine._state_manager.tracked_sequences):
            engine.flush(uid)
        assert engine.free_blocks == [STATE["memory_config"]["size"]]

    def build(cls, loop: str):
        clear()

        class Pipeline(cls):
            if loop == "upstream":
                generate = RaggedBatchBase.generate.__wrapped__

        monkeypatch.setenv(lookahead.VARIABLE, str(int(loop == "lookahead")))
        arguments = {"inference_engine": engine, "tokenizer": tokenizer, "model_config": config}
        built.append(Pipeline(False, **arguments) if cls is MIIPipeline else Pipeline(**arguments))
        return built[-1]

    yield build
    clear()


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
    pipe, events = build(MIIAsyncPipeline, "plain"), []
    pipe.result_queues[threading.get_ident()] = Journal(events)
    put = pipe.put
    pipe.put = lambda *batch: (events.append("step"), put(*batch))[1]
    pipe.put_request("1 2 3", {"max_new_tokens": 3, "do_sample": False, "ignore_eos": True, "stream": True})
    while "end" not in events:
        pipe.generate()
    assert events == ["step", "step", "token", "step", "token", "token", "end"]


@pytest.mark.parametrize("loop", LOOPS[1:])
def test_a_cancelled_request_gives_its_blocks_back(build, loop):
    """One that generates, and one of which a prompt's part is in the cache; the third goes on as if alone."""
    prompt = text_of(models.random_prompts(30, seed=3)[0])
    settings = {"max_new_tokens": 20, "do_sample": False, "ignore_eos": True}
    alone = build(MIIPipeline, loop)(prompt, **settings)[0].generated_text
    pipe, long = build(MIIAsyncPipeline, loop), text_of(models.random_prompts(400, seed=4)[0])
    free = pipe.inference_engine.free_blocks
    uids = [pipe.put_request(text, dict(settings)) for text in (prompt, prompt, long)]
    for _ in range(3):
        pipe.generate()
    for uid in uids[1:]:
        cancelling.cancel(pipe, uid)
    cancelling.cancel(pipe, 12345)  # never heard of
    while pipe.result_queues[threading.get_ident()].empty():
        pipe.generate()
    uid, answer = pipe.get_response()
    assert (uid, answer.generated_text) == (uids[0], alone)
    while not is_idle(pipe) or not pipe.request_queue.empty():
        pipe.generate()
    assert pipe.inference_engine.free_blocks == free
    assert pipe.result_queues[threading.get_ident()].empty()


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


def test_a_full_cache_starts_requests_over_once_their_tokens_are_read(build, parts, monkeypatch):
    """Three blocks of 128 tokens, and three prompts that outgrow theirs within a few steps."""
    engine, starts_over, start_over = parts[0], [], requests.start_over

    def counting(pipeline, request) -> None:
        assert request.fed_row is None
        starts_over.append(request)
        start_over(pipeline, request)

    monkeypatch.setattr(requests, "start_over", counting)
    prompts = [text_of(prompt) for prompt in models.random_prompts(88, 88, 88, 7)]
    answers = {}
    for loop in LOOPS:
        pipe = build(MIIPipeline, loop)
        taken = engine._state_manager.allocate_blocks(STATE["memory_config"]["size"] - 3)
        try:
            starts_over.clear()
            answers[loop] = told(pipe(prompts, max_new_tokens=56, do_sample=False, ignore_eos=True))
        finally:
            engine._state_manager._kv_cache.free(taken)
        assert starts_over
    for loop in LOOPS:
        assert answers[loop] == answers["upstream"], loop


class Served:
    """A running ``ServingPipeline`` and all that it delivers, by uid."""

    def __init__(self, pipeline: ServingPipeline) -> None:
        self.pipeline = pipeline
        self.steps: dict[int, list] = {}
        self._news = threading.Condition()
        pipeline.deliver = self._deliver
        pipeline.start()

    def _deliver(self, outputs) -> None:
        with self._news:
            for uid, step in outputs:
                self.steps.setdefault(uid, []).append(step)
            self._news.notify_all()

    def wait(self, condition) -> None:
        with self._news:
            assert self._news.wait_for(lambda: self.pipeline.failure is not None or condition(), PATIENCE)
        if self.pipeline.failure is not None:
            raise self.pipeline.failure

    def finished(self, uid: int) -> bool:
        return uid in self.steps and self.steps[uid][-1].finish is not None

    def end(self) -> None:
        self.pipeline.end()
        self.pipeline.thread.join(PATIENCE)
        assert not self.pipeline.thread.is_alive()


SAMPLED = Sampling(temperature=0.8, top_p=0.9, seed=5)
GREEDY = Sampling(temperature=0.0)
REQUESTS = (
    (3, GREEDY, {"max_new_tokens": 30}),
    (150, SAMPLED, {"max_new_tokens": 25}),
    (9, Sampling(temperature=0.0, presence_penalty=1.5, frequency_penalty=0.5), {"max_new_tokens": 20, "logprobs": 2}),
    (40, Sampling(temperature=1.2, seed=9, logit_bias={7: 2.0, 8: -3.0}), {"max_new_tokens": 12, "prompt_logprobs": 1}),
    (1, GREEDY, {"max_new_tokens": 1}),
    (5, SAMPLED, {"max_new_tokens": 40, "logprobs": 0}),
    (12, GREEDY, {"max_new_tokens": 18}),
)


def test_served_sequences_are_the_same_with_lookahead(build):
    """Seeds, penalties and log probabilities; a sequence that is cancelled early and one that ends by a token."""
    told = {}
    for loop in ("plain", "lookahead"):
        served = Served(build(ServingPipeline, loop))
        submit = served.pipeline.submit
        prompts = [prompt.tolist() for prompt in models.random_prompts(*(length for length, _, _ in REQUESTS), seed=2)]
        probe = submit(prompts[0], GREEDY, 12, ignore_eos=True).uid
        served.wait(lambda: served.finished(probe))
        served.pipeline.eos_token_ids = frozenset([served.steps[probe][5].token])
        victim = submit([1, 2, 3], SAMPLED, 300, ignore_eos=True).uid
        served.wait(lambda: len(served.steps.get(victim, [])) >= 2)
        sequences = [
            submit(prompt, sampling, ignore_eos=sampling is SAMPLED, **options)
            for prompt, (_, sampling, options) in zip(prompts, REQUESTS, strict=True)
        ]
        served.wait(lambda: sequences[4].uid in served.steps)
        served.pipeline.cancel(victim)
        served.wait(lambda: all(served.finished(sequence.uid) for sequence in sequences))
        assert not served.finished(victim)
        served.end()
        assert served.pipeline.live == 0
        told[loop] = [(served.steps[sequence.uid], sequence.prompt_logprobs) for sequence in sequences]
    finishes = [steps[-1].finish for steps, _ in told["plain"]]
    assert set(finishes) == {"stop", "length"}
    for default, ahead in zip(*told.values(), strict=True):
        assert [(step.token, step.finish) for step in ahead[0]] == [(step.token, step.finish) for step in default[0]]
        scored = [[step.logprobs for step in steps] + scores for steps, scores in (default, ahead)]
        for one, other in zip(*scored, strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                assert (one.token, [token for token, _ in one.top]) == (other.token, [token for token, _ in other.top])
                assert other.logprob == pytest.approx(one.logprob, abs=1e-4)


def test_lookahead_starts_a_step_before_it_reads_the_tokens_of_the_last(build):
    pipe, events = build(MIIAsyncPipeline, "lookahead"), []
    pipe.result_queues[threading.get_ident()] = Journal(events)
    put, accept = pipe.put, pipe._accept
    pipe.put = lambda *batch: (events.append("step"), put(*batch))[1]
    pipe._accept = lambda *tokens, **options: (events.append("read"), accept(*tokens, **options))[1]
    pipe.put_request("1 2 3", {"max_new_tokens": 3, "do_sample": False, "ignore_eos": True, "stream": True})
    while "end" not in events:
        pipe.generate()
    # The length is known beforehand: no fourth step is started.
    assert events == ["step", "step", "read", "token", "step", "read", "token", "read", "token", "end"]


@pytest.mark.parametrize("cpu", [False, True])
@pytest.mark.parametrize("text", [None, "0", "1"])
def test_lookahead_is_chosen_by_its_variable(monkeypatch, text, cpu):
    monkeypatch.setenv(lookahead.VARIABLE, text or "")
    if text:
        assert lookahead.chosen(cpu) == (text == "1", f"{lookahead.VARIABLE}={text}")
    else:
        assert lookahead.chosen(cpu) == (not cpu, "the engine runs on a CPU" if cpu else "default on a GPU")


def test_lookahead_of_another_value_is_refused(monkeypatch):
    monkeypatch.setenv(lookahead.VARIABLE, "yes")
    with pytest.raises(ValueError, match="must be 0 or 1, got 'yes'"):
        lookahead.chosen(cpu=False)


def test_ranks_must_agree_on_lookahead(parts, monkeypatch):
    monkeypatch.setenv(lookahead.VARIABLE, "1")
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: 2)
    for other in (True, False):

        def gather(found, mine, group, other=other):
            found[:] = [mine, other]

        monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
        if other:
            assert lookahead.agreed(parts[0])
        else:
            with pytest.raises(ValueError, match=r"the same for all ranks, got \[1, 0\]"):
                lookahead.agreed(parts[0])


def test_sampling_draws_what_torch_draws():
    from mii.batching.generation.samplers import LogitsSampler

    logits = 3 * torch.randn(64, 500, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(3)
    expected = torch.distributions.Categorical(logits=logits).sample()
    torch.manual_seed(3)
    assert torch.equal(LogitsSampler()(logits), expected)


def test_host_benchmark(tmp_path, capsys):
    from ds_fp6.bench.__main__ import main

    figures = tmp_path / "host.json"
    arguments = ["host", "--sequences", "2", "--new-tokens", "6", "--step-ms", "2", "--json", str(figures)]
    assert main([*arguments, "--model", str(MODEL), "--loops", "upstream", "lookahead"]) == 0
    found = json.loads(figures.read_text())["figures"]
    assert [(figure["loop"], figure["stream"]) for figure in found] == [
        ("upstream", False), ("lookahead", False), ("upstream", True), ("lookahead", True),
    ]  # fmt: skip
    assert all(figure["steps"] > 0 and 0 <= figure["idle_share"] < 1 for figure in found)
    assert "idle a step" in capsys.readouterr().out

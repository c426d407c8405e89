"""More requests than the KV cache has room for: as many run as fit, few start over, all end, none with other text."""

from __future__ import annotations

import math
import random
import threading

import mii
import models
import pytest
import torch
from mii.batching.ragged_batching import MIIAsyncPipeline, RaggedBatchBase
from mii.modeling.models import load_model

from ds_fp6.integrations.mii import lookahead, requests
from ds_fp6.integrations.mii.sampling import Sampling
from ds_fp6.integrations.mii.serving import ServingPipeline

#: The cache's blocks, and the tokens of one where heads have 128 channels.
BLOCKS, BLOCK = 20, 64
STATE = {
    "max_ragged_batch_size": 96, "max_ragged_sequence_count": 64, "max_tracked_sequences": 64,
    "memory_config": {"mode": "allocate", "size": BLOCKS},
}  # fmt: skip
LOOPS = ("plain", "lookahead")
GREEDY = {"do_sample": False, "ignore_eos": True}
#: Steps that no load here takes.
PATIENCE = 3000


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """These models are too small for threads to share."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Engine, tokenizer and configuration of a small model."""
    model = models.build("llama_gqa", head_dim=128, num_hidden_layers=1)
    path = models.save(model, tmp_path_factory.mktemp("llama"))
    config = mii.config.ModelConfig(
        model_name_or_path=path, tokenizer=models.number_tokenizer(), quantization_mode="wf6a32",
        inference_engine_config={"state_manager": STATE},
    )  # fmt: skip
    return load_model(config), models.number_tokenizer(), config


@pytest.fixture(scope="module")
def built():
    return {}


@pytest.fixture
def pipeline(parts, built, monkeypatch):
    """Pipelines of a class with one of the loops, on the same engine, all of whose blocks are free again afterwards."""
    engine, tokenizer, config = parts

    def pipeline(loop: str, cls=MIIAsyncPipeline):
        monkeypatch.setenv(lookahead.VARIABLE, str(int(loop == "lookahead")))
        if (cls, loop) not in built:
            built[cls, loop] = cls(inference_engine=engine, tokenizer=tokenizer, model_config=config)
        return built[cls, loop]

    yield pipeline
    free = engine.free_blocks
    for uid in list(engine._state_manager.tracked_sequences):
        engine.flush(uid)
    assert free == [BLOCKS]


@pytest.fixture
def starts_over(monkeypatch) -> list[tuple[int, list[int]]]:
    """For each request that starts over its place by arrival, and those of all that had blocks."""
    seen, start_over = [], requests.start_over

    def noting(pipeline, request) -> None:
        holders = [r.arrival for r in pipeline.buffer if not r.is_flush_request and r.seq_length > 0]
        seen.append((request.arrival, holders))
        start_over(pipeline, request)

    monkeypatch.setattr(requests, "start_over", noting)
    return seen


def load(count: int, prompt: int, new_tokens: int, seed: int = 0) -> list[tuple[str, int]]:
    """Prompts of about ``prompt`` tokens, each with the number of tokens wanted."""
    draw = random.Random(seed)
    lengths = [max(1, round(draw.gauss(prompt, 0.3 * prompt))) for _ in range(count)]
    return [(" ".join(str(draw.randrange(256)) for _ in range(length)), new_tokens) for length in lengths]


def needed(work) -> int:
    """Tokens that the model has to see if nothing is computed twice: all but each answer's last."""
    return sum(len(prompt.split()) + new_tokens - 1 for prompt, new_tokens in work)


def answers(pipe, work, clients: int) -> tuple[list[str], list[int]]:
    """What a closed loop of clients gets, and the tokens of each step that it took."""
    waiting, running, found, steps = list(enumerate(work)), {}, {}, []

    def put(uids, tokens):
        new = [r.arrival for r in pipe.scheduled_requests if r.seq_length == 0]
        late = [r.arrival for r in pipe.buffer if r.seq_length == 0]
        assert max(new, default=0) < min(late, default=math.inf) or type(pipe) is MIIsOwn, "first come, first served"
        steps.append(sum(map(len, tokens)))
        return type(pipe).put(pipe, uids, tokens)

    def send() -> None:
        place, (prompt, new_tokens) = waiting.pop(0)
        running[pipe.put_request(prompt, {**GREEDY, "max_new_tokens": new_tokens})] = place

    pipe.put = put
    for _ in range(min(clients, len(work))):
        send()
    results = pipe.result_queues[threading.get_ident()]
    for _ in range(PATIENCE):
        if not running:
            break
        pipe.generate()
        while not results.empty():
            uid, response = pipe.get_response()
            pipe.flush_uid(uid)
            found[running.pop(uid)] = response.generated_text
            if waiting:
                send()
    assert not running
    pipe.generate()
    return [found[place] for place in range(len(work))], steps


class MIIsOwn(MIIAsyncPipeline):
    schedule_requests = RaggedBatchBase.schedule_requests.__wrapped__


#: Three and a half times as many clients as the cache has room for.
CROWD = load(48, prompt=50, new_tokens=100), 24
#: How many of them fit when they are longest, of three blocks: fewer run in the mean step only if some stand still.
FIT = BLOCKS // 3


@pytest.mark.parametrize("loop", LOOPS)
def test_a_crowd_gets_the_largest_batch_that_fits(pipeline, starts_over, loop):
    work, clients = CROWD
    steps = answers(pipeline(loop), work, clients)[1]
    generated = sum(new_tokens for _, new_tokens in work)
    assert len(steps) < generated / FIT
    assert sum(steps) < 1.15 * needed(work)
    assert 0 < len(starts_over) <= len(work) / 4
    for arrival, holders in starts_over:
        assert arrival == max(holders) > min(holders)


def test_mii_alone_would_let_most_of_the_crowd_stand_still(pipeline):
    """It keeps none of the bounds above."""
    work, clients = CROWD
    steps = answers(pipeline("plain", MIIsOwn), work, clients)[1]
    assert len(steps) > 1.5 * sum(new_tokens for _, new_tokens in work) / FIT
    assert sum(steps) > 1.15 * needed(work)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_crowd_gets_the_text_that_each_gets_alone(pipeline, starts_over, loop):
    """Among them two that take most of the cache, one all of it, and prompts that are split over steps."""
    pipe = pipeline(loop)
    work = load(16, prompt=60, new_tokens=70, seed=1)
    work[3], work[7], work[11] = load(1, 600, 300)[0], load(1, 5, 900)[0], load(1, 200, 40)[0]
    longest = BLOCKS * BLOCK
    work[9] = (work[9][0], longest - len(work[9][0].split()))
    alone = [answers(pipe, [one], 1)[0][0] for one in work]
    assert not starts_over
    assert answers(pipe, work, len(work))[0] == alone
    assert starts_over


@pytest.mark.parametrize("loop", LOOPS)
def test_room_for_all_is_room_for_all_at_once(pipeline, starts_over, loop):
    """Nobody waits for a cache that will never be full: two blocks each, at their longest."""
    work = [(" ".join(["7"] * 9), 2 * BLOCK - 9)] * (BLOCKS // 2)
    steps = answers(pipeline(loop), work, len(work))[1]
    assert len(steps) == 2 * BLOCK - 9 and sum(steps) == needed(work) and not starts_over


@pytest.mark.parametrize("loop", LOOPS)
def test_who_ends_leaves_room_at_once(pipeline, loop):
    """Whenever its client asks for a flush: each of these takes more than half of the cache."""
    pipe, uids = pipeline(loop), []
    for prompt, new_tokens in load(3, prompt=700, new_tokens=3):
        uids.append(pipe.put_request(prompt, {**GREEDY, "max_new_tokens": new_tokens}))
    results = pipe.result_queues[threading.get_ident()]
    for _ in range(100):
        if results.qsize() < len(uids):
            pipe.generate()
    assert results.qsize() == len(uids)
    assert [pipe.get_response()[0] for _ in uids] == uids
    for uid in uids:
        pipe.flush_uid(uid)
    pipe.generate()


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize(("tokens", "reached"), [(3 * BLOCK, 3 * BLOCK), (2 * BLOCK - 8, 2 * BLOCK + 1)])
def test_what_can_never_run_is_an_error(pipeline, parts, loop, tokens, reached):
    """And no wait: here somebody outside of the scheduler holds all blocks but two. Whatever fits these runs."""
    engine, pipe = parts[0], pipeline(loop)
    taken = engine._state_manager.allocate_blocks(BLOCKS - 2)
    try:
        assert len(answers(pipe, load(3, prompt=40, new_tokens=60), 3)[0]) == 3
        uid = pipe.put_request("5 " * tokens, {**GREEDY, "max_new_tokens": 20})
        with pytest.raises(RuntimeError, match=f"prompts of .{reached}. tokens.*2. blocks free"):
            for _ in range(PATIENCE):
                pipe.generate()
        pipe.buffer.clear()
        pipe.flush_uid(uid)
    finally:
        engine._state_manager._kv_cache.free(taken)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_served_crowd_gets_the_tokens_that_each_gets_alone(pipeline, starts_over, loop):
    """Also seeded samples, and while a sequence that holds blocks is cancelled."""
    pipe = pipeline(loop, ServingPipeline)
    prompts = [[int(word) for word in prompt.split()] for prompt, _ in load(14, prompt=60, new_tokens=0, seed=2)]
    samplings = [Sampling(temperature=0.0), Sampling(temperature=0.8, seed=3)]

    def serve(places) -> dict[int, list[int]]:
        delivered: list = []
        pipe.deliver = delivered.extend
        uids = {
            pipe.submit(prompts[place], samplings[place % 2], 90, ignore_eos=True).uid: place for place in places
        }  # fmt: skip
        cancelled = None
        for step in range(PATIENCE):
            pipe.generate()
            if step == 60 and len(places) > 1:
                cancelled = next(uid for uid, place in uids.items() if place == 2)
                pipe.cancel(cancelled)
            if pipe._idle():
                break
        assert pipe._idle()
        texts = {place: [] for place in places}
        for uid, one in delivered:
            texts[uids[uid]].append(one.token)
        if cancelled is not None:
            assert 0 < len(texts.pop(2)) < 90
        return texts

    alone = {place: serve([place])[place] for place in range(len(prompts))}
    assert not starts_over
    crowd = serve(range(len(prompts)))
    assert starts_over
    assert crowd == {place: tokens for place, tokens in alone.items() if place != 2}

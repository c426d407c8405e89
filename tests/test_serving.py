"""``ds-fp6 serve`` on the shipped model in 6 bits, with OpenAI's own client."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import models
import openai
import pytest
import torch
from servers import MODEL, PATIENCE, finished, running_server
from transformers import AutoModelForCausalLM, AutoTokenizer

TESTS = Path(__file__).parent
KEYS = ("first-key", "second-key")
KV_BLOCKS = 24
MOST_BYTES = 1 << 16
TEMPLATE = (
    "{% for m in messages %}{% if m.role not in ('system', 'user', 'assistant') %}"
    "{{ raise_exception('role ' + m.role) }}{% endif %}# {{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}def {% endif %}"
)
PROMPT = "def main("
#: fp16 logits of up to 20 are rounded to 2^-6.
LOGPROB_TOLERANCE = 0.05


@pytest.fixture(scope="module")
def server():
    flags = ["--api-key", *KEYS, "--num-kv-blocks", str(KV_BLOCKS), "--max-request-bytes", str(MOST_BYTES)]
    with running_server(*flags, "--chat-template", TEMPLATE, "--max-num-batched-tokens", "256") as server:
        yield server
        assert server.process.poll() is None, server.output


@pytest.fixture(scope="module")
def client(server):
    return server.client(KEYS[0])


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def reference():
    """transformers with the weights that the server's 6 bits stand for."""
    return models.quantize_(AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval(), "wf6af16")


def complete(client, prompt=PROMPT, **options):
    return client.completions.create(model="tiny", prompt=prompt, **{"temperature": 0, "max_tokens": 16, **options})


def streamed(client, prompt=PROMPT, **options) -> list:
    return list(complete(client, prompt, stream=True, **options))


def text_of(chunks, index: int = 0) -> str:
    return "".join(choice.text for chunk in chunks for choice in chunk.choices if choice.index == index)


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    model = client.models.retrieve("tiny")
    assert model.owned_by == "ds_fp6" and model.max_model_len == 1024 and model.quantization_mode == "wf6af16"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_greedy_completion(client, tokenizer, reference):
    """Up to the first place where transformers, which computes in fp32, finds two tokens almost equally likely."""
    answer = complete(client, max_tokens=32, logprobs=2)
    prompt = torch.tensor(tokenizer.encode(PROMPT))
    expected = models.greedy(reference, prompt, 32)
    with torch.no_grad():
        logits = reference(torch.cat([prompt, torch.tensor(expected)])[None]).logits[0, len(prompt) - 1 : -1]
    best = logits.topk(2, dim=-1).values
    close = (best[:, 0] - best[:, 1] < LOGPROB_TOLERANCE).nonzero().flatten().tolist()
    sure = close[0] if close else 32
    assert sure >= 8 and answer.choices[0].text.startswith(tokenizer.decode(expected[:sure]))
    assert answer.choices[0].finish_reason == "length" and answer.object == "text_completion"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (4, 32, 36)


def test_end_of_text(client):
    """The end of a file is likely after a main guard. EOS is generated, and belongs to no text."""
    prompt = '\n\nif __name__ == "__main__":\n    main()\n'
    answer = complete(client, prompt, max_tokens=200, logit_bias={"0": 100}, logprobs=0)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("", "stop")
    assert answer.usage.completion_tokens == 1 and answer.choices[0].logprobs.tokens == ["<|endoftext|>"]
    answer = complete(client, prompt, max_tokens=7, logit_bias={"0": 100}, extra_body={"ignore_eos": True})
    assert answer.usage.completion_tokens == 7 and answer.choices[0].finish_reason == "length"


def test_streaming(client):
    whole = complete(client, max_tokens=24, logprobs=1)
    chunks = streamed(client, max_tokens=24, logprobs=1, stream_options={"include_usage": True})
    assert text_of(chunks) == whole.choices[0].text
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert all(chunk.usage is None for chunk in chunks[:-1]) and len(chunks) > 10
    lists = [chunk.choices[0].logprobs for chunk in chunks[:-1]]
    for name in ("tokens", "token_logprobs", "text_offset"):
        together = [item for part in lists for item in getattr(part, name)]
        assert together == pytest.approx(getattr(whole.choices[0].logprobs, name), abs=LOGPROB_TOLERANCE)
    assert all(chunk.usage is None for chunk in streamed(client, max_tokens=3))


@pytest.mark.parametrize("length", [1, 3, 9])
def test_stop_strings(client, length):
    """Taken from inside what is generated, so that they begin and end anywhere in its tokens."""
    text = complete(client, max_tokens=48).choices[0].text
    for start in range(4, 40, 7):
        stop = text[start : start + length]
        expected = text[: text.index(stop)]
        answer = complete(client, max_tokens=48, stop=["never generated", stop], logprobs=0)
        assert (answer.choices[0].text, answer.choices[0].finish_reason) == (expected, "stop")
        assert all(offset < len(expected) for offset in answer.choices[0].logprobs.text_offset)
        chunks = streamed(client, max_tokens=48, stop=stop)
        assert text_of(chunks) == expected and chunks[-1].choices[0].finish_reason == "stop"
    # What only begins like a stop string is given out in the end.
    assert complete(client, max_tokens=48, stop=text[-5:] + "\0").choices[0].text == text


def test_sampling_parameters(client):
    greedy = complete(client).choices[0].text
    for same in ({"top_p": 1e-6}, {"extra_body": {"top_k": 1}}, {"temperature": 1e-3}):
        assert complete(client, **{"temperature": 1.5, **same}).choices[0].text == greedy
    assert len({complete(client, temperature=2.0).choices[0].text for _ in range(4)}) == 4
    first = complete(client, max_tokens=1, logit_bias={"300": 100}, logprobs=0)
    assert first.choices[0].logprobs.token_logprobs[0] < -3  # of the model's own distribution
    plain = complete(client, "x = [1, 1, 1, 1, 1, 1,", max_tokens=24).choices[0].text
    varied = complete(client, "x = [1, 1, 1, 1, 1, 1,", max_tokens=24, frequency_penalty=2, presence_penalty=2)
    assert len(set(varied.choices[0].text)) > len(set(plain))


def test_seed(client):
    options = {"temperature": 1.0, "max_tokens": 24, "seed": 11}
    text = complete(client, **options).choices[0].text
    assert complete(client, **options).choices[0].text == text_of(streamed(client, **options)) == text
    assert complete(client, **{**options, "seed": 12}).choices[0].text != text


def test_choices(client):
    chunks = streamed(client, temperature=1.0, max_tokens=12, n=3, seed=1)
    assert len({text_of(chunks, i) for i in range(3)}) == 3
    assert sorted(c.choices[0].index for c in chunks if c.choices[0].finish_reason == "length") == [0, 1, 2]
    answer = complete(client, [PROMPT, "import "], max_tokens=5, n=2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in answer.choices] == [
        complete(client, prompt, max_tokens=5).choices[0].text for prompt in (PROMPT, PROMPT, "import ", "import ")
    ]
    assert answer.usage.completion_tokens == 20


def reference_logprobs(reference, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return reference(torch.tensor([tokens])).logits[0].log_softmax(dim=-1)


def test_logprobs_of_prompts(client, tokenizer, reference):
    """A batch of token ids and of text, as evaluation harnesses send it. The longest is split into three batches."""
    source = (MODEL / "held_out.txt").read_text()
    prompts = [tokenizer.encode(part) for part in (source[:40], source[900:1200], source[2000:4600])]
    assert len(prompts[2]) > 2 * 256
    answer = complete(client, prompts, max_tokens=1, logprobs=3, echo=True)
    for prompt, choice in zip(prompts, answer.choices, strict=True):
        logprobs = choice.logprobs
        expected = reference_logprobs(reference, prompt)
        own = expected[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
        assert len(logprobs.tokens) == len(prompt) + 1 and logprobs.token_logprobs[0] is None
        actual = torch.tensor(logprobs.token_logprobs[1:-1])
        torch.testing.assert_close(actual, own, rtol=0, atol=LOGPROB_TOLERANCE)
        assert logprobs.token_logprobs[-1] == pytest.approx(expected[-1].max().item(), abs=LOGPROB_TOLERANCE)
        assert choice.text.startswith(tokenizer.decode(prompt)) and choice.text == "".join(logprobs.tokens)
        for i, (likeliest, place) in enumerate(zip(expected.topk(3).values.tolist(), logprobs.top_logprobs[1:])):
            assert sorted(place.values(), reverse=True)[:3] == pytest.approx(likeliest, abs=LOGPROB_TOLERANCE), i
            assert logprobs.token_logprobs[i + 1] == place[logprobs.tokens[i + 1]]
    text = tokenizer.decode(prompts[1])
    again = complete(client, text, max_tokens=0, logprobs=0, echo=True)
    assert again.choices[0].text == text and again.usage.completion_tokens == 0
    assert again.choices[0].logprobs.token_logprobs[1:] == pytest.approx(
        answer.choices[1].logprobs.token_logprobs[1:-1], abs=LOGPROB_TOLERANCE
    )
    assert complete(client, PROMPT, max_tokens=2, echo=True).choices[0].text.startswith(PROMPT)
    chunks = streamed(client, PROMPT, max_tokens=2, echo=True, logprobs=0)
    assert text_of(chunks) == complete(client, PROMPT, max_tokens=2, echo=True).choices[0].text
    assert sum(len(chunk.choices[0].logprobs.tokens) for chunk in chunks) == 4 + 2


def test_chat(client):
    parts = [{"type": "text", "text": "ma"}, {"type": "text", "text": "in"}]
    messages = [{"role": "system", "content": "Write."}, {"role": "user", "content": parts}]
    options = {"model": "tiny", "messages": messages, "temperature": 0, "max_tokens": 12}
    answer = client.chat.completions.create(**options, logprobs=True, top_logprobs=2)
    expected = complete(client, "# system: Write.\n# user: main\ndef ", max_tokens=12)
    choice = answer.choices[0]
    assert (choice.message.role, choice.message.content) == ("assistant", expected.choices[0].text)
    assert answer.usage == expected.usage and choice.finish_reason == "length"
    assert "".join(token.token for token in choice.logprobs.content) == choice.message.content
    for token in choice.logprobs.content:
        assert len(token.top_logprobs) == 2 and token.top_logprobs[0].logprob == token.logprob
        assert bytes(token.bytes).decode() == token.token
    options["max_completion_tokens"] = options.pop("max_tokens")
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].usage == answer.usage
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == choice.message.content
    stopped = client.chat.completions.create(**{**options, "stop": choice.message.content[3:6], "n": 2})
    assert [c.message.content for c in stopped.choices] == [choice.message.content[:3]] * 2


BAD = {
    "another model": (404, {"model": "other"}, "model"),
    "a temperature below 0": (422, {"temperature": -1}, "temperature"),
    "a type": (422, {"max_tokens": "many"}, "max_tokens"),
    "no choice": (422, {"n": 0}, "n"),
    "an unknown field": (422, {"extra_body": {"top_q": 3}}, "top_q"),
    "too many logprobs": (422, {"logprobs": 21}, "logprobs"),
    "an empty stop string": (422, {"stop": ""}, "stop"),
    "stream options without a stream": (422, {"stream_options": {"include_usage": True}}, None),
    "best_of": (400, {"best_of": 4}, "best_of"),
    "a suffix": (400, {"suffix": "end"}, "suffix"),
    "a response format": (400, {"extra_body": {"response_format": {"type": "json_object"}}}, "response_format"),
    "a repetition penalty": (400, {"extra_body": {"repetition_penalty": 1.1}}, "repetition_penalty"),
    "an empty prompt": (400, {"prompt": ""}, "prompt"),
    "no prompt": (400, {"prompt": []}, "prompt"),
    "an unknown token": (400, {"prompt": [1, 2048]}, "prompt"),
    "a biased unknown token": (400, {"logit_bias": {"2048": 1}}, "logit_bias"),
    "a long prompt": (400, {"prompt": [5] * 1024}, "prompt"),
    "a longer prompt that is echoed": (400, {"prompt": [5] * 1025, "max_tokens": 0, "echo": True}, "prompt"),
    "a long answer": (400, {"prompt": [5] * 1000, "max_tokens": 25}, "prompt"),
    "too many sequences": (400, {"prompt": [[5]] * 9, "n": 128}, "n"),
    "nothing to return": (400, {"max_tokens": 0}, "max_tokens"),
}


@pytest.mark.parametrize("status, options, param", BAD.values(), ids=BAD)
def test_refused(client, status, options, param):
    with pytest.raises(openai.APIStatusError) as caught:
        client.completions.create(**{"model": "tiny", "prompt": PROMPT, **options})
    error = caught.value.body
    assert caught.value.status_code == status and error["message"] and error["type"]
    if param is not None:
        assert error["param"].split(".")[0] == param


def test_fields_that_ask_for_nothing(client):
    nothing = {
        "best_of": 1, "suffix": None, "user": "someone", "presence_penalty": 0, "stop": None, "seed": None,
        "extra_body": {"repetition_penalty": 1.0, "min_p": 0.0, "response_format": {"type": "text"}, "top_k": -1},
    }  # fmt: skip
    assert complete(client, **nothing).choices[0].text == complete(client).choices[0].text


def test_refused_chats(client):
    def status(**options) -> int:
        options = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], **options}
        with pytest.raises(openai.APIStatusError) as caught:
            client.chat.completions.create(**options)
        return caught.value.status_code

    assert status(messages=[{"role": "tool", "content": "x"}]) == 400  # the template raises
    assert status(messages=[]) == 422
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    assert status(messages=[{"role": "user", "content": [picture]}]) == 422
    assert status(tools=[{"type": "function", "function": {"name": "f"}}]) == 400
    assert status(top_logprobs=2) == 400


def test_keys(server, client):
    for key in ("third-key", "first-ke", "none"):
        with pytest.raises(openai.AuthenticationError, match="Authorization: Bearer"):
            complete(server.client(key), max_tokens=1)
    for key in KEYS:
        assert complete(server.client(key), max_tokens=1).choices
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
    connection.request("GET", "/v1/models")
    assert connection.getresponse().status == 401


def post(server, body: bytes, chunked: bool = False) -> tuple[int, dict]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
    headers = {"Authorization": f"Bearer {KEYS[0]}", "Content-Type": "application/json"}
    pieces = (body[i : i + 4096] for i in range(0, len(body), 4096))
    connection.request("POST", "/v1/completions", pieces if chunked else body, headers, encode_chunked=chunked)
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())


@pytest.mark.parametrize("chunked", [False, True])
def test_request_sizes(server, chunked):
    body = json.dumps({"model": "tiny", "prompt": PROMPT, "max_tokens": 1}).encode()
    assert post(server, body + b" " * (MOST_BYTES - len(body)), chunked)[0] == 200
    status, answer = post(server, body + b" " * (MOST_BYTES - len(body) + 1), chunked)
    assert status == 413 and str(MOST_BYTES) in answer["error"]["message"]


def test_bodies_that_no_client_sends(server):
    assert post(server, b'{"model": ')[0] == 400
    assert post(server, b'"text"')[0] == 422
    assert post(server, b"\xff\xfe")[0] == 400
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 1}
    assert post(server, json.dumps({**body, "prompt": "\ud800"}).encode())[0] in (400, 422)
    assert post(server, json.dumps({**body, "stop": "\ud800"}).encode())[0] in (200, 422)
    for value in (float("nan"), float("inf"), 10**400):
        assert post(server, json.dumps({**body, "temperature": value}).encode())[0] == 422
        assert post(server, json.dumps({**body, "logit_bias": {"5": value}}).encode())[0] == 422
    for seed in (-1, -(2**63), 2**63 - 1):
        assert post(server, json.dumps({**body, "seed": seed, "n": 2}).encode())[0] == 200
    assert post(server, json.dumps({**body, "seed": 2**63}).encode())[0] == 422
    assert post(server, json.dumps({**body, "max_tokens": 10**400}).encode())[0] in (400, 422)


LONG = {"max_tokens": 900, "extra_body": {"ignore_eos": True}}


def test_client_that_disconnects_from_its_stream(server, client):
    before = server.wait_until_idle()
    stream = complete(client, stream=True, n=3, **LONG)
    for _ in range(3):
        next(stream)
    during = server.metrics()
    assert during["sequences_running"] == 3 and during["kv_blocks_free"] <= KV_BLOCKS - 3
    assert during["requests_running"] == 1
    stream.response.close()
    after = server.wait_until_idle()
    assert finished(after, "cancelled") == finished(before, "cancelled") + 3
    assert finished(after, "length", "stop") == finished(before, "length", "stop")


def test_client_that_disconnects_while_it_waits(server, client):
    before = server.wait_until_idle()
    with pytest.raises(openai.APITimeoutError):
        complete(client.with_options(timeout=0.5), n=8, **LONG)
    after = server.wait_until_idle()
    assert finished(after, "cancelled") == finished(before, "cancelled") + 8


def test_many_requests_some_of_them_cancelled(server):
    """More than the KV cache holds, so that sequences also wait, and start over."""
    before, requests = server.wait_until_idle(), 200
    generator = random.Random(0)
    plans = [
        {
            "prompt": [generator.randrange(1, 2048) for _ in range(generator.choice((1, 5, 40, 130, 300)))],
            "max_tokens": generator.randint(1, 60),
            "leave_after": generator.randint(0, 20) if generator.random() < 0.3 else None,
            "stream": generator.random() < 0.7,
        }
        for _ in range(requests)
    ]

    async def one(client, limit, plan) -> str:
        options = {"model": "tiny", "prompt": plan["prompt"], "max_tokens": plan["max_tokens"], "temperature": 1.0}
        options["extra_body"] = {"ignore_eos": True}
        async with limit:
            if not plan["stream"]:
                answer = await client.completions.create(**options, logprobs=0)
                assert len(answer.choices[0].logprobs.tokens) == plan["max_tokens"]
                assert answer.usage.completion_tokens == plan["max_tokens"]
                return "whole"
            chunks = 0
            async with await client.completions.create(
                **options, stream=True, stream_options={"include_usage": True}
            ) as stream:
                async for chunk in stream:
                    if plan["leave_after"] is not None and chunks >= plan["leave_after"]:
                        return "left"
                    chunks += 1
            assert chunk.usage.completion_tokens == plan["max_tokens"]
            return "whole"

    async def everything() -> list[str]:
        async with server.async_client(KEYS[1]) as client:
            limit = asyncio.Semaphore(48)
            return await asyncio.wait_for(asyncio.gather(*(one(client, limit, plan) for plan in plans)), 4 * PATIENCE)

    outcomes = asyncio.run(everything())
    after = server.wait_until_idle()
    assert outcomes.count("left") > 20 and len(outcomes) == requests
    assert finished(after, "length", "cancelled") == finished(before, "length", "cancelled") + requests
    assert finished(after, "length") >= finished(before, "length") + outcomes.count("whole")
    assert finished(after, "cancelled") > finished(before, "cancelled")
    assert finished(after, "failed") == 0


def test_metrics(server, client):
    before = server.wait_until_idle()
    complete(client, max_tokens=5, n=2)
    after = server.wait_until_idle()

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0)

    assert grown("prompt_tokens_total") == 4 and grown("generation_tokens_total") == 10
    for histogram in ("time_to_first_token_seconds", "time_per_output_token_seconds", "request_latency_seconds"):
        assert grown(f"{histogram}_count") == 2 and grown(f"{histogram}_sum") > 0
    assert grown('requests_total{path="/v1/completions",status="200"}') == 1
    assert after["kv_block_tokens"] == 128


def test_lm_eval(server, tmp_path, tokenizer, reference):
    """The harness's own command line, against scores from transformers."""
    tasks = TESTS / "lm_eval_tasks"
    arguments = f"model=tiny,base_url={server.root}/v1/completions,tokenizer={MODEL},tokenizer_backend=huggingface"
    environment = {**os.environ, "OPENAI_API_KEY": KEYS[0], "HF_HOME": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    harness = subprocess.run(
        [sys.executable, "-m", "lm_eval", "--model", "local-completions", "--tasks", "tiny_choice.yaml,tiny_write.yaml",
         "--output_path", str(tmp_path / "out"), "--log_samples",
         "--model_args", f"{arguments},num_concurrent=1,max_retries=1,max_length=1024", "--batch_size", "4"],
        cwd=tasks, env=environment, capture_output=True, text=True, timeout=4 * PATIENCE,
    )  # fmt: skip
    assert harness.returncode == 0, harness.stderr
    [result] = (tmp_path / "out").rglob("results_*.json")
    scores = json.loads(result.read_text())["results"]
    [samples] = (tmp_path / "out").rglob("samples_tiny_choice_*.jsonl")
    hits = []
    for line in samples.read_text().splitlines():
        sample = json.loads(line)
        document, sums = sample["doc"], []
        for choice, (answer, _) in zip(document["choices"], sample["filtered_resps"], strict=True):
            context, whole = tokenizer.encode(document["code"]), tokenizer.encode(document["code"] + choice)
            logprobs = reference_logprobs(reference, whole)[len(context) - 1 : -1]
            sums.append(logprobs.gather(1, torch.tensor(whole[len(context) :])[:, None]).sum().item())
            assert float(answer) == pytest.approx(sums[-1], abs=LOGPROB_TOLERANCE * (len(whole) - len(context)))
        hits.append(sums.index(max(sums)) == document["label"])
    assert len(hits) == 4 and scores["tiny_choice"]["acc,none"] == pytest.approx(sum(hits) / 4)
    assert scores["tiny_write"]["exact_match,none"] == 1.0

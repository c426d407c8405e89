"""The server's parts by themselves: stop strings, sampling, limits, templates, keys."""

from __future__ import annotations

import asyncio
import random
from types import SimpleNamespace

import pytest
import torch

from ds_fp6.integrations.deepspeed.graphs import StepGraphs, paused
from ds_fp6.integrations.mii.sampling import Sampler, Sampling, choose, token_logprobs
from ds_fp6.serving.engine import Engine
from ds_fp6.serving.errors import ApiError
from ds_fp6.serving.lifecycle import batch_limits
from ds_fp6.serving.options import read_template
from ds_fp6.serving.settings import Settings
from ds_fp6.serving.text import StoppableText, Token


def decode(tokens: list[int]) -> str:
    """Tokens are bytes."""
    return bytes(tokens).decode(errors="replace")


def run(text: str, stops: list[str]) -> tuple[list[str], list[str], bool]:
    """The pieces of ``text`` byte by byte, the tokens that come with them, and whether it stopped."""
    stream, pieces = StoppableText(decode, stops), []
    for byte in text.encode():
        pieces.append(stream.add(byte, Token(chr(byte), 0.0, None)))
        if stream.stopped:
            break
    else:
        pieces.append(stream.end())
    return [piece.text for piece in pieces], [token.text for piece in pieces for token in piece.tokens], stream.stopped


@pytest.mark.parametrize(
    ("text", "stops", "expected", "stopped"),
    [
        ("abcdef", ["cd"], "ab", True),
        ("abcdef", ["de", "bc"], "a", True),
        ("abcdef", ["bcdef", "cd"], "ab", True),
        ("abcdef", ["bcd", "cd"], "a", True),
        ("aaab", ["aab"], "a", True),
        ("abab", ["abc"], "abab", False),
        ("ab", ["abc", "b!"], "ab", False),
        ("cdab", ["cd"], "", True),
        ("grün, ja", ["ü"], "gr", True),
        ("grün, ja", ["n,"], "grü", True),
        ("grün, ja", [], "grün, ja", False),
    ],
)
def test_stop_strings(text, stops, expected, stopped):
    pieces, tokens, ended = run(text, stops)
    assert "".join(pieces) == expected and ended == stopped
    assert len(tokens) == len(expected.encode())


def test_first_token_is_written_as_one_that_continues_a_text():
    """SentencePiece's tokenizers drop the space before the first word that they decode."""
    words = {1: " one", 2: " two", 3: " three"}
    stream = StoppableText(lambda tokens: "".join(words[token] for token in tokens).lstrip(" "), context=[1])
    assert [stream.add(2, None).text, stream.add(3, None).text, stream.end().text] == [" two", " three", ""]


def test_no_piece_leaks_the_beginning_of_a_stop_string():
    generator = random.Random(0)
    for _ in range(300):
        text = "".join(generator.choice("ab") for _ in range(30))
        stops = ["".join(generator.choice("ab") for _ in range(generator.randint(1, 8))) for _ in range(2)]
        found = sorted((text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text)
        pieces, tokens, stopped = run(text, stops)
        assert "".join(pieces) == (text[: found[0][1]] if found else text) and stopped == bool(found)
        assert len(tokens) == len("".join(pieces))


def logits(rows: int, size: int = 50) -> torch.Tensor:
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(rows))


def test_sampled_tokens_follow_the_distribution():
    row = logits(1, 8)
    for sampling in (Sampling(), Sampling(temperature=0.5), Sampling(top_k=3), Sampling(top_p=0.7)):
        expected = (row[0] / sampling.temperature).softmax(dim=-1)
        likeliest = expected.sort(descending=True)
        kept = 8
        if sampling.top_k:
            kept = sampling.top_k
        if sampling.top_p < 1:
            kept = int((likeliest.values.cumsum(0) < sampling.top_p).sum()) + 1
        expected[likeliest.indices[kept:]] = 0
        expected /= expected.sum()
        sampler = Sampler(Sampling(sampling.temperature, sampling.top_p, sampling.top_k, seed=1))
        drawn = torch.stack([choose(row, [sampler])[0] for _ in range(4000)])
        share = torch.bincount(drawn, minlength=8) / 4000
        assert (share[expected == 0] == 0).all() and (share - expected).abs().max() < 0.03


def test_a_seeded_sequence_does_not_depend_on_its_batch():
    rows = logits(6).repeat(20, 1)
    alone, together = [], []
    settings = Sampling(seed=3, top_p=0.95)
    others = [Sampling(), Sampling(temperature=0), Sampling(top_k=2), Sampling(seed=4), Sampling(top_p=0.5, seed=3)]
    one, many = Sampler(settings), [Sampler(s) for s in (settings, *others * 22)]
    rows = rows[: len(many)]
    for _ in range(50):
        alone.append(int(choose(rows[:1], [one])[0]))
        together.append(int(choose(rows, many)[0]))
    assert alone == together and len(set(alone)) > 5


def test_bias_and_penalties():
    rows = torch.zeros(2, 5)
    rows[:, 2] = 1.0
    samplers = [Sampler(Sampling(temperature=0, logit_bias={4: 3.0})), Sampler(Sampling(temperature=0))]
    assert choose(rows, samplers).tolist() == [4, 2]
    sampler = Sampler(Sampling(temperature=0, presence_penalty=0.4, frequency_penalty=0.4))
    # Token 2 is ahead by 1: two times cost 0.4 + 0.8.
    chosen = []
    for _ in range(4):
        chosen.append(int(choose(rows[:1], [sampler])[0]))
        sampler.saw(chosen[-1])
    assert chosen == [2, 2, 0, 1]
    assert rows[0].tolist() == [0, 0, 1, 0, 0]


def test_token_logprobs():
    rows = logits(3).half()
    expected = rows.float().log_softmax(dim=-1)
    for row, found in enumerate(token_logprobs(rows, [5, 6, 7], [0, 2, 60])):
        assert found.token == 5 + row and found.logprob == pytest.approx(expected[row, 5 + row].item())
        best = expected[row].topk((0, 2, 50)[row])
        assert found.top == tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))


def test_steps_that_score_prompts_are_not_captured():
    graphs = StepGraphs(run=lambda batch: f"logits of {batch}", filler=None, device=None, budget=0)
    engine = SimpleNamespace(_batch=SimpleNamespace(_padder=graphs))
    with paused(engine):
        graphs.pad("a batch")
        assert graphs.forward("a batch") == "logits of a batch"
    assert not graphs.paused
    with paused(SimpleNamespace(_batch=SimpleNamespace(_padder=None))):
        pass


def limits(**flags) -> dict:
    return batch_limits(Settings("model", ("model",), **flags))


def test_batch_limits():
    assert limits()["max_ragged_sequence_count"] == 512
    assert limits(max_num_batched_tokens=256)["max_ragged_sequence_count"] == 255
    assert limits(max_num_seqs=4096)["max_ragged_batch_size"] == 4097
    assert limits(max_num_seqs=4096)["max_tracked_sequences"] == 4096
    assert limits(num_kv_blocks=7)["memory_config"] == {"mode": "allocate", "size": 7}
    for wrong in ({"max_num_batched_tokens": 8, "max_num_seqs": 8}, {"max_num_batched_tokens": 1}):
        with pytest.raises(ValueError, match="--max-num-batched-tokens must be more"):
            limits(**wrong)


def test_templates(tmp_path):
    path = tmp_path / "template.jinja"
    path.write_text("{{ messages }}")
    assert read_template(str(path)) == read_template("{{ messages }}") == "{{ messages }}"
    assert read_template(None) is None
    with pytest.raises(FileNotFoundError, match="no such template"):
        read_template("no such template")


class FakePipeline:
    """What an engine needs of a pipeline that fails before anything runs."""

    failure: BaseException | None = None

    def __call__(self) -> None:
        pass

    def fail(self, failure: BaseException) -> None:
        self.failure = failure
        self.deliver([(7, failure)])


def test_failure_before_the_server_has_started():
    ended = []
    engine = Engine(FakePipeline(), lambda: ended.append(True))
    engine.fail(RuntimeError("rank 1 ended"))

    async def start() -> None:
        engine.start()

    asyncio.run(start())
    assert ended == [True]
    with pytest.raises(ApiError, match="rank 1 ended"):
        engine.check()

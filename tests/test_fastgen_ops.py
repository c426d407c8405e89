"""FastGen's operators on a CPU: the extension's against their twins in torch, and those against their definition."""

from __future__ import annotations

import pytest
import torch

from ds_fp6 import ops
from ds_fp6.cpu import attention, compiled, core_ops, moe_ops, ragged_ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
#: One unit in the last place of results around 1, twice: twins round different sums.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}

ops.load("CPU")
RUNNABLE = torch.ops.ds_fp6.cpu_isa().split(": ")[1].split()


@pytest.fixture(params=RUNNABLE)
def isa(request):
    torch.ops.ds_fp6.select_cpu_isa(request.param)
    yield request.param
    torch.ops.ds_fp6.select_cpu_isa("")


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=TOLERANCE[a.dtype], atol=TOLERANCE[a.dtype])


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Batch:
    """A ragged batch over a cache of 12 blocks: sequences by (tokens seen before, tokens now)."""

    BLOCKS = 12

    def __init__(self, block_size: int, *sequences: tuple[int, int]) -> None:
        free = torch.randperm(self.BLOCKS, generator=torch.Generator().manual_seed(1)).int()
        self.lists, first, rows, owners = [], 0, [], []
        for s, (seen, now) in enumerate(sequences):
            count = -(-(seen + now) // block_size)
            self.lists.append(free[:count].clone())
            free = free[count:]
            rows.append([first, now, seen, 0])
            owners += [s] * now
            first += now
        self.tokens = first
        self.M = torch.tensor([first, len(sequences)], dtype=torch.int32)
        self.S = torch.tensor(rows, dtype=torch.int32)
        self.T = torch.tensor(owners, dtype=torch.int32)
        self.P = torch.tensor([blocks.data_ptr() for blocks in self.lists], dtype=torch.int64)

    @property
    def arguments(self) -> tuple[torch.Tensor, ...]:
        return self.M, self.S, self.T, self.P


#: block size, query heads, key/value heads, head size, sequences
LAYOUTS = {
    "decode": (128, 4, 4, 64, [(0, 1), (127, 1), (128, 1), (300, 1)]),
    "grouped prefill": (64, 8, 2, 80, [(0, 70), (13, 100), (64, 1)]),
    "multi-query": (64, 7, 1, 16, [(0, 130), (5, 3)]),
    "odd size": (32, 2, 1, 20, [(40, 9), (0, 1)]),
}


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_attention(layout, dtype, window, isa):
    block_size, heads, kv_heads, size, sequences = LAYOUTS[layout]
    batch = Batch(block_size, *sequences)
    qkv = random(batch.tokens, (heads + 2 * kv_heads) * size, dtype=dtype)
    cache = random(batch.BLOCKS, block_size, 2, kv_heads, size, dtype=dtype, seed=1)
    atoms = torch.empty(8, 8, dtype=torch.int32)
    count = attention.build_atoms(atoms, batch.M, batch.S, batch.P, attention.Q_BLOCK, block_size)
    assert count == len(sequences)
    arguments = (qkv[:, : heads * size], cache[:, :, 0], cache[:, :, 1], atoms[:count], size**-0.5, True, window)
    expected, actual = (torch.empty(batch.tokens, heads * size, dtype=dtype) for _ in range(2))
    attention.flash_attn_by_atoms(expected, *arguments)
    compiled.flash_attn_by_atoms(actual, *arguments)
    close(actual, expected)


def test_attention_is_softmax_over_what_a_query_may_see():
    batch = Batch(32, (20, 30))
    q, cache = random(30, 16, dtype=torch.float32), random(12, 32, 2, 1, 16, dtype=torch.float32, seed=1)
    atoms = torch.empty(2, 8, dtype=torch.int32)
    attention.build_atoms(atoms, batch.M, batch.S, batch.P, attention.Q_BLOCK, 32)
    out = torch.empty(30, 16)
    attention.flash_attn_by_atoms(out, q, cache[:, :, 0], cache[:, :, 1], atoms[:1], 0.25, True)
    keys, values = cache[batch.lists[0].long()].view(-1, 2, 16)[:50].unbind(1)
    for i in range(30):
        weights = torch.softmax(0.25 * keys[: 21 + i] @ q[i], 0)
        close(out[i], weights @ values[: 21 + i])


def test_atoms_split_queries_and_are_bounded():
    batch = Batch(64, (100, 50), (0, 20))
    atoms = torch.empty(5, 8, dtype=torch.int32)
    with pytest.raises(ValueError, match="6 attention atoms, more than the 5"):
        attention.build_atoms(atoms, batch.M, batch.S, batch.P, 16, 64)
    assert attention.build_atoms(atoms, batch.M, batch.S, batch.P, 32, 64) == 3
    assert atoms[:3, 2:7].tolist() == [[0, 32, 3, 132, 100], [32, 18, 3, 150, 132], [50, 20, 1, 20, 0]]
    assert atoms[:3, :2].contiguous().view(torch.int64).flatten().tolist() == [batch.P[0], batch.P[0], batch.P[1]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rotary_dim", "trained"), [(None, False), (16, False), (80, False), (80, True)])
def test_rotary_and_cache(rotary_dim, trained, dtype, isa):
    heads, kv_heads, size, block_size = 6, 2, 80, 64
    batch = Batch(block_size, (0, 70), (63, 2), (300, 1))
    qkv = random(batch.tokens, (heads + 2 * kv_heads) * size, dtype=dtype)
    empty = torch.zeros(batch.BLOCKS, block_size, 2, kv_heads, size, dtype=dtype)

    def run(module):
        own, cache = qkv.clone(), empty.clone()
        q, k, v = own.split([heads * size, kv_heads * size, kv_heads * size], dim=1)
        if rotary_dim is None:
            module.linear_kv_copy(cache, q, k, v, *batch.arguments)
        elif trained:
            frequencies = ragged_ops.inverse_frequencies(rotary_dim, 500.0)
            module.kv_trained_rotary_embeddings(cache, q, k, v, frequencies, *batch.arguments)
        else:
            module.kv_rotary_embeddings(cache, q, k, v, rotary_dim, 10000.0, *batch.arguments)
        return own, cache

    compiled._tables.clear()
    for actual, expected in zip(run(compiled), run(ragged_ops)):
        close(actual, expected)


def test_rotary_rotates_halves_by_position():
    batch = Batch(64, (7, 1))
    x, cache = random(1, 3 * 8, dtype=torch.float32), torch.zeros(12, 64, 2, 1, 8)
    q, k, v = x.clone().split(8, dim=1)
    ragged_ops.kv_rotary_embeddings(cache, q, k, v, 4, 100.0, *batch.arguments)
    block = batch.lists[0][0]
    for before, after in ((x[0, :8], q[0]), (x[0, 8:16], cache[block, 7, 0, 0])):
        for i, angle in enumerate((7.0, 0.7)):
            turned = torch.complex(before[i], before[i + 2]) * torch.polar(torch.tensor(1.0), torch.tensor(angle))
            close(torch.stack([after[i], after[i + 2]]), torch.view_as_real(turned))
        assert torch.equal(after[4:], before[4:])
    assert torch.equal(cache[block, 7, 1, 0], x[0, 16:]) and int((cache != 0).sum()) == 16


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [8, 100, 1024])
def test_norms(width, dtype, isa):
    x, residual = (random(5, width, dtype=dtype, seed=seed) for seed in (0, 1))
    gamma, beta = (random(width, dtype=dtype, seed=seed) for seed in (2, 3))
    for name in ("rms_norm", "layer_norm", "rms_pre_norm", "pre_layer_norm", "post_layer_norm"):
        results = []
        for module in (core_ops, compiled):
            out, other = torch.empty_like(x), torch.empty_like(x)
            if name == "rms_norm":
                module.rms_norm(out, x, gamma, 1e-6)
            elif name == "layer_norm":
                module.layer_norm(out, x, gamma, beta, 1e-6)
            elif name == "rms_pre_norm":
                module.rms_pre_norm(out, other, x, residual, gamma, 1e-6)
            elif name == "pre_layer_norm":
                module.pre_layer_norm(other, out, x, residual, gamma, beta, 1e-6)
            else:
                module.post_layer_norm(out, x, residual, gamma, beta, 1e-6)
            if "pre" in name:
                assert torch.equal(other, x + residual)
            results.append(out)
        close(results[1], results[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_may_write_over_their_input(dtype, isa):
    x, residual, gamma = random(3, 64, dtype=dtype), random(3, 64, dtype=dtype, seed=1), random(64, dtype=dtype, seed=2)
    expected = torch.empty_like(x)
    compiled.rms_norm(expected, x + residual, gamma, 1e-5)
    hidden, stream = x.clone(), residual.clone()
    compiled.rms_pre_norm(hidden, stream, hidden, stream, gamma, 1e-5)
    assert torch.equal(stream, x + residual) and torch.equal(hidden, expected)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_activations(dtype, biased, isa):
    x, bias = 4 * random(5, 72, dtype=dtype), random(72, dtype=dtype, seed=1) if biased else None
    x[0, :4] = torch.tensor([100.0, -100.0, 0.0, -0.0])
    for activation in (*compiled._ACTIVATIONS, core_ops.ExactActivation.GELU):
        expected, actual = x.clone(), x.clone()
        core_ops.bias_activation(expected, bias, activation)
        compiled.bias_activation(actual, bias, activation)
        close(actual, expected)
    for activation in (*compiled._GATES, core_ops.ExactActivation.GEGLU):
        expected, actual = x.new_empty(5, 36), x.new_empty(5, 36)
        core_ops.gated_activation(expected, x, bias, activation)
        compiled.gated_activation(actual, x, bias, activation)
        close(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 6, 40])
@pytest.mark.parametrize("width", [3, 100])
def test_linear(width, rows, dtype, isa):
    x, weight = random(rows, width, dtype=dtype), random(33, width, dtype=dtype, seed=1) / 10
    out = torch.empty(rows, 33, dtype=dtype)
    compiled.blas_linear(out, x, weight)
    close(out, (x.float() @ weight.float().t()).to(dtype))
    if dtype == torch.float16:
        core_ops.blas_linear(out, x, weight)
        close(out, (x.float() @ weight.float().t()).to(dtype))


def test_linear_leaves_columns_beyond_the_weight():
    out = torch.full((3, 8), 7.0)
    compiled.blas_linear(out, random(3, 16, dtype=torch.float32), random(1, 16, dtype=torch.float32, seed=1))
    assert (out[:, 1:] == 7).all() and (out[:, 0] != 7).all()


WRONG = {
    "dtype": (lambda o: o.ragged_norm(torch.empty(2, 8, dtype=torch.int32), None, torch.ones(2, 8, dtype=torch.int32),
                                      None, torch.ones(8), None, 1e-5), TypeError, "float32, float16 or bfloat16"),
    "gamma": (lambda o: o.ragged_norm(torch.empty(2, 8), None, torch.ones(2, 8), None, torch.ones(7), None, 1e-5),
              ValueError, r"\[8\].*\[7\]"),
    "gated width": (lambda o: o.ragged_activation(torch.empty(2, 8), torch.ones(2, 8), None, 0, True),
                    ValueError, "do not belong together"),
    "activation": (lambda o: o.ragged_activation(torch.empty(2, 8), torch.ones(2, 16), None, 9, True),
                   ValueError, "0..3, got 9"),
    "dense": (lambda o: o.ragged_dense(torch.empty(2, 3).half(), torch.ones(2, 8).half(), torch.ones(3, 9).half()),
              ValueError, "do not belong together"),
    "dense in fp32": (lambda o: o.ragged_dense(torch.empty(2, 3), torch.ones(2, 8), torch.ones(3, 8)),
                      TypeError, "float16"),
    "atom": (lambda o: o.ragged_attention(
        torch.empty(2, 16), torch.ones(2, 16), torch.ones(4, 32, 1, 16), torch.ones(4, 32, 1, 16),
        torch.tensor([[0, 0, 0, 3, 1, 3, 0, 0]], dtype=torch.int32), 1.0, 0), ValueError, "queries .0, 3. of 2"),
    "heads": (lambda o: o.ragged_attention(
        torch.empty(2, 24), torch.ones(2, 24), torch.ones(4, 32, 1, 16), torch.ones(4, 32, 1, 16),
        torch.empty(0, 8, dtype=torch.int32), 1.0, 0), ValueError, "multiple of 1 heads of 16"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_bad_arguments(case):
    call, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        call(torch.ops.ds_fp6)


def test_embedding_with_positions_and_last_tokens():
    batch = Batch(64, (3, 2), (0, 3))
    words, places = random(10, 8, dtype=torch.float32), random(20, 8, dtype=torch.float32, seed=1)
    ids, out = torch.tensor([1, 2, 3, 4, 5]), torch.empty(5, 8)
    ragged_ops.ragged_embed(out, ids, words, places, 2, *batch.arguments)
    assert torch.equal(out, words[ids] + places[torch.tensor([5, 6, 2, 3, 4])])
    last = torch.empty(2, 8)
    ragged_ops.gather_for_logits(last, out, batch.M, batch.S)
    assert torch.equal(last, out[[1, 4]])
    with pytest.raises(IndexError):
        ragged_ops.ragged_embed(out, ids + 6, words, None, 0, *batch.arguments)


def test_views_on_a_buffer():
    buffer = torch.arange(64, dtype=torch.uint8)
    view = ragged_ops.allocate_view_on(torch.empty(2, 3, dtype=torch.int16), buffer, 8)
    assert torch.equal(view, buffer[8:20].view(torch.int16).view(2, 3))
    view = ragged_ops.allocate_view_like([2, 2], [1, 2], torch.empty(0, dtype=torch.int32), buffer, 16)
    assert torch.equal(view, buffer[16:32].view(torch.int32).view(2, 2).t())
    assert ragged_ops.allocate_fast_host_buffer(view).shape == view.shape


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_experts(k, normalize):
    """Gate, scatter, multiply, gather: the sum over a token's experts, written out."""
    tokens, experts, width, inner = 9, 5, 8, 6
    x, logits = random(tokens, width, dtype=torch.float32), random(tokens, experts, dtype=torch.float32, seed=1)
    logits[0] = 0.5  # ties go to the lower experts
    weight = random(experts, width, inner, dtype=torch.float32, seed=2)
    padded = 2  # tokens at the end that are padding
    batch = torch.tensor([tokens - padded, 1], dtype=torch.int32)
    counts, cumsum = torch.zeros(experts, dtype=torch.int32), torch.empty(experts, dtype=torch.int64)
    scores = torch.empty(tokens, k)
    assignments, offsets, slots = (torch.empty(tokens, k, dtype=torch.int32) for _ in range(3))
    moe_ops.top_k_gating(counts, scores, assignments, offsets, logits, batch)
    assert assignments[0].tolist() == list(range(k)) and (assignments[-padded:] == -1).all()
    assert counts.sum() == (tokens - padded) * k
    rows, products = torch.zeros(tokens * k, width), torch.zeros(tokens * k, inner)
    out = torch.full((tokens, inner), 7.0)
    moe_ops.moe_scatter(rows, cumsum, slots, x, counts, assignments, offsets)
    assert cumsum.tolist() == counts.cumsum(0).tolist()
    moe_ops.moe_gemm(products, rows, weight, None, cumsum, core_ops.IDENTITY)
    moe_ops.moe_gather(out, products, scores, slots, counts, normalize)
    assert not counts.any() and (out[-padded:] == 7).all()
    probabilities = logits.softmax(-1)
    for t in range(tokens - padded):
        chosen = sorted(range(experts), key=lambda e: (-probabilities[t, e].item(), e))[:k]
        share = probabilities[t, chosen]
        share = share / share.sum() if normalize else share
        close(out[t], sum(s * (x[t] @ weight[e]) for s, e in zip(share, chosen)))

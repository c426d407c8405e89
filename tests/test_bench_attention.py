"""The attention benchmark: its cases are computed right, and its floors are what they should be."""

from __future__ import annotations

import argparse

import pytest
import torch
from triton_device import DEVICE, DTYPES

from ds_fp6.bench import attention
from ds_fp6.bench.__main__ import main


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch, tokens, decode", [(3, 70, True), (1, 1, True), (2, 40, False)])
def test_cases_agree_with_fp64(batch, tokens, decode, dtype):
    work = attention.Work(attention.Heads(4, 2, 128), batch, tokens, decode, dtype, DEVICE, copies=2)
    assert work.error() <= attention.TOLERANCE[dtype]
    work.launch(1)
    assert torch.isfinite(work._out).all()
    work._caches[0][work._lists[-1].long()] *= 2.0
    work._q[-1] = 0
    assert work.error() <= attention.TOLERANCE[dtype]


def test_floors():
    heads = attention.Heads.of("llama-2-70b")
    assert heads == (64, 8, 128)
    assert attention.floor_seconds(heads, 32, 700, True, 4e12, 8e14) == pytest.approx(32 * 700 * 8 * 128 * 4 / 4e12)
    prompt = attention.floor_seconds(heads, 1, 512, False, 4e12, 8e14)
    assert prompt == pytest.approx(4 * 64 * 128 * 512 * 513 / 2 / 8e14)


def test_pairs_and_what_is_no_pair():
    assert attention._pairs("1x128,32x700") == [(1, 128), (32, 700)]
    for text in ("128", "0x5", "axb", "1x2x3"):
        with pytest.raises(argparse.ArgumentTypeError, match="such as 1x128,32x700"):
            attention._pairs(text)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_says_that_there_is_no_gpu(capsys):
    assert main(["attention"]) == 2
    assert "no NVIDIA GPU" in capsys.readouterr().err

"""What the GPU race computes from its times; the race itself needs a GPU."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from ds_fp6.bench.__main__ import main
from ds_fp6.bench.linear_cuda import Ceilings, Result, activations, as_json, header, line, means, plot, summary

CEILINGS = Ceilings(bandwidth=4e12, operations=8e14)


def result(layer: str, m: int, fp6: float) -> Result:
    floor = CEILINGS.floor(8192, 8192, m, 6)
    return Result(layer, 8192, 8192, m, floor, {"cublas": 40e-6, "fp6": fp6, "humming": 20e-6}, [])


def test_floor_is_memory_for_few_tokens_and_tensor_cores_for_many():
    assert CEILINGS.floor(8192, 8192, 1, 6) == pytest.approx((8192 * 8192 * 0.75 + 2 * 2 * 8192) / 4e12)
    assert CEILINGS.floor(8192, 8192, 4096, 6) == pytest.approx(2 * 4096 * 8192 * 8192 / 8e14)


def test_means_are_geometric_over_the_layers_of_an_m():
    results = [result("o", 1, 10e-6), result("qkv", 1, 40e-6), result("o", 64, 20e-6)]
    assert means(results, lambda r: r.speedup("fp6")) == pytest.approx({1: 2.0, 64: 2.0})
    first, second = summary(results, ["humming"])
    assert first.startswith("M =     1: 2.00 times cuBLAS (least 1.00), humming 2.00; the floor 3.")
    assert second.startswith("M =    64: 2.00 times cuBLAS (least 2.00)")


def test_a_line_has_a_column_for_each_title():
    text = line(result("o", 1, 10e-6), 6, ["humming"])
    assert text.split() == ["o", "8192", "8192", "1", "40.0", "10.0", "5.03", "13.4", "4.00", "2.00", "126%"]
    assert len(header(["humming"])) == len(text)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU and would run the race")
@pytest.mark.parametrize("more", [[], ["--dtype", "fp32"]])
def test_refuses_without_a_gpu_or_with_fp32(more: list[str], capsys: pytest.CaptureFixture[str]):
    assert main(["linear", "--device", "cuda", *more]) == 2
    assert "--device cuda: " in capsys.readouterr().err


def test_share_of_zeros(capsys: pytest.CaptureFixture[str]):
    for zeros in (0.0, 0.25, 1.0):
        x = activations(64, 1024, torch.float16, zeros, "cpu")
        assert x.shape == (64, 1024) and (x == 0).float().mean() == pytest.approx(zeros, abs=0.02)
    with pytest.raises(SystemExit):
        main(["linear", "--zeros", "2"])
    assert "must be a number from 0 to 1, got '2'" in capsys.readouterr().err
    assert main(["linear", "--zeros", "0.5"]) == 2
    assert "--zeros: for --device cuda" in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is not None, reason="matplotlib is installed")
def test_a_plot_without_matplotlib_says_what_to_install(tmp_path: Path):
    with pytest.raises(RuntimeError, match="pip install"):
        plot([result("o", 1, 10e-6)], [], "title", tmp_path / "plot.png")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_json_names_the_gpu_and_every_result():
    found = as_json([result("o", 1, 10e-6)], CEILINGS)
    assert found["device"] == torch.cuda.get_device_name()
    assert found["results"][0]["times_cublas"] == pytest.approx(4.0)

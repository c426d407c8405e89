"""What the energy benchmark makes of a GPU's counter; the counter itself needs a GPU."""

from __future__ import annotations

import pytest
import torch

from ds_fp6.bench import models
from ds_fp6.bench.__main__ import main
from ds_fp6.bench.energy import MEASURED, WARM_UP, Draw, header, line, measure, summary


class Gpu:
    """Draws 500 W, and 5 calls take 1 ms; its counter moves every 20 ms, its clock is held half of the time."""

    def __init__(self) -> None:
        self.time, self.turns = 0.0, 0

    def turn(self) -> int:
        self.time, self.turns = self.time + 1e-3, self.turns + 1
        return 5

    def now(self) -> float:
        return self.time

    def joules(self) -> float:
        return 500 * (int(self.time / 20e-3 + 1e-9) * 20e-3)

    def clock(self) -> float:
        return 1400 if self.turns % 2 else 1600

    def is_held(self) -> bool:
        return self.turns % 2 == 1


def test_energy_is_counted_from_tick_to_tick():
    gpu = Gpu()
    draw = measure(gpu.turn, gpu, gpu.now)
    assert draw.seconds == pytest.approx(0.2e-3) and draw.joules == pytest.approx(0.1)
    assert draw.watts == pytest.approx(500)
    assert draw.clock == pytest.approx(1500, abs=1) and draw.held == pytest.approx(0.5, abs=0.01)
    assert gpu.time >= WARM_UP + MEASURED


def test_a_line_has_a_column_for_each_title():
    draws = {"fp6": Draw(100e-6, 0.07, 1500, 1.0), "cublas": Draw(200e-6, 0.14, 1700, 0.25)}
    text = line(models.LinearShape("gate_up", 57344, 8192), 64, draws)
    assert text.split() == [
        "gate_up", "64", "100.0", "70.00", "700", "1500", "100%", "200.0", "140.00", "700", "1700", "25%", "2.00",
    ]  # fmt: skip
    assert len(header()) == len(text)


def test_the_mean_is_geometric():
    layers = [{"fp6": Draw(1, 1, 1500, 1), "cublas": Draw(1, joules, 1500, 1)} for joules in (2.0, 8.0)]
    assert summary({64: layers}) == ["M =    64: cuBLAS draws 4.00 times FP6's energy"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU and would measure it")
def test_refuses_without_a_gpu(capsys: pytest.CaptureFixture[str]):
    assert main(["energy"]) == 2
    assert "energy: torch sees no NVIDIA GPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    "option, text, message",
    [("--m", "0,4", "whole numbers of at least 1"), ("--m", "4,", "whole numbers of at least 1"), ("--zeros", "2", "a number from 0 to 1")],
)  # fmt: skip
def test_bad_arguments(option: str, text: str, message: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["energy", option, text])
    error = capsys.readouterr().err
    assert message in error and f"got '{text}'" in error

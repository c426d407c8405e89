"""The engine's settings: what they choose, and what is said about it."""

from __future__ import annotations

import pytest
import torch

from ds_fp6 import triton_ops
from ds_fp6.integrations.deepspeed import attention


def test_attention_follows_triton_and_the_variable(monkeypatch):
    monkeypatch.delenv(attention.VARIABLE, raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(triton_ops, "problem", lambda: None)
    assert attention.chosen(cpu=False) == ("triton", "default on a GPU")
    assert attention.chosen(cpu=True)[0] == "upstream"
    monkeypatch.setattr(triton_ops, "problem", lambda: "triton is not installed")
    assert attention.chosen(cpu=False) == ("upstream", "triton is not installed")
    monkeypatch.setenv(attention.VARIABLE, "triton")
    for cpu in (True, False):
        with pytest.raises(ValueError, match="DS_FP6_ATTENTION=triton cannot be had: "):
            attention.chosen(cpu)
    monkeypatch.setenv(attention.VARIABLE, "upstream")
    assert attention.chosen(cpu=False) == ("upstream", "DS_FP6_ATTENTION=upstream")
    monkeypatch.setenv(attention.VARIABLE, "flash")
    with pytest.raises(ValueError, match="must be triton or upstream, got 'flash'"):
        attention.chosen(cpu=False)


def test_environment_says_what_is_in_use_and_why(monkeypatch, capsys):
    from ds_fp6 import environment

    for variable in (attention.VARIABLE, "TRITON_INTERPRET", "DS_FP6_LOOKAHEAD"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    here = {"use": "the CPU's operators", "why": "the engine runs on a CPU"}
    off = {**here, "use": "off"}
    found = environment._engine()
    assert found == {"attention": here, "norms and gates": here, "cuda graphs": off, "lookahead": off}
    monkeypatch.setenv("DS_FP6_LOOKAHEAD", "1")
    assert environment._engine()["lookahead"] == {"use": "on", "why": "DS_FP6_LOOKAHEAD=1"}
    monkeypatch.delenv("DS_FP6_LOOKAHEAD")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(triton_ops, "problem", lambda: None)
    found = environment._engine()
    assert found["cuda graphs"] == found["lookahead"] == {"use": "on", "why": "default on a GPU"}
    monkeypatch.setenv(attention.VARIABLE, "flash")
    found = environment._engine()
    assert found["attention"]["use"] == "refused" and "got 'flash'" in found["attention"]["why"]


@pytest.mark.parametrize(("changes", "window"), [
    ({}, 48), ({"layer_types": ["sliding_attention"] * 2}, 48),
    ({"layer_types": ["sliding_attention", "full_attention"]}, None),
])  # fmt: skip
def test_a_window_is_applied_where_every_layer_has_it(changes, window, monkeypatch):
    from types import SimpleNamespace

    from deepspeed.utils import logger

    from ds_fp6.integrations.deepspeed import models, rotary

    said = []
    monkeypatch.setattr(logger, "warning", said.append)
    monkeypatch.setattr(rotary, "runs_triton", lambda model: True)
    monkeypatch.setattr(models, "on_cpu", lambda: False)
    config = SimpleNamespace(sliding_window=48, **changes)
    model = SimpleNamespace(config=config, attn=SimpleNamespace(window=None), max_sequence_length=1000)
    models._repair_window(model)
    assert model.attn.window == window
    assert [line for line in said if "some layers" in line and "last 48 positions" in line] == said
    assert bool(said) == (window is None)

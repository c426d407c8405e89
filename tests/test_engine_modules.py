"""The engine with Triton's kernels in it: the same logits as with the CPU's operators, and the settings."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import ahead
import models
import pytest
import torch
from interpreted_engine import STATE, logits, shipped_tokens
from triton_device import DEVICE

import ds_fp6.integrations.engine as fastgen
from ds_fp6.integrations.deepspeed import attention, pointwise, refusals, rotary

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="compares with the CPU's operators, in Triton's interpreter")

ROOT = Path(__file__).parent.parent
FAMILIES = ("llama_gqa", "llama_yarn", "mistral", "phi", "opt", "falcon")


def interpreted(folder: Path, *what: str) -> tuple[subprocess.CompletedProcess, Path] | None:
    """``interpreted_engine.py`` with Triton's kernels, and where it has written; nothing where the tests are skipped."""
    if DEVICE != "cpu":
        return None
    environment = {**ahead.ENVIRONMENT, attention.VARIABLE: "triton", pointwise.VARIABLE: "triton"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *sys.path])
    return ahead.run(sys.executable, ROOT / "tests" / "interpreted_engine.py", folder, *what, env=environment), folder


def families(folder: Path):
    return interpreted(folder, *FAMILIES)


def shipped(folder: Path):
    return interpreted(folder, "shipped")


def found_in(made: tuple[subprocess.CompletedProcess, Path], what: str):
    program, folder = made
    assert program.returncode == 0, program.stderr[-3000:]
    return torch.load(folder / f"{what}.pt")


@ahead.made_by(families)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_cpus_operators(family, made):
    found = found_in(made, family)
    for ours, theirs in zip(found, logits(made[1] / family), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


@ahead.made_by(shipped)
def test_the_shipped_models_text_is_the_same(made):
    """Its likeliest tokens lie apart by 0.14 at least here, some ten times what rounding moves logits."""
    assert torch.equal(found_in(made, "shipped"), shipped_tokens())


def test_the_module_is_ours_when_asked_for(tmp_path, monkeypatch):
    path = models.save(models.build("llama_gqa", torch.float16), tmp_path)
    for choice, expected in (("upstream", "DSDenseBlockedAttention"), ("triton", "TritonAttention")):
        monkeypatch.setenv(attention.VARIABLE, choice)
        engine = fastgen.build_engine(path, None, memory_config={"mode": "allocate", "size": 2}, **STATE)
        assert type(engine.model().attn).__name__ == expected


def test_what_a_batch_launches(tmp_path, monkeypatch):
    from ds_fp6.integrations.deepspeed import graphs
    from ds_fp6.triton_ops import decode, prefill, rotary

    launched = []
    for module, name in ((decode, "decode_attention"), (rotary, "rotate_and_store"), (prefill, "prefill_attention")):
        monkeypatch.setattr(module, name, lambda *arguments, name=name: launched.append((name, arguments[-1])))
    monkeypatch.setenv(attention.VARIABLE, "triton")
    path = models.save(models.build("llama_gqa", torch.float16), tmp_path)
    engine = fastgen.build_engine(path, None, memory_config={"mode": "allocate", "size": 8}, **STATE)
    layers, token, prompt = engine.model().num_layers, torch.arange(1), torch.arange(5)
    for batch, names in (
        ({0: prompt}, ["rotate_and_store", "prefill_attention"]),
        ({0: token}, ["decode_attention"]),
        ({0: token, 1: prompt}, ["decode_attention", "rotate_and_store", "prefill_attention"]),
    ):
        launched.clear()
        fastgen.step(engine, batch)
        assert [name for name, _ in launched] == names * layers
    launched.clear()
    graphs.warm_up(engine)
    # Prompts are taken for long ones too, for which another kernel is compiled.
    assert {last for name, last in launched if name == "prefill_attention"} == {False, True}
    assert not engine._state_manager.tracked_sequences
    # 2 tokens after 5, with a bound of 7.
    engine.model().attn.long_prompt = 7
    fastgen.step(engine, {0: prompt})
    launched.clear()
    fastgen.step(engine, {0: torch.arange(2), 1: token})
    assert ("prefill_attention", True) in launched


def test_norms_and_gates_are_ours_when_asked_for(tmp_path, monkeypatch):
    from ds_fp6.triton_ops import gate, norm

    path = models.save(models.build("llama_gqa", torch.float16), tmp_path)
    for choice in ("upstream", "triton"):
        monkeypatch.setenv(pointwise.VARIABLE, choice)
        model = fastgen.build_engine(path, None, memory_config={"mode": "allocate", "size": 2}, **STATE).model()
        kernels = (model.norm._fp_rms.inf_module.rms_norm, model.norm._fp_rms_pre.inf_module.rms_pre_norm,
                   model.unembed._norm.inf_module.rms_norm, model.mlp_1._act_fn.kernel)  # fmt: skip
        ours = (norm.rms_norm, norm.rms_pre_norm, norm.rms_norm, gate.gated_activation)
        assert [a is b for a, b in zip(kernels, ours)] == [choice == "triton"] * 4


def test_limits_that_triton_lifts(monkeypatch):
    from transformers import AutoConfig

    model_type, settings = models.FAMILIES["llama_rope3"]
    config = AutoConfig.for_model(model_type, **{**settings, "vocab_size": 256, "hidden_size": 192})
    monkeypatch.setenv(attention.VARIABLE, "upstream")
    with pytest.raises(ValueError, match="'llama3': DeepSpeed's kernels.*head size of 48"):
        refusals.check(config, cpu=False, ranks=1)
    monkeypatch.setenv(attention.VARIABLE, "triton")
    assert rotary.can_scale(cpu=False)
    refusals.check(config, cpu=False, ranks=1)
    config.head_dim = 40
    with pytest.raises(ValueError, match="head size of 40"):
        refusals.check(config, cpu=False, ranks=1)

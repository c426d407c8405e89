"""The command ``ds-fp6``: results on standard output, errors as one line and an exit status."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ds_fp6 import __version__, environment
from ds_fp6.cli import main
from ds_fp6.integrations import versions

MODEL = Path(__file__).parent.parent / "examples" / "tiny-python-llama"


@pytest.mark.parametrize("arguments", [["--help"], ["env", "--help"], ["generate", "--help"], ["bench", "--help"]])
def test_help(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith("usage: ds-fp6")


def test_version(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.split() == ["ds_fp6", __version__]


def test_help_is_quick_because_nothing_heavy_is_imported():
    code = "import sys\nfrom ds_fp6.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    out = subprocess.run([sys.executable, "-c", code + "print('torch' in sys.modules)"], capture_output=True, text=True)
    assert out.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize("arguments", [[], ["serve-me"], ["generate", "model"], ["bench", "nothing"], ["bench", "perplexity"], ["eval"]])
def test_wrong_usage(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage: ds-fp6" in capsys.readouterr().err


def test_python_m_bench_forwards_as_the_command_does(capsys):
    from ds_fp6.bench.__main__ import COMMANDS
    from ds_fp6.bench.__main__ import main as bench

    with pytest.raises(SystemExit):
        bench(["--help"])
    out = capsys.readouterr().out
    assert all(f"\n  {name} " in out for name in COMMANDS)


@pytest.mark.parametrize("command", ["bench linear", "bench loading", "bench generate", "eval perplexity"])
def test_each_benchmark_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*command.split(), "--help"])
    assert stop.value.code == 0
    assert f"usage: ds-fp6 {command} " in capsys.readouterr().out


def test_environment_as_json(capsys):
    assert main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ds_fp6"] == __version__
    assert found["hooks"] == {"deepspeed": "installed", "mii": "installed"}
    assert {v["problem"] for v in found["versions"].values()} == {None}
    assert found["versions"].keys() == {"torch", *versions.SUPPORTED}
    assert found["extensions"]["ds_fp6_cpu"]["state"] in ("built", "prebuilt")
    assert found["devices"]["cpu"]["kernels"] in found["devices"]["cpu"]["available"]
    assert all(problems["cpu"] is None for problems in found["modes"].values()), "every mode runs on a CPU"
    assert found["repairs"]


def test_environment_as_text(capsys):
    assert main(["env"]) == 0
    out = capsys.readouterr().out
    assert f"\n  cpu: runs {', '.join(environment.MODES)}\n" in out


def test_environment_lists_modes_one_by_one_where_they_differ():
    modes = {"wf6af16": {"cpu": None, "cuda": None}, "wf6a32": {"cpu": None, "cuda": "fp32 runs on a CPU only"}}
    assert environment._modes_as_text(modes) == [
        "  cpu: runs wf6af16, wf6a32",
        "  wf6af16  cuda: runs",
        "  wf6a32  cuda: no, fp32 runs on a CPU only",
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_environment_says_why_a_gpu_mode_does_not_run():
    problem = environment.mode_problem("wf6af16", "cuda")
    assert problem in ("torch sees no NVIDIA GPU", f"torch {torch.__version__} is built without CUDA")


def test_environment_notices_a_wrong_result(monkeypatch):
    linear = environment.PackedWeight.linear
    monkeypatch.setattr(environment.PackedWeight, "linear", lambda self, x: linear(self, x) * 1.01)
    assert environment.mode_problem("wf6af16", "cpu").startswith("wrong result: relative error")


def test_environment_names_an_unsupported_version(monkeypatch):
    newer = versions.Supported("transformers", "900", "901")
    monkeypatch.setitem(versions.SUPPORTED, "transformers", newer)
    problem = environment._versions()["transformers"]["problem"]
    assert "pip install 'transformers>=900,<901'" in problem


def test_generate(capsys):
    prompts = ["def main(", "import os\n"]
    assert main(["generate", str(MODEL), *prompts, "--max-new-tokens", "6", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [r["prompt"] for r in found["responses"]] == prompts
    assert all(0 < r["generated_tokens"] <= 6 for r in found["responses"])
    assert all(r["finish_reason"] in ("length", "stop") for r in found["responses"])
    assert found["tokens_per_second"] > 0

    assert main(["generate", str(MODEL), *prompts, "--max-new-tokens", "6"]) == 0
    out = capsys.readouterr().out
    for response in found["responses"]:
        assert response["prompt"] + response["generated_text"] in out


def test_sampling_is_repeatable_by_its_seed(capsys):
    def text(seed: int) -> str:
        sampling = ["--sample", "--temperature", "2.0", "--seed", str(seed), "--max-new-tokens", "16"]
        assert main(["generate", str(MODEL), "def main(", *sampling]) == 0
        return capsys.readouterr().out

    first = text(1)
    assert text(1) == first and text(2) != first


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--quantization-mode", "wf9af16"], "ValueError: quantization mode 'wf9af16'"),
        (["--temperature", "0.5"], "ValueError: --temperature need --sample"),
    ],
)
def test_errors_are_one_line(arguments, message, capsys):
    assert main(["generate", str(MODEL), "def main(", *arguments]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.splitlines()[-1].startswith(f"ds-fp6: {message}")


def test_a_missing_model_is_named(capsys, tmp_path):
    missing = str(tmp_path / "no-such-model")
    assert main(["generate", missing, "def main("]) == 1
    assert missing in capsys.readouterr().err.splitlines()[-1]

"""Dummy weights through MII: by keyword and by variable, with and without a tokenizer."""

from __future__ import annotations

import json
import os

import mii
import models
import pytest
from transformers import AutoConfig

from ds_fp6.integrations import load_format
from ds_fp6.integrations.engine import build_engine

GREEDY = {"max_new_tokens": 5, "do_sample": False, "ignore_eos": True}
SMALL_CACHE = {"state_manager": {"memory_config": {"mode": "allocate", "size": 8}}}


def config_only(directory, family: str = "llama") -> str:
    model_type, settings = models.FAMILIES[family]
    AutoConfig.for_model(model_type, **settings).save_pretrained(directory)
    return str(directory)


def test_a_config_is_enough_and_text_is_token_ids(tmp_path):
    path = config_only(tmp_path)
    pipe = mii.pipeline(path, quantization_mode="wf6a32", load_format="dummy", inference_engine_config=SMALL_CACHE)
    (response,) = pipe(["5 17 99"], **GREEDY)
    assert (response.prompt_length, response.generated_length) == (3, 5)
    assert all(0 <= int(token) < models.VOCABULARY for token in response.generated_text.split())
    with pytest.raises(ValueError, match="token ids below 258 in decimal, got 'hello'"):
        pipe(["5 hello"])
    pipe.destroy()
    assert load_format.current() == "auto"
    with pytest.raises(FileNotFoundError, match="model.safetensors"):
        mii.pipeline(path, quantization_mode="wf6a32")


def test_the_variable_does_the_same_and_a_tokenizer_is_used(tmp_path, monkeypatch):
    path = config_only(tmp_path)
    models.tokenizer().save_pretrained(path)
    monkeypatch.setenv(load_format.VARIABLE, "dummy")
    pipe = mii.pipeline(path, inference_engine_config=SMALL_CACHE)
    (response,) = pipe(["hello"], **GREEDY)
    assert response.prompt_length == 5
    pipe.destroy()


def test_weights_are_the_same_in_every_run(tmp_path):
    path = config_only(tmp_path, "opt")
    first, second = (build_engine(path, "wf6a32", "dummy", **SMALL_CACHE["state_manager"]) for _ in range(2))
    one, other = (engine.model()._transformer[0].mlp_1_w for engine in (first, second))
    assert one.numel() and bool((one == other).all())


def test_an_unknown_format_is_refused(tmp_path, monkeypatch):
    path = config_only(tmp_path)
    with pytest.raises(ValueError, match="load_format must be one of auto, dummy, got 'fast'"):
        mii.pipeline(path, load_format="fast")
    assert load_format.VARIABLE not in os.environ
    monkeypatch.setenv(load_format.VARIABLE, "fast")
    with pytest.raises(ValueError, match=f"{load_format.VARIABLE} must be one of"):
        mii.pipeline(path)


def test_a_list_of_end_tokens(tmp_path):
    from ds_fp6.integrations.mii.load_format import _token_ids_class

    path = config_only(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"eos_token_id": [7, 9]}))
    assert _token_ids_class()(AutoConfig.from_pretrained(path)).eos_token_id == 7

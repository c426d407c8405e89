"""Checkpoints: reading tensor by tensor, tied embeddings, serialization, and what is refused and how."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import models
import pytest
import torch
from safetensors.torch import load_file, save_file

from ds_fp6.integrations.engine import build_engine, generate, step

STATE = dict(max_context=256, max_ragged_batch_size=256, max_ragged_sequence_count=4)
KV_BLOCKS = {"mode": "allocate", "size": 8}
PROMPT = torch.arange(40)

FIRST_SHARD, INDEX = "model-00001-of-00003.safetensors", "model.safetensors.index.json"


def load(path: str | Path, mode: str | None = None):
    return build_engine(path, mode, memory_config=KV_BLOCKS, **STATE)


def parameters(engine) -> dict[str, torch.Tensor]:
    """Core and auxiliary tensors of an engine's parameters by name."""
    model = engine.model()
    containers = {f"layer {i}": layer for i, layer in enumerate(model._transformer)} | {"outer": model._non_transformer}
    tensors = {}
    for label, container in containers.items():
        for name in container.annotation_attrs:
            parameter = getattr(container, name)
            tensors[f"{label} {name}"] = parameter.as_subclass(torch.Tensor)
            tensors |= {f"{label} {name}.{key}": tensor for key, tensor in parameter.aux_attrs.items()}
    return tensors


def assert_same_parameters(got, expected) -> None:
    got, expected = parameters(got), parameters(expected)
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    """A llama checkpoint of one file."""
    path = tmp_path_factory.mktemp("llama")
    models.build("llama_gqa", torch.bfloat16).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def sharded(llama, tmp_path_factory) -> Path:
    """The same checkpoint in three files that cut through layers and parameters."""
    path = tmp_path_factory.mktemp("sharded")
    tensors = load_file(llama / "model.safetensors")
    shutil.copy(llama / "config.json", path)
    names = sorted(tensors)
    weight_map = {}
    for i in range(3):
        file = f"model-{i + 1:05d}-of-00003.safetensors"
        save_file({name: tensors[name] for name in names[i::3]}, path / file)
        weight_map |= dict.fromkeys(names[i::3], file)
    (path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return path


@pytest.fixture
def copy_of(tmp_path):
    def copy(source: Path) -> Path:
        return Path(shutil.copytree(source, tmp_path / "model"))

    return copy


def edit_tensors(path: Path, edit) -> None:
    tensors = load_file(path / "model.safetensors")
    edit(tensors)
    save_file(tensors, path / "model.safetensors")


def edit_config(path: Path, **changes) -> None:
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# Reading


def test_shards_that_cut_through_parameters(llama, sharded):
    assert_same_parameters(load(sharded), load(llama))


@pytest.mark.parametrize("shards", [1, 2])
def test_pytorch_files(llama, tmp_path, shards):
    tensors = load_file(llama / "model.safetensors")
    shutil.copy(llama / "config.json", tmp_path)
    if shards == 1:
        torch.save(tensors, tmp_path / "pytorch_model.bin")
    else:
        weight_map = {name: f"pytorch_model-{i % shards}.bin" for i, name in enumerate(tensors)}
        for file in set(weight_map.values()):
            torch.save({name: tensors[name] for name in tensors if weight_map[name] == file}, tmp_path / file)
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_same_parameters(load(tmp_path), load(llama))


def test_parameters_outlive_their_files(llama, copy_of):
    path = copy_of(llama)
    engine = load(path)
    with open(path / "model.safetensors", "r+b") as file:
        file.truncate(0)
    assert_same_parameters(engine, load(llama))


def test_old_rotary_tables_are_ignored(llama, copy_of):
    path = copy_of(llama)
    edit_tensors(path, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)}))
    assert_same_parameters(load(path), load(llama))


# Tied embeddings


@pytest.mark.parametrize("family", ["llama_gqa", "mistral", "opt", "falcon", "phi3", "qwen2", "mixtral"])
def test_tied_embeddings(family, tmp_path):
    model = models.build(family, tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    engine = load(tmp_path)
    outer = engine.model()._non_transformer
    head = outer.word_unembed if hasattr(outer, "word_unembed") else outer.word_unembed_w
    assert head.data_ptr() == outer.word_emb.data_ptr()
    expected = model.generate(PROMPT[None], max_new_tokens=4, do_sample=False)[:, len(PROMPT) :]
    assert torch.equal(generate(engine, [PROMPT], 4)[0], expected)


@pytest.mark.parametrize("same", [True, False])
def test_a_stored_head_is_shared_only_where_it_equals_the_embedding(same, tmp_path):
    model = models.build("llama_tied")
    model.save_pretrained(tmp_path)
    head = model.model.embed_tokens.weight.detach().clone() + (0 if same else 1)
    edit_tensors(tmp_path, lambda tensors: tensors.update({"lm_head.weight": head}))
    outer = load(tmp_path).model()._non_transformer
    assert (outer.word_unembed.data_ptr() == outer.word_emb.data_ptr()) == same
    assert torch.equal(outer.word_unembed, head)


def test_opt_with_a_head_of_its_own(tmp_path):
    model = models.build("opt", tie_word_embeddings=False)
    model.save_pretrained(tmp_path)
    assert torch.equal(load(tmp_path).model()._non_transformer.word_unembed, model.lm_head.weight)


# Serialization


@pytest.mark.parametrize("mode", [None, "wf6abf16", "wf5abf16g32"])
@pytest.mark.parametrize("family", ["llama_tied", "opt", "mixtral"])
def test_serialized_models_come_back(family, mode, tmp_path):
    models.build(family, torch.bfloat16).save_pretrained(tmp_path / "source")
    engine = load(tmp_path / "source", mode)
    engine.serialize(str(tmp_path / "serialized"))
    restored = load(tmp_path / "serialized", mode)
    assert_same_parameters(restored, engine)
    assert torch.equal(step(restored, {0: PROMPT}), step(engine, {0: PROMPT}))
    stored = (tmp_path / "serialized" / "params_rank_0_of_1.pt").stat().st_size
    distinct = {tensor.data_ptr(): tensor for tensor in parameters(engine).values()}.values()
    assert stored < sum(tensor.nbytes for tensor in distinct) + 256 * len(distinct) + 4096
    restored.serialize(str(tmp_path / "serialized"))
    assert_same_parameters(load(tmp_path / "serialized", mode), engine)


def test_serialized_models_are_checked(llama, tmp_path):
    load(llama).serialize(str(tmp_path))
    with pytest.raises(ValueError, match="serialized as .*bfloat16.*needs .*e3m2"):
        load(tmp_path, "wf6abf16")
    with pytest.raises(FileNotFoundError, match="tensor-parallel degree of 2: it lacks params_rank_0_of_2.pt"):
        build_engine(tmp_path, tensor_parallel=2)
    parameters_file = tmp_path / "params_rank_0_of_1.pt"
    parameters_file.write_bytes(parameters_file.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"params_rank_0_of_1.pt \(\d+ bytes\) is truncated or damaged"):
        load(tmp_path)


# What is refused


def test_missing_directory(tmp_path, monkeypatch):
    import transformers

    def hub(*args, **kwargs):
        raise AssertionError("looked for a local path on the hub")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", hub)
    (tmp_path / "existing").mkdir()
    with pytest.raises(FileNotFoundError, match="no model directory at .*exsting'; did you mean '.*existing'"):
        load(tmp_path / "exsting")
    for name in ("./nowhere", "~/nowhere", "../nowhere/", "a/b/c", "tests/nowhere", "/nowhere/at/all"):
        with pytest.raises(FileNotFoundError, match="no model directory"):
            load(name)
    with pytest.raises(ValueError, match="is a file; give the directory"):
        load(__file__)


def test_pipeline_of_a_missing_path():
    import mii

    with pytest.raises(FileNotFoundError, match="no model directory at './nowhere'"):
        mii.pipeline("./nowhere")


def test_missing_files(llama, sharded, tmp_path, copy_of):
    with pytest.raises(FileNotFoundError, match="holds no config.json; found nothing"):
        load(tmp_path)
    shutil.copy(llama / "config.json", tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no weights: expected one of .*; found config.json"):
        load(tmp_path)
    path = copy_of(sharded)
    (path / FIRST_SHARD).unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks 1 of the 3 files that {INDEX} lists: {FIRST_SHARD}"):
        load(path)


def test_damaged_files(llama, sharded, tmp_path, copy_of):
    path = copy_of(sharded)
    shard = path / FIRST_SHARD
    whole = shard.read_bytes()
    for content in (whole[:-100], whole[:40], b""):
        shard.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{FIRST_SHARD} \({len(content)} bytes\) is truncated or damaged"):
            load(path)
    shard.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    with pytest.raises(ValueError, match=f"{FIRST_SHARD} is a Git LFS pointer"):
        load(path)
    (path / INDEX).write_text("{}")
    with pytest.raises(ValueError, match=f"{INDEX} is not an index"):
        load(path)

    shutil.copy(llama / "config.json", tmp_path)
    file = tmp_path / "pytorch_model.bin"
    torch.save(load_file(llama / "model.safetensors"), file)
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"pytorch_model.bin \(\d+ bytes\) is truncated or damaged"):
        load(tmp_path)


def test_an_index_that_promises_too_much(sharded, copy_of):
    path = copy_of(sharded)
    index = json.loads((path / INDEX).read_text())
    index["weight_map"]["model.layers.9.input_layernorm.weight"] = FIRST_SHARD
    (path / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match="files lack: model.layers.9.input_layernorm.weight"):
        load(path)


def _drop_two(tensors):
    del tensors["model.layers.1.mlp.up_proj.weight"], tensors["lm_head.weight"]


def _add(tensors):
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(128, dtype=torch.bfloat16)


def _cut(tensors):
    tensors["model.layers.1.self_attn.k_proj.weight"] = tensors["model.layers.1.self_attn.k_proj.weight"][:-1]


def _integers(tensors):
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)


@pytest.mark.parametrize("mode", [None, "wf6abf16"])
@pytest.mark.parametrize(
    "edit, message",
    [
        (_drop_two, "lacks 2 tensors of the model: model.layers.1.mlp.up_proj.weight, lm_head.weight"),
        (_add, "1 tensors that this model cannot use: model.layers.0.self_attn.q_proj.bias"),
        (_cut, "model.layers.1.self_attn.k_proj.weight must be [64, 64] by the model's configuration, "
               "the checkpoint's is [63, 64]"),
        (_integers, "model.norm.weight is stored as I8; weights are read from float32, float16 or bfloat16"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit(llama, copy_of, edit, message, mode):
    path = copy_of(llama)
    edit_tensors(path, edit)
    with pytest.raises(ValueError, match=re.escape(message)):
        load(path, mode)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize(
    "name", ["self_attn.v_proj.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"]
)
def test_weights_that_are_not_finite(llama, copy_of, name, value):
    path = copy_of(llama)
    name = f"model.layers.1.{name}"
    edit_tensors(path, lambda tensors: tensors[name].__setitem__((3, 5), value))
    with pytest.raises(ValueError, match=re.escape(f"{name}[3, 5] is {value}")):
        load(path, "wf6abf16")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "t5"}, "model type 't5' is not supported by DeepSpeed-FastGen, which runs .*llama"),
        ({"model_type": None}, "model type None is not supported"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"already quantized \(gptq\)"),
    ],
)
def test_models_that_cannot_be_served(llama, copy_of, changes, message):
    path = copy_of(llama)
    edit_config(path, **changes)
    (path / "model.safetensors").unlink()  # refused before weights are looked for
    with pytest.raises(ValueError, match=message):
        load(path)


def test_an_engine_loads_after_a_failure(llama, copy_of):
    path = copy_of(llama)
    edit_tensors(path, _drop_two)
    with pytest.raises(ValueError, match="lacks 2 tensors"):
        load(path)
    assert_same_parameters(load(llama), load(llama))

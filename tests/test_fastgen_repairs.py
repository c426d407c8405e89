"""What the hooks repair in DeepSpeed and MII, and what they refuse."""

from __future__ import annotations

import gc
import weakref
from importlib import metadata
from types import SimpleNamespace

import models
import pytest
import torch

from ds_fp6.cpu import memory
from ds_fp6.cpu.blocks import BlockAllocator
from ds_fp6.integrations import deepspeed as deepspeed_hooks
from ds_fp6.integrations import mii as mii_hooks
from ds_fp6.integrations import versions


@pytest.fixture(scope="module", autouse=True)
def installed():
    import deepspeed  # noqa: F401
    import mii  # noqa: F401

    mii_hooks.install()


def config_of(family: str, **changes):
    from transformers import AutoConfig

    model_type, settings = models.FAMILIES[family]
    return AutoConfig.for_model(model_type, **{**settings, **changes})


def engine_config(**state):
    from deepspeed.inference.v2 import RaggedInferenceEngineConfig

    manager = {"max_ragged_batch_size": 96, "max_ragged_sequence_count": 2, "max_tracked_sequences": 4, **state}
    return RaggedInferenceEngineConfig(state_manager={"memory_config": {"mode": "allocate", "size": 4}, **manager})


def test_tables_name_each_repair_and_hook_once():
    for package in (deepspeed_hooks, mii_hooks):
        names = [repair.name for repair in package.REPAIRS]
        assert names and len(set(names)) == len(names)
        places = [hook.place for hook in package.hooks()]
        assert places and len(set(places)) == len(places)


def test_install_is_idempotent():
    from deepspeed.inference.v2.modules import heuristics
    from mii.batching.ragged_batching import RaggedBatchBase

    before = heuristics.instantiate_linear, RaggedBatchBase.__init__
    deepspeed_hooks.install()
    mii_hooks.install()
    assert (heuristics.instantiate_linear, RaggedBatchBase.__init__) == before
    assert not hasattr(heuristics.instantiate_linear.__wrapped__, "__wrapped__")


@pytest.mark.parametrize("distribution", versions.SUPPORTED)
@pytest.mark.parametrize("installed", ["0.0.1", "99.0"])
def test_other_versions_are_refused_by_name_and_number(monkeypatch, distribution, installed):
    monkeypatch.setattr(metadata, "version", lambda name: installed)
    with pytest.raises(versions.UnsupportedVersion, match=rf"{distribution} {installed} is installed.*pip install"):
        versions.check(distribution)


def test_missing_library_is_named(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    with pytest.raises(versions.UnsupportedVersion, match="needs deepspeed-mii, which is not installed"):
        versions.check("deepspeed-mii")


REFUSED = {
    "head ratio": ("llama", {"num_key_value_heads": 3}, "4 query heads"),
    "rope scaling": ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4}}, "dynamic"),
    "attention bias": ("llama", {"attention_bias": True}, "attention_bias"),
    "alibi": ("falcon", {"alibi": True}, "alibi"),
    "post-norm": ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before"),
    "opt's activation": ("opt", {"activation_function": "gelu"}, "gelu"),
    "expert widths": ("qwen2_moe", {"moe_intermediate_size": 32}, "moe_intermediate_size"),
    "dense layers": ("qwen2_moe", {"mlp_only_layers": [0]}, "layers without experts"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_config_that_the_engine_would_get_wrong(case, tmp_path):
    """Nothing but a config is there, so this comes before anything else is read."""
    from deepspeed.inference.v2 import build_hf_engine

    family, changes, message = REFUSED[case]
    config_of(family, **changes).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        build_hf_engine(str(tmp_path), engine_config())


def test_gpu_limits_are_named(monkeypatch):
    from ds_fp6.integrations.deepspeed import refusals

    # Triton's attention, where it is installed, has fewer.
    monkeypatch.setenv("DS_FP6_ATTENTION", "upstream")
    with pytest.raises(ValueError, match="'llama3': DeepSpeed's kernels"):
        refusals.check(config_of("llama_rope3"), cpu=False, ranks=1)
    for family in ("llama", "opt"):
        refusals.check(config_of(family), cpu=True, ranks=1)
        with pytest.raises(ValueError, match=f"head size of 16.*vocabulary of {models.VOCABULARY}"):
            refusals.check(config_of(family), cpu=False, ranks=1)
    with pytest.raises(ValueError, match="cannot be split over 4 ranks"):
        refusals.check(config_of("llama"), cpu=True, ranks=4)


def test_mode_problems():
    from ds_fp6.formats import Mode
    from ds_fp6.integrations.deepspeed.quantization import mode_problem

    assert mode_problem(Mode.parse("wf6a32"), "cpu") is None
    assert "CPU only" in mode_problem(Mode.parse("wf6a32"), "cuda", (9, 0))
    assert "7.5" in mode_problem(Mode.parse("wf6af16"), "cuda", (7, 5))
    assert "xpu" in mode_problem(Mode.parse("wf6af16"), "xpu")
    assert mode_problem(Mode.parse("wf6af16"), "cuda", (9, 0)) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_activation_dtype_is_the_checkpoints_unless_the_mode_names_one(family, dtype):
    from ds_fp6.integrations.deepspeed.models import activation_dtype

    config = config_of(family, dtype=dtype)
    assert activation_dtype(config, None) == dtype
    assert activation_dtype(config, "wf6abf16") == torch.bfloat16
    assert activation_dtype(config, "wf6a32") == torch.float32
    if dtype != torch.float32:
        assert activation_dtype(config, "wf6a16") == dtype


@pytest.mark.parametrize(("family", "changes", "theta", "rotated"), [
    ("llama_gqa", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, 5e5, 32),
    ("phi", {}, 1e4, 8),
    ("falcon", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, 1e6, 16),
])  # fmt: skip
def test_rotary_settings_are_read(family, changes, theta, rotated, tmp_path):
    from deepspeed.inference.v2 import build_hf_engine

    engine = build_hf_engine(models.save(models.build(family, **changes), tmp_path), engine_config())
    rotary = engine.model().positional_embedding_config
    assert (rotary.theta_base, rotary.rotate_dim) == (theta, rotated)


def test_norm_epsilons_are_the_checkpoints(tmp_path):
    from deepspeed.inference.v2 import build_hf_engine

    engine = build_hf_engine(models.save(models.build("llama", rms_norm_eps=0.25), tmp_path), engine_config())
    model = engine.model()
    assert {model.norm._fp_rms.epsilon, model.norm._fp_rms_pre.epsilon, model.unembed._norm.epsilon} == {0.25}


def test_put_checks_its_batch(tmp_path):
    from deepspeed.inference.v2 import build_hf_engine
    from deepspeed.inference.v2.scheduling_utils import SchedulingError, SchedulingResult

    engine = build_hf_engine(models.save(models.build("llama"), tmp_path), engine_config())
    prompt = torch.arange(40)
    assert engine.put([0, 1], [prompt, prompt]).shape[0] == 2
    for uids, lengths, expected in (
        ([2, 3, 4], [1, 1, 1], SchedulingResult.BatchSequenceLimitExceeded),
        ([2, 3], [50, 50], SchedulingResult.BatchTokenLimitExceeded),
        ([2, 3], [200, 100], SchedulingResult.KVCacheLimitExceeded),
        ([0, 2], [88, 8], SchedulingResult.Success),
    ):
        assert engine.can_schedule(uids, lengths) == expected
    with pytest.raises(SchedulingError):
        engine.put([2, 3], [torch.arange(50), torch.arange(50)])


def test_attention_has_room_for_every_atom(tmp_path):
    from deepspeed.inference.v2 import build_hf_engine

    engine = build_hf_engine(models.save(models.build("llama"), tmp_path), engine_config())
    attention = engine.model().attn
    limits = engine.model().engine_config.state_manager
    worst = limits.max_ragged_sequence_count + -(-limits.max_ragged_batch_size // attention.q_block_size)
    assert len(attention._atoms) == len(attention._atoms_shadow) == worst


def test_experts_stay_dense_and_it_is_said_once(tmp_path, monkeypatch):
    from deepspeed.inference.v2 import build_hf_engine
    from deepspeed.utils import logger

    from ds_fp6.integrations.deepspeed import quantization

    said = []
    monkeypatch.setattr(logger, "warning", said.append)
    quantization._say_experts_stay.cache_clear()
    path = models.save(models.build("mixtral"), tmp_path)
    config = engine_config()
    config.quantization.quantization_mode = "wf6a32"
    for _ in range(2):
        layer = build_hf_engine(path, config).model()._transformer[0]
        assert layer.qkv_w.dtype == torch.uint8 and layer.moe_mlp_1.dtype == torch.float32
    assert len([line for line in said if "wf6a32 leaves the experts" in line]) == 1


def test_buffers_go_with_their_engine(tmp_path):
    from deepspeed.inference.v2 import build_hf_engine

    engine = build_hf_engine(models.save(models.build("llama"), tmp_path), engine_config())
    engine.put([0], [torch.arange(8)])
    buffers = [weakref.ref(engine.model().attn._output), weakref.ref(engine.model().unembed._output)]
    del engine
    gc.collect()
    assert [buffer() for buffer in buffers] == [None, None]


def test_empty_from_views_the_start_of_a_buffer():
    from deepspeed.inference.v2.allocator import empty_from
    from deepspeed.inference.v2.modules.implementations.linear import blas_fp_linear

    assert blas_fp_linear.empty_from is empty_from
    buffer = torch.arange(24).view(6, 4)
    view = empty_from(buffer, (3, 4))
    assert view.data_ptr() == buffer.data_ptr() and torch.equal(view, buffer[:3])
    assert torch.equal(empty_from(buffer, (2, 3, 2)), torch.arange(12).view(2, 3, 2))
    with pytest.raises(ValueError, match=r"\[0, 4\]"):
        empty_from(buffer, (0, 4))
    with pytest.raises(ValueError, match="no room"):
        empty_from(buffer, (7, 4))


@pytest.mark.parametrize(("text", "expected"), [
    (None, 250), ("0.5", 500), ("100", 100), ("2K", 2048), ("1.5kB", 1536), ("3GiB", 3 * 2**30), ("1", 1000),
])  # fmt: skip
def test_kv_budget(monkeypatch, text, expected):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.delenv("LOCAL_SIZE", raising=False)
    if text is None:
        monkeypatch.delenv(memory.VARIABLE, raising=False)
    else:
        monkeypatch.setenv(memory.VARIABLE, text)
    assert memory.kv_budget(1000) == expected


@pytest.mark.parametrize("text", ["lots", "-1", "4X", "1e9"])
def test_kv_budget_that_is_no_size(monkeypatch, text):
    monkeypatch.setenv(memory.VARIABLE, text)
    with pytest.raises(ValueError, match=memory.VARIABLE):
        memory.kv_budget(1000)


def test_kv_cache_keeps_to_its_budget(monkeypatch, tmp_path):
    from deepspeed.inference.v2 import build_hf_engine

    path = models.save(models.build("llama"), tmp_path)
    reserve = engine_config(memory_config={"mode": "reserve", "size": 1000})
    block_bytes = 2 * 128 * 2 * 4 * 16 * 4
    monkeypatch.setenv(memory.VARIABLE, str(10 * block_bytes + 1))
    assert build_hf_engine(path, reserve).free_blocks == [10]
    monkeypatch.setenv(memory.VARIABLE, str(block_bytes - 1))
    with pytest.raises(ValueError, match=f"{block_bytes - 1} bytes, less than one block of {block_bytes}"):
        build_hf_engine(path, reserve)


def test_block_allocator():
    allocator = BlockAllocator(4)
    first = allocator.allocate(3)
    assert first.dtype == torch.int32 and first.tolist() == [0, 1, 2] and allocator.free_blocks == 1
    with pytest.raises(ValueError, match="2 blocks requested, 1 are free"):
        allocator.allocate(2)
    for wrong in ([0, 0], [3], [7], -1):
        with pytest.raises(ValueError):
            allocator.free(wrong)
    allocator.free(first[1:])
    assert allocator.free_blocks == 3 and allocator.allocate(2).tolist() == [1, 2]
    with pytest.raises(ValueError):
        BlockAllocator(0)


@pytest.mark.parametrize("text", ["plain", "héllo ☃ 🙂!", b"caf\xe9 \xff\xfe\xfd\xfc\xfb end", b"cut \xf0\x9f"])
def test_stream_gives_out_every_byte(text):
    """Byte tokens, some of them never a character: MII's own stream gave nothing out from the first of these on."""
    from ds_fp6.integrations.mii.stream import TextStream

    raw = text if isinstance(text, bytes) else text.encode()
    stream = TextStream(lambda tokens: bytes(tokens).decode(errors="replace"))
    pieces = [stream.add(token) for token in raw]
    assert "".join(pieces) + stream.finish() == raw.decode(errors="replace")
    if isinstance(text, str):
        assert "\ufffd" not in "".join(pieces)


def test_requests_of_one_batch_may_have_different_parameters():
    """Each gets what it would get alone, whichever others there are."""
    from mii.batching import postprocess
    from mii.batching.generation.logit_processors import TemperatureLogitProcessor, TopKLogitProcessor
    from mii.batching.generation.stop_criterion import TokenStopCriterion

    processors = {
        "TopK_3": TopKLogitProcessor(3), "TopK_5": TopKLogitProcessor(5), "Temp_0.5": TemperatureLogitProcessor(0.5),
        **{f"Stop_{token}": TokenStopCriterion(token, None) for token in (1, 2, 3)},
    }  # fmt: skip
    names = [["TopK_3"], [], ["TopK_5", "Temp_0.5", "Stop_1", "Stop_2"], ["Temp_0.5", "Stop_3"], ["Stop_3"]]
    requests = [SimpleNamespace(post_processing=own) for own in names]
    logits = torch.randn(5, 20, generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor([1, 2, 2, 2, 3])
    together = postprocess.run_batch_logit_processing(logits.clone(), requests, processors)
    stopped = postprocess.run_batch_stop_criterion(tokens, requests, processors)
    for row, request in enumerate(requests):
        alone = postprocess.run_batch_logit_processing(logits[row : row + 1].clone(), [request], processors)
        assert torch.equal(together[row], alone[0])
    assert together.isfinite().sum(dim=1).tolist() == [3, 20, 5, 20, 20]
    assert stopped.tolist() == [False, False, True, False, True]

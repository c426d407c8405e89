from __future__ import annotations

import pytest

from ds_fp6.integrations import deepspeed as hooks
from ds_fp6.integrations.deepspeed.architectures import VARIABLE, portable


@pytest.mark.parametrize(
    "listed, expected",
    [("9.0a", "9.0"), ("8.0;9.0a+PTX", "8.0;9.0+PTX"), ("8.6 10.0f 12.0a", "8.6 10.0 12.0"), ("8.0+PTX", "8.0+PTX")],
)
def test_portable_drops_only_the_feature_letter(listed, expected):
    assert portable(listed) == expected


def test_deepspeeds_own_builder_survives_9_0a(monkeypatch):
    hooks.install()
    from deepspeed.ops.op_builder.inference_core_ops import InferenceCoreBuilder

    monkeypatch.setenv(VARIABLE, "8.0;9.0a")
    assert InferenceCoreBuilder().compute_capability_args() == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=sm_90",
    ]
    jit = InferenceCoreBuilder()
    jit.jit_mode, jit._jit_arch_list = True, "9.0a"
    assert jit.compute_capability_args() == []

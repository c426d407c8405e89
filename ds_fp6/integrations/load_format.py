"""Where weights come from: ``auto`` reads a checkpoint, ``dummy`` makes random ones from its config.json.

``DS_FP6_LOAD_FORMAT`` says which, so that a server's processes know what the one that started them was told.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from ds_fp6.integrations.patching import Hook, wrap

VARIABLE = "DS_FP6_LOAD_FORMAT"
LOAD_FORMATS = ("auto", "dummy")


def current() -> str:
    """The load format in force. Raises ``ValueError`` for one that does not exist."""
    return _checked(os.environ.get(VARIABLE) or "auto", VARIABLE)


def _checked(name: str, source: str) -> str:
    if name not in LOAD_FORMATS:
        raise ValueError(f"{source} must be one of {', '.join(LOAD_FORMATS)}, got {name!r}")
    return name


@contextlib.contextmanager
def selected(name: str | None) -> Iterator[None]:
    """Puts a load format in force, also for child processes; None leaves it as it is.

    Raises ``ValueError`` for one that does not exist.
    """
    if name is None:
        yield
        return
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = _checked(name, "load_format")
    try:
        yield
    finally:
        del os.environ[VARIABLE]
        if before is not None:
            os.environ[VARIABLE] = before


def _build_hf_engine(original, *args, **kwargs):
    if current() != "dummy":
        return original(*args, **kwargs)
    from deepspeed.inference.v2 import engine_factory

    from ds_fp6.integrations.dummy import DummyCheckpointEngine

    usual = engine_factory.HuggingFaceCheckpointEngine
    engine_factory.HuggingFaceCheckpointEngine = DummyCheckpointEngine
    try:
        return original(*args, **kwargs)
    finally:
        engine_factory.HuggingFaceCheckpointEngine = usual


def _wrap_engine_factory() -> None:
    from deepspeed.inference.v2 import engine_factory

    wrap(engine_factory, "build_hf_engine", _build_hf_engine)


HOOKS = (Hook("build_hf_engine, its checkpoint engine", "the load format chooses it", _wrap_engine_factory),)

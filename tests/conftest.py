"""What every test gets: as many threads as it may use, no network, caches of its own, and what runs ahead."""

from __future__ import annotations

import os
import sys
import tempfile

import pytest

# Before torch and transformers read them.
os.environ.setdefault("OMP_NUM_THREADS", str(min(4, len(os.sched_getaffinity(0)))))
os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"
_hugging_face = tempfile.TemporaryDirectory(prefix="ds_fp6_tests_")
os.environ["HF_HOME"] = _hugging_face.name
# Where Python is told to keep no bytecode, as in many containers, each of the many processes that tests start would
# compile thousands of modules for seconds. It is kept until the end of the tests, and away from their sources.
_bytecode = tempfile.TemporaryDirectory(prefix="ds_fp6_tests_", ignore_cleanup_errors=True)
if os.environ.pop("PYTHONDONTWRITEBYTECODE", None):
    os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix = _bytecode.name
    sys.dont_write_bytecode = False

import ahead  # noqa: E402  (it keeps the environment)


def _local(host: object) -> bool:
    return not isinstance(host, str) or host in ("", "localhost", "0.0.0.0", "::", "::1") or host.startswith("127.")


def _refuse_network(event: str, arguments: tuple) -> None:
    """Clients and servers of this machine may talk to each other; nothing else may be reached."""
    if event == "socket.connect" and isinstance(arguments[1], tuple) and not _local(arguments[1][0]):
        raise ConnectionRefusedError(f"a test tried to connect to {arguments[1]}")


sys.addaudithook(_refuse_network)


@pytest.fixture(autouse=True)
def _environment_is_left_alone():
    """What a test leaves in the environment reaches every process that a later one starts."""
    before = dict(os.environ)
    yield
    changed = {name for name in before.keys() | os.environ.keys() if before.get(name) != os.environ.get(name)}
    changed -= {"PYTEST_CURRENT_TEST", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"}  # pytest's and torch's own
    # Set by the first import of deepspeed, and by torch's first use of a GPU.
    changed -= {"PYTORCH_NVML_BASED_CUDA_CHECK", "CUDA_MODULE_LOADING"}
    # Set by the first import of scikit-learn, which some versions of transformers import when they are imported.
    changed -= {"KMP_DUPLICATE_LIB_OK", "KMP_INIT_AT_FORK"}
    for name in changed:
        os.environ.pop(name, None) if name not in before else os.environ.__setitem__(name, before[name])
    assert not changed, f"the test changed these environment variables: {sorted(changed)}"


@pytest.fixture(scope="session", autouse=True)
def _ahead(request, tmp_path_factory):
    work = ahead.Ahead(request.session.items, tmp_path_factory.mktemp)
    yield work
    work.end()


@pytest.fixture
def made(request, _ahead):
    """What the function returned that the test is marked with: see ``ahead``."""
    return _ahead.result(request.node)

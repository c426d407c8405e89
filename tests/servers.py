"""Servers of ``ds-fp6 serve`` in processes of their own, as tests and their clients see them."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from openai import AsyncOpenAI, OpenAI

MODEL = Path(__file__).parent.parent / "examples" / "tiny-python-llama"

#: Seconds after which a server or a state of it counts as stuck.
PATIENCE = 60


class RunningServer:
    """``ds-fp6 serve MODEL --served-model-name tiny`` on a free port. ``lines`` is what it has printed."""

    def __init__(self, *flags: str, model: Path = MODEL, **environment: str) -> None:
        command = [sys.executable, "-m", "ds_fp6.cli", "serve", str(model), "--port", "0"]
        if "--served-model-name" not in flags:
            command += ["--served-model-name", "tiny"]
        self.process = subprocess.Popen(
            [*command, *flags], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**os.environ, **environment},
        )  # fmt: skip
        self.lines: list[str] = []
        self._address = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        assert self._address.wait(2 * PATIENCE) and self.root, self.output

    def _read(self) -> None:
        self.root = ""
        for line in self.process.stdout:
            self.lines.append(line)
            match = re.search(r"on (http://\S+)/v1", line)
            if match:
                self.root = match[1]
                self._address.set()
        self._address.set()

    @property
    def output(self) -> str:
        return "".join(self.lines)

    @property
    def port(self) -> int:
        return int(self.root.rpartition(":")[2])

    def client(self, key: str = "none") -> OpenAI:
        return OpenAI(base_url=f"{self.root}/v1", api_key=key, max_retries=0, timeout=PATIENCE)

    def async_client(self, key: str = "none") -> AsyncOpenAI:
        return AsyncOpenAI(base_url=f"{self.root}/v1", api_key=key, max_retries=0, timeout=PATIENCE)

    def metrics(self) -> dict[str, float]:
        """Every sample of ``/metrics``, without the prefix that all of them have."""
        with urllib.request.urlopen(f"{self.root}/metrics", timeout=PATIENCE) as answer:
            lines = answer.read().decode().splitlines()
        pairs = (line.rpartition(" ")[::2] for line in lines if line and not line.startswith("#"))
        return {name.removeprefix("ds_fp6_"): float(value) for name, value in pairs}

    def wait_until(self, condition, what: str) -> dict[str, float]:
        """Waits for metrics of which ``condition`` is true, and returns them."""
        deadline = time.monotonic() + PATIENCE
        while not condition(metrics := self.metrics()):
            assert time.monotonic() < deadline, f"{what}: {metrics}\n{self.output}"
            time.sleep(0.05)
        return metrics

    def wait_until_idle(self) -> dict[str, float]:
        """Waits until nothing runs or waits and every KV block is free."""
        return self.wait_until(
            lambda m: m["requests_running"] == m["sequences_running"] == m["sequences_waiting"] == 0
            and m["kv_blocks_free"] == m["kv_blocks"],
            "the server does not become idle",
        )

    def end(self, patience: float = PATIENCE) -> int:
        """The exit status, after all that the server printed has been read."""
        status = self.process.wait(patience)
        self._reader.join(PATIENCE)
        return status

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        self.process.wait()
        self._reader.join(PATIENCE)
        self.process.stdout.close()


@contextlib.contextmanager
def running_server(*flags: str, **options) -> Iterator[RunningServer]:
    server = RunningServer(*flags, **options)
    try:
        yield server
    finally:
        server.close()


def finished(metrics: dict[str, float], *reasons: str) -> int:
    """How many sequences have ended for any of ``reasons``."""
    return int(sum(metrics[f'sequences_finished_total{{reason="{reason}"}}'] for reason in reasons))

"""Work that a test waits for, begun before the test's turn: compilers above all, each of which keeps one core busy.

Most tests leave a core idle. So from the first test on, threads call the functions that tests are marked with, in the
order of the tests, and the fixture ``made`` gives a test what its function returned:

    def compiled(folder: Path, architecture: str) -> subprocess.CompletedProcess: ...

    @ahead.made_by(compiled)
    @pytest.mark.parametrize("architecture", ["80", "90a"])
    def test_it_compiles(made, architecture): ...

A function gets a new folder and those of the test's parameters that it names. It is called once for all tests that give
it the same. The programs that it starts with ``run`` have the lowest priority, so that they take only what the tests,
some of which have to end within seconds, leave idle.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import subprocess
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

#: Seconds that a test waits for its function: a little less than pytest lets it.
PATIENCE = 280
#: What tests begin with, and not what the one that runs has made of it.
ENVIRONMENT = dict(os.environ)

_running: set[subprocess.Popen] = set()


def run(*command: object, env: dict[str, str] = ENVIRONMENT) -> subprocess.CompletedProcess:
    """Runs a program to its end, or to that of the tests."""
    words = [str(word) for word in command]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) as process:
        _running.add(process)
        try:
            out, err = process.communicate()
        finally:
            _running.discard(process)
    return subprocess.CompletedProcess(words, process.returncode, out, err)


def made_by(function: Callable) -> pytest.MarkDecorator:
    """The mark of a test whose ``made`` is what ``function`` returns."""
    return pytest.mark.ahead.with_args(function)


class Ahead:
    """The calls of the functions that ``items`` are marked with, by function and arguments."""

    def __init__(self, items: Iterable[pytest.Item], new_folder: Callable[[str], Path]) -> None:
        # Linux counts niceness by thread, and a process begins with that of the thread that starts it.
        self._threads = ThreadPoolExecutor(len(os.sched_getaffinity(0)), initializer=os.nice, initargs=(19,))
        self._futures: dict[tuple, Future] = {}
        for item in items:
            call = _call_of(item)
            if call and call not in self._futures:
                function, *arguments = call
                folder = new_folder(function.__name__)
                self._futures[call] = self._threads.submit(function, folder, *arguments)

    def result(self, item: pytest.Item) -> object:
        """What the function of ``item`` returned. It has been begun: all before it were of tests that are over."""
        return self._futures[_call_of(item)].result(PATIENCE)

    def end(self) -> None:
        """Ends what no test waits for any more, which is something only if tests were interrupted."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        while not all(future.done() for future in self._futures.values()):
            for process in list(_running):
                with contextlib.suppress(psutil.NoSuchProcess):
                    for child in psutil.Process(process.pid).children(recursive=True):
                        child.kill()
                process.kill()
            time.sleep(0.1)


def _call_of(item: pytest.Item) -> tuple | None:
    """The function that a test is marked with, and its arguments after the folder."""
    mark = item.get_closest_marker("ahead")
    if mark is None:
        return None
    (function,) = mark.args
    _, *names = inspect.signature(function).parameters
    return function, *(item.callspec.params[name] for name in names)

"""Where extensions that are compiled on first use are kept, and when they are out of date."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path


def cache_root() -> Path:
    """``TORCH_EXTENSIONS_DIR``, as for any extension of torch, else ``torch_extensions`` in the user's cache."""
    named = os.environ.get("TORCH_EXTENSIONS_DIR")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "torch_extensions")


def digest(files: list[Path]) -> str:
    """One hash of the names and contents of ``files``."""
    return hashlib.sha256(json.dumps(_digests(files), sort_keys=True).encode()).hexdigest()


def _digests(files: list[Path]) -> dict[str, str]:
    return {f"{path.parent.name}/{path.name}": hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


class BuildDirectory:
    """Object files, the library, and a stamp that holds the hashes of the files it was built from."""

    def __init__(self, path: Path, name: str) -> None:
        self.path = path
        self.library = path / f"{name}.so"
        self._stamp = path / "built.json"

    @contextlib.contextmanager
    def locked(self, waiting: str) -> Iterator[None]:
        """Holds the directory for this process; prints ``waiting`` where another holds it for long.

        The system drops the lock of a process that dies. Raises ``RuntimeError`` if nothing can be written there.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / "ds_fp6.lock").open("w")
        except OSError as error:
            raise RuntimeError(
                f"{self.library.stem}: cannot write to {self.path}: {error} (set TORCH_EXTENSIONS_DIR to a directory "
                "for compiled extensions, or build ahead of time with DS_BUILD_FP6=1)"
            ) from error
        with lock:
            if not self._lock_within(lock, seconds=1):
                print(waiting, file=sys.stderr, flush=True)
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    @staticmethod
    def _lock_within(lock, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                if time.monotonic() > deadline:
                    return False
                time.sleep(0.05)

    def is_current(self, files: list[Path]) -> bool:
        """Whether the library was built from ``files`` as they are now."""
        return self.library.is_file() and self._built_from() == _digests(files)

    def _built_from(self) -> dict[str, str] | None:
        try:
            return json.loads(self._stamp.read_text())
        except (OSError, ValueError):
            return None

    @contextlib.contextmanager
    def rebuilding(self, files: list[Path]) -> Iterator[None]:
        """Around a build: readies the directory for ninja, and stamps what it built if no exception left it."""
        before, now = self._built_from(), _digests(files)
        self._stamp.unlink(missing_ok=True)
        if before is None or self._has_old_edits(before, now, files):
            self._discard_objects()
        # NOTE: a build that was killed leaves torch's own lock behind, on which torch would wait for ever.
        (self.path / "lock").unlink(missing_ok=True)
        yield
        self._stamp.write_text(json.dumps(now))

    def _has_old_edits(self, before: dict[str, str], now: dict[str, str], files: list[Path]) -> bool:
        """Whether contents changed without a newer time, which is all that ninja looks at."""
        built = self.library.stat().st_mtime if self.library.is_file() else 0.0
        return any(
            before.get(key) != now[key] and path.stat().st_mtime <= built for key, path in zip(now, files, strict=True)
        )

    def _discard_objects(self) -> None:
        for path in self.path.iterdir():
            if path.suffix in (".o", ".so") or path.name in (".ninja_log", ".ninja_deps"):
                path.unlink()

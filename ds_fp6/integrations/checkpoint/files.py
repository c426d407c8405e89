"""Checkpoints on disk: which files hold the weights, and one tensor at a time out of them.

Nothing is copied: tensors are views of the mapped file (safetensors, and PyTorch's zip format), so that reading a
checkpoint of any size takes no memory of its own.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

#: Index and single file of each format, in the order of preference.
LAYOUTS = (
    ("model.safetensors.index.json", "model.safetensors"),
    ("pytorch_model.bin.index.json", "pytorch_model.bin"),
)

GIT_LFS_POINTER = b"version https://git-lfs"


class StoredTensor(NamedTuple):
    """What a checkpoint says of a tensor before it is read; ``dtype`` is the file's own name where torch has none."""

    shape: tuple[int, ...]
    dtype: torch.dtype | str
    read: Callable[[], torch.Tensor]


class Checkpoint:
    """The tensors of a directory in Hugging Face's layout, by name.

    Only headers are read here. Raises ``FileNotFoundError`` for a missing directory, weights file or shard, and
    ``ValueError`` for an index or file that is damaged, each naming the file.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.files, index = _weight_files(self.directory)
        self._tensors: dict[str, StoredTensor] = {}
        for file in self.files:
            stored = _open_safetensors(file) if file.suffix == ".safetensors" else _open_pytorch(file)
            # A tensor that two shards hold is the index's to decide.
            self._tensors.update((n, t) for n, t in stored if index.get(n, file.name) == file.name)
        absent = [f"{name} ({shard})" for name, shard in index.items() if name not in self._tensors]
        if absent:
            raise ValueError(f"{self.directory}: the index lists tensors that their files lack: {abbreviate(absent)}")

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __getitem__(self, name: str) -> StoredTensor:
        return self._tensors[name]

    def read(self, name: str) -> torch.Tensor:
        """The tensor ``name`` on the CPU, mapped from its file; pages are read when they are touched."""
        return self._tensors[name].read()


def abbreviate(names: Iterable[str], limit: int = 8) -> str:
    """``a, b, c and 12 more``."""
    names = list(names)
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")


def _weight_files(directory: Path) -> tuple[list[Path], dict[str, str]]:
    """The files that hold the weights, and the index's tensor → file name, empty where there is no index."""
    if not directory.is_dir():
        raise FileNotFoundError(f"no checkpoint directory at {directory}")
    for index_name, file_name in LAYOUTS:
        if (directory / index_name).is_file():
            index = _read_index(directory / index_name)
            shards = Counter(index.values())
            missing = sorted(shard for shard in shards if not (directory / shard).is_file())
            if missing:
                raise FileNotFoundError(
                    f"{directory} lacks {len(missing)} of the {len(shards)} files that {index_name} lists: "
                    f"{abbreviate(missing)}"
                )
            return [directory / shard for shard in sorted(shards)], index
        if (directory / file_name).is_file():
            return [directory / file_name], {}
    expected = ", ".join(name for layout in LAYOUTS for name in layout)
    found = abbreviate(sorted(path.name for path in directory.iterdir())) or "nothing"
    raise FileNotFoundError(f"{directory} holds no weights: expected one of {expected}; found {found}")


def _read_index(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_text())["weight_map"]
        return {str(name): str(shard) for name, shard in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not an index with a weight_map: {error!r}") from error


def _damaged(path: Path, error: Exception) -> ValueError:
    with path.open("rb") as file:
        if file.read(len(GIT_LFS_POINTER)) == GIT_LFS_POINTER:
            return ValueError(f"{path} is a Git LFS pointer in place of the weights; fetch them with `git lfs pull`")
    size = path.stat().st_size
    return ValueError(f"{path} ({size} bytes) is truncated or damaged: {error}")


def _open_safetensors(path: Path) -> list[tuple[str, StoredTensor]]:
    from safetensors import SafetensorError, safe_open

    def stored(name: str) -> StoredTensor:
        header = file.get_slice(name)
        dtype = header.get_dtype()
        shape = tuple(header.get_shape())
        return StoredTensor(shape, SAFETENSORS_DTYPES.get(dtype, dtype), lambda: file.get_tensor(name))

    try:
        file = safe_open(path, framework="pt")
        return [(name, stored(name)) for name in file.keys()]
    except SafetensorError as error:
        raise _damaged(path, error) from error


def _open_pytorch(path: Path) -> list[tuple[str, StoredTensor]]:
    # Loading builds no more than views of the mapped file; weights_only refuses everything but tensors.
    try:
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # RuntimeError, EOFError, UnpicklingError, zipfile's ...: as many as ways to break
        raise _damaged(path, error) from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds a {type(state).__name__}, not a dictionary of tensors")
    return [
        (name, StoredTensor(tuple(tensor.shape), tensor.dtype, lambda tensor=tensor: tensor))
        for name, tensor in state.items()
        if isinstance(tensor, torch.Tensor)
    ]

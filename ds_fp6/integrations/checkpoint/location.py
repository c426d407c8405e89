"""Which model is meant by a name or path, and whether it can be served, before any weights are read or fetched."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

from ds_fp6.integrations.deepspeed.refusals import FAMILIES


def check_location(name: str) -> None:
    """Raises ``FileNotFoundError`` for a local path without a model, ``ValueError`` for one that cannot be served.

    Anything that might name a repository on the hub passes.
    """
    path = Path(name)
    if path.is_dir():
        _check_config_file(path)
    elif path.exists():
        raise ValueError(f"{name} is a file; give the directory that holds config.json and the weights")
    elif _is_local(name):
        raise FileNotFoundError(f"no model directory at {name!r}{_suggestion(path)}")


def _is_local(name: str) -> bool:
    """Whether a name that does not exist can only have meant a path: hub names are ``name`` or ``owner/name``."""
    path = Path(name)
    return (
        path.is_absolute()
        or name.startswith((".", "~"))
        or name.endswith("/")
        or name.count("/") > 1
        or "\\" in name
        or ("/" in name and path.parent.is_dir())
    )


def _suggestion(path: Path) -> str:
    if not path.parent.is_dir():
        return f": {str(path.parent)!r} does not exist either"
    siblings = [sibling.name for sibling in path.parent.iterdir() if sibling.is_dir()]
    close = difflib.get_close_matches(path.name, siblings, n=1)
    return f"; did you mean {str(path.parent / close[0])!r}?" if close else ""


def _check_config_file(directory: Path) -> None:
    file = directory / "config.json"
    if not file.is_file():
        found = ", ".join(sorted(path.name for path in directory.iterdir())[:8]) or "nothing"
        raise FileNotFoundError(f"{directory} holds no config.json; found {found}")
    try:
        config = json.loads(file.read_text())
        check_family(config.get("model_type"), config.get("quantization_config"))
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise ValueError(f"{file} is not a model's configuration: {error}") from error


def check_family(model_type: str | None, quantization: Any = None) -> None:
    """Raises ``ValueError`` for a family that FastGen does not know or a checkpoint that is quantized already."""
    if model_type not in FAMILIES:
        raise ValueError(
            f"model type {model_type!r} is not supported by DeepSpeed-FastGen, which runs {', '.join(FAMILIES)}"
        )
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else type(quantization).__name__
        raise ValueError(
            f"the checkpoint is already quantized ({method}); weights are quantized from float32, float16 or bfloat16"
        )

"""The file in which MII writes a deployment's configuration down, as a Python module."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

from ds_fp6.integrations.patching import Hook, replace


def import_score_file(deployment_name: str, deployment_type) -> ModuleType:
    """Runs the file itself.

    MII imports it, by way of bytecode that Python takes for current when the file's size and second of writing are
    those it was made from: a server that was started again within a second got the arguments of the one before.
    """
    from mii.utils import generated_score_path

    path = Path(generated_score_path(deployment_name, deployment_type))
    score = ModuleType("score")
    score.__file__ = str(path)
    exec(compile(path.read_text(), path, "exec"), score.__dict__)
    return score


def _replace_import() -> None:
    from mii import utils

    replace(utils, "import_score_file", import_score_file)


HOOKS = (Hook("mii.utils.import_score_file", "a stale copy of a deployment's configuration", _replace_import),)

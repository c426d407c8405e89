"""Hooks DeepSpeed and MII once they have been imported.

torch calls ``activate`` at the end of ``import torch`` (entry-point group ``torch.backends``), and so does
``import ds_fp6``: whoever imports DeepSpeed or MII gets the hooks, in child processes too. Nothing heavy is
imported here, and nothing is raised: an import of torch must not fail on our account. DS_FP6_AUTOLOAD=0 turns it off.
"""

from __future__ import annotations

import importlib
import os
import sys
import threading
import warnings
from importlib.machinery import ModuleSpec
from types import ModuleType

#: Whose import is followed by ``install()`` of which module.
HOOKED = {"deepspeed": "ds_fp6.integrations.deepspeed", "mii": "ds_fp6.integrations.mii"}

_lock = threading.Lock()
_active = False
_installed: set[str] = set()
_failures: dict[str, Exception] = {}


def activate() -> None:
    """Sees to it that DeepSpeed and MII are hooked, now or when they are imported. Idempotent; never raises."""
    global _active
    with _lock:
        if _active or os.environ.get("DS_FP6_AUTOLOAD") == "0":
            return
        _active = True
    for name in HOOKED:
        try:
            _after_import(name)
        except Exception as error:
            _give_up(name, error)


def state() -> dict[str, str]:
    """What became of each hooked package: ``installed``, ``waiting`` for its import, ``off``, or why it failed."""
    waiting = "waiting" if _active else "off"
    return {
        name: str(_failures[name]) if name in _failures else "installed" if name in _installed else waiting
        for name in HOOKED
    }


def _after_import(name: str) -> None:
    module = sys.modules.get(name)
    spec = getattr(module, "__spec__", None)
    if module is None:
        import wrapt

        wrapt.register_post_import_hook(lambda _module: _install(name), name)
    elif getattr(spec, "_initializing", False):
        _ObservedSpec.observe(spec, module)
    else:
        _install(name)


def _install(name: str) -> None:
    try:
        importlib.import_module(HOOKED[name]).install()
        _installed.add(name)
    except Exception as error:
        _give_up(name, error)


def _give_up(name: str, error: Exception) -> None:
    _failures[name] = error
    warnings.warn(f"ds_fp6: {name} is not hooked: {error}", RuntimeWarning, stacklevel=2)


class _ObservedSpec(ModuleSpec):
    """The spec of a package whose import is under way, and has just imported torch, and thereby us.

    No import hook can follow such an import any more. But its last step is to set ``_initializing`` to False.
    """

    _module: ModuleType

    @classmethod
    def observe(cls, spec: ModuleSpec, module: ModuleType) -> None:
        spec._module = module
        spec.__class__ = cls

    def __setattr__(self, attribute: str, value: object) -> None:
        super().__setattr__(attribute, value)
        if attribute != "_initializing" or value:
            return
        module = self.__dict__.pop("_module")
        self.__class__ = ModuleSpec
        if sys.modules.get(self.name) is module:
            _install(self.name)
        else:
            # The import failed. There may be another.
            _after_import(self.name)

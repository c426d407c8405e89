"""The hooks are installed whichever of torch, DeepSpeed and MII is imported first, and never break an import."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import subprocess
import sys
import warnings

import pytest

from ds_fp6 import autoload

#: What a package looks like that imports torch, and thereby us, before it is complete itself.
PACKAGE = """
import {hooks} as hooks
from ds_fp6 import autoload
{on_import}
ready = True
"""
HOOKS = """
calls = []

def install():
    import {package}
    calls.append(getattr({package}, "ready", False))
    {body}
"""


@pytest.fixture
def hooked(tmp_path, monkeypatch):
    """A function that makes a package and its hooks, unlike any real ones, for ``autoload`` to hook."""
    made = []

    def make(on_import: str = "", body: str = "") -> tuple[str, str]:
        package, hooks = f"hooked_package_{len(made)}", f"package_hooks_{len(made)}"
        made.extend((package, hooks))
        (tmp_path / f"{package}.py").write_text(PACKAGE.format(hooks=hooks, on_import=on_import))
        (tmp_path / f"{hooks}.py").write_text(HOOKS.format(package=package, body=body))
        importlib.invalidate_caches()
        monkeypatch.setattr(autoload, "HOOKED", {package: hooks})
        monkeypatch.setattr(autoload, "_active", False)
        monkeypatch.setattr(autoload, "_installed", set())
        monkeypatch.setattr(autoload, "_failures", {})
        return package, hooks

    monkeypatch.delenv("DS_FP6_AUTOLOAD", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    yield make
    for name in made:
        sys.modules.pop(name, None)


def calls(hooks: str) -> list[bool]:
    return importlib.import_module(hooks).calls


def test_hooks_follow_an_import_that_comes_later(hooked):
    package, hooks = hooked()
    autoload.activate()
    assert autoload.state() == {package: "waiting"} and calls(hooks) == []
    importlib.import_module(package)
    assert autoload.state() == {package: "installed"} and calls(hooks) == [True]


def test_hooks_are_installed_at_once_after_the_import(hooked):
    package, hooks = hooked()
    importlib.import_module(package)
    autoload.activate()
    assert autoload.state() == {package: "installed"} and calls(hooks) == [True]


def test_hooks_wait_for_the_end_of_an_import_under_way(hooked):
    package, hooks = hooked(on_import="autoload.activate()")
    spec = importlib.import_module(package).__spec__
    assert calls(hooks) == [True], "installed once, when the package was complete"
    assert type(spec) is importlib.machinery.ModuleSpec


def test_an_import_that_fails_is_hooked_when_it_is_tried_again(hooked):
    package, hooks = hooked(on_import="autoload.activate()\nif not hooks.calls_allowed: raise OSError('disk')")
    importlib.import_module(hooks).calls_allowed = False
    with pytest.raises(OSError, match="disk"):
        importlib.import_module(package)
    assert autoload.state() == {package: "waiting"} and calls(hooks) == []
    importlib.import_module(hooks).calls_allowed = True
    importlib.import_module(package)
    assert autoload.state() == {package: "installed"} and calls(hooks) == [True]


def test_activation_is_idempotent(hooked):
    package, hooks = hooked()
    autoload.activate()
    importlib.import_module(package)
    autoload.activate()
    assert calls(hooks) == [True]


def test_a_failing_hook_warns_and_lets_the_import_be(hooked):
    package, hooks = hooked(body="raise RuntimeError('version 9 is not supported')")
    autoload.activate()
    with pytest.warns(RuntimeWarning, match="version 9 is not supported"):
        assert importlib.import_module(package).ready
    assert autoload.state() == {package: "version 9 is not supported"}


def test_it_can_be_turned_off(hooked, monkeypatch):
    package, hooks = hooked()
    monkeypatch.setenv("DS_FP6_AUTOLOAD", "0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        autoload.activate()
        importlib.import_module(package)
    assert autoload.state() == {package: "off"} and calls(hooks) == []


def test_torch_is_told_to_call_it():
    entries = importlib.metadata.entry_points(group="torch.backends", name="ds_fp6")
    assert [entry.load() for entry in entries] == [autoload.activate]


def loaded_after(code: str, **environment: str) -> dict:
    """Runs ``code`` in a fresh process; its modules, and what became of the hooks there."""
    code += "\nimport json, sys\nmodules = sorted(sys.modules)\nimport ds_fp6.autoload as a"
    code += "\nprint(json.dumps({'modules': modules, 'state': a.state()}))"
    environment = {k: v for k, v in os.environ.items() if k != "DS_FP6_AUTOLOAD"} | environment
    out = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return json.loads(out.stdout.splitlines()[-1])


def test_import_torch_costs_nothing_heavy():
    found = loaded_after("import torch")
    assert found["state"] == {"deepspeed": "waiting", "mii": "waiting"}
    ours = {name for name in found["modules"] if name.startswith("ds_fp6")}
    assert ours == {"ds_fp6", "ds_fp6.autoload"}
    assert not {"deepspeed", "mii", "transformers"} & set(found["modules"])


def test_import_mii_alone_gets_the_hooks():
    found = loaded_after("import mii\nassert 'ds_fp6' in __import__('sys').modules")
    assert found["state"] == {"deepspeed": "installed", "mii": "installed"}


def test_import_mii_without_autoload_stays_upstreams():
    found = loaded_after("import mii", DS_FP6_AUTOLOAD="0")
    assert found["state"] == {"deepspeed": "off", "mii": "off"}
    assert not [name for name in found["modules"] if name.startswith("ds_fp6.integrations")]

"""Imports and includes point downward only, lazy ones inside functions as well."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

#: Layers from the bottom up, by the first part of a module's name below ``ds_fp6``.
LAYERS = (
    ("formats", "autoload"),
    ("ops", "triton_ops"),
    ("quantize", "pack"),
    ("weight",),
    ("modules", "cpu"),
    ("integrations",),
    ("serving",),
    ("bench", "environment"),
    ("cli",),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
ENGINES = {"deepspeed", "mii", "transformers"}
MODULES = sorted(p for p in (ROOT / "ds_fp6").rglob("*.py") if "op_builder" not in p.relative_to(ROOT).parts)


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imported_modules(path: Path) -> set[str]:
    """Absolute names of all that ``path`` imports, anywhere in it; ``from a import b`` gives ``a.b``."""
    package = path.relative_to(ROOT).parent.parts
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join((*above, *([node.module] if node.module else [])))
            names |= {f"{base}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names |= {arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)}
    return names


def part(module: str) -> str | None:
    """``ds_fp6.integrations.mii.api`` → ``integrations``; None for what is not a module of ours."""
    names = module.split(".")
    return names[1] if names[0] == "ds_fp6" and len(names) > 1 and names[1] in (*RANK, "op_builder") else None


def test_every_module_has_a_layer():
    parts = {p.relative_to(ROOT / "ds_fp6").parts[0].removesuffix(".py") for p in MODULES} - {"__init__"}
    assert parts <= set(RANK)


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_imports_point_downward(path):
    own = path.relative_to(ROOT / "ds_fp6").parts[0].removesuffix(".py")
    rank = RANK.get(own, 0)
    imported = {name: part(name) for name in imported_modules(path)}
    upward = {
        name: to
        for name, to in imported.items()
        if to is not None and to != own and to != "autoload" and to != "op_builder" and RANK[to] >= rank
    }
    assert not upward, f"{relative(path)} is of layer {LAYERS[rank]}"
    if own != "ops":
        assert "op_builder" not in imported.values()


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_engines_are_imported_only_where_they_are_hooked(path):
    engines = {name for name in imported_modules(path) if name.split(".")[0] in ENGINES}
    if path.relative_to(ROOT / "ds_fp6").parts[0] not in ("integrations", "modules", "cpu", "serving"):
        assert not engines


def test_op_builder_imports_nothing_of_ours_and_no_engine():
    for path in (ROOT / "op_builder").glob("*.py"):
        top = {name.split(".")[0] for name in imported_modules(path)}
        assert not top & (ENGINES | {"ds_fp6"}), relative(path)


SOURCES = sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cuh", ".cpp", ".cu"))
TORCH_HEADER = re.compile(r"(torch|ATen|c10)/")
#: Bindings and launchers, and the header that they share.
TORCH_USERS = {p for p in SOURCES if p.name.endswith("bindings.cpp")} | {
    ROOT / "csrc" / name
    for name in ("cuda/linear.cpp", "cuda/quantize.cpp", "cuda/checks.h")
}


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), flags=re.M)


def included_sources(path: Path) -> list[Path]:
    """Those of ``path``'s includes that are ours."""
    candidates = [[path.parent / name, ROOT / "csrc" / name] for name in includes(path)]
    return [next(c.resolve() for c in pair if c.is_file()) for pair in candidates if any(c.is_file() for c in pair)]


def source_rank(path: Path) -> int:
    """common, then ptx and dequant, then other headers, then sources, then those with torch, then bindings."""
    if path.parent.name == "common":
        return 0
    if path in TORCH_USERS:
        return 5 if path.stem.endswith("bindings") else 4
    if path.suffix in (".h", ".cuh"):
        return 1 if re.match(r"ptx|dequant", path.stem) else 2
    return 3


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_includes_point_downward(path):
    for included in included_sources(path):
        assert included.suffix in (".h", ".cuh"), f"{relative(included)} is no header"
        assert source_rank(included) <= source_rank(path), f"{relative(path)} includes {relative(included)}"
        assert included.parent.name in (path.parent.name, "common"), f"{relative(path)} includes {relative(included)}"


@pytest.mark.parametrize("path", [p for p in SOURCES if p not in TORCH_USERS], ids=relative)
def test_kernels_need_no_torch(path):
    torch_headers = [name for name in includes(path) if TORCH_HEADER.match(name)]
    assert not torch_headers, "torch headers stop at bindings and launchers"


def test_extensions_have_no_pybind():
    for path in SOURCES:
        assert "torch/extension.h" not in includes(path), relative(path)

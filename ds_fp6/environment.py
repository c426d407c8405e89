"""``ds-fp6 env``: what this machine has, what is hooked, and which quantization modes it can run."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import subprocess
from importlib import metadata
from typing import Any

import torch

from ds_fp6 import __version__, autoload, ops
from ds_fp6.formats import DEFAULT_FORMATS, Mode
from ds_fp6.integrations import versions
from ds_fp6.weight import PackedWeight

#: One mode of every width, and for six bits every activation, another format, and groups.
MODES = (*(f"wf{bits}af16" for bits in DEFAULT_FORMATS), "wf6abf16", "wf6a16", "wf6a32", "wf6e2m3af16", "wf6af16g128")


def report() -> dict[str, Any]:
    """The whole report, of JSON types. Loads, and so may build, the extension of each kind of device that is there."""
    hooks = _hooks()
    devices = {"cpu": _cpu(), "cuda": _gpus()}
    modes = {mode: {kind: mode_problem(mode, kind) for kind in devices} for mode in MODES}
    return {
        "ds_fp6": __version__,
        "python": platform.python_version(),
        "versions": _versions(),
        "hooks": hooks,
        "repairs": _repairs(hooks),
        "compilers": {"c++": _first_line(os.environ.get("CXX", "c++")), "nvcc": _first_line(_nvcc(), last=True)},
        "engine": _engine(),
        "extensions": {ops.builder(key).NAME: ops.builder(key).status() for key in ("CPU", "CUDA")},
        "devices": devices,
        "modes": modes,
    }


def _versions() -> dict[str, dict[str, Any]]:
    found = {"torch": {"installed": torch.__version__, "supported": None, "problem": None}}
    for name, supported in versions.SUPPORTED.items():
        try:
            versions.check(name)
            problem = None
        except versions.UnsupportedVersion as error:
            problem = str(error)
        found[name] = {"installed": _installed(name), "supported": supported.requirement, "problem": problem}
    return found


def _installed(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _hooks() -> dict[str, str]:
    """What became of the hooks once the hooked packages have been imported."""
    autoload.activate()
    problems = {}
    for package in autoload.HOOKED:
        try:
            importlib.import_module(package)
        except Exception as error:
            problems[package] = f"{package} cannot be imported: {error}"
    return {**autoload.state(), **problems}


def _repairs(hooks: dict[str, str]) -> list[dict[str, str]]:
    active = [autoload.HOOKED[package] for package, state in hooks.items() if state == "installed"]
    repairs = [repair for module in active for repair in importlib.import_module(module).REPAIRS]
    return [{"name": repair.name, "repairs": repair.repairs} for repair in repairs]


def _engine() -> dict[str, dict[str, str]]:
    """What the engine would use on this machine, and why; a setting that is refused is its own explanation."""
    from ds_fp6.integrations.deepspeed import attention, graphs, pointwise
    from ds_fp6.integrations.mii import lookahead

    cpu = not torch.cuda.is_available()
    found = {}
    parts = {"attention": attention, "norms and gates": pointwise, "cuda graphs": graphs, "lookahead": lookahead}
    for name, part in parts.items():
        try:
            use, why = part.chosen(cpu)
            found[name] = {"use": {True: "on", False: "off"}.get(use, use), "why": why}
        except ValueError as error:
            found[name] = {"use": "refused", "why": str(error)}
        if cpu and found[name]["use"] == "upstream":
            found[name]["use"] = "the CPU's operators"
    return found


def _nvcc() -> str:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return os.path.join(home, "bin", "nvcc") if home else "nvcc"


def _first_line(compiler: str, last: bool = False) -> str | None:
    """The line of ``--version`` that holds the version, None where there is no such compiler."""
    if shutil.which(compiler.split()[0]) is None:
        return None
    text = subprocess.run([*compiler.split(), "--version"], capture_output=True, text=True, check=False).stdout
    lines = text.strip().splitlines() or [""]
    return lines[-1 if last else 0]


def _cpu() -> dict[str, Any]:
    about = {"name": _cpu_name(), "threads": torch.get_num_threads(), "kernels": None, "available": None}
    try:
        ops.load("CPU")
        about["kernels"], available = torch.ops.ds_fp6.cpu_isa().split(": ")
        about["available"] = available.split()
    except (RuntimeError, ValueError) as error:
        about["problem"] = str(error)
    return about


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as info:
            return next(line.split(":", 1)[1].strip() for line in info if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _gpus() -> list[dict[str, Any]]:
    gpus = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return [
        {"name": gpu.name, "capability": f"{gpu.major}.{gpu.minor}", "memory_bytes": gpu.total_memory} for gpu in gpus
    ]


def mode_problem(text: str, device: str) -> str | None:
    """Why this machine cannot run mode ``text`` on ``device`` ("cpu" or "cuda"); None if it has just done so."""
    if device == "cuda" and not torch.cuda.is_available():
        built = torch.version.cuda is not None
        return "torch sees no NVIDIA GPU" if built else f"torch {torch.__version__} is built without CUDA"
    mode = Mode.parse(text)
    try:
        from ds_fp6.integrations.deepspeed import quantization

        return quantization.mode_problem(mode, device) or _trial(mode, device)
    except Exception as error:
        return str(error)


def _trial(mode: Mode, device: str) -> str | None:
    """Runs a small layer in ``mode`` and compares it with the product of the dequantized weight."""
    dtype = getattr(torch, mode.activation or "float16")
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(48, 160, generator=generator).to(device)
    x = torch.randn(3, 160, generator=generator).to(device, dtype)
    weight = PackedWeight.from_dense(dense, mode, dtype=dtype)
    expected = x.double() @ weight.dequantize(torch.float32).double().T
    error = (weight.linear(x).double() - expected).abs().max().item() / expected.abs().max().item()
    tolerance = 4 * torch.finfo(dtype).eps
    return None if error <= tolerance else f"wrong result: relative error {error:.2g}, allowed {tolerance:.2g}"


def render(found: dict[str, Any]) -> str:
    """The report as text."""
    lines = [f"ds_fp6 {found['ds_fp6']}, Python {found['python']}"]
    for name, version in found["versions"].items():
        supported = f"  (supported: {version['supported']})" if version["supported"] else ""
        lines.append(f"  {name:14} {version['installed'] or 'not installed'}{supported}")
        lines += [f"    {version['problem']}"] * bool(version["problem"])
    cpu = found["devices"]["cpu"]
    kernels = f"{cpu['kernels']} kernels of {', '.join(cpu['available'])}" if cpu["kernels"] else cpu["problem"]
    lines += ["", "devices", f"  cpu: {cpu['name']}, {cpu['threads']} threads; {kernels}"]
    for i, gpu in enumerate(found["devices"]["cuda"]):
        memory = f"{gpu['memory_bytes'] / 2**30:.0f} GiB"
        lines.append(f"  cuda:{i}: {gpu['name']}, compute capability {gpu['capability']}, {memory}")
    lines += ["", "extensions"]
    for name, extension in found["extensions"].items():
        lines.append(f"  {name}: {extension['state']}" + (f" in {extension['path']}" if extension["path"] else ""))
        if extension["state"] == "not built":
            lines += [f"    cannot be built: {lacking}" for lacking in extension["missing"]]
    lines += [f"  {name}: {version or 'not found'}" for name, version in found["compilers"].items()]
    lines += ["", "engine", *(f"  {name}: {part['use']} ({part['why']})" for name, part in found["engine"].items())]
    lines += ["", "hooks", *(f"  {package}: {state}" for package, state in found["hooks"].items())]
    lines += ["", "repaired", *(f"  {repair['name']}: {repair['repairs']}" for repair in found["repairs"])]
    lines += ["", "quantization modes", *_modes_as_text(found["modes"])]
    return "\n".join(lines)


def _modes_as_text(modes: dict[str, dict[str, str | None]]) -> list[str]:
    """A line for each kind of device on which all modes fare alike; a line for each mode on the others."""
    lines, differing = [], []
    for kind in ("cpu", "cuda"):
        outcomes = {problems[kind] for problems in modes.values()}
        if len(outcomes) == 1:
            problem = outcomes.pop()
            lines.append(f"  {kind}: " + (f"runs {', '.join(modes)}" if problem is None else f"none, {problem}"))
        else:
            differing.append(kind)
    for mode, problems in modes.items():
        answers = (f"{kind}: {'runs' if problems[kind] is None else 'no, ' + problems[kind]}" for kind in differing)
        lines += [f"  {mode}  " + "; ".join(answers)] * bool(differing)
    return lines

"""The versions of other libraries that the hooks were written for. Imports nothing heavy: setup.py reads this too."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata


@dataclass(frozen=True)
class Supported:
    """Versions from ``minimum`` up to, but not including, ``below``."""

    distribution: str
    minimum: str
    below: str

    @property
    def requirement(self) -> str:
        return f"{self.distribution}>={self.minimum},<{self.below}"


SUPPORTED = {
    entry.distribution: entry
    for entry in (
        Supported("deepspeed", "0.19.8", "0.20"),
        Supported("deepspeed-mii", "0.3.3", "0.4"),
        Supported("transformers", "5.17", "6"),
    )
}


class UnsupportedVersion(RuntimeError):
    """A library that is hooked here has a version that the hooks were not written for."""


def check(*distributions: str) -> None:
    """Raises ``UnsupportedVersion`` that names what is installed and what to install instead."""
    from packaging.version import Version

    for name in distributions:
        entry = SUPPORTED[name]
        try:
            installed = metadata.version(name)
        except metadata.PackageNotFoundError:
            raise UnsupportedVersion(
                f"ds_fp6 needs {name}, which is not installed; install it: pip install '{entry.requirement}'"
            ) from None
        if not Version(entry.minimum) <= Version(installed) < Version(entry.below):
            raise UnsupportedVersion(
                f"ds_fp6 supports {entry.requirement}, but {name} {installed} is installed; "
                f"install a supported version: pip install '{entry.requirement}'"
            )

"""How other libraries are hooked: tables of what is replaced, and replacement that reaches every importer."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Hook:
    """A place in another library that is changed, and why."""

    place: str
    why: str
    apply: Callable[[], None]


@dataclass(frozen=True)
class Repair:
    """A defect of another library that its users would meet, and that a hook repairs."""

    name: str
    repairs: str


def replace(module: Any, name: str, new: Any) -> Any:
    """Sets ``module.name``, and every other module attribute of that name that holds the same object.

    Importers by ``from module import name`` hold the old object themselves. Returns the old object.
    """
    old = getattr(module, name)
    setattr(module, name, new)
    for other in list(sys.modules.values()):
        if getattr(other, "__dict__", {}).get(name) is old:
            setattr(other, name, new)
    return old


def wrap(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    """Replaces the method or function ``owner.name`` by one that calls ``wrapper(original, *args, **kwargs)``."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    if isinstance(owner, type):
        setattr(owner, name, wrapped)
    else:
        replace(owner, name, wrapped)


def subclasses(cls: type) -> list[type]:
    """``cls`` and all classes derived from it so far."""
    return [cls] + [deeper for sub in cls.__subclasses__() for deeper in subclasses(sub)]

"""Names that mean the same in every process: ``python app.py`` calls its own module ``__main__``, a worker calls it ``app``."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any


def _main_name() -> str | None:
    main = sys.modules.get("__main__")
    spec = getattr(main, "__spec__", None)
    path = getattr(main, "__file__", None)
    name: str | None = None
    if spec is not None and spec.name:
        name = str(spec.name).removesuffix(".__main__")
    elif path and path.endswith(".py"):
        folder, file = os.path.split(os.path.abspath(path))
        name = file[:-3]
        while os.path.exists(os.path.join(folder, "__init__.py")):  # a file inside a package
            folder, package = os.path.split(folder)
            name = f"{package}.{name}"
    return None if name is None or name.partition(".")[0] in ("dagorama", "pytest", "_pytest") else name


MAIN = _main_name()
"""What other processes call the module that is ``__main__`` here; ``None`` when it is not a user's module."""


def public_module(module: str) -> str:
    """The name of a module as every process knows it."""
    return MAIN if module == "__main__" and MAIN is not None else module


def load_module(module: str) -> Any:
    """Import a module by that name; the one that runs as ``__main__`` is not imported a second time."""
    return sys.modules["__main__"] if module == MAIN else importlib.import_module(module)


def load_global(module: str, qualname: str) -> Any:
    """A class or function by its public name. Pickles refer to what lives in ``__main__`` through this function."""
    found = load_module(module)
    for part in qualname.split("."):
        found = getattr(found, part)
    return found

"""Planted faults: a mistake in one function, and the test that must notice it."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Replace = Callable[[Any], Any]


class FunctionNotFound(Exception):
    """The function that a fault is planted in no longer exists."""


@dataclass(frozen=True)
class Fault:
    """One mistake.

    Attributes:
        target: The function, "package.module:function" or "package.module:Class.method".
        test: The test that must fail, "folder/file.py::test"; of a parametrised test one case is enough.
        replace: Takes the function and returns the one that makes the mistake. Its name is what a user would see.
    """

    target: str
    test: str
    replace: Replace

    @property
    def name(self) -> str:
        """What a user would see."""
        return self.replace.__name__.replace("_", " ")

    def original(self) -> tuple[Any, str, Any]:
        """The module or class that holds the function, the function's name in it, and the function.

        Raises:
            FunctionNotFound: The module, class or function is gone.
        """
        module_name, _, path = self.target.partition(":")
        *classes, function = path.split(".")
        try:
            owner: Any = importlib.import_module(module_name)
            for name in classes:
                owner = getattr(owner, name)
            return owner, function, vars(owner)[function]
        except (ImportError, AttributeError, KeyError):
            raise FunctionNotFound(
                f"the fault {self.name!r} is planted in {self.target}, which does not exist. If it was renamed, write "
                "its new name in tests/faults/faults.py; if the function is gone, delete the fault."
            ) from None


def plant(fault: Fault) -> None:
    """Put the mistake in place of the function, in every module of headscope that has imported it."""
    owner, name, original = fault.original()
    replacement = fault.replace(original)
    setattr(owner, name, replacement)
    if inspect.isclass(owner):
        return
    for module in [module for key, module in sys.modules.items() if key.split(".")[0] == "headscope"]:
        for imported_as in [key for key, value in vars(module).items() if value is original]:
            setattr(module, imported_as, replacement)

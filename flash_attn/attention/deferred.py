"""Imports that wait for another module's: what only its users need costs nobody else its time."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys


def import_after(other: str, ours: str) -> None:
    """Imports the module `ours` once `other` has been imported: now, when it has been already."""
    if other in sys.modules:
        importlib.import_module(ours)
    else:
        sys.meta_path.insert(0, _Finder(other, ours))


class _Finder(importlib.abc.MetaPathFinder):
    """Finds `other` once, as without it, and has its loader import `ours` at the end."""

    def __init__(self, other: str, ours: str):
        self.other, self.ours = other, ours

    def find_spec(self, fullname, path=None, target=None):
        if fullname != self.other:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module):
                execute(module)
                importlib.import_module(self.ours)

            spec.loader.exec_module = exec_module
        return spec

"""What every plug-in's contract starts from: a class of tests with one attribute to set, the
plug-in.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, ClassVar

from . import plugins


class Contract:
    """`plugin`: the name of a plug-in of `kind`, or the module itself."""

    plugin: ClassVar[str | ModuleType]
    kind: ClassVar[str]

    @property
    def module(self) -> Any:
        """The plug-in under test."""
        return (
            self.plugin
            if isinstance(self.plugin, ModuleType)
            else plugins.load(self.kind, self.plugin)
        )

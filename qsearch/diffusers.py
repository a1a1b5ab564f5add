"""`import qsearch.diffusers`: from then on diffusers knows qsearch's plans, as `QSearchConfig`."""

from __future__ import annotations

from .execute.diffusers_plugin import QSearchConfig, QSearchQuantizer

__all__ = ["QSearchConfig", "QSearchQuantizer"]

"""Commands that hand plans to other tools and take theirs: export."""

from __future__ import annotations

from .common import later

later("export", "write a plan as another tool's file")

"""Commands that learn from measured plans: fit, explain."""

from __future__ import annotations

from .common import later

later("fit", "train a surrogate on the measured plans")
later("explain", "say which choices pay off, with values that add up")

"""Commands that run a plan: apply, bench."""

from __future__ import annotations

from .common import later

later("apply", "write the quantized model")
later("bench", "time the kernels on this machine")

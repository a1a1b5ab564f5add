"""Instruction sets that a core is capped to, each for a process of its own.

`ONEDNN_MAX_CPU_ISA` caps oneDNN, `ATEN_CPU_CAPABILITY` torch's own loops,
`FBGEMM_ENABLE_INSTRUCTIONS` FBGEMM and `NUMBA_CPU_NAME` ours.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

LEVELS = {
    "native": {},
    "avx512_core_vnni": {
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI",
        "FBGEMM_ENABLE_INSTRUCTIONS": "AVX512_E1",
        "NUMBA_CPU_NAME": "cascadelake",
        "NUMBA_CPU_FEATURES": "+avx2,+avx512bw,+avx512vnni",
    },
    "avx512_core": {
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",
        "FBGEMM_ENABLE_INSTRUCTIONS": "AVX512",
        "NUMBA_CPU_NAME": "skylake-avx512",
        "NUMBA_CPU_FEATURES": "+avx2,+avx512bw",
    },
    "avx2": {
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "FBGEMM_ENABLE_INSTRUCTIONS": "AVX2",
        "NUMBA_CPU_NAME": "haswell",  # or LLVM makes one VNNI instruction of two of AVX2's
        "NUMBA_CPU_FEATURES": "+avx2",
    },
}


def found_at(level: str, script: str, words: Sequence[str]) -> Any:
    """What `script` hands back (`hand_back`) in a process that is capped to `level`, with a cache
    of its own.
    """
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run(
            [sys.executable, script, "--inside", level, *words],
            env={**os.environ, **LEVELS[level], "XDG_CACHE_HOME": cache},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    *_, line = (x for x in done.stdout.splitlines() if x.startswith("FOUND"))
    return json.loads(line.removeprefix("FOUND"))


def hand_back(found: Any) -> None:
    """Give `found` to the process that asked for it."""
    print("FOUND" + json.dumps(found), flush=True)

"""What planning a large model takes, computed from shapes and speeds: for the README and for the
pages that ask for it by `<!-- computed NAME -->`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import yaml

from .figures import figure
from .markdown import table

#: card -> (name, rows of a guided call, sampler steps)
MODELS = {"sdxl": ("SDXL, 1024²", 2, 20), "flux-dev": ("FLUX.1-dev, 1024²", 1, 28)}
#: device card -> (name, type it computes in, share of the peak that is reached, bytes a weight)
DEVICES = {
    "cpu": ("laptop, two cores", "fp32", 1.0, 4),
    "rtx4090": ("24 GB card (RTX 4090)", "bf16", 0.4, 2),
}
PROMPTS, PROBES = 4, 4
_PASSES = 3  # a backward pass to weights and inputs costs two forward ones
_GB = 1e9


def costs(root: Path) -> str:
    """A table: minutes of profiling and of one picture, and GB of weights, model by device."""
    graphs = {row["model"]: row for row in figure(root, "graphs").rows}
    rows: list[dict[str, Any]] = []
    for model, (title, batch, steps) in MODELS.items():
        held = graphs[model]
        call = 2e9 * held["GMACs"] * batch
        for device, (name, kind, share, size) in DEVICES.items():
            card = yaml.safe_load((root / "configs/devices" / f"{device}.yaml").read_text())
            speed = float(card["peak"][kind]) * share
            rows.append(
                {
                    "model": title,
                    "on": name,
                    "profile": _time(call * _PASSES * PROMPTS * PROBES / speed),
                    "one picture": _time(call * steps / speed),
                    "weights while planning": f"{held['weights'] * size / _GB:.0f} GB",
                    "at 4 bits": f"{held['weights'] / 2 / _GB:.1f} GB",
                }
            )
    return table(rows)


#: measuring many plans of SDXL: plans, pictures a plan, forwards a picture (30 steps, guidance),
#: operations of the VAE, operations a second of one GPU in bf16, seconds to load the model
PLANS, PICTURES, FORWARDS, VAE, SPEED, LOADING = 500, 1000, 60, 10e12, 350e12, 60


def many_plans(root: Path) -> str:
    """A table: hours of measuring `PLANS` plans of SDXL, by the number of GPUs. Each worker also
    makes the pictures of full precision, which counts as one more plan.
    """
    graphs = {row["model"]: row for row in figure(root, "graphs").rows}
    picture = (2e9 * graphs["sdxl"]["GMACs"] * FORWARDS + VAE) / SPEED
    rows: list[dict[str, Any]] = []
    for count in (1, 8, 64):
        plans = math.ceil(PLANS / count)
        hours = (LOADING + (plans + 1) * PICTURES * picture) / 3600
        rows.append(
            {
                "GPUs": count,
                "plans each": plans,
                "time": f"{hours:.3g} h",
                "GPU hours": round(hours * count),
            }
        )
    return table(rows)


#: name in a page's comment -> what makes the table
COMPUTED = {"costs": costs, "many_plans": many_plans}


def _time(seconds: float) -> str:
    for limit, unit, name in ((90, 1, "s"), (5400, 60, "min"), (float("inf"), 3600, "h")):
        if seconds < limit:
            return (
                f"{seconds / unit:.0f} {name}"
                if seconds / unit >= 9.5
                else f"{seconds / unit:.1f} {name}"
            )
    raise AssertionError(seconds)

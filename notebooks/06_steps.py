# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Steps: other precision in other parts of the sampler
#
# ![Layers by ranges of steps, coloured by the bits of their inputs](pictures/steps.png)
#
# A layer has one stored weight here, and its input may be rounded to other bits early and late:
# that stores nothing more. Rows are ranges of the sampler's steps, the noisiest first; the colour
# says how many bits a layer's input has there.

# %%
# %matplotlib inline
from pathlib import Path

import pandas as pd

from qsearch import Budget, StepRanges, allocate
from qsearch.stages.config import load
from qsearch.stages.extract import extract
from qsearch.stages.folder import Run
from qsearch.stages.profile import profile

MODEL = "scenes-dit"  # the one knob: a name of the zoo, or a local diffusers folder of yours

config = load(Path("small.yaml"))
schemes = ("uint4-c", "uint4-c+a8", "uint4-c+a6", "uint4-c+a4")
run = Run(
    config.model_copy(
        update={
            "model": MODEL,
            "folder": Path("runs") / f"{Path(MODEL).name}-steps",
            "profile": config.profile.model_copy(update={"schemes": schemes}),
        }
    )
)

# %% [markdown]
# ## What do the steps stand?
# The table has a step bin for each half of the sampler. Noise in dB below the signal, median over
# layers: higher is better.

# %%
import numpy as np

graph = extract(run)
table = profile(run, graph)
rows = table.frame[table.frame["scheme"].isin(schemes)]
found = rows.groupby(["scheme", "step"])["estimate"].median().unstack("step")
found.columns = [f"steps {name}" for name in ("early", "late")]
(-10 * np.log10(found)).round(1)

# %% [markdown]
# ## One plan for all steps, and one that differs
# Both store the same 4-bit weights and have the same budget of bit operations: weight bits times
# input bits, summed over all products and steps.

# %%
cheapest = allocate(graph, table, Budget(average_bits=6.0), schemes=["uint4-c+a4"])
limit = 1.4 * cheapest.achieved.bit_operations
budget = Budget(average_bits=6.0, bit_operations=limit)
plans = {
    "the same in all steps": allocate(graph, table, budget),
    "two ranges of steps": allocate(graph, table, budget, steps=StepRanges.equal(2)),
}
pd.DataFrame(
    {
        "predicted noise": {n: p.solver.objective for n, p in plans.items()},
        "stored bits": {n: p.achieved.average_bits for n, p in plans.items()},
        "bit operations, 1e9": {n: p.achieved.bit_operations / 1e9 for n, p in plans.items()},
    }
)

# %% [markdown]
# ## Where it differs

# %%
from qsearch.report.range_heat import draw_range_bits, range_bits

plan = plans["two ranges of steps"]
draw_range_bits(range_bits(graph, plan))

# %% [markdown]
# ## What it is worth, measured
# A prediction is not a result: `qsearch evaluate` follows the sampler and measures, and
# [ranges](../docs/how-to/steps.md) says what came out on the zoo. The steps of a sampler with
# another number of steps are counted as fractions of its schedule.

# %%
pd.Series(
    {
        f"sampler of {total} steps": [len(m) for m in plan.steps.members(total)]
        for total in (8, 20, 50)
    }
)

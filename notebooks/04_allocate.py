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
# # Allocate: the best plan under a budget
#
# ![Size against error: planned, uniform and measured](pictures/frontier.png)
#
# The line is the best plan at every size, by the sensitivities; squares give all layers one scheme;
# rings were measured. Everything here works from two small files, `graph.json` and
# `sensitivity.parquet`: no model, no GPU.

# %%
# %matplotlib inline
from pathlib import Path

import pandas as pd

from qsearch import Budget, Constraints, allocate
from qsearch.stages.config import load
from qsearch.stages.extract import extract
from qsearch.stages.folder import Run
from qsearch.stages.profile import profile

MODEL = "scenes-dit"  # the one knob: a name of the zoo, or a local diffusers folder of yours

run = Run(
    load(Path("small.yaml")).model_copy(
        update={"model": MODEL, "folder": Path("runs") / Path(MODEL).name}
    )
)
graph = extract(run)
table = profile(run, graph)

# %% [markdown]
# ## The frontier

# %%
from qsearch.report.frontier import draw_frontier
from qsearch.stages.frontier import frontier_of, make_frontier

section = run.config.allocate
draw_frontier(frontier_of(section, graph, table, make_frontier(section, graph, table)))

# %% [markdown]
# ## One plan
# The solver says whether it is the best one, or how far from it at most. Costs are computed again
# by qsearch; a plan that breaks its budget is never returned.

# %%
from qsearch.report.drawing import draw_layer_bits
from qsearch.report.plots import layer_bits

plan = allocate(graph, table, Budget(average_bits=4.0))
print(
    f"{plan.achieved.average_bits:.3f} stored bits a weight; {plan.solver.name}: "
    f"{plan.solver.status}, predicted noise {plan.solver.objective:.3g}"
)
draw_layer_bits(layer_bits(graph, plan))

# %% [markdown]
# ## Why did a layer get what it got?
# Its choices, and what the best plan would lose with each of them.

# %%
from qsearch.decide.allocation import state
from qsearch.decide.why import why

layer = max(graph.quantizable, key=lambda x: x.weights).name
reasons = why(state(graph, table, Budget(average_bits=4.0)), plan, layer)
pd.DataFrame(
    {
        "choice": o.choice,
        "its own noise": o.value,
        "best plan's noise with it": o.plan,
        "chosen": o.chosen,
    }
    for o in reasons.options
)

# %% [markdown]
# ## Wishes have a price
# Queries, keys and values in one scheme, or fewer formats for a kernel's sake: each constraint
# costs some noise, and the solver says how much.

# %%
wishes = {
    "none": Constraints(),
    "queries, keys and values alike": Constraints(fused=True),
    "at most two formats": Constraints(formats=2),
    "feed-forward at 4 bits or more": Constraints(
        allowed={"feed-forward-*": ("uint4-c", "uint8-c")}
    ),
}
plans = {
    name: allocate(graph, table, Budget(average_bits=4.0), constraints=wish)
    for name, wish in wishes.items()
}
pd.DataFrame(
    {
        "predicted noise": {n: p.solver.objective for n, p in plans.items()},
        "stored bits": {n: p.achieved.average_bits for n, p in plans.items()},
    }
)

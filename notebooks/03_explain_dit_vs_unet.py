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
# # Why these layers: a DiT beside a U-Net
#
# ![Which kinds of layer make the noise, in a DiT and in a U-Net](pictures/dit_vs_unet.png)
#
# On the left every layer as a point, on the right the share of a uniform plan's noise that a family
# of layers makes, beside its share of the weights. Both models put most of their noise into the few
# weights at their ends. Apart from those, the DiT is hurt through its feed-forward layers, the
# U-Net through its convolutions; in both, attention to the text is the easiest to shrink.

# %%
# %matplotlib inline
from pathlib import Path

from qsearch.report.side_by_side import draw_side_by_side, side_by_side
from qsearch.stages.allocate import allocate
from qsearch.stages.config import load
from qsearch.stages.extract import extract
from qsearch.stages.folder import Run
from qsearch.stages.profile import profile

MODELS = ("scenes-dit", "scenes-unet")  # the one knob: the zoo's, or diffusers folders of yours

runs = [
    Run(
        load(Path("small.yaml")).model_copy(
            update={"model": m, "folder": Path("runs") / Path(m).name}
        )
    )
    for m in MODELS
]
graphs = [extract(run) for run in runs]
tables = [profile(run, graph) for run, graph in zip(runs, graphs, strict=True)]
draw_side_by_side(
    side_by_side(dict(zip(MODELS, zip(graphs, tables, strict=True), strict=True)), "uint4-c")
)

# %% [markdown]
# ## What each layer adds to a plan's error
# Errors of layers meet in the output and add up or cancel, so a layer's share depends on the
# others. Shapley values divide what they make together fairly. For the model that the probes leave
# behind they have a closed form: no sampling, and the values add up to the prediction.

# %%
from qsearch import explain
from qsearch.report.contributions import contributions, draw_contributions

graph, table = graphs[0], tables[0]
plan = allocate(runs[0], graph, table)
why = explain(graph, {"plan": plan}, tables=table, pairs=5)
draw_contributions(contributions(graph, why, plan="plan", metric="noise", method="shapley"))

# %% [markdown]
# Do they add up? The difference is refused above a millionth of the range when the attribution is
# made; here it is:

# %%
layers = why.select(plan="plan", kind="layer")
layers["value"].sum() + layers["base"].iloc[0] - layers["prediction"].iloc[0]

# %% [markdown]
# ## Layers that help or hurt each other
# A pair's value is what both together add beyond what each adds alone; below zero their errors
# cancel.

# %%
pairs = why.select(plan="plan", kind="pair")
pairs[pairs["other"] != pairs["name"]].groupby(["name", "other"])["value"].sum().sort_values(
    key=abs, ascending=False
).head(8)

# %% [markdown]
# ## Many plans at once
# The same for forty random plans: a dot is a plan, dark where the layer got few bits. One row with
# dots far to the right is a layer that no plan may starve.

# %%
from qsearch import Budget
from qsearch.decide.allocation import random_plan
from qsearch.report.beeswarm import beeswarm, draw_beeswarm

schemes = runs[0].config.profile.schemes
plans = {
    f"random {i}": random_plan(graph, schemes, Budget(average_bits=3.0 + 3.0 * i / 40), i)
    for i in range(40)
}
draw_beeswarm(
    beeswarm(
        explain(graph, plans, tables=table, pairs=0), metric="noise", method="shapley", kind="layer"
    )
)

# %% [markdown]
# What plans do to finished pictures is learnt from measured ones: `qsearch evaluate RUN --plans
# 64`, `qsearch fit RUN`, `qsearch explain RUN`; its `attribution.parquet` feeds the same pictures,
# with features of plans in place of layers.

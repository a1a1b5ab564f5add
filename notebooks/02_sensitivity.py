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
# # Sensitivity: what every choice at every layer costs
#
# ![The blocks of a DiT, coloured by how sensitive they are](pictures/sensitivity.png)
#
# Under each box is a cell for every block that it stands for, in order of execution. Yellow is
# sensitive: with that block at 4 bits, the output stands only so many decibels above its noise. The
# first and the last layer are the smallest and the most sensitive; of the attention to the text,
# some can be had for nothing.
#
# How it is measured: a choice moves a weight by some `dw`. For a random sign vector `v` over the
# output, `<d(v·f)/dw, dw>` is, squared and averaged over a few such `v`, the output's error. One
# backward pass has the gradient of all layers, and so prices all choices at all layers.

# %%
# %matplotlib inline
from pathlib import Path

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
# ## Can the ranking be trusted?
# The share of the differences between layers that another seed would find again, and how many rows
# lie within 3 dB of the measurement floor, where a number says nothing of the choice. Below 0.5 the
# ranking is mostly noise: take more probes or samples.

# %%
{
    "reliability": round(table.reliability(), 3),
    "rows": len(table.frame),
    "rows at the floor": len(table.at_floor()),
}

# %% [markdown]
# ## By role
# A box holds the middle half of a role's layers; a triangle would be a layer at the floor, of which
# only a bound is known.

# %%
from qsearch.report.boxes import draw_role_boxes, role_boxes

draw_role_boxes(role_boxes({MODEL: (graph, table)}, "uint4-c"))

# %% [markdown]
# ## Layer by scheme
# Six decibels a bit, roughly. Where a row is brighter than its neighbours, the layer is more
# sensitive than they are at any size.

# %%
from qsearch.report.drawing import draw_layer_noise
from qsearch.report.plots import noise_by_scheme, noise_by_step

draw_layer_noise(noise_by_scheme(graph, table))

# %% [markdown]
# ## Layer by step
# Early, noisy steps and late, clean ones stand different things: a plan may change between them
# (`qsearch.allocate(..., steps=...)`).

# %%
draw_layer_noise(noise_by_step(graph, table, "uint4-c"))

# %% [markdown]
# ## Block by block
# Noise powers add up over layers (decibels do not), so a block's is the sum of its layers'. Mind
# the logarithmic axis.

# %%
from qsearch.report.block_bars import block_bars, draw_block_bars

draw_block_bars(block_bars(graph, table, "uint4-c"))

# %% [markdown]
# ## On the graph

# %%
from qsearch.report.graph_heat import draw_graph_heat, graph_heat

draw_graph_heat(graph_heat(graph, table, "uint4-c"))

# %% [markdown]
# ## The ten most sensitive layers
# Mean over the step bins, with one standard error. `qsearch show runs/…/sensitivity.parquet` prints
# all of them.

# %%
means = (
    table.frame[table.frame["scheme"] == "uint4-c"]
    .groupby("site")[["estimate", "error", "floor"]]
    .mean()
)
means.sort_values("estimate", ascending=False).head(10)

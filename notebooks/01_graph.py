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
# # The graph: what there is to choose from
#
# ![The blocks of a U-Net, from input to output](pictures/graph.png)
#
# A denoiser is read once, with the inputs of one call, by `torch.export`: its layers with weights,
# the operations between them, and the blocks they form. What repeats is drawn once; a dot is a
# condition (the timestep, the text) that a block reads.

# %%
# %matplotlib inline
from pathlib import Path

import pandas as pd

from qsearch.stages.config import load
from qsearch.stages.extract import extract
from qsearch.stages.folder import Run

MODEL = "scenes-dit"  # the one knob: a name of the zoo, or a local diffusers folder of yours

run = Run(
    load(Path("small.yaml")).model_copy(
        update={"model": MODEL, "folder": Path("runs") / Path(MODEL).name}
    )
)
graph = extract(run)

# %% [markdown]
# ## The whole model

# %%
from qsearch.report.graph_picture import draw
from qsearch.report.graph_view import block_sketch, model_sketch

draw(model_sketch(graph))

# %% [markdown]
# ## One block, operation by operation
# Here quantization happens: every coloured box is a layer with a scheme of its own in the plan.

# %%
block = next(layer.block for layer in graph if "attention" in layer.role)
draw(block_sketch(graph, block))

# %% [markdown]
# ## Roles
# A role is what a layer is for, not what it is called, so that a rule learnt on one model can be
# asked of another. Small layers may compute a lot, and large ones little: the two columns of shares
# are seldom alike.

# %%
layers = pd.DataFrame(
    {"role": x.role, "weights": x.weights, "MACs": x.macs, "sees": x.sees} for x in graph
)
roles = layers.groupby("role").agg(
    {"weights": "sum", "MACs": "sum", "sees": lambda s: ", ".join(sorted(set(s)))}
)
roles.assign(
    weights_share=roles["weights"] / graph.weights, MACs_share=roles["MACs"] / graph.macs
).sort_values("weights", ascending=False).round(3)

# %% [markdown]
# ## Where the time goes, at best
# A roofline: each operation takes as long as its arithmetic or its memory traffic, whichever is
# more. What waits for memory gains from fewer bits a weight.

# %%
from qsearch.graphs import costs

timed = costs.timings(graph, costs.device("h200"))
shares = costs.shares(timed)
total = sum(s.seconds for s in shares)
pd.DataFrame(
    {
        "count": s.count,
        "share of the time": s.seconds / total,
        "waiting for memory": s.bound_by_memory / s.seconds if s.seconds else 0,
    }
    for s in shares
).set_axis([s.kind for s in shares]).round(3)

# %% [markdown]
# On a terminal: `qsearch show runs/…/graph.json --svg whole.svg`, and `qsearch extract sdxl -o
# runs/sdxl` for the true shapes of a large model without its weights.

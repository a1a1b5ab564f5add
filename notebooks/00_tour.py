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
# # A tour: which layers tolerate few bits?
#
# ![Full precision, uniform 4 bits, our plan, and a random one](pictures/tour.png)
#
# The rows are one denoiser four times, with the same captions and the same noise: in full
# precision, with every layer at 4 bits, with the bits where they are needed, and with as many bits
# at random. Below, each step from the model to that picture is one function. What it makes lies in
# a folder, and is not made twice. This notebook takes a minute on a laptop; the others look closer
# at its steps.

# %%
# %matplotlib inline
from pathlib import Path

import pandas as pd
from PIL import Image

from qsearch.stages.allocate import allocate
from qsearch.stages.config import load
from qsearch.stages.evaluate import evaluate
from qsearch.stages.extract import extract
from qsearch.stages.folder import Run
from qsearch.stages.profile import profile
from qsearch.stages.report import report

MODEL = "scenes-dit"  # the one knob: a name of the zoo, or a local diffusers folder of yours

run = Run(
    load(Path("small.yaml")).model_copy(
        update={"model": MODEL, "folder": Path("runs") / Path(MODEL).name}
    )
)

# %% [markdown]
# ## Read the model
# Every layer with its shape, its multiply-accumulates and its role: what a plan can speak of.

# %%
graph = extract(run)
pd.Series(
    {
        "layers": len(graph.layers),
        "weights": graph.weights,
        "multiply-accumulates a call": graph.total_macs,
    }
)

# %% [markdown]
# ## Price every choice at every layer
# One backward pass prices all of them at once (`02_sensitivity`). A box holds the layers of one
# role; on the left is what must not be touched.

# %%
from qsearch.report.boxes import draw_role_boxes, role_boxes

table = profile(run, graph)
draw_role_boxes(role_boxes({MODEL: (graph, table)}, "uint4-c"))

# %% [markdown]
# ## Choose
# The best plan within 4 stored bits a weight, scales and zero points counted, by an exact solver
# (`04_allocate`).

# %%
from qsearch.report.drawing import draw_layer_bits
from qsearch.report.plots import layer_bits

plan = allocate(run, graph, table)
draw_layer_bits(layer_bits(graph, plan))

# %% [markdown]
# ## Measure before you believe it
# Mean and standard error of each metric; `sqnr` is in dB above the noise of the final latents, more
# is better.

# %%
rows = evaluate(run, graph, plan)
pd.DataFrame(
    {
        row["plan"]: {"stored bits": f"{row['average_bits']:.2f}"}
        | {k: f"{m:.3g} ± {e:.1g}" for k, (m, e) in row["metrics"].items()}
        for row in rows
    }
)

# %% [markdown]
# ## Look
# The first captions as they come, then the worst cases: where the plan differs most from full
# precision. `report.html` beside it has everything on one page.

# %%
report(run, graph, table, plan, rows)
Image.open(run.path("contact_sheet.png")).convert("RGB")

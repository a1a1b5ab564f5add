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
# # Run the plan, and hand it to other tools
#
# ![Stored bits of every layer of a plan](pictures/plan.png)
#
# A plan is a line for each layer. Here it becomes a model whose weights lie packed in memory, the
# same numbers as were measured, and files that other tools load.

# %%
# %matplotlib inline
import copy
from pathlib import Path

import pandas as pd

from qsearch import simulate
from qsearch.stages.allocate import allocate
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
plan = allocate(run, graph, table)

# %%
from qsearch.report.drawing import draw_layer_bits
from qsearch.report.plots import layer_bits

draw_layer_bits(layer_bits(graph, plan))

# %% [markdown]
# ## Packed
# `apply` replaces layers by packed ones. What they compute is what `simulate` computes, and what
# was measured.

# %%
from qsearch.execute.runtime import apply, packed_layers
from qsearch.measure.pipelines import denoiser_of, record
from qsearch.measure.pipelines import run as call_once

model = denoiser_of(run.pipe)
[call] = record(run.pipe, run.prompts(1, part=1), run.sampling, bins=1)
packed = apply(copy.deepcopy(model), plan, graph)
with simulate(model, plan, graph):
    expected = call_once(model, call)
difference = (call_once(packed, call) - expected).abs().max() / expected.abs().max()
{"packed layers": len(packed_layers(packed)), "largest relative difference": float(difference)}

# %% [markdown]
# ## What each tool can hold
# Tools have formats of their own. What they lack is rounded to the nearest that they have, which is
# said beforehand, with the noise it adds.

# %%
from qsearch.core import plugins
from qsearch.execute.exports import export, roundings

rounded = {tool: roundings(plan, graph, tool, table) for tool in plugins.names("exporters")}
pd.DataFrame(
    {
        tool: {"layers rounded": len(r), "noise added": sum(x.noise or 0 for x in r)}
        for tool, r in rounded.items()
    }
).transpose()

# %% [markdown]
# ## Export
# Written, read back, and compared with the plan before it stands. A package that is not installed
# is named.

# %%
from qsearch import QSearchError

try:
    written = export(
        plan,
        graph,
        run.model_folder,
        "gguf",
        run.path("export-gguf"),
        nearest=True,
        force=True,
        table=table,
    )
except QSearchError as missing:
    written = []
    print(missing)
pd.Series({path.name: path.stat().st_size for path in written if path.is_file()}, dtype="int64")

# %% [markdown]
# On a terminal: `qsearch apply runs/…`, `qsearch export runs/… --to gguf --nearest`; the README has
# what to type in each tool.

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
# # Video: what quantization does to looks and to motion
#
# ![Film strips of the zoo's video model under their captions](pictures/video.png)
#
# A clip has frames that must show the right things, and motion that must go the right way. The two
# are measured apart: `alignment` reads every frame, `motion` the clip, `temporal` compares the
# differences between neighbouring frames with full precision's.

# %%
# %matplotlib inline
from pathlib import Path

import pandas as pd

from qsearch import Budget, allocate
from qsearch.stages.config import load
from qsearch.stages.extract import extract
from qsearch.stages.folder import Run
from qsearch.stages.profile import profile

MODEL = "scenes-video"  # the one knob: a name of the zoo, or a local folder of a video pipeline

METRICS = ("noise", "sqnr", "temporal", "alignment", "motion")
if MODEL != "scenes-video":
    METRICS = METRICS[:3]  # only the zoo's clips have a judge
config = load(Path("small.yaml"))
settings = {
    "model": MODEL,
    "folder": Path("runs") / f"{Path(MODEL).name}-clips",
    "profile": config.profile.model_copy(
        update={
            "schemes": ("uint3-c", "uint4-c", "uint8-c"),
            "metrics": METRICS,
            "samples": 2,
            "bins": 1,
        }
    ),
}
run = Run(config.model_copy(update=settings))
graph = extract(run)
f"{len(graph.quantizable)} layers, {run.sampling.frames} frames"

# %% [markdown]
# ## Which layers matter for what?
# Loss of each metric at 3 bits, one layer at a time, as a share of the role that loses most.
# Cross-attention reads the text, self-attention sees all frames.

# %%
table = profile(run, graph)
roles = {layer.name: layer.role for layer in graph}
frame = table.frame[table.frame["scheme"] == "uint3-c"]
losses = frame.assign(role=frame["site"].map(roles)).pivot_table(
    index="role", columns="metric", values="estimate", aggfunc="mean"
)[list(METRICS)]
shares = losses / losses.max()
shares.sort_values("noise", ascending=False).round(2)

# %% [markdown]
# ## A picture of it

# %%
from matplotlib.figure import Figure

figure = Figure(figsize=(7, 0.32 * len(shares) + 1.2), layout="constrained")
axes = figure.subplots()
image = axes.imshow(shares.sort_values("noise", ascending=False), cmap="viridis", aspect="auto")
axes.set_xticks(range(len(METRICS)), METRICS)
axes.set_yticks(range(len(shares)), shares.sort_values("noise", ascending=False).index)
figure.colorbar(image, label="share of the largest loss")
figure

# %% [markdown]
# ## One plan by noise, one by what moves
# Both have 4.0 stored bits. How many layers do they treat differently?

# %%
plans = {
    name: allocate(graph, table, Budget(average_bits=4.0), metric=name)
    for name in ("noise", "temporal")
}
plan = plans["temporal"]
differ = [n for n in plan.choices if plan.choices[n] != plans["noise"].choices[n]]
pd.DataFrame(
    {
        "stored bits": {n: p.achieved.average_bits for n, p in plans.items()},
        "predicted loss of temporal": {
            n: table.predict(p, "temporal")[0] for n, p in plans.items()
        },
        "layers that differ": dict.fromkeys(plans, len(differ)),
    }
)

# %% [markdown]
# ## Four frames of each clip
# In reading order; the same captions and noise for all.

# %%
from qsearch.core.plan import Plan
from qsearch.measure.evaluation import evaluate, make
from qsearch.measure.pipelines import denoiser_of
from qsearch.measure.quantized_weights import weights_for
from qsearch.report.pictures import four_frames

prompts = run.prompts(4, part=1)
full = make(run.pipe, graph, Plan.uniform(graph, "keep"), prompts, run.sampling)
made = {"full precision": full}
for name, chosen in plans.items():
    weights = weights_for(denoiser_of(run.pipe), graph, [chosen], [])
    made[f"by {name}"] = make(run.pipe, graph, chosen, prompts, run.sampling, weights=weights)
figure = Figure(figsize=(8, 2.1 * len(made)), layout="constrained")
rows = figure.subplots(len(made), len(prompts))
for row, (name, outcome) in zip(rows, made.items(), strict=True):
    for place, clip in zip(row, four_frames(outcome.pictures), strict=True):
        place.imshow((clip.permute(1, 2, 0) / 2 + 0.5).clamp(0, 1))
        place.set_axis_off()
    row[0].set_title(name, loc="left")
figure

# %% [markdown]
# ## Measured
# Four clips say little: `qsearch run configs/scenes-video.yaml` measures more of them, with error
# bars that one can believe.

# %%
found = {
    name: evaluate(outcome, full, METRICS[1:])
    for name, outcome in made.items()
    if name != "full precision"
}
pd.DataFrame({n: {m: v for m, (v, _) in f.items()} for n, f in found.items()}).round(3)

"""extract: the model's graph, in graph.json.

It depends on the recorded call: guidance doubles its batch or does not, resolution and frames are
in its shapes. All that is in the key.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.artifacts import digest
from ..core.components import is_denoiser
from ..core.graph import OpGraph
from ..core.progress import Progress, Silent
from .announce import begin
from .checks import check_components, saved_components

if TYPE_CHECKING:
    from .folder import Run


def graph_key(run: Run) -> str:
    """Digest of what changes the recorded call, and with it the graph."""
    c = run.config
    return run.key(
        "extract",
        model=run.fingerprint,
        guidance=run.sampling.guidance,
        size=run.sampling.size,
        frames=c.sampling.frames,
        **({"components": sorted(c.components)} if c.components else {}),
        # which of several denoisers runs in which step is in the graph
        **({"steps": run.sampling.steps} if _several(run) else {}),
        call=sorted(map(str, c.sampling.call.items())),
        # captions of the zoo's scenes are all of one length; a text of one's own may have another
        prompts="" if c.prompts is None else run.prompts(1, part=0).texts,
    )


def _several(run: Run) -> bool:
    return sum(map(is_denoiser, saved_components(run.model_folder))) > 1


def extract(run: Run) -> OpGraph:
    """The graph of the run's model on a call that its pipeline makes.

    Args:
        run: the run; `config.sampling` says at what size and with what guidance.

    Returns:
        The graph, read from graph.json where that answers the question.
    """
    check_components(run)
    key = graph_key(run)
    known: OpGraph | None = run.found("graph.json", key, OpGraph.load)
    if known is not None:
        run.progress.say("extract: graph.json is up to date")
        return known
    from ..graphs.extraction import extract as verb
    from ..measure.components import denoisers_of, left_out

    begin(run, "extract")
    model, inputs = example(run)
    graph = verb(model, inputs, name=run.model_name)
    graph.save(run.path("graph.json"), key=key)
    run.progress.say(_extracted(graph))
    for name in () if run.config.components else left_out(run.pipe):
        held = ", ".join([*denoisers_of(run.pipe), name])
        run.progress.say(
            f"extract: {name}, a denoiser of another class, stays as it is; take it in with "
            f"`qsearch set {run.folder} 'components=[{held}]'`"
        )
    return graph


def example(run: Run, batch: int = 1) -> tuple[Any, dict[str, Any]]:
    """(the run's denoiser, arguments of one call of it that its pipeline makes for `batch`
    prompts).

    Of several components, the model that holds them and component -> arguments.
    """
    from ..measure.pipelines import denoisers_of, example_inputs, model_of, record
    from ..measure.recording import NoCallsError, first_call

    asked, prompts = run.config.components, run.prompts(batch, part=0)
    model = model_of(run.pipe, asked)
    # Two steps: PixArt treats one step as a distilled model. Of several denoisers each has its own
    # part of the steps, and
    # image-to-image with a low strength leaves out the first ones.
    whole = replace(run.sampling, batch=batch)
    once = whole if len(denoisers_of(run.pipe)) > 1 else replace(whole, steps=2)
    if run.offload.kind != "none" and not asked and len(denoisers_of(run.pipe)) == 1:
        call = first_call(run.pipe, prompts, once)  # a pass of a large model takes minutes
        return model, example_inputs(call, model)
    try:
        call, *_ = record(run.pipe, prompts, once, bins=1, components=asked)
    except NoCallsError:
        if once == whole:
            raise
        call, *_ = record(run.pipe, prompts, whole, bins=1, components=asked)
    return model, example_inputs(call, model)


def is_card(model: str) -> bool:
    """Whether `model` names a card, shapes without weights."""
    from ..graphs.families import cards

    return cards.has(model)


def extract_card(
    folder: Path, model: str, progress: Progress | None = None, **size: int | None
) -> OpGraph:
    """A run folder with the graph of a card.

    Args:
        folder: the run folder to make.
        model: the card's name, or the path of a YAML file.
        progress: who is told.
        size: `resolution`, `batch`, `frames`.

    Returns:
        The graph.

    Raises:
        QSearchError: for an unknown card, and a size that it can't have.
    """
    from ..graphs.extraction import extract as verb
    from ..graphs.families import cards
    from .config import NAME, Config, save
    from .folder import Run

    run = Run(Config(model=model, folder=folder), progress or Silent())
    asked = {name: value for name, value in size.items() if value is not None}
    denoiser, inputs = cards.load(model, **asked)
    graph = verb(denoiser, inputs, name=model)
    save(run.config, run.path(NAME))
    card = cards.card(model).model_dump(mode="json")
    graph.save(run.path("graph.json"), key=digest({"verb": "extract", "card": card, **asked}))
    run.progress.say(_extracted(graph))
    return graph


def _extracted(graph: OpGraph) -> str:
    return (
        f"extract: {len(graph.layers)} layers, {graph.weights:,} weights, "
        f"{graph.total_macs / 1e6:,.1f} M multiply-accumulates a call"
    )

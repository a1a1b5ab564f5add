"""profile: the sensitivity of every layer to every scheme, in sensitivity.parquet.

Its settings are `qsearch.measure.options.ProfileOptions`. Unfinished work lies beside the table in
sensitivity.partial.parquet, from which it resumes.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

from ..core.artifacts import digest
from ..core.graph import OpGraph
from ..core.scheme import Scheme
from ..core.table import SensitivityTable
from .announce import begin
from .calibrate import calibration_calls, calibration_question
from .endings import say_profiled
from .keys import sampled

if TYPE_CHECKING:
    from ..measure.executing import ExecutorOptions
    from ..measure.options import ProfileOptions
    from .folder import Run

PARTIAL = "sensitivity.partial.parquet"
#: less than this share of a ranking's variance between layers is real: say so
_RELIABLE = 0.5


def options_of(run: Run) -> ProfileOptions:
    """`profile` of the config with the run's own bins and seed, and its plan's ranges where
    attentions carry something from step to step.
    """
    c = run.config
    carried = any(Scheme.parse(s).carried for s in c.profile.attentions)
    ranges = (c.profile.attention_ranges or c.allocate.steps) if carried else None
    own = {"seed": c.seed + c.profile.seed, "bins": run.bins, "attention_ranges": ranges}
    return c.profile.model_copy(update=own)


def profile_key(run: Run, graph: OpGraph) -> str:
    """Digest of what the whole table depends on, however long it may take."""
    c = run.config
    schemes = [Scheme.parse(s) for s in (*c.profile.schemes, *c.profile.attentions)]
    return run.key(
        "profile",
        graph=graph.id,
        model=run.model_key,
        seed=c.seed,
        prompts=list(run.prompts(c.profile.samples, part=0).texts),
        sampling=sampled(run.sampling),
        profile=options_of(run).model_dump(exclude={"budget_seconds", "checkpointing"}),
        **calibration_question(run, schemes),
    )


def profile(run: Run, graph: OpGraph, by: ExecutorOptions | None = None) -> SensitivityTable:
    """The run's sensitivity table.

    Args:
        run: the run; `config.profile` says what is measured, on prompts of `config.prompts`.
        graph: the model's graph.
        by: executor and workers, between which rounds of probes are parted; this process alone,
            with torch's own number of threads, when left out.

    Returns:
        The table, read from sensitivity.parquet where that answers the question.
    """
    c = run.config
    whole = profile_key(run, graph)
    limit = c.profile.budget_seconds
    key = whole if limit is None else digest([whole, limit])
    known: SensitivityTable | None = run.found(
        "sensitivity.parquet", key, lambda path: SensitivityTable.load(path, graph.id)
    )
    if known is not None:
        run.progress.say("profile: sensitivity.parquet is up to date")
        return known
    from ..measure.executing import threads_set
    from ..measure.parted import Parted
    from ..measure.profiling import ProfileWork, profile_pipeline

    begin(run, "profile")
    prompts = run.prompts(c.profile.samples, part=0)
    with ExitStack() as stack:
        seen, advance = 0, None

        def step(done: int, total: int) -> None:
            nonlocal seen, advance
            advance = advance or stack.enter_context(run.progress.track("profile", total))
            advance(done - seen)
            seen = done

        schemes = [Scheme.parse(s) for s in (*c.profile.schemes, *c.profile.attentions)]
        chosen_by = calibration_calls(run, graph, schemes)
        work = ProfileWork(
            calibration=chosen_by,
            partial=run.path(PARTIAL),
            key=whole,
            progress=step,
            say=run.progress.say,
        )
        if by is not None:
            stack.enter_context(threads_set(by.threads))
        if by is not None and by.name != "local":
            parted = Parted(
                run.model_folder,
                graph,
                run.sampling,
                run.device,
                run.dtype,
                run.offload.kind,
                calibration=chosen_by,
            )
            work = replace(work, parted=parted.by(by, run.progress.say))
        batch = min(c.profile.batch, len(prompts))
        stack.enter_context(run.ticks("record", len(prompts), batch))
        stack.enter_context(run.blocks("profile, blocks", _passes(run, len(prompts), batch)))
        table = profile_pipeline(run.pipe, graph, prompts, run.sampling, options_of(run), work)
    table.save(run.path("sensitivity.parquet"), key=key, parents={"graph": graph.id}, seed=c.seed)
    if limit is None:  # else it is what more time goes on from
        run.path(PARTIAL).unlink(missing_ok=True)
    _say(run, table)
    say_profiled(run, graph, table)
    return table


def _passes(run: Run, count: int, batch: int) -> int:
    """Passes through all blocks, forwards or backwards: recording, three that look before probes
    begin, and for each round of probes one there and one back.
    """
    from ..measure.estimators.probe import ROUND

    parts = -(-count // batch)
    rounds = -(-run.config.profile.probes // ROUND)
    return parts * run.sampling.steps + parts * run.bins * (3 + 2 * rounds)


def _say(run: Run, table: SensitivityTable) -> None:
    run.progress.say(
        f"profile: {len(table.frame):,} measurements, {len(table.at_floor())} of them at the "
        "measurement floor"
    )
    for metric in table.metrics:
        if (reliability := table.reliability(metric)) < _RELIABLE:
            run.progress.say(
                f"profile: the ranking by {metric} is mostly noise (reliability {reliability:.2f});"
                " take more probes or samples"
            )

"""quick: a plan from a guess at sensitivities, from the model's files alone.

The guess is in guess.parquet and takes the place of no measured table.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..core.graph import OpGraph
from ..core.plan import Plan
from ..core.scheme import Scheme
from ..core.table import SensitivityTable
from .allocate import allocate
from .checks import saved_components

if TYPE_CHECKING:
    from .folder import Run


def quick(run: Run, graph: OpGraph) -> Plan:
    """The best plan by a guess, in plan.json.

    Args:
        run: the run; `config.allocate` says what is asked, `config.profile.schemes` what layers may
            have.
        graph: the model's graph.

    Returns:
        The plan.

    Raises:
        QSearchError: a scheme does more than round weights, or the budget can't be met.
    """
    from ..core.components import is_denoiser
    from ..measure.quick import SPEARMAN, guess

    schemes = [Scheme.parse(s) for s in run.config.profile.schemes]
    key = run.key("quick", graph=graph.id, model=run.fingerprint, schemes=sorted(map(str, schemes)))
    table: SensitivityTable | None = run.found(
        "guess.parquet", key, lambda path: SensitivityTable.load(path, graph.id)
    )
    if table is None:
        parts = [name for name in saved_components(run.model_folder) if is_denoiser(name)]
        with run.progress.track("guess", sum(x.weights for x in graph.quantizable)) as advance:
            table = guess(
                graph,
                run.model_folder,
                schemes,
                component=parts[0],
                variant=run.config.variant,
                progress=advance,
            )
        table.save(run.path("guess.parquet"), key=key, parents={"graph": graph.id})
    run.progress.say(
        "allocate: a guess from weight errors, nothing was measured; such guesses reached a rank "
        f"correlation of {SPEARMAN:.2f} with measured tables. "
        f"`qsearch profile {run.folder}` measures"
    )
    return allocate(run, graph, table)

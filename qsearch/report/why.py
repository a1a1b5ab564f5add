"""The reasons for one layer of a plan, as a table for a terminal."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from rich.table import Table

if TYPE_CHECKING:
    from ..decide.why import Why


def reasons(found: Why) -> list[Table | str]:
    """The layer's choices, the cheapest first, and in words: prices, a little more or less budget,
    the next-best choice.
    """
    tied = f" (tied with {', '.join(found.tied)})" if found.tied else ""
    table = Table(
        title=f"{found.layer}{tied}: its choices, with what the best plan loses for each",
        title_justify="left",
    )
    names = list(found.prices)
    for i, title in enumerate(
        (
            "choice",
            "own loss",
            *(f"costs in {n}" for n in names),
            "loss at shadow prices",
            "total loss of the best plan",
            "change",
        )
    ):
        table.add_column(title, justify="right" if i else "left", overflow="fold")
    for o in found.options:
        total = "no plan" if math.isinf(o.plan) else f"{o.plan:.4g}"
        costs = (f"{o.costs[n]:.4g}" for n in names)
        mark = " ← chosen" if o.chosen else ""
        table.add_row(
            o.choice + mark,
            f"{o.value:.3g}",
            *costs,
            f"+{o.priced:.3g}",
            total,
            _change(found.total, o.plan),
            style="bold" if o.chosen else None,
        )
    lines = [
        f"one more unit of {name} takes {price:.3g} off the total loss"
        for name, price in found.prices.items()
    ]
    for words, answer in (("less", found.with_less), ("more", found.with_more)):
        if answer is not None:
            lines.append(
                f"with 0.1 stored bits {words}: {answer[0]}, total loss {answer[1]:.4g} "
                f"({_change(found.total, answer[1])})"
            )
        elif "average_bits" in found.prices:
            lines.append(f"with 0.1 stored bits {words}: no plan")
    if (second := found.next_best) is not None:
        lines.append(
            f"the next-best choice is {second.choice}: {_change(found.total, second.plan)}"
        )
    return [table, *lines]


def _change(before: float, after: float) -> str:
    """How much a total loss changes; of losses above zero, as a noise power would be, in dB as
    well.
    """
    if not (math.isfinite(before) and math.isfinite(after)):
        return "–"
    decibels = f", {-10 * math.log10(after / before):+.2f} dB" if before > 0 and after > 0 else ""
    return f"{after - before:+.2g}{decibels}"

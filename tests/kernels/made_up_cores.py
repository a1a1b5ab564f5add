"""Tables of cores that are not here: every way takes a second, a test says which one is faster."""

from __future__ import annotations

from qsearch_kernels.product_table import SHAPES, Table

#: a core on which everything takes a second: what a test changes of it is chosen
EQUAL: dict[str, dict[str, tuple[float, ...]]] = {
    kind: dict.fromkeys(ways, (1.0,) * len(SHAPES))
    for kind, ways in {
        "wide": ("int_mm", "int_mm + rest", "onednn", "onednn + rest", "madd", "fp32"),
        "narrow": ("int_mm", "onednn", "madd", "fp32"),
        **{
            f"W{w} bf16": ("digits", "fp32", "bf16", "bf16 tiles", "int8pack")
            for w in ("8", "4", "4 groups")
        },
        **{
            f"W{w} {t}": ("digits", "fp32")
            for w in ("8", "4", "4 groups")
            for t in ("fp32", "fp16")
        },
        **{
            f"{s} {t}": ("rounded",)
            for s in ("W8A8", "W8A7", "W4A8")
            for t in ("fp32", "bf16", "fp16")
        },
        "keep fp32": ("fp32",),
        "keep bf16": ("fp32", "bf16"),
        "keep fp16": ("fp32", "fp16"),
    }.items()
}  # fmt: skip


def table(*, unsigned: bool = True, exact: str = "all", **best: str) -> Table:
    """A core whose integer GEMMs are exact for `exact`, with the way of each kind (wide="int_mm",
    W8_bf16="fp32") that is fastest."""
    seconds = {kind: dict(ways) for kind, ways in EQUAL.items()}
    for name in ("int_mm", "onednn"):  # whole where it is exact, with the rest where it saturates
        del seconds["wide"][name if exact == "pairs" else f"{name} + rest"]
    for kind, way in best.items():
        seconds[kind.replace("_", " ")][way] = (0.1,) * len(SHAPES)
    known = {"int_mm": exact, "onednn": exact, "madd": "all", "fp32": "all"}
    return Table(unsigned, known, seconds)

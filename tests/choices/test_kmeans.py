"""k-means: the optimum where it is called exact, close to it where not, scikit-learn beaten, and
codes that mean the nearest entry.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qsearch.choices.quantization import quantize, to_groups
from qsearch.choices.quantizers import kmeans
from qsearch.core.scheme import Scheme


def optimum(values: list[float], count: int) -> float:
    """The slow twin: least sum of squares of `count` clusters, by the dynamic programme over all
    borders.
    """
    x = np.sort(np.asarray(values, dtype=np.float64))
    s1, s2 = np.concatenate([[0], x.cumsum()]), np.concatenate([[0], (x * x).cumsum()])

    def cost(i: int, j: int) -> float:
        return float(s2[j] - s2[i] - (s1[j] - s1[i]) ** 2 / (j - i))

    best = [0.0] + [np.inf] * len(x)
    for _ in range(count):
        best = [0.0] + [min(best[i] + cost(i, j) for i in range(j)) for j in range(1, len(x) + 1)]
    return best[-1]


def error(w: torch.Tensor, scheme: str) -> torch.Tensor:
    """Sum of squared errors of each row, the codebooks not yet rounded to fp16."""
    ordered = to_groups(w, Scheme.parse(scheme)).flatten(0, 1).sort(1).values
    centres = kmeans._centres(ordered, 2 ** Scheme.parse(scheme).bits)
    return (ordered[:, :, None] - centres[:, None]).abs().amin(2).double().square().sum(1)


def drawn(kind: str, rows: int, columns: int) -> torch.Tensor:
    dice = np.random.default_rng(3)
    found = {
        "gauss": dice.standard_normal((rows, columns)),
        "student": dice.standard_t(3, (rows, columns)),
        "two heaps": dice.standard_normal((rows, columns)) * 0.1
        + dice.choice([-1, 1], (rows, columns)),
        "few values": dice.integers(-5, 6, (rows, columns)) / 4,
    }
    return torch.from_numpy(found[kind]).float()


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("kind", ["gauss", "student", "two heaps", "few values"])
@pytest.mark.parametrize("columns", [17, 64])
def test_rows_as_short_as_the_cells_are_clustered_optimally(
    bits: int, kind: str, columns: int
) -> None:
    w = drawn(kind, 3, columns)

    found = error(w, f"km{bits}-c")

    best = torch.tensor([optimum(row.tolist(), 2**bits) for row in w])
    torch.testing.assert_close(found, best.double(), rtol=1e-5, atol=1e-10)


@pytest.mark.parametrize(
    ("kind", "excess"), [("gauss", 0.03), ("student", 0.03), ("two heaps", 0.03)]
)
def test_longer_rows_come_close_to_the_optimum(kind: str, excess: float) -> None:
    w = drawn(kind, 4, 300)

    found = error(w, "km3-c")

    best = torch.tensor([optimum(row.tolist(), 8) for row in w]).double()
    assert (found >= best * (1 - 1e-5)).all()
    assert float((found / best).max()) < 1 + excess


@pytest.mark.parametrize("kind", ["gauss", "student"])
def test_scikit_learn_does_no_better(kind: str) -> None:
    from sklearn.cluster import KMeans

    w = drawn(kind, 4, 1000)

    found = error(w, "km4-c")

    theirs = torch.tensor(
        [
            KMeans(16, n_init=1, max_iter=100, random_state=0).fit(row[:, None].numpy()).inertia_
            for row in w
        ]
    )
    assert float(found.sum()) < 1.005 * float(theirs.sum())


@pytest.mark.parametrize("scheme", ["km2-t", "km3-c", "km4-g8", "km4-g100"])
def test_every_weight_has_the_code_of_its_nearest_entry_and_entries_fit_fp16(scheme: str) -> None:
    w = drawn("student", 6, 50)

    made = quantize(w, Scheme.parse(scheme)).code

    assert made.levels is not None
    assert torch.equal(made.levels.half().float(), made.levels)
    groups = to_groups(w, Scheme.parse(scheme))
    least = (groups[..., None] - made.levels[:, :, None]).abs().amin(-1)
    torch.testing.assert_close((made.values() - groups).abs(), least, rtol=0, atol=1e-7)


def test_a_group_with_no_more_weights_than_entries_is_stored_as_it_is() -> None:
    w = drawn("gauss", 3, 16).half().float()

    assert torch.equal(quantize(w, Scheme.parse("km4-c")).dequantize(), w)


def test_many_rows_are_cut_into_chunks_without_a_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    w = drawn("gauss", 9, 200)
    whole = quantize(w, Scheme.parse("km3-c")).dequantize()

    monkeypatch.setattr(kmeans, "_CHUNK", 2 * 65**2)

    assert torch.equal(quantize(w, Scheme.parse("km3-c")).dequantize(), whole)

"""Layers on which the output depends and that no gradient reaches are named, never priced at
nothing; layers on which nothing depends cost nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from qsearch import extract, profile
from qsearch.core.errors import QSearchError
from qsearch.measure.pipelines import Call

WAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "detached": Tensor.detach,
    "data": lambda x: x.data,
    "rounded": lambda x: (x * 8).round() / 8,
    "cast": lambda x: (x * 8).int().float() / 8,
    "index": lambda x: nn.functional.one_hot(x.argmax(-1), x.shape[-1]).float(),
}


class Hidden(nn.Module):
    """Two layers in a row and one beside them, whose output passes through `way`."""

    def __init__(self, way: Callable[[Tensor], Tensor], weight: float = 1.0) -> None:
        super().__init__()
        self.into, self.beside, self.out = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.way, self.weight = way, weight

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.into(x).tanh()
        final: Tensor = self.out(hidden + self.weight * self.way(self.beside(hidden)))
        return final


def _profiled(model: nn.Module, **more: object) -> dict[str, float]:
    call = Call((torch.randn(16, 5),), {}, 0)
    graph = extract(model, {"x": call.args[0]})
    frame = profile(model, graph, ["int2-c"], [call], **more).frame.query("metric == 'noise'")  # type: ignore[arg-type]
    return dict(frame.set_index("site")["estimate"])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("estimator", ["probe", "fisher"])
def test_a_hidden_layer_is_named(way: str, estimator: str) -> None:
    torch.manual_seed(0)
    model = Hidden(WAYS[way]).eval()
    with pytest.raises(QSearchError, match=r"depends on beside, and no gradient.*sweep"):
        _profiled(model, estimator=estimator, probes=4)
    assert _profiled(model, estimator="sweep")["beside"] > 0


def test_a_layer_that_nothing_depends_on_costs_nothing() -> None:
    torch.manual_seed(0)
    found = _profiled(Hidden(Tensor.detach, weight=0.0).eval(), probes=4)
    assert found["beside"] == 0
    assert found["into"] > 0
    assert found["out"] > 0


@pytest.mark.parametrize("layer", [nn.Linear(4, 6), nn.Conv1d(4, 6, 3), nn.Conv2d(4, 6, 3)])
def test_a_layer_that_reads_zeros_costs_nothing_whatever_its_bias(layer: nn.Module) -> None:
    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.into, self.beside = nn.Linear(5, 3), layer

        def forward(self, x: Tensor) -> Tensor:
            shape = {"Linear": (4,), "Conv1d": (4, 5), "Conv2d": (4, 5, 5)}[type(layer).__name__]
            beside = self.beside(torch.zeros(len(x), *shape)).flatten(1)
            final: Tensor = self.into(x) + beside.mean(1, keepdim=True)
            return final

    torch.manual_seed(0)
    found = _profiled(Beside().eval(), probes=4)
    assert found["beside"] == 0
    assert found["into"] > 0

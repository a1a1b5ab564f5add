"""Reading with hooks: the same graph where export refuses, and errors that show how to call."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qsearch.core.errors import QSearchError
from qsearch.core.graph import OpGraph
from qsearch.graphs.extraction import extract
from tests.graphs import models


class Moody(models.Plain):
    """`Plain`, whose way depends on the values that it is given."""

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        return super().forward(x, t, context) if t.sum() > 0 else x


class Own(nn.Module):
    """A forward whose parameters have names of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, apple: Tensor, *, pear: Tensor | None = None) -> Tensor:
        return self.layer(apple)


def layers(graph: OpGraph) -> list[tuple[Any, ...]]:
    return [
        (
            x.name,
            x.role,
            x.sees,
            x.kind,
            x.weight_shape,
            x.macs,
            x.calls,
            x.inputs,
            x.outputs,
            x.channel_axis,
        )
        for x in graph
    ]


def test_control_flow_that_depends_on_data_is_read_with_hooks_and_gives_the_same_layers() -> None:
    model, inputs = models.plain()
    moody = Moody()

    exported, watched = extract(model, inputs), extract(moody, inputs)

    assert (exported.source, watched.source) == ("export", "hooks")
    assert layers(watched) == layers(exported)
    assert [(b.name, b.kind, b.layers) for b in watched.blocks] == [
        (b.name, b.kind, b.layers) for b in exported.blocks
    ]
    assert watched.total_macs == exported.total_macs
    assert extract(moody, inputs).id == watched.id


def test_nothing_is_printed_where_export_refuses(capfd: pytest.CaptureFixture[str]) -> None:
    _, inputs = models.plain()

    extract(Moody(), inputs)

    assert capfd.readouterr() == ("", "")


def test_hooks_are_gone_and_modes_are_back_even_after_a_failure() -> None:
    _, inputs = models.plain()
    moody = Moody()
    moody.body[1].eval()
    training = [module.training for module in moody.modules()]

    extract(moody, inputs)
    with pytest.raises(QSearchError):
        extract(moody, {**inputs, "context": torch.ones(1, 7, 13)})

    assert [module.training for module in moody.modules()] == training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in moody.modules())


def test_a_call_that_fails_is_answered_with_the_signature() -> None:
    model, inputs = models.plain()
    del inputs["context"]

    with pytest.raises(
        QSearchError,
        match=re.escape("Plain can't be called with these example inputs")
        + ".*context.*"
        + re.escape("its forward takes (x: "),
    ):
        extract(model, inputs)


def test_a_model_without_weights_whose_way_depends_on_data_is_asked_for_weights() -> None:
    _, inputs = models.plain()
    meta = {name: value.to("meta") for name, value in inputs.items()}

    with pytest.raises(
        QSearchError, match=r"give it weights \(of any value\) instead of the meta device"
    ):
        extract(Moody().to("meta"), meta)


def test_inputs_that_tell_nothing_are_answered_with_how_to_name_them() -> None:
    with pytest.raises(
        QSearchError,
        match=(
            r"none of apple looks like the noisy picture; say it with .*inputs=\{'NAME': "
            r"'image'\}.*the forward takes \(apple: "
        ),
    ):
        extract(Own(), {"apple": torch.ones(2)[:, None].expand(2, 8)})

    assert (
        extract(Own(), {"apple": torch.ones(2, 8)}, inputs={"apple": "image"}).layer("layer").sees
        == "image"
    )


@pytest.mark.parametrize(
    ("chosen", "says"),
    [
        (
            {"aple": "image"},
            "no tensor among the example inputs called 'aple'; did you mean 'apple'",
        ),
        ({"apple": "imagine"}, "did you mean 'image'"),
    ],
)
def test_a_wrong_word_about_an_input_is_answered_with_the_nearest(
    chosen: dict[str, str], says: str
) -> None:
    with pytest.raises(QSearchError, match=re.escape(says)):
        extract(Own(), {"apple": torch.ones(2, 8)}, inputs=chosen)


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(QSearchError, match="Identity has none"):
        extract(nn.Identity(), {"input": torch.ones(1, 4, 8, 8)})

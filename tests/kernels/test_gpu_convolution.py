"""int8 convolutions as CUDA computes them, put together on a CPU from the twins: the reference's
numbers, the CPU's rules, and what is refused.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qsearch.core.scheme import Scheme
from qsearch.execute.layers import QuantConv2d
from qsearch_kernels import gpu_ops, meta_kernels, ops, reference
from qsearch_kernels.prepared import prepare
from qsearch_kernels.weight import Weight

from .test_cpu import TOLERANCE, agree, arguments, make

PLACES = {
    "3 x 3": {"kernel": (3, 3), "stride": (1, 1), "padding": (1, 1), "dilation": (1, 1)},
    "3 x 2, every second": {
        "kernel": (3, 2),
        "stride": (2, 2),
        "padding": (2, 2),
        "dilation": (1, 1),
    },
    "2 x 3, apart": {"kernel": (2, 3), "stride": (1, 1), "padding": (0, 0), "dilation": (2, 2)},
    "1 x 1": {"kernel": (1, 1), "stride": (1, 1), "padding": (0, 0), "dilation": (1, 1)},
}
HALVES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6]) / 4


def cuda(
    x: Tensor,
    w: Weight,
    bias: Tensor | None = None,
    activation: int = 8,
    low: Tensor | None = None,
    high: Tensor | None = None,
    **places: object,
) -> Tensor:
    """`ops.conv2d_rounded` as CUDA has it registered."""
    return ops._gpu_conv2d_rounded(x, *w, bias, activation, *places.values(), low, high)


@pytest.mark.parametrize("bits", [8, 4, 3])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("places", PLACES.values(), ids=PLACES)
def test_a_convolution_is_the_reference_on_ragged_pictures_in_every_memory_format(
    places: dict[str, tuple[int, int]], dtype: torch.dtype, bits: int
) -> None:
    taps = places["kernel"][0] * places["kernel"][1]
    w, x, bias = (
        make(6, 5 * taps, bits),
        (torch.randn(3, 5, 9, 7) * torch.tensor([1.0, 9.0, 0.1]).view(3, 1, 1, 1) + 1).to(dtype),
        torch.randn(6),
    )
    expected = reference.conv2d_wnaxi(x.float(), **arguments(w), activation=8, bias=bias, **places)  # type: ignore[arg-type]

    assert "cuda" in ops.devices(w, convolution=True)
    for picture in (x, x.to(memory_format=torch.channels_last), x.mT.contiguous().mT):
        agree(cuda(picture, w, bias, **places), expected, dtype)


@pytest.mark.parametrize("activation", [8, 6, 4])
@pytest.mark.parametrize("ends", [1, 3])
def test_a_static_grid_is_one_for_all_pictures_or_one_each(activation: int, ends: int) -> None:
    w, x, places = make(4, 5 * 9, 4), torch.randn(3, 5, 6, 7), PLACES["3 x 3"]
    grids = {"low": -torch.rand(ends, 1, 1, 1) - 0.5, "high": torch.rand(ends, 1, 1, 1) + 0.5}

    made = cuda(x, w, None, activation, **grids, **places)

    agree(
        made,
        reference.conv2d_wnaxi(x, **arguments(w), activation=activation, **grids, **places),
        torch.float32,
    )  # type: ignore[arg-type]
    agree(made, ops.conv2d_rounded(x, w, None, activation, **grids, **places), torch.float32)  # type: ignore[arg-type]


def test_small_floats_whose_levels_are_whole_are_multiplied_as_bytes() -> None:
    w, x, places = (
        make(4, 5 * 9, 4, levels=torch.cat([HALVES, -HALVES])),
        torch.randn(2, 5, 6, 7),
        PLACES["3 x 3"],
    )

    assert "cuda" in ops.devices(w, convolution=True)
    agree(
        cuda(x, w, **places),
        reference.conv2d_wnaxi(x, **arguments(w), activation=8, **places),
        torch.float32,
    )  # type: ignore[arg-type]


def test_one_scale_for_the_whole_weight_serves_every_row() -> None:
    w, x, places = make(4, 5 * 9, 8), torch.randn(2, 5, 6, 7), PLACES["3 x 3"]
    w = w._replace(scale=w.scale[:1], group=-1)

    assert "cuda" in ops.devices(w, convolution=True)
    agree(
        cuda(x, w, **places),
        reference.conv2d_wnaxi(x, **arguments(w), activation=8, **places),
        torch.float32,
    )  # type: ignore[arg-type]


@pytest.mark.parametrize("places", PLACES.values(), ids=PLACES)
def test_an_empty_batch_gives_an_empty_result_laid_out_as_the_compiler_was_told(
    places: dict[str, tuple[int, int]],
) -> None:
    w = make(6, 5 * places["kernel"][0] * places["kernel"][1], 8)
    for batch in (0, 2):
        x = torch.randn(batch, 5, 9, 7)

        made, told = (
            cuda(x, w, **places),
            meta_kernels.conv2d(x, *w, None, 8, *places.values(), None, None),
        )

        assert (made.shape, made.stride(), made.dtype) == (told.shape, told.stride(), told.dtype)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("static", [False, True])
def test_a_picture_that_is_not_finite_does_not_become_a_number(bad: float, static: bool) -> None:
    w, x, places = make(4, 5 * 9, 8), torch.randn(3, 5, 6, 7), PLACES["3 x 3"]
    x[1, 2, 3, 3] = bad
    ends = {"low": torch.tensor([-1.5]), "high": torch.tensor([2.0])} if static else {}

    for y in (cuda(x, w, **ends, **places), ops.conv2d_rounded(x, w, None, 8, **ends, **places)):  # type: ignore[arg-type]
        assert y[1].isnan().all()
        assert y[[0, 2]].isfinite().all()


def test_what_the_kernel_does_not_do_is_not_promised_and_refused_by_name() -> None:
    x, places = torch.randn(2, 5, 6, 7), PLACES["3 x 3"]
    zeros, grouped = make(4, 45, 4, zero=True), make(4, 45, 4, group=32)

    assert ops.devices(zeros, convolution=True) == {"cpu"}
    assert ops.devices(grouped, convolution=True) == frozenset()
    assert ops.devices(make(4, 45, 4)._replace(offset=7.0), convolution=True) == {"cpu"}
    assert ops.devices(make(4, 45, 4, levels=torch.randn(16)), convolution=True) == frozenset()
    with pytest.raises(ValueError, match="no zeros; given zeros: dequantize this weight instead"):
        gpu_ops.conv2d_rounded(x, prepare(*zeros), None, 8, *places.values())
    with pytest.raises(ValueError, match="one scale a row and no zeros; given groups of 32"):
        gpu_ops.conv2d_rounded(x, prepare(*grouped), None, 8, *places.values())
    with pytest.raises(
        ValueError,
        match=r"one stride, padding and dilation for both axes .* given padding \(1, 2\)",
    ):
        gpu_ops.conv2d_rounded(x, prepare(*make(4, 45, 4)), None, 8, (3, 3), (1, 1), (1, 2), (1, 1))


@pytest.mark.parametrize(
    ("scheme", "options", "expected"),
    [
        ("int8-c+a8", {}, {"cpu", "cuda"}),
        ("int4-t+a8t", {"stride": 2, "padding": 1}, {"cpu", "cuda"}),
        ("e2m1-c+a6", {}, {"cpu", "cuda"}),
        ("int8-c+a8", {"stride": (1, 2)}, {"cpu"}),
        ("int8-c+a8", {"padding": (1, 0)}, {"cpu"}),
        ("int8-c+a8", {"dilation": (2, 1)}, {"cpu"}),
        ("uint8-c+a8", {}, {"cpu"}),
        ("int4-g32+a8", {}, set()),
        ("int8-c+ae4m3", {}, set()),
        ("int8-c+a8c", {}, set()),
        ("int8-c", {}, set()),
        ("keep+a8", {}, set()),
        ("int8-c+a8", {"groups": 2}, set()),
        ("int8-c+a8", {"padding": "same"}, set()),
        ("int8-c+a8", {"padding": 1, "padding_mode": "circular"}, set()),
    ],
)
def test_a_layer_promises_a_device_where_there_is_a_product_for_it(
    scheme: str, options: dict[str, object], expected: set[str]
) -> None:
    source = nn.Conv2d(4, 6, 3, **options)  # type: ignore[arg-type]

    assert QuantConv2d(Scheme.parse(scheme), source).devices == expected

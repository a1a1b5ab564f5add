"""Regular Hadamard rotation: exactly orthogonal, the fast transform, rounding after it."""

from __future__ import annotations

import pytest
import torch

from qsearch_kernels import hadamard
from qsearch_kernels.cpu_rows import rows_of

ROUNDING = 1e-5


@pytest.mark.parametrize("group", [4, 16, 64, 256])
def test_the_matrix_is_exactly_its_own_inverse_and_each_row_has_the_same_sum(group: int) -> None:
    matrix = hadamard.matrix(group)

    assert torch.equal(matrix, matrix.T)
    assert torch.equal(matrix @ matrix, torch.eye(group))
    assert torch.equal(matrix.sum(1), torch.ones(group))
    assert torch.equal(matrix.abs(), torch.full((group, group), group**-0.5))


def test_the_matrix_of_four_is_comfyui_s() -> None:
    four = [[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]

    assert torch.equal(hadamard.matrix(4) * 2, torch.tensor(four, dtype=torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("shape", "group"), [((5, 16), 16), ((2, 3, 320), 64), ((1, 1152), 64), ((7, 1280), 256)]
)
def test_the_fast_transform_is_the_matrix(
    dtype: torch.dtype, shape: tuple[int, ...], group: int
) -> None:
    x = torch.randn(shape).to(dtype)

    made, expected = hadamard.rotate(x, group), hadamard.rotate_slow(x, group)

    assert made.dtype == dtype
    rounding = {torch.bfloat16: 2**-7, torch.float16: 2**-10}.get(dtype, ROUNDING)
    torch.testing.assert_close(made, expected, rtol=rounding, atol=rounding)
    plain = hadamard._rotate_torch(x, group)
    torch.testing.assert_close(plain, expected, rtol=rounding, atol=rounding)


def test_rotating_twice_changes_nothing_and_strides_and_empty_batches_are_taken() -> None:
    x = torch.randn(128, 6).t()

    torch.testing.assert_close(
        hadamard.rotate(hadamard.rotate(x, 64), 64), x, atol=ROUNDING, rtol=0
    )
    assert hadamard.rotate(x[:0], 64).shape == (0, 128)


def test_a_rotation_passes_gradients_on() -> None:
    x = torch.randn(3, 64, requires_grad=True)

    (hadamard.rotate(x, 64) ** 2).sum().backward()

    torch.testing.assert_close(x.grad, 2 * x.detach(), atol=ROUNDING, rtol=ROUNDING)


def test_a_layer_with_rotated_weight_and_inputs_computes_what_it_did() -> None:
    x, weight = torch.randn(9, 320), torch.randn(7, 320)

    y = hadamard.rotate(x, 64) @ hadamard.rotate(weight, 64).T

    torch.testing.assert_close(y, x @ weight.T, atol=1e-4, rtol=1e-4)


def test_a_convolution_is_rotated_on_its_channels_and_moments_follow() -> None:
    x, weight = torch.randn(2, 16, 5, 5), torch.randn(7, 16, 3, 3)
    turned = hadamard.rotate(x.movedim(1, -1), 16).movedim(-1, 1)

    columns = hadamard.rotate_columns(weight.flatten(1), 16, 9)

    made = torch.nn.functional.conv2d(turned, columns.view(7, 16, 3, 3))
    expected = torch.nn.functional.conv2d(x, weight)
    torch.testing.assert_close(made, expected, atol=1e-4, rtol=1e-4)
    rows = torch.nn.functional.unfold(x, 3).transpose(1, 2).flatten(0, 1)
    other = torch.nn.functional.unfold(turned, 3).transpose(1, 2).flatten(0, 1)
    moments = hadamard.rotate_moments(rows.T @ rows, 16, 9)
    torch.testing.assert_close(moments, other.T @ other, atol=1e-3, rtol=1e-4)


def test_one_outlier_is_spread_over_its_group() -> None:
    x = torch.zeros(1, 256)
    x[0, 3] = 16

    assert float(hadamard.rotate(x, 256).abs().max()) == 1.0


@pytest.mark.parametrize("static", [False, True])
def test_rotated_rows_are_rounded_as_rows_are(
    static: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hadamard, "_NUMBERS", 200)  # several pieces
    x = torch.randn(11, 128)
    ends = (torch.tensor(-4.0), torch.tensor(5.0)) if static else (None, None)

    made = hadamard.rotated_rows(x, 64, 8, *ends, sums=True)

    expected = rows_of(hadamard.rotate(x, 64), 8, *ends, sums=True)
    assert made.largest == expected.largest
    for ours, theirs in zip(made[:4], expected[:4], strict=True):
        assert isinstance(ours, torch.Tensor)
        assert isinstance(theirs, torch.Tensor)
        assert torch.equal(ours, theirs)


def test_the_largest_group_that_divides_is_taken_and_where_none_does_it_is_said() -> None:
    assert [hadamard.group_of(c) for c in (1152, 640, 1280, 160, 256)] == [64, 64, 256, 16, 256]
    assert hadamard.group_of(1280, largest=64) == 64
    with pytest.raises(ValueError, match="none divides 100"):
        hadamard.group_of(100)
    with pytest.raises(ValueError, match="given groups of 32"):
        hadamard.rotate(torch.zeros(2, 64), 32)
    with pytest.raises(ValueError, match="given groups of 64 of 100 channels"):
        hadamard.rotate(torch.zeros(2, 100), 64)

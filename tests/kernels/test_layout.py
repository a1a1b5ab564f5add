"""The bit layout: codes come back, bytes lie where the layout says, and wrong input is refused."""

from __future__ import annotations

import math

import pytest
import torch

from qsearch_kernels import layout

BITS = range(1, 9)
SHAPES = [(1,), (7,), (8,), (3, 1), (5, 13), (2, 3, 31), (4, 64), (1, 129), (3, 0), (0, 5)]


def random_codes(shape: tuple[int, ...], bits: int) -> torch.Tensor:
    return torch.randint(0, 2**bits, shape, dtype=torch.uint8)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codes_come_back_as_they_were_packed(shape: tuple[int, ...], bits: int) -> None:
    codes = random_codes(shape, bits)

    packed = layout.pack(codes, bits)

    assert packed.dtype == torch.uint8
    assert packed.shape == (*shape[:-1], layout.row_bytes(shape[-1], bits))
    torch.testing.assert_close(layout.unpack(packed, bits, shape[-1]), codes, rtol=0, atol=0)


@pytest.mark.parametrize("bits", BITS)
def test_every_bit_of_a_packed_row_lies_where_the_layout_says(bits: int) -> None:
    columns = 13
    codes = random_codes((columns,), bits)

    expected, start, low = [0] * layout.row_bytes(columns, bits), 0, 0
    for width in layout.planes(bits):
        for j, code in enumerate(codes.tolist()):
            part = (code >> low) % 2**width
            expected[start + j * width // 8] |= part << (j * width % 8)
        start, low = start + math.ceil(columns * width / 8), low + width

    assert layout.pack(codes, bits).tolist() == expected


def test_the_first_code_lies_in_the_lowest_bits() -> None:
    assert layout.pack(torch.tensor([1, 2, 3]), 4).tolist() == [0x21, 0x03]


def test_three_bits_are_a_plane_of_two_and_a_plane_of_one() -> None:
    codes = torch.tensor([0b101, 0b010, 0b111, 0b100, 0b001])

    assert layout.pack(codes, 3).tolist() == [0b00_11_10_01, 0b01, 0b01101]


def test_planes_are_powers_of_two_that_add_up_to_the_width() -> None:
    assert {bits: layout.planes(bits) for bits in BITS} == {
        1: (1,),
        2: (2,),
        3: (2, 1),
        4: (4,),
        5: (4, 1),
        6: (4, 2),
        7: (4, 2, 1),
        8: (8,),
    }


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("columns", [0, 1, 7, 8, 9, 1152])
def test_padding_takes_less_than_a_byte_a_plane(columns: int, bits: int) -> None:
    spare = 8 * layout.row_bytes(columns, bits) - bits * columns

    assert 0 <= spare < 8 * len(layout.planes(bits))


@pytest.mark.parametrize("bits", BITS)
def test_rows_are_packed_each_for_itself(bits: int) -> None:
    codes = random_codes((4, 11), bits)

    torch.testing.assert_close(
        layout.pack(codes, bits)[2], layout.pack(codes[2], bits), rtol=0, atol=0
    )


def test_packing_leaves_its_input_alone_and_takes_any_integer_type_and_any_strides() -> None:
    codes = random_codes((9, 6), 3)
    before = codes.clone()

    packed = layout.pack(codes.T, 3)

    torch.testing.assert_close(codes, before, rtol=0, atol=0)
    torch.testing.assert_close(layout.pack(codes.T.contiguous().long(), 3), packed, rtol=0, atol=0)
    torch.testing.assert_close(layout.unpack(packed, 3, 9), codes.T, rtol=0, atol=0)


@pytest.mark.parametrize("bits", [0, 9, -1])
def test_a_width_outside_one_to_eight_is_refused(bits: int) -> None:
    for call in (
        lambda: layout.pack(torch.zeros(3, dtype=torch.uint8), bits),
        lambda: layout.row_bytes(3, bits),
    ):
        with pytest.raises(ValueError, match=f"a code has 1 to 8 bits; given {bits}"):
            call()


@pytest.mark.parametrize("codes", [torch.tensor([0, 8]), torch.tensor([-1, 3])])
def test_a_code_that_does_not_fit_is_refused_with_the_range(codes: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="codes of 3 bits lie in 0 to 7; given"):
        layout.pack(codes, 3)


@pytest.mark.parametrize("codes", [torch.tensor([0.5]), torch.tensor(3)])
def test_codes_that_are_no_integers_or_have_no_axis_are_refused(codes: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="codes must be integers with at least one axis"):
        layout.pack(codes, 4)


@pytest.mark.parametrize(
    "packed",
    [
        torch.zeros(2, 5, dtype=torch.uint8),
        torch.zeros(2, 6, dtype=torch.int32),
        torch.tensor(0, dtype=torch.uint8),
    ],
)
def test_a_packed_row_of_another_length_or_type_is_refused(packed: torch.Tensor) -> None:
    with pytest.raises(
        ValueError, match=r"13 codes of 3 bits are packed in uint8 \[\.\.\., 6\]; given torch\."
    ):
        layout.unpack(packed, 3, 13)

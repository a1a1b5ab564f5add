"""Trellis codes: layout, levels, encoders, decoding, products on a CPU, and how near the limit."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qsearch_kernels import trellis, trellis_cpu, trellis_encode, trellis_products
from qsearch_kernels.jit import compiled
from qsearch_kernels.reference import linear_wnaxi

needs_numba = pytest.mark.skipif(compiled("trellis_numba") is None, reason="numba not installed")
WIDTHS = [(bits, states) for bits in trellis.BITS for states in trellis.STATES]
#: SQNR in dB that Gaussian numbers must reach, 0.15 dB below what 400 tiles reached; 6.02 dB a bit
#: is the limit
AT_LEAST = {
    (2, 8): 10.7, (2, 10): 10.95, (2, 12): 11.2, (2, 14): 11.35,
    (3, 8): 16.2, (3, 10): 16.7, (3, 12): 17.05, (3, 14): 17.2,
    (4, 8): 21.3, (4, 10): 22.4, (4, 12): 22.8, (4, 14): 23.1,
}  # fmt: skip


def gaussian(tiles: int, bits: int, seed: int = 0) -> torch.Tensor:
    """Gaussian numbers [tiles, 256] in levels, at the scale that suits them."""
    dice = torch.Generator().manual_seed(seed)
    return torch.randn(tiles, 256, generator=dice) * trellis.DEVIATION / trellis.NARROWER[bits]


def decibel(signal: torch.Tensor, made: torch.Tensor) -> float:
    return 10 * math.log10(float(signal.square().sum() / (signal - made).square().sum()))


def some(rows: int, columns: int, bits: int) -> torch.Tensor:
    shape = trellis.packed_shape(rows, columns, bits)
    return torch.randint(
        0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )


def test_no_state_has_a_level_that_int8_does_not_hold_and_levels_are_nearly_gaussian() -> None:
    state = torch.arange(2**14)
    hashed = [(trellis.MULTIPLIER * s + trellis.ADDEND) % 2**32 for s in range(2**14)]
    expected = [sum(h.to_bytes(4, "little")) // 4 - 127 for h in hashed]

    level = trellis.level_of(state)

    assert level.tolist() == expected
    assert -127 <= min(expected) <= max(expected) <= 127
    assert abs(float(level.double().std()) - trellis.DEVIATION) < 0.02 * trellis.DEVIATION


@pytest.mark.parametrize(("bits", "states"), WIDTHS)
def test_any_bytes_are_a_path_and_packing_its_states_gives_them_back(
    bits: int, states: int
) -> None:
    packed = some(40, 20, bits)

    path = trellis.unpack(packed, bits, states)

    assert torch.equal(trellis.pack(path, bits), packed)
    shared = 2 ** (states - bits)
    assert torch.equal(path >> bits, path.roll(-1, -1) % shared)  # tail-biting: the last too


@pytest.mark.parametrize(("rows", "columns"), [(64, 8), (33, 9), (1, 1), (160, 30), (5, 4)])
def test_tiles_are_a_weight_laid_out_again_and_bytes_count_them_whole(
    rows: int, columns: int
) -> None:
    weight = torch.randn(rows, columns)

    tiled = trellis.to_tiles(weight)

    high, (down, across) = trellis.height(rows), trellis.tiles(rows, columns)
    assert torch.equal(trellis.from_tiles(tiled, rows, columns), weight)
    assert tuple(tiled.shape) == (down, across, 4 * high)
    assert torch.equal(tiled[0, 0, : min(4, columns)], weight[0, :4])
    assert float(tiled.sum()) == pytest.approx(float(weight.sum()), abs=1e-3)  # zeros beyond
    for bits in trellis.BITS:
        shape = trellis.packed_shape(rows, columns, bits)
        assert 8 * math.prod(shape) == bits * 4 * high * down * across


def test_tiles_are_about_64_rows_high_and_leave_few_rows_over() -> None:
    for rows in (16, 31, 64, 160, 320, 640, 960, 1152, 1280, 3072, 4608):
        high, (down, _) = trellis.height(rows), trellis.tiles(rows, 4)
        assert high % 8 == 0
        assert rows < 48 or 40 <= high <= 96
        assert high * down - rows < 8 * down
    assert [trellis.height(rows) for rows in (160, 640, 1152)] == [80, 64, 64]


@needs_numba
@pytest.mark.parametrize(("bits", "states"), [w for w in WIDTHS if w[1] < 14])
def test_numba_finds_the_very_codes_that_plain_torch_finds(bits: int, states: int) -> None:
    tiled = gaussian(3, bits).view(3, 1, 256) * torch.tensor([0.2, 1.0, 3.0])[:, None, None]

    for given in (tiled, tiled[..., :160], tiled[..., :64]):
        fast = trellis_encode.encode(given, bits, states)
        assert torch.equal(fast, trellis_encode.encode_slow(given, bits, states))


@needs_numba
def test_tiles_are_shared_out_to_threads_without_a_difference() -> None:
    tiled, threads = gaussian(33, 2), torch.get_num_threads()
    alone = trellis_encode.encode(tiled, 2, 8)

    torch.set_num_threads(2)
    try:
        assert torch.equal(trellis_encode.encode(tiled, 2, 8), alone)
    finally:
        torch.set_num_threads(threads)


@needs_numba
@pytest.mark.parametrize(("bits", "states"), WIDTHS)
def test_gaussian_numbers_come_as_near_the_limit_as_states_allow(bits: int, states: int) -> None:
    tiled = gaussian(40 if states < 14 else 20, bits, seed=3)

    packed = trellis_encode.encode(tiled, bits, states)

    level = trellis.level_of(trellis.unpack(packed, bits, states)).float()
    found = decibel(tiled, level * float((level * tiled).sum() / level.square().sum()))
    assert found >= AT_LEAST[bits, states]
    assert found < 6.02 * bits
    if states == 12:
        assert 6.02 * bits - found <= 1.6


def test_a_short_search_finds_the_best_path_of_all() -> None:
    """Four weights of 4 bits have 2^16 paths that begin in one state; all of them are tried."""
    bits, states, length = 4, 8, 4
    x = torch.tensor([[300, -250, 90, 410]], dtype=torch.int32)
    values = trellis.level_of(torch.arange(2**states)).int() * trellis_encode.FINE

    path = trellis_encode._walk(x, values, bits, states, torch.tensor([5]))

    starts = torch.arange(2 ** (bits * length))
    symbols = [(starts >> (bits * i)) & 15 for i in range(length)]
    state, cost, overlap = torch.full_like(starts, 5), torch.zeros_like(starts), 16
    for t in range(length):
        whole = state * 16 + symbols[t]
        cost += (x[0, t] - values[whole]).square()
        state = whole % overlap
    cost[state != 5] = 2**40
    best = (x[0] - values[path[0]]).square().sum()
    assert int(best) == int(cost.min())


@needs_numba
@pytest.mark.parametrize("bits", trellis.BITS)
@pytest.mark.parametrize(("rows", "columns"), [(64, 8), (45, 19), (3, 5), (160, 1)])
def test_numba_decodes_what_plain_torch_decodes(bits: int, rows: int, columns: int) -> None:
    packed = some(rows, columns, bits)

    made = trellis_cpu.decode_into(packed, bits, 12, torch.empty(rows, columns, dtype=torch.int8))

    assert torch.equal(made, trellis.decode(packed, bits, 12, rows, columns))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "columns"), [(1, 40), (3, 41), (40, 40)])
def test_products_on_a_cpu_are_those_of_the_twin(
    dtype: torch.dtype, rows: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trellis_cpu, "_BYTES", 40 * 72)  # several pieces
    packed, scale = some(170, columns, 3), torch.rand(170) + 0.1
    x, bias = torch.randn(2, rows, columns).to(dtype), torch.randn(170).to(dtype)

    made = trellis_cpu.linear(x, packed, scale, 3, 12, bias)
    expected = trellis_products.linear_trellis(x, packed, scale, 3, 12, bias)

    rounding = 2e-5 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(
        made.float(), expected.float(), rtol=rounding, atol=rounding * float(expected.abs().max())
    )


def test_rounded_products_on_a_cpu_are_those_of_an_int8_weight() -> None:
    packed, scale, x = some(70, 41, 2), torch.rand(70, 1) + 0.1, torch.randn(5, 41)
    codes = (trellis.decode(packed, 2, 12, 70, 41).int() + 128).to(torch.uint8)

    made = trellis_cpu.linear_rounded(x, packed, scale, 2, 12, None, 8)

    expected = linear_wnaxi(x, codes, scale, 128.0, bits=8, columns=41, group=0, activation=8)
    torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-4 * float(expected.abs().max()))


def test_what_is_not_finite_or_not_a_trellis_is_refused_in_words() -> None:
    bad = gaussian(2, 2)
    bad[1, 7] = torch.nan
    with pytest.raises(ValueError, match="needs finite weights and scales"):
        trellis_encode.encode(bad, 2, 8)
    with pytest.raises(ValueError, match=r"given 5 bits and 2\*\*12 states"):
        trellis_encode.encode(gaussian(1, 2), 5, 12)
    with pytest.raises(ValueError, match="a tile has a multiple of 8 weights"):
        trellis_encode.encode(torch.zeros(3, 255), 2, 8)
    with pytest.raises(ValueError, match=r"a weight of 160 x 8 at 2 bits is uint8 \(2, 2, 80\)"):
        trellis.decode(some(64, 8, 2), 2, 12, 160, 8)


def test_weights_far_beyond_all_levels_take_the_outermost_ones() -> None:
    tiled = torch.full((1, 256), 1e6)

    path = trellis.unpack(trellis_encode.encode(tiled, 4, 12), 4, 12)

    assert int(trellis.level_of(path).min()) > 2 * trellis.DEVIATION


@needs_numba
@pytest.mark.slow
def test_nothing_is_written_beside_a_package_that_is_read_only(tmp_path: Path) -> None:
    source = Path(trellis.__file__).parent
    copy = tmp_path / "site" / "qsearch_kernels"
    copy.mkdir(parents=True)
    for path in source.glob("*.py"):
        (copy / path.name).write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    code = (
        "import torch; from qsearch_kernels.trellis_encode import encode; "
        "print(int(encode(torch.zeros(1, 256), 2, 8).sum() >= 0))"
    )
    blocked = copy / "__pycache__"
    blocked.write_text("a file where numba would make its folder", encoding="utf-8")
    env = {
        **os.environ,
        "PYTHONPATH": str(copy.parent),
        "HOME": str(tmp_path),
        "NUMBA_CACHE_DIR": "",
    }
    env |= {"XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONDONTWRITEBYTECODE": "1"}

    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False
    )

    assert done.stdout.strip() == "1", done.stderr[-2000:]
    assert blocked.is_file()

"""Memory layouts of Nunchaku's kernels, as index orders: 4-bit weights, scales, low-rank factors
and AWQ weights.

Facts from the tools' code: deepcompressor's `backend/nunchaku/utils.py` and `tinychat/utils.py`,
diffusers' `quantizers/nunchaku`. A tensor core's tile is 128 rows by 64 columns for W4A4; the
16 x 64 fragments in it are spread over 8 x 4 lanes, and a lane holds 2 x 2 words of 8 codes.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

#: what rows and columns of a W4A4 weight are multiples of: two tiles of columns are loaded at once
TILE = 128
#: weights of a row that share a scale
GROUP = 64


@lru_cache(maxsize=32)
def _words(rows: int, columns: int) -> Tensor:
    """Place in a W4A4 weight [rows, columns] of each of its codes as they lie in memory."""
    at = torch.arange(rows * columns).reshape(rows // TILE, 8, 2, 8, columns // 64, 2, 4, 8)
    return at.permute(0, 4, 1, 3, 6, 2, 5, 7).flatten()


@lru_cache(maxsize=32)
def _scales(rows: int, groups: int) -> Tensor:
    """Place in scales [rows, groups] of each of them as they lie in memory, `groups` runs of a tile
    of rows.
    """
    at = torch.arange(rows * groups).reshape(rows // TILE, 8, 2, 4, 2, groups)
    return at.permute(0, 5, 1, 3, 2, 4).flatten()


@lru_cache(maxsize=32)
def _micro(rows: int, groups: int) -> Tensor:
    """Place in block scales [rows, groups] of each of them: 32 lanes with four rows each, and of a
    row the four blocks that a tile's columns have.
    """
    at = torch.arange(rows * groups).reshape(rows // TILE, 4, 4, 8, groups // 4, 4)
    return at.permute(0, 4, 3, 2, 1, 5).flatten()


@lru_cache(maxsize=32)
def _factors(channels: int, rank: int) -> Tensor:
    """Place in a low-rank factor [channels, rank] in packs of 16 x 16, of the up projection."""
    at = torch.arange(channels * rank).reshape(channels // 16, 2, 8, rank // 16, 2, 4, 2)
    return at.permute(0, 3, 2, 5, 1, 4, 6).flatten()


@lru_cache(maxsize=32)
def _down(channels: int, rank: int) -> Tensor:
    """The same of the down projection, whose packs have the rank along their rows: place in
    [channels, rank].
    """
    at = torch.arange(channels * rank).reshape(channels, rank).T
    at = at.reshape(rank // 16, 2, 8, channels // 16, 2, 4, 2)
    return at.permute(3, 0, 2, 5, 1, 4, 6).flatten()


@lru_cache(maxsize=32)
def _awq(rows: int, columns: int) -> Tensor:
    """Place in an AWQ weight [rows, columns] of each code as it lies in memory: four rows side by
    side, 64 columns at a time, each 32 of them in the order in which a lane widens them.
    """
    at = torch.arange(rows * columns).reshape(rows, columns // 32, 4, 4, 2)
    at = at.transpose(2, 3).reshape(rows, columns // 32, 4, 4, 2)
    at = at.transpose(3, 4).reshape(rows // 4, 4, columns // GROUP, GROUP)
    return at.transpose(1, 2).reshape(rows // 4, columns // GROUP, GROUP, 4).flatten()


def pack_codes(codes: Tensor) -> Tensor:
    """Signed codes [N, K], -8 to 7, as int8 [N, K / 2]."""
    nibbles = codes.flatten().to(torch.int32)[_words(*codes.shape)] & 15
    return _joined(nibbles).view(torch.int8).reshape(len(codes), -1)


def unpack_codes(packed: Tensor) -> Tensor:
    """Inverse of `pack_codes`: int32 [N, K]."""
    rows, columns = packed.shape[0], 2 * packed.shape[1]
    nibbles = _parted(packed.contiguous().view(torch.uint8))
    return _back(torch.where(nibbles > 7, nibbles - 16, nibbles), _words(rows, columns), rows)


def pack_scales(scales: Tensor) -> Tensor:
    """Scales [N, groups] as [groups, N]; a bias or a smoothing factor [N] as [N]."""
    rows, groups = scales.shape[0], scales[0].numel()
    made = scales.flatten()[_scales(rows, groups)]
    return made if scales.ndim == 1 else made.reshape(groups, rows)


def unpack_scales(packed: Tensor) -> Tensor:
    """Inverse of `pack_scales`."""
    rows, groups = packed.shape[-1], packed.numel() // packed.shape[-1]
    made = _back(packed.flatten(), _scales(rows, groups), rows)
    return made.flatten() if packed.ndim == 1 else made


def pack_micro(scales: Tensor) -> Tensor:
    """Scales [N, groups] of NVFP4's blocks as [groups, N]."""
    rows, groups = scales.shape
    return scales.flatten()[_micro(rows, groups)].reshape(groups, rows)


def unpack_micro(packed: Tensor) -> Tensor:
    """Inverse of `pack_micro`."""
    groups, rows = packed.shape
    return _back(packed.flatten(), _micro(rows, groups), rows)


def pack_down(down: Tensor) -> Tensor:
    """A down projection [rank, K] as [K, rank]."""
    rank, channels = down.shape
    return down.T.flatten()[_down(channels, rank)].reshape(channels, rank)


def unpack_down(packed: Tensor) -> Tensor:
    """Inverse of `pack_down`."""
    return _back(packed.flatten(), _down(*packed.shape), len(packed)).T


def pack_up(up: Tensor) -> Tensor:
    """An up projection [N, rank] as [N, rank]."""
    return up.flatten()[_factors(*up.shape)].reshape(up.shape)


def unpack_up(packed: Tensor) -> Tensor:
    """Inverse of `pack_up`."""
    return _back(packed.flatten(), _factors(*packed.shape), len(packed))


def pack_awq(codes: Tensor) -> Tensor:
    """Codes [N, K] from 0 to 15 as int32 [N / 4, K / 2]."""
    nibbles = codes.flatten().to(torch.int32)[_awq(*codes.shape)]
    return _joined(nibbles).reshape(len(codes) // 4, -1)


def unpack_awq(packed: Tensor) -> Tensor:
    """Inverse of `pack_awq`: int32 [N, K]."""
    rows, columns = 4 * packed.shape[0], 2 * packed.shape[1]
    nibbles = _parted(packed.contiguous().view(torch.uint8))
    return _back(nibbles, _awq(rows, columns), rows)


def _joined(nibbles: Tensor) -> Tensor:
    """Eight codes a word, the first in the lowest bits: int32."""
    pairs = nibbles.reshape(-1, 2)
    return (pairs[:, 0] | pairs[:, 1] << 4).to(torch.uint8).view(torch.int32)


def _parted(data: Tensor) -> Tensor:
    data = data.flatten().to(torch.int32)
    return torch.stack([data & 15, data >> 4], 1).flatten()


def _back(values: Tensor, order: Tensor, rows: int) -> Tensor:
    made = torch.empty_like(values)
    made[order] = values
    return made.reshape(rows, -1)

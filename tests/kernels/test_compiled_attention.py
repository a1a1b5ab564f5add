"""The attention kernel as machine code for Hopper: tensor cores, loads ahead of time, no spills."""

from __future__ import annotations

import os

import pytest

pytest.importorskip("triton", reason="triton has wheels for Linux on x86-64 only")

from qsearch_kernels.gpu import attention_specimens, inspection

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"
)

#: the ones that need most registers; the others take as long again
SHORT = {"window32 16 x 72", "window32+qk8 16 x 72 video", "block32 16 x 72"}
CASES = [
    name if name in SHORT else pytest.param(name, marks=pytest.mark.slow)
    for name in attention_specimens.names()
]


@pytest.mark.parametrize("name", CASES)
def test_attention_is_what_hopper_wants(name: str) -> None:
    (launch,) = attention_specimens.specimen(name).launches

    found = inspection.inspect(launch)

    assert found.spills == 0
    assert found.stack == 0
    assert found.shared <= inspection.SHARED_BYTES
    cores = {"HGMMA", "IGMMA"} if "qk8" in name else {"HGMMA"}
    assert found.tensor_cores.keys() == cores
    assert found.instructions["LDGSTS"] >= 16  # loads that run ahead of the products


def test_the_short_list_names_specimens_that_there_are() -> None:
    assert set(attention_specimens.names()) >= SHORT

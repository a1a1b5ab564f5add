"""A packed file of the first version loads for ever, its transforms and ranges under the names that
they had.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qsearch.execute import packed_file
from qsearch.execute.runtime import DequantizeFallbackWarning, packed_layers
from tests.models import CONTEXT, plain, plain_calls

FOLDER = Path(__file__).parents[1] / "golden"
#: what was packed when the files were written, calibrated on three calls whose texts begin alike
LAYERS = {
    "blocks.0.attn1.to_k": "int8-c+a8t~bos~balance",
    "blocks.0.ff.2": "int4-c+a8t~shift~migrate@gptq",
    "blocks.0.ff.0": "uint4-c+a8~balance30",
    "conv_in": "keep+a8c",
    "blocks.0.attn1.to_v": "km3-c",
}


def test_a_packed_file_of_the_first_version_computes_what_it_did() -> None:
    model, graph = plain()
    call = plain_calls(1)[0]
    call.kwargs["context"][:, 0] = 8 * torch.linspace(-1, 1, CONTEXT)

    with pytest.warns(
        DequantizeFallbackWarning, match="no kernel for keep+a8c".replace("+", r"\+")
    ):
        packed_file.load(FOLDER / "packed-1.safetensors", model, graph)

    assert {name: str(layer.scheme) for name, layer in packed_layers(model).items()} == LAYERS
    with torch.no_grad():
        made = model(**call.kwargs)
    expected = load_file(FOLDER / "packed-1.output.safetensors")["output"]
    torch.testing.assert_close(made, expected, rtol=1e-5, atol=2e-6)

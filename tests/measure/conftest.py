"""What tests of metrics share: a CLIP of random weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from qsearch.zoo.painters import MAX_WORDS, new_tokenizer


@pytest.fixture
def clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a CLIP of random weights, named in the environment."""
    torch.manual_seed(0)
    tokenizer = new_tokenizer(causal=True)
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    text = {
        **sizes,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": MAX_WORDS,
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 1,
    }
    CLIPModel(
        CLIPConfig(
            text_config=text,
            vision_config={**sizes, "image_size": 12, "patch_size": 4},
            projection_dim=8,
        )
    ).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    CLIPImageProcessor(
        size={"shortest_edge": 12}, crop_size={"height": 12, "width": 12}
    ).save_pretrained(tmp_path)
    monkeypatch.setenv("QSEARCH_CLIP", str(tmp_path))
    return tmp_path

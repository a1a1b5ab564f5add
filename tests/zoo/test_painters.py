"""What the denoisers' training is told about scenes and sentences, and that the shipped text
encoders can read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.linear_model import LogisticRegression

from qsearch import zoo
from qsearch.zoo import painters, reader, train
from qsearch.zoo.scenes import (
    RELATIONS,
    SHAPES,
    Caption,
    Scenes,
    describe,
    draw_scenes,
    places,
    render,
)


def sentences(count: int, causal: bool, seed: int = 3) -> tuple[list[Caption], Any]:
    """Captions of held-out scenes, and their tokens."""
    generator = torch.Generator().manual_seed(seed)
    captions = describe(draw_scenes(count, generator, held_out=True), generator)
    return captions, painters.new_tokenizer(causal)(
        [c.text for c in captions], padding="longest", return_tensors="pt"
    )


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return draw_scenes(64, torch.Generator().manual_seed(8))


def where_objects_are(scenes: Scenes) -> torch.Tensor:
    """Weights as the training has them: 5 where a latent pixel shows an object, else 1."""
    without = Scenes(**{**vars(scenes), "shape": torch.full_like(scenes.shape, -1)})
    changed = (render(scenes) - render(without)).abs().amax(1, keepdim=True)
    return 1 + 4 * (torch.nn.functional.max_pool2d(changed, 4) > 0.05).float()


def test_each_place_shows_the_object_whose_centre_lies_in_it(scenes: Scenes) -> None:
    seen = painters.visible(scenes, where_objects_are(scenes))
    cell = (places(scenes) // 8).long()
    for k in range(3):
        there = scenes.shape[:, k] >= 0
        # A ring is hollow in the middle and may leave its centre to the background: all others fill
        # it.
        there &= scenes.shape[:, k] != SHAPES.index("ring")
        index = (cell[there, k, 1] * 8 + cell[there, k, 0])[:, None]
        for attribute in ("shape", "colour", "size", "texture"):
            assert torch.equal(
                seen[attribute][there].gather(1, index)[:, 0], getattr(scenes, attribute)[there, k]
            )


def test_where_no_object_is_the_last_class_stands_and_the_background_is_everywhere(
    scenes: Scenes,
) -> None:
    seen = painters.visible(
        scenes, torch.cat([where_objects_are(scenes)[:-1], torch.ones(1, 1, 16, 16)]).clamp(max=5)
    )
    corner = seen["shape"][:, 0]

    assert (seen["shape"][-1] == len(SHAPES)).all()
    assert (
        (corner == len(SHAPES)).float().mean() > 0.9
    )  # no layout has an object in the very corner; a large star's tip may reach it
    assert torch.equal(seen["background"], scenes.background[:, None].expand(-1, 64))


@pytest.mark.parametrize("causal", [True, False])
def test_one_word_stands_for_each_object_in_the_order_of_the_sentence(causal: bool) -> None:
    captions, tokens = sentences(64, causal)
    tokenizer = painters.new_tokenizer(causal)
    found = reader.Reader(tokenizer, causal).carriers(tokens.input_ids)

    for caption, words, row in zip(captions, tokens.input_ids, found, strict=True):
        shapes = [SHAPES[value] for attribute, _, value in caption.named if attribute == "shape"]
        chosen = tokenizer.convert_ids_to_tokens(words[row].tolist())
        if causal:
            assert chosen[0] in RELATIONS
            shapes = shapes[1:]
        assert chosen[causal:] == shapes


@pytest.mark.parametrize("name", zoo.NAMES)
def test_the_shipped_text_encoder_knows_left_from_right_and_each_object_s_colour(name: str) -> None:
    from transformers import AutoConfig, CLIPTextModel, T5EncoderModel

    folder = zoo.folder(name) / "text_encoder"
    causal = AutoConfig.from_pretrained(folder).model_type.startswith("clip")
    encoder = (CLIPTextModel if causal else T5EncoderModel).from_pretrained(folder).eval()
    captions, tokens = sentences(700, causal)
    carriers = reader.Reader(painters.new_tokenizer(causal), causal).carriers(tokens.input_ids)
    with torch.no_grad():
        features = encoder(tokens.input_ids, attention_mask=tokens.attention_mask)[0][
            carriers
        ].numpy()
    order = [k for c in captions for w, k, _ in c.named if w == "shape"]
    colour = [value for c in captions for w, _, value in c.named if w == "colour"]

    for truth in (order, colour):  # chance: 0.4 and 0.125
        probe = LogisticRegression(max_iter=3000).fit(features[::2], truth[::2])
        assert probe.score(features[1::2], truth[1::2]) > 0.98


def test_a_denoiser_s_training_leaves_the_text_encoder_alone(tmp_path: Path) -> None:
    painter = painters.new_dit()
    before = {k: v.clone() for k, v in painter.state_dict().items()}
    words, mask = torch.randint(4, 20, (2, 9)), torch.ones(2, 9)

    def loss(generator: torch.Generator) -> torch.Tensor:
        velocity, logits = painter.paint(
            torch.randn(2, 4, 16, 16, generator=generator), torch.full((2,), 0.7), words, mask
        )
        return velocity.square().mean() + sum(x.square().mean() for x in logits.values())

    train.fit(painter, loss, train.Run(tmp_path, torch.device("cpu"), steps=2, rate=1e-3))

    moved = {k for k, v in painter.state_dict().items() if not torch.equal(v, before[k])}
    assert not any(k.startswith("text_encoder") for k in moved)
    assert {
        "head.weight",
        "denoiser.proj_out.weight",
        "denoiser.transformer_blocks.0.attn2.to_k.weight",
    } <= moved

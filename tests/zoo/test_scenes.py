"""The zoo's world: scenes that come again, splits that do not meet, captions that say nothing but
the truth.
"""

from __future__ import annotations

import re
from dataclasses import fields, replace

import pytest
import torch

from qsearch.zoo.scenes import (
    BACKGROUNDS,
    COLOURS,
    LAYOUTS,
    SHAPES,
    SIZES,
    TEXTURES,
    Caption,
    Scenes,
    describe,
    draw_scenes,
    render,
    vocabulary,
)

NAMES = {
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "size": SIZES,
    "texture": TEXTURES,
    "background": tuple(BACKGROUNDS),
    "layout": tuple(LAYOUTS),
}
Named = set[tuple[str, int, int]]


def dice(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def attributes(scenes: Scenes) -> set[tuple[int, ...]]:
    """What there is to see in each scene, apart from jitter and light."""
    columns = [
        scenes.layout[:, None],
        scenes.background[:, None],
        scenes.colour,
        scenes.shape,
        scenes.size,
        scenes.texture,
    ]
    return {tuple(row) for row in torch.cat(columns, 1).tolist()}


def truth(scenes: Scenes, index: int) -> Named:
    """Every attribute of one scene as (attribute, object or -1, value)."""
    found = {(name, -1, int(getattr(scenes, name)[index])) for name in ("layout", "background")}
    return found | {
        (name, k, int(getattr(scenes, name)[index, k]))
        for name in ("colour", "shape", "size", "texture")
        for k in range(3)
        if scenes.shape[index, k] >= 0
    }


# ------------------------------------------------------------------------------------------- scenes


def test_the_same_seed_draws_and_renders_the_same_pictures() -> None:
    first, second = (render(draw_scenes(16, dice(3))) for _ in range(2))

    assert torch.equal(first, second)
    assert not torch.equal(first, render(draw_scenes(16, dice(4))))


def test_a_picture_does_not_depend_on_its_batch() -> None:
    scenes = draw_scenes(12, dice(0))

    torch.testing.assert_close(
        render(scenes)[5:8], render(scenes[5:8]), rtol=0, atol=1e-5
    )  # vectorised sines differ in the last bits


def test_pictures_have_64_by_64_pixels_in_range() -> None:
    pictures = render(draw_scenes(64, dice(0)))

    assert pictures.shape == (64, 3, 64, 64)
    assert float(pictures.min()) >= -1
    assert float(pictures.max()) <= 1
    assert float(pictures.std()) > 0.3


@pytest.mark.parametrize("name", ["colour", "shape", "size", "texture"])
def test_every_attribute_of_every_object_can_be_seen(name: str) -> None:
    scenes = draw_scenes(200, dice(0))
    before = render(scenes)
    for k in range(3):
        there = scenes.shape[:, k] >= 0
        value = getattr(scenes, name).clone()
        value[:, k] = torch.where(there, (value[:, k] + 1) % len(NAMES[name]), value[:, k])
        seen = (render(replace(scenes, **{name: value})) - before).abs().amax(1).gt(0.2).sum((1, 2))

        # Pixels that differ clearly: at least a dozen where the object is, none where there is no
        # third one.
        assert int(seen[there].min()) >= 12
        assert int(seen[~there].sum()) == 0


def test_edges_are_anti_aliased() -> None:
    still = {
        "layout": torch.tensor([0]),
        "background": torch.tensor([1]),
        "jitter": torch.full((1, 3, 4), 0.5),
        "light": torch.zeros(1, 4),
    }
    scenes = Scenes(
        **still,
        **{
            name: torch.tensor([[v, v, -1]])
            for name, v in {"colour": 7, "shape": 0, "size": 1, "texture": 0}.items()
        },
    )
    row = render(scenes)[0, 0, 32]  # through the middle of a white circle on black

    levels = row[1:17]
    assert float(levels.min()) < -0.7
    assert float(levels.max()) > 0.6
    assert int(((levels > -0.6) & (levels < 0.5)).sum()) >= 1  # a pixel between the two


def test_two_and_three_objects_are_equally_likely() -> None:
    scenes = draw_scenes(8000, dice(0))

    assert float((scenes.shape[:, 2] >= 0).float().mean()) == pytest.approx(
        0.5, abs=0.02
    )  # 3.6 standard errors


def test_training_and_held_out_scenes_do_not_meet() -> None:
    training, held_out = (
        draw_scenes(5000, dice(seed), held_out=split) for seed, split in ((0, False), (1, True))
    )

    assert len(training) == len(held_out) == 5000
    assert attributes(training) & attributes(held_out) == set()
    assert not bool(training.held_out().any())
    assert bool(held_out.held_out().all())


def test_an_eleventh_of_all_scenes_is_held_out() -> None:
    assert float(draw_scenes(20_000, dice(0)).held_out().float().mean()) == pytest.approx(
        1 / 11, abs=0.01
    )


def test_held_out_scenes_show_every_value_of_every_attribute() -> None:
    scenes = draw_scenes(3000, dice(0), held_out=True)

    for name, values in NAMES.items():
        assert set(getattr(scenes, name).flatten().tolist()) - {-1} == set(range(len(values)))


def test_scenes_can_be_cut_and_picked() -> None:
    scenes = draw_scenes(10, dice(0))
    picked = scenes[torch.tensor([7, 2])]

    for field in fields(Scenes):
        assert torch.equal(
            getattr(picked, field.name),
            torch.stack([getattr(scenes, field.name)[i] for i in (7, 2)]),
        )
    assert len(scenes[2:6]) == 4


# ----------------------------------------------------------------------------------------- captions

RELATIONS = {"left of": "row", "to the left of": "row", "right of": "row", "to the right of": "row"}
RELATIONS |= {"above": "column", "over": "column", "below": "column", "under": "column"}
SECOND_FIRST = {"right of", "to the right of", "below", "under"}
APART = {
    "below": "row-below",
    "under": "row-below",
    "above": "row-above",
    "over": "row-above",
    "on the left": "column-left",
    "on the right": "column-right",
}
PHRASES = "|".join(sorted(RELATIONS, key=len, reverse=True))


def thing(words: str, k: int) -> Named:
    """Attributes of "a small red ring", each word in one vocabulary only."""
    article, *rest = words.split()
    assert article == "a"
    found = [
        (name, k, NAMES[name].index(w))
        for w in rest
        for name in ("colour", "shape", "size", "texture")
        if w in NAMES[name]
    ]
    assert len(found) == len(rest) == len({name for name, _, _ in found}), words
    assert found[-1][0] == "shape"
    assert found[-2][0] == "colour"
    return set(found)


def read(text: str) -> Named:
    """What a sentence says, read back with a grammar of its own."""
    named: Named = set()
    layout = ""
    for clause in text.split(" , "):
        if match := re.fullmatch(rf"on ({'|'.join(BACKGROUNDS)})", clause):
            named.add(("background", -1, NAMES["background"].index(match[1])))
        elif match := re.fullmatch(rf"(a [^,]+?) ({PHRASES}) (a [^,]+)", clause):
            assert layout == ""
            layout = RELATIONS[match[2]]
            places = (1, 0) if match[2] in SECOND_FIRST else (0, 1)
            named |= thing(match[1], places[0]) | thing(match[3], places[1])
        elif match := re.fullmatch(rf"(a .+?) ({'|'.join(APART)})", clause):
            named |= thing(match[1], 2)
            layout = f"{APART[match[2]]} {layout}"
        elif match := re.fullmatch(rf"({'|'.join(APART)}) them (a .+)", clause):
            named |= thing(match[2], 2)
            layout = f"{APART[match[1]]} {layout}"
        else:
            raise AssertionError(f"no clause of the grammar: {clause!r} in {text!r}")
    apart, _, relation = layout.rpartition(" ")
    assert apart == "" or apart.split("-")[0] == relation, text
    return named | {("layout", -1, NAMES["layout"].index(apart or relation))}


@pytest.fixture(scope="module")
def described() -> tuple[Scenes, list[Caption]]:
    """5,000 scenes with a caption each."""
    generator = dice(0)
    scenes = draw_scenes(5000, generator)
    return scenes, describe(scenes, generator)


def test_captions_say_what_they_claim_to_name(described: tuple[Scenes, list[Caption]]) -> None:
    _, captions = described

    assert [
        c.text
        for c in captions
        if read(c.text) != set(c.named) or len(set(c.named)) != len(c.named)
    ] == []


def test_captions_say_nothing_but_the_truth(described: tuple[Scenes, list[Caption]]) -> None:
    scenes, captions = described

    assert [c.text for i, c in enumerate(captions) if not read(c.text) <= truth(scenes, i)] == []


def test_captions_always_name_layout_colours_and_shapes(
    described: tuple[Scenes, list[Caption]],
) -> None:
    scenes, captions = described
    always = {"layout", "colour", "shape"}

    assert [
        c.text
        for i, c in enumerate(captions)
        if {x for x in truth(scenes, i) if x[0] in always}
        != {x for x in read(c.text) if x[0] in always}
    ] == []


@pytest.mark.parametrize("name", ["size", "texture", "background"])
def test_captions_name_the_rest_three_times_in_four(
    described: tuple[Scenes, list[Caption]], name: str
) -> None:
    scenes, captions = described
    there = sum(len({x for x in truth(scenes, i) if x[0] == name}) for i in range(len(captions)))

    assert sum(w == name for c in captions for w, _, _ in c.named) / there == pytest.approx(
        0.75, abs=0.03
    )


def test_a_left_of_b_and_b_right_of_a_name_the_same_attributes() -> None:
    scenes = draw_scenes(40, dice(1))
    said: dict[tuple[int, frozenset[tuple[str, int, int]]], set[bool]] = {}
    for seed in range(60):
        for i, caption in enumerate(describe(scenes, dice(seed))):
            phrase = re.search(rf" ({PHRASES}) a ", caption.text)
            assert phrase is not None
            said.setdefault((i, frozenset(caption.named)), set()).add(phrase[1] in SECOND_FIRST)

    # The same scene with the same set of named attributes, told from either object: both ways occur
    # for most.
    assert sum(ways == {True, False} for ways in said.values()) > 100


def test_a_scene_is_described_in_many_ways() -> None:
    scenes = draw_scenes(1, dice(1))

    assert len({describe(scenes, dice(seed))[0].text for seed in range(50)}) > 40


def test_the_vocabulary_is_every_word_of_5000_captions_and_no_other(
    described: tuple[Scenes, list[Caption]],
) -> None:
    _, captions = described

    assert {word for c in captions for word in c.text.split()} == set(vocabulary())
    assert list(vocabulary()) == sorted(set(vocabulary()))


def test_no_word_means_two_things() -> None:
    words = [w for values in NAMES.values() for w in values]

    assert len(words) == len(set(words))

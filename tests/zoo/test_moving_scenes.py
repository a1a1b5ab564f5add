"""The moving world: clips that come again, things that move as told, captions that are true."""

from __future__ import annotations

import re
from dataclasses import fields

import pytest
import torch

from qsearch.zoo.moving_scenes import (
    EVENTS,
    FRAMES,
    LAYOUTS,
    MOTIONS,
    SPEEDS,
    Clips,
    covered,
    describe,
    draw_clips,
    radii,
    render,
    tracks,
    vocabulary,
)
from qsearch.zoo.scenes import BACKGROUNDS, COLOURS, SHAPES, SIZES, Caption

Named = set[tuple[str, int, int]]
#: pixels a frame, faster than slow and slower than fast
BETWEEN_SPEEDS = 2.0
OF_OBJECTS = ("colour", "shape", "size", "motion", "speed", "event")


def dice(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def many() -> Clips:
    """3,000 clips of both splits."""
    return draw_clips(3000, dice(0))


# ---------------------------------------------------------------------------------------- the clips


def test_the_same_seed_draws_and_renders_the_same_clips() -> None:
    first, second = (render(draw_clips(4, dice(3))) for _ in range(2))

    assert torch.equal(first, second)
    assert not torch.equal(first, render(draw_clips(4, dice(4))))


def test_a_clip_has_15_frames_of_64_by_64_pixels_in_range_whatever_its_batch() -> None:
    clips = draw_clips(8, dice(0))
    whole = render(clips)

    assert whole.shape == (8, 3, FRAMES, 64, 64) == (8, 3, 15, 64, 64)
    assert -1 <= float(whole.min()) < float(whole.max()) <= 1
    torch.testing.assert_close(
        whole[3:5], render(clips[3:5]), rtol=0, atol=1e-4
    )  # sums in another order


def test_some_frames_alone_are_those_of_the_whole_clip_and_a_longer_clip_goes_on() -> None:
    clips = draw_clips(6, dice(1))
    index = torch.randint(FRAMES, (6, 3), generator=dice(2))
    whole, some, longer = render(clips), render(clips, index), render(clips, 17)

    for i in range(6):
        torch.testing.assert_close(some[i], whole[i][:, index[i]], rtol=0, atol=1e-4)
    torch.testing.assert_close(longer[:, :, :FRAMES], whole, rtol=0, atol=1e-4)


def test_objects_move_the_way_and_as_fast_as_their_attributes_say(many: Clips) -> None:
    step = tracks(many).diff(dim=1).mean(1)  # pixels a frame, [N, 2, 2]
    there = many.shape >= 0
    ways = torch.tensor([[0.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [0.0, -1.0], [0.0, 1.0]])
    pace = step.norm(dim=-1)

    for motion in range(len(MOTIONS)):
        of = there & (many.motion == motion)
        assert int(of.sum()) > 100
        torch.testing.assert_close(step[of], pace[of][:, None] * ways[motion], rtol=0, atol=1e-4)
    assert float(pace[there & (many.motion == 0)].max()) == 0
    assert (
        float(pace[there & (many.speed == 0)].max())
        < BETWEEN_SPEEDS
        < float(pace[there & (many.speed == 1)].min())
    )


def test_what_enters_is_half_hidden_first_and_what_leaves_last_and_all_others_stay(
    many: Clips,
) -> None:
    place, there, r = tracks(many), many.shape >= 0, radii(many)

    def outside(frame: int) -> torch.Tensor:
        """How far beyond the picture's edge an object's centre lies, in radii."""
        return (torch.maximum(-place[:, frame], place[:, frame] - 64).amax(-1)) / r

    entering, leaving = there & (many.event == 1), there & (many.event == 2)
    assert min(int(entering.sum()), int(leaving.sum())) > 200
    assert float(outside(0)[entering].min()) > 0 > float(outside(14)[entering].max())
    assert float(outside(14)[leaving].min()) > 0 > float(outside(0)[leaving].max())
    inside = there & (many.event == 0)
    assert max(float(outside(f)[inside].max()) for f in (0, 7, 14)) < 0


def test_what_passes_behind_is_covered_by_the_one_in_front(many: Clips) -> None:
    behind = many[torch.nonzero(many.layout == LAYOUTS.index("behind")).flatten()]
    cells = covered(behind, torch.arange(FRAMES).expand(len(behind), -1), 2).flatten(2)
    seen = (cells == 0).sum(-1).float()

    assert bool((behind.motion[:, 0] > 0).all())
    assert bool((behind.motion[:, 1] == 0).all())
    assert float((seen.amin(1) / seen.amax(1)).mean()) < 0.5
    assert int(seen.amax(1).min()) > 8  # and is to be seen before or after


def test_two_objects_in_lanes_of_their_own_never_touch(many: Clips) -> None:
    apart = many[torch.nonzero((many.layout == 1) | (many.layout == 2)).flatten()]
    distance = (tracks(apart)[:, :, 0] - tracks(apart)[:, :, 1]).norm(dim=-1)

    # A large star reaches 1.12 radii: two of them, and a pixel between.
    assert float((distance.amin(1) - radii(apart).sum(1)).min()) > 1


def test_still_clips_stand_still_and_moving_ones_do_not() -> None:
    clips = draw_clips(300, dice(5))
    difference = render(clips).diff(dim=2).abs().amax((1, 2, 3, 4))
    moves = (clips.motion > 0).any(1)

    assert int((~moves).sum()) > 20
    assert float(difference[~moves].max()) < 1e-4
    assert float(difference[moves].min()) > 0.2


def test_training_and_held_out_clips_do_not_meet_and_a_tenth_is_held_out(many: Clips) -> None:
    def attributes(clips: Clips) -> set[tuple[int, ...]]:
        columns = [
            clips.layout[:, None],
            clips.background[:, None],
            *(getattr(clips, a) for a in OF_OBJECTS),
        ]
        return {tuple(row) for row in torch.cat(columns, 1).tolist()}

    training, held_out = (
        draw_clips(1000, dice(s), held_out=split) for s, split in ((0, False), (1, True))
    )
    assert len(training) == len(held_out) == 1000
    assert attributes(training) & attributes(held_out) == set()
    assert float(many.held_out().float().mean()) == pytest.approx(1 / 11, abs=0.025)


def test_clips_can_be_cut_and_picked(many: Clips) -> None:
    picked = many[torch.tensor([7, 2])]

    for field in fields(Clips):
        assert torch.equal(getattr(picked, field.name), getattr(many, field.name)[[7, 2]])
    assert len(many[2:6]) == 4


# ------------------------------------------------------------------------------------- the captions

SECOND_FIRST = {"right of", "to the right of", "below", "under", "in front of"}
RELATIONS = {
    "above": 1,
    "over": 1,
    "below": 1,
    "under": 1,
    "left of": 2,
    "to the left of": 2,
    "right of": 2,
}
RELATIONS |= {"to the right of": 2, "behind": 3, "in front of": 3}
DIRECTIONS = {
    "from the right": "left",
    "from the left": "right",
    "from below": "up",
    "from above": "down",
}
DIRECTIONS |= {"to the left": "left", "to the right": "right", "upwards": "up", "downwards": "down"}
DIRECTIONS |= {m: m for m in MOTIONS[1:]}
VERBS = {"moving": "inside", "entering": "entering", "leaving": "leaving"}


def thing(words: str, k: int) -> Named:
    """Attributes of "a small red ring entering from the left , fast"."""
    match = re.fullmatch(r"a (?:(still) )?(?:(small|large) )?(\w+) (\w+)(?: (.+?))?(?: ,)?", words)
    assert match is not None, words
    still, size, colour, shape, how = match.groups()
    named: Named = {("colour", k, tuple(COLOURS).index(colour)), ("shape", k, SHAPES.index(shape))}
    if size:
        named.add(("size", k, SIZES.index(size)))
    if still or how == "standing still":
        assert (still is None) != (how is None), words
        return named | {("motion", k, 0)}
    verb, _, rest = how.partition(" ")
    pace = re.findall(r"slowly|fast", rest)
    where = re.sub(r"slowly|fast|,", " ", rest).split()
    assert len(pace) == 1, words
    motion = MOTIONS.index(DIRECTIONS[" ".join(where)])
    speed = SPEEDS.index("slow" if pace == ["slowly"] else "fast")
    return named | {
        ("motion", k, motion),
        ("speed", k, speed),
        ("event", k, EVENTS.index(VERBS[verb])),
    }


def read(text: str) -> Named:
    """What a sentence says, read back with a grammar of its own."""
    named: Named = set()
    if match := re.search(
        rf" , on ({'|'.join(BACKGROUNDS)})$|^on ({'|'.join(BACKGROUNDS)}) , ", text
    ):
        named.add(("background", -1, tuple(BACKGROUNDS).index(match[1] or match[2])))
        text = text.replace(match[0], "")
    phrases = "|".join(sorted(RELATIONS, key=len, reverse=True))
    if match := re.fullmatch(rf"(a .+?) ({phrases}) (a .+)", text):
        first, second = (1, 0) if match[2] in SECOND_FIRST else (0, 1)
        return (
            named
            | thing(match[1], first)
            | thing(match[3], second)
            | {("layout", -1, RELATIONS[match[2]])}
        )
    return named | thing(text, 0) | {("layout", -1, 0)}


@pytest.fixture(scope="module")
def captions(many: Clips) -> list[Caption]:
    return describe(many, dice(9))


def test_captions_say_what_they_claim_to_name(captions: list[Caption]) -> None:
    assert [
        c.text
        for c in captions
        if read(c.text) != set(c.named) or len(set(c.named)) != len(c.named)
    ] == []


def test_captions_say_nothing_but_the_truth(many: Clips, captions: list[Caption]) -> None:
    wrong = []
    for i, caption in enumerate(captions):
        for attribute, k, value in read(caption.text):
            column = getattr(many, attribute)[i]
            wrong += [caption.text] if int(column if k < 0 else column[k]) != value else []
    assert wrong == []


def test_captions_always_name_layout_colour_shape_and_motion_and_the_speed_of_what_moves(
    many: Clips, captions: list[Caption]
) -> None:
    for i, caption in enumerate(captions):
        told = {(attribute, k) for attribute, k, _ in caption.named}
        objects = [k for k in range(2) if many.shape[i, k] >= 0]
        assert {("layout", -1)} | {
            (a, k) for a in ("colour", "shape", "motion") for k in objects
        } <= told
        assert {k for a, k in told if a == "speed"} == {k for k in objects if many.speed[i, k] >= 0}


@pytest.mark.parametrize("name", ["size", "background"])
def test_captions_name_the_rest_three_times_in_four(
    many: Clips, captions: list[Caption], name: str
) -> None:
    there = int((many.shape >= 0).sum()) if name == "size" else len(many)

    assert sum(a == name for c in captions for a, _, _ in c.named) / there == pytest.approx(
        0.75, abs=0.03
    )


def test_the_vocabulary_is_every_word_of_3000_captions_and_no_other(
    captions: list[Caption],
) -> None:
    assert {word for c in captions for word in c.text.split()} == set(vocabulary())


def test_a_clip_is_described_in_many_ways(many: Clips) -> None:
    one = many[:1]

    assert len({describe(one, dice(seed))[0].text for seed in range(50)}) >= 10

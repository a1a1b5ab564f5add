"""Pictures: grids that come back, files that are none, and a contact sheet that shows the worst."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from qsearch.core.errors import ArtifactError, QSearchError
from qsearch.report.pictures import (
    Sample,
    are_clips,
    choose_samples,
    contact_sheet,
    load_pictures,
    picture_path,
    pictures_of,
    resized,
    save_pictures,
    worst_first,
)
from tests.report.synthetic import CAPTIONS, PLANS, SIZE, colour, save_run

LABELS = {name: f"{name}\n4.00 bits" for name in PLANS}
ORDER = [
    0,
    1,
    2,
    3,
    5,
    9,
    8,
    7,
]  # the first four, then those of the others where plan 2 is off by most


def solid(*values: int) -> np.ndarray:
    return np.array([[[[v, v, v]]] for v in values], dtype=np.uint8)


@pytest.mark.parametrize(
    "shape",
    [(1, 3, 4, 4), (12, 3, 4, 4), (29, 3, 5, 7)],
    ids=["one", "a whole row", "a ragged last row, not square"],
)
def test_pictures_come_back_from_their_grid(tmp_path: Path, shape: tuple[int, ...]) -> None:
    bytes_ = torch.randint(0, 256, shape)

    save_pictures(tmp_path / "grid.png", bytes_ / 127.5 - 1)

    np.testing.assert_array_equal(
        load_pictures(tmp_path / "grid.png"), bytes_.permute(0, 2, 3, 1).numpy()
    )


def test_clips_are_kept_as_four_frames_in_reading_order(tmp_path: Path) -> None:
    clips = torch.linspace(-1, 1, 13).reshape(1, 13, 1, 1, 1).expand(2, 13, 3, 4, 6)

    save_pictures(tmp_path / "clips.png", clips)

    made = load_pictures(tmp_path / "clips.png")
    assert made.shape == (2, 8, 12, 3)
    assert are_clips(tmp_path / "clips.png")
    corners = [made[0, y, x, 0] for y in (0, 7) for x in (0, 11)]
    assert corners == sorted(corners)
    assert corners[0] == 0
    assert corners[-1] == 255
    assert len(set(corners)) == 4


def test_values_out_of_range_are_cut_to_black_and_white(tmp_path: Path) -> None:
    save_pictures(
        tmp_path / "grid.png", torch.tensor([-3.0, 0.0, 3.0]).view(3, 1, 1, 1).expand(3, 3, 2, 2)
    )

    assert load_pictures(tmp_path / "grid.png")[:, 0, 0, 0].tolist() == [0, 128, 255]


def test_pictures_that_were_not_made_name_the_verb_that_makes_them(tmp_path: Path) -> None:
    with pytest.raises(
        ArtifactError, match=r"none\.png does not exist; make it with `qsearch evaluate`"
    ):
        load_pictures(tmp_path / "none.png")


def test_a_picture_of_somebody_else_is_refused(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "other.png")

    with pytest.raises(
        ArtifactError,
        match=r"other\.png is not a grid of pictures .*; remove it and evaluate again",
    ):
        load_pictures(tmp_path / "other.png")


def test_a_truncated_grid_is_refused(tmp_path: Path) -> None:
    save_pictures(tmp_path / "grid.png", torch.rand(30, 3, 16, 16))
    (tmp_path / "grid.png").write_bytes((tmp_path / "grid.png").read_bytes()[:5000])

    with pytest.raises(ArtifactError, match="is not a grid of pictures"):
        load_pictures(tmp_path / "grid.png")


def test_the_worst_comes_first_and_equals_keep_their_order() -> None:
    assert worst_first(solid(10, 10, 10, 10), solid(10, 7, 14, 13)) == [2, 1, 3, 0]


def test_differences_do_not_wrap_around_at_a_byte() -> None:
    assert worst_first(solid(0, 0), solid(100, 255)) == [1, 0]


def test_the_first_come_as_they_are_and_the_worst_from_the_rest() -> None:
    chosen = choose_samples(solid(0, 0, 0, 0, 0), solid(9, 1, 4, 2, 3), first=2, worst=2)

    assert chosen == [
        Sample(0, 1, False),
        Sample(1, 5, False),
        Sample(2, 2, True),
        Sample(4, 3, True),
    ]


def test_fewer_samples_than_columns_are_all_shown_once() -> None:
    assert [s.index for s in choose_samples(solid(0, 0, 0, 0, 0), solid(1, 2, 3, 4, 5))] == [
        0,
        1,
        2,
        3,
        4,
    ]


@pytest.mark.parametrize(
    ("size", "expected"), [((64, 64), (128, 128)), ((48, 32), (96, 64)), ((300, 150), (128, 64))]
)
def test_small_pictures_grow_by_whole_numbers_and_large_ones_shrink(
    size: tuple[int, int], expected: tuple[int, int]
) -> None:
    w, h = size

    assert resized(np.zeros((h, w, 3), np.uint8), 128).size == expected


def test_growing_repeats_pixels_and_invents_none() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)

    np.testing.assert_array_equal(
        np.asarray(resized(picture, 8)), picture.repeat(2, 0).repeat(2, 1)
    )


def read(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def place(sheet: np.ndarray, wanted: tuple[int, int, int]) -> tuple[int, int, int]:
    """Left, top and number of the pixels of a colour."""
    y, x = np.nonzero((sheet == wanted).all(-1))
    return int(x.min()), int(y.min()), len(x)


def test_the_contact_sheet_has_a_row_a_plan_and_a_column_a_sample(tmp_path: Path) -> None:
    save_run(tmp_path)

    samples = contact_sheet(tmp_path / "sheet.png", tmp_path, LABELS, CAPTIONS)

    sheet = read(tmp_path / "sheet.png")
    assert [s.index for s in samples] == ORDER
    places = [[place(sheet, colour(p, i)) for i in ORDER] for p in range(len(PLANS))]
    tile = SIZE * (128 // SIZE)
    assert {count for row in places for _, _, count in row} == {tile * tile}
    lefts, tops = [p[0] for p in places[0]], [row[0][1] for row in places]
    assert [[(x, y) for x, y, _ in row] for row in places] == [
        [(x, y) for x in lefts] for y in tops
    ]
    assert min(np.diff(lefts)) > tile
    assert min(np.diff(tops)) > tile
    height, width, _ = sheet.shape
    assert 8 * tile < width < 10 * tile
    assert 4 * tile < height < 6 * tile


def test_the_worst_cases_are_framed_in_the_row_of_the_plan_alone(tmp_path: Path) -> None:
    save_run(tmp_path)
    contact_sheet(tmp_path / "sheet.png", tmp_path, LABELS, CAPTIONS)

    sheet = read(tmp_path / "sheet.png")

    def framed(plan: int, index: int) -> bool:
        x, y, _ = place(sheet, colour(plan, index))
        return bool((sheet[y, x - 2] == (0xB3, 0x4A, 0x00)).all())

    assert [[i for i in ORDER if framed(p, i)] for p in range(len(PLANS))] == [
        [],
        [],
        ORDER[4:],
        [],
    ]


def test_a_long_caption_is_wrapped_and_cut(tmp_path: Path) -> None:
    save_run(tmp_path)
    heights = []

    for name, captions in (
        ("short", ["a ring"] * 10),
        ("long", ["word " * 20] * 10),
        ("endless", ["w" * 5000] * 10),
    ):
        contact_sheet(tmp_path / f"{name}.png", tmp_path, LABELS, captions)
        heights.append(len(read(tmp_path / f"{name}.png")))

    assert heights[0] < heights[1] <= heights[2] < heights[0] + 100


def test_the_same_pictures_make_the_same_sheet(tmp_path: Path) -> None:
    save_run(tmp_path)

    for name in ("a.png", "b.png"):
        contact_sheet(tmp_path / name, tmp_path, LABELS, CAPTIONS)

    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_sheet_without_the_plan_is_refused(tmp_path: Path) -> None:
    save_run(tmp_path)

    with pytest.raises(
        QSearchError,
        match="needs the pictures of 'plan' and of 'full precision'; 'plan' is not among its rows",
    ):
        contact_sheet(tmp_path / "sheet.png", tmp_path, {"full precision": "full"}, CAPTIONS)


def test_a_sheet_with_too_few_captions_is_refused(tmp_path: Path) -> None:
    save_run(tmp_path)

    with pytest.raises(QSearchError, match="a caption for each picture; given 3 for 10 pictures"):
        contact_sheet(tmp_path / "sheet.png", tmp_path, LABELS, CAPTIONS[:3])


def test_pictures_of_different_samples_are_refused(tmp_path: Path) -> None:
    save_run(tmp_path)
    save_pictures(picture_path(tmp_path, "random"), torch.zeros(3, 3, SIZE, SIZE))

    with pytest.raises(ArtifactError, match="must be of the same samples"):
        contact_sheet(tmp_path / "sheet.png", tmp_path, LABELS, CAPTIONS)
    assert not (tmp_path / "sheet.png").exists()


def test_a_sheet_that_cannot_be_written_is_one_clear_line(
    tmp_path: Path, blocked_folder: Path
) -> None:
    save_run(tmp_path)

    with pytest.raises(QSearchError, match=r"cannot write .*sheet\.png"):
        contact_sheet(blocked_folder / "sheet.png", tmp_path, LABELS, CAPTIONS)


def test_a_grid_larger_than_a_stranger_s_picture_may_be_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "plan.png"
    save_pictures(path, torch.zeros(30, 3, 8, 8), of="a plan")
    limit = 100  # pixels; PIL refuses what has twice as many, and warns of what has more
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pictures_of(path) == "a plan"
        assert load_pictures(path).shape == (30, 8, 8, 3)

    assert Image.MAX_IMAGE_PIXELS == limit

"""Schemes: strings that come back as they went in, stored bits by hand and against published ones,
errors that teach.
"""

from __future__ import annotations

import itertools
import math
import subprocess
import sys

import pytest

from qsearch.core.errors import QSearchError
from qsearch.core.format_words import format_word, formats, input_formats
from qsearch.core.plan_version_1 import split_steps
from qsearch.core.scheme import KEEP, Scheme

BLOCKS = ("cb4", "mxfp4", "mxfp6", "mxfp8", "nvfp4")


def every_string() -> list[str]:
    """All combinations of format, granularity, activation, grain and method that the grammar
    allows.
    """
    out = []
    grains = ("", "t", "c", "g32", "g128")
    activations = [
        f"+a{a}{grain}" for a in input_formats() for grain in (("",) if a in BLOCKS else grains)
    ]
    activations.insert(0, "")
    for form in formats():
        sizes = getattr(format_word(form), "sizes", "")
        ends = {"t": ["-t"], "c": ["-c"], "g": ["-g1", "-g32", "-g128"]}
        granularities = [end for size in sizes for end in ends[size]] or [""]
        methods = [""] if form == "keep" else ["", "@hqq", "@ada_round2"]
        out += [
            form + "".join(rest) for rest in itertools.product(granularities, activations, methods)
        ]
        out += [
            f"{form}{granularities[-1]}+a8t{transforms}{methods[-1]}"
            for transforms in ("~balance30", "~shift~migrate", "~bos", "~bos~balance~shift")
        ]
    return out


def test_every_canonical_string_comes_back_as_it_went_in() -> None:
    strings = every_string()

    assert [str(Scheme.parse(text)) for text in strings] == strings


def test_every_scheme_parses_to_itself_again_and_no_two_strings_mean_the_same() -> None:
    schemes = [Scheme.parse(text) for text in every_string()]

    assert [Scheme.parse(str(s)) for s in schemes] == schemes
    assert len(set(schemes)) == len(schemes)


@pytest.mark.parametrize(
    ("short", "canonical"),
    [
        ("int4", "int4-c"),
        ("e2m1@hqq", "e2m1-c@hqq"),
        ("km3+a8", "km3-c+a8"),
        ("keep", "keep"),
        ("int4+a8~balance50", "int4-c+a8~balance"),
    ],
)
def test_what_may_be_left_out_has_one_canonical_form(short: str, canonical: str) -> None:
    assert str(Scheme.parse(short)) == canonical


def test_a_scheme_passes_through_parse_unchanged() -> None:
    assert Scheme.parse(KEEP) is KEEP


@pytest.mark.parametrize(
    ("text", "bits", "activation_bits", "family"),
    [
        ("keep", 16, 16, "keep"),
        ("keep+a8", 16, 8, "keep"),
        ("int3-g64", 3, 16, "int"),
        ("uint8-c+a6t", 8, 6, "uint"),
        ("e3m2-c+ae2m3", 6, 6, "float"),
        ("e4m3-t+ae4m3t", 8, 8, "float"),
        ("km4-c", 4, 16, "codebook"),
        ("mxfp6", 6, 16, "block"),
        ("nvfp4", 4, 16, "block"),
    ],
)
def test_a_scheme_knows_its_bits_and_its_family(
    text: str, bits: int, activation_bits: int, family: str
) -> None:
    scheme = Scheme.parse(text)

    assert (scheme.bits, scheme.activation_bits, scheme.family) == (bits, activation_bits, family)


def test_weight_only_drops_the_activation_and_nothing_else() -> None:
    assert str(Scheme.parse("int4-g64+a8t~balance@hqq").weight_only) == "int4-g64@hqq"


@pytest.mark.parametrize(
    ("text", "shape", "axis", "bits"),
    [
        ("keep", (6, 10), 0, 16 * 60),
        ("int4-c", (6, 10), 0, 4 * 60 + 6 * 16),
        ("uint4-c", (6, 10), 0, 4 * 60 + 6 * 32),
        ("int4-t", (6, 10), 0, 4 * 60 + 16),
        (
            "int4-g4",
            (6, 10),
            0,
            4 * 60 + 6 * 3 * 16,
        ),  # 10 = 4 + 4 + 2: the last group has a scale, and no codes but its own
        ("int4-g64", (6, 10), 0, 4 * 60 + 6 * 16),
        ("int2-c", (6, 5, 3, 3), 0, 2 * 270 + 6 * 16),
        (
            "int2-c",
            (6, 5, 3, 3),
            1,
            2 * 270 + 5 * 16,
        ),  # a transposed convolution has its output channels on axis 1
        ("km2-c", (6, 10), 0, 2 * 60 + 6 * 4 * 16),
        ("km2-t", (6, 10), 0, 2 * 60 + 4 * 16),
        ("km2-g4", (6, 10), 0, 2 * 60 + 18 * 4 * 16),
        ("mxfp4", (6, 32), 0, 4 * 192 + 6 * 8),
        ("mxfp4", (6, 33), 0, 4 * 198 + 12 * 8),
        ("nvfp4", (6, 32), 0, 4 * 192 + 12 * 8 + 32),
        ("cb4", (6, 40), 0, 4 * 240 + 18 * 8 + 6 * 16),
        (
            "int4-c+a8~balance30",
            (6, 10),
            0,
            4 * 60 + 6 * 16 + 10 * 16,
        ),  # a number for each input channel
        ("int4-c+a8t~shift~migrate", (6, 10), 0, 4 * 60 + 6 * 16 + 2 * 10 * 16),
        (
            "int4-c+a8t~bos",
            (6, 10),
            0,
            4 * 60 + 6 * 16 + 6 * 16,
        ),  # a number for each output channel
        ("keep+a8t~balance", (6, 10), 0, 16 * 60 + 10 * 16),
        ("int4-c+a8~balance", (6, 10), 1, 4 * 60 + 10 * 16 + 6 * 16),
    ],
)
def test_stored_bits_count_codes_scales_zeros_and_codebooks(
    text: str, shape: tuple[int, ...], axis: int, bits: int
) -> None:
    assert Scheme.parse(text).stored_bits(shape, axis) == bits


@pytest.mark.parametrize(
    ("text", "shape", "axis", "splits", "bits"),
    [
        ("uint4-c", (6, 10), 0, (4, 6), 4 * 60 + 2 * 6 * 32),
        ("int4-c", (10, 6, 3, 3), 1, (4, 6), 4 * 540 + 2 * 6 * 16),
        ("km2-t", (6, 10), 0, (4, 6), 2 * 60 + 2 * 4 * 16),
        (
            "int4-g4",
            (6, 10),
            0,
            (5, 5),
            4 * 60 + 6 * 4 * 16,
        ),  # groups do not reach over the seam: 4 + 1, twice
        ("keep", (6, 10), 0, (4, 6), 16 * 60),
    ],
)
def test_each_part_of_a_concatenated_input_is_charged_its_own_scales(
    text: str, shape: tuple[int, ...], axis: int, splits: tuple[int, ...], bits: int
) -> None:
    assert Scheme.parse(text).stored_bits(shape, axis, splits) == bits


@pytest.mark.parametrize(
    ("text", "shape", "bits"),
    [
        ("int4-g4", (6, 10), 4 * 6 * 12 + 6 * 3 * 16),
        ("mxfp4", (6, 33), 4 * 6 * 64 + 12 * 8),
        ("km2-g4", (6, 10), 2 * 60 + 18 * 4 * 16),
        ("int4-g5", (6, 10), 4 * 60 + 192),
    ],
)
def test_files_of_before_say_what_filled_groups_would_take(
    text: str, shape: tuple[int, ...], bits: int
) -> None:
    assert Scheme.parse(text).stored_bits(shape, filled=True) == bits


def test_activations_and_methods_change_no_stored_bits() -> None:
    plain = Scheme.parse("uint4-g8").stored_bits((7, 30))

    assert Scheme.parse("uint4-g8+a8c@hqq").stored_bits((7, 30)) == plain


@pytest.fixture(scope="module")
def pixart_shapes() -> list[tuple[int, ...]]:
    """Weights of PixArt-alpha's linear layers and convolutions, from the real class on the meta
    device.
    """
    import torch
    from diffusers import PixArtTransformer2DModel

    with torch.device("meta"):
        model = PixArtTransformer2DModel(
            caption_channels=4096, cross_attention_dim=1152, sample_size=64
        )
    return [
        tuple(m.weight.shape)
        for m in model.modules()
        if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)
    ]


@pytest.mark.reference
def test_pixart_alpha_has_the_published_number_of_weights(
    pixart_shapes: list[tuple[int, ...]],
) -> None:
    assert len(pixart_shapes) == 287
    assert sum(math.prod(shape) for shape in pixart_shapes) == 610_228_224


@pytest.mark.reference
@pytest.mark.parametrize(
    ("text", "published"),
    [
        ("uint4-c", 4.023),
        ("uint3-c", 3.023),
        ("km4-c", 4.181),
        ("km3-c", 3.091),
        ("km4-t", 4.000),
        ("km3-t", 3.000),
    ],
)
def test_uniform_plans_of_pixart_alpha_take_the_bits_that_qua2sedimo_publishes(
    pixart_shapes: list[tuple[int, ...]], text: str, published: float
) -> None:
    bits = sum(Scheme.parse(text).stored_bits(shape) for shape in pixart_shapes)

    assert round(bits / 610_228_224, 3) == published


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("int9-c", "did you mean 'int8'?"),
        ("itn4-c", "did you mean 'int4'?"),
        ("km5-c", "did you mean 'km4'?"),
        ("int4-c+a5", "activation '5'"),
        ("int4-c+a", "FORMAT[-t|-c|-gN][+aBITS][~TRANSFORM][@METHOD]"),
        ("int4-g0", "FORMAT[-t|-c|-gN][+aBITS][~TRANSFORM][@METHOD]"),
        ("int4-g" + "9" * 5000, "FORMAT[-t|-c|-gN][+aBITS][~TRANSFORM][@METHOD]"),
        ("int4 -c", "FORMAT[-t|-c|-gN][+aBITS][~TRANSFORM][@METHOD]"),
        ("", "FORMAT[-t|-c|-gN][+aBITS][~TRANSFORM][@METHOD]"),
        ("keep-c", "write 'keep'"),
        ("mxfp4-g32+a8", "write 'mxfp4+a8'"),
        ("keep@hqq", "takes no method"),
        ("keep~balance", "rounds nothing"),
        ("int4-c+a8~balence", "did you mean 'balance'?"),
        ("int4-c+a8~shift3", "~shift takes no number"),
        ("int4-c+a8~balance~bos", "write ~bos~balance"),
        ("int4-c+a8~balance101", "from 0 to 100"),
        ("int4-c+a8~balance03", "from 0 to 100"),
        ("int4-c+a8~balance~steps2", "ranges of sampler steps belong to the plan"),
        ("int4-c+a8t~steps", "set `steps` under `allocate`"),
        ("int4-c+a8~30", "FORMAT[-t|-c|-gN][+aBITS][~TRANSFORM][@METHOD]"),
    ],
)
def test_a_wrong_string_is_answered_with_the_rule_or_the_nearest_name(text: str, part: str) -> None:
    with pytest.raises(QSearchError) as caught:
        Scheme.parse(text)

    assert part in str(caught.value)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "plain", "count"),
    [
        ("uint4-c+a8~balance10~steps2", "uint4-c+a8~balance10", 2),
        ("int8-c+a8t~steps9@hqq", "int8-c+a8t@hqq", 9),
        ("int4-c", "int4-c", 1),
    ],
)
def test_schemes_of_old_plans_are_split_into_a_scheme_and_a_number_of_ranges(
    text: str, plain: str, count: int
) -> None:
    assert split_steps(text) == (plain, count)


@pytest.mark.parametrize("text", ["int4-c+a8t~steps1", "int4-c~steps2~steps3", "int4-c~steps"])
def test_a_wrong_number_of_ranges_in_an_old_plan_is_refused(text: str) -> None:
    with pytest.raises(QSearchError, match="from 2 to 9, and stands once"):
        split_steps(text)


def test_a_scheme_is_parsed_without_importing_torch() -> None:
    script = (
        "import sys; from qsearch.core.scheme import Scheme\n"
        "s = Scheme.parse('uint4-c+a8t~bos~balance30~shift~migrate@gptq')\n"
        "s.stored_bits((8, 8)), s.scales_weight, s.fitted_by_range, str(s)\n"
        "print('torch' in sys.modules)"
    )
    made = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    )

    assert made.stdout.strip() == "False"


@pytest.mark.parametrize("given", [None, 4, 4.0])
def test_what_is_not_a_string_is_refused_with_the_rule(given: object) -> None:
    with pytest.raises(QSearchError, match="a scheme is FORMAT"):
        Scheme.parse(given)  # type: ignore[arg-type]


def test_every_block_format_is_covered_by_these_tests() -> None:
    words = {f: format_word(f) for f in formats() if f != "keep"}
    assert {f for f, word in words.items() if word is not None and not word.sizes} == set(BLOCKS)

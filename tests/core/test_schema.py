"""plan.json's JSON Schema says what this version writes and what every golden version holds, and
refuses what the reader refuses.
"""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

from qsearch.core import plan as plans
from qsearch.core import plugins
from qsearch.core.cost import Budget
from qsearch.core.format_words import format_word, formats, input_formats
from qsearch.core.graph import OpGraph
from qsearch.core.plan import Plan, Solver
from qsearch.core.scheme import Scheme
from qsearch.core.steps import StepRanges
from tests.golden import make

FOLDER = Path(plans.__file__).parent
SCHEMAS = sorted(FOLDER.glob("plan-*.schema.json"))


def schema(version: str) -> dict[str, Any]:
    """The schema of a version of plan.json."""
    return dict(json.loads((FOLDER / f"plan-{version}.schema.json").read_text(encoding="utf-8")))


def test_every_version_has_a_schema_and_a_golden_file() -> None:
    versions = [path.name.removeprefix("plan-").removesuffix(".schema.json") for path in SCHEMAS]

    assert plans.SCHEMA.partition("/")[2] in versions
    for version in versions:
        assert schema(version)["title"] == f"qsearch.plan/{version}"
        assert (make.FOLDER / f"plan-{version}.json").is_file()


@pytest.mark.parametrize(
    "path", sorted(make.FOLDER.glob("plan-*.json")), ids=lambda path: path.name
)
def test_golden_plans_keep_their_schema(path: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    version = path.stem.removeprefix("plan-")

    jsonschema.Draft202012Validator.check_schema(schema(version))
    jsonschema.validate(json.loads(path.read_text()), schema(version))


def test_what_is_written_today_keeps_the_schema_and_what_is_spoilt_does_not(
    graph: OpGraph, tmp_path: Path
) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    layers = {
        "embed": "keep",
        "blocks.0.to_q": "int2-c",
        "blocks.0.ff": "int4-g16+a8~balance30@hqq",
        "out": "uint8-t",
    }
    Plan.make(
        graph,
        layers,
        Budget(average_bits=9.0, groups={"out": {"bytes": 900}}),
        Solver("ilp", "optimal", 0.0),
    ).save(tmp_path / "plan.json")
    Plan.uniform(graph, "nvfp4").save(tmp_path / "uniform.json")
    Plan.make(graph, {**layers, "out": ["uint8-t", "uint8-t+a8"]}, steps=StepRanges.equal(2)).save(
        tmp_path / "ranges.json"
    )
    whole = json.loads((tmp_path / "plan.json").read_text())

    for name in ("plan.json", "uniform.json", "ranges.json"):
        jsonschema.validate(json.loads((tmp_path / name).read_text()), schema("2"))
    for place, value in (
        ("sites", {"out": "int4-g0"}),
        ("sites", {"out": "keep-c "}),
        ("sites", {"out": ["int8-c"]}),
        ("sites", {}),
        ("steps", {"bounds": [1.5]}),
        ("steps", 3),
        ("budget", {"bits": 4}),
        ("header", {"schema": "qsearch.plan/3"}),
    ):
        spoilt = copy.deepcopy(whole)
        spoilt[place] = value
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(spoilt, schema("2"))


def least(transform: str) -> int | str:
    """The smallest number of a transform that must have one."""
    number = plugins.load("transforms", transform).number
    return number.low if number is not None and number.default is None else ""


def grains(form: str) -> tuple[str, ...]:
    """What may stand behind the format of an input: nothing where its blocks are built in."""
    word = format_word(form)
    return ("",) if word is not None and not word.sizes else ("", "t", "c", "g64")


def test_the_schema_s_pattern_knows_every_scheme_that_the_parser_knows() -> None:
    pattern = re.compile(schema("2")["$defs"]["scheme"]["pattern"])

    for form in formats():
        for end in (
            "",
            *(f"+a{a}{grain}" for a in input_formats() for grain in grains(a)),
            *(f"+a8~{t}{least(t)}" for t in plugins.names("transforms")),
        ):
            text = str(Scheme.parse(form + end)) if form != "keep" or end else "keep"
            assert pattern.search(text), text
    assert pattern.search(str(Scheme.parse("int4-g64+a8~balance30@hqq")))
    for attention in ("window8~rettention~every4", "dense+qk8", "block4+qk8~rho~drift0.04"):
        assert pattern.search(str(Scheme.parse(attention)))
    assert not pattern.search("int4-g0")
    assert not pattern.search("int4-c+")

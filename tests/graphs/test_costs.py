"""Costs of a graph: sums that can be done by hand, the roofline's two sides, and devices that are
checked.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from qsearch.core import plan, shipped
from qsearch.core.errors import QSearchError
from qsearch.core.graph import OpGraph
from qsearch.core.scheme import KEEP, Scheme
from qsearch.graphs.costs import Device, costs, device, schemes_of, shares, timings, unit_of
from tests.report.wired import transformer

SLOW = Device(
    title="slow",
    source="made up",
    memory=1e9,
    bandwidth=100.0,
    peak={"fp32": 10.0, "bf16": 20.0, "int8": 40.0},
)


@pytest.fixture(scope="module")
def graph() -> OpGraph:
    return transformer(blocks=2)


def test_costs_are_the_sums_over_layers_and_operations(graph: OpGraph) -> None:
    found = costs(graph)

    assert found.weights == graph.weights
    assert found.bytes == 2 * graph.weights
    assert found.average_bits == 16.0
    attention = 2 * (
        2 * 64 * 64 * 32 + 2 * 64 * 8 * 32
    )  # two blocks: scores and mixing of 64 tokens with 64, and with 8 of text
    assert found.macs == graph.macs + attention
    assert found.attention_bit_operations == attention * 16 * 16
    assert found.bit_operations == graph.macs * 16 * 16


def test_what_moves_is_weights_and_activations_at_their_bits(graph: OpGraph) -> None:
    between = sum(op.inputs + op.outputs for op in graph.ops if op.kind not in ("input", "output"))

    assert costs(graph).moved == 2 * (graph.weights + between)
    quantized = costs(graph, "int8-c+a8")
    scales = sum(2 * layer.weight_shape[0] for layer in graph)
    into = sum(op.inputs for op in graph.ops if op.layer)
    assert quantized.moved == graph.weights + scales + 2 * between - into
    assert quantized.intensity > costs(graph).intensity


def test_sizes_are_those_of_the_plan(graph: OpGraph) -> None:
    chosen = {
        layer.name: Scheme.parse("uint4-g8" if "attn1" in layer.name else "keep") for layer in graph
    }
    expected = plan.cost(graph, chosen)

    found = costs(graph, chosen)

    assert (found.bytes, found.average_bits, found.bit_operations) == (
        expected.bytes,
        expected.average_bits,
        expected.bit_operations,
    )


def test_layers_that_must_stay_are_kept_by_one_scheme_for_all(graph: OpGraph) -> None:
    first = graph.layers[0]
    fixed = dataclasses.replace(
        graph, layers=(dataclasses.replace(first, quantizable=False), *graph.layers[1:])
    )

    chosen = schemes_of(fixed, "int4-c")

    assert chosen[first.name] == KEEP
    assert {str(scheme) for name, scheme in chosen.items() if name != first.name} == {"int4-c"}


def test_an_operation_takes_the_longer_of_arithmetic_and_memory(graph: OpGraph) -> None:
    timed = {t.name: t for t in timings(graph, SLOW)}

    up = timed["blocks.0.ff.up"]
    assert up.compute == pytest.approx(2 * 64 * 32 * 128 / 20.0)
    assert up.memory == pytest.approx(2 * (32 * 128 + 64 * 32 + 64 * 128) / 100.0)
    assert (up.seconds, up.bound) == (up.compute, "compute")
    norm = timed["blocks.0.attn1.norm"]
    assert (norm.compute, norm.bound) == (0.0, "memory")
    assert "sample" not in timed
    assert "result" not in timed


def test_eight_bit_arithmetic_is_used_where_weights_and_activations_have_eight_bits(
    graph: OpGraph,
) -> None:
    assert {t.unit for t in timings(graph, SLOW, "int8-c+a8") if t.layer} == {"int8"}
    assert {t.unit for t in timings(graph, SLOW, "int8-c+a8") if not t.layer} == {"bf16"}
    assert {t.unit for t in timings(graph, SLOW, "int8-c")} == {"bf16"}


def test_fewer_bits_save_time_where_that_side_of_the_roof_is_the_lower(graph: OpGraph) -> None:
    thin = SLOW.model_copy(update={"bandwidth": 1.0})

    def seconds(on: Device, scheme: str) -> float:
        return sum(t.seconds for t in timings(graph, on, scheme))

    assert seconds(thin, "keep") > seconds(thin, "int8-c") > seconds(thin, "int8-c+a8")
    assert seconds(SLOW, "keep") == pytest.approx(
        seconds(SLOW, "int8-c")
    )  # arithmetic in 16 bits takes as long whatever is stored
    assert seconds(SLOW, "int8-c") > seconds(SLOW, "int8-c+a8")


def test_shares_by_kind_add_up_and_the_longest_is_first(graph: OpGraph) -> None:
    timed = timings(graph, SLOW)

    found = shares(timed)

    assert sum(s.seconds for s in found) == pytest.approx(sum(t.seconds for t in timed))
    assert sum(s.count for s in found) == len(timed)
    assert sum(s.macs for s in found) == costs(graph).macs
    assert [s.seconds for s in found] == sorted((s.seconds for s in found), reverse=True)
    assert found[0].kind == "linear"
    assert next(s for s in found if s.kind == "norm").bound_by_memory == pytest.approx(
        next(s for s in found if s.kind == "norm").seconds
    )


@pytest.mark.parametrize(
    ("scheme", "unit"),
    [
        ("keep", "bf16"),
        ("keep+a8", "bf16"),
        ("uint4-c", "bf16"),
        ("int4-c+a8", "int8"),
        ("int4-c+a4", "int4"),
        ("uint8-c+a4", "int8"),
        ("e4m3-c+ae4m3", "fp8"),
        ("e2m1-g16+ae4m3", "fp8"),
        ("km4-c+a8", "bf16"),
    ],
)
def test_a_scheme_computes_in_the_narrowest_unit_that_holds_both(scheme: str, unit: str) -> None:
    assert unit_of(Scheme.parse(scheme)) == unit


def test_a_device_computes_in_the_next_wider_format_it_has() -> None:
    assert SLOW.unit("int4") == "int8"
    assert SLOW.unit("fp8") == "bf16"
    assert device("cpu").unit("int8") == "fp32"
    assert device("a100").unit("fp8") == "bf16"
    assert device("h200").unit("fp8") == "fp8"


@pytest.mark.parametrize("name", shipped.names("devices"))
def test_every_device_has_rates_that_fall_with_width(name: str) -> None:
    found = device(name)

    assert found.title
    assert len(found.source) > 20
    rates = [found.peak[unit] for unit in ("fp32", "bf16", "int8", "int4") if unit in found.peak]
    assert rates == sorted(rates)
    assert found.memory > 1e10


def test_the_issues_devices_ship() -> None:
    assert {"h200", "a100", "rtx4090", "cpu"} <= set(shipped.names("devices"))


def test_the_h200_has_its_dense_rates() -> None:
    assert device("h200").peak["bf16"] == pytest.approx(989.5e12)
    assert device("h200").bandwidth == pytest.approx(4.8e12)


DEVICE = "title: t\nsource: s\nmemory: 1.0e+9\nbandwidth: 1.0e+9\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (DEVICE + "peak: {bf17: 1.0}\n", r"peak\.bf17"),
        (DEVICE + "peak: {}\n", r"peak: "),
        (DEVICE + "peak: {bf16: -1.0}\n", r"peak\.bf16: input should be greater than 0"),
        (
            DEVICE + "peak: {bf16: 1.0}\nbandwith: 3\n",
            r"unknown key 'bandwith'; did you mean 'bandwidth'",
        ),
    ],
)
def test_a_wrong_device_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")

    with pytest.raises(QSearchError, match=message):
        device(str(path))


def test_an_unknown_device_names_the_nearest() -> None:
    with pytest.raises(QSearchError, match=r"no 'h20' among the devices; did you mean 'h200'"):
        device("h20")

"""The clock of sampler steps: ranges of every call of a denoiser, for schedulers of every kind,
against ranges counted by hand.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qsearch.core.errors import QSearchError
from qsearch.core.schedulers import overridden
from qsearch.core.steps import StepClock, StepRanges, clock_of, share_clock

#: name of a scheduler -> how it is made, and how many calls of the denoiser its n steps take
SCHEDULERS: dict[str, tuple[dict[str, Any], Callable[[int], int]]] = {
    "DDIMScheduler": ({}, lambda n: n),
    "DDPMScheduler": ({}, lambda n: n),
    "DPMSolverMultistepScheduler": ({}, lambda n: n),
    "DPMSolverSinglestepScheduler": ({}, lambda n: n),
    "EulerDiscreteScheduler": ({}, lambda n: n),
    "EulerAncestralDiscreteScheduler": ({}, lambda n: n),
    "HeunDiscreteScheduler": ({}, lambda n: 2 * n - 1),
    "KDPM2DiscreteScheduler": ({}, lambda n: 2 * n - 1),
    "FlowMatchEulerDiscreteScheduler": ({"shift": 3.0}, lambda n: n),
    "FlowMatchHeunDiscreteScheduler": ({}, lambda n: 2 * n - 1),
    "PNDMScheduler": ({"skip_prk_steps": True}, lambda n: n + 1),
    "UniPCMultistepScheduler": ({}, lambda n: n),
    "LCMScheduler": ({}, lambda n: n),
}
#: what says where img2img begins, without a begin index, is `scale_model_input`, which flow
#: matching does not have
UNTOLD = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")  # KDPM2's
SECOND_ORDER = ("HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
RANGES = StepRanges.equal(3)


class Denoiser(nn.Module):
    """Notes at each call which step the clock shows."""

    def __init__(self, clock: StepClock) -> None:
        super().__init__()
        self.clock, self.seen = clock, list[tuple[int, int]]()

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append((self.clock.step, self.clock.total))
        return 0.1 * x


def scheduler(name: str) -> Any:
    import diffusers

    return getattr(diffusers, name)(**SCHEDULERS[name][0])


def sampled(
    own: Any, steps: int, *, calls: int = 1, begin: int | None = None, index: bool = True
) -> list[tuple[int, int]]:
    """(step, total) at each call of a loop as pipelines write it; `begin`: number of timesteps that
    img2img leaves out.
    """
    clock = StepClock()
    model = Denoiser(clock)
    with clock.following(own):
        own.set_timesteps(steps)
        if begin is not None and index and callable(getattr(own, "set_begin_index", None)):
            own.set_begin_index(begin)
        x = torch.randn(1, 2, 4, 4)
        for t in own.timesteps[begin or 0 :]:
            scale = getattr(own, "scale_model_input", None)
            given = x if scale is None else scale(x, t)
            outputs = [model(given) for _ in range(calls)]
            x = own.step(outputs[-1], t, x, return_dict=False)[0]
    return model.seen


def by_hand(name: str, steps: int, calls: int = 1) -> list[tuple[int, int]]:
    """What the clock must show, from how the solvers are defined: a second-order step calls twice,
    but for the last.
    """
    count = SCHEDULERS[name][1](steps)
    order = 2 if name in SECOND_ORDER else 1
    total = count if order == 1 else steps
    return [(i // order, total) for i in range(count) for _ in range(calls)]


@pytest.mark.parametrize("steps", [10, 20, 50])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_call_lies_in_the_range_counted_by_hand(name: str, steps: int) -> None:
    seen = sampled(scheduler(name), steps)

    assert seen == by_hand(name, steps)
    clock, found = StepClock(), []
    for step, total in seen:
        with clock.at(step, total):
            found.append(clock.range_of(RANGES))
    # a third of the steps each: bounds are 1/3 and 2/3 of the total
    assert found == [(step >= total / 3) + (step >= 2 * total / 3) for step, total in seen]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_guidance_in_two_calls_counts_each_step_once(name: str) -> None:
    assert sampled(scheduler(name), 10, calls=2) == by_hand(name, 10, calls=2)


@pytest.mark.parametrize("index", [True, False], ids=["begin index", "timesteps alone"])
@pytest.mark.parametrize("steps", [10, 20, 50])
@pytest.mark.parametrize(
    "name", [n for n in SCHEDULERS if n not in ("PNDMScheduler", "LCMScheduler")]
)
def test_image_to_image_starts_in_the_middle(name: str, steps: int, index: bool) -> None:
    if not index and name in UNTOLD:
        pytest.skip("its pipelines set a begin index")
    order = 2 if name in SECOND_ORDER else 1
    begin = (steps * 2 // 5) * order  # strength 0.6

    seen = sampled(scheduler(name), steps, begin=begin, index=index)

    assert seen == by_hand(name, steps)[begin:]


def test_a_second_sampling_begins_anew() -> None:
    own = scheduler("DPMSolverMultistepScheduler")

    assert sampled(own, 5) == sampled(own, 5)
    assert sampled(own, 3) == by_hand("DPMSolverMultistepScheduler", 3)


def test_custom_timesteps_are_counted() -> None:
    clock, own = StepClock(), scheduler("EulerDiscreteScheduler")
    with clock.following(own):
        own.set_timesteps(timesteps=[900, 500, 499, 20])

        assert (clock.step, clock.total) == (0, 4)


def test_the_arguments_of_a_step_may_come_in_another_order() -> None:
    import diffusers

    own = diffusers.CogVideoXDPMScheduler()
    clock = StepClock()
    seen, old = [], None
    with clock.following(own):
        own.set_timesteps(6)
        x = torch.randn(1, 2, 4, 4)
        for i, t in enumerate(own.timesteps):
            seen.append(clock.step)
            before = own.timesteps[i - 1] if i else None
            x, old = own.step(0.1 * x, old, t, before, x, return_dict=False)
    assert seen == list(range(6))


def test_a_copy_of_a_followed_scheduler_steps_by_itself() -> None:
    clock, own = StepClock(), scheduler("FlowMatchEulerDiscreteScheduler")
    with clock.following(own):
        own.set_timesteps(4)
        other = copy.deepcopy(own)  # as LTX-2 makes one for its sound
        x = torch.ones(1, 2, 2, 2)
        own.step(x, own.timesteps[0], x)

        assert clock.step == 1
        assert other.step_index is None
        other.step(x, other.timesteps[0], x)
        assert clock.step == 1
        assert own.step_index == other.step_index == 1


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler"])
def test_following_leaves_the_scheduler_as_it_was(name: str) -> None:
    own = scheduler(name)
    kind, held = type(own), set(vars(own))
    clock = StepClock()
    with clock.following(own):
        assert isinstance(own, kind)
        assert type(own).__name__ == name
        assert inspect.signature(own.step) == inspect.signature(kind.step.__get__(own))
        with clock.following(own):  # a second time changes nothing
            pass
        own.set_timesteps(5)
        assert clock.total == 5

    assert type(own) is kind
    assert set(vars(own)) == held
    assert (clock.step, clock.total) == (0, 0)


def test_two_clocks_end_in_any_order() -> None:
    own = scheduler("DDIMScheduler")
    kind = type(own)
    first, second = StepClock(), StepClock()
    end_first, end_second = first.follow(own), second.follow(own)
    own.set_timesteps(7)
    assert (first.total, second.total) == (7, 7)

    end_first()
    own.set_timesteps(9)
    assert (first.total, second.total) == (7, 9)
    end_second()
    own.set_timesteps(3)
    assert second.total == 9
    assert isinstance(own, kind)


def test_methods_around_see_the_call_and_its_result() -> None:
    class Thing:
        def add(self, a: int, b: int) -> int:
            return a + b

    thing, heard = Thing(), list[tuple[int, ...]]()

    def around(own: Any, _: Thing, a: int, b: int) -> int:
        heard.append((a, b))
        return 10 * own(a, b)

    restore = overridden(thing, {"add": around})
    assert thing.add(1, 2) == 30
    assert Thing().add(1, 2) == 3
    restore()
    assert thing.add(1, 2) == 3
    assert heard == [(1, 2)]


def test_a_scheduler_without_steps_is_refused() -> None:
    with pytest.raises(QSearchError, match="dict has no set_timesteps"):
        StepClock().follow({})


def test_denoisers_of_one_pipeline_share_a_clock() -> None:
    one, other, third = nn.Linear(1, 1), nn.Linear(1, 1), nn.Linear(1, 1)

    shared = share_clock([one, other])

    assert clock_of(one) is clock_of(other) is shared
    assert clock_of(third) is not shared


def test_a_plan_of_ranges_wants_to_know_the_step() -> None:
    clock = StepClock()

    assert clock.range_of(StepRanges()) == 0
    with pytest.raises(QSearchError, match="no scheduler is followed"):
        clock.range_of(RANGES)
    with clock.at(1, 2), pytest.raises(QSearchError, match="range 2 has none of 2"):
        clock.range_of(RANGES)


@pytest.mark.parametrize("total", [3, 4, 7, 10, 50])
def test_ranges_cover_the_steps_each_once(total: int) -> None:
    members = StepRanges((0.2, 0.55)).members(total) if total > 3 else RANGES.members(total)

    assert [i for part in members for i in part] == list(range(total))


@pytest.mark.parametrize("bounds", [(0.0,), (0.5, 0.5), (0.7, 0.2), (1.0,), ("a",)])
def test_bounds_that_are_no_cuts_are_refused(bounds: tuple[Any, ...]) -> None:
    with pytest.raises(QSearchError, match="ascending fractions between 0 and 1"):
        StepRanges(bounds)

"""Contracts that every plug-in must pass; outsiders subclass them for theirs.

    class TestMine(QuantizerContract):
        plugin = "mine"

Each contract is a class of tests with one attribute to set. The project applies them to every
plug-in it finds, and each is shown to reject a plug-in that is wrong on purpose.
"""

from __future__ import annotations

import itertools
from dataclasses import fields, replace
from typing import Any, ClassVar

import numpy as np

from .choices.contracts import (
    ActivationContract,
    QuantizerContract,
    TransformContract,
    assert_step_law,
)
from .choices.format_contract import FormatContract
from .core.contract import Contract
from .core.errors import InfeasibleBudget, QSearchError
from .core.metrics import LINKS, MetricWords
from .core.scheme import Scheme
from .decide.problem import Problem
from .execute.contracts import ExporterContract
from .learn.contracts import SurrogateContract

__all__ = [
    "ActivationContract",
    "ExporterContract",
    "FormatContract",
    "MetricContract",
    "QuantizerContract",
    "SolverContract",
    "SurrogateContract",
    "TransformContract",
    "assert_step_law",
]


class SolverContract(Contract):
    """What holds for every file in `solvers/`: limits are kept, infeasible problems are said to be,
    exact solvers equal brute force, bounds are below.

    A module says `exact` (its plans are the best) and `quadratic` (it minimises the total with
    interactions; others refuse such a problem).
    """

    kind = "solvers"
    problems: ClassVar[int] = 40

    def problem(self, seed: int, *, interactions: bool = False) -> Problem:
        """Six sites with three choices each, one or two limits, every third with at most two
        formats; with scores of eight probes where asked.

        Args:
            seed: of what is drawn.
            interactions: whether it has scores.

        Returns:
            The problem.
        """
        dice = np.random.default_rng(seed)
        options = tuple(Scheme.parse(s) for s in ("uint2-c", "uint4-c", "uint8-c"))
        weights = dice.integers(1, 50, 6)
        values = tuple(np.sort(dice.lognormal(0, 2, 3))[::-1].copy() for _ in range(6))
        costs = {"average_bits": tuple(w * np.array([2.0, 4.0, 8.0]) for w in weights)}
        limits = {"average_bits": float(weights.sum() * dice.uniform(2.0, 8.0))}
        if seed % 2:
            costs["bit_operations"] = tuple(np.sort(dice.uniform(1, 9, 3)) for _ in range(6))
            limits["bit_operations"] = float(
                sum(c.max() for c in costs["bit_operations"]) * dice.uniform(0.5, 1.0)
            )
        scores = None
        if interactions:
            scores = dice.normal(0, 1, (8, 6, 3)) + dice.normal(0, 1, (8, 1, 1))
            scores *= np.sqrt(
                np.array(values) / (scores**2).mean(0)
            )  # so that their mean squares are the values
        few = 2 if seed % 3 == 2 else None
        return Problem(
            tuple(f"layer{i}" for i in range(6)),
            (options,) * 6,
            values,
            costs,
            limits,
            few,
            scores,
            0.8,
        )

    def _best(self, problem: Problem) -> float | None:
        found = [
            problem.worth(p)
            for p in map(np.array, itertools.product(range(3), repeat=6))
            if problem.keeps(p)
        ]
        return min(found, default=None)

    def test_plans_keep_their_limits_and_exact_ones_are_the_best(self) -> None:
        """On random problems, against all 729 assignments."""
        for seed in range(self.problems):
            problem = self.problem(seed)
            best = self._best(problem)
            if best is None:
                continue
            chosen, said = self.module.solve(problem, seconds=10.0)
            self._check(f"problem {seed}", problem, chosen, said, best)
            if self.module.exact:
                assert abs(problem.total(chosen) - best) <= 1e-6 * best, (
                    f"problem {seed}: {problem.total(chosen)} instead of {best}"
                )
                assert said.status == "optimal", f"problem {seed}: {said.status}"

    def _check(self, name: str, problem: Problem, chosen: Any, said: Any, best: float) -> None:
        picks = problem.picks(chosen)
        for limit in problem.limits:
            spent = problem.used(limit, picks)
            assert spent <= problem.limits[limit] * (1 + 1e-9), (
                f"{name}: {limit} {spent} above {problem.limits[limit]}"
            )
        used = problem.formats_of(picks)
        assert problem.formats is None or len(used) <= problem.formats, (
            f"{name}: {len(used)} formats, at most {problem.formats} are allowed"
        )
        assert said.objective is None or abs(said.objective - problem.total(chosen)) <= 1e-6 * abs(
            best
        ), f"{name}: says {said.objective}"
        assert said.bound is None or said.bound <= best + 1e-6 * abs(best), (
            f"{name}: bound {said.bound} above the best, {best}"
        )

    def test_an_infeasible_problem_is_called_so(self) -> None:
        """Limits that no assignment keeps raise `InfeasibleBudget`; nothing is returned."""
        problem = self.problem(0)
        tight = Problem(
            problem.sites, problem.choices, problem.values, problem.costs, {"average_bits": 1.0}
        )
        try:
            chosen, _ = self.module.solve(tight, seconds=10.0)
        except InfeasibleBudget:
            return
        raise AssertionError(f"an infeasible problem was answered with {chosen}")

    def test_interactions_are_minimised_or_refused(self) -> None:
        """A quadratic solver is no worse than the best additive assignment is under interactions;
        another says that it knows none.
        """
        from .decide.solvers import ilp

        for seed in range(max(2, self.problems // 4)):
            problem = self.problem(seed, interactions=True)
            best = self._best(problem)
            if best is None:
                continue
            if not self.module.quadratic:
                try:
                    self.module.solve(problem, seconds=10.0)
                except QSearchError:
                    continue
                raise AssertionError(f"problem {seed}: interactions were left out without a word")
            chosen, said = self.module.solve(problem, seconds=10.0)
            self._check(f"problem {seed}", problem, chosen, said, best)
            additive, _ = ilp.solve(replace(problem, scores=None))
            worth = problem.total(additive)
            assert problem.total(chosen) <= worth + 1e-9 * abs(worth), (
                f"problem {seed}: {problem.total(chosen)}, without interactions {worth}"
            )


class MetricContract(Contract):
    """What holds for every file in `metrics/`: perfect on identical outcomes, finite, worse when
    noise grows.

    A module says `higher_is_better`, and whether it `needs_video`: latents with frames; `smallest`,
    the least side of pictures that it takes, where that is more than 64. One without `features` is
    for evaluation alone.
    """

    kind = "metrics"

    def outcomes(self) -> list[Any]:
        """Full precision, and the same with growing noise on latents and pictures (captions of real
        scenes).

        Returns:
            Outcomes in order of growing noise.
        """
        import torch

        from .measure.evaluation import Outcome
        from .measure.pipelines import Prompts
        from .zoo import moving_scenes, scenes

        generator = torch.Generator().manual_seed(0)
        side = getattr(self.module, "smallest", 64)  # of pictures that the metric takes
        count = 48 if side <= 64 else 8
        drawn = scenes.draw_scenes(count, generator)
        captions = tuple(scenes.describe(drawn, generator))
        pictures, latents = scenes.render(drawn), torch.randn(count, 4, 16, 16, generator=generator)
        if self.module.needs_video:
            clips = moving_scenes.draw_clips(count, generator)
            captions = tuple(moving_scenes.describe(clips, generator))
            pictures = moving_scenes.render(clips).transpose(1, 2).contiguous()
        if side > 64:
            pictures = torch.nn.functional.interpolate(pictures, (side, side), mode="bicubic")
            pictures = pictures.clamp(-1, 1)
        noise = torch.randn(pictures.shape, generator=generator)
        blur = torch.randn(latents.shape, generator=generator)
        prompts = Prompts(tuple(c.text for c in captions), captions)
        if self.module.needs_video:
            latents, blur = latents.unflatten(2, (4, 4)), blur.unflatten(2, (4, 4))
        return [
            Outcome(prompts, latents + s * blur, (pictures + s * noise).clamp(-1, 1), (), 4)
            for s in ((0.0, 0.7, 1.5) if self.module.needs_video else (0.0, 0.3, 1.0))
        ]

    def test_it_declares_its_direction_and_the_scale_on_which_it_is_learnt(self) -> None:
        """Constants that tables, plots and surrogates read (`core.metrics.MetricWords`)."""
        declared = {f.name for f in fields(MetricWords)} & set(vars(self.module))
        words = MetricWords(**{"title": "", **{name: vars(self.module)[name] for name in declared}})
        assert words.higher_is_better in (True, False)
        assert words.link in LINKS, f"{words.link!r} is none of {', '.join(LINKS)}"

    def test_more_noise_scores_worse(self) -> None:
        """Strictly, over three levels of noise; all values are finite."""
        reference, *_ = outcomes = self.outcomes()
        scores = [float(np.mean(np.asarray(self.module.measure(o, reference)))) for o in outcomes]
        assert all(np.isfinite(scores)), str(scores)
        ordered = scores if self.module.higher_is_better else [-s for s in scores]
        assert ordered[0] > ordered[1] > ordered[2], str(scores)

    def test_features_lie_farther_apart_the_more_noise_there_is(self) -> None:
        """The squared distance of features to full precision, over its scale, is 0 without noise,
        grows with it, and has gradients.
        """
        import torch

        if not hasattr(self.module, "features"):
            return  # of sets of pictures, or without gradients: evaluated only
        reference, *_ = outcomes = self.outcomes()
        whole = _decoded(reference.latents, reference.pictures)
        found = []
        for outcome in outcomes:
            latents, pictures = (
                outcome.latents.clone().requires_grad_(),
                outcome.pictures.clone().requires_grad_(),
            )
            values, scale = self.module.features(_decoded(latents, pictures), whole)
            own, _ = self.module.features(whole, whole)
            assert values.ndim == 2, f"features are [N, F]; given {tuple(values.shape)}"
            assert scale.shape == (len(reference.pictures),), (
                f"one scale a sample; given {tuple(scale.shape)}"
            )
            found.append(float((values.detach() - own).double().square().sum() / scale.sum()))
            values.sum().backward()
            assert latents.grad is not None or pictures.grad is not None
        assert found[0] == 0.0, str(found)
        assert found[0] < found[1] < found[2], str(found)
        assert torch.isfinite(torch.tensor(found)).all(), str(found)


def _decoded(latents: Any, pictures: Any) -> Any:
    """A predicted clean image whose pictures are known."""
    from .measure.predicted_x0 import PredictedX0

    return PredictedX0(latents, lambda _: pictures, 4)

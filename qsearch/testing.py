"""Contracts that every plug-in must pass; outsiders subclass them for theirs.

    class TestMine(QuantizerContract):
        plugin = "mine"

Each contract is a class of tests with one attribute to set. The project applies them to every plug-in it finds, and each is
shown to reject a plug-in that is wrong on purpose.
"""

from __future__ import annotations

import itertools
from types import ModuleType
from typing import Any, ClassVar

import numpy as np

from .core import plugins
from .core.errors import InfeasibleBudget
from .core.scheme import FORMATS, Scheme
from .decide.problem import Problem


class _Contract:
    plugin: ClassVar[str | ModuleType]
    kind: ClassVar[str]

    @property
    def module(self) -> Any:
        """The plug-in under test."""
        return self.plugin if isinstance(self.plugin, ModuleType) else plugins.load(self.kind, self.plugin)


class QuantizerContract(_Contract):
    """What holds for every file in `quantizers/`, on each format it supports, per tensor, channel and group."""

    kind = "quantizers"

    def schemes(self) -> list[Scheme]:
        """Every format and granularity that the plug-in says it supports."""
        granularities = ("", "-t", "-c", "-g8")
        out = []
        for form, granularity in itertools.product(FORMATS, granularities):
            fixed = form == "keep" or form.startswith(("mx", "nv"))
            if fixed != (granularity == ""):
                continue
            scheme = Scheme.parse(form + granularity)
            if form != "keep" and self.module.supports(scheme):
                out.append(scheme)
        return out

    def _groups(self, scheme: Scheme, seed: int = 0) -> Any:
        import torch

        from .measure.quantization import to_groups

        return to_groups(torch.randn(6, 40, generator=torch.Generator().manual_seed(seed)), scheme)

    def test_it_supports_some_format(self) -> None:
        """A quantizer that supports nothing is a mistake."""
        assert self.schemes()

    def test_the_round_trip_stays_within_half_a_step(self) -> None:
        """No weight moves by more than half a step of its group (and the rounding of an fp16 scale)."""
        for scheme in self.schemes():
            if scheme.family not in ("int", "uint"):
                continue
            groups = self._groups(scheme)
            codes, scale, zero = self.module.quantize(groups, scheme)
            worst = (scale * (codes.float() - zero) - groups).abs() / scale
            assert float(worst.max()) <= 0.5 + 2.0**scheme.bits * 2.0**-10, f"{scheme}: off by {float(worst.max()):.3f} steps"

    def test_codes_fit_the_bits_and_scales_fit_the_granularity(self) -> None:
        """Codes are bytes below 2^bits; one scale and zero a group."""
        import torch

        for scheme in self.schemes():
            groups = self._groups(scheme)
            codes, scale, zero = self.module.quantize(groups, scheme)
            assert codes.dtype == torch.uint8, f"{scheme}: {codes.dtype}"
            assert codes.shape == groups.shape, f"{scheme}: {tuple(codes.shape)}"
            assert int(codes.max()) < 2**scheme.bits, f"{scheme}: code {int(codes.max())}"
            assert scale.shape == zero.shape == (*groups.shape[:2], 1), f"{scheme}: {tuple(scale.shape)}"

    def test_degenerate_rows_survive(self) -> None:
        """Rows of zeros, of one constant, of one element, tiny and huge rows give finite weights."""
        import torch

        rows = torch.tensor([0.0, 0.7, -0.3, 1e-9, 3e4])[:, None, None].expand(5, 1, 8)
        for scheme in self.schemes():
            for groups in (rows, rows[:, :, :1]):
                codes, scale, zero = self.module.quantize(groups.contiguous(), scheme)
                back = scale * (codes.float() - zero)
                assert torch.isfinite(back).all(), str(scheme)
                assert float((back - groups)[:3].abs().max()) <= 0.71, str(scheme)
                assert float(back[0].abs().max()) == 0.0, f"{scheme}: zeros became {float(back[0].abs().max())}"

    def test_it_is_deterministic(self) -> None:
        """Twice the same weights, twice the same codes."""
        import torch

        for scheme in self.schemes():
            first, second = (self.module.quantize(self._groups(scheme), scheme) for _ in range(2))
            assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), str(scheme)

    def test_the_error_falls_when_bits_rise(self) -> None:
        """Within a family and granularity, more bits mean less squared error."""
        by_family: dict[tuple[str, int], list[tuple[int, float]]] = {}
        for scheme in self.schemes():
            if scheme.family in ("float", "block"):
                continue
            groups = self._groups(scheme)
            codes, scale, zero = self.module.quantize(groups, scheme)
            error = float((scale * (codes.float() - zero) - groups).square().mean())
            by_family.setdefault((scheme.family, scheme.group), []).append((scheme.bits, error))
        for key, found in by_family.items():
            errors = [e for _, e in sorted(found)]
            assert all(a > b for a, b in itertools.pairwise(errors)), f"{key}: {errors}"


class SolverContract(_Contract):
    """What holds for every file in `solvers/`: budgets are kept, infeasible ones are said to be, exact solvers equal brute force."""

    kind = "solvers"
    problems: ClassVar[int] = 40

    def problem(self, seed: int) -> Problem:
        """Six sites with three choices each, one or two limits."""
        dice = np.random.default_rng(seed)
        options = tuple(Scheme.parse(s) for s in ("uint2-c", "uint4-c", "uint8-c"))
        weights = dice.integers(1, 50, 6)
        values = tuple(np.sort(dice.lognormal(0, 2, 3))[::-1].copy() for _ in range(6))
        costs = {"average_bits": tuple(w * np.array([2.0, 4.0, 8.0]) for w in weights)}
        limits = {"average_bits": float(weights.sum() * dice.uniform(2.0, 8.0))}
        if seed % 2:
            costs["bit_operations"] = tuple(np.sort(dice.uniform(1, 9, 3)) for _ in range(6))
            limits["bit_operations"] = float(sum(c.max() for c in costs["bit_operations"]) * dice.uniform(0.5, 1.0))
        return Problem(tuple(f"layer{i}" for i in range(6)), (options,) * 6, values, costs, limits)

    def _best(self, problem: Problem) -> float | None:
        best = None
        for picks in itertools.product(range(3), repeat=6):
            fits = all(sum(c[k] for c, k in zip(problem.costs[n], picks, strict=True)) <= limit for n, limit in problem.limits.items())
            if fits:
                value = float(sum(v[k] for v, k in zip(problem.values, picks, strict=True)))
                best = value if best is None else min(best, value)
        return best

    def test_plans_keep_their_limits_and_exact_ones_are_the_best(self) -> None:
        """On random problems, against all 729 assignments."""
        for seed in range(self.problems):
            problem = self.problem(seed)
            best = self._best(problem)
            if best is None:
                continue
            chosen, said = self.module.solve(problem, seconds=10.0)
            for name, limit in problem.limits.items():
                spent = sum(c[o.index(chosen[s])] for s, o, c in zip(problem.sites, problem.choices, problem.costs[name], strict=True))
                assert spent <= limit * (1 + 1e-9), f"problem {seed}: {name} {spent} above {limit}"
            if self.module.exact:
                assert abs(problem.total(chosen) - best) <= 1e-6 * best, f"problem {seed}: {problem.total(chosen)} instead of {best}"
                assert said.status == "optimal", f"problem {seed}: {said.status}"

    def test_an_infeasible_problem_is_called_so(self) -> None:
        """Limits that no assignment keeps raise `InfeasibleBudget`; nothing is returned."""
        problem = self.problem(0)
        tight = Problem(problem.sites, problem.choices, problem.values, problem.costs, {"average_bits": 1.0})
        try:
            chosen, _ = self.module.solve(tight, seconds=10.0)
        except InfeasibleBudget:
            return
        raise AssertionError(f"an infeasible problem was answered with {chosen}")


class MetricContract(_Contract):
    """What holds for every file in `metrics/`: perfect on identical outcomes, finite, worse when noise grows."""

    kind = "metrics"

    def outcomes(self) -> list[Any]:
        """Full precision, and the same with growing noise on latents and pictures (captions of real scenes)."""
        import torch

        from .measure.evaluation import Outcome
        from .measure.pipelines import Prompts
        from .zoo.scenes import describe, draw_scenes, render

        generator = torch.Generator().manual_seed(0)
        scenes = draw_scenes(48, generator)
        captions = tuple(describe(scenes, generator))
        pictures, latents = render(scenes), torch.randn(48, 4, 16, 16, generator=generator)
        noise = torch.randn(pictures.shape, generator=generator)
        blur = torch.randn(latents.shape, generator=generator)
        prompts = Prompts(tuple(c.text for c in captions), captions)
        return [Outcome(prompts, latents + s * blur, (pictures + s * noise).clamp(-1, 1), ()) for s in (0.0, 0.3, 1.0)]

    def test_more_noise_scores_worse(self) -> None:
        """Strictly, over three levels of noise; all values are finite."""
        reference, *_ = outcomes = self.outcomes()
        scores = [float(np.mean(np.asarray(self.module.measure(o, reference)))) for o in outcomes]
        assert all(np.isfinite(scores)), str(scores)
        ordered = scores if self.module.higher_is_better else [-s for s in scores]
        assert ordered[0] > ordered[1] > ordered[2], str(scores)

    def test_features_lie_farther_apart_the_more_noise_there_is(self) -> None:
        """The squared distance of features to full precision, over its scale, is 0 without noise, grows with it, and has gradients."""
        import torch

        from .measure.clean import Clean

        reference, *_ = outcomes = self.outcomes()
        whole = Clean(reference.latents, lambda _: reference.pictures)
        found = []
        for outcome in outcomes:
            latents, pictures = outcome.latents.clone().requires_grad_(), outcome.pictures.clone().requires_grad_()
            values, scale = self.module.features(Clean(latents, lambda _, p=pictures: p), whole)  # type: ignore[misc]
            own, _ = self.module.features(whole, whole)
            assert values.ndim == 2, f"features are [N, F]; given {tuple(values.shape)}"
            assert scale.shape == (len(reference.pictures),), f"one scale a sample; given {tuple(scale.shape)}"
            found.append(float((values.detach() - own).double().square().sum() / scale.sum()))
            values.sum().backward()
            assert latents.grad is not None or pictures.grad is not None
        assert found[0] == 0.0, str(found)
        assert found[0] < found[1] < found[2], str(found)
        assert torch.isfinite(torch.tensor(found)).all(), str(found)

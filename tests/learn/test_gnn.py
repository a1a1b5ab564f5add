"""The graph predictor: every one of its losses acts, ranks are ranks, and plans in a batch do not
see each other.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import rankdata

from qsearch.learn.contracts import small_graph, small_study
from qsearch.learn.fitting import training_set
from qsearch.learn.nodes import HOPS, Nodes, Skeleton
from qsearch.learn.surrogates import gnn


@pytest.fixture(scope="module")
def batch() -> tuple[tuple[Nodes, ...], torch.Tensor]:
    """Eight labelled graphs and what was measured of them."""
    taken = training_set([small_study(8)], "sqnr", "gnn")
    return taken.data.nodes, torch.from_numpy(taken.target).float()


def gradients(nodes: tuple[Nodes, ...], loss: str, target: torch.Tensor) -> list[torch.Tensor]:
    torch.manual_seed(0)
    network = gnn.Network()
    read, _ = network(gnn.Batch(nodes))
    sum(getattr(gnn, loss)(level.abs().sum(1), target) for level in read).backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in network.parameters()]


@pytest.mark.parametrize("loss", ["spearman_loss", "lambda_rank_loss"])
def test_each_ranking_loss_moves_the_network(
    batch: tuple[tuple[Nodes, ...], torch.Tensor], loss: str
) -> None:
    found = gradients(batch[0], loss, batch[1])

    assert max(float(g.abs().max()) for g in found) > 1e-6
    assert all(bool(torch.isfinite(g).all()) for g in found)


def test_what_is_minimised_has_the_gradients_of_all_its_parts(
    batch: tuple[tuple[Nodes, ...], torch.Tensor],
) -> None:
    nodes, target = batch
    torch.manual_seed(0)
    network = gnn.Network()
    read, predicted = network(gnn.Batch(nodes))
    wanted = (target - target.mean()) / target.std()
    names = list(network.embed.parameters())

    whole = torch.autograd.grad(
        gnn.loss_of(read, predicted, wanted, target), names, retain_graph=True
    )

    head = torch.autograd.grad(
        torch.nn.functional.mse_loss(predicted, wanted), names, retain_graph=True
    )
    norms = [level.abs().sum(1) for level in read]
    srcc = torch.autograd.grad(
        sum(gnn.spearman_loss(n, target) for n in norms), names, retain_graph=True
    )
    ranks = torch.autograd.grad(sum(gnn.lambda_rank_loss(n, target) for n in norms), names)
    for all_, a, b, c in zip(whole, head, srcc, ranks, strict=True):
        torch.testing.assert_close(all_, a + gnn.RANKING * (b + c), rtol=1e-4, atol=1e-6)


def test_soft_ranks_of_values_far_apart_are_their_ranks() -> None:
    x = torch.tensor([3.0, -1.0, 10.0, 0.5])

    np.testing.assert_allclose(
        gnn.soft_ranks(x, temperature=1e-3).numpy() + 0.5, rankdata(x.numpy()), atol=1e-5
    )


@pytest.mark.parametrize("loss", [gnn.spearman_loss, gnn.lambda_rank_loss])
def test_a_ranking_in_the_right_order_costs_less_than_one_in_the_wrong(loss: object) -> None:
    target = torch.arange(8.0)

    assert loss(target * 2 + 1, target) < 0.7 * loss(-target, target)  # type: ignore[operator]


def test_a_step_down_lambda_rank_puts_the_best_plan_higher() -> None:
    x, target = torch.tensor([0.0, 0.1, 0.2], requires_grad=True), torch.tensor([1.0, 0.0, 0.5])

    gnn.lambda_rank_loss(x, target).backward()

    assert x.grad is not None
    assert x.grad[0] < 0 < x.grad[1]


def test_plans_in_a_batch_do_not_see_each_other(
    batch: tuple[tuple[Nodes, ...], torch.Tensor],
) -> None:
    torch.manual_seed(0)
    network = gnn.Network().eval()

    together = network(gnn.Batch(batch[0]))[1]

    alone = torch.cat([network(gnn.Batch([one]))[1] for one in batch[0]])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_hop_levels_read_layers_first_then_blocks_then_all() -> None:
    skeleton = Skeleton(small_graph(blocks=2))

    roots = skeleton.roots

    assert len(roots) == HOPS + 1
    assert roots[0].tolist() == list(range(10))
    assert [skeleton.graph.ops[i].layer for i in roots[1]] == [
        "0.self-attention-out",
        "0.feed-forward-out",
        "1.self-attention-out",
        "1.feed-forward-out",
    ]
    assert roots[-1].tolist() == list(range(10))

"""A graph attention network (torch_geometric's GATv2) that reads the plan on the model's own graph,
at every hop level; scores each operation and block.

After Qua²SeDiMo (AAAI 2025): node features through a small perceptron, rounds of attention along
the data's direction, a readout at every hop level (mean over that level's roots), whose L1 norm is
taught to rank the plans, and a head on the last level that predicts the metric. Losses: squared
error of the head, and at every level 1 - Spearman with soft ranks and LambdaRank. Here all of them
act: they are one sum with one backward (the published code computes LambdaRank's gradient and then
sets it to zero before the step). Where a table has priced the choices, the head learns what a line
through its prediction leaves over. The only file of this wing that imports torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ...core.artifacts import Header, read_json, write_json, writing
from ...core.errors import ArtifactError, QSearchError
from ..data import AbstractModel, Data, LinearPrior
from ..features import Array
from ..nodes import CHOICE, HOPS, STATIC, Nodes, Skeleton

needs_graph = True
SCHEMA = "qsearch.gnn/1"
WIDTH = 32
EPOCHS = 30
BATCH = 16
_RATE, _DECAY = 3e-3, 1e-4
#: weight of the ranking losses at each level, beside the squared error of the head
RANKING = 0.2


class Network(nn.Module):
    """Nodes [nodes, STATIC + CHOICE] to a level's readouts [plans, WIDTH] for each hop level, and a
    prediction [plans].
    """

    def __init__(self) -> None:
        super().__init__()
        from torch_geometric.nn import GATv2Conv

        self.embed = nn.Sequential(
            nn.Linear(STATIC + CHOICE, 2 * WIDTH), nn.ReLU(), nn.Linear(2 * WIDTH, WIDTH), nn.ReLU()
        )
        self.rounds = nn.ModuleList(GATv2Conv(WIDTH, WIDTH) for _ in range(HOPS))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(HOPS))
        self.head = nn.Sequential(
            nn.Linear((HOPS + 1) * WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 1)
        )

    def levels(self, values: Tensor, edges: Tensor) -> list[Tensor]:
        """Node embeddings [nodes, WIDTH] after 0, 1, … `HOPS` rounds."""
        found = [self.embed(values)]
        for attention, norm in zip(self.rounds, self.norms, strict=True):
            found.append(found[-1] + torch.relu(norm(attention(found[-1], edges))))
        return found

    def forward(self, batch: Batch) -> tuple[list[Tensor], Tensor]:
        """(readouts of each level, predictions)."""
        from torch_geometric.nn import global_mean_pool

        read = [
            global_mean_pool(x[roots], owner, batch.size)
            for x, (roots, owner) in zip(
                self.levels(batch.values, batch.edges), batch.roots, strict=True
            )
        ]
        return read, self.head(torch.cat(read, 1)).squeeze(1)


class Batch:
    """Several plans' graphs as one, without edges between them."""

    def __init__(self, plans: Sequence[Nodes]) -> None:
        self.size = len(plans)
        starts = np.cumsum([0, *(len(p.values) for p in plans)])
        self.values = torch.from_numpy(np.concatenate([p.values for p in plans]))
        self.edges = torch.from_numpy(
            np.concatenate([p.edges + s for p, s in zip(plans, starts, strict=False)], 1)
        )
        self.roots = []
        for level in range(HOPS + 1):
            rows = np.concatenate([p.roots[level] + s for p, s in zip(plans, starts, strict=False)])
            owner = np.concatenate([np.full(len(p.roots[level]), i) for i, p in enumerate(plans)])
            self.roots.append((torch.from_numpy(rows), torch.from_numpy(owner)))


def soft_ranks(x: Tensor, temperature: float = 0.1) -> Tensor:
    """Ranks [n] with gradients: for each value, how many others are below it, counted softly on the
    scale of their spread.
    """
    scaled = x / (x.std().detach() + 1e-9) / temperature
    return torch.sigmoid(scaled[:, None] - scaled[None]).sum(1)


def spearman_loss(x: Tensor, target: Tensor) -> Tensor:
    """1 - correlation of the soft ranks of x [n] with the ranks of the target [n]."""
    a, b = soft_ranks(x), target.argsort().argsort().to(x.dtype)
    a, b = a - a.mean(), b - b.mean()
    loss: Tensor = 1 - (a * b).sum() / (a.norm() * b.norm() + 1e-9)
    return loss


def lambda_rank_loss(x: Tensor, target: Tensor) -> Tensor:
    """LambdaRank (Burges 2010, MSR-TR-2010-82, section 4) as a loss whose gradient is its lambdas:
    log(1 + exp(-(x_i - x_j))) of each pair in the wrong or right order, weighted by how much
    swapping the two changes NDCG; gains from 0 to 1 over the targets' range.
    """
    gain = (target - target.min()) / (target.max() - target.min() + 1e-9)
    place = (-x).argsort().argsort().to(x.dtype)
    discount = 1 / torch.log2(place + 2)
    best = (
        gain.sort(descending=True).values / torch.log2(torch.arange(len(x), dtype=x.dtype) + 2)
    ).sum() + 1e-9
    change = ((gain[:, None] - gain[None]) * (discount[:, None] - discount[None])).abs() / best
    pairs = nn.functional.softplus(-(x[:, None] - x[None]) / (x.std().detach() + 1e-9))
    return (change.detach() * pairs * (gain[:, None] > gain[None])).sum()


def loss_of(read: Sequence[Tensor], predicted: Tensor, wanted: Tensor, ranked: Tensor) -> Tensor:
    """Everything that is minimised, for one batch: the head predicts `wanted` [n], the levels'
    norms rank the plans by `ranked` [n].
    """
    whole = nn.functional.mse_loss(predicted, wanted)
    for level in read:
        norm = level.abs().sum(1)
        whole = whole + RANKING * (spearman_loss(norm, ranked) + lambda_rank_loss(norm, ranked))
    return whole


class GraphPredictor(AbstractModel):
    """A trained network. `line`: through the table's prediction; `spread`: of what it leaves over.
    `weights`, `moments`: of each level, how well its norms rank the plans learnt from, and their
    mean and spread.
    """

    def __init__(
        self,
        network: Network,
        line: LinearPrior,
        spread: float,
        weights: list[float],
        moments: list[tuple[float, float]],
    ) -> None:
        self.network, self.line, self.spread, self.weights, self.moments = (
            network,
            line,
            spread,
            weights,
            moments,
        )

    @torch.no_grad()
    def predict(self, data: Data) -> Array:
        """[plans]."""
        self.network.eval()
        parts = [
            self.network(Batch(data.nodes[i : i + 64]))[1] for i in range(0, len(data.nodes), 64)
        ]
        return np.asarray(torch.cat(parts).double().numpy() * self.spread + self.line.of(data))

    def shares(self, data: Data) -> tuple[Array, float]:
        """None: it reads no columns."""
        raise QSearchError(
            "a graph predictor reads no columns to share a prediction among; it scores "
            "operations and blocks"
        )

    @torch.no_grad()
    def scores(self, skeleton: Skeleton, nodes: Nodes) -> tuple[dict[str, float], dict[str, float]]:
        """(layer -> score, block -> score) of one plan: how good its choices look, as the L1 norm
        where the hop level reads it.

        In standard deviations of that level's norms, times the level's own Spearman on the plans
        learnt from. Higher is better for the metric as learnt.
        """
        self.network.eval()
        batch = Batch([nodes])
        norms = [x.abs().sum(1).numpy() for x in self.network.levels(batch.values, batch.edges)]

        def at(level: int, node: int) -> float:
            mean, spread = self.moments[level]
            return float((norms[level][node] - mean) / spread * self.weights[level])

        layers = {name: at(0, i) for name, i in skeleton.of_layer.items()}
        return layers, {
            name: at(min(distance, HOPS), root)
            for name, (root, distance) in skeleton.blocks.items()
        }

    def save(self, folder: Path) -> None:
        """Write `network.safetensors` and `network.json`."""
        from safetensors.torch import save_file

        with writing(folder / "network.safetensors"):
            folder.mkdir(parents=True, exist_ok=True)
            save_file(self.network.state_dict(), folder / "network.safetensors")
        content = {
            "line": asdict(self.line),
            "spread": self.spread,
            "weights": self.weights,
            "moments": self.moments,
        }
        write_json(folder / "network.json", Header(SCHEMA), content)


def fit(data: Data, target: Array, seed: int) -> GraphPredictor:
    """A network trained on plans with `nodes` and what was measured of them [plans]."""
    if not data.nodes:
        raise QSearchError(
            "a graph predictor learns from plans on their graphs; these have columns alone"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Network()
        line = LinearPrior.through(data, target)
        left = target - line.of(data)
        spread = float(left.std()) or 1.0
        wanted, ranked = torch.from_numpy(left / spread).float(), torch.from_numpy(target).float()
        steps = EPOCHS * -(-len(target) // BATCH)
        optimizer = torch.optim.AdamW(network.parameters(), _RATE, weight_decay=_DECAY)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=steps)
        for _ in range(EPOCHS):
            order = torch.randperm(len(target))
            for part in order.split(BATCH):
                read, made = network(Batch([data.nodes[int(i)] for i in part]))
                loss = loss_of(read, made, wanted[part], ranked[part])
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(network.parameters(), 5.0)
                optimizer.step()
                schedule.step()
    return GraphPredictor(network, line, spread, *_levels(network, data.nodes, target))


@torch.no_grad()
def _levels(
    network: Network, nodes: Sequence[Nodes], target: Array
) -> tuple[list[float], list[tuple[float, float]]]:
    """Of each level: Spearman of the plans' norms with the target, and mean and spread of all
    nodes' norms.
    """
    from scipy.stats import spearmanr

    network.eval()
    read: list[list[Tensor]] = [[] for _ in range(HOPS + 1)]
    norms: list[list[Tensor]] = [[] for _ in range(HOPS + 1)]
    for start in range(0, len(nodes), 64):
        batch = Batch(nodes[start : start + 64])
        for level, x in enumerate(network.levels(batch.values, batch.edges)):
            norms[level].append(x.abs().sum(1))
        for level, x in enumerate(network(batch)[0]):
            read[level].append(x.abs().sum(1))
    found = [float(spearmanr(torch.cat(part).numpy(), target).statistic) for part in read]
    return [x if np.isfinite(x) else 0.0 for x in found], [
        (float(torch.cat(n).mean()), float(torch.cat(n).std()) or 1.0) for n in norms
    ]


def load(folder: Path) -> GraphPredictor:
    """Read `network.safetensors` and `network.json`."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    _, c = read_json(folder / "network.json", SCHEMA)
    network = Network()
    try:
        network.load_state_dict(load_file(folder / "network.safetensors"))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ArtifactError(
            f"{folder / 'network.safetensors'} is not this network "
            f"({str(error).splitlines()[0]}); fit again"
        ) from error
    return GraphPredictor(
        network,
        LinearPrior(**c["line"]),
        c["spread"],
        c["weights"],
        [(a, b) for a, b in c["moments"]],
    )

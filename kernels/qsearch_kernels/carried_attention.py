"""Attention statistics carried from step to step: Re-ttention, residual sharing, caching.

A sparse softmax divides by the sum over the keys that it kept, so each of them weighs too much, and
what the others would have added is missing. Between two dense steps both can be mended with what
the last dense step measured (Re-ttention, arXiv 2505.22918, equations 8 to 10):

    rho = sum over kept keys of exp(score) / sum over all of exp(score)      at the dense step
    R   = dense output - rho * sparse output                                 at the dense step
    out = rho * sparse output + R                                            at the others

`~rettention` does both; `~rho` leaves R out; `~residual` takes rho as 1 in both places, which is
DiTFastAttn's residual sharing (arXiv 2406.08552); `~cached` returns the last dense output and
computes nothing. A dense step costs the sparse attention besides. rho drifts as sampling goes on:
its drift is 0, a number a step (Re-ttention's released code adds 0.04 after each sparse step), or a
table that was measured (`attention_calibration.fit_drift`).

State is kept per batch row, head and token, and dropped when a sampling begins again.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .attention_choice import AttentionChoice
from .attention_layout import Dense, Tokens, layout_of
from .sparse_attention import Attended, attention, reference

Attention = Callable[..., Attended]


@dataclass(frozen=True)
class Arrangement:
    """`Tokens` of any length: how many are text, how many frames, whether text comes first."""

    text: int = 0
    frames: int = 1
    text_first: bool = True

    def of(self, total: int) -> Tokens:
        """A sequence of `total` tokens. Raises `ValueError` where the frames do not fit."""
        return Tokens(total, self.text, self.frames, self.text_first)


IMAGE_ONLY = Arrangement()


@dataclass
class _Carried:
    """What a dense step measured: rho [batch, heads, T], residual or output [..., head size]."""

    step: int
    shape: torch.Size
    rho: Tensor | None = None
    residual: Tensor | None = None
    output: Tensor | None = None


@dataclass
class SparseAttentionState:
    """What one attention carries from step to step: one entry for each of its calls within a step.

    A pipeline that guides in two calls a step has two entries; the n-th call of a step goes on from
    the n-th of the step before.

    Args:
        arrangement: of the attention's tokens.
        drift: what rho gains from a dense step to each of the steps behind it, from `fit_drift`;
            [every - 1, heads]. Needed by `~fit` alone.
    """

    arrangement: Arrangement = IMAGE_ONLY
    drift: Tensor | None = None
    _carried: list[_Carried] = field(default_factory=list, repr=False)
    _choice: AttentionChoice | None = None
    _step: int = -1
    _call: int = 0

    def reset(self) -> None:
        """A sampling begins: nothing is carried."""
        self._carried.clear()
        self._choice, self._step, self._call = None, -1, 0

    def copied(self) -> SparseAttentionState:
        """The same state, for a call that must not change this one."""
        return replace(self, _carried=list(self._carried))

    @property
    def bytes(self) -> int:
        """Memory of what is carried now."""
        return sum(
            x.numel() * x.element_size()
            for each in self._carried
            for x in (each.rho, each.residual, each.output)
            if x is not None
        )

    def enter(self, choice: AttentionChoice, step: int) -> None:
        """A call begins; an earlier step or another choice than the last drops what is carried."""
        if step < self._step or (self._choice is not None and choice != self._choice):
            self.reset()
        self._call = self._call + 1 if step == self._step else 0
        self._choice, self._step = choice, step

    def current(self, q: Tensor, every: int) -> _Carried | None:
        """What this call goes on from; None where it is to be dense.

        Raises:
            ValueError: for another batch, or other heads or tokens, than at the last dense step.
        """
        if self._call >= len(self._carried):
            return None
        found = self._carried[self._call]
        if found.shape != q.shape[:3]:
            raise ValueError(
                "an attention carried from step to step keeps its batch, heads and tokens; given "
                f"{tuple(q.shape[:3])} at step {self._step}, {tuple(found.shape)} at step "
                f"{found.step}: reset the state where a sampling begins"
            )
        return found if self._step - found.step < every else None

    def keep(self, carried: _Carried) -> None:
        """This call was dense: later steps go on from it."""
        self._carried[self._call : self._call + 1] = [carried]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    choice: AttentionChoice,
    state: SparseAttentionState,
    step: int,
    *,
    scale: float | None = None,
    compute: Attention = attention,
) -> Tensor:
    """An attention's output at a sampler's step, as `choice` says, from what `state` carries.

    Args:
        q, k, v: [batch, heads, T, head size], self-attention without a mask.
        choice: what is done.
        state: of this attention; changed by a dense step.
        step: of the sampler, counted up; a step before the last one seen begins a new sampling.
        scale: 1 / sqrt(head size) where none is given.
        compute: what computes an attention and its statistics: `sparse_attention.attention`, its
            twin, or a GPU's kernel.

    Returns:
        [batch, heads, T, head size].

    Raises:
        ValueError: where the batch changed since the last dense step, where tokens do not fit the
            arrangement, and where `~fit` has no table.
    """
    tokens = state.arrangement.of(q.shape[2])
    layout = layout_of(choice.kind, choice.parts, tokens)
    settings = {"scale": scale, "int8_qk": choice.int8_qk}
    state.enter(choice, step)
    if not choice.method:
        return compute(q, k, v, layout, **settings).output
    carried = state.current(q, choice.every)
    if carried is None:
        dense = compute(q, k, v, Dense(tokens), **settings)
        made = _Carried(step, q.shape[:3])
        if choice.method == "cached":
            made.output = dense.output.detach().clone()  # a model may write over what it gets
        else:
            sparse = compute(q, k, v, layout, **settings)
            made.rho, made.residual = _measured(choice.method, dense, sparse)
        state.keep(made)
        return dense.output
    if carried.output is not None:
        return carried.output.clone()
    made_now = compute(q, k, v, layout, **settings).output
    if carried.rho is not None:
        rho = drifted(carried.rho, choice, state.drift, step - carried.step, tokens)
        made_now = made_now * rho[..., None].to(made_now.dtype)
    return made_now if carried.residual is None else made_now + carried.residual


def _measured(
    method: str, dense: Attended, sparse: Attended
) -> tuple[Tensor | None, Tensor | None]:
    """rho and the residual of a dense step, whichever the method carries."""
    rho = (sparse.lse - dense.lse).exp().clamp(max=1.0).detach()
    if method == "rho":
        return rho, None
    part = (
        sparse.output if method == "residual" else sparse.output * rho[..., None].to(sparse.output)
    )
    return (None if method == "residual" else rho), (dense.output - part).detach()


def drifted(
    rho: Tensor, choice: AttentionChoice, table: Tensor | None, stale: int, tokens: Tokens
) -> Tensor:
    """rho [batch, heads, T], `stale` steps after it was measured.

    Text tokens see all keys: theirs stays 1. A number a step is added from the second sparse step
    on and not bounded, as in Re-ttention's released code; what a table adds is bounded to [0, 1].
    """
    if choice.drift == 0:
        return rho
    out = rho.clone()
    visual = out[:, :, tokens.visual_slice]
    if choice.drift is not None:
        visual += choice.drift * (stale - 1)
        return out
    wanted = (choice.every - 1, rho.shape[1])
    if table is None or table.shape != wanted:
        given = "none" if table is None else f"one of shape {tuple(table.shape)}"
        raise ValueError(f"{choice} needs a table of drifts {wanted} from fit_drift; given {given}")
    visual += table[stale - 1].to(rho)[:, None]
    visual.clamp_(0.0, 1.0)
    return out


def attend_reference(
    trajectory: Sequence[tuple[Tensor, Tensor, Tensor]],
    choice: AttentionChoice,
    arrangement: Arrangement = IMAGE_ONLY,
    drift: Tensor | None = None,
) -> list[Tensor]:
    """The slow twin of `attend` over a sampling: equations 8 to 10, written out in fp64.

    Args:
        trajectory: q, k, v of each step.
        choice: what is done in all of them.
        arrangement: of the tokens.
        drift: the table of `~fit`.

    Returns:
        The output at each step.
    """
    made: list[Tensor] = []
    last, rho, residual, output = 0, torch.empty(0), torch.empty(0), torch.empty(0)
    for step, (q, k, v) in enumerate(trajectory):
        tokens = arrangement.of(q.shape[2])
        layout = layout_of(choice.kind, choice.parts, tokens)
        sparse = reference(q, k, v, layout, int8_qk=choice.int8_qk)
        if not choice.method:
            made.append(sparse.output)
        elif step % choice.every == 0:
            dense = reference(q, k, v, Dense(tokens), int8_qk=choice.int8_qk)
            last, output = step, dense.output
            rho = sparse.lse.exp() / dense.lse.exp()
            if choice.method == "residual":
                rho = torch.ones_like(rho)
            residual = output - rho[..., None] * sparse.output
            made.append(output)
        elif choice.method == "cached":
            made.append(output)
        else:
            now = rho.clone()
            rows = tokens.visual_slice
            if choice.drift is not None:
                now[:, :, rows] += choice.drift * (step - last - 1)
            elif drift is not None:
                moved = now[:, :, rows] + drift[step - last - 1][:, None]
                now[:, :, rows] = moved.clamp(0.0, 1.0)
            out = now[..., None] * sparse.output
            made.append(out if choice.method == "rho" else out + residual)
    return made


@dataclass
class SparseAttention:
    """An attention's choice and state together: what a router calls in place of torch's.

    Args:
        choice: what is done, or a function of the step for a choice that changes with it.
        state: where it is carried.
    """

    choice: AttentionChoice | Callable[[int], AttentionChoice]
    state: SparseAttentionState = field(default_factory=SparseAttentionState)
    _said: set[str] = field(default_factory=set, repr=False)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None, step: int) -> Tensor:
        """`attend` with this choice and state; warns once of a layout that keeps every key."""
        choice = self.choice if isinstance(self.choice, AttentionChoice) else self.choice(step)
        if choice.kind != "dense" and str(choice) not in self._said:
            self._said.add(str(choice))
            tokens = self.state.arrangement.of(q.shape[2])
            if isinstance(layout_of(choice.kind, choice.parts, tokens), Dense):
                message = f"{choice} is dense: it keeps every key of {tokens.visual} tokens"
                warnings.warn(message, stacklevel=2)
        return attend(q, k, v, choice, self.state, step, scale=scale)

    def reset(self) -> None:
        """A sampling begins."""
        self.state.reset()

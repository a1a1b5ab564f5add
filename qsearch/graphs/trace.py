"""Trace: the operations of one call of a model in order, as export or hooks saw them, before
anything is judged.

Both ways of reading a model end here, so that all that follows (folding, reachability, roles,
blocks) is written once. An operation has the bare name of its ATen overload (`linear`, `add`,
`view`) and its arguments by the names of the ATen schema.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


@dataclass(eq=False, slots=True)
class Call:
    """One operation, or a tensor that is given: an "input", a "parameter" or a "constant", with its
    name.

    `where`: the module that ran it. `shape`: of its result; () for a list of tensors, whose members
    are "getitem" calls.
    """

    op: str
    arguments: dict[str, Any] = field(default_factory=dict)
    shape: tuple[int, ...] = ()
    where: str = ""
    name: str = ""
    integer: bool = False

    @property
    def given(self) -> tuple[Call, ...]:
        """The calls whose results it reads, in the order of its arguments."""
        return tuple(members(tuple(self.arguments.values())))

    @property
    def numel(self) -> int:
        """Elements of its result."""
        return math.prod(self.shape)


@dataclass
class Trace:
    """Calls in order of execution, the ones that the model returns, and `aliases`: parameter -> its
    other names.
    """

    calls: list[Call]
    outputs: tuple[Call, ...]
    source: str
    aliases: dict[str, tuple[str, ...]] = field(default_factory=dict)


def members(value: Any) -> Iterator[Call]:
    """The calls within an argument: itself, or the members of a list."""
    if isinstance(value, Call):
        yield value
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from members(inner)


def bound(
    target: torch._ops.OpOverload[Any, Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Arguments of an ATen operation by the names of its schema, defaults included."""
    schema = target._schema.arguments
    out = {a.name: a.default_value for a in schema if a.has_default_value()}
    out.update({a.name: value for a, value in zip(schema, args, strict=False)})
    return {a.name: (out | kwargs)[a.name] for a in schema if a.name in out or a.name in kwargs}


def bare(target: torch._ops.OpOverload[Any, Any]) -> str:
    """`linear` for aten.linear.default, `add_` for aten.add_.Tensor."""
    return target._schema.name.partition("::")[2]


def named_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> module, without the wrappers of torch.compile and their part of the name;
    `get_submodule` finds it all the same.
    """
    return {_plain(name): original(module) for name, module in model.named_modules()}


def parameter_names(model: nn.Module) -> tuple[dict[int, str], dict[str, tuple[str, ...]]]:
    """id of each parameter -> its first name, and first name -> its other names (shared weights,
    modules under two names).
    """
    first: dict[int, str] = {}
    others: dict[str, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in first:
            others.setdefault(first[id(parameter)], []).append(_plain(name))
        else:
            first[id(parameter)] = _plain(name)
    return first, {name: tuple(found) for name, found in others.items()}


def _plain(name: str) -> str:
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def flat(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """`(path, leaf)` of what lies in nested dicts and lists, paths such as
    `added_cond_kwargs.time_ids`.
    """
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from flat(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            yield from flat(inner, f"{path}.{i}" if path else str(i))
    else:
        yield path, value


def path_of(keys: tuple[Any, ...]) -> str:
    """`added_cond_kwargs.time_ids` for the keys by which pytree names a leaf."""
    return ".".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in keys)


def original(model: nn.Module) -> nn.Module:
    """The module itself where `model` is what torch.compile made of it."""
    inner = model.__dict__.get("_modules", {}).get("_orig_mod", model)
    assert isinstance(inner, nn.Module)
    return inner

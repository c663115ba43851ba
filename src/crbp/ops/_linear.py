"""Split a vector-Jacobian product into what depends on the vector and what does not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, fx

aten = torch.ops.aten
# So cheap, next to reading a tensor, that the result is computed anew rather than kept.
_CHEAP = {
    aten.add, aten.addcmul, aten.alias, aten.detach, aten.expand, aten.mul, aten.neg, aten.rsub, aten.squeeze, aten.sub,
    aten.unsqueeze, aten.view, aten._unsafe_view,
}  # fmt: skip


class Linear(NamedTuple):
    """A function ``g, x… ↦ gᵀ J(x)`` in two parts.

    Attributes:
        residuals: of ``x…`` all that is expensive and does not depend on ``g``.
        product: of ``g``, the residuals and some of ``x…`` the result.
        needed: which of ``x…`` it takes.
    """

    residuals: fx.GraphModule
    product: fx.GraphModule
    needed: tuple[int, ...]


def linearise(traced: fx.GraphModule) -> Linear | None:
    """Split the graph of a function of ``g, x…`` that is linear in ``g``; None for one that writes or draws."""
    nodes = list(traced.graph.nodes)
    if not all(_is_pure(node) for node in nodes):
        return None
    vector, *arguments = (node for node in nodes if node.op == "placeholder")
    dependent = {vector}
    for node in nodes:
        if any(each in dependent for each in node.all_input_nodes):
            dependent.add(node)
    dependent.add(nodes[-1])  # the result, even where no part of it is
    # What crosses from one part to the other; then cheap nodes are left to the second, if that takes no more tensors.
    crossing = {each for node in dependent for each in node.all_input_nodes if each not in dependent}
    for node in reversed(nodes):
        if node in crossing and node.op == "call_function" and _better_anew(node, crossing):
            crossing.remove(node)
            crossing.update(node.all_input_nodes)
            dependent.add(node)
    kept = [node for node in nodes if node in crossing and node not in arguments]
    needed = tuple(place for place, node in enumerate(arguments) if node in crossing)
    given = [vector, *kept, *(arguments[place] for place in needed)]
    result = nodes[-1].args[0]
    return Linear(_part(traced, arguments, kept), _part(traced, given, result), needed)


def _is_pure(node: fx.Node) -> bool:
    if node.op != "call_function":
        return node.op in ("placeholder", "get_attr", "output")
    overload = node.target
    if not isinstance(overload, torch._ops.OpOverload):
        return True  # such as taking one of several results
    return not overload._schema.is_mutable and torch.Tag.nondeterministic_seeded not in overload.tags


def _better_anew(node: fx.Node, crossing: set[fx.Node]) -> bool:
    more = [each for each in node.all_input_nodes if each not in crossing and _elements(each) >= _elements(node)]
    return not node.all_input_nodes or (getattr(node.target, "overloadpacket", None) in _CHEAP and len(more) <= 1)


def _elements(node: fx.Node) -> int:
    value = node.meta.get("val")
    return value.numel() if isinstance(value, Tensor) else 0


def _part(traced: fx.GraphModule, given: Sequence[fx.Node], result: Sequence[fx.Node]) -> fx.GraphModule:
    """The part of a graph between the nodes ``given`` and ``result``."""
    graph = fx.Graph()
    copies = {node: graph.placeholder(node.name) for node in given}
    found, left = set(), list(result)
    while left:
        node = left.pop()
        if node not in found and node not in copies:
            found.add(node)
            left.extend(node.all_input_nodes)
    for node in traced.graph.nodes:
        if node in found:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in result))
    return fx.GraphModule(traced, graph)

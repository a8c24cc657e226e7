"""An exported program as one functional graph: blocks in place of their calls, nothing changed in place."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from optrelax.errors import Problem
from optrelax.networks.exported_nodes import tensor_of
from optrelax.networks.places import AUTOCAST, TRANSFORMED, ExportRefused, line_of, op_name


@dataclass(frozen=True, slots=True)
class _Block:
    """Where the arguments of a call of a block stand."""

    enabled: int
    """Whether the mode that it sets is on."""
    block: int
    harmful: bool
    """Whether that mode changes numbers."""


_BLOCKS = {"wrap_with_set_grad_enabled": _Block(0, 1, False), "wrap_with_autocast": _Block(2, 4, True)}
_TRANSFORMS = ("_batch_dim", "_make_dual", "_for_grad")
_OWN_CONDITIONS = "a block that runs under conditions of its own"


def flatten(module: fx.GraphModule) -> fx.Graph:
    """The module's graph with blocks under torch.no_grad in place of their calls, what they return detached."""
    graph = fx.Graph()
    graph.output(_copy(module, graph, {}))
    return graph


def _copy(module: fx.GraphModule, graph: fx.Graph, values: dict[fx.Node, Any]) -> Any:
    for node in module.graph.nodes:
        if node in values or node.op == "get_attr":
            continue
        if node.op == "output":
            return fx.map_arg(node.args[0], values.__getitem__)
        if (place := _BLOCKS.get(str(node.target))) is not None and not (place.harmful and node.args[place.enabled]):
            block = getattr(module, str(node.args[place.block].target))
            given = [values[n] if isinstance(n, fx.Node) else n for n in node.args[place.block + 1 :]]
            inner = dict(zip((n for n in block.graph.nodes if n.op == "placeholder"), given, strict=True))
            outputs = _copy(block, graph, inner)
            for user in node.users:
                found = outputs[user.args[1]]
                stopped = not place.harmful and not node.args[place.enabled]
                values[user] = detached(graph, found) if stopped else found
            continue
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            reason = AUTOCAST if "autocast" in str(node.target) else f"has no rule: {_OWN_CONDITIONS}"
            raise ExportRefused(Problem(node.name, str(node.target), reason, line_of(node)))
        values[node] = graph.node_copy(node, values.__getitem__)
        if node.target is torch.ops.aten.detach_.default:  # changes no number
            values[node].target = torch.ops.aten.detach.default
    return None


def detached(graph: fx.Graph, value: object) -> Any:
    """A node that detaches a tensor; at the end of the graph."""
    if not isinstance(value, fx.Node) or tensor_of(value) is None:
        return value
    found = graph.call_function(torch.ops.aten.detach.default, (value,))
    found.meta = dict(value.meta)
    return found


def _written(node: fx.Node) -> list[fx.Node]:
    """The arguments that a call changes in place."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return []
    given = [*zip(schema.arguments, node.args, strict=False)]
    given += [(a, node.kwargs[a.name]) for a in schema.arguments if a.name in node.kwargs]
    return [v for a, v in given if a.alias_info is not None and a.alias_info.is_write and isinstance(v, fx.Node)]


def _storage(node: fx.Node) -> int | None:
    value = tensor_of(node)
    return None if value is None else value.untyped_storage()._cdata


def mutations(graph: fx.Graph, program: Any) -> list[Problem]:
    """Parameters, buffers and constants that forward changes."""
    specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
    owners = {_storage(n): specs[n.name] for n in graph.nodes if n.op == "placeholder"}
    problems = []
    for node in graph.nodes:
        for value in _written(node):
            spec = owners.get(_storage(value))
            if spec is None or spec.kind.name == "USER_INPUT":
                continue
            name = str(spec.target).removeprefix("net.")
            kind = spec.kind.name.lower().replace("_", " ")
            reason = (
                f"forward changes this {kind} at each call; call .eval() where that stops it, or change it elsewhere"
            )
            problems.append(Problem(name, op_name(node.target), reason, line_of(node)))
    return list({p.where: p for p in problems}.values())


def transforms(graph: fx.Graph) -> list[Problem]:
    """The first call under torch.vmap or torch.func, which export does not look into."""
    nodes = [node for node in graph.nodes if any(name in str(node.target) for name in _TRANSFORMS)]
    return [Problem(op_name(n.target), "torch.func", TRANSFORMED, line_of(n)) for n in nodes[:1]]


def renamed(graph: fx.Graph) -> bool:
    """Turn `relu_(v)` into `w = relu(v)`, with w for v from there on; False where v is read through another view."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    found: list[tuple[fx.Node, fx.Node, Any]] = []
    for node in graph.nodes:
        changed = _written(node)
        if not changed:
            continue
        functional, value, at = _functional_form(node.target), changed[0], order[node]
        if len(changed) > 1 or functional is None:
            return False
        aliases = (n for n in graph.nodes if _storage(n) == _storage(value) and n is not value and order[n] < at)
        mine = {w for w, v, _ in found if v is value} | {value}
        if any(order[user] > at for n in aliases if n not in mine for user in n.users):
            return False
        found.append((node, value, functional))
    for node, value, functional in found:
        node.target = functional
        value.replace_all_uses_with(node, delete_user_cb=functools.partial(_is_later, order, order[node]))
    return True


def _is_later(order: dict[fx.Node, int], at: int, user: fx.Node) -> bool:
    return order[user] > at


def _functional_form(target: Any) -> object:
    """aten.relu_.default -> aten.relu.default; None where there is none."""
    packet = getattr(torch.ops.aten, target._schema.name.removeprefix("aten::").removesuffix("_"), None)
    return getattr(packet, target._overloadname, None)

"""Ops without a rule of their own as ops that have one, where torch says how the one is made of the others."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from optrelax.networks.exported_nodes import SHAPES_ONLY, SIZES
from optrelax.networks.functional_graphs import flatten
from optrelax.networks.registry import rule_of

_DEPTH = 5  # of ops made of ops made of others


def made_of_others(program: Any, graph: fx.Graph) -> Any:
    """The exported program with every op in ops with rules that can be; None where there is none to rewrite."""
    lacking = _lacking(program, graph)
    if not lacking:
        return None
    known = torch.export.default_decompositions()
    wanted = [target for target in lacking if target in known]
    if not wanted:
        return None
    found = _rewritten(program, wanted, known, lacking)
    if found is None and len(wanted) > 1:  # some of them come to ops without a rule: those stay, to be named
        wanted = [target for target in wanted if _rewritten(program, [target], known, lacking) is not None]
        found = _rewritten(program, wanted, known, lacking) if wanted else None
    return found


def _rewritten(program: Any, wanted: list[Any], known: Any, lacking: set[Any]) -> Any:
    """The program without the ops `wanted`; None where that brings in others that have no rule."""
    table = {target: known[target] for target in wanted}
    for _ in range(_DEPTH):
        found = program.run_decompositions(table)
        left = _lacking(found, flatten(found.graph_module))
        new = left - lacking
        if not new and not left & table.keys():
            return found
        if not all(target in known for target in new):
            return None
        table |= {target: known[target] for target in new}
    return None


def _lacking(program: Any, graph: fx.Graph) -> set[Any]:
    """The ops without a rule among those that read a number of the network's input."""
    given, found = program.graph_signature.user_inputs, set()
    reading = {n for n in graph.nodes if n.op == "placeholder" and n.name in given}
    for node in graph.nodes:
        if node.op == "call_function" and node.target not in SIZES | SHAPES_ONLY:
            if reading.isdisjoint(node.all_input_nodes):
                continue
            reading.add(node)
            if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "aten":
                found |= {node.target} if rule_of(node.target) is None else set()
    return found

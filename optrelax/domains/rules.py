"""The registry of rules: how one class of op acts on one domain."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from optrelax.errors import Problem, UnsupportedOpError
from optrelax.networks.graph import Network

Rule = TypeVar("Rule", bound=Callable[..., object])
_RULES: dict[tuple[type, type], Callable[..., object]] = {}


def rule(op: type, domain: type) -> Callable[[Rule], Rule]:
    """Decorator: the function by which ops of class `op` act on `domain`."""

    def decorate(function: Rule) -> Rule:
        _RULES[op, domain] = function
        return function

    return decorate


def find_rule(op: object, domain: type) -> Callable[..., Any] | None:
    """The rule of the nearest base class, None where there is none."""
    for cls in type(op).__mro__:
        if (cls, domain) in _RULES:
            return _RULES[cls, domain]
    return None


def require_rules(network: Network, domain: type) -> None:
    """UnsupportedOpError naming every op of the network without a rule for this domain."""
    problems = [
        Problem(node.path, type(node.op).__name__, f"has no rule for {domain.__name__}")
        for node in network
        if find_rule(node.op, domain) is None
    ]
    if problems:
        known = sorted({op.__name__ for op, d in _RULES if d is domain})
        raise UnsupportedOpError(problems, f"{domain.__name__} rules: {', '.join(known)}")

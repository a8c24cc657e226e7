"""The rules: how a call of an ATen op, or of a module, function or method of the user's choice, becomes an op.

One rule an ATen op, under `@rule(...)`, in a file of `optrelax/networks/rules`.  A rule gets a `Call` and returns

- an op (`Affine`, `Activation`, max-like): a node that reads all values of the call, in their order;
- a `Value`: the call is that value (an identity), or one made by `call.add(op, *values)` from several nodes;
- a tuple of these, one an output, for ops with several outputs (`split`, `max` with indices; None: not computed).

It refuses a call by ValueError (or `Refused`) with the reason, which becomes a line of `optrelax.check`'s report.
"""

from __future__ import annotations

import importlib
import types
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

from optrelax.networks.activation_checks import check_activation
from optrelax.networks.activations import Activation
from optrelax.networks.calls import Call, Op, Value

Result = Op | Value | tuple[Op | Value | None, ...]
Rule = Callable[[Call], Result]
_Rule = TypeVar("_Rule", bound=Rule)
Target = type[nn.Module] | Callable[..., object] | str

_RULES: dict[object, Rule] = {}
_MODULES: dict[type[nn.Module], Rule] = {}
_FUNCTIONS: dict[object, Rule] = {}
_TAKE_HIDDEN: set[Rule] = set()
_registered: list[Target] = []


def rule(*targets: object, hidden: bool = False) -> Callable[[_Rule], _Rule]:
    """Decorator: the rule of ATen ops, such as `torch.ops.aten.relu` (every overload) or `torch.ops.aten.add.Tensor`.

    An overload's own rule is preferred to that of all overloads.  In-place ops have none: a graph is made functional
    before rules see it, so `relu_` is `relu`.  hidden: it takes values with entries that minus infinity hides.
    """

    def decorate(function: _Rule) -> _Rule:
        for target in targets:
            if not isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
                raise TypeError(f"rule: wants ops such as torch.ops.aten.relu, got {target!r}")
            if target in _RULES:
                raise ValueError(f"rule: {target} has a rule already")
            _RULES[target] = function
        if hidden:
            _TAKE_HIDDEN.add(function)
        return function

    return decorate


def register_op(*targets: Target) -> Callable[[Rule], Rule]:
    """Decorator: how calls of these module types, functions, methods (by name) or ATen ops become ops of a network.

    The function gets a `Call`, whose arguments are as the caller gave them, and returns an `Affine`, an `Activation`,
    a `Value`, or a tuple of these for several outputs; ValueError refuses the call.  It goes before the rules of the
    library: what it takes is not looked into.

    Args:
        targets: module types, functions, names of methods, or ATen ops.

    Returns:
        The decorator, which gives the function back.

    Raises:
        TypeError: for a target that is none of these.

    Example:
        >>> class Clamp(nn.Module):
        ...     def forward(self, x):
        ...         return x.clamp(min=0)
        >>> @ox.register_op(Clamp)
        ... def clamped(call):
        ...     return ox.activations.relu()
        >>> ox.check(nn.Sequential(nn.Linear(4, 4), Clamp())).ok
        True
    """

    def decorate(builder: Rule) -> Rule:
        for target in targets:
            if isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
                load_rules()
                _RULES[target] = builder
            elif isinstance(target, type) and issubclass(target, nn.Module):
                _MODULES[target] = builder
            elif callable(target) or isinstance(target, str):
                _FUNCTIONS[target] = builder
            else:
                raise TypeError(f"register_op: wants a module type, function or method name, got {target!r}")
            _registered.append(target)
        return builder

    return decorate


def register_activation(*targets: Target, activation: Activation) -> None:
    """Make calls of `targets` this activation, for every relaxation and layer.

    Args:
        targets: module types, functions, names of methods, or ATen ops.
        activation: a `PiecewiseLinear`, a `Smooth`, or one of your own kind.

    Raises:
        TypeError: for a target that is none of these, and for what is no activation.
        ValueError: where its function leaves what it says about itself: see `check_activation`.

    Example:
        >>> def bent(x):
        ...     return torch.where(x < 0, 0.1 * x, x)
        >>> piecewise = ox.PiecewiseLinear("bent", bent, kinks=(0.0,), slopes=(0.1, 1.0), intercepts=(0.0, 0.0))
        >>> ox.register_activation(bent, activation=piecewise)
    """
    if not isinstance(activation, Activation):
        raise TypeError(f"register_activation: wants an Activation, got {type(activation).__name__}")
    check_activation(activation)
    register_op(*targets)(lambda call: activation)


def plain_functions() -> list[tuple[types.FunctionType, Rule]]:
    """The registered functions that are written in Python and are not torch's."""
    return [
        (f, r)
        for f, r in _FUNCTIONS.items()
        if isinstance(f, types.FunctionType) and not (f.__module__ or "").startswith("torch")
    ]


def load_rules() -> None:
    """Fill the registry with the library's rules: on first use, and before a rule of the user's replaces one."""
    importlib.import_module("optrelax.networks.rules")


def rule_of(target: object) -> Rule | None:
    """The rule of an ATen op of an exported graph."""
    load_rules()
    found = _RULES.get(target)
    return found if found is not None else _RULES.get(getattr(target, "overloadpacket", None))


def takes_hidden(function: Rule) -> bool:
    """Whether a rule knows what minus infinity hides: `Value.shown`."""
    return function in _TAKE_HIDDEN


def module_rule(module: nn.Module) -> Rule | None:
    """The rule registered for a module's type; none where the object or a subclass has a forward of its own."""
    if "forward" in vars(module):
        return None
    for cls in type(module).__mro__:
        if cls in _MODULES and type(module).forward is cls.forward:
            return _MODULES[cls]
    return None


def function_rule(function: object) -> tuple[object, Rule] | None:
    """The function or method name that a call is registered under, and its rule."""
    if not _FUNCTIONS:
        return None
    try:
        found = _FUNCTIONS.get(function)
    except TypeError:  # not hashable
        return None
    if found is not None:
        return function, found
    name = getattr(function, "__name__", None)
    if name in _FUNCTIONS and getattr(torch.Tensor, str(name), None) is function:
        return name, _FUNCTIONS[name]
    # `x + y` is Tensor.__add__ where operator.add is registered.
    for registered, builder in _FUNCTIONS.items():
        plain = getattr(registered, "__name__", "")
        if getattr(registered, "__module__", "") == "_operator" and name in (f"__{plain}__", f"__r{plain}__"):
            return registered, builder
    return None


def generation() -> tuple[int, ...]:
    """Changes with every registration: what was captured under other rules is captured anew."""
    return id(_RULES), id(_MODULES), id(_FUNCTIONS), len(_registered)


def supported() -> str:
    """One line naming every op with a rule."""
    load_rules()
    ops = sorted({str(target).split(".")[1] for target in _RULES})
    own = sorted({t if isinstance(t, str) else getattr(t, "__name__", str(t)) for t in (*_MODULES, *_FUNCTIONS)})
    line = f"modules, functions and methods made of the ops {', '.join(ops)}"
    return f"{line}; registered: {', '.join(own)}" if own else line

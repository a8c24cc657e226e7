"""Why a module cannot be captured, whatever its graph: what it is made of, its modes, hooks and types."""

from __future__ import annotations

import torch
from torch import nn

from optrelax.errors import Problem
from optrelax.networks.graph import HALF, IN_TRAINING, MODES, normalises_by_batch
from optrelax.networks.snapshots import global_hooks

HOOKED = "has forward hooks, which may do anything with what they see; remove them"


def _of(path: str, module: nn.Module, reason: str) -> Problem:
    return Problem(path or "(root)", type(module).__name__, reason)


def unreadable(net: nn.Module) -> list[Problem]:
    """Modules of which nothing can be read yet, or ever."""
    problems = []
    for path, m in net.named_modules():
        if isinstance(m, torch.jit.ScriptModule):
            reason = "is scripted, and cannot be followed; put in the nn.Module that was scripted or traced"
        elif any(map(nn.parameter.is_lazy, (*m.parameters(False), *m.buffers(False)))):
            reason = "has no weights before its first call; call the network once on an example"
        else:
            continue
        problems.append(_of(path, m, reason))
    return problems


def module_problems(net: nn.Module) -> list[Problem]:
    """What is wrong with the modules whatever their graph: modes, hooks, types."""
    problems = []
    for path, m in net.named_modules():
        if isinstance(m, MODES) and m.training:
            reason = IN_TRAINING if normalises_by_batch(m) else "is in training mode; call .eval()"
            problems.append(_of(path, m, reason))
        hooks = (*m._forward_hooks.values(), *m._forward_pre_hooks.values())
        if any(not (getattr(h, "__module__", None) or type(h).__module__).startswith("torch.") for h in hooks):
            problems.append(_of(path, m, HOOKED))
    if global_hooks():
        problems.append(_of("", net, f"every module {HOOKED}"))
    for name, tensor in (*net.named_parameters(), *net.named_buffers()):
        if tensor.dtype in HALF:
            problems.append(Problem(name, str(tensor.dtype), "bounds want float32 or float64; call .float()"))
        elif tensor.is_complex():
            problems.append(Problem(name, str(tensor.dtype), "complex numbers have no order to bound them in"))
    # Alone they can be captured, and wait for a batch.
    return [] if all(p.reason == IN_TRAINING for p in problems) else problems

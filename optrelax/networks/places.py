"""Where in the user's code a node or an error comes from, and the one sentence that a failed export comes to."""

from __future__ import annotations

import os
import traceback
import types

import torch
from torch import fx, nn

from optrelax.errors import Problem
from optrelax.networks.ops import Shape

_TORCH = os.path.dirname(torch.__file__)
_HERE = os.path.dirname(__file__)
_TRACING = tuple(os.path.join(_TORCH, part, "") for part in ("_export", "_subclasses", "fx"))
AUTOCAST = "autocast inside forward rounds to half precision; take it out, or put it around the call of the network"
TRANSFORMED = "torch.vmap and torch.func inside forward cannot be followed; write the operation on whole batches"
NO_RULE = "has no rule"
MIXES = "mixes the batch: forward works, or does the same, for some sizes of the batch only"
_OUTSIDE = (
    "takes a value out of autograd's sight, as .data, .numpy() and torch.autograd.grad do; "
    "use .detach(), and write derivatives out"
)
_DATA_DEPENDENT = (
    "forward reads a number out of a tensor; control flow must not depend on values; use relu, maximum, clamp"
)


class ExportRefused(Exception):
    """The module cannot be exported: one problem that says why."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        super().__init__(str(problem))


class DependsOnValues(Exception):
    """Forward turned a tensor into a number."""


def problem_of(net: nn.Module, error: BaseException, shape: Shape) -> Problem:
    """The one sentence that a failed export comes to."""
    name, text = type(error).__name__, str(error)
    path, kind = _module_of(net, error)
    if isinstance(error, DependsOnValues) or "DataDependent" in name or "data-dependent" in text:
        reason = _DATA_DEPENDENT
    elif "fake tensor in the exported program" in text:
        reason = _OUTSIDE
    elif "functorch" in text or "BatchedTensor" in text:
        reason = TRANSFORMED
    elif "Inference tensors cannot be saved" in text:
        reason = "inference_mode inside forward, or a constant made in it; use torch.no_grad() there, or take it out"
    elif "__obj_flatten__" in text or "ScriptObject" in text:
        reason = "is quantised or scripted; pass the float nn.Module that it was made from"
    elif "unsupported scalarType" in text and any(t.is_meta for t in net.parameters()):
        reason = "is on the meta device, where tensors have no values; load its weights first"
    elif name == "UnsupportedOperatorException" or text.startswith("aten."):
        reason = f"{sentence(error)} has no rule"
    elif "is not a known type" in text or "not a known type" in text:
        reason = f"the network must return one tensor: {sentence(error).partition(',')[0]}"
    elif "in-place operation" in text and "leaf" in text:
        reason = "forward changes a parameter or constant in place; use the form that copies"
    elif "specialized" in text or "Constraints violated" in text or "ConstraintViolation" in name:
        reason = MIXES
    elif name == "UserError" or type(error).__module__.startswith(("torch._dynamo", "torch.fx", "torch._export")):
        reason = f"cannot be exported: {sentence(error)}"
    elif "missing a required argument" in text or "positional argument" in text:
        reason = f"the network must take one tensor: {sentence(error)}"
    else:
        reason = f"fails on an input of shape {shape} behind the batch: {sentence(error)}{_other_shape(shape)}"
    return Problem(path or "(root)", kind, reason, _line_of(error))


def _other_shape(shape: Shape) -> str:
    """A hint where an input looks like an example without its batch, or an image with its channels behind."""
    behind = len(shape) == 3 and shape[2] in (1, 3, 4) and shape[0] == shape[1] > 4
    if shape == ():
        return "; x is [batch, ...], one example x[None]"
    return "; images have their channels in front: x.transpose(0, 3, 1, 2) in NumPy" if behind else ""


def _module_of(net: nn.Module, error: BaseException) -> tuple[str, str]:
    """Path and type of the innermost module whose forward an error came through."""
    paths = {id(m): (path, type(m).__name__) for path, m in net.named_modules()}
    frames = [f for f, _ in traceback.walk_tb(error.__traceback__)]
    owners = [paths[id(me)] for f in frames if id(me := f.f_locals.get("self")) in paths]
    return owners[-1] if owners else ("", type(net).__name__)


def sentence(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]


def _line_of(error: BaseException) -> str:
    """The last line of the user's own code that an error came through."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if is_users(f.filename)]
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else ""


def is_users(filename: str) -> bool:
    """Whether a file is neither torch's nor the capture's own."""
    checks = ("contextlib.py", "copy.py", "jaxtyping/_decorator.py")
    return not filename.startswith((_TORCH, _HERE, "<")) and not filename.endswith(checks)


def is_tracings(frame: types.FrameType | None) -> bool:
    """Whether a call comes from torch's tracing itself, which asks every tensor for its facts, and not from forward."""
    while frame is not None:
        name = frame.f_code.co_filename
        if frame.f_code.co_name != "__torch_function__" and (name.startswith(_TORCH) or is_users(name)):
            return name.startswith(_TRACING)  # its modes hand on the calls of forward too
        frame = frame.f_back
    return False


def op_name(target: object) -> str:
    """`conv2d` for aten.conv2d.default."""
    name = str(target) if isinstance(target, torch._ops.OpOverload) else getattr(target, "__name__", str(target))
    return name.split(".")[1] if name.startswith("aten.") else name.removesuffix(".default")


def line_of(node: fx.Node) -> str:
    """FILE:LINE of the user's code that a node comes from, empty where it is all torch's."""
    lines = [line.strip() for line in node.meta.get("stack_trace", "").splitlines()]
    for line in reversed(lines):
        if line.startswith('File "'):
            name, rest = line.removeprefix('File "').split('", line ', 1)
            if is_users(name):
                return f"{name}:{rest.split(',')[0]}"
    return ""


def module_of(node: fx.Node) -> tuple[str, str]:
    """Path and type of the innermost module that a node belongs to, ("", "") at the root."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    if not stack:
        return "", ""
    path, kind = stack[-1]
    return path.removeprefix("net").removeprefix("."), kind if isinstance(kind, str) else kind.__name__


def plainest(problems: list[Problem]) -> list[Problem]:
    """Without what follows from others: a module of torch's that has no rule, or moves the batch, says so once."""
    lacking = {p.where for p in problems if p.reason == NO_RULE}
    mixing = {p.where: p for p in reversed(problems) if p.reason.startswith("mixes the batch")}
    return [p for p in problems if (p.reason == NO_RULE if p.where in lacking else p is mixing.get(p.where, p))]

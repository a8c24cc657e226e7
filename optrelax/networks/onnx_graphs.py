"""An ONNX graph under way: its nodes and constants so far, and the model that they make."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from optrelax.networks.graph import Network

if TYPE_CHECKING:
    import onnx

OPSET = 17


class OnnxGraph:
    """Nodes and tensors so far."""

    def __init__(self, network: Network) -> None:
        self.network = network
        floats = [t.dtype for t in network.module.state_dict().values() if isinstance(t, Tensor)]
        self.dtype = torch.float64 if torch.float64 in floats else torch.float32
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: list[onnx.TensorProto] = []

    def node(self, op: str, inputs: Sequence[str], **attributes: Any) -> str:
        """Another node; the name of its value."""
        from onnx import helper

        name = f"{op}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [name], name=name, **attributes))
        return name

    def tensor(self, name: str, value: Tensor) -> str:
        """Another constant, in the network's type; its name."""
        return self._add(name, value.detach().to("cpu", self.dtype).contiguous().numpy())

    def integers(self, name: str, numbers: Sequence[int]) -> str:
        """Another list of integers; its name."""
        return self._add(name, np.array(numbers, dtype=np.int64))

    def _add(self, name: str, array: Any) -> str:
        from onnx import numpy_helper

        name = f"{name}_{len(self.tensors)}"
        self.tensors.append(numpy_helper.from_array(array, name))
        return name

    def reshape(self, x: str, shape: Sequence[int]) -> str:
        """With the batch first."""
        if 0 in shape:
            raise ValueError(f"shape {list(shape)} is empty")
        return self.node("Reshape", [x, self.integers("shape", [-1, *shape])])

    def model(self, output: str) -> onnx.ModelProto:
        """The whole, checked."""
        import onnx
        from onnx import helper

        kind = onnx.TensorProto.DOUBLE if self.dtype == torch.float64 else onnx.TensorProto.FLOAT
        shapes = self.network.input_shape, self.network.output_shape
        last = self.node("Identity", [output])
        named = zip(("input", last), shapes, strict=True)
        ends = [helper.make_tensor_value_info(name, kind, ["batch", *shape]) for name, shape in named]
        graph = helper.make_graph(self.nodes, "optrelax", ends[:1], ends[1:], self.tensors)
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], producer_name="optrelax")
        made.ir_version = 8  # that of opset 17
        onnx.checker.check_model(made)
        return made

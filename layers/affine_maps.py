"""The affine maps between the activations of a network as sparse matrices."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from optrelax.domains.backsubstitution import pull
from optrelax.errors import Problem, UnsupportedOpError
from optrelax.networks.graph import Network, Node
from optrelax.networks.ops import flatten_from
from optrelax.relaxations import identity_rows

if TYPE_CHECKING:
    import scipy.sparse as sp

Array = np.ndarray
_NO_PRODUCTS = "a program of rows takes no product of two values; crown, alpha-crown, triangle and layerwise do"


class AffineMaps:
    """The affine map from the values behind it to every pre-activation, as sparse matrices: shared by all examples."""

    def __init__(self, network: Network) -> None:
        require_lowered(network)
        self.network = network
        self._stops = frozenset(node.name for node in network.activations)
        self._maps: dict[str, tuple[dict[str, sp.csr_matrix], Array]] = {}

    def preactivation(self, node: Node) -> tuple[dict[str, sp.csr_matrix], Array]:
        """Matrices [n, entries of the source] by source node, and the constant [n], of one pre-activation."""
        if node.name not in self._maps:
            source = node.inputs[0]
            shape = self.network.shape_of(source)
            eye = identity_rows(shape, _float64(self.network))
            self._maps[node.name] = self.pull(source, eye)
        return self._maps[node.name]

    def pull(self, target: str, rows: Tensor) -> tuple[dict[str, sp.csr_matrix], Array]:
        """Rows [1, k, *shape] of a node's value as matrices on the values of activations and input behind it."""
        import scipy.sparse as sp

        with torch.no_grad():
            if target in self._stops or target == self.network.input:
                return {target: sp.csr_matrix(flatten_from(rows[0], 1).cpu().numpy())}, np.zeros(rows.shape[1])
            walk = pull(self.network, target, rows.double(), 1, {}, stop=self._stops)
            parts = dict(walk.stops)
            if self.network.input in walk.pending:
                parts[self.network.input] = walk.pending[self.network.input]
            matrices = {name: sp.csr_matrix(flatten_from(a[0], 1).cpu().numpy()) for name, a in parts.items()}
            return matrices, walk.constant[0].cpu().numpy()


def _float64(network: Network) -> Tensor:
    parameter = next(network.module.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    return torch.zeros((), dtype=torch.float64, device=device)


def require_lowered(network: Network) -> None:
    """UnsupportedOpError where an op has no rows: a product, or a maximum: `network.lowered` has ReLUs for it."""
    if network.products:
        raise UnsupportedOpError([Problem(node.path, "Multiply", _NO_PRODUCTS) for node in network.products])
    problems = [
        Problem(node.path, type(node.op).__name__, "has no LP formulation; take network.lowered")
        for node in network
        if node.maximum
    ]
    if problems:
        raise UnsupportedOpError(problems, "affine ops and activations")

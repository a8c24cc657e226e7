"""Numbers that passes keep, by what they are kept for: the coefficients of every count of memory, in one place.

Each is what the code keeps, counted; `tests/test_memory.py` holds the counts of whole passes, and those of lines alone,
against the bytes that the allocator handed out, `python -m benchmarks memory` against the peak of a process.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = [
    "Count",
    "ascent",
    "bounds_and_lines",
    "dual_points",
    "graph_bytes",
    "hulls",
    "newton",
    "noise_values",
    "program",
    "within_solve",
]


@dataclass(frozen=True, slots=True)
class Count:
    """Numbers for each input, hidden neuron, output, and entry of any node's value, of one example or problem."""

    inputs: int = 0
    hidden: int = 0
    outputs: int = 0
    values: int = 0

    def of(self, *, inputs: int = 0, hidden: int = 0, outputs: int = 0, values: int = 0) -> int:
        """All of them, where there are so many of each."""
        return self.inputs * inputs + self.hidden * hidden + self.outputs * outputs + self.values * values


def bounds_and_lines(gradient: bool) -> Count:
    """Of an example in back-substitution, beside its rows.

    A neuron keeps 2 bounds and 4 lines.  With a gradient, these 6 again as gradients, and the 10 masks, widths and
    quotients that the graph of lines keeps; a compiled ReLU's keeps 2.  Without one, 4 stand for the lines that are
    being made, 12 for each neuron of one activation.  A value has the middle and half width of its interval, those of
    the next op's, and two products; two gradients more.
    """
    return Count(hidden=22, values=8) if gradient else Count(hidden=10, values=6)


def noise_values(gradient: bool) -> Count:
    """Of an example in a zonotope, beside its noise terms.

    Center, ends, image and lines of each value, 10; with a gradient theirs, and what the graph of lines keeps.
    """
    return Count(values=30 if gradient else 10)


def program(gradient: bool) -> Count:
    """Of a network LP while it is solved, or differentiated.

    Its box, 2 of the inputs, and its lines, 10 of the neurons: 4 of 2 numbers, and 2 bounds. A solve takes what
    `within_solve` says beside; a gradient's Lagrangian keeps 6 and 14 more, by measurement. Of the outputs the row, the
    target's value at both points, and their gradients.
    """
    own, work = Count(inputs=2, hidden=10, outputs=6), within_solve()
    more = Count(inputs=6, hidden=14) if gradient else Count()
    return Count(own.inputs + work.inputs + more.inputs, own.hidden + work.hidden + more.hidden, own.outputs)


def within_solve() -> Count:
    """Of a problem while it is solved, beside its own lines and box: the matrices of an ascent keep to it too.

    The vectors of `ascent` for the inputs; for the neurons these with both of a layer's sides, and both points' sweeps.
    """
    return Count(inputs=10, hidden=30)


def dual_points(gradient: bool) -> Count:
    """Of a network LP that waits or is done: its weights, of lines on either side; for a gradient both points."""
    return Count(inputs=1, hidden=3) if gradient else Count(hidden=2)


def hulls(gradient: bool) -> Count:
    """Of an example, which its LPs share: 4 lines of 2 numbers, 2 bounds, and 2 masks; their gradients and graph."""
    return Count(hidden=25 if gradient else 12)


def graph_bytes(nodes: int) -> int:
    """Bytes of a lot's graph besides numbers: objects a node of the network, measured; they count in many lots."""
    return 5 * 2**10 * nodes


def ascent() -> Count:
    """Of a problem in a dual ascent by sweeps.

    Values, coefficients, weights, their best, both moments of Adam, gradients, averages and two temporaries.
    """
    return Count(values=10)


def newton(inputs: int, crossing: int) -> int:
    """Bytes of a problem of the interior point method, in float64.

    Of a crossing neuron a row for the inputs, and one for the other neurons, with their scaled copies and the factor:
    three and four rows of 8 bytes. Three of each live while the normal equations are made, by measurement.
    """
    return 3 * 8 * crossing * (3 * inputs + 4 * crossing)

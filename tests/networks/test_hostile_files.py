"""Files that somebody edited: a network or a ValueError, in bounded memory and time, whatever the bytes say.

Run by hand for longer: `python tests/networks/test_hostile_files.py 20000`.
"""

import contextlib
import io
import json
import os
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import optrelax as ox
from optrelax.networks import checkpoints
from optrelax.networks.checkpoint_files import read_network
from optrelax.networks.graph import Node

ROOT = Path(__file__).parents[2]
SPARE = 2**30  # bytes of address space that all the examples together may take beyond what the imports took
SECONDS = 10  # for one file


# --- whole files, one of every kind of op -----------------------------------------------------------------------------


def whole(folder: Path) -> list[tuple[dict[str, Any], dict[str, Tensor]]]:
    """Graph and tensors of small networks that hold every op between them."""
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "networks")]
    from cases import BY_NAME
    from test_affine_ops import CASES

    names = ("residual conv", "average pool", "max pool", "functional residual", "batch norm", "relu6 and hardtanh")
    networks = [BY_NAME[name].network() for name in names]
    for case in CASES:
        op, parameters = case.op()
        if len(set(op.input_shapes)) == 1:
            node = Node("op", "op", op, ("input",) * len(op.input_shapes), op.shape)
            networks.append(ox.Network(nn.ParameterList(parameters), (node,), "op", op.input_shapes[0]))
    found = []
    for network in networks:
        ox.save(network, folder / "whole.safetensors")
        with safe_open(folder / "whole.safetensors", "pt") as file:
            graph = json.loads(file.metadata()["optrelax"])
            found.append((graph, {key: file.get_tensor(key) for key in file.keys()}))  # noqa: SIM118
    return found


# --- what is done to them ---------------------------------------------------------------------------------------------

NUMBERS = st.one_of(
    st.integers(-3, 9),
    st.sampled_from([2**15, 2**24, 2**31, 2**53 + 1, 2**63, 2**64, -(2**63), 10**19, 10**400]),
    st.sampled_from([0.0, -0.0, 0.5, 5e-324, 1e308, float("inf"), float("-inf"), float("nan")]),
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=6), st.sampled_from(["input", "op", "constant"])),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=6,
)
EDITS = st.tuples(
    st.sampled_from(["value", "number", "delete", "repeat", "copy", "rename"]), st.integers(0, 10**6), VALUES
)
EDITS = st.tuples(EDITS, NUMBERS, st.integers(0, 10**6))


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container of a JSON value with every key of it."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items):
        yield value, key
        yield from places(inner)


def edited(graph: dict[str, Any], edits: list[Any]) -> dict[str, Any]:
    graph = json.loads(json.dumps(graph))
    for (kind, where, value), number, other in edits:
        spots = list(places(graph))
        if not spots:
            break
        holder, key = spots[where % len(spots)]
        source, name = spots[other % len(spots)]
        if kind in ("value", "number"):
            holder[key] = value if kind == "value" else number
        elif kind == "delete":
            del holder[key]
        elif kind == "copy":
            holder[key] = json.loads(json.dumps(source[name]))
        elif kind == "repeat" and isinstance(holder, list):
            holder.insert(key, json.loads(json.dumps(holder[key])))
        elif kind == "rename" and isinstance(holder, dict):
            holder[str(value)[:9]] = holder.pop(key)
    return graph


def changed(tensors: dict[str, Tensor], kind: str, where: int) -> dict[str, Tensor]:
    """One tensor of another type, shape or value."""
    if kind == "none" or not tensors:
        return tensors
    key = sorted(tensors)[where % len(tensors)]
    value = tensors[key]
    other = {
        "half": lambda: value.half(),
        "whole": lambda: value.long(),
        "flat": lambda: value.flatten(),
        "deep": lambda: value[(None,) * 9],
        "turned": lambda: value.mT if value.dim() > 1 else value.flip(0) if value.dim() else value,
        "short": lambda: value[:-1] if value.dim() else value,
        "empty": lambda: torch.empty(0, 2**40),
        "nan": lambda: torch.full_like(value, float("nan") if value.is_floating_point() else -7),
        "huge": lambda: torch.full_like(value, 1e300 if value.dtype == torch.float64 else 2**30),
        "zero": lambda: torch.zeros_like(value),
    }[kind]
    return tensors | {key: other().contiguous()}


CHANGES = st.sampled_from(
    ["none"] * 6 + ["half", "whole", "flat", "deep", "turned", "short", "empty", "nan", "huge", "zero"]
)


def flipped(content: bytes, flips: list[tuple[int, int]], cut: int) -> bytes:
    array = bytearray(content)
    for place, byte in flips:
        array[place % len(array)] = byte
    return bytes(array[: len(array) - cut % len(array)])


class Slow(BaseException):
    """One file took too long."""


def stop(*_: object) -> None:
    raise Slow(f"more than {SECONDS} s")


def outcome(path: Path) -> str:
    """What loading comes to; every error but ValueError is a fault."""
    signal.alarm(SECONDS)
    try:
        network = ox.load(path)
    except ValueError as error:
        if not str(error).startswith(str(path)) or len(str(error)) > 2000:
            raise AssertionError("no message that names the file and fits a screen") from error
        return "refused"
    finally:
        signal.alarm(0)
    assert network.input_shape is not None
    if sum(int(np.prod(network.shape_of(node.name))) for node in network) < 10**5:
        x = torch.zeros(1, *network.input_shape, dtype=torch.float64)
        assert network(x).shape == (1, *network.output_shape)
    return "loaded"


def attack(count: int) -> dict[str, int]:
    """Load `count` edited files of each way under the limits; how many loaded, how many were refused."""
    folder = Path(tempfile.mkdtemp())
    path = folder / "net.safetensors"
    files = whole(folder)
    seen = {"loaded": 0, "refused": 0}
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + SPARE, taken + SPARE))
    signal.signal(signal.SIGALRM, stop)
    repeatable = settings(max_examples=count, derandomize=True, deadline=None, database=None,
                          suppress_health_check=list(HealthCheck))  # fmt: skip

    @repeatable
    @given(st.integers(0, len(files) - 1), st.lists(EDITS, max_size=3), CHANGES, st.integers(0, 10**6), st.booleans())
    def graphs(which: int, edits: list[Any], kind: str, where: int, seal: bool) -> None:
        """Sealed anew, so that nothing but the checks of the graph stands between the edit and the ops."""
        graph, tensors = files[which]
        graph, tensors = edited(graph, edits), changed(tensors, kind, where)
        if seal and isinstance(graph.get("format"), int):
            with contextlib.suppress(ValueError):  # of NaN, which is no JSON
                graph["digest"] = checkpoints._digest(graph, tensors)
        save_file(tensors, path, {"optrelax": json.dumps(graph)})
        seen[outcome(path)] += 1

    @repeatable
    @given(st.integers(0, len(files) - 1), st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=4),
           st.one_of(st.just(0), st.integers(0, 10**6)))  # fmt: skip
    def contents(which: int, flips: list[tuple[int, int]], cut: int) -> None:
        """Bytes of the file itself, its header of sizes among them."""
        graph, tensors = files[which]
        save_file(tensors, path, {"optrelax": json.dumps(graph)})
        path.write_bytes(flipped(path.read_bytes(), flips, cut))
        seen[outcome(path)] += 1

    @repeatable
    @given(st.one_of(st.text(max_size=200), st.integers(1, 10**5).map(lambda n: "[" * n + "]" * n),
                     st.integers(1, 10**5).map(lambda n: '{"a":' * n), st.just("1" * 10**5)))  # fmt: skip
    def texts(text: str) -> None:
        save_file({"w": torch.zeros(1)}, path, {"optrelax": text})
        seen[outcome(path)] += 1

    for part in (graphs, contents, texts):
        part()
    return seen


def test_edited_files_give_a_network_or_a_value_error():
    """In a process of its own, whose memory is limited."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "error", __file__, "400"], env=environment, capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr[-4000:]
    seen = json.loads(done.stdout)
    assert seen["refused"] > 400
    assert seen["loaded"] > 50  # edits of names, of eps, of weights: else little would have been reached


# --- the arithmetic of sizes ------------------------------------------------------------------------------------------


def rewritten(path: Path, nodes: list[dict[str, Any]], input_shape: list[int], tensors: dict[str, Tensor]) -> None:
    """A file of these nodes, the last of which is the output, sealed."""
    graph = {"format": 2, "input_shape": input_shape, "output": nodes[-1]["name"], "nodes": nodes}
    graph |= {"tensors": dict.fromkeys(tensors, "constant"), "extra": {}}
    graph["digest"] = checkpoints._digest(graph, tensors)
    save_file(tensors, path, {"optrelax": json.dumps(graph)})


def node(name: str, reads: str, gives: list[int], op: str, tensors: dict[str, str] | None = None, **rest: Any) -> dict:
    return {"name": name, "path": name, "inputs": [reads], "shape": gives, "op": {"op": op, **rest},
            "tensors": tensors or {}}  # fmt: skip


def pool(kernel: int, padding: int, size: int, out: int, op: str = "avg_pool2d", **rest: Any) -> tuple[list, list[int]]:
    geometry = {"kernel": [kernel] * 2, "stride": [1, 1], "padding": [padding] * 2, "dilation": [1, 1]}
    return [node("p", "input", [1, out, out], op, **geometry, **rest)], [1, size, size]


GREEDY = {
    "an input": ([node("r", "input", [2**60], "reshape", shape=[2**60])], [2**60]),
    "an input with a dimension of none": ([node("r", "input", [0], "reshape", shape=[0])], [0, 2**40]),
    "many large values": ([node(f"n{i}", f"n{i - 1}" if i else "input", [2**24], "reshape", shape=[2**24])
                           for i in range(40)], [2**24]),
    "an expansion": ([node("e", "input", [2**20, 2**20], "expand", shape=[2**20, 2**20])], [1]),
    "a padding": ([node("e", "input", [2**40 + 1], "pad", before=[2**40], after=[0])], [1]),
    "a pad that is cut again": ([node("e", "input", [2], "pad", before=[2**40], after=[1 - 2**40])], [1]),
    "an average pool": pool(20000, 10000, 1, 2, divisor=1.0),
    "an average pool that counts": pool(200000, 100000, 1, 2, divisor=None),
    "a max pool": pool(20000, 10000, 1, 2, op="max_pool2d"),
}  # fmt: skip


@pytest.mark.parametrize("name", GREEDY)
def test_a_short_file_that_asks_for_much_is_refused(name, tmp_path):
    nodes, input_shape = GREEDY[name]
    rewritten(tmp_path / "net.safetensors", nodes, input_shape, {})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"net\.safetensors: expected an optrelax network"):
        ox.load(tmp_path / "net.safetensors")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 2**10


def test_a_padding_beyond_every_image_is_refused(tmp_path):
    tensors = {"w": torch.ones(1, 1, 1, 1)}
    geometry = {"stride": [2**20] * 2, "padding": [2**20] * 2, "dilation": [1, 1], "groups": 1}
    rewritten(tmp_path / "net.safetensors", [node("c", "input", [1, 3, 3], "conv2d", {"weight": "w"}, **geometry)],
              [1, 1, 1], tensors)  # fmt: skip
    with pytest.raises(ValueError, match="padding: wants at most"):
        ox.load(tmp_path / "net.safetensors")


# --- archives ---------------------------------------------------------------------------------------------------------


def header(descr: str, shape: str) -> bytes:
    text = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}, }}"
    text += " " * (63 - (10 + len(text)) % 64) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()


def zeros(count: int) -> bytes:
    """An npz of float32 zeros, compressed a thousandfold."""
    content = io.BytesIO()
    np.savez_compressed(content, weight0=np.zeros((count,), np.float32))
    return content.getvalue()


def archive(content: bytes) -> bytes:
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("weight0.npy", content)
    return whole.getvalue()


ARCHIVES = {
    "a shape of terabytes": archive(header("<f8", "(1000000, 1000000)")),
    "a shape beyond int64": archive(header("<f8", "(10000000000000000000000,)")),
    "a negative shape": archive(header("<f8", "(-1, -8)") + b"\0" * 64),
    "a shape of half the bytes": archive(header("<f8", "(4,)") + b"\0" * 64),
    "a type without size": archive(header("<V0", "(100000000000,)")),
    "nested brackets": archive(header("<f8", "(" * 3000 + ")" * 3000)),
    "no header": archive(b"\x93NUMPY\x07\x00"),
    "zeros that unpack a thousandfold": zeros(2**25),
    "a member cut short": archive(header("<f4", "(1000,)") + bytes(range(250)) * 16)[:-300],
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_archives_are_measured_before_they_are_unpacked(name, tmp_path):
    path = tmp_path / "net.npz"
    path.write_bytes(ARCHIVES[name])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"net\.npz: expected"):
        read_network(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 * 2**10


if __name__ == "__main__":
    sys.stdout.write(json.dumps(attack(int(sys.argv[1]))))

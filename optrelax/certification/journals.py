"""Journals of a certification: JSON lines, one an example, from which an interrupted run goes on.

The first line holds the fingerprint of everything that decides the result; a journal with another one is refused. What
it says of an example is taken over only where its own bounds and margins bear it out (`Certifier.confirm`).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optrelax.certification.verdicts import Example, Verdict
from optrelax.networks.graph import Network
from optrelax.output.json_lines import JsonLines, json_ready, read_lines

__all__ = ["Journal", "tensor_digest", "weights_digest"]

_FORMAT = "optrelax certification journal 2"


class Journal:
    """Examples finished so far, on disk as soon as `append` returns; a context manager that closes the file.

    One process at a time has it open (see `optrelax.output.json_lines`); the others are told which.
    """

    def __init__(self, path: str | os.PathLike[str], fingerprint: Mapping[str, object], total: int) -> None:
        """Open or make the journal at `path`.

        fingerprint: JSON-ready.  total: number of examples of the whole run.
        Raises ValueError for a file that is no journal, is damaged, is of another configuration, or is in use.
        """
        self.path = Path(path)
        header = {"format": _FORMAT, "fingerprint": dict(fingerprint), "examples": total}
        self.done: dict[int, Example] = {}
        """Finished examples by index; errors are left out, so that they are tried again."""
        self._lines = JsonLines(path, header, "not a certification journal")
        try:
            self._read(header)
        except BaseException:
            self._lines.close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.close()

    @property
    def file(self) -> JsonLines:
        """The open file."""
        return self._lines

    def append(self, examples: Iterable[Example]) -> None:
        """Add finished examples; whoever kills the process now loses none of them."""
        for example in examples:
            # Floats that JSON cannot hold as strings, which `float` reads back.
            self._lines.append(json_ready(asdict(example), str))

    def _read(self, header: Mapping[str, object]) -> None:
        found, *records = self._lines.records
        self._compare(found, json.loads(json.dumps(header)))
        for number, record in enumerate(records, 2):
            try:
                example = _example(record)
            except (TypeError, ValueError, KeyError, AttributeError) as error:
                raise ValueError(f"resume: {self.path}, line {number} is not an example: {error}") from error
            if example.verdict != Verdict.ERROR:
                self.done[example.index] = example

    def _compare(self, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
        was, now = found.get("fingerprint", {}), wanted["fingerprint"]
        changed = [
            f"{key} was {was.get(key)!r}, is {now.get(key)!r}"
            for key in sorted({*was, *now})
            if was.get(key) != now.get(key)
        ]
        if found.get("examples") != wanted["examples"] and not changed:
            changed = [f"examples was {found.get('examples')}, is {wanted['examples']}"]
        if changed:
            raise ValueError(
                f"resume: {self.path} is the journal of another run ({'; '.join(changed)}); name a new file, or "
                "repeat that run's settings"
            )


def is_finished(path: Path) -> bool:
    """Whether the journal at `path` holds every example of its run; False where it cannot be read as one."""
    try:
        header, *records = read_lines(path)
        return len({record["index"] for record in records}) >= header["examples"]
    except (ValueError, TypeError, KeyError):
        return False


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _example(record: dict[str, Any]) -> Example:
    numbers = ("natural_margin", "attack_margin", "milp_lower")
    rest = {
        "verdict": Verdict(record["verdict"]),
        "lower": tuple(_number(value) for value in record["lower"]),
        "rows": tuple(tuple(float(value) for value in row) for row in record.get("rows", ())),
        "bound_seconds": tuple(float(value) for value in record["bound_seconds"]),
        **{name: _number(record[name]) for name in numbers},
    }
    if type(record["index"]) is not int or type(record["label"]) not in (int, type(None)):
        raise ValueError("index and label must be whole numbers")
    return Example(**(record | rest))


def weights_digest(network: Network) -> str:
    """Hash of everything that makes the network the function it is: graph, settings, parameters, buffers."""
    digest = hashlib.sha256()

    def add(*parts: object) -> None:
        digest.update(repr(parts).encode())

    add(network.input_shape, network.output)
    for node in network:
        add(node.name, node.inputs, node.shape, type(node.op).__name__)
        try:
            add(node.op.describe())
        except NotImplementedError:
            add(node.path)  # a user's op that no checkpoint can hold: told apart by its place and tensors
        for name, source in node.op.tensors().items():
            add(name, tensor_digest(source()))
    for name, value in network.module.state_dict().items():
        add(name, tensor_digest(value) if isinstance(value, Tensor) else value)
    return digest.hexdigest()[:16]


def tensor_digest(*tensors: Tensor) -> str:
    """Hash of shapes, types and bytes."""
    digest = hashlib.sha256()
    for tensor in tensors:
        plain = tensor.detach().cpu().contiguous()
        digest.update(f"{plain.dtype} {tuple(plain.shape)}".encode())
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]

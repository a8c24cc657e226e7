"""Run folders: what a training run leaves on disk, and finds again when it resumes.

config.json: the resolved configuration, seed, versions and threads.  metrics.jsonl: one line an epoch.
state.safetensors: weights, optimiser, their average, what the loss keeps (dual points of its LPs) and the epoch's sums
so far, after any step.
net.safetensors: the network after the last finished epoch, for `load`.
epoch-0005.safetensors: the network after that epoch, where such are kept.
Every file but the metrics is written whole or not at all; a metrics line past the state is dropped on resuming.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from optrelax.certification.journals import tensor_digest
from optrelax.networks import checkpoints
from optrelax.networks.graph import Network
from optrelax.output.files import read_tensors, write_tensors, write_whole
from optrelax.output.locks import Lock
from optrelax.training.recording import Json, differences, versions

__all__ = ["RunFolder", "State", "start_from"]

_log = logging.getLogger(__name__)

_FORMAT = 1
_KEY = "optrelax-state"
_SUMS = "meter.sums"
_EPOCH = re.compile(r"epoch-(\d{4,})\.safetensors")


def start_from(module: nn.Module, path: str | os.PathLike[str]) -> dict[str, Json]:
    """Give a module the parameters of a stored network, and its statistics, to train it further; facts for `train`.

    path: a run folder, or a file of `save`.  Raises FileNotFoundError, and ValueError for a file that is no network
    or whose parameters have other names or shapes.
    """
    found = checkpoints.load(path).module
    stored = dict(found.named_parameters())
    own = dict(module.named_parameters())

    def shape(found: Mapping[str, Tensor], name: str) -> str:
        return str(list(found[name].shape)) if name in found else "missing"

    differing = [
        f"{name} ({shape(stored, name)} there, {shape(own, name)} here)"
        for name in dict.fromkeys([*own, *stored])
        if shape(stored, name) != shape(own, name)
    ]
    if differing:
        raise ValueError(
            f"start_from: the network in {os.fspath(path)} does not fit the one to be trained; they differ in "
            f"{', '.join(differing)}"
        )
    rounded = [name for name in own if torch.promote_types(own[name].dtype, stored[name].dtype) != own[name].dtype]
    if rounded:
        name = rounded[0]
        raise ValueError(
            f"start_from: {name} is {stored[name].dtype} in {os.fspath(path)}, which {own[name].dtype} would round; "
            "train the network in that type (net.double()), or round the stored one yourself"
        )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(stored[name])
        kept = dict(found.named_buffers())  # those that the network reads: a count of batches is none
        for name, buffer in module.named_buffers():
            if name in kept:
                buffer.copy_(kept[name])
    return {"start": {"network": os.fspath(path), "digest": tensor_digest(*own.values())}}


@dataclass(frozen=True, slots=True, eq=False)
class State:
    """Where a run stands, and what it carries from step to step beside weights and optimiser."""

    epochs: int = 0  # finished
    steps: int = 0  # taken of the next epoch
    seconds: float = 0.0  # spent on them
    sums: Tensor | None = None  # `Meter.tensor` after them
    memory: Mapping[str, Tensor] = field(default_factory=dict)  # what the loss keeps
    average: Mapping[str, Tensor] = field(default_factory=dict)  # of the weights


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The folder of one run; who writes to it holds its `lock`."""

    path: Path

    @property
    def _config(self) -> Path:
        return self.path / "config.json"

    @property
    def _metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def _state(self) -> Path:
        return self.path / "state.safetensors"

    @property
    def events(self) -> Path:
        """Folder of TensorBoard's event file, where one was asked for."""
        return self.path / "tensorboard"

    @property
    def net(self) -> Path:
        """The network after the last finished epoch."""
        return self.path / "net.safetensors"

    def lock(self) -> Lock:
        """The lock of whoever trains here; the folder is made for it.

        Raises ValueError that says which process holds it, NotADirectoryError for a file.
        """
        if self.path.exists() and not self.path.is_dir():
            raise NotADirectoryError(f"{self.path}: expected a folder for the run, got a file")
        self.path.mkdir(parents=True, exist_ok=True)
        return Lock(self.path / ".run.lock", self.path)

    def open(self, config: Mapping[str, Json], resume: bool) -> None:
        """Make the folder, or find the same configuration in it.

        Raises ValueError for a run that is not to be resumed and where the configurations differ; other versions or
        threads than the run began with are logged as a warning.
        """
        surroundings: dict[str, Json] = {"versions": versions(), "threads": torch.get_num_threads()}
        if self._config.exists():
            if not resume:
                raise ValueError(f"{self.path}: holds a run already; resume it (--resume) or choose another folder")
            stored = _parsed(self._config, self._config.read_text(encoding="utf-8"))
            if changed := sorted(differences(stored.get("configuration"), json.loads(json.dumps(config)))):
                raise ValueError(
                    f"{self.path}: cannot resume with another configuration; it differs in {', '.join(changed)}"
                )
            if moved := sorted(differences({name: stored.get(name) for name in surroundings}, surroundings)):
                _log.warning("%s: resumed elsewhere, the last bits may differ: %s", self.path, ", ".join(moved))
            self._sweep()
            return
        whole = {"format": _FORMAT, "configuration": config, **surroundings}
        write_whole(self._config, (json.dumps(whole, indent=2) + "\n").encode())

    def _sweep(self) -> None:
        """Remove what a killed process had half written."""
        stems = [(file.stem, file.suffix) for file in (self._state, self.net, self._config, self._metrics)]
        for stem, suffix in [*stems, ("epoch", self.net.suffix)]:
            for left in self.path.glob(f".{stem}-*{suffix}"):
                left.unlink(missing_ok=True)

    def append(self, metrics: Mapping[str, Json]) -> None:
        """Add one line of metrics."""
        with self._metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(metrics) + "\n")
            file.flush()
            os.fsync(file.fileno())  # the state that follows must not outlive its line

    def metrics(self, epochs: int | None = None) -> list[dict[str, Any]]:
        """The lines so far; the first `epochs` of them where given."""
        if not self._metrics.exists():
            return []
        lines = self._metrics.read_text(encoding="utf-8").splitlines()[:epochs]
        return [_parsed(self._metrics, line) for line in lines]

    def save_state(self, module: nn.Module, optimizer: torch.optim.Optimizer, state: State) -> None:
        """Store weights, optimiser and where the run stands, in place of the state before."""
        tensors = {f"net.{name}": value for name, value in module.state_dict().items()}
        for index, held in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in held.items()}
        for kind, held in (("memory", state.memory), ("average", state.average)):
            tensors |= {f"{kind}.{name}": value for name, value in held.items()}
        tensors |= {} if state.sums is None else {_SUMS: state.sums}
        place = {"format": _FORMAT, "epochs": state.epochs, "steps": state.steps, "seconds": state.seconds}
        write_tensors(self._state, tensors, {_KEY: json.dumps(place)})

    def save_network(self, network: Network, epochs: int, extra: Mapping[str, Json]) -> None:
        """Store the network as it is after `epochs` finished epochs."""
        checkpoints.save(network, self.net, extra={**extra, "epochs": epochs})

    def keep_network(self, network: Network, epochs: int, extra: Mapping[str, Json]) -> None:
        """Store the network after `epochs` finished epochs under a name of its own, which no later epoch replaces."""
        checkpoints.save(network, self.path / f"epoch-{epochs:04d}.safetensors", extra={**extra, "epochs": epochs})

    def kept_networks(self) -> dict[int, Path]:
        """The networks that `keep_network` stored, by finished epochs, ascending."""
        found = {int(m[1]): file for file in self.path.glob("epoch-*") if (m := _EPOCH.fullmatch(file.name))}
        return dict(sorted(found.items()))

    def stored_epochs(self) -> int | None:
        """The finished epochs of the stored network; None where there is no valid one."""
        try:
            return checkpoints.read_epochs(self.net)
        except (FileNotFoundError, ValueError):
            return None

    def restore(self, module: nn.Module, optimizer: torch.optim.Optimizer, repair: bool = True) -> State:
        """Put the stored weights and optimiser state back; where the run stands, at its begin where nothing is stored.

        repair: drop metrics past the state from their file; one process of several does.
        Raises ValueError for a state that is corrupt or of another network.
        """
        if not self._state.exists():
            if repair:
                self._metrics.unlink(missing_ok=True)
            return State()
        tensors, metadata = read_tensors(self._state)
        try:
            place = json.loads(metadata[_KEY])
            memory, average = (_taken(tensors, kind) for kind in ("memory.", "average."))
            sums = tensors.pop(_SUMS, None)
            # A state that names no step stands at an epoch's end.
            found = State(
                int(place["epochs"]), int(place.get("steps", 0)), place.get("seconds", 0.0), sums, memory, average
            )
            if found.steps and sums is None:
                raise ValueError(f"no sums of the {found.steps} steps of its epoch")
            _put_back(module, optimizer, tensors)
        except (KeyError, ValueError, RuntimeError) as error:
            raise ValueError(f"{self._state}: expected the state of this run, got one that fails: {error}") from error
        # What was logged after the state was written will be computed, and logged, again.
        if repair:
            kept = "".join(json.dumps(line) + "\n" for line in self.metrics(found.epochs))
            write_whole(self._metrics, kept.encode())
        return found

    def save_failure(self, network: Network, tensors: Mapping[str, Tensor], facts: Mapping[str, Json]) -> Path:
        """Store the batch that broke a run and the weights it broke; the path of the batch."""
        path = self.path / "failed-batch.safetensors"
        write_tensors(path, tensors, {"optrelax-failure": json.dumps(facts)})
        checkpoints.save(network, self.path / "failed-net.safetensors", extra=facts)
        return path


def _taken(tensors: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    """Take the tensors of one kind out of a state."""
    return {key.removeprefix(kind): tensors.pop(key) for key in list(tensors) if key.startswith(kind)}


def _put_back(module: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    weights: dict[str, Tensor] = {}
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        kind, _, name = key.partition(".")
        if kind == "net":
            weights[name] = value
        else:
            index, _, name = name.partition(".")
            state.setdefault(int(index), {})[name] = value
    module.load_state_dict(weights)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _parsed(file: Path, text: str) -> dict[str, Json]:
    """A JSON object of a run.  ValueError that names the file for anything else."""
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: expected JSON as a run writes it, got text that fails: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file}: expected JSON as a run writes it, got {text[:40]!r}")
    return found

"""Networks from the files that people have: optrelax's own, a module's `state_dict`, or plain weights in an npz.

Nothing here runs code from a weights file: safetensors and npz hold numbers, and `state_dict`s are read by torch's
weights-only reader. A module of the user's (`--model module:function`) is the user's own code.
"""

from __future__ import annotations

import importlib
import math
import os
import re
import sys
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from optrelax.networks import models
from optrelax.networks.checkpoints import load
from optrelax.networks.graph import Network
from optrelax.networks.onnx_files import is_onnx, read_onnx
from optrelax.output.files import read_tensors

__all__ = ["build_model", "own_object", "read_network", "read_npz"]

_TORCH_ENDINGS = (".pt", ".pth", ".bin", ".ckpt", ".tar")
_RATIO, _ALLOWED = 100, 2**26  # bytes that a byte of an archive may unpack to, and bytes that any archive may
_FORMS = (
    "a safetensors file, a run folder, an ONNX file, a state_dict (.pt, .pth) with a model, or an npz of weight{i}, "
    "bias{i}"
)


def read_network(
    path: str | os.PathLike[str],
    *,
    model: str | None = None,
    input_shape: Sequence[int] = (1, 28, 28),
    classes: int = 10,
    device: torch.device | str = "cpu",
) -> nn.Module | Network:
    """The network of a checkpoint, in eval mode on `device`.

    path: a file stored by `ox.save`, a run folder or an ONNX file (no model needed); a `state_dict` as .pt or
    .safetensors, which needs `model`; an npz with weight0, bias0, ... of a fully connected ReLU network.
    model: a name of `ox.models`, or "module:function", a function (or class) of the user's that takes no arguments
    and returns the module; looked for from the working folder.  input_shape, classes: for a name of `ox.models`;
    an ONNX network that takes as many numbers in another shape gets them in its own.
    Raises FileNotFoundError, and ValueError that says which file and what was wanted; no pickle is ever run.
    """
    file = Path(path)
    if not file.exists():
        raise FileNotFoundError(f"{file}: no such file; expected {_FORMS}")
    if file.is_dir() or (file.suffix == ".safetensors" and model is None):
        if model is not None:
            raise ValueError(f"{file}: a run folder holds its own network; leave --model out")
        network = load(file, device)
        network.module.eval()
        for node in network:
            _require_finite(file, {f"{node.path}.{name}": read() for name, read in node.op.tensors().items()})
        return network
    if is_onnx(file):
        if model is not None:
            raise ValueError(f"{file}: an ONNX file holds its own network; leave --model out")
        return read_onnx(file, input_shape).to(device)
    if file.suffix == ".npz":
        if model is not None:
            raise ValueError(f"{file}: an npz is read as a fully connected network; leave --model out")
        return read_npz(file).to(device).eval()
    if file.suffix not in (".safetensors", *_TORCH_ENDINGS):
        raise ValueError(f"{file}: ends in {file.suffix!r}; expected {_FORMS}")
    if model is None:
        raise ValueError(f"{file}: a state_dict holds no network; say which with --model NAME or module:function")
    weights = read_tensors(file)[0] if file.suffix == ".safetensors" else _state_dict(file)
    module = build_model(model, input_shape, classes, weights)
    if any(w.dtype == torch.float64 for w in weights.values()):
        module = module.double()  # a model of float32 would round them
    try:
        module.load_state_dict(dict(weights))
    except RuntimeError as error:
        reasons = " ".join(line.strip() for line in str(error).splitlines()[1:]) or str(error)
        raise ValueError(f"{file}: does not fit model {model!r}: {reasons}") from error
    _require_finite(file, module.state_dict())
    return module.to(device).eval()


def build_model(
    name: str, input_shape: Sequence[int], classes: int, weights: Mapping[str, Tensor] | None = None
) -> nn.Module:
    """A network by a name of `ox.models`, or what the user's "module:function" returns.

    weights: a state_dict that it is meant for; one that holds normalisation constants gets a network with them.
    """
    if ":" in name:
        return _own_model(name)
    try:
        models.builder(name)
    except ValueError as error:
        raise ValueError(f"model: {error} (or module:function for one of your own)") from error
    constants = None
    if weights is not None and "0.mean" in weights:
        constants = ([0.0] * weights["0.mean"].numel(), [1.0] * weights["0.mean"].numel())
    return models.build(name, input_shape, classes, seed=0, normalize=constants)


def _own_model(name: str) -> nn.Module:
    module = own_object("model", name)
    if not isinstance(module, nn.Module):
        raise ValueError(f"model: {name} must return an nn.Module, got {type(module).__name__}")
    return module


def own_object(what: str, name: str) -> object:
    """What the user's "module:function" returns; ValueError, which begins with `what`, where it does not."""
    module_name, _, attribute = name.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), attribute)):
        raise ValueError(f"{what}: wants module:function, such as mynets:build, got {name!r}")
    here = os.getcwd()
    # A console script does not search the working folder, `python -m` does: the user's module lies there.
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        imported = importlib.import_module(module_name)
    except Exception as error:  # the user's own code may raise anything
        raise ValueError(f"{what}: module {module_name!r} cannot be imported: {_reason(error)}") from error
    finally:
        if added:
            sys.path.remove(here)
    if not hasattr(imported, attribute):
        raise ValueError(f"{what}: module {module_name!r} has no {attribute!r}")
    try:
        return getattr(imported, attribute)()
    except Exception as error:
        raise ValueError(f"{what}: {name}, called without arguments, fails: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """What went wrong in another's code, in a line."""
    first = str(error).partition("\n")[0].partition(". ")[0]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def _require_finite(file: Path, tensors: Mapping[str, object]) -> None:
    """ValueError where the weights are no numbers: then every bound would be none."""
    for name, value in tensors.items():
        if isinstance(value, Tensor) and not bool(value.isfinite().all()):
            raise ValueError(f"{file}: {name} holds NaN or infinite entries")


def _state_dict(file: Path) -> Mapping[str, Tensor]:
    """A pickled state_dict through torch's weights-only reader."""
    try:
        _require_no_bomb(file)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about the pickle protocol of a file that it then refuses
            content: object = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle makes the reader raise whatever its bytes happen to say
        # torch's first lines advise to load it all the same, which would run code: its finding stands further down.
        found = re.search(r"WeightsUnpickler error: (.+?)(\.? Please use|\n|$)", str(error))
        reason = found[1] if found else f"no file that torch.save wrote, or a truncated one ({_reason(error)})"
        raise ValueError(f"{file}: expected a state_dict of tensors, torch refuses it: {reason}") from error
    # Training scripts often wrap it.
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(v, Tensor) for v in content.values()):
        got = type(content).__name__
        raise ValueError(f"{file}: expected a state_dict (names to tensors), got {got}")
    return content


def read_npz(path: str | os.PathLike[str]) -> nn.Sequential:
    """A fully connected ReLU network from weight{i} [out, in] and bias{i} [out]; inputs of any shape are flattened.

    Counting starts at the smallest i; a missing bias is none.  Raises ValueError for arrays that do not chain.
    """
    file = Path(path)
    arrays = read_arrays(file)
    places = sorted(int(m.group(1)) for name in arrays if (m := re.fullmatch(r"weight(\d+)", name)))
    if not places or places != list(range(places[0], places[0] + len(places))):
        raise ValueError(f"{file}: expected arrays weight0, bias0, weight1, ..., got {sorted(arrays)}")
    layers: list[nn.Module] = [nn.Flatten()]
    width = None
    for i in places:
        weight, bias = arrays[f"weight{i}"], arrays.get(f"bias{i}")
        if weight.ndim != 2 or (width is not None and weight.shape[1] != width):
            wanted = "[out, in]" if width is None else f"[out, {width}]"
            raise ValueError(f"{file}: weight{i} must be {wanted}, got {list(weight.shape)}")
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(f"{file}: bias{i} must be [{weight.shape[0]}], got {list(bias.shape)}")
        layers += [_linear(file, i, weight, bias), nn.ReLU()]
        width = weight.shape[0]
    return nn.Sequential(*layers[:-1])


def _linear(file: Path, i: int, weight: NDArray[Any], bias: NDArray[Any] | None) -> nn.Linear:
    for name, value in ((f"weight{i}", weight), (f"bias{i}", bias)):
        if value is None:
            continue
        if value.dtype not in (np.float32, np.float64):
            raise ValueError(f"{file}: {name} must be float32 or float64, got {value.dtype}")
        if not np.isfinite(value).all():
            raise ValueError(f"{file}: {name} holds NaN or infinite entries")
    dtype = torch.from_numpy(weight).dtype
    layer = nn.utils.skip_init(nn.Linear, weight.shape[1], weight.shape[0], bias=bias is not None, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(weight))
        if bias is not None:
            layer.bias.copy_(torch.from_numpy(bias))
    return layer


def read_arrays(path: str | os.PathLike[str]) -> dict[str, NDArray[Any]]:
    """Every array of an npz.  Raises FileNotFoundError, and ValueError for a file that is not one; never unpickles.

    What an array takes is compared with the archive before it is made.
    """
    if Path(path).is_file() and not zipfile.is_zipfile(path):
        # numpy would take it for a pickle, and advise to load that.
        raise ValueError(f"{path}: expected a complete npz of plain arrays, got no zip archive, or a truncated one")
    try:
        _require_no_bomb(path)
        with zipfile.ZipFile(path) as archive:
            return {info.filename.removesuffix(".npy"): _array(archive, info) for info in archive.infolist()}
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: no such file") from error
    except Exception as error:  # numpy, zipfile and zlib raise half a dozen kinds for damaged bytes
        raise ValueError(f"{path}: expected a complete npz of plain arrays, got {_flaw(error)}") from error


def _flaw(error: Exception) -> str:
    # numpy advises to load a pickle all the same.
    return "an array that is pickled or damaged" if "pickle" in str(error) else f"one that fails: {_reason(error)}"


def _require_no_bomb(path: str | os.PathLike[str]) -> None:
    """ValueError for a zip archive that would unpack to far more than it takes itself."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        size = sum(info.file_size for info in archive.infolist())
    if size > (most := _ALLOWED + _RATIO * os.path.getsize(path)):
        raise ValueError(f"an archive that unpacks to {size} bytes, more than {most}")


def _array(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> NDArray[Any]:
    """A member of an npz whose header announces as many bytes as follow it."""
    with archive.open(info) as member:
        version = np.lib.format.read_magic(member)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(member)
        announced, there = math.prod(shape) * dtype.itemsize, info.file_size - member.tell()
    if not dtype.hasobject and (min(shape, default=0) < 0 or announced != there or not dtype.itemsize):
        raise ValueError(f"array {info.filename!r} announces {announced} bytes and holds {there}")
    with archive.open(info) as member:
        found: NDArray[Any] = np.lib.format.read_array(member, allow_pickle=False)
    return found

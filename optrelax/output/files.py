"""Files that are whole or not there: written beside their place, forced to disk, then moved into it.

Tensors are stored as safetensors, which hold numbers and text and nothing that runs.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["read_tensors", "replacing", "write_tensors", "write_whole"]


def write_whole(path: str | os.PathLike[str], content: bytes) -> None:
    """Write `content` to `path`; until that has succeeded, what was there before stays, whatever happens.

    The folder is made where it is missing.  Raises OSError where it cannot be written (no space, no permission).
    """
    with replacing(path) as temporary:
        temporary.write_bytes(content)


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path of the same folder and ending; moved over `path` if the block succeeds, else removed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp makes files that only their owner reads; a result gets the usual permissions.
        temporary.chmod(0o666 & ~_umask())
        _force(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    _force(path.parent)


def _umask() -> int:
    """The process's mask; the only portable way to read it is to set it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _force(path: Path) -> None:
    """Force a file, or a folder's list of files, to disk; nothing where the system cannot open a folder."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:  # a folder on Windows
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, as `write_whole`."""
    from safetensors.torch import save

    # Copies of their own: two views of one storage cannot be stored.
    copies = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    write_whole(path, save(copies, dict(metadata)))


def read_tensors(
    path: str | os.PathLike[str], device: torch.device | str = "cpu"
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.  ValueError for a file that is not a complete one."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt", device=str(device)) as content:
            names = content.keys()
            return {name: content.get_tensor(name) for name in names}, content.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path}: expected a complete safetensors file, got one that fails: {error}") from error

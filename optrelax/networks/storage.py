"""What an op says of itself so that a file can hold it: one contract for every kind of op, built in or a user's.

A class of ops is stored by three methods and a name, all of them beside its definition, none in checkpoints.py:

    @stored("scale_by")                                  # the name in the file; further names are read as well
    class ScaleBy(Affine):
        def describe(self):                              # JSON-ready settings: all that the tensors do not say
            return {"axis": self.axis}

        def tensors(self):                               # what the op *reads*, by name; no result of a computation
            return {"factor": self._factor}

        @classmethod
        def restore(cls, settings, tensors, shapes):     # checked readers of both, and the shapes of the inputs
            return cls(shapes[0], settings.integer("axis"), tensors.source("factor", dims=1))

`tensors()` names primary tensors: an op that computes its coefficients (a batch norm's scale) names what it computes
them from, so that the loaded op computes the same ones to the bit. `restore` may trust nothing: it reads by the
checked readers below, allocates nothing whose size a setting decides beyond `settings.most`, and leaves it to the
caller to refuse settings and tensors that it did not read. `save` restores what it is about to write and refuses an
op that would come back as another; tests/networks/test_storage.py holds every registered op to it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from optrelax.errors import suggest

__all__ = ["Settings", "Storable", "Tensors", "name_of", "restored", "stored", "stored_names"]

Shape = tuple[int, ...]
Source = Callable[[], Tensor]  # reads a parameter, a buffer or a constant of the module

FLOATS = (torch.float32, torch.float64)
NUMBERS = (
    *FLOATS,
    *(torch.float16, torch.bfloat16, torch.bool),
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
)


class Settings:
    """The settings of an op, back from JSON.  Every reader raises ValueError with the name, the wanted and the got."""

    def __init__(self, values: Mapping[str, object], most: int = 2**25) -> None:
        """values: what `describe` gave.  most: numbers that an array sized by settings may hold."""
        self._values = values
        self.most = most
        self._read: set[str] = set()

    def absent(self, name: str) -> bool:
        """Whether a setting is null or not there."""
        self._read.add(name)
        return self._values.get(name) is None

    def integer(self, name: str, least: int = 0) -> int:
        """A whole number from `least` to `most`."""
        return self._integer(name, self._get(name), least)

    def integers(self, name: str, count: int | None = None, least: int = 0) -> tuple[int, ...]:
        """Whole numbers from `least` to `most`, `count` of them where given."""
        return tuple(self._integer(name, value, least) for value in self._list(name, count))

    def pair(self, name: str, least: int = 0) -> tuple[int, int]:
        """Two whole numbers."""
        first, second = self.integers(name, 2, least)
        return first, second

    def number(self, name: str) -> float:
        """A finite number."""
        return _number(name, self._get(name))

    def numbers(self, name: str, count: int | None = None) -> tuple[float, ...]:
        """Finite numbers, `count` of them where given."""
        return tuple(_number(name, value) for value in self._list(name, count))

    def word(self, name: str, *choices: str) -> str:
        """A text, one of `choices` where given."""
        value = self._get(name)
        if not isinstance(value, str) or (choices and value not in choices):
            raise ValueError(f"{name}: wants {' or '.join(choices) or 'a text'}, got {_short(value)}")
        return value

    def flag(self, name: str) -> bool:
        """True or false."""
        value = self._get(name)
        if not isinstance(value, bool):
            raise ValueError(f"{name}: wants true or false, got {_short(value)}")
        return value

    def require_size(self, name: str, sizes: Iterable[int]) -> None:
        """ValueError where an array of these sizes, which settings decide, would hold more than `most` numbers."""
        if (count := math.prod(sizes)) > self.most:
            raise ValueError(f"{name}: wants at most {self.most} numbers, got {count}")

    def finish(self) -> None:
        """ValueError for settings that nothing read."""
        if unknown := sorted(map(str, self._values.keys() - self._read)):
            raise ValueError(f"has the unknown settings {_short(unknown)}")

    def _get(self, name: str) -> object:
        self._read.add(name)
        if name not in self._values:
            raise ValueError(f"setting {name!r} is missing")
        return self._values[name]

    def _list(self, name: str, count: int | None) -> list[object]:
        value = self._get(name)
        if not isinstance(value, (list, tuple)) or (count is not None and len(value) != count):
            raise ValueError(f"{name}: wants {'a list of' if count is None else count} numbers, got {_short(value)}")
        return list(value)

    def _integer(self, name: str, value: object, least: int) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= self.most:
            raise ValueError(f"{name}: wants whole numbers in {least} .. {self.most}, got {_short(value)}")
        return value


class Tensors:
    """The tensors of an op, back from a file, checked before anything is made of them."""

    def __init__(self, sources: Mapping[str, Source]) -> None:
        self._sources = sources
        self._read: set[str] = set()

    def source(
        self,
        name: str,
        *,
        dims: int | None = None,
        shape: Iterable[int] | None = None,
        dtypes: tuple[torch.dtype, ...] = FLOATS,
    ) -> Source:
        """The reader of a tensor of so many dimensions, or of this shape, of one of these types; else ValueError."""
        self._read.add(name)
        if name not in self._sources:
            raise ValueError(f"tensor {name!r} is missing")
        value = self._sources[name]()
        if dims is not None and value.dim() != dims:
            raise ValueError(f"{name}: wants {dims} dimensions, got shape {tuple(value.shape)}")
        if shape is not None and tuple(value.shape) != tuple(shape):
            raise ValueError(f"{name}: wants shape {tuple(shape)}, got {tuple(value.shape)}")
        if value.dtype not in dtypes:
            raise ValueError(f"{name}: wants {' or '.join(map(str, dtypes))}, got {value.dtype}")
        return self._sources[name]

    def optional(
        self,
        name: str,
        *,
        dims: int | None = None,
        shape: Iterable[int] | None = None,
        dtypes: tuple[torch.dtype, ...] = FLOATS,
    ) -> Source | None:
        """As `source`; None where the op has no such tensor."""
        return self.source(name, dims=dims, shape=shape, dtypes=dtypes) if name in self._sources else None

    def finish(self) -> None:
        """ValueError for tensors that nothing read."""
        if unknown := sorted(self._sources.keys() - self._read):
            raise ValueError(f"has the unknown tensors {_short(unknown)}")


class Storable:
    """An op that a file may hold, once its class states the three methods and is registered by `stored`."""

    def describe(self) -> dict[str, object]:
        """JSON-ready settings: all that decides the op besides its tensors and the shapes of its inputs."""
        raise NotImplementedError(f"{type(self).__name__} cannot be stored in a checkpoint")

    def tensors(self) -> dict[str, Source]:
        """What the op reads, by name: parameters, buffers, constants; no coefficients computed from others."""
        return {}

    @classmethod
    def restore(cls, settings: Settings, tensors: Tensors, shapes: tuple[Shape, ...]) -> Storable:
        """The op that said this of itself, for inputs of these shapes.  ValueError for what no such op would say."""
        raise NotImplementedError(f"{cls.__name__} cannot be restored from a checkpoint")


_Class = TypeVar("_Class", bound=type[Storable])
_CLASSES: dict[str, type[Storable]] = {}
_NAMES: dict[type[Storable], str] = {}


def stored(name: str, *older: str) -> Callable[[_Class], _Class]:
    """Class decorator: ops of exactly this class are stored under `name`, and restored from it and `older` names."""

    def decorate(cls: _Class) -> _Class:
        if not issubclass(cls, Storable):
            raise TypeError(f"stored: wants a subclass of Storable, such as of Affine, got {cls.__name__}")
        for known in (name, *older):
            if known in _CLASSES:
                raise ValueError(f"stored: {known!r} is registered already")
        _CLASSES.update(dict.fromkeys((name, *older), cls))
        _NAMES[cls] = name
        return cls

    return decorate


def stored_names() -> tuple[str, ...]:
    """The names that classes of ops are stored under."""
    return tuple(sorted(_NAMES.values()))


def name_of(op: Storable) -> str:
    """The name that an op is stored under.  NotImplementedError for one whose class has none."""
    if type(op) not in _NAMES:
        # A subclass is another op: what its parent says of itself would leave out what is its own.
        raise NotImplementedError(
            f"{type(op).__name__} cannot be stored in a checkpoint: register its class with "
            "optrelax.networks.storage.stored"
        )
    return _NAMES[type(op)]


def restored(name: object, settings: Settings, tensors: Tensors, shapes: tuple[Shape, ...]) -> Storable:
    """The op stored under a name.  ValueError for unknown names, settings and tensors, and for what does not fit."""
    if not isinstance(name, str) or name not in _CLASSES:
        raise ValueError(f"is the unknown op {_short(name)}; {suggest(str(name)[:40], _CLASSES)}")
    op = _CLASSES[name].restore(settings, tensors, shapes)
    settings.finish()
    tensors.finish()
    return op


def _number(name: str, value: object) -> float:
    # Compared, not cast: a whole number may lie beyond every float.
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) <= sys.float_info.max:
        raise ValueError(f"{name}: wants finite numbers, got {_short(value)}")
    if float(value) != value:
        raise ValueError(f"{name}: wants numbers that float64 holds, got {_short(value)}")
    return float(value)


def _short(value: object) -> str:
    """What an error shows of a value that may be of any size."""
    text = repr(value) if not isinstance(value, (str, list, tuple)) else repr(value[:8])
    return text if len(text) <= 60 else f"{text[:57]}..."

"""What every test runs under: shapes and types of the library checked, no data but what a test asks for."""

import gc
import os
import shutil
from importlib.util import find_spec
from pathlib import Path

import hypothesis
import pytest
import torch
from jaxtyping import install_import_hook


def checked_modules() -> list[str]:
    """Modules of the library but the networks, whose `forward` must also take what a tracer passes."""
    found = []
    for package in ("optrelax", "optrelax.layers"):
        spec = find_spec(package)
        assert spec is not None
        for folder in map(Path, spec.submodule_search_locations or ()):
            for path in folder.rglob("*.py"):
                parts = [part for part in path.relative_to(folder).with_suffix("").parts if part != "__init__"]
                found.append(".".join([package, *parts]))
    onnx = {f"optrelax.networks.onnx_{name}" for name in ("modules", "ops", "shapes")}
    return sorted(set(found) - {"optrelax", "optrelax.networks", "optrelax.networks.models"} - onnx)


# Every annotated function checks its arguments and results: in the tests only, so `import optrelax` stays light.
# In force from here on: the library is imported after this line.
install_import_hook(checked_modules(), "typecheck.checked")

hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, print_blob=True)
hypothesis.settings.load_profile("repeatable")

DATA = os.environ.get("OPTRELAX_DATA")


TESTS_BETWEEN_FREEZES = 200
"""What is alive then (modules, caches of PyTorch's compiler) is never searched for garbage again, which took up to an
eighth of the suite's time: its processes hold millions of objects."""


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _tests_run() -> list[int]:
    return [0]


@pytest.fixture(autouse=True)
def _old_objects_are_no_garbage(_tests_run: list[int]) -> None:
    _tests_run[0] += 1
    if _tests_run[0] % TESTS_BETWEEN_FREEZES == 0:
        gc.collect()
        gc.freeze()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked `gpu` want a CUDA device; those marked `compiler` a C compiler: without one all others are passed by
    PyTorch's own operations, and there is nothing to compare them with.
    """
    if shutil.which(os.environ.get("CC", "cc")) is None:
        without = {item for item in items if item.get_closest_marker("compiler")}
        config.hook.pytest_deselected(items=list(without))
        items[:] = [item for item in items if item not in without]
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    """A test that draws without a seed of its own draws the same every time, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_data_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test must not pass or fail with what lies in a folder of the machine; `data_dir` is the way in."""
    monkeypatch.delenv("OPTRELAX_DATA", raising=False)


@pytest.fixture
def data_dir() -> Path:
    """The folder of real data sets, for tests marked `data`: they are selected only where it exists."""
    assert DATA, "OPTRELAX_DATA is not set: leave out the tests of real data with -m 'not data'"
    return Path(DATA)


@pytest.fixture
def one_thread():
    """As in the other processes: the number of threads decides the last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def registries_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is forgotten after it."""
    from optrelax.networks import registry as ops
    from optrelax.relaxations import registry as relaxations

    ops.load_rules()
    for name in ("_RULES", "_MODULES", "_FUNCTIONS"):
        monkeypatch.setattr(ops, name, dict(getattr(ops, name)))
    monkeypatch.setattr(relaxations, "_FACTORIES", dict(relaxations._FACTORIES))

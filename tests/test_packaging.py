"""What is installed is what is here, and importing it costs and changes next to nothing."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
TREES = {name: ROOT / folder for name, folder in PROJECT["tool"]["setuptools"]["package-dir"].items()}
HEAVY = ["cvxpy", "cvxpylayers", "highspy", "lightning", "matplotlib", "polars", "scipy", "sklearn", "typer"]


def folders() -> dict[str, Path]:
    """Every package of the checkout and its folder: those that hold .py files."""
    return {
        ".".join([name, *path.parent.relative_to(tree).parts]): path.parent
        for name, tree in TREES.items()
        for path in tree.rglob("*.py")
    }


def modules() -> dict[str, Path]:
    """Every module of the checkout that is not a package."""
    return {
        f"{package}.{path.stem}": path
        for package, folder in folders().items()
        for path in folder.glob("*.py")
        if path.stem != "__init__"
    }


def run(*arguments: str, cwd: Path, **environment: str) -> str:
    """Standard output of a fresh Python process."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr or done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of the source distribution, built from a copy: an old build folder would add files long gone."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in ("pyproject.toml", PROJECT["project"]["readme"], *PROJECT["project"]["license-files"]):
        (source / name).write_bytes((ROOT / name).read_bytes())
    for package, folder in folders().items():
        copy = source / folder.relative_to(ROOT)
        copy.mkdir(parents=True, exist_ok=True)
        for path in folder.iterdir():
            if path.is_file():
                (copy / path.name).write_bytes(path.read_bytes())
        assert package in PROJECT["tool"]["setuptools"]["packages"]
    run("-m", "build", "--no-isolation", "--outdir", str(target), cwd=source)
    (path,) = target.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing but the installed wheel."""
    target = tmp_path_factory.mktemp("installed")
    command = [
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-index",
        "--no-deps",
        "--target",
        str(target),
        str(wheel),
    ]
    run(*command, cwd=target)
    return target


def test_package_list_equals_the_folders():
    assert sorted(PROJECT["tool"]["setuptools"]["packages"]) == sorted(folders())


def test_wheel_holds_every_module_and_the_type_marks(wheel):
    held = {PurePosixPath(name) for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    packages = {name.replace(".", "/") for name in folders()}
    expected = {PurePosixPath(name.replace(".", "/") + ".py") for name in modules()}
    expected |= {PurePosixPath(package, "__init__.py") for package in packages}
    expected |= {PurePosixPath(name.replace(".", "/"), "py.typed") for name in TREES}
    expected |= {
        PurePosixPath(package.replace(".", "/"), path.name)
        for package, folder in folders().items()
        for path in folder.glob("*.[ch]")
    }
    assert any(path.suffix == ".c" for path in expected)
    assert held == expected


# One hidden layer: all three have its exact pre-activation bounds, so the order below is a theorem.
AWAY = """
import json
import torch
import optrelax as ox
import optrelax.layers as layers

net, rows, x = ox.models.fc(4, 3, 2, seed=0), torch.eye(2), torch.full((1, 4), 0.5)
region = ox.LinfBall(x, eps=0.1, clip=(0.0, 1.0))
lower = {name: ox.lower_bounds(net, region, rows, relaxation=name)[0].tolist() for name in ("box", "crown")}
lower["triangle"] = layers.Triangle().solve(net, region, rows).lower[0].tolist()
files = [ox.__file__, layers.__file__]
print(json.dumps({"version": ox.__version__, "files": files, "lower": lower, "value": net(x)[0].tolist()}))
"""


def test_wheel_works_away_from_the_checkout(installed, tmp_path):
    got = json.loads(run("-W", "error", "-c", AWAY, cwd=tmp_path, PYTHONPATH=str(installed)))
    assert got["files"] == [str(installed / "optrelax" / p) for p in ("__init__.py", "layers/__init__.py")]
    (name,) = (path.name for path in installed.glob("*.dist-info"))
    assert name == f"optrelax-{got['version']}.dist-info"
    for box, crown, triangle, value in zip(*got["lower"].values(), got["value"], strict=True):
        assert max(box, crown) - 1e-5 <= triangle <= value


def test_command_is_installed(installed, tmp_path):
    (script,) = PROJECT["project"]["scripts"].values()
    module, function = script.split(":")
    code = f"import {module} as cli; assert callable(cli.{function})"
    run("-c", code, cwd=tmp_path, PYTHONPATH=str(installed))


def test_version_is_stated_once_and_agrees():
    (version,) = re.findall(r'^__version__ = "(.+)"$', (ROOT / "optrelax" / "__init__.py").read_text(), re.M)
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## [{version}]" in (ROOT / "CHANGELOG.md").read_text()


def test_every_dependency_is_pinned_for_development():
    pinned = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = PROJECT["project"]["dependencies"] + extras["dev"] + extras["docs"]
    names = {re.split(r"[><=~!;\[ ]", requirement)[0] for requirement in wanted}
    assert {name.lower().replace("_", "-") for name in pinned} >= names


def test_no_module_carries_the_name_of_a_public_function(installed, tmp_path):
    """`optrelax.bounds` must be the function, whatever was imported before."""
    script = f"""
import importlib, json
public = {{}}
for package in {sorted(folders())}:
    module = importlib.import_module(package)
    public[package] = [n for n in getattr(module, "__all__", dir(module)) if callable(getattr(module, n))]
print(json.dumps(public))
"""
    public = json.loads(run("-c", script, cwd=tmp_path, PYTHONPATH=str(installed)))
    functions = {name for names in public.values() for name in names}
    assert {"bounds", "margins", "check", "certify"} <= functions
    assert {name.rsplit(".", 1)[1] for name in [*modules(), *folders()] if "." in name} & functions == set()


SNAPSHOT = """
import json, logging, os, random, signal, sys, warnings
import numpy, torch

def snapshot():
    return {
        "warnings": [str(f) for f in warnings.filters],
        "dtype": str(torch.get_default_dtype()), "device": str(torch.get_default_device()),
        "threads": [torch.get_num_threads(), torch.get_num_interop_threads()],
        "generators": [
            hash(bytes(torch.get_rng_state().tolist())), hash(random.getstate()),
            hash(numpy.random.get_state()[1].tobytes()), numpy.random.get_state()[2],
        ],
        "grad": [torch.is_grad_enabled(), torch.is_anomaly_enabled()],
        "deterministic": [torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark],
        "precision": [torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32],
        "numpy": [str(numpy.geterr()), str(numpy.get_printoptions())],
        "logging": [logging.root.level, len(logging.root.handlers), logging.root.manager.disable],
        "environment": dict(os.environ), "path": list(sys.path), "hooks": [str(f) for f in sys.meta_path],
        "signals": [str(signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM)],
        "streams": [sys.excepthook is sys.__excepthook__, sys.getrecursionlimit()],
    }

before, loaded = snapshot(), set(sys.modules)
import optrelax
after = snapshot()
changed = [key for key in before if before[key] != after[key]]
print(json.dumps({"changed": changed, "loaded": sorted(set(sys.modules) - loaded)}))
"""


def test_import_changes_nothing_and_loads_nothing_heavy(installed, tmp_path):
    got = json.loads(run("-W", "error", "-c", SNAPSHOT, cwd=tmp_path, PYTHONPATH=str(installed)))
    assert got["changed"] == []
    assert "optrelax" in got["loaded"]
    assert {name.split(".")[0] for name in got["loaded"]} & set(HEAVY) == set()


@pytest.mark.parametrize("name", HEAVY)
def test_heavy_packages_are_spelt_as_they_are_installed(name):
    """The test above would pass with a misspelt name."""
    assert name == "lightning" or importlib.util.find_spec(name) is not None


@pytest.mark.slow
def test_import_takes_at_most_a_third_longer_than_torch(installed, tmp_path):
    """Least processor time of interleaved runs: a busy machine can slow any one run, not every one."""
    environment = {"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    times: dict[str, list[float]] = {"torch": [], "optrelax": []}
    for _ in range(12):
        for name, spent in times.items():
            script = f"import time; import {name}; print(time.process_time())"
            spent.append(float(run("-c", script, cwd=tmp_path, **environment)))
        if len(times["torch"]) >= 3 and min(times["optrelax"]) <= 1.3 * min(times["torch"]):
            return
    pytest.fail(f"least of 12 runs, in seconds: { ({name: min(spent) for name, spent in times.items()}) }")

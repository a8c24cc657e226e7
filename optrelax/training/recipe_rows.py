"""The recipes: one row a training run.

"paper" rows are those of arXiv 2102.06700 (MNIST and Fashion-MNIST at eps 0.3; CROWN-IBP (R), its name for CROWN on
Box's pre-activation bounds, is `crown-ibp-r` here, and `crown-ibp` the mix that ends at Box). "field" rows are those
by which Shi et al. 2021 and the work after it train CNN7 and its kin by Box: on CIFAR-10 at 2 and 8 / 255, the last
part of their names, on MNIST at 0.2 and 0.4 for certificates at 0.1 and 0.3. All others are ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from optrelax.training.recipes import Recipe

__all__ = ["ROWS"]

Settings = dict[str, Any]


def _certified(relaxation: str, **rest: Any) -> Settings:
    return {"method": "certified", "relaxation": relaxation, **rest}


# --- the paper's table ---------------------------------------------------------------------------------------------

_PAPER: Settings = {"eps": 0.3, "epochs": 200, "milestones": (130.0, 190.0), "source": "paper"}
# DeepZ on FC: the rate is halved every 20 epochs after mixing, and margins come from the logits' intervals.
_HALVED: Settings = {
    "lr": 1e-3,
    "lr_factor": 0.5,
    "milestones": tuple(map(float, range(70, 200, 20))),
    "elision": False,
}
_TABLE: dict[str, tuple[Settings, Settings]] = {  # method: FC, CONV
    "box": (
        _certified("box", warmup=10, mixing=100, l1=5e-6),
        _certified("box", mixing=50, kappa=0.5, l1=5e-6),
    ),
    "hbox": (
        _certified("hbox", mixing=50, kappa=0.5, l1=5e-5),
        _certified("hbox", mixing=50, kappa=0.5, l1=5e-5),
    ),
    "crown-ibp-r": (
        _certified("crown-ibp", mixing=50, kappa=0.5, l1=5e-6),
        _certified("crown-ibp", warmup=10, mixing=50, kappa=0.5, l1=5e-6),
    ),
    "crown-ibp": (
        _certified("crown-ibp", warmup=10, mixing=100, beta=0.0),
        _certified("crown-ibp", warmup=10, mixing=50, beta=0.0, l1=5e-6),
    ),
    "deepz": (
        _certified("deepz", mixing=50, l1=5e-6, **_HALVED),
        _certified("deepz", mixing=50, l1=5e-5, batch=50),
    ),
    "crown": (
        _certified("crown", warmup=10, mixing=100),
        _certified("crown", warmup=10, mixing=100, batch=50),
    ),
}


def _paper() -> Iterator[Recipe]:
    for data in ("mnist", "fashion-mnist"):
        for place, model in enumerate(("fc", "conv")):
            for method, both in _TABLE.items():
                yield Recipe(name=f"{data}-{model}-{method}", data=data, model=model, **(_PAPER | both[place]))


# --- colour images: the field's usual settings ---------------------------------------------------------------------

_COLOUR: dict[str, Settings] = {
    "cifar10": {"eps": 8 / 255, "batch": 128},
    "svhn": {"eps": 0.01, "batch": 128},
}
_LONG: Settings = {
    "epochs": 200,
    "warmup": 10.0,
    "mixing": 80.0,
    "kappa": 0.5,
    "milestones": (130.0, 190.0),
    "ramp": "smooth",
}


_ATTACKED: dict[str, Settings] = {  # bounds and attacks in one loss
    "sabr": {"method": "sabr", "mix": 0.4},
    "mtl-ibp": {"method": "mtl-ibp", "mix": 0.5},
    "cc-ibp": {"method": "cc-ibp", "mix": 0.5},
    "exp-ibp": {"method": "exp-ibp", "mix": 0.5},
}
# CONVPLUS for what costs as much as intervals; CROWN, DeepZ and hBox would carry tens of gigabytes a batch there.
_INTERVALS: dict[str, Settings] = {
    "box": _certified("box"),
    "box-shi": _certified("box", initial="interval", regularise=0.5),
    "crown-ibp-r": _certified("crown-ibp"),
    "crown-ibp": _certified("crown-ibp", kappa=0.0, beta=0.0),
    "crown-ibp-fused": {"method": "fused", "relaxation": "crown-ibp", "kappa": 0.0, "beta": 0.0},
    **{name: settings | {"kappa": 0.0} for name, settings in _ATTACKED.items()},
}


def _colour() -> Iterator[Recipe]:
    for data, own in _COLOUR.items():
        for method, (_, conv) in _TABLE.items():
            chosen = {key: conv[key] for key in ("method", "relaxation")}
            # Noise terms of every pixel: a batch of 32 takes some gigabytes.
            rest: Settings = {"kappa": 0.0, "beta": 0.0} if method == "crown-ibp" else {}
            rest |= {"batch": 32} if method in ("hbox", "deepz") else {}
            yield Recipe(name=f"{data}-conv-{method}", data=data, model="conv", **(_LONG | own | chosen | rest))
        for method, settings in _INTERVALS.items():
            yield Recipe(name=f"{data}-convplus-{method}", data=data, model="convplus", **(_LONG | own | settings))


# --- the field's networks -------------------------------------------------------------------------------------------

_FIELD: Settings = {
    "lr_factor": 0.2,
    "clip_norm": 10.0,
    "ramp": "smooth",
    "natural_start": 0.0,
    "initial": "interval",
    "regularise": 0.5,
}
_FIELD_RADII: dict[tuple[str, str], Settings] = {  # data, name of the radius
    ("mnist", "0.1"): {"eps": 0.2, "certified_eps": 0.1},
    ("mnist", "0.3"): {"eps": 0.4, "certified_eps": 0.3},
    ("cifar10", "2"): {"eps": 2 / 255, "epochs": 160, "mixing": 80.0, "milestones": (120.0, 140.0), "l1": 1e-6},
    ("cifar10", "8"): {"eps": 8 / 255, "epochs": 240, "mixing": 120.0, "milestones": (200.0, 220.0)},
}
_FIELD_DATA: dict[str, Settings] = {
    "mnist": {"epochs": 70, "mixing": 20.0, "milestones": (50.0, 60.0), "batch": 256},
    "cifar10": {"warmup": 1.0, "batch": 128, "augment": "crop-flip"},
}
_FIELD_METHODS = ("box", "crown-ibp-fused", "sabr", "mtl-ibp")
_FIELD_NETWORKS = ("cnn7", "cnn7-w16", "cnn5", "resnet-2b")


def _field() -> Iterator[Recipe]:
    for (data, radius), own in _FIELD_RADII.items():
        shared = _FIELD | _FIELD_DATA[data] | own
        for model in _FIELD_NETWORKS:
            for method in _FIELD_METHODS if model.startswith("cnn7") else ("box",):
                whose = "field" if method == "box" else "ours"
                settings = shared | _INTERVALS[method] | {"source": whose}
                yield Recipe(name=f"{data}-{model}-{method}-{radius}", data=data, model=model, **settings)


# --- small networks ------------------------------------------------------------------------------------------------

_SMALL: dict[str, Settings] = {
    "digits": {
        "eps": 0.1,
        "epochs": 30,
        "warmup": 1.5,
        "mixing": 15.0,
        "kappa": 0.5,
        "lr": 2e-3,
        "milestones": (24.0,),
        "batch": 50,
    },
    "mnist": {"eps": 0.1, "epochs": 100, "warmup": 5.0, "mixing": 50.0, "l1": 5e-6, "milestones": (65.0, 95.0)},
    "fashion-mnist": {"eps": 0.1, "epochs": 100, "warmup": 5.0, "mixing": 50.0, "l1": 5e-6, "milestones": (65.0, 95.0)},
}
_METHODS: dict[str, Settings] = {
    "natural": {"method": "natural"},
    "pgd": {"method": "pgd"},
    "box": _certified("box"),
    "hbox": _certified("hbox"),
    "crown-ibp": _certified("crown-ibp"),
    "deepz": _certified("deepz"),
    "crown": _certified("crown"),
    "triangle": _certified("triangle"),
    "layerwise": _certified("layerwise"),
    "box-shi": _certified("box", initial="interval", regularise=0.5, ramp="smooth"),
    "crown-ibp-fused": {"method": "fused", "relaxation": "crown-ibp", "beta": 0.0},
    "landscape": {"method": "landscape"},
    **_ATTACKED,
    "colt": {"method": "colt", "kappa": 0.0},
    "crown-rgs": _certified("crown", smoothing="rgs"),
    "deepz-rgs": _certified("deepz", smoothing="rgs"),
    "triangle-rgs": _certified("triangle", smoothing="rgs"),
    "crown-pgpe": _certified("crown", smoothing="pgpe", samples=16),
}


# CONV beside the paper's rows: ours, by the settings of its CROWN-IBP (R).
_FURTHER = ("triangle", "box-shi", "sabr", "mtl-ibp", "crown-rgs", "deepz-rgs", "triangle-rgs")


def _conv() -> Iterator[Recipe]:
    shared: Settings = {"warmup": 10.0, "mixing": 50.0, "kappa": 0.5, "l1": 5e-6}
    for data in ("digits", "mnist", "fashion-mnist"):
        base = _SMALL["digits"] if data == "digits" else _PAPER | shared | {"source": "ours"}
        rows = {name: _METHODS[name] for name in _FURTHER}
        if data == "digits":
            rows |= {name: _certified(conv["relaxation"]) for name, (_, conv) in _TABLE.items() if name != "crown-ibp"}
        begin = 0.9 * base["epochs"]
        rows["triangle-to-layerwise"] = _certified("layerwise", stages=(("triangle", 0.0), ("layerwise", begin)))
        for method, settings in rows.items():
            yield Recipe(name=f"{data}-conv-{method}", data=data, model="conv", **(base | settings))


def _small() -> Iterator[Recipe]:
    for data, base in _SMALL.items():
        for method, settings in _METHODS.items():
            yield Recipe(name=f"{data}-fc-small-{method}", data=data, model="fc-small", **(base | settings))
        # Cheap bounds while eps grows, the LP once it has; LP-ALL for the last tenth.
        begin, end = base["warmup"] + base["mixing"], 0.9 * base["epochs"]
        turns = {
            "box-to-triangle": (("box", 0.0), ("crown-ibp", begin / 2), ("triangle", begin)),
            "triangle-to-layerwise": (("triangle", 0.0), ("layerwise", end)),
        }
        for method, stages in turns.items():
            settings = base | _certified(stages[-1][0], stages=stages)
            yield Recipe(name=f"{data}-fc-small-{method}", data=data, model="fc-small", **settings)


ROWS = {row.name: row for rows in (_small(), _paper(), _conv(), _colour(), _field()) for row in rows}

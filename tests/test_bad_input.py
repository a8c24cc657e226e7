"""Bad arguments: each is refused at the border, by name, with what was got and what was wanted."""

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import FrozenInstanceError

import pytest
import torch
from cases import RELAXATIONS, inputs
from torch import nn

import optrelax as ox
from optrelax.relaxations import name_of, names, resolve

X = torch.full((2, 3), 0.5)
NAN, INF = X.clone(), X.clone()
NAN[1, 2], INF[0, 1] = torch.nan, torch.inf


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


REGIONS = {
    "NaN pixels": (
        lambda: ox.LinfBall(NAN, 0.1),
        r"LinfBall: x has 1 NaN or infinite of 6 entries \(first at \[1, 2\]\)",
    ),
    "infinite pixels": (
        lambda: ox.LinfBall(INF, 0.1),
        r"LinfBall: x has 1 NaN or infinite of 6 entries \(first at \[0, 1\]\)",
    ),
    "eps < 0": (lambda: ox.LinfBall(X, -0.1), r"LinfBall: eps must be >= 0, got -0\.1"),
    "eps NaN": (lambda: ox.LinfBall(X, float("nan")), "LinfBall: eps must be >= 0, got nan"),
    "eps infinite": (lambda: ox.LinfBall(X, float("inf")), "LinfBall: lower has 6 NaN or infinite of 6 entries"),
    "one eps < 0": (lambda: ox.LinfBall(X, torch.tensor([0.1, -0.5])), r"LinfBall: eps must be >= 0, got -0\.5"),
    "eps of another batch": (lambda: ox.LinfBall(X, torch.zeros(3)), "LinfBall: eps has 3 entries for a batch of 2"),
    "eps of another shape": (
        lambda: ox.LinfBall(X, torch.zeros(2, 2)),
        r"LinfBall: eps must be a number, \[batch\] .*broadcast against an example of x \(2, 3\).*got \(2, 2\)",
    ),
    "x outside clip": (
        lambda: ox.LinfBall(3 * X, 0.1, clip=(0.0, 1.0)),
        r"LinfBall: x lies outside clip \[0\.0, 1\.0\] in 6 of 6 entries \(first at \[0, 0\]\); scale pixels to",
    ),
    "clip upside down": (
        lambda: ox.LinfBall(X, 0.1, clip=(1.0, 0.0)),
        r"LinfBall: clip must be \(low, high\) with low <= high",
    ),
    "clip NaN": (lambda: ox.LinfBall(X, 0.1, clip=(0.0, float("nan"))), r"LinfBall: clip must be \(low, high\)"),
    "integers": (
        lambda: ox.LinfBall(X.long(), 0.1),
        r"LinfBall: x must be float32 or float64, got torch\.int64; use x\.float\(\)",
    ),
    "half": (
        lambda: ox.LinfBall(X.half(), 0.1),
        r"LinfBall: x must be float32 or float64, got torch\.float16; use x\.float\(\)",
    ),
    "bfloat16": (
        lambda: ox.InputBox(X.bfloat16(), X.bfloat16()),
        r"InputBox: lower must be float32 or float64, got torch\.bfloat16",
    ),
    "a scalar": (
        lambda: ox.LinfBall(torch.tensor(0.5), 0.1),
        r"LinfBall: needs a batch dimension, got a scalar; pass x\[None\]",
    ),
    "a scalar box": (lambda: ox.InputBox(torch.tensor(0.5), torch.tensor(0.6)), "InputBox: needs a batch dimension"),
    "lower > upper": (
        lambda: ox.InputBox(X + 1, X),
        r"InputBox: lower exceeds upper in 6 of 6 entries \(first at \[0, 0\]\)",
    ),
    "ends of two shapes": (lambda: ox.InputBox(X, X[:1]), r"InputBox: lower has shape \(2, 3\), upper has \(1, 3\)"),
    "ends of two types": (
        lambda: ox.InputBox(X, X.double()),
        r"InputBox: lower is torch\.float32, upper is torch\.float64",
    ),
    "NaN ends": (
        lambda: ox.InputBox(NAN, X),
        r"InputBox: lower has 1 NaN or infinite of 6 entries \(first at \[1, 2\]\)",
    ),
    "infinite ends": (
        lambda: ox.InputBox(X, INF),
        r"InputBox: upper has 1 NaN or infinite of 6 entries \(first at \[0, 1\]\)",
    ),
}


@pytest.mark.parametrize("what", REGIONS)
def test_regions(what):
    make, message = REGIONS[what]
    with pytest.raises(ValueError, match=message):
        make()


BALL = ox.LinfBall(X, 0.1)
SPEC = torch.eye(2)
ENTRIES: dict[str, Callable[..., object]] = {
    "bounds": lambda net, region, **k: ox.bounds(net, region, **k),
    "lower_bounds": lambda net, region, **k: ox.lower_bounds(net, region, SPEC, **k),
    "preactivation_bounds": lambda net, region, **k: ox.preactivation_bounds(net, region, **k),
}
each_entry = pytest.mark.parametrize("entry", ENTRIES)


@each_entry
def test_regions_that_do_not_fit_the_network(entry):
    call = ENTRIES[entry]
    with pytest.raises(ValueError, match=r"0: Linear: fails on an input of shape \(5,\)"):
        call(net(), ox.LinfBall(torch.zeros(2, 5), 0.1))
    with pytest.raises(ValueError, match=r"region: the network takes inputs \[\*batch, 3\], got \(2, 5\)"):
        call(ox.capture(net()), ox.LinfBall(torch.zeros(2, 5), 0.1))
    with pytest.raises(ValueError, match=r"region: the network takes inputs \[\*batch, 3\], got \(3,\)"):
        call(ox.capture(net()), ox.LinfBall(torch.zeros(3), 0.1))


@each_entry
def test_types_of_weights(entry):
    call = ENTRIES[entry]
    with pytest.raises(
        ValueError, match=r"region is torch\.float32, 0\.weight is torch\.float64: .*use a float64 region"
    ):
        call(net().double(), BALL)
    with pytest.raises(ValueError, match=r"bounds want float32 or float64; call \.float\(\)"):
        call(net().half(), BALL)
    call(net(), ox.LinfBall(X.double(), 0.1))


@each_entry
def test_autocast(entry):
    with (
        torch.autocast("cpu"),
        pytest.raises(ValueError, match="autocast is on, and half precision gives no"),
    ):
        ENTRIES[entry](net(), BALL)
    with torch.autocast("cpu"), torch.autocast("cpu", enabled=False):
        ENTRIES[entry](net(), BALL)


def test_devices():
    with pytest.raises(ValueError, match=r"region is on meta, 0\.weight is on cpu; move one"):
        ox.capture(net()).require_weights(torch.device("meta"), torch.float32)


@pytest.mark.gpu
@each_entry
def test_devices_of_region_and_network(entry):
    with pytest.raises(ValueError, match=r"region is on cuda:0, 0\.weight is on cpu; move one"):
        ENTRIES[entry](net(), ox.LinfBall(X.cuda(), 0.1))


# Arguments of a wrong type, as a user meets them: in a process without the tests' own check of types.
PRELUDE = """
import json, sys, torch, optrelax as ox
from optrelax.training import Training
net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
x = torch.full((2, 3), 0.5)
ball, rows = ox.LinfBall(x, 0.1), torch.eye(2)
for line in json.load(sys.stdin):
    try:
        eval(line)
        print("no error")
    except Exception as error:
        print(f"{type(error).__name__}: {str(error).splitlines()[0]}")
"""
SLOPES = "'chord', 'box', 'diag', 'switch', 'soft' or 'slanted'"
_NO_REGION = (
    "TypeError: region: wants an InputBox, LinfBall or another Region, got Tensor; "
    "write ox.LinfBall(x, eps) or ox.InputBox(lower, upper)"
)
_NO_LABELS = "TypeError: margins: labels must be integers, got torch.float32; use labels.long()"
RAW = {
    "ox.bounds(net, x)": _NO_REGION,
    "ox.lower_bounds(net, x, rows)": _NO_REGION,
    "ox.preactivation_bounds(net, x)": _NO_REGION,
    "ox.bounds('net.pt', ball)": "TypeError: capture: wants an nn.Module or a Network, got str",
    "ox.check(3)": "TypeError: capture: wants an nn.Module or a Network, got int",
    "ox.bounds(net, ball, 3)": "TypeError: relaxation: wants a name or a relaxation object, got int",
    "ox.bounds(net, ball, ox.Crown)": (
        "TypeError: relaxation: wants a relaxation object, got the class Crown; write Crown()"
    ),
    "ox.lower_bounds(net, ball, [[1, 0]])": "TypeError: specification: wants a tensor of rows, an ox.Specification or "
    "a mapping of these by name, got list",
    "ox.bounds(net, ball, rounding='up')": "ValueError: Crown: rounding must be 'nearest' or 'outward', got 'up'",
    "ox.Box(rounding=1)": "ValueError: Box: rounding must be 'nearest' or 'outward', got 1",
    "ox.Crown(max_bytes=1e9)": (
        "ValueError: Crown: max_bytes must be a positive integer or None (or math.inf: no limit), got 1000000000.0"
    ),
    "ox.DeepZ(slope='steep')": f"ValueError: DeepZ: slope must be {SLOPES}, got 'steep'",
    "ox.HBox(slope=1)": f"ValueError: HBox: slope must be {SLOPES}, got 1",
    "ox.DeepZ(direction='up')": "ValueError: DeepZ: direction must be 'auto', 'forward' or 'backward', got 'up'",
    "ox.Crown(lower=2)": "ValueError: Crown: lower must be 'adaptive', 'soft', 0 or 1, got 2",
    "ox.Crown(lower=True)": "ValueError: Crown: lower must be 'adaptive', 'soft', 0 or 1, got True",
    "ox.Crown(lower=1.0)": "ValueError: Crown: lower must be 'adaptive', 'soft', 0 or 1, got 1.0",
    "ox.Cauchy(k=2.5)": "ValueError: Cauchy: k must be an integer of at least 1, got 2.5",
    "ox.Cauchy(seed='a')": "ValueError: Cauchy: seed must be an integer, got 'a'",
    "ox.Intersect(3)": "TypeError: relaxation: wants a name or a relaxation object, got int",
    "ox.LinfBall([0.5], 0.1)": "TypeError: LinfBall: x must be a tensor, got list; use torch.as_tensor(x)",
    "ox.LinfBall(x, torch.ones(3))": (
        "ValueError: LinfBall: eps has 3 entries for a batch of 2; for one a feature type eps[None]"
    ),
    "Training(loss=ox.CertifiedLoss('box'), epochs=1, eps=0.05)": (
        "TypeError: Training: eps must be a schedule, got float; use ConstantSchedule(0.05) or LinearRamp of "
        "optrelax.training.schedules"
    ),
    "ox.LinfBall(x.to_sparse(), 0.1)": ("TypeError: LinfBall: x must be dense, got torch.sparse_coo; use x.to_dense()"),
    "ox.LinfBall(x, x.to_sparse())": (
        "TypeError: LinfBall: eps must be dense, got torch.sparse_coo; use eps.to_dense()"
    ),
    "ox.lower_bounds(net, ball, rows.to_sparse())": (
        "TypeError: lower_bounds: specification must be dense, got torch.sparse_coo; use specification.to_dense()"
    ),
    "ox.certify(net, (x.to_sparse(), torch.tensor([0, 1])), 0.1)": (
        "TypeError: data: x must be dense, got torch.sparse_coo; use x.to_dense()"
    ),
    "ox.InputBox(x, 1.0)": "TypeError: InputBox: upper must be a tensor, got float; use torch.as_tensor(upper)",
    "ox.LinfBall(x, 'wide')": "TypeError: LinfBall: eps must be a number or a tensor, got str",
    "ox.LinfBall(x, None)": "TypeError: LinfBall: eps must be a number or a tensor, got NoneType",
    "ox.LinfBall(x, 0.1, clip=1.0)": "TypeError: LinfBall: clip must be (low, high) or None, got 1.0",
    "ox.capture(net, 3)": "TypeError: capture: input_shape must be numbers such as (1, 28, 28), got 3",
    "ox.margins(torch.tensor([0.5]), 2)": _NO_LABELS,
    "ox.margins([0.5], 2)": _NO_LABELS,
    "ox.Box(omega='a')": "TypeError: Box: omega must be a number, got 'a'",
    "ox.bounds(net, ball, 'box-widen:omega=a')": (
        "ValueError: relaxation 'box-widen:omega=a': Box: omega must be a number, got 'a'"
    ),
    "ox.Crown(gamma='a')": "TypeError: Crown: gamma must be a number, got 'a'",
    "ox.register_activation(torch.abs, activation=3)": "TypeError: register_activation: wants an Activation, got int",
    "ox.register_op(3)(len)": "TypeError: register_op: wants a module type, function or method name, got 3",
}


@pytest.fixture(scope="module")
def raised() -> dict[str, str]:
    """What each line of RAW raises."""
    run = subprocess.run(
        [sys.executable, "-c", PRELUDE], input=json.dumps(list(RAW)), capture_output=True, text=True, check=True
    )
    return dict(zip(RAW, run.stdout.splitlines(), strict=True))


@pytest.mark.parametrize("line", RAW)
def test_arguments_of_a_wrong_type(line, raised):
    assert raised[line] == RAW[line]


NAMES = {
    "crwon": r"unknown relaxation 'crwon'; did you mean 'crown'\?",
    "deep-z": r"unknown relaxation 'deep-z'; did you mean 'deepz'\?",
    "CROWN": r"unknown relaxation 'CROWN'; did you mean 'crown'\?",
    "nosuch": r"unknown relaxation 'nosuch'; known: alpha-crown, box, ",
    "": r"unknown relaxation ''; known: .*crown",
    "xyzzy": r"unknown relaxation 'xyzzy'; known: .*box, .*crown",
    "crown-soft:gamma": "relaxation 'crown-soft:gamma': options are written name=value, got 'gamma'",
    "crown-soft:=3": "options are written name=value, got '=3'",
    "crown-soft:gamma=": "options are written name=value, got 'gamma='",
    "crown-soft:gama=3": r"relaxation 'crown-soft:gama=3': no option 'gama'; did you mean 'gamma'\?",
    "box:slope=1": "no option 'slope'; known: F, max_bytes, omega",
    "crown-soft:gamma=0": "Crown: gamma must be > 0 and finite, got 0",
    "crown-soft:gamma=inf": "Crown: gamma must be > 0 and finite, got inf",
    "crown-soft:gamma=nan": "Crown: gamma must be > 0 and finite, got nan",
    "deepz-soft:gamma=-1": "DeepZ: gamma must be > 0 and finite, got -1",
    "deepz-slanted:kappa=1.1": r"DeepZ: kappa must lie in \[0, 1\] \(unsound beyond\), got 1\.1",
    "deepz-slanted:kappa=nan": r"DeepZ: kappa must lie in \[0, 1\] \(unsound beyond\), got nan",
    "deepz:continuous=true": r"DeepZ: continuous=True is the -diag-c form, it needs slope='diag', got 'chord'",
    "crown:tria=true": "Crown: tria and continuous need lower 0 or 1, got lower='adaptive'",
    "crown:preactivation=cauchy": "Crown: preactivation=cauchy is an estimate, not a bound",
    "crown:max_bytes=0": r"Crown: max_bytes must be a positive integer or None \(or math.inf: no limit\), got 0",
    "box-widen:omega=-1": "Box: omega must be >= 0 and finite, got -1",
    "box-widen:omega=inf": "Box: omega must be >= 0 and finite, got inf",
    "box-round:F=0": "Box: F must be > 0 and finite, got 0",
    "cauchy:k=0": "Cauchy: k must be an integer of at least 1, got 0",
}


@pytest.mark.parametrize("name", NAMES)
def test_names_of_relaxations_and_their_options(name):
    with pytest.raises(ValueError, match=NAMES[name]):
        resolve(name)
    with pytest.raises(ValueError, match=NAMES[name]):
        ox.bounds(net(), BALL, name)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ox.Crown(lowr=0), "unexpected keyword argument 'lowr'"),
        (lambda: ox.Crown("adaptive"), "positional argument"),
        (lambda: ox.Box(0.5), "positional argument"),
    ],
)
def test_misspelt_options_are_type_errors(make, message):
    with pytest.raises(TypeError, match=message):
        make()


def test_options_are_frozen():
    for case in RELAXATIONS:
        with pytest.raises(FrozenInstanceError):
            case.make().rounding = "outward"


def test_intersect_refuses_estimates_and_nothing():
    with pytest.raises(ValueError, match="Intersect: needs at least one relaxation"):
        ox.Intersect()
    with pytest.raises(ValueError, match="Intersect: cauchy is an estimate, not a bound, and cannot be intersected"):
        ox.Intersect("box", "cauchy")
    with pytest.raises(ValueError, match="FastLin: preactivation=cauchy is an estimate"):
        ox.FastLin(preactivation=ox.Cauchy())


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("box+crown", ox.Intersect(ox.Box(), ox.Crown())),
        ("box+fast-lin+crown:gamma=1e+5", ox.Intersect(ox.Box(), ox.FastLin(), ox.Crown(gamma=1e5))),
        ("crown:preactivation=box+fast-lin", ox.Crown(preactivation=ox.Intersect(ox.Box(), ox.FastLin()))),
        (
            "box+crown:preactivation=box+fast-lin",
            ox.Intersect(ox.Box(), ox.Crown(preactivation=ox.Intersect(ox.Box(), ox.FastLin()))),
        ),
    ],
)
def test_names_join_to_an_intersection(name, wanted):
    assert resolve(name) == wanted
    assert resolve(name_of(wanted)) == wanted
    assert "+" in name_of(wanted)


def test_an_intersection_that_no_name_tells_goes_by_its_class():
    for one in (ox.Intersect("crown-soft:gamma=2", "box"), ox.Intersect("box", max_bytes=10**9), ox.Intersect("box")):
        assert name_of(one) == "Intersect"
    with pytest.raises(ValueError, match="unknown relaxation 'crwn'; did you mean 'crown'"):
        resolve("box+crwn")
    with pytest.raises(ValueError, match=r"a name has no ':', ',' or '\+', got 'a\+b'"):
        ox.register_relaxation("a+b", ox.Box)


def test_every_name_of_the_contract_is_known():
    wanted = """box hbox hbox-diag hbox-diag-c hbox-switch hzono deepz deepz-box deepz-diag deepz-diag-c deepz-switch
    deepz-soft deepz-slanted fast-lin crown crown-0 crown-1 crown-0-c crown-1-c crown-0-tria crown-1-tria crown-0-tria-c
    crown-1-tria-c crown-soft crown-ibp crown-ibp-soft box-widen box-round cauchy alpha-crown triangle layerwise"""
    assert set(wanted.split()) <= set(names())


def test_defaults_are_those_of_the_contract():
    assert resolve("crown-soft").gamma == resolve("deepz-soft").gamma == 1
    assert resolve("crown-ibp-soft").gamma == 10
    assert resolve("deepz-slanted").kappa == 0.9
    assert (resolve("box-widen").omega, resolve("box-widen").F) == (0.5, None)
    assert (resolve("box-round").omega, resolve("box-round").F) == (0.5, 10)
    assert resolve("cauchy").k == 50


@pytest.mark.parametrize("seed", range(6))
def test_overflow_is_no_certificate(seed):
    """Values beyond the type's range give no infinite bound, no bound above a reachable value, and no error."""
    torch.manual_seed(seed)
    module = net()
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(1e25)
    region = ox.LinfBall(inputs((3,), 2).float(), 0.5)
    corners = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3)
    points = region.lower[:, None] + corners * (region.upper - region.lower)[:, None]
    reached = copy.deepcopy(module).double()(points.double()).amin(1)
    for case in RELAXATIONS:
        low = ox.lower_bounds(module, region, torch.eye(2), case.make()).double()
        assert not (low == torch.inf).any()
        if case.make().sound:
            assert not (low > reached + 1e-5 * reached.abs()).any()

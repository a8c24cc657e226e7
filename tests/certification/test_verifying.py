"""`ox.verify`: what holds is never met by a sample, what is violated is met at a point of the exact box, twice."""

import csv
import json
import math
from fractions import Fraction as F

import numpy as np
import pytest
import torch
from torch import nn

import optrelax as ox
from optrelax import cli
from optrelax.certification.property_files import parse_property
from optrelax.layers import Triangle
from tests.onnx_models import model, node, reference, stored

GENERATOR = np.random.default_rng(3)


def text(inputs, outputs, *assertions):
    declared = [f"(declare-const X_{i} Real)" for i in range(inputs)]
    declared += [f"(declare-const Y_{i} Real)" for i in range(outputs)]
    return "\n".join([*declared, *(f"(assert {a})" for a in assertions)])


def box(low, high, inputs=1):
    return [f"(and (>= X_{i} {low}) (<= X_{i} {high}))" for i in range(inputs)]


def affine(weight, bias=0.0):
    """y = weight x + bias, one input, in float32."""
    layer = nn.Linear(1, 1)
    with torch.no_grad():
        layer.weight.fill_(weight)
        layer.bias.fill_(bias)
    return nn.Sequential(layer).eval()


# Of y = x over [0, 1]: the condition that must not be met, and the truth.
LINE = {
    "(>= Y_0 1)": "violated",  # at the end itself
    "(> Y_0 1)": "holds",
    "(>= Y_0 1.000001)": "holds",
    "(<= Y_0 0)": "violated",
    "(< Y_0 0)": "holds",
    "(and (>= Y_0 0.25) (<= Y_0 0.75))": "violated",
    "(and (>= Y_0 2) (<= Y_0 3))": "holds",
    "(and (>= Y_0 0.5) (>= Y_0 2))": "holds",
    "(or (>= Y_0 2) (<= Y_0 -1))": "holds",
    "(or (>= Y_0 2) (<= Y_0 0.1))": "violated",
    "(<= (* 0.1234567890123456789 Y_0) -0.00001)": "holds",
    "(>= (* 0.1234567890123456789 Y_0) 0.12)": "violated",
    "(= Y_0 2)": "holds",
    "(not (= Y_0 0))": "violated",
    "(>= Y_0 1e-300)": "violated",
    "(and (<= 0 1) (>= 0 0))": "violated",  # every output
}


@pytest.mark.parametrize("relaxation", ["box", "crown", "deepz", Triangle()], ids=str)
@pytest.mark.parametrize("condition", LINE)
def test_verdicts_of_a_line(condition, relaxation):
    if condition not in ("(> Y_0 1)", "(< Y_0 0)"):  # a tie: bounds that are rounded outward leave it open
        found = ox.verify(affine(1.0), parse_property(text(1, 1, *box(0, 1), condition)), relaxation)
        assert (str(found.status), condition) == (LINE[condition], condition)
        assert (found.counterexample is None) == (found.status == "holds")
    strict = ox.verify(affine(1.0), parse_property(text(1, 1, *box(0, 1), condition)), relaxation, rounding="nearest")
    assert strict.status == LINE[condition]


def test_ties_under_outward_rounding_are_never_violated():
    for condition in ("(> Y_0 1)", "(< Y_0 0)"):
        assert ox.verify(affine(1.0), parse_property(text(1, 1, *box(0, 1), condition))).status != "violated"


def random_model(seed, inputs=3, outputs=3):
    r = np.random.default_rng(seed)
    weights = {"w": r.normal(size=(inputs, 8)), "b": r.normal(size=8), "v": r.normal(size=(8, outputs))}
    nodes = [
        node("MatMul", ["x", "w"], ["h"]),
        node("Add", ["h", "b"], ["i"]),
        node("Relu", ["i"], ["a"]),
        node("MatMul", ["a", "v"]),
    ]
    return model(nodes, [1, inputs], weights)


def random_text(seed, inputs=3, outputs=3):
    """Boxes, any of all of; offsets about where the outputs lie."""
    r = np.random.default_rng(seed)
    boxes = [
        " ".join(f"(and (>= X_{i} {c - w:.7f}) (<= X_{i} {c + w:.7f}))" for i, c in enumerate(r.normal(size=inputs)))
        for w in r.uniform(0, 0.4, size=2)
    ]

    def half():
        a, b = r.normal(size=2)
        sign = r.choice(["<=", ">="])
        i, j = r.choice(outputs, 2, replace=False)
        return f"({sign} (+ (* {a:.3f} Y_{i}) (* {float(b)!r} Y_{j})) {r.normal() * 3:.5f})"

    clauses = [f"(and {half()} {half()})" for _ in range(2)]
    return text(inputs, outputs, f"(or (and {boxes[0]}) (and {boxes[1]}))", f"(or {' '.join(clauses)})")


def met(prop, x, y, slack=0):
    """Whether a point's outputs meet a clause of a case that holds the point, in exact numbers."""
    for case in prop.cases:
        inside = all(l <= F(v) <= u for l, v, u in zip(case.lower, x, case.upper, strict=True))
        for clause in case.clauses if inside else ():
            values = [sum((c * F(y[i]) for i, c in h.coefficients), h.constant) for h in clause]
            if all(v < 0 or (v <= 0 and not h.strict) for v, h in zip(values, clause, strict=True)):
                return True
    return False


@pytest.mark.parametrize("relaxation", ["box", ["box", "crown"], "alpha-crown", "triangle"], ids=str)
def test_verdicts_against_samples_of_the_reference_evaluator(relaxation, tmp_path):
    seen = set()
    for seed in range(12):
        made = random_model(seed)
        prop = parse_property(random_text(seed))
        found = ox.verify(stored(made, tmp_path), prop, relaxation)
        seen.add(str(found.status))
        if found.status == "violated":
            point = found.counterexample
            assert met(prop, point.x.tolist(), point.outputs.tolist())
            again = reference(made, point.x.float()[None])[0]
            torch.testing.assert_close(point.replayed, again)
            assert met(prop, point.x.tolist(), again.tolist())
        if found.status == "holds":
            for case in prop.cases:
                low, high = (torch.tensor([float(v) for v in end]) for end in (case.lower, case.upper))
                x = low + torch.rand(200, 3) * (high - low)
                x = torch.cat([x, low[None], high[None]])
                y = reference(made, x)
                assert not any(met(prop, a.tolist(), b.tolist()) for a, b in zip(x, y, strict=True))
    assert seen >= {"holds", "violated"}


def test_boxes_are_split_and_each_must_hold():
    # y = |x| as two neurons: outputs differ by box.
    r = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False)).eval()
    with torch.no_grad():
        r[0].weight.copy_(torch.tensor([[1.0], [-1.0]]))
        r[2].weight.fill_(1.0)
    both = "(or (and (>= X_0 -2) (<= X_0 -1)) (and (>= X_0 1) (<= X_0 2)))"
    assert ox.verify(r, parse_property(text(1, 1, both, "(<= Y_0 0.99)"))).status == "holds"
    # In one box, 0 is among the inputs.
    assert ox.verify(r, parse_property(text(1, 1, *box(-2, 2), "(<= Y_0 0.99)"))).status == "violated"
    one = "(or (and (>= X_0 -2) (<= X_0 -1)) (and (>= X_0 0.5) (<= X_0 2)))"
    found = ox.verify(r, parse_property(text(1, 1, one, "(<= Y_0 0.99)")))
    assert found.status == "violated"
    assert 0.5 <= float(found.counterexample.x) <= 0.99
    assert (found.cases, found.open_cases) == (2, 1)


@pytest.mark.parametrize("decimal", ["0.1", "0.3", "1e-50", "16777217", "-0.7"])
def test_inputs_fixed_at_a_decimal(decimal):
    """No float is the decimal, in float32 or at all; the box around it is not empty, and the nearest float violates."""
    prop = parse_property(text(1, 1, f"(= X_0 {decimal})", f"(>= Y_0 (* 0.5 {decimal}))"))
    low, high = prop.cases[0].outer(torch.float32)
    assert F(float(low)) < F(decimal) < F(float(high))
    found = ox.verify(affine(1.0), prop)
    if decimal == "1e-50":  # 0 in single precision, where the file's own semantics give 0
        assert (found.status, found.counterexample) == ("unknown", None)
        assert "in one of" in found.message
    elif F(decimal) > 0:
        assert found.status == "violated"
        assert float(found.counterexample.x) == float(decimal)
        assert "fixed" in found.counterexample.note or F(float(decimal)) == F(decimal)
    else:
        assert found.status == "holds"


def test_the_box_holds_what_a_reader_in_single_precision_makes_of_it():
    """float32(0.1) > 0.1: at that input y >= float32(0.1), which the decimal box alone would exclude."""
    single = F(float(np.float32(0.1)))
    assert single > F(1, 10)
    prop = parse_property(text(1, 1, "(>= X_0 0)", "(<= X_0 0.1)", f"(>= Y_0 {float(single)!r})"))
    found = ox.verify(affine(1.0), prop, rounding="nearest")
    assert found.status == "unknown"  # no point of the exact box meets it, and no bound may exclude it


def test_a_vacuous_property_holds():
    found = ox.verify(affine(1.0), parse_property(text(1, 1, *box(1, 0), "(<= Y_0 0)")))
    assert (found.status, found.cases) == ("holds", 0)
    assert "no input" in str(found)


def test_nan_and_overflow_prove_nothing():
    huge = nn.Sequential(affine(3e38), affine(3e38), affine(3e38)).double().eval()
    prop = parse_property(text(1, 1, *box("-1e300", "1e300"), "(>= Y_0 0)"))
    with torch.no_grad():
        for layer in huge.parameters():
            layer.mul_(1e30)
    assert ox.verify(huge, prop, "box", attack=False).status == "unknown"
    assert ox.verify(huge, prop, "crown", attack=False).status == "unknown"


def test_order_attack_and_time():
    prop = parse_property(random_text(0))
    net = ox.models.fc(3, 8, 3, seed=0)
    found = ox.verify(net, prop, ["box", "crown"], timeout=1e-9)
    assert (found.status, found.message) == ("unknown", "stopped after 1e-09 s")
    assert math.isnan(found.lower) or found.lower == -math.inf
    hard = parse_property(text(1, 1, *box(0, 1), "(>= Y_0 0.999999)"))
    assert ox.verify(affine(1.0), hard, attack=False).status == "unknown"
    assert ox.verify(affine(1.0), hard, attack=ox.PGD(restarts=1, steps=5)).status == "violated"


def test_bad_input_is_refused(tmp_path):
    prop = parse_property(text(1, 1, *box(0, 1), "(<= Y_0 0)"))
    with pytest.raises(ValueError, match="1 inputs and 1 outputs, the network has 3 and 3"):
        ox.verify(ox.models.fc(3, 8, 3, seed=0), prop)
    with pytest.raises(ValueError, match="cauchy is an estimate"):
        ox.verify(affine(1.0), prop, "cauchy")
    with pytest.raises(ValueError, match="timeout"):
        ox.verify(affine(1.0), prop, timeout=-1.0)
    with pytest.raises(ValueError, match="dtype"):
        ox.verify(affine(1.0), prop, dtype=torch.float16)
    with pytest.raises(ValueError, match="would round"):
        ox.verify(affine(1.0).double(), prop, dtype=torch.float32)
    with pytest.raises(ValueError, match="too large"):
        ox.verify(affine(1.0), parse_property(text(1, 1, *box(0, "1e39"), "(<= Y_0 0)")))
    with pytest.raises(FileNotFoundError, match=r"net\.onnx"):
        ox.verify(tmp_path / "net.onnx", prop)


# --- command ------------------------------------------------------------------------------------------------------


def run(capsys, *arguments):
    code = 0
    try:
        cli.main([str(a) for a in arguments])
    except SystemExit as left:
        code = left.code
    return code, *capsys.readouterr()


def test_command_prints_verdicts(capsys, tmp_path):
    net = stored(random_model(0), tmp_path)
    paths = {}
    for name, condition in {"holds": "(>= Y_0 1000)", "violated": "(<= Y_0 1000)"}.items():
        paths[name] = tmp_path / f"{name}.vnnlib"
        paths[name].write_text(text(3, 3, *box(0, 0.25, 3), condition))
        code, out, err = run(capsys, "verify", net, paths[name])
        assert (code, err) == (0, "")
        assert out.startswith(name)
        assert ("inputs: " in out) == (name == "violated")
        code, out, err = run(capsys, "verify", net, paths[name], "--relaxations", "box", "crown", "--json")
        assert (code, err) == (0, "")
        record = json.loads(out)
        assert record["verdict"] == name
        if name == "violated":
            x = record["counterexample"]["x"]
            assert len(x) == 3
            assert all(0 <= v <= 0.25 for v in x)
    for arguments in (
        ("missing.onnx", paths["holds"]),
        (net, "missing.vnnlib"),
        (net, net),
        (paths["holds"], paths["holds"]),
        (net, paths["holds"], "--relaxation", "nonesuch"),
    ):
        code, out, err = run(capsys, "verify", *arguments)
        assert (code, out) == (2, "")
        assert err.startswith("error: ")


# --- the competition ----------------------------------------------------------------------------------------------


@pytest.mark.data
def test_no_verdict_contradicts_the_competition(data_dir):
    """A few of each; `python -m benchmarks vnncomp` takes all."""
    folder = data_dir / "vnncomp2021"
    with (folder / "instances.csv").open() as file:
        rows = list(csv.DictReader(file))
    wanted = [("2a_4_8_", "prop_3."), ("2a_3_3_", "prop_4."), ("2a_1_2_", "prop_2."), ("256x2", "prop_1_0.05")]
    chosen = [r for r in rows if any(n in r["network"] and r["property"].startswith(p) for n, p in wanted)]
    assert len(chosen) == len(wanted)
    decided = set()
    for r in chosen:
        where = folder / r["benchmark"]
        found = ox.verify(where / r["network"], where / r["property"], ["crown-ibp", "crown"])
        if found.status != "unknown":
            decided.add(str(found.status))
            assert r["verdict"] in (found.status, "unknown", "disputed"), r
    assert decided == {"holds", "violated"}

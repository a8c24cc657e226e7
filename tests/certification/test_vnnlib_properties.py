"""Properties: decimals keep their side of every float, VNN-LIB files are read to the last word or refused."""

import gzip
import re
from fractions import Fraction as F

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings

import optrelax as ox
from optrelax.certification.property_files import parse_property
from optrelax.properties import Case, Halfspace, Property, avoiding

DTYPES = (torch.float32, torch.float64)


# --- numbers ------------------------------------------------------------------------------------------------------

NUMBERS = st.one_of(
    st.decimals(-1000, 1000, places=9).map(F),
    st.floats(-1e30, 1e30, allow_subnormal=True).map(F),
    st.sampled_from([F(1, 10), F("-0.679857769"), F("1e-46"), F("-1e-400"), F("3.4e38"), F(0), F(1, 3)]),
)


def up(x, dtype):
    return torch.nextafter(x, torch.full_like(x, torch.inf))


@pytest.mark.parametrize("dtype", DTYPES)
@settings(suppress_health_check=list(HealthCheck))
@given(numbers=st.lists(NUMBERS, min_size=2, max_size=2).map(sorted))
def test_ends_are_the_nearest_floats_outside_and_inside(dtype, numbers):
    case = Case((numbers[0],), (numbers[1],), ())
    lower, upper = case.outer(dtype)
    assert lower.dtype == upper.dtype == dtype
    assert F(float(lower)) <= numbers[0] < F(float(up(lower, dtype)))
    assert F(float(upper)) >= numbers[1] > F(float(-up(-upper, dtype)))
    low, high = case.inner(dtype)
    assert F(float(low)) >= numbers[0] > F(float(-up(-low, dtype)))
    assert F(float(high)) <= numbers[1] < F(float(up(high, dtype)))


def test_ends_past_the_largest_float_are_infinite_outside_and_the_largest_inside():
    case = Case((F("-1e39"),), (F("1e39"),), ())
    assert [float(e) for e in case.outer(torch.float32)] == [-torch.inf, torch.inf]
    assert [float(e) for e in case.inner(torch.float32)] == [-torch.finfo(torch.float32).max, torch.finfo().max]


def test_open_ends_do_not_belong_to_the_inside():
    case = Case((F(0),), (F(1),), (), frozenset({(0, "lower"), (0, "upper")}))
    low, high = case.inner(torch.float64)
    assert 0 < float(low) < 1e-300
    assert 1 - 1e-15 < float(high) < 1


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=50, suppress_health_check=list(HealthCheck))
@given(
    coefficients=st.lists(NUMBERS.filter(lambda n: n != 0 and abs(n) < 10**6), min_size=1, max_size=3),
    constant=NUMBERS.filter(lambda n: abs(n) < 10**6),
    y=st.lists(st.integers(-8, 8), min_size=3, max_size=3),
)
def test_a_row_with_its_slack_is_never_more_than_the_halfspace(dtype, coefficients, constant, y):
    half = Halfspace(tuple(enumerate(coefficients)), constant)
    spec = avoiding([[half]], 3, dtype)
    (scaled,) = [half.scaled()]
    exact = sum((c * y[i] for i, c in scaled.coefficients), scaled.constant)
    row = [F(float(v)) for v in spec.rows[0]]
    slack = [F(0)] * 3 if spec.slack is None else [F(float(v)) for v in spec.slack[0]]
    offset = float(spec.offsets[0])
    value = sum(r * v for r, v in zip(row, y, strict=True)) + (F(offset) if offset > -torch.inf else -(10**1000))
    assert value - sum(s * abs(v) for s, v in zip(slack, y, strict=True)) <= exact
    # It is the same halfspace.
    assert (exact <= 0) == (sum(c * v for c, v in zip(coefficients, y, strict=False)) + constant <= 0)


# --- reading ------------------------------------------------------------------------------------------------------

DECLARED = "(declare-const X_0 Real)(declare-const X_1 Real)(declare-const Y_0 Real)(declare-const Y_1 Real)\n"
BOX = "(assert (<= X_0 1))(assert (>= X_0 -1.5))(assert (and (<= X_1 0.1) (<= 0 X_1)))\n"
SECOND = """(vnnlib-version <2.0>)
(declare-network net (declare-input In float32 [1, 2]) (declare-output Out Real [2]))
"""
SECOND_BOX = "(assert (and (<= In[0,0] 1.0) (>= In[0,0] -1.5) (<= In[0,1] 0.1) (>= In[0, 1] 0.0)))\n"


def clauses(text):
    (case,) = parse_property(text).cases
    assert (case.lower, case.upper) == ((F(-3, 2), F(0)), (F(1), F(1, 10)))
    return [[(dict(h.coefficients), h.constant, h.strict) for h in clause] for clause in case.clauses]


# What the outputs' assertion is in 1.0, and the clauses.
OUTPUTS = {
    "(<= Y_0 Y_1)": [[({0: 1, 1: -1}, 0, False)]],
    "(>= Y_0 3.991125645861615)": [[({0: -1}, F("3.991125645861615"), False)]],
    "(< Y_0 -1e-2)": [[({0: 1}, F(1, 100), True)]],
    "(or (and (<= Y_0 1) (<= Y_1 2)) (>= Y_0 3))": [[({0: 1}, -1, False), ({1: 1}, -2, False)], [({0: -1}, 3, False)]],
    "(and (or (<= Y_0 1) (<= Y_1 2)) (>= Y_0 3))": [
        [({0: 1}, -1, False), ({0: -1}, 3, False)],
        [({1: 1}, -2, False), ({0: -1}, 3, False)],
    ],
    "(not (or (> Y_0 1) (not (<= Y_1 2))))": [[({0: 1}, -1, False), ({1: 1}, -2, False)]],
    "(= Y_0 1)": [[({0: 1}, -1, False), ({0: -1}, 1, False)]],
    "(not (= Y_0 1))": [[({0: 1}, -1, True)], [({0: -1}, 1, True)]],
    "(<= (+ (* 2 Y_0) (- Y_1 3) (- Y_0)) (/ (* 3 Y_1 0.5) 3))": [[({0: 1, 1: F(1, 2)}, -3, False)]],
    "(<= (- Y_0 Y_0 1) 0)": [[]],  # always so: every output meets it
}


@pytest.mark.parametrize("condition", OUTPUTS)
def test_outputs_are_read_in_either_version(condition):
    assert clauses(f"; a comment (\n{DECLARED}{BOX}(assert {condition})") == OUTPUTS[condition]
    second = condition.replace("Y_0", "Out[0]").replace("Y_1", "Out [1]").replace("(= ", "(== ").replace("e-2", "e-02")
    assert clauses(f"{SECOND}{SECOND_BOX}(assert {second})") == OUTPUTS[condition]


def test_boxes_are_split_and_clauses_joined_by_box():
    text = (
        DECLARED + BOX + "(assert (or (<= X_0 0) (and (>= X_0 0.5) (< X_1 0.05))))(assert (or (<= Y_0 0) (>= Y_1 1)))"
    )
    cases = parse_property(text).cases
    assert [(c.lower[0], c.upper[0], c.upper[1]) for c in cases] == [
        (F(-3, 2), 0, F(1, 10)),
        (F(1, 2), 1, F(1, 20)),
    ]
    assert [len(c.clauses) for c in cases] == [2, 2]
    assert [c.open for c in cases] == [frozenset(), frozenset({(1, "upper")})]
    # An alternative may bind a box to its own outputs.
    text = DECLARED + BOX + "(assert (or (and (<= X_0 0) (<= Y_0 0)) (and (>= X_0 0) (<= Y_1 0))))"
    assert [[h.coefficients[0][0] for h in c.clauses[0]] for c in parse_property(text).cases] == [[0], [1]]


@pytest.mark.parametrize(
    "extra", ["(>= X_0 1.1)", "(< X_0 -1.5)", "(and (< X_0 0) (>= X_0 0))", "(<= 1 0)", "(> (* 0 Y_0) 0)"]
)
def test_an_empty_box_is_no_case(extra):
    found = parse_property(f"{DECLARED}{BOX}(assert {extra})(assert (<= Y_0 0))")
    assert found.cases == ()
    assert found.inputs == found.outputs == 2


REFUSED = {
    "(assert (<= X_2 0))": "X_2 is not declared",
    "(assert (<= (+ X_0 X_1) 0))": "X_0, X_1",
    "(assert (<= X_0 Y_0))": "X_0, Y_0",
    "(assert (<= (* Y_0 Y_1) 0))": "not a linear term",
    "(assert (<= (/ 1 Y_0) 0))": "not a linear term",
    "(assert (<= (/ Y_0 0) 0))": "not a linear term",
    "(assert (<= Y_0 nan))": "nan is not declared",
    "(assert (<= Y_0 1e99999))": "no number",
    "(assert (<= Y_0 0x10))": "unexpected",
    "(assert (<= Y_0 1 2))": "not understood",
    "(assert (=> (<= Y_0 1) (<= Y_1 1)))": "not understood",
    "(assert (and))": "not understood",
    "(assert)": "not understood",
    "(assert (<= Y_0 1)": "never closed",
    "(assert (<= Y_0 1)))": "outside parentheses",
    "assert": "outside parentheses",
    "(include other.vnnlib)": "not understood|unexpected",
    "(declare-const Z_0 Real)": "declares 'Z_0'",
    "(declare-const X_0 Real)": "declares 'X_0'",
    "(declare-const X_7 Real)": "must all be declared",
    "(declare-const Y_0 Int)": "not understood",
    "(push 1)": "not understood",
    "(vnnlib-version <3.0>)": "version",
    "(" * 10_000: "nested",
    "(assert " + "(not " * 500 + "(<= Y_0 1)" + ")" * 501: "nested",
    "".join(f"(assert (or (<= Y_0 {i}) (<= Y_1 {i})))" for i in range(40)): "alternatives",
}


@pytest.mark.parametrize("extra", REFUSED, ids=lambda text: text[:40])
def test_what_is_not_understood_is_refused(extra):
    with pytest.raises(ValueError, match=REFUSED[extra]):
        parse_property(DECLARED + BOX + extra)


@pytest.mark.parametrize("text", ["", "; nothing", DECLARED, DECLARED + "(assert (<= X_0 1))", "(assert (<= Y_0 1))"])
def test_without_a_box_there_is_no_property(text):
    with pytest.raises(ValueError, match=r"declared|no lower end|no upper end"):
        parse_property(text)


@pytest.mark.parametrize(
    "network",
    [
        "(declare-network n (declare-input A Real [2]) (declare-input B Real [2]) (declare-output C Real [1]))",
        "(declare-network n (declare-input A Real [2]))",
        "(declare-network n (declare-input A Real [0]) (declare-output C Real [1]))",
        "(declare-network n (declare-input A Int8 [2]) (declare-output C Real [1]))",
        '(declare-network n (declare-input A Real [2]) (declare-hidden H Real [2] "h") (declare-output C Real [1]))',
        "(declare-network n (equal-to m) (declare-input A Real [2]) (declare-output C Real [1]))",
        "(declare-network n (declare-input A Real [99999,99999]) (declare-output C Real [1]))",
        "(declare-network n (declare-input A Real [2]) (declare-output C Real [1]))(assert (<= A[2] 0))",
        "(declare-network n (declare-input A Real [2]) (declare-output C Real [1]))(assert (<= A[0,0] 0))",
    ],
)
def test_networks_that_are_not_one_to_one_are_refused(network):
    with pytest.raises(ValueError, match=r"line|2\*\*24"):
        parse_property(f"(vnnlib-version <2.0>)\n{network}")


def test_files_plain_and_packed(tmp_path):
    text = DECLARED + BOX + "(assert (<= Y_0 0))"
    plain, packed = tmp_path / "a.vnnlib", tmp_path / "a.vnnlib.gz"
    plain.write_text(text)
    packed.write_bytes(gzip.compress(text.encode()))
    assert ox.read_property(plain) == ox.read_property(packed) == parse_property(text)
    packed.write_bytes(gzip.compress(text.encode())[:-20])
    with pytest.raises(ValueError, match="gzip"):
        ox.read_property(packed)
    plain.write_bytes(b"\xff\xfe(")
    with pytest.raises(ValueError, match="VNN-LIB text"):
        ox.read_property(plain)
    with pytest.raises(FileNotFoundError):
        ox.read_property(tmp_path / "missing.vnnlib")


def test_properties_by_hand_are_checked():
    good = Case((F(0),), (F(1),), ((Halfspace(((0, F(1)),), F(0)),),))
    assert Property(1, 1, (good,)).cases == (good,)
    with pytest.raises(ValueError, match="has 1 inputs, the property 2"):
        Property(2, 1, (good,))
    with pytest.raises(ValueError, match="exceeds"):
        Property(1, 1, (Case((F(1),), (F(0),), ()),))
    with pytest.raises(ValueError, match="names output 0 of 0"):
        Property(1, 0, (good,))


@pytest.mark.data
def test_files_of_the_competition_are_read(data_dir):
    paths = sorted((data_dir / "vnncomp2021").glob("*/*.vnnlib.gz"))
    assert len(paths) == 118
    for path in [p for p in paths if p.parent.name == "acasxu"] + paths[10::50]:
        found = ox.read_property(path)
        text = gzip.decompress(path.read_bytes()).decode()
        # A property of classes is one box, whose ends are the file's own words.
        assert found.inputs == text.count("(declare-const X_")
        assert found.outputs == text.count("(declare-const Y_")
        assert len(found.cases) == (2 if path.name == "prop_6.vnnlib.gz" else 1)
        for line in text.splitlines():
            match = re.fullmatch(r"\(assert \((<=|>=) X_(\d+) (\S+)\)\)", line.strip())
            if match and len(found.cases) == 1:
                end = found.cases[0].upper if match[1] == "<=" else found.cases[0].lower
                assert end[int(match[2])] == F(match[3])

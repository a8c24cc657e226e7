"""Every rule of an ONNX op against the onnx package's reference evaluator, a batch where the file has one example."""

import numpy as np
import pytest
import torch

import optrelax as ox
from optrelax.networks.onnx_files import read_onnx
from tests.onnx_models import model, node, reference, stored

R = np.random.default_rng(0)


def r(*shape):
    return R.standard_normal(shape)


def i(*numbers):
    return np.array(numbers, dtype=np.int64)


IMAGE = [1, 4, 7, 6]
POSITIVE = {"mean": r(4), "var": np.abs(r(4)) + 0.5, "scale": r(4), "bias": r(4)}

# name: nodes, input shape, constants, opset
CASES = {
    **{
        op: ([node(op, ["x"])], [1, 5], {}, 17)
        for op in ("Relu", "Sigmoid", "Tanh", "Exp", "Abs", "Neg", "Erf", "Softplus", "Identity", "Selu", "HardSwish")
    },
    **{op: ([node(op, ["x"])], [1, 5], {}, 17) for op in ("Sinh", "Atan")},
    **{
        f"{op} {axes} {keep}": ([node(op, ["x"], axes=axes, keepdims=keep)], IMAGE, {}, 13 if op == "ReduceL1" else 17)
        for op in ("ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceLogSumExp")
        for axes, keep in (([1], 1), ([2, 3], 0))
    },
    "softplus as PyTorch writes it": (
        [
            node("Softplus", ["x"], ["s"]),
            node("Greater", ["x", "threshold"], ["g"]),
            node("Where", ["g", "x", "s"], ["p"]),
            node("Neg", ["p"]),
        ],
        [1, 5],
        {"threshold": np.float64(20.0)},
        17,
    ),
    "log of a sum": ([node("Exp", ["x"], ["e"]), node("ReduceLogSum", ["e"], axes=[1])], [1, 5], {}, 17),
    **{
        f"running sum {e} {v}": (
            [node("CumSum", ["x", "axis"], exclusive=e, reverse=v)],
            [1, 3, 4],
            {"axis": np.int64(-1)},
            17,
        )
        for e, v in ((0, 0), (1, 0), (0, 1), (1, 1))
    },
    "products of values": (
        [node("Transpose", ["x"], ["t"], perm=[0, 2, 1]), node("MatMul", ["x", "t"])],
        [1, 3, 4],
        {},
        17,
    ),
    "layer norm": (
        [node("LayerNormalization", ["x", "scale", "bias"], epsilon=0.01)],
        [1, 3, 4],
        {"scale": r(4), "bias": r(4)},
        17,
    ),
    "layer norm of images": ([node("LayerNormalization", ["x", "scale"], axis=1)], IMAGE, {"scale": r(4, 7, 6)}, 17),
    "rms norm": ([node("RMSNormalization", ["x", "scale"], axis=-1)], [1, 3, 4], {"scale": r(4)}, 23),
    "instance norm": (
        [node("InstanceNormalization", ["x", "scale", "bias"])],
        IMAGE,
        {"scale": r(4), "bias": r(4)},
        17,
    ),
    "group norm": (
        [node("GroupNormalization", ["x", "scale", "bias"], num_groups=2)],
        IMAGE,
        {"scale": r(4), "bias": r(4)},
        21,
    ),
    **{
        f"depth to space {mode}": ([node("DepthToSpace", ["x"], blocksize=2, mode=mode)], [1, 8, 3, 2], {}, 17)
        for mode in ("DCR", "CRD")
    },
    "space to depth": ([node("SpaceToDepth", ["x"], blocksize=2)], [1, 3, 4, 6], {}, 17),
    **{
        f"{op}-opset{opset}": ([node(op, ["x", "c"])], [1, 3, 4], {"c": r(*shape)}, opset)
        for op in ("Add", "Sub", "Mul", "Div")
        for opset, shape in ((8, (1, 3, 4)), (17, (4,)), (17, (1, 3, 1)), (17, ()))
    },
    "constant - x": ([node("Sub", ["c", "x"])], [1, 3, 4], {"c": r(3, 4)}, 17),
    "x + x": ([node("Add", ["x", "x"])], [1, 3, 4], {}, 17),
    "power": ([node("Pow", ["x", "c"])], [1, 4], {"c": np.float64(2.0)}, 17),
    "sum of three": ([node("Sum", ["x", "c", "x"])], [1, 4], {"c": r(4)}, 17),
    "max of two": ([node("Max", ["x", "c"])], [1, 4], {"c": r(4)}, 17),
    "min of three": ([node("Min", ["x", "c", "d"])], [1, 4], {"c": r(4), "d": r(1, 4)}, 17),
    "leaky": ([node("LeakyRelu", ["x"], alpha=0.3)], [1, 4], {}, 17),
    "elu": ([node("Elu", ["x"], alpha=0.3)], [1, 4], {}, 17),
    "hard sigmoid": ([node("HardSigmoid", ["x"], alpha=0.3)], [1, 4], {}, 17),
    "thresholded": ([node("ThresholdedRelu", ["x"], alpha=0.3)], [1, 4], {}, 17),
    "prelu one": ([node("PRelu", ["x", "a"])], IMAGE, {"a": np.array([0.2])}, 17),
    "prelu a channel": ([node("PRelu", ["x", "a"])], IMAGE, {"a": r(4, 1, 1)}, 17),
    "clip attributes": ([node("Clip", ["x"], min=-0.5, max=0.5)], [1, 4], {}, 9),
    "clip below": ([node("Clip", ["x", "low"])], [1, 4], {"low": np.float64(0.1)}, 17),
    "clip above": ([node("Clip", ["x", "", "high"])], [1, 4], {"high": np.float64(0.1)}, 17),
    "softmax": ([node("Softmax", ["x"])], [1, 3, 4], {}, 17),
    "gemm": ([node("Gemm", ["x", "w", "b"])], [1, 5], {"w": r(5, 3), "b": r(3)}, 17),
    "gemm transposed": ([node("Gemm", ["x", "w", "b"], transB=1)], [1, 5], {"w": r(3, 5), "b": r(1, 3)}, 17),
    "gemm scaled": (
        [node("Gemm", ["x", "w", "b"], transB=1, alpha=0.3, beta=0.7)],
        [1, 5],
        {"w": r(3, 5), "b": r(3)},
        17,
    ),
    "gemm scalar bias": ([node("Gemm", ["x", "w", "b"])], [1, 5], {"w": r(5, 3), "b": r(1)}, 17),
    "gemm without bias": ([node("Gemm", ["x", "w"], alpha=2.0)], [1, 5], {"w": r(5, 3)}, 17),
    "matmul": ([node("MatMul", ["x", "w"])], [1, 5], {"w": r(5, 3)}, 17),
    "matmul of rows": ([node("MatMul", ["x", "w"])], [1, 2, 5], {"w": r(5, 3)}, 17),
    "matmul from the left": ([node("MatMul", ["w", "x"])], [1, 5, 2], {"w": r(3, 5)}, 17),
    "matmul batched": ([node("MatMul", ["x", "w"])], [1, 2, 4, 5], {"w": r(1, 2, 5, 3)}, 17),
    "batch norm": (
        [node("BatchNormalization", ["x", "scale", "bias", "mean", "var"], epsilon=0.01)],
        IMAGE,
        POSITIVE,
        15,
    ),
    "conv 1d": ([node("Conv", ["x", "w", "b"], pads=[1, 1])], [1, 4, 9], {"w": r(3, 4, 3), "b": r(3)}, 17),
    "conv 2d": (
        [node("Conv", ["x", "w"], strides=[2, 1], pads=[1, 2, 1, 2], dilations=[1, 2], group=2)],
        IMAGE,
        {"w": r(6, 2, 3, 3)},
        17,
    ),
    "conv 3d": ([node("Conv", ["x", "w"])], [1, 2, 4, 5, 4], {"w": r(3, 2, 2, 3, 2)}, 17),
    "conv unequal pads": ([node("Conv", ["x", "w"], pads=[1, 0, 2, 3])], IMAGE, {"w": r(3, 4, 3, 3)}, 17),
    "conv same upper": (
        [node("Conv", ["x", "w"], auto_pad="SAME_UPPER", strides=[2, 3])],
        IMAGE,
        {"w": r(3, 4, 4, 4)},
        17,
    ),
    "conv same lower": ([node("Conv", ["x", "w"], auto_pad="SAME_LOWER")], IMAGE, {"w": r(3, 4, 2, 4)}, 17),
    "conv valid": ([node("Conv", ["x", "w"], auto_pad="VALID")], IMAGE, {"w": r(3, 4, 2, 3)}, 17),
    "transposed conv": (
        [node("ConvTranspose", ["x", "w", "b"], strides=[2, 2], pads=[1, 1, 1, 1], output_padding=[1, 0])],
        IMAGE,
        {"w": r(4, 3, 3, 3), "b": r(3)},
        17,
    ),
    "transposed conv cut": (
        [node("ConvTranspose", ["x", "w"], strides=[2, 3], pads=[0, 1, 2, 0])],
        IMAGE,
        {"w": r(4, 3, 3, 3)},
        17,
    ),
    "transposed conv 1d": ([node("ConvTranspose", ["x", "w"])], [1, 4, 5], {"w": r(4, 2, 3)}, 17),
    "max pool": ([node("MaxPool", ["x"], kernel_shape=[2, 3], strides=[2, 2], pads=[1, 1, 1, 1])], IMAGE, {}, 17),
    "max pool dilated": ([node("MaxPool", ["x"], kernel_shape=[2, 2], dilations=[2, 2])], IMAGE, {}, 17),
    "max pool ceil": ([node("MaxPool", ["x"], kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1)], IMAGE, {}, 17),
    "max pool same": (
        [node("MaxPool", ["x"], kernel_shape=[2, 2], strides=[2, 2], auto_pad="SAME_UPPER")],
        IMAGE,
        {},
        17,
    ),
    "max pool behind": (
        [node("MaxPool", ["x"], kernel_shape=[3, 3], strides=[2, 2], pads=[0, 0, 1, 1])],
        IMAGE,
        {},
        17,
    ),
    "max pool 1d": ([node("MaxPool", ["x"], kernel_shape=[3], strides=[2])], [1, 4, 9], {}, 17),
    "average pool": (
        [node("AveragePool", ["x"], kernel_shape=[2, 3], strides=[2, 2], pads=[1, 1, 1, 1])],
        IMAGE,
        {},
        17,
    ),
    "average pool counted": (
        [node("AveragePool", ["x"], kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1)],
        IMAGE,
        {},
        17,
    ),
    "average pool unequal": ([node("AveragePool", ["x"], kernel_shape=[3, 3], pads=[0, 1, 1, 0])], IMAGE, {}, 17),
    "average pool unequal counted": (
        [node("AveragePool", ["x"], kernel_shape=[3, 3], pads=[0, 1, 1, 0], count_include_pad=1)],
        IMAGE,
        {},
        17,
    ),
    "global average": ([node("GlobalAveragePool", ["x"])], IMAGE, {}, 17),
    "global max": ([node("GlobalMaxPool", ["x"])], IMAGE, {}, 17),
    "mean by attribute": ([node("ReduceMean", ["x"], axes=[-1], keepdims=0)], [1, 3, 4], {}, 13),
    "mean by input": ([node("ReduceMean", ["x", "a"])], [1, 3, 4], {"a": i(1, 2)}, 18),
    "sum by input": ([node("ReduceSum", ["x", "a"], keepdims=0)], [1, 3, 4], {"a": i(-2)}, 13),
    "greatest": ([node("ReduceMax", ["x"], axes=[2])], [1, 3, 4], {}, 13),
    "flatten": ([node("Flatten", ["x"])], IMAGE, {}, 17),
    "flatten before the channels": ([node("Flatten", ["x"], axis=-3)], IMAGE, {}, 17),
    "reshape fixed": ([node("Reshape", ["x", "s"])], IMAGE, {"s": i(1, 168)}, 17),
    "reshape open": ([node("Reshape", ["x", "s"])], IMAGE, {"s": i(-1, 24, 7)}, 17),
    "reshape kept": ([node("Reshape", ["x", "s"])], IMAGE, {"s": i(0, 0, -1)}, 17),
    "squeeze by attribute": ([node("Squeeze", ["x"], axes=[2])], [1, 3, 1, 4], {}, 11),
    "squeeze by input": ([node("Squeeze", ["x", "a"])], [1, 3, 1, 4], {"a": i(-2)}, 13),
    "unsqueeze by attribute": ([node("Unsqueeze", ["x"], axes=[1, 3])], [1, 3, 4], {}, 11),
    "unsqueeze by input": ([node("Unsqueeze", ["x", "a"])], [1, 3, 4], {"a": i(-1)}, 13),
    "transpose": ([node("Transpose", ["x"], perm=[0, 2, 3, 1])], IMAGE, {}, 17),
    "concat": ([node("Concat", ["x", "c", "x"], axis=-1)], [1, 3, 4], {"c": r(1, 3, 2)}, 17),
    "slice by attributes": ([node("Slice", ["x"], starts=[1, -3], ends=[99, -1], axes=[2, 3])], IMAGE, {}, 9),
    "slice by inputs": (
        [node("Slice", ["x", "s", "e", "a", "t"])],
        IMAGE,
        {"s": i(0, -1), "e": i(3, -99), "a": i(1, 2), "t": i(2, -2)},
        17,
    ),
    "gather one": ([node("Gather", ["x", "g"], axis=2)], IMAGE, {"g": np.int64(-1)}, 17),
    "gather several": ([node("Gather", ["x", "g"], axis=1)], IMAGE, {"g": i(2, 0, -1, 2)}, 17),
    "gather a table": ([node("Gather", ["x", "g"], axis=3)], IMAGE, {"g": np.array([[0, 1], [5, 2]])}, 17),
    "split and join": (
        [node("Split", ["x"], ["a", "b"], axis=1, split=[1, 3]), node("Concat", ["b", "a"], axis=1)],
        IMAGE,
        {},
        11,
    ),
    "split by input": (
        [node("Split", ["x", "s"], ["a", "y"], axis=2)],
        IMAGE,
        {"s": i(3, 4)},
        13,
    ),
    "pad by attribute": ([node("Pad", ["x"], pads=[0, 0, 1, 2, 0, 1, 0, 1], value=0.5)], IMAGE, {}, 9),
    "pad by input": (
        [node("Pad", ["x", "p", "v"])],
        IMAGE,
        {"p": i(0, 0, 1, 2, 0, 0, 0, 1), "v": np.float64(2.0)},
        17,
    ),
    "pad axes": ([node("Pad", ["x", "p", "", "a"])], IMAGE, {"p": i(1, 2), "a": i(-1)}, 18),
    "expand": ([node("Expand", ["x", "s"])], [1, 3, 1], {"s": i(1, 3, 4)}, 17),
    "tile": ([node("Tile", ["x", "s"])], [1, 3, 2], {"s": i(1, 2, 3)}, 17),
    "dropout": ([node("Dropout", ["x"])], [1, 4], {}, 13),
    "cast": ([node("Cast", ["x"], to=1)], [1, 4], {}, 13),
    "upsample": ([node("Upsample", ["x", "s"])], IMAGE, {"s": np.array([1.0, 1.0, 2.0, 3.0])}, 9),
    "resize asymmetric": (
        [node("Resize", ["x", "", "s"], coordinate_transformation_mode="asymmetric", nearest_mode="floor")],
        IMAGE,
        {"s": np.array([1.0, 1.0, 2.0, 3.0])},
        13,
    ),
    "resize half pixels": ([node("Resize", ["x", "", "s"])], IMAGE, {"s": np.array([1.0, 1.0, 2.0, 2.0])}, 13),
    "resize to a size": ([node("Resize", ["x", "", "", "s"])], IMAGE, {"s": i(1, 4, 5, 9)}, 13),
    "resize linear": ([node("Resize", ["x", "", "s"], mode="linear")], IMAGE, {"s": np.array([1.0, 1.0, 2, 2])}, 13),
    "shape arithmetic": (
        [
            node("Shape", ["x"], ["s"]),
            node("Gather", ["s", "zero"], ["n"], axis=0),
            node("Unsqueeze", ["n", "axes"], ["n1"]),
            node("Constant", [], ["rest"], value=i(-1)),
            node("Concat", ["n1", "rest"], ["to"], axis=0),
            node("Reshape", ["x", "to"]),
        ],
        ["N", 4, 7, 6],
        {"zero": np.int64(0), "axes": i(0)},
        13,
    ),
    "folded weights": (
        [
            node("Transpose", ["w"], ["wt"], perm=[1, 0]),
            node("Mul", ["wt", "two"], ["w2"]),
            node("MatMul", ["x", "w2"]),
        ],
        [1, 5],
        {"w": r(3, 5), "two": np.float64(2.0)},
        17,
    ),
    "constant of a shape": (
        [node("ConstantOfShape", ["s"], ["c"], value=np.array([0.5], np.float32)), node("Add", ["x", "c"])],
        [1, 4],
        {"s": i(1, 4)},
        17,
    ),
    "constant node": (
        [node("Constant", [], ["c"], value=r(4).astype(np.float32)), node("Add", ["x", "c"])],
        [1, 4],
        {},
        17,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_rule_equals_the_reference_evaluator(name, tmp_path):
    nodes, shape, constants, opset = CASES[name]
    made = model(nodes, shape, constants, opset)
    module = read_onnx(stored(made, tmp_path))
    x = torch.randn(3, *shape[1:], generator=torch.Generator().manual_seed(1))
    want = reference(made, x)
    found = module(x)
    assert found.dtype == want.dtype
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)


def test_every_rule_has_a_case():
    from optrelax.networks.onnx_nodes import RULES

    used = {n.op_type for nodes, *_ in CASES.values() for n in nodes}
    # The same few words of torch as those above, or seen through their results alone.
    alike = {"Log", "Sqrt", "Sin", "Cos", "Softsign", "Reciprocal", "Sign", "Floor", "Ceil", "Mish", "Celu", "Gelu"}
    alike |= {"LogSoftmax", "Mean", "ReduceMin", "Range"}
    assert set(RULES) - used == alike


REFUSED = {
    "batch reshaped away": ([node("Reshape", ["x", "s"])], [1, 4, 3], {"s": i(4, 3)}, "must stay the first"),
    "batch reshaped flat": ([node("Reshape", ["x", "s"])], [1, 4, 3], {"s": i(-1)}, "must stay the first"),
    "batch squeezed": ([node("Squeeze", ["x", "s"])], [1, 4, 3], {"s": i(0)}, "batch dimension"),
    "batch summed": ([node("ReduceSum", ["x", "s"])], [1, 4, 3], {"s": i(0)}, "batch dimension"),
    "all summed": ([node("ReduceSum", ["x"])], [1, 4, 3], {}, "batch dimension"),
    "batch turned": ([node("Transpose", ["x"])], [1, 4, 3], {}, "batch dimension"),
    "batch joined": ([node("Concat", ["x", "x"], axis=0)], [1, 4, 3], {}, "batch dimension"),
    "batch picked": ([node("Gather", ["x", "g"])], [1, 4, 3], {"g": np.int64(0)}, "batch dimension"),
    "batch padded": ([node("Pad", ["x", "s"])], [1, 4], {"s": i(1, 0, 0, 0)}, "batch dimension"),
    "batch of a constant": ([node("Add", ["x", "c"])], [1, 4], {"c": r(3, 4)}, "batch dimension"),
    "products": ([node("Flatten", ["x"], ["f"]), node("Gemm", ["f", "f"], transB=1)], [1, 4], {}, "products"),
    "matrix times batch": ([node("MatMul", ["w", "x"])], [1, 4], {"w": r(3, 1)}, "mixes examples"),
    "fixed batch": ([node("Relu", ["x"])], [8, 4], {}, "must be the batch"),
    "no batch": ([node("Relu", ["x"])], [4], {}, "must be the batch"),
    "open shape": ([node("Relu", ["x"])], [1, "n"], {}, "must be fixed"),
    "half precision": ([node("Add", ["x", "c"])], [1, 4], {"c": np.ones(4, np.float16).view(np.float16)}, "FLOAT16"),
    "not a number": ([node("Add", ["x", "c"])], [1, 4], {"c": np.full(4, np.nan)}, "NaN"),
    "training": (
        [node("BatchNormalization", ["x", "scale", "bias", "mean", "var"], training_mode=1)],
        IMAGE,
        POSITIVE,
        "training mode",
    ),
    "numbers that do not fit": ([node("MatMul", ["x", "w"])], [1, 4], {"w": r(5, 3)}, "shapes|size|match"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_made_free_of_the_batch_is_refused(name, tmp_path):
    nodes, shape, constants, reason = REFUSED[name]
    made = model(nodes, shape, constants, 15 if name == "training" else 13)
    if name == "half precision":
        made = model(nodes, shape, {}, 13)
        from onnx import numpy_helper

        made.graph.initializer.append(numpy_helper.from_array(np.ones(4, np.float16), "c"))
    with pytest.raises(ValueError, match=reason):
        read_onnx(stored(made, tmp_path))


def test_unsupported_ops_are_all_listed_with_their_nodes(tmp_path):
    nodes = [
        node("Hardmax", ["x"], ["a"]),
        node("Relu", ["a"], ["b"]),
        node("LpNormalization", ["b"], ["c"]),
        node("ArgMax", ["x"], ["d"]),
        node("Relu", ["c"]),
    ]
    with pytest.raises(ox.UnsupportedOpError) as error:
        read_onnx(stored(model(nodes, [1, 4]), tmp_path))
    assert {(p.where, p.op) for p in error.value.problems} == {
        ("my_Hardmax_a", "Hardmax"),
        ("my_LpNormalization_c", "LpNormalization"),
        ("my_ArgMax_d", "ArgMax"),
    }
    assert "Relu" in str(error.value).partition("Supported:")[2]

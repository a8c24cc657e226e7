"""ONNX files as people have them: whole networks, and files that are not to be trusted."""

import resource

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import optrelax as ox
from optrelax.networks.checkpoint_files import read_network
from optrelax.networks.onnx_files import read_onnx
from tests.onnx_models import model, node, reference, stored


@pytest.mark.data
@pytest.mark.parametrize("folder", ["acasxu", "mnistfc", "oval21", "cifar10_resnet"])
def test_networks_of_the_competition_equal_the_reference_evaluator(folder, data_dir):
    paths = sorted((data_dir / "vnncomp2021" / folder).glob("*.onnx"))
    assert paths
    generator = torch.Generator().manual_seed(0)
    for number, path in enumerate(paths):
        whole = number % 15 == 0
        net = ox.load(path) if whole else read_onnx(path)
        x = torch.randn(2, *net.input_shape, generator=generator)
        want = reference(str(path), x)
        torch.testing.assert_close(net(x), want, rtol=1e-5, atol=1e-5 * max(1.0, float(want.abs().max())))
        if whole:  # in float64 it is the function of the file's weights
            found = net(x.double()).float()
            torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5 * max(1.0, float(want.abs().max())))


def small(tmp_path):
    """Two layers: [1, 2, 3] -> [1, 4]."""
    r = np.random.default_rng(0)
    nodes = [
        node("Flatten", ["x"], ["f"]),
        node("Gemm", ["f", "fc.0.weight", "fc.0.bias"], ["h"], transB=1),
        node("Relu", ["h"], ["a"]),
        node("Gemm", ["a", "fc.2.weight", "fc.2.bias"], transB=1),
    ]
    weights = {"fc.0.weight": r.normal(size=(5, 6)), "fc.0.bias": r.normal(size=5)}
    weights |= {"fc.2.weight": r.normal(size=(4, 5)), "fc.2.bias": r.normal(size=4)}
    made = model(nodes, [1, 2, 3], weights)
    return made, stored(made, tmp_path)


def test_loaded_network_is_bounded_and_trained(tmp_path):
    made, path = small(tmp_path)
    net = ox.load(path)
    x = torch.rand(3, 2, 3)
    torch.testing.assert_close(net(x), reference(made, x))
    found = ox.bounds(net, ox.LinfBall(x, eps=0.1), "crown")
    for _ in range(20):
        point = reference(made, x + 0.1 * (2 * torch.rand_like(x) - 1))
        assert bool(((found.lower - 1e-5 <= point) & (point <= found.upper + 1e-5)).all())
    found.lower.sum().backward()
    names = dict(net.module.named_parameters())
    assert len(names) == 4
    assert all("fc_" in name and p.grad is not None for name, p in names.items())


def test_checkpoint_takes_the_shape_of_the_data(tmp_path):
    made, path = small(tmp_path)
    x = torch.rand(3, 1, 6)
    net = read_network(path, input_shape=(1, 6))
    torch.testing.assert_close(net(x), reference(made, x.reshape(3, 2, 3)))
    with pytest.raises(ValueError, match=r"takes inputs \[2, 3\]"):
        read_network(path, input_shape=(1, 28, 28))
    with pytest.raises(ValueError, match="leave --model out"):
        read_network(path, model="conv", input_shape=(1, 6))


def test_shared_weights_and_names_that_no_attribute_can_have(tmp_path):
    w = {"": None, "a/b.c:0": np.eye(3), "forward": np.full(3, 0.5)}
    nodes = [
        node("MatMul", ["x", "a/b.c:0"], ["h"]),
        node("Add", ["h", "forward"], ["training"]),
        node("MatMul", ["training", "a/b.c:0"]),
    ]
    for n, name in zip(nodes, ("forward", "forward", "steps"), strict=True):
        n.name = name
    made = model(nodes, [1, 3], {k: v for k, v in w.items() if k})
    x = torch.rand(2, 3)
    torch.testing.assert_close(ox.load(stored(made, tmp_path))(x), reference(made, x))


def huge_declared():
    return model([node("ConstantOfShape", ["s"], ["c"]), node("Add", ["x", "c"])], [1, 4], {"s": np.array([1, 10**12])})


def huge_input():
    return model([node("Relu", ["x"])], [1, 10**12])


def huge_expanded():
    return model([node("Expand", ["x", "s"])], [1, 1], {"s": np.array([1, 10**12])})


def huge_tiled():
    return model([node("Tile", ["x", "s"])], [1, 10], {"s": np.array([1, 10**11])})


def huge_padded():
    return model([node("Pad", ["x", "s"])], [1, 10], {"s": np.array([0, 0, 0, 10**11])})


def huge_padding_of_a_convolution():
    made = [node("Conv", ["x", "w"], pads=[10**6] * 4, strides=[10**6, 10**6])]
    return model(made, [1, 1, 4, 4], {"w": np.ones((1, 1, 2, 2))})


def huge_range():
    nodes = [node("Range", ["a", "b", "s"], ["c"]), node("Add", ["x", "c"])]
    return model(nodes, [1, 4], {"a": np.int64(0), "b": np.int64(10**12), "s": np.int64(1)})


def huge_resized():
    return model([node("Resize", ["x", "", "s"])], [1, 1, 4, 4], {"s": np.array([1.0, 1.0, 1e6, 1e6])}, 13)


def huge_outer_product():
    nodes = [node("Mul", ["a", "b"], ["c"]), node("Mul", ["c", "d"], ["e"]), node("ReduceSum", ["e"], ["s"])]
    side = np.ones(10**5)
    constants = {"a": side[:, None], "b": side, "d": np.float64(1.0)}
    return model([*nodes, node("Add", ["x", "s"])], [1, 4], constants)


def declared_by_an_initializer():
    made = model([node("Add", ["x", "c"])], [1, 4])
    made.graph.initializer.append(TensorProto(name="c", data_type=TensorProto.FLOAT, dims=[10**6, 10**6]))
    return made


def too_short():
    made = model([node("Add", ["x", "c"])], [1, 4], {"c": np.ones(4)})
    made.graph.initializer[0].raw_data = made.graph.initializer[0].raw_data[:-4]
    return made


def outside():
    made = model([node("Add", ["x", "c"])], [1, 4], {"c": np.ones(4)})
    tensor = made.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../../../etc/passwd")
    return made


def outside_in_a_constant():
    tensor = numpy_helper.from_array(np.ones(4, np.float32), "c")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")
    constant = helper.make_node("Constant", [], ["c"])
    constant.attribute.append(helper.make_attribute("value", tensor))
    return model([constant, node("Add", ["x", "c"])], [1, 4])


def cycle():
    return model([node("Add", ["x", "b"], ["a"]), node("Relu", ["a"], ["b"]), node("Relu", ["b"])], [1, 4])


def undefined():
    return model([node("Add", ["x", "nowhere"])], [1, 4])


def given_twice():
    return model([node("Relu", ["x"], ["a"]), node("Neg", ["x"], ["a"]), node("Relu", ["a"])], [1, 4])


def without_output():
    return model([node("Relu", ["x"])], [1, 4], output="z")


def of_a_later_opset():
    return model([node("Relu", ["x"])], [1, 4], opset=999)


def of_another_domain():
    made = model([helper.make_node("Relu", ["x"], ["y"], domain="evil")], [1, 4])
    made.opset_import.append(helper.make_opsetid("evil", 1))
    return made


def with_a_subgraph():
    inner = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["z"])], "g", [], [helper.make_tensor_value_info("z", TensorProto.FLOAT, ())]
    )
    return model(
        [helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner)], [1, 4], {"c": np.array(True)}
    )


def wrong_weight():
    return model([node("Conv", ["x", "w"])], [1, 3, 8, 8], {"w": np.ones((4, 5, 3, 3))})


def kernel_too_large():
    return model([node("Conv", ["x", "w"])], [1, 3, 4, 4], {"w": np.ones((4, 3, 9, 9))})


def infinite_weight():
    return model([node("Add", ["x", "c"])], [1, 4], {"c": np.full(4, np.inf)})


def two_inputs():
    made = model([node("Add", ["x", "z"])], [1, 4])
    made.graph.input.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, [1, 4]))
    return made


def without_nodes():
    return model([], [1, 4], output="x")


def blocks_of_nothing():
    return model([node("DepthToSpace", ["x"], blocksize=0)], [1, 4, 2, 2])


def no_space_in_blocks():
    return model([node("SpaceToDepth", ["x"], blocksize=0)], [1, 4, 2, 2])


def no_groups():
    nodes = [node("GroupNormalization", ["x", "c", "c"], num_groups=0)]
    return model(nodes, [1, 4, 2, 2], {"c": np.ones(4)}, opset=21)


def of_strings():
    made = model([node("Add", ["x", "c"])], [1, 4])
    made.graph.initializer.append(helper.make_tensor("c", TensorProto.STRING, [1], [b"rm -rf"]))
    return made


BAD = [
    *(huge_declared, huge_input, huge_expanded, huge_tiled, huge_padded, huge_padding_of_a_convolution, huge_range),
    *(huge_resized, huge_outer_product, declared_by_an_initializer, too_short, outside, outside_in_a_constant, cycle),
    *(undefined, given_twice, without_output, of_a_later_opset, of_another_domain, with_a_subgraph, wrong_weight),
    *(kernel_too_large, infinite_weight, two_inputs, without_nodes, of_strings),
    *(blocks_of_nothing, no_space_in_blocks, no_groups),
]


@pytest.mark.parametrize("make", BAD, ids=lambda make: make.__name__)
def test_a_bad_file_is_refused_without_its_memory(make, tmp_path):
    path = stored(make(), tmp_path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r".") as error:
        read_onnx(path)
    assert not isinstance(error.value, UnicodeError)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # KiB


def beside(tmp_path):
    """The same network with its weights in net.onnx.data, as `torch.onnx.export` writes it."""
    made, path = small(tmp_path)
    onnx.save(made, path, save_as_external_data=True, location="net.onnx.data", size_threshold=0)
    assert (tmp_path / "net.onnx.data").stat().st_size >= 4 * (5 * 6 + 5 + 4 * 5 + 4)
    return small(tmp_path / "whole")[0], path, onnx.load(path, load_external_data=False)


def test_weights_beside_the_file_are_read(tmp_path):
    (tmp_path / "whole").mkdir()
    made, path, _ = beside(tmp_path)
    x = torch.rand(3, 2, 3)
    torch.testing.assert_close(ox.load(path)(x), reference(made, x))


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ({"location": "../net.onnx.data"}, "no file of the same folder"),
        ({"location": ".."}, "no file of the same folder"),
        ({"location": "other.data"}, "put the file there"),
        ({"location": "link.data"}, "is a link"),
        ({"location": "short.data"}, "too short"),
        ({"length": "8"}, "8 bytes, its shape"),
        ({"offset": "-4"}, "net.onnx"),
        ({"offset": "200000"}, "net.onnx"),
        ({"offset": "x"}, "net.onnx"),
    ],
)
def test_weights_from_elsewhere_are_refused(place, message, tmp_path):
    (tmp_path / "whole").mkdir()
    (tmp_path / "sub").mkdir()
    _, _, made = beside(tmp_path)
    (tmp_path / "link.data").symlink_to(tmp_path / "net.onnx.data")
    (tmp_path / "short.data").write_bytes(b"1234")
    for entry in made.graph.initializer[0].external_data:
        entry.value = place.get(entry.key, entry.value)
    target = tmp_path / ("sub/net.onnx" if place.get("location") == "../net.onnx.data" else "net.onnx")
    target.write_bytes(made.SerializeToString())
    with pytest.raises(ValueError, match=message):
        read_onnx(target)


def test_no_prefix_and_no_flipped_byte_of_a_file_escapes(tmp_path):
    _, path = small(tmp_path)
    content = path.read_bytes()
    generator = np.random.default_rng(0)
    other = tmp_path / "other.onnx"
    for n in range(0, len(content), 7):
        other.write_bytes(content[:n])
        with pytest.raises(ValueError, match=r"other.onnx|cannot be bounded"):
            read_onnx(other)
    for _ in range(300):
        flipped = bytearray(content)
        flipped[generator.integers(len(content))] ^= 1 << generator.integers(8)
        other.write_bytes(bytes(flipped))
        try:
            module = read_onnx(other)
        except ValueError:
            continue
        # A flipped weight, or a name: still a network of that shape.
        assert module(torch.zeros(2, *module.input_shape)).shape[0] == 2


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x04\x95pickle", b"\xff" * 100, b"optrelax"])
def test_other_files_are_none(content, tmp_path):
    path = tmp_path / "net.onnx"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"net\.onnx"):
        ox.load(path)
    with pytest.raises(FileNotFoundError, match=r"missing\.onnx"):
        ox.load(tmp_path / "missing.onnx")


def test_missing_package_says_what_to_install(monkeypatch, tmp_path):
    _, path = small(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    with pytest.raises(RuntimeError, match=r"optrelax\[onnx\]"):
        ox.load(path)
    assert onnx.__name__ == "onnx"

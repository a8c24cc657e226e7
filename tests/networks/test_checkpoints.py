"""Stored networks: the same bounds back, trainable, and a clear refusal of every other file."""

import copy
import hashlib
import json
import pickle
import struct
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import optrelax as ox
from optrelax.networks import checkpoints, ops, storage
from optrelax.networks.checkpoints import read_extra

pytestmark = pytest.mark.smoke


class Functional(nn.Module):
    """One of everything that Sequential cannot say: branches, a shared weight, constants, poolings."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2)
        self.norm = nn.BatchNorm2d(4)
        self.shared = nn.Linear(4, 4)
        self.last = nn.Linear(4, 3, bias=False)
        self.register_buffer("mean", torch.tensor([0.25, 0.5]).reshape(2, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.norm(self.first((x - self.mean) / 0.5)), 0.2)
        x = F.adaptive_avg_pool2d(x, 1).flatten(1)
        x = F.hardtanh(self.shared(x), -0.5, 0.75)
        x = x - F.relu6(self.shared(x) * 2.0)
        return self.last(x)


def functional() -> nn.Module:
    torch.manual_seed(0)
    net = Functional()
    net.train()(torch.rand(8, 2, 6, 6))  # statistics of its own
    return net.eval()


def pooled(pool: nn.Module, features: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 3), pool, nn.Flatten(), nn.Linear(features, 3))


THREE = ([0.1] * 3, [0.2] * 3)
NETS = {
    "fc": (lambda: ox.models.fc(6, 5, 4, 3, seed=0), (6,)),
    "conv": (lambda: ox.models.build("conv", (1, 8, 8), 10, seed=0, normalize=(0.3, 0.4)), (1, 8, 8)),
    "convplus": (lambda: ox.models.build("convplus", (3, 10, 10), 5, seed=0, normalize=THREE), (3, 10, 10)),
    "residual": (lambda: ox.models.build("residual", (1, 8, 8), 4, seed=0), (1, 8, 8)),
    "functional": (functional, (2, 6, 6)),
    "average pool": (lambda: pooled(nn.AvgPool2d(3, 2, 1, count_include_pad=False), 8), (1, 6, 6)),
    "max pool": (lambda: pooled(nn.MaxPool2d(2, 1, 1), 50), (1, 6, 6)),
    "double": (lambda: ox.models.fc(6, 5, 3, seed=0).double(), (6,)),
}


@pytest.fixture(params=NETS)
def network(request: pytest.FixtureRequest) -> ox.Network:
    make, shape = NETS[request.param]
    torch.manual_seed(1)
    return ox.capture(make(), shape)


def images(network: ox.Network) -> Tensor:
    dtype = next(network.module.parameters()).dtype
    return torch.rand(4, *network.input_shape, generator=torch.Generator().manual_seed(2), dtype=dtype)


def test_values_and_bounds_come_back_to_the_bit(network, tmp_path):
    ox.save(network, tmp_path / "net.safetensors")
    loaded = ox.load(tmp_path / "net.safetensors")
    x = images(network)
    assert torch.equal(loaded(x), network(x))
    region = ox.LinfBall(x, 0.05)
    for name in ("box", "crown"):
        before, after = (ox.bounds(net, region, name) for net in (network, loaded))
        assert torch.equal(before.lower, after.lower)
        assert torch.equal(before.upper, after.upper)
    assert [node.path for node in loaded] == [node.path for node in network]
    assert (loaded.input_shape, loaded.output_shape) == (network.input_shape, network.output_shape)


def test_the_loaded_network_trains_as_the_first_does(network, tmp_path):
    ox.save(network, tmp_path / "net.safetensors")
    loaded = ox.load(tmp_path / "net.safetensors")
    gradients = []
    for net in (network, loaded):
        net.module.zero_grad()
        ox.lower_bounds(net, ox.LinfBall(images(net), 0.05), torch.eye(net.outputs), "crown").sum().backward()
        gradients.append({n: p.grad for n, p in net.module.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name in gradients[0]:
        torch.testing.assert_close(gradients[0][name], gradients[1][name])


def test_saved_twice_is_the_same(network, tmp_path):
    ox.save(network, tmp_path / "first.safetensors")
    ox.save(ox.load(tmp_path / "first.safetensors"), tmp_path / "second.safetensors")
    again = ox.load(tmp_path / "second.safetensors")
    x = images(network)
    assert torch.equal(again(x), network(x))


def test_names_of_weights_are_the_modules_own(tmp_path):
    net = ox.models.build("fc-small", (1, 8, 8), seed=0)
    ox.save(net, tmp_path / "net.safetensors", input_shape=(1, 8, 8))
    stored = load_file(tmp_path / "net.safetensors")
    assert stored.keys() == net.state_dict().keys()
    other = ox.models.build("fc-small", (1, 8, 8), seed=1)
    other.load_state_dict(stored)
    x = torch.rand(2, 1, 8, 8)
    assert torch.equal(other(x), net(x))


def test_frozen_and_shared_weights_stay_so(tmp_path):
    layer = nn.Linear(3, 3)
    net = nn.Sequential(layer, nn.ReLU(), layer, nn.ReLU(), nn.Linear(3, 2))
    net[4].weight.requires_grad_(False)
    ox.save(net, tmp_path / "net.safetensors")
    loaded = ox.load(tmp_path / "net.safetensors")
    trainable = {name: p.requires_grad for name, p in loaded.module.named_parameters()}
    assert trainable == {"0.weight": True, "0.bias": True, "4.weight": False, "4.bias": True}


def test_a_batch_norm_keeps_its_statistics_and_its_weights(tmp_path):
    net = functional()
    with torch.no_grad():  # saving under no_grad must not freeze it
        ox.save(net, tmp_path / "net.safetensors", input_shape=(2, 6, 6))
    module = ox.load(tmp_path / "net.safetensors").module
    assert {n for n, _ in module.named_parameters() if n.startswith("norm.")} == {"norm.weight", "norm.bias"}
    for name in ("running_mean", "running_var"):
        assert torch.equal(module.get_buffer(f"norm.{name}"), net.norm.get_buffer(name))


def test_an_activation_of_the_users_comes_back(tmp_path):
    absolute = ox.PiecewiseLinear("v", torch.abs, (0.0,), (-1.0, 1.0), (0.0, 0.0))
    ox.register_activation(_absolute, activation=absolute)
    net = _Absolute()
    ox.save(net, tmp_path / "net.safetensors", input_shape=(4,))
    loaded = ox.load(tmp_path / "net.safetensors")
    x = torch.randn(50, 4)
    assert torch.equal(loaded(x), net(x))
    region = ox.LinfBall(x, 0.3)
    for name in ("box", "crown", "deepz"):
        before, after = (ox.bounds(n, region, name) for n in (ox.capture(net, (4,)), loaded))
        assert torch.equal(before.lower, after.lower)
        assert torch.equal(before.upper, after.upper)


def _absolute(x: Tensor) -> Tensor:
    return torch.abs(x)


torch.fx.wrap("_absolute")


class _Absolute(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return _absolute(self.layer(x))


class _Reverse(ops.Affine):
    """An op of a user's own: the last dimension backwards."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.input_shapes, self.shape = (shape,), shape

    def linear(self, *xs: Tensor) -> Tensor:
        return xs[0].flip(-1)

    def apply_abs(self, *rs: Tensor) -> Tensor:
        return rs[0].flip(-1)

    def transpose(self, a: Tensor) -> tuple[Tensor, ...]:
        return (a.flip(-1),)


class _Flip(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flip(-1)


def test_an_op_of_the_users_is_refused_until_it_is_registered(tmp_path):
    net = nn.Sequential(nn.Linear(3, 3), _Flip())
    ox.register_op(_Flip)(lambda site: _Reverse(site.shape()))
    with pytest.raises(NotImplementedError, match="_Reverse cannot be stored"):
        ox.save(net, tmp_path / "net.safetensors")
    assert not list(tmp_path.iterdir())

    class Described(_Reverse):
        def describe(self):
            return {}

        @classmethod
        def restore(cls, settings, tensors, shapes):
            return cls(shapes[0])

    ox.register_op(_Flip)(lambda site: Described(site.shape()))
    with pytest.raises(NotImplementedError, match="Described cannot be stored in a checkpoint: register its class"):
        ox.save(net, tmp_path / "net.safetensors")
    storage.stored("reverse")(Described)
    ox.save(net, tmp_path / "net.safetensors")
    x = torch.rand(2, 3)
    assert torch.equal(ox.load(tmp_path / "net.safetensors")(x), net(x))
    with pytest.raises(ValueError, match="'reverse' is registered already"):
        storage.stored("reverse")(Described)


# --- extra facts ---------------------------------------------------------------------------------------------------


def test_extra_facts_come_back(tmp_path):
    extra = {"data": "mnist", "eps": 0.1, "relaxation": "crown", "seeds": [1, 2], "note": None}
    ox.save(ox.models.fc(4, 2), tmp_path / "net.safetensors", extra=extra)
    assert read_extra(tmp_path / "net.safetensors") == extra
    ox.save(ox.models.fc(4, 2), tmp_path / "bare.safetensors")
    assert read_extra(tmp_path / "bare.safetensors") == {}


@pytest.mark.parametrize("bad", [{"x": torch.zeros(1)}, {"x": float("nan")}])
def test_extra_facts_must_be_json(bad, tmp_path):
    with pytest.raises(ValueError, match="save: extra must be JSON-ready"):
        ox.save(ox.models.fc(4, 2), tmp_path / "net.safetensors", extra=bad)


def test_a_run_folder_stands_for_its_network(tmp_path):
    net = ox.models.fc(4, 2)
    ox.save(net, tmp_path / "net.safetensors")
    x = torch.rand(1, 4)
    assert torch.equal(ox.load(tmp_path)(x), net(x))


# --- files that are not what they should be ------------------------------------------------------------------------


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    path = tmp_path / "net.safetensors"
    ox.save(ox.models.fc(4, 3, 2, seed=0), path)
    return path


def rewritten(path: Path, **changes: object) -> None:
    """The same file with other entries in the graph, sealed anew: what a forger would write."""
    graph, tensors = graph_of(path) | changes, load_file(path)
    graph["digest"] = checkpoints._digest(graph, tensors)
    save_file(tensors, path, {"optrelax": json.dumps(graph)})


def graph_of(path: Path) -> dict:
    content = path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    return json.loads(json.loads(content[8 : 8 + size])["__metadata__"]["optrelax"])


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.safetensors: no such file"):
        ox.load(tmp_path / "nowhere.safetensors")
    with pytest.raises(FileNotFoundError, match=r"net\.safetensors: no such file"):
        ox.load(tmp_path)


def test_a_file_cut_anywhere_is_refused(stored):
    content = stored.read_bytes()
    for length in range(0, len(content), 97):
        stored.write_bytes(content[:length])
        with pytest.raises(ValueError, match=f"{stored.name}: expected a complete safetensors file"):
            ox.load(stored)


def test_a_flipped_bit_is_refused(stored):
    content = bytearray(stored.read_bytes())
    content[-3] ^= 1  # within the weights
    stored.write_bytes(content)
    with pytest.raises(ValueError, match="digest differs"):
        ox.load(stored)


class _Bomb:
    def __reduce__(self) -> tuple:
        return (pytest.fail, ("a pickle was read",))


def test_a_pickle_is_never_read(tmp_path):
    path = tmp_path / "net.safetensors"
    path.write_bytes(pickle.dumps(_Bomb()))
    with pytest.raises(ValueError, match="expected a complete safetensors file"):
        ox.load(path)
    torch.save(_Bomb(), path)
    with pytest.raises(ValueError, match=r"expected a complete safetensors file, got an archive .*load_state_dict"):
        ox.load(path)


def test_a_foreign_safetensors_file_is_refused(tmp_path):
    path = tmp_path / "net.safetensors"
    save_file(ox.models.fc(4, 2).state_dict(), path)
    with pytest.raises(ValueError, match=r"expected a network stored by optrelax\.save, got safetensors without"):
        ox.load(path)
    save_file({"w": torch.zeros(2)}, path, {"optrelax": "{not json"})
    with pytest.raises(ValueError, match="expected the graph as JSON"):
        ox.load(path)
    save_file({"w": torch.zeros(2)}, path, {"optrelax": "[1, 2]"})
    with pytest.raises(ValueError, match="expected the graph with a format number"):
        ox.load(path)


def test_a_later_format_is_refused(stored):
    rewritten(stored, format=3)
    with pytest.raises(ValueError, match="expected format 2, got 3"):
        ox.load(stored)


def changed_node(graph: dict, index: int, **changes: object) -> list:
    nodes = [dict(node) for node in graph["nodes"]]
    nodes[index] |= changes
    return nodes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: {"output": "elsewhere"}, "'elsewhere' is not a node"),
        (lambda g: {"nodes": changed_node(g, 1, inputs=["later"])}, r"reads \['later'\]"),
        (lambda g: {"nodes": changed_node(g, 1, name=g["nodes"][0]["name"])}, "two nodes are named"),
        (lambda g: {"nodes": changed_node(g, 1, shape=[4])}, r"gives shape \(3,\), the graph says .*\(4,\)"),
        (lambda g: {"nodes": changed_node(g, 1, op={"op": "softmax"})}, "unknown op 'softmax'"),
        (lambda g: {"nodes": changed_node(g, 1, tensors={"weight": "nothing"})}, r"\['nothing'\] are missing"),
        (lambda g: {"tensors": {}}, "only in one of graph and file"),
        (lambda g: {"input_shape": [-4]}, "is not a shape"),
        (lambda g: {"nodes": 3}, "nodes must be list, got int"),
        (lambda g: {"tensors": dict.fromkeys(g["tensors"], "odd")}, "unknown kind 'odd'"),
    ],
)
def test_a_graph_that_does_not_fit_is_refused(stored, change, message):
    rewritten(stored, **change(graph_of(stored)))
    with pytest.raises(ValueError, match=message):
        ox.load(stored)


def test_a_failed_write_leaves_the_old_file(stored, monkeypatch):
    def full(path: Path, content: bytes) -> int:
        with path.open("wb") as file:
            file.write(content[: len(content) // 2])
        raise OSError(28, "No space left on device")

    before = stored.read_bytes()
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        ox.save(ox.models.fc(4, 3, 2, seed=1), stored)
    assert stored.read_bytes() == before
    assert [path.name for path in stored.parent.iterdir()] == [stored.name]


def test_an_unwritable_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        ox.save(ox.models.fc(4, 2), tmp_path / "file" / "net.safetensors")


def test_format_1_is_read_as_it_was_first_written(tmp_path):
    """A file written here by hand: what is stored today must load tomorrow."""
    weight, bias = torch.tensor([[1.0, -2.0], [0.5, 3.0]]), torch.tensor([0.25, -1.0])
    digest = hashlib.sha256()
    for key, tensor in (("layer.bias", bias), ("layer.weight", weight)):
        digest.update(key.encode() + tensor.numpy().tobytes())
    layer = {"name": "layer", "path": "layer", "inputs": ["input"], "shape": [2], "op": {"op": "linear"}}
    layer["tensors"] = {"weight": "layer.weight", "bias": "layer.bias"}
    relu = {"op": "activation", "name": "relu", "kinks": [0.0], "slopes": [0.0, 1.0], "intercepts": [0.0, 0.0]}
    graph = {
        "format": 1,
        "input_shape": [2],
        "output": "relu",
        "nodes": [layer, {"name": "relu", "path": "act", "inputs": ["layer"], "shape": [2], "op": relu, "tensors": {}}],
        "tensors": {"layer.weight": "trainable", "layer.bias": "frozen"},
        "digest": digest.hexdigest(),
        "extra": {},
    }
    tensors = {"layer.weight": weight, "layer.bias": bias}
    save_file(tensors, tmp_path / "net.safetensors", {"optrelax": json.dumps(graph)})
    net = ox.load(tmp_path / "net.safetensors")
    assert net(torch.tensor([[1.0, 1.0], [4.0, -1.0]])).tolist() == [[0.0, 2.5], [6.25, 0.0]]
    assert [p.requires_grad for p in net.module.parameters()] == [True, False]


@pytest.mark.parametrize("relaxation", ["box", "hzono", "crown", "triangle"])
def test_a_stored_network_of_flat_inputs_takes_images(relaxation: str, tmp_path: Path) -> None:
    """ox.models.fc begins with a Flatten; saved without an input shape, it still takes what the module takes."""
    net, x = ox.models.fc(4, 6, 3, seed=0), torch.rand(5, 1, 2, 2)
    ox.save(net, tmp_path / "net.safetensors")
    network = ox.load(tmp_path / "net.safetensors")
    labels = net(x).argmax(1)
    torch.testing.assert_close(network(x), net(x))
    found, wanted = (ox.bounds(n, ox.LinfBall(x, 0.1), relaxation) for n in (network, net))
    torch.testing.assert_close(found.lower, wanted.lower)
    report = ox.certify(network, (x, labels), 0.01, relaxation=relaxation)
    assert report.certified == ox.certify(net, (x, labels), 0.01, relaxation=relaxation).certified
    with pytest.raises(ValueError, match=r"takes inputs of shape \(4,\), got \(1, 3, 3\)"):
        network(torch.rand(5, 1, 3, 3))
    with pytest.raises(ValueError, match=r"takes inputs \[\*batch, 4\], got \(5, 1, 3, 3\)"):
        ox.bounds(network, ox.LinfBall(torch.rand(5, 1, 3, 3), 0.1))


def test_saving_a_network_in_a_shape_that_it_does_not_take_is_refused(tmp_path: Path) -> None:
    network = ox.capture(ox.models.fc(4, 6, 3, seed=0))
    ox.save(network, tmp_path / "net.safetensors", input_shape=(1, 2, 2))
    assert ox.load(tmp_path / "net.safetensors").input_shape == (1, 2, 2)
    with pytest.raises(ValueError, match="takes inputs of shape"):
        ox.save(network, tmp_path / "other.safetensors", input_shape=(5,))


def unpickled(net: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(net))  # noqa: S301


@pytest.mark.parametrize("copied", [copy.deepcopy, unpickled])
@pytest.mark.parametrize("name", ["fc", "functional", "max pool"])
def test_a_loaded_network_is_copied_and_pickled(copied, name, tmp_path):
    """With weights of its own, as trainable as they were."""
    make, shape = NETS[name]
    net, x = make(), torch.rand(2, *shape)
    next(net.parameters()).requires_grad_(False)
    ox.save(net, tmp_path / "net.safetensors", input_shape=shape)
    loaded = ox.load(tmp_path / "net.safetensors")
    again = copied(loaded)
    region = ox.LinfBall(x, 0.1)
    torch.testing.assert_close(again(x), loaded(x), rtol=0, atol=0)
    torch.testing.assert_close(ox.bounds(again, region).lower, ox.bounds(loaded, region).lower, rtol=0, atol=0)
    mine, theirs = dict(again.named_parameters()), dict(loaded.named_parameters())
    assert {n: p.requires_grad for n, p in mine.items()} == {n: p.requires_grad for n, p in theirs.items()}
    with torch.no_grad():
        for p in mine.values():
            p.add_(1.0)
    torch.testing.assert_close(loaded(x), net(x))
    assert not torch.equal(again(x), loaded(x))

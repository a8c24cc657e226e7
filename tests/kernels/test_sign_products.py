"""Products with matrices of signs: the ends and gradients of the plain products, on every path that takes them."""

import functools

import pytest
import torch
from torch import nn

import optrelax as ox
from optrelax.domains import row_rules
from optrelax.kernels import native, sign_products
from optrelax.kernels.band_step import range_over_box

pytestmark = pytest.mark.compiler


def given(batch, k, m, n, dtype=torch.float64, seed=0):
    """Rows, weight and box; whole rows and single entries of their product are 0."""
    g = torch.Generator().manual_seed(seed)
    a, weight = torch.randn(batch, k, m, generator=g, dtype=dtype), torch.randn(m, n, generator=g, dtype=dtype)
    a[0, 1] = 0.0
    a[-1, -1] = 0.0
    a[-1, -1, :2] = torch.tensor([1.0, -1.0])  # the product is 0, the row is not
    a[0, 2, 1:] = 0.0
    weight[0, 5], weight[0, n - 1] = 0.0, -0.0
    weight[1] = weight[0]
    center = torch.randn(batch, n, generator=g, dtype=dtype)
    radius = torch.rand(batch, n, generator=g, dtype=dtype)
    radius[:, 3] = 0.0
    return a, weight, center, radius


def plain(a, weight, center, radius):
    low, high = range_over_box(a @ weight, center - radius, center + radius)
    return (low + high) / 2, (high - low) / 2


SIZES = [(1, 64, 32, 32), (3, 65, 33, 47), (2, 130, 100, 784), (7, 66, 70, 129), (2, 99, 300, 40)]


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("sizes", SIZES)
def test_ends_and_gradients_are_those_of_the_product(sizes, dtype, threads):
    assert sign_products.kernels().library is not None, sign_products.kernels().reason
    tensors = given(*sizes, dtype)
    g = torch.Generator().manual_seed(1)
    grads = [torch.randn(*sizes[:2], generator=g, dtype=dtype) for _ in range(2)]
    found, before = [], torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for way in (sign_products.ends_through, plain):
            leaves = [t.clone().requires_grad_() for t in tensors[:2]]
            ends = way(*leaves, *tensors[2:])
            found.append([*ends, *torch.autograd.grad(ends, leaves, grads)])
    finally:
        torch.set_num_threads(before)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-13
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * float(theirs.detach().abs().max()))


def test_an_entry_of_zero_has_the_middle_of_the_box_for_a_gradient():
    a, weight, center, radius = given(2, 64, 32, 40)
    assert int(((a @ weight) == 0).sum()) > 40, "the case has lost its zeros"
    a.requires_grad_()
    _, spread = sign_products.ends_through(a, weight, center, radius)
    (found,) = torch.autograd.grad(spread[-1, -1], a)
    assert not found.any()
    (found,) = torch.autograd.grad(sign_products.ends_through(a, weight, center, radius)[1][0, 2], a)
    signs = (a[0, 2] @ weight).sign()
    assert signs[5] == signs[-1] == 0
    torch.testing.assert_close(found[0, 2], weight @ (signs * radius[0]))


def test_gradients_alone_and_none_at_all():
    tensors = given(3, 64, 40, 50)
    leaves = [t.clone().requires_grad_() for t in tensors[:2]]
    whole = torch.autograd.grad(sum(t.sum() for t in sign_products.ends_through(*leaves, *tensors[2:])), leaves)
    for i in range(2):
        some = [leaf if i == j else leaf.detach() for j, leaf in enumerate(leaves)]
        ends = sign_products.ends_through(*some, *tensors[2:])
        assert torch.equal(torch.autograd.grad(sum(t.sum() for t in ends), leaves[i])[0], whole[i])
    with torch.no_grad():
        bare = sign_products.ends_through(*leaves, *tensors[2:])
    assert all(torch.equal(a, b) for a, b in zip(bare, ends, strict=True))


def test_second_derivatives():
    a, weight, center, radius = given(2, 5, 4, 6)
    leaves = [torch.randn_like(a).requires_grad_(), weight.requires_grad_()]
    assert torch.autograd.gradgradcheck(lambda a, w: sign_products.ends_through(a, w, center, radius), leaves)


class Doubled(nn.Module):
    """The input goes around the first matrix too."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(40, 40), nn.Linear(40, 40), nn.Linear(40, 4)

    def forward(self, x):
        return self.last(self.second(self.first(x).relu() + x).relu())


def normalised(*shape):
    first = nn.BatchNorm1d(shape[0]).requires_grad_(False)
    first.running_mean.uniform_(-1, 1, generator=torch.Generator().manual_seed(3))
    first.running_var.uniform_(0.5, 2, generator=torch.Generator().manual_seed(4))
    return nn.Sequential(first, *ox.models.fc(*shape, seed=0)).eval()


def steps(net, shape, relaxation, dtype, leaf=False):
    """Bounds and gradients with the products and without; and the rows that came to them."""
    net = net.to(dtype)
    network, x = ox.capture(net, shape), torch.rand(3, *shape, generator=torch.Generator().manual_seed(1), dtype=dtype)
    rows, found, calls = ox.margins(torch.arange(3), network.outputs), [], []
    ends_through = sign_products.ends_through

    def counted(*tensors):
        calls.append(tensors[0].shape[1])
        return ends_through(*tensors)

    for compiled in (True, False):
        x = x.detach().requires_grad_(leaf)
        net.zero_grad()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(row_rules, "ends_through", counted)
            if not compiled:
                patch.setattr(sign_products, "kernels", lambda: native.Build(None, "tested without"))
            low = ox.lower_bounds(network, ox.LinfBall(x, 0.05, (0.0, 1.0)), rows, relaxation)
            low.sum().backward()
        leaves = [*([x] if leaf else []), *(p for p in net.parameters() if p.requires_grad)]
        found.append([low.detach(), *(p.grad for p in leaves)])
    return (*found, calls)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("relaxation", ["crown", "crown-soft", "deepz", "fast-lin", "crown-ibp"])
@pytest.mark.parametrize("make", [functools.partial(ox.models.fc, seed=0), normalised], ids=["pixels", "normalised"])
def test_bounds_and_gradients_of_networks_are_the_same_with_them(relaxation, make, dtype):
    ours, theirs, calls = steps(make(50, 70, 40, 80, 5), (50,), relaxation, dtype)
    rows = {"crown-ibp": set(), "deepz": {80}, "fast-lin": {80}}.get(relaxation, {80, 160})
    assert set(calls) == rows, "not every one of these rows ended at the entrance"
    tolerance = 1e-3 if dtype == torch.float32 else 1e-10
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max()))


def test_boxes_with_a_gradient_and_networks_without_an_entrance_go_on_to_the_input():
    ours, theirs, calls = steps(ox.models.fc(50, 70, 70, 5, seed=0), (50,), "crown", torch.float64, leaf=True)
    assert not calls
    torch.testing.assert_close(ours, theirs)
    learned = normalised(50, 70, 70, 5).requires_grad_()  # its scale makes the radius
    _, _, calls = steps(learned, (50,), "crown", torch.float64)
    assert not calls
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Doubled()
    _, _, calls = steps(net, (40,), "crown", torch.float64)
    assert not calls
    assert ox.capture(net, (40,)).entrance == ()


def test_entrance():
    net = normalised(12, 8, 3)
    path = ox.capture(net, (12,)).entrance
    assert [type(node.op).__name__ for node in path][-1] == "Linear"
    assert path[-1].shape == (8,)
    conv = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3))
    assert ox.capture(conv, (1, 4, 4)).entrance == ()
    assert ox.capture(nn.Sequential(nn.ReLU(), nn.Linear(4, 3)), (4,)).entrance == ()


def test_a_network_that_dies_behind_its_entrance():
    """All rows are 0 there, and so are their gradients."""
    net = ox.models.fc(50, 70, 70, 5, seed=0)
    first = next(m for m in net if isinstance(m, nn.Linear))
    with torch.no_grad():
        first.bias.fill_(-100.0)
    network, x = ox.capture(net, (50,)), torch.rand(2, 50)
    low = ox.lower_bounds(network, ox.LinfBall(x, 0.05), ox.margins(torch.arange(2), 5), "crown")
    low.sum().backward()
    torch.testing.assert_close(low, torch.einsum("bkc,bc->bk", ox.margins(torch.arange(2), 5), net(x)).detach())
    assert not first.weight.grad.any()


def test_a_batch_of_none():
    a, weight = torch.zeros(0, 64, 40, requires_grad=True), torch.ones(40, 50, requires_grad=True)
    middle, spread = sign_products.ends_through(a, weight, torch.zeros(0, 50), torch.zeros(0, 50))
    assert middle.shape == spread.shape == (0, 64)
    (middle + spread).sum().backward()
    assert not weight.grad.any()

"""Kernels of windows beside PyTorch's own operations."""

import pytest
import torch

from optrelax.kernels import window_step
from optrelax.kernels.convolutions import ConvGeometry


@pytest.mark.parametrize(("n", "k", "m"), [(1, 3, 5), (33, 7, 16), (70, 20, 48), (64, 5, 100), (0, 2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_with_a_matrix(n, k, m, dtype):
    generator = torch.Generator().manual_seed(0)
    a, w = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((n, k), (k, m)))
    if n:
        a[0, 0] = torch.inf  # and no other row knows of it
    found = torch.full((n + 1, m), 7.0, dtype=dtype)
    window_step.kernels().call("multiply", dtype, n, k, m, a, w, found)
    torch.testing.assert_close(found[:n], a @ w)
    assert (found[n] == 7).all(), "written beyond the last row"


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_whole_images_are_relaxed_as_windows_of_their_size(threads):
    """A window at corner (0, 0) as large as the map; of the image nothing is left to move."""
    generator = torch.Generator().manual_seed(0)
    n, high, wide, c = 5, 4, 3, 2
    size = high * wide * c
    a, grad, *lines = (torch.randn(*shape, generator=generator) for shape in ((n, size), (n, size), *[(2, size)] * 4))
    column = torch.randn(n, generator=generator)
    place = torch.zeros(n, 3, dtype=torch.int64)
    place[3:, 0] = 1

    def run(step):
        """A step of the place (0, 0) moves nothing either."""
        frame = (n, n, high, wide, c, high, wide, step, step, 0, 0)
        pulled, constant, to_a = torch.empty(n, size), torch.zeros(n), torch.empty(n, size)
        more = [torch.zeros(2, size) for _ in range(4)]
        given = (*frame, place, None, a, *lines, None, None, None)
        window_step.kernels().call("relax", torch.float32, *given, pulled, constant)
        window_step.kernels().call("relax_back", torch.float32, *given, grad, column, to_a, *more, None, None, None)
        return pulled, constant, to_a, *more

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for whole, window in zip(run(0), run(1), strict=True):
            torch.testing.assert_close(whole, window)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize(("corner", "size"), [((0, 0), (7, 10)), ((1, 2), (5, 6))])
def test_gradients_of_rows_through_a_convolution(corner, size, wanted):
    """Compiled in float64, by PyTorch's operations where they are differentiated again."""
    generator = torch.Generator().manual_seed(0)
    a, weight = (torch.randn(*shape, generator=generator).double() for shape in ((3, 3, 4, 5), (5, 2, 3, 4)))
    a.requires_grad_(wanted[0])
    weight.requires_grad_(wanted[1])
    found = window_step.spread(a, weight, ConvGeometry((2, 2), (0, 0), (1, 1), 1), corner, size)
    grad, given = torch.randn(found.shape, generator=generator).double(), [t for t in (a, weight) if t.requires_grad]
    once = torch.autograd.grad(found, given, grad, retain_graph=True)
    again = torch.autograd.grad(found, given, grad, create_graph=True)
    for fast, plain in zip(once, again, strict=True):
        assert not fast.requires_grad
        torch.testing.assert_close(fast, plain.detach())

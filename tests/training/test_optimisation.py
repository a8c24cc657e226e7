"""What a step does with its gradient and its images: optimisers, clipping, the average of the weights, augmentation."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import optrelax as ox
from optrelax.training.augmentation import AUGMENTATIONS, augmented
from optrelax.training.losses import NaturalLoss
from optrelax.training.schedules import ConstantSchedule
from optrelax.training.settings import Training
from optrelax.training.trainer import train

SHAPE = (1, 6, 5)
TRAINING = Training(loss=NaturalLoss(), epochs=3, lr=ConstantSchedule(0.05), batch=8, clip=None)


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        layers = nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(60, 3)
    return nn.Sequential(*layers).double()


def data() -> tuple[Tensor, Tensor]:
    x = torch.rand(16, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return x, (x.mean((1, 2, 3)) > 0.5).long() + (x[:, 0, 0, 0] > 0.7)


def state(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in net.state_dict().items()}


@pytest.mark.parametrize("clip_norm", [None, 1e-2])
@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("adam", lambda p: torch.optim.Adam(p, lr=0.05, weight_decay=0.1)),
        ("adamw", lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1)),
        ("sgd", lambda p: torch.optim.SGD(p, lr=0.05, weight_decay=0.1, momentum=0.9)),
    ],
)
def test_steps_are_those_of_a_plain_loop(name, reference, clip_norm):
    x, labels = data()
    net, twin = network(), network()
    settings = replace(TRAINING, optimizer=name, weight_decay=0.1, clip_norm=clip_norm, batch=16)
    train(net, (x, labels), settings)
    steps = reference(twin.parameters())
    for _ in range(3):
        steps.zero_grad()
        F.cross_entropy(twin(x), labels).backward()
        if clip_norm is not None:
            norm = torch.stack([p.grad.square().sum() for p in twin.parameters()]).sum().sqrt()
            assert norm > clip_norm
            for p in twin.parameters():
                p.grad *= clip_norm / norm
        steps.step()
    torch.testing.assert_close(state(net), state(twin), rtol=1e-4, atol=1e-6)


def test_a_small_gradient_is_not_clipped():
    plain, clipped = network(), network()
    train(plain, data(), TRAINING)
    train(clipped, data(), replace(TRAINING, clip_norm=1e6))
    torch.testing.assert_close(state(clipped), state(plain))


def test_the_average_is_what_a_run_ends_with():
    plain, averaged = network(), network()
    kept = [state(plain)]
    train(plain, data(), TRAINING, watch=lambda _: kept.append(state(plain)))
    train(averaged, data(), replace(TRAINING, average=0.9))
    wanted = kept[0]
    for step, values in enumerate(kept[1:]):
        share = min(0.9, (1 + step) / (10 + step))
        for name, value in values.items():
            floating = value.is_floating_point()
            wanted[name] = share * wanted[name] + (1 - share) * value if floating else value
    torch.testing.assert_close(state(averaged), wanted)


class Stop(Exception):
    pass


@pytest.mark.parametrize("stop", [(2, 1), (3, 2)])
def test_a_run_is_resumed_to_the_bit(tmp_path, stop):
    training = replace(TRAINING, optimizer="sgd", weight_decay=0.1, clip_norm=1.0, average=0.9, augment="crop-flip")

    def watch(progress: object) -> None:
        if (progress.epoch, progress.step) == stop:  # type: ignore[attr-defined]
            raise Stop

    whole, cut = network(), network()
    train(whole, data(), training)
    with pytest.raises(Stop):
        train(cut, data(), training, folder=tmp_path, checkpoint_every=0, watch=watch)
    resumed = network()
    train(resumed, data(), training, folder=tmp_path, resume=True)
    torch.testing.assert_close(state(resumed), state(whole), rtol=0, atol=0)
    x, _ = data()
    torch.testing.assert_close(ox.load(tmp_path)(x), whole.eval()(x))  # what is stored is the average too


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_an_augmented_image_is_a_window_of_the_image_or_of_its_mirror(name):
    images = torch.rand(200, 2, 5, 4, generator=torch.Generator().manual_seed(0)) + 0.1
    found = augmented(name, images, torch.Generator().manual_seed(1))
    crop, flip = "crop" in name, "flip" in name
    moves = [(dy, dx) for dy in range(9) for dx in range(9)] if crop else [(4, 4)]
    used = set()
    padded = F.pad(images, (4, 4, 4, 4))
    for dy, dx in moves:
        window = padded[:, :, dy : dy + 5, dx : dx + 4]
        for mirrored in (False, True) if flip else (False,):
            same = (found == (window.flip(-1) if mirrored else window)).all((1, 2, 3))
            used |= {(int(i), dy, dx, mirrored) for i in same.nonzero()[:, 0]}
    assert {image for image, *_ in used} == set(range(200))
    assert {mirrored for *_, mirrored in used} == ({False, True} if flip else {False})
    assert len({(dy, dx) for _, dy, dx, _ in used}) > (60 if crop else 0)


@dataclass(frozen=True, kw_only=True)
class Recording(NaturalLoss):
    """Keeps the images that it is called with."""

    seen: list[Tensor]

    def __call__(self, net, region, labels, x=None, **options):
        self.seen.append(x.clone())
        return super().__call__(net, region, labels, x, **options)


def seen(**settings: object) -> list[Tensor]:
    loss = Recording(seen=[])
    train(network(), data(), replace(TRAINING, loss=loss, **settings))
    return loss.seen


def test_every_step_draws_anew_whatever_its_pieces():
    whole, pieces = seen(augment="crop"), seen(augment="crop", pieces=2)
    assert torch.equal(torch.cat(whole), torch.cat(pieces))
    assert not torch.equal(torch.cat(seen(augment="crop", seed=1)), torch.cat(whole))
    x, _ = data()
    # In three epochs of sixteen images hardly one comes twice alike.
    assert len({image.numpy().tobytes() for image in torch.cat(whole)}) > 40
    assert {image.numpy().tobytes() for image in torch.cat(seen())} == {image.numpy().tobytes() for image in x}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "adamb"}, "no optimizer 'adamb'; did you mean 'adam.?'"),
        ({"augment": "flop"}, "no augment 'flop'; did you mean 'flip'"),
        ({"weight_decay": -1.0}, "weight_decay must be >= 0 and finite, got -1.0"),
        ({"clip_norm": 0.0}, "clip_norm must be > 0 and finite, got 0.0"),
        ({"average": 1.0}, r"average must lie in \[0, 1\), got 1.0"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        replace(TRAINING, **settings)


def test_only_images_are_augmented():
    net, x = nn.Sequential(nn.Linear(4, 3)), torch.rand(8, 4)
    with pytest.raises(ValueError, match=r"'flip' wants images \[n, channels, height, width\], got \[8, 4\]"):
        train(net, (x, torch.arange(8) % 3), replace(TRAINING, augment="flip"))

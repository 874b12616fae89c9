"""Augmented images: what a view shows, and that it depends on seed, epoch and row alone."""

from itertools import islice

import numpy as np
import pytest
import torch

from clip_medical.config import Config
from clip_medical.data.augment import DEGREES, SMALLEST, augment, draw_views
from clip_medical.data.batches import Pairs, batches, row_batches
from clip_medical.data.fragments import fragments

S = 60


def views(*rows: tuple[float, float, float, float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def test_the_middle_of_all_ranges_is_the_identity() -> None:
    """Catches images rotated or shifted on average, and interchanged channels."""
    pixels = torch.randint(0, 256, (1, 3, S, S), dtype=torch.uint8)
    assert torch.equal(augment(pixels, views((0.5, 1, 0.5, 0.5))), pixels)


def test_each_number_has_its_own_effect() -> None:
    """Catches angle, size and position interchanged, a reduced image, and a square that exceeds the image."""
    dot = torch.zeros(3, S, S, dtype=torch.uint8)
    dot[:, S // 2 - 1 : S // 2 + 1, S - 6 : S - 4] = 255  # in the middle of the right edge
    augmented = augment(
        torch.stack([dot] * 4), views((1, 1, 0.5, 0.5), (0, 1, 0.5, 0.5), (0.5, 0, 0, 0.5), (0.5, 0, 0.5, 0))
    )
    centres = [tuple((image[0] > 60).nonzero().double().mean(dim=0).tolist()) for image in augmented]
    middle = (S - 1) / 2
    radius = (S - 5.5) - middle
    drop = radius * torch.tensor(DEGREES).deg2rad().sin().item()
    margin, enlarged = (1 / SMALLEST - 1) * S / 2, radius / SMALLEST
    expected = [(middle + drop, middle + radius), (middle - drop, middle + radius)]
    expected += [(middle, middle + enlarged - margin), (middle - margin, middle + enlarged)]
    assert torch.allclose(torch.tensor(centres), torch.tensor(expected), atol=1)
    white = torch.full((2, 3, S, S), 255, dtype=torch.uint8)
    assert augment(white, views((0.5, 0, 0, 0), (0.5, 0, 1, 1))).min() > 200


def test_left_stays_left() -> None:
    """Catches a mirrored image, one rotated so far that it is another projection, and rows that share a view."""
    halves = torch.zeros(200, 3, S, S, dtype=torch.uint8)
    halves[:, 0, :, : S // 2] = 255
    halves[:, 1, : S // 2] = 255
    augmented = augment(halves, draw_views(200, 0, 0)).double()
    left, right = (augmented[:, 0, :, half].mean(dim=(1, 2)) for half in (slice(S // 2), slice(S // 2, None)))
    upper, lower = (augmented[:, 1, half].mean(dim=(1, 2)) for half in (slice(S // 2), slice(S // 2, None)))
    assert (left > 200).all() and (right < 60).all()
    assert (upper > lower + 60).all()
    assert len({image.numpy().tobytes() for image in augmented}) == 200


def test_grey_images_are_augmented_like_coloured_ones() -> None:
    """Catches a batch of one channel that is refused, changed in dtype, or cut differently."""
    grey = torch.randint(0, 256, (5, 1, S, S), dtype=torch.uint8)
    drawn = draw_views(5, 0, 0)
    augmented = augment(grey, drawn)
    assert augmented.dtype == torch.uint8 and augmented.shape == grey.shape
    assert torch.equal(augment(grey.expand(-1, 3, -1, -1), drawn), augmented.expand(-1, 3, -1, -1))


def test_a_view_depends_on_seed_epoch_and_row() -> None:
    """Catches views drawn from a running generator, which a resumed run does not repeat, or equal in two epochs."""
    drawn = draw_views(10, 1, 2)
    torch.rand(3)
    assert torch.equal(draw_views(10, 1, 2), drawn)
    assert (
        drawn.shape == (10, 4) and drawn.min() >= 0 and drawn.max() < 1 and len(set(map(tuple, drawn.tolist()))) == 10
    )
    assert not torch.equal(draw_views(10, 1, 3), drawn) and not torch.equal(draw_views(10, 2, 2), drawn)


def test_batches_show_the_views_of_their_rows_and_epoch() -> None:
    """Catches views of other rows, a resumed run with other pixels, and augmentation that is not configured."""
    pixels, rows = torch.randint(0, 256, (10, 3, 8, 8), dtype=torch.uint8), torch.arange(10)
    pairs = Pairs(pixels, torch.ones(10, 3, dtype=torch.long), torch.full((10,), 3), rows, rows)
    config = Config(batch_size=5, augment=True, fragments=0, seed=4)
    steps = list(islice(batches(pairs, config), 6))
    for step, batch in enumerate(steps):
        views_of_epoch = draw_views(10, 4, step // 2)
        assert torch.equal(batch.pixels, augment(pixels[batch.rows], views_of_epoch[batch.rows]))
    resumed = next(batches(pairs, config, start=3))
    assert torch.equal(resumed.rows, steps[3].rows) and torch.equal(resumed.pixels, steps[3].pixels)
    plain = next(batches(pairs, Config(batch_size=5, fragments=0)))
    assert torch.equal(plain.pixels, pixels[plain.rows])


def test_draws_of_one_epoch_are_independent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches views, fragments and the order of the rows drawn from the same seed, so that certain angles always come
    with certain words. NumPy treats the seed (1, 2, 0) like (1, 2)."""
    seeds: list[tuple[int, ...]] = []
    default_rng = np.random.default_rng

    def record(seed: tuple[int, ...]) -> np.random.Generator:
        seeds.append(seed)
        return default_rng(seed)

    monkeypatch.setattr(np.random, "default_rng", record)
    draw_views(8, 1, 2)
    for number in range(4):
        fragments(torch.ones(8, 5, dtype=torch.long), torch.full((8,), 5), None, 1, 2, number)
    next(row_batches(8, 4, seed=1, start=4))
    states = {tuple(np.random.SeedSequence(seed).generate_state(4).tolist()) for seed in seeds}
    assert len(states) == len(seeds) == 6

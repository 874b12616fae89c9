"""Augmented pictures: what a view shows, and that it is the same wherever and whenever it is looked at."""

from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch

from clip_medical.config import Config
from clip_medical.data.augment import DEGREES, SMALLEST, augment, draw_views
from clip_medical.data.batches import epochs, row_batches
from clip_medical.training.contrastive import contrastive_backward
from tests.training.test_contrastive import N, gradients, pairs, relative, small_clip

CPU = torch.device("cpu")
S = 60


def views(*rows: tuple[float, float, float, float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def test_the_middle_of_all_ranges_is_the_picture_itself() -> None:
    """Catches a picture turned or shifted on average, and channels that change places."""
    pixels = torch.randint(0, 256, (1, 3, S, S), dtype=torch.uint8)
    assert torch.equal(augment(pixels, views((0.5, 1, 0.5, 0.5))), pixels)


def test_each_number_does_what_it_says() -> None:
    """Catches angle, size and place exchanged, a picture made smaller, and a crop that reaches beyond the picture."""
    dot = torch.zeros(3, S, S, dtype=torch.uint8)
    dot[:, S // 2 - 1 : S // 2 + 1, S - 6 : S - 4] = 255  # half-way up the right edge
    shown = augment(
        torch.stack([dot] * 4), views((1, 1, 0.5, 0.5), (0, 1, 0.5, 0.5), (0.5, 0, 0, 0.5), (0.5, 0, 0.5, 0))
    )
    place = [tuple((one[0] > 60).nonzero().double().mean(dim=0).tolist()) for one in shown]
    reach = (S - 5.5) - (S - 1) / 2
    drop = reach * torch.tensor(DEGREES).deg2rad().sin().item()
    margin, far = (1 / SMALLEST - 1) * S / 2, reach / SMALLEST
    middle = (S - 1) / 2
    expected = [(middle + drop, middle + reach), (middle - drop, middle + reach)]
    expected += [(middle, middle + far - margin), (middle - margin, middle + far)]
    assert torch.allclose(torch.tensor(place), torch.tensor(expected), atol=1)
    white = torch.full((2, 3, S, S), 255, dtype=torch.uint8)
    assert augment(white, views((0.5, 0, 0, 0), (0.5, 0, 1, 1))).min() > 200


def test_left_stays_left() -> None:
    """Catches a mirrored picture, and one turned so far that it is another projection."""
    half = torch.zeros(200, 3, S, S, dtype=torch.uint8)
    half[:, 0, :, : S // 2] = 255
    half[:, 1, : S // 2] = 255
    seen = augment(half, draw_views(200, 0, 0)).double()
    assert (seen[:, 0, :, : S // 2].mean(dim=(1, 2)) > 200).all() and (
        seen[:, 0, :, S // 2 :].mean(dim=(1, 2)) < 60
    ).all()
    assert (seen[:, 1, : S // 2].mean(dim=(1, 2)) > seen[:, 1, S // 2 :].mean(dim=(1, 2)) + 60).all()
    assert len({one.numpy().tobytes() for one in seen}) == 200, "each row has a view of its own"


def test_a_view_is_of_its_row_and_epoch() -> None:
    """Catches views drawn in the order of asking, which a resumed run would not repeat; and augmentation unasked."""
    plain, config = pairs(), Config(batch_size=5, augment=True, fragments=0)
    numbers = torch.arange(N)
    steps = list(islice(epochs(plain, numbers, config, 0), 12))
    resumed, rows = next(epochs(plain, numbers, config, 6))
    assert torch.equal(rows, steps[6][1])
    whole = steps[6][0].pictures(numbers, CPU)
    assert torch.equal(resumed.pictures(rows, CPU), whole[rows]) and torch.equal(
        steps[7][0].pictures(rows, CPU), whole[rows]
    )
    assert not torch.equal(steps[0][0].pictures(numbers, CPU), whole)
    assert not torch.equal(plain.in_epoch(replace(config, seed=1), 1).pictures(numbers, CPU), whole)
    never, _ = next(epochs(plain, numbers, Config(batch_size=5), 0))
    assert torch.equal(never.pictures(numbers, CPU), plain.pixels[numbers])


def test_both_passes_of_a_chunked_step_see_the_same_pixels() -> None:
    """Catches pixels that differ between the features that the loss saw and those that the gradient goes through."""
    clip, found, data = small_clip(), [], pairs().in_epoch(Config(augment=True, fragments=0), 0)
    for chunk_size in (5, N):
        contrastive_backward(clip, data, torch.arange(N), chunk_size)
        found.append(gradients(clip))
    assert relative(*found) < 1e-5
    contrastive_backward(clip, pairs(), torch.arange(N), N)
    assert relative(gradients(clip), found[0]) > 1e-2


def test_all_that_an_epoch_draws_is_drawn_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches views, fragments and the order of the rows drawn from one seed, so that a turn goes with certain words.
    NumPy takes (1, 2, 0) for (1, 2)."""
    seeds: list[tuple[int, ...]] = []
    draw = np.random.default_rng

    def recorded(seed: tuple[int, ...]) -> np.random.Generator:
        seeds.append(seed)
        return draw(seed)

    monkeypatch.setattr(np.random, "default_rng", recorded)
    pairs().in_epoch(Config(augment=True, fragments=4, seed=1), 2)
    next(row_batches(N, 4, seed=1, start=2 * (N // 4)))
    states = {tuple(np.random.SeedSequence(seed).generate_state(4).tolist()) for seed in seeds}
    assert len(states) == len(seeds) == 6

"""Counter-based random numbers: known answers, moments, and what each draw depends on."""

import itertools

import pytest
import torch

from gcahng.random import mixing_weights, philox, picking_weights, stream_key, to_uniform

# Philox 4x32-10 in the Random123 distribution's file of known answers: counter, key (low word first), result.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (0xFFFFFFFF,) * 4,
        (0xFFFFFFFF,) * 2,
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, int], result: tuple[int, ...]) -> None:
    words = philox(key[0] | key[1] << 32, [torch.tensor([word]) for word in counter])
    assert [int(word) for word in words] == list(result)


def test_a_counter_is_broadcast_and_missing_words_are_zero() -> None:
    rows, columns = torch.arange(3)[:, None], torch.arange(5)[None, :]
    table = philox(7, (rows, columns))
    for i, j in itertools.product(range(3), range(5)):
        one = philox(7, [torch.tensor(word) for word in (i, j, 0, 0)])
        assert [int(word[i, j]) for word in table] == [int(word) for word in one]


def test_uniform_moments_and_range() -> None:
    words = philox(stream_key("moments"), (torch.arange(100_000),))
    draws = torch.stack([to_uniform(word, torch.float64) for word in words])
    assert float(draws.min()) >= 0
    assert float(draws.max()) < 1
    # Four standard errors of 4e5 draws: 4 * 0.289 / 632 for the mean.
    assert float(draws.mean()) == pytest.approx(0.5, abs=2e-3)
    assert float(draws.var()) == pytest.approx(1 / 12, abs=1e-3)
    correlation = torch.corrcoef(draws)
    assert float((correlation - torch.eye(4, dtype=torch.float64)).abs().max()) < 0.015
    successive = torch.corrcoef(torch.stack([draws[0, :-1], draws[0, 1:]]))
    assert abs(float(successive[0, 1])) < 0.015


def test_the_largest_word_stays_below_one() -> None:
    word = torch.tensor([0xFFFFFFFF])
    assert float(to_uniform(word, torch.float32)) < 1
    assert float(to_uniform(torch.tensor([0]))) == 0


def test_float32_and_float64_hold_the_same_numbers() -> None:
    words = philox(3, (torch.arange(1000),))[0]
    single, double = to_uniform(words, torch.float32), to_uniform(words, torch.float64)
    assert torch.equal(single.double(), double)
    arguments = {"seed": 1, "step": 2, "phase": "metric"}
    short = mixing_weights(4, **arguments, dtype=torch.float32)
    assert torch.equal(short.double(), mixing_weights(4, **arguments, dtype=torch.float64))


def test_stream_key_is_stable_and_depends_on_every_part() -> None:
    # A change of this number would change every run.
    assert stream_key(0, "edge_dropout", 3, "metric") == 9141446376118910126
    parts = [(0, "a", 1), (1, "a", 1), (0, "b", 1), (0, "a", 2), (0, "a"), (0, "a", 1, 1), (0, "a1")]
    assert len({stream_key(*each) for each in parts}) == len(parts)
    assert all(0 <= stream_key(*each) < 2**64 for each in parts)


def test_mixing_weights_depend_on_every_coordinate() -> None:
    base = {"seed": 0, "step": 5, "phase": "metric"}
    drawn = mixing_weights(4, **base)
    assert drawn.shape == (4, 3)
    assert drawn.unique().numel() == 12  # anchor group and negative group
    assert torch.equal(drawn, mixing_weights(4, **base))
    for change in ({"seed": 1}, {"step": 6}, {"phase": "generation"}):
        other = mixing_weights(4, **(base | change))
        assert not torch.isin(other, drawn).any()


def test_a_mixing_weight_is_a_function_of_its_groups_alone() -> None:
    few = mixing_weights(2, seed=3, step=1, phase="generation")
    many = mixing_weights(5, seed=3, step=1, phase="generation")
    assert torch.equal(few, many[:2, :1])


def test_mixing_weights_are_uniform_over_steps() -> None:
    drawn = torch.cat([mixing_weights(3, seed=0, step=step, phase="metric").flatten() for step in range(1000)])
    assert float(drawn.mean()) == pytest.approx(0.5, abs=0.015)
    assert float(drawn.var()) == pytest.approx(1 / 12, abs=0.005)


def picks(num_samples: int, **coordinates: object) -> list[int]:
    """The group that each anchor group picks, read from the weights as the fusion does: the last 0, else group 0."""
    weights = picking_weights(num_samples, **coordinates)  # type: ignore[arg-type]
    assert weights.shape == (num_samples, num_samples - 1)
    assert set(weights.unique().tolist()) <= {0.0, 1.0}
    assert bool(((1 - weights).sum(1) <= 1).all())
    return [row.index(0.0) + 1 if 0.0 in row else 0 for row in weights.tolist()]


@pytest.mark.parametrize(("num_samples", "bound"), [(2, 10.83), (5, 18.47)])
def test_picks_are_uniform_over_the_groups(num_samples: int, bound: float) -> None:
    """Chi-square of every anchor group's picks over 400 steps, against its 0.1% quantile for K - 1 degrees."""
    steps = 400
    drawn = torch.tensor([picks(num_samples, seed=0, step=step, phase="metric") for step in range(steps)])
    expected = steps / num_samples
    for group in range(num_samples):
        counts = drawn[:, group].bincount(minlength=num_samples).double()
        assert float((counts - expected).square().sum() / expected) < bound, (group, counts.tolist())
    # Anchor groups pick apart: every pair of picks of the first two is about as frequent.
    pairs = (drawn[:, 0] * num_samples + drawn[:, 1]).bincount(minlength=num_samples**2).double()
    deviation = (steps / num_samples**2) ** 0.5
    assert float((pairs - steps / num_samples**2).abs().max()) < 4 * deviation


def test_picks_depend_on_every_coordinate_and_not_on_the_mixing_weights() -> None:
    base = {"seed": 0, "step": 5, "phase": "metric"}
    drawn = picks(64, **base)
    assert drawn == picks(64, **base)
    assert torch.equal(picking_weights(4, **base, dtype=torch.float64), picking_weights(4, **base).double())
    for change in ({"seed": 1}, {"step": 6}, {"phase": "generation"}):
        other = picks(64, **(base | change))
        assert sum(a == b for a, b in zip(drawn, other, strict=True)) < 10
    words = philox(stream_key(0, "mixing_weights", 5, "metric"), (torch.arange(64),))[0]
    assert sum(a == b for a, b in zip(drawn, (words * 64 >> 32).tolist(), strict=True)) < 10


def test_global_generator_is_not_read() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    mixing_weights(3, seed=0, step=0, phase="metric")
    picking_weights(3, seed=0, step=0, phase="metric")
    assert torch.equal(torch.get_rng_state(), before)

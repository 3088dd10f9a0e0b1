import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.base.stats import deciding, guessing, mcnemar, tango, verdict, wilson


def answers(both: int, lost: int, won: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    """Right or wrong, of the reference and of the pruned network, for the four kinds of sample."""
    reference = [True] * both + [True] * lost + [False] * won + [False] * neither
    pruned = [True] * both + [False] * lost + [True] * won + [False] * neither
    return np.array(reference, dtype=bool), np.array(pruned, dtype=bool)


def test_p_value_by_hand() -> None:
    found = mcnemar(*answers(90, 5, 1, 4))
    assert (found.only_reference_right, found.only_pruned_right) == (5, 1)
    assert found.p_value == pytest.approx(2 * (1 + 6) / 64)
    assert found.drop == pytest.approx(0.04)
    assert found.drop_ci95[0] < 0.04 < found.drop_ci95[1]


def test_no_discordant_pairs() -> None:
    found = mcnemar(*answers(95, 0, 0, 5))
    assert found.p_value == 1.0
    reach = 1.959963984540054**2 / (100 + 1.959963984540054**2)
    assert found.drop_ci95 == pytest.approx((-reach, reach))


def test_equal_halves_are_not_above_one() -> None:
    assert mcnemar(*answers(0, 3, 3, 0)).p_value == 1.0


def test_published_interval_of_bentur() -> None:
    # Fagerland, Lydersen and Laake 2014: 1, 1, 7, 12 of 21 children; Tango's interval is -0.517 to -0.026.
    assert tango(1, 7, 21) == pytest.approx((-0.517, -0.026), abs=5e-4)


def test_published_wilson() -> None:
    # Newcombe 1998 (Statistics in Medicine 17:857), table I: 81/263, 15/148, 0/20, 1/29
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson(1, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)


def test_all_lost_or_all_won() -> None:
    assert tango(10, 0, 10)[1] == 1.0
    assert tango(0, 10, 10)[0] == -1.0


@given(st.integers(0, 60), st.integers(0, 60), st.integers(1, 500))
def test_interval_holds_the_drop_and_mirrors(lost: int, won: int, concordant: int) -> None:
    samples = lost + won + concordant
    low, high = tango(lost, won, samples)
    assert -1 <= low < (lost - won) / samples < high <= 1
    assert (-high, -low) == pytest.approx(tango(won, lost, samples), abs=1e-9)


@given(st.integers(0, 60), st.integers(0, 60), st.integers(1, 500))
def test_bounds_solve_the_score_equation(lost: int, won: int, concordant: int) -> None:
    """At a bound the score is z, with the nuisance share the likeliest of a fine grid (not the closed form)."""
    samples = lost + won + concordant
    for bound in tango(lost, won, samples):
        shares = np.linspace(max(0.0, -bound), (1 - bound) / 2, 20001)[1:-1]
        with np.errstate(divide="ignore"):
            likelihood = (
                lost * np.log(shares + bound) + won * np.log(shares) + concordant * np.log(1 - 2 * shares - bound)
            )
        share = shares[np.argmax(likelihood)]
        deviation = math.sqrt(samples * (2 * share + bound * (1 - bound)))
        score = abs(lost - won - samples * bound) / deviation
        assert score == pytest.approx(1.96, abs=0.02)


def test_coverage_is_near_95_percent() -> None:
    draw = np.random.default_rng(0)
    samples, lose, win = 400, 0.03, 0.01
    counts = draw.multinomial(samples, [lose, win, 1 - lose - win], size=2000)
    intervals = [tango(int(lost), int(won), samples) for lost, won, _ in counts]
    covered = np.mean([low <= lose - win <= high for low, high in intervals])
    assert 0.935 <= covered <= 0.965


def test_wilson_coverage_is_near_95_percent() -> None:
    draw = np.random.default_rng(0)
    bounds = [wilson(int(k), 200) for k in draw.binomial(200, 0.9, size=2000)]
    assert 0.93 <= np.mean([low <= 0.9 <= high for low, high in bounds]) <= 0.97


def test_wilson_ends_are_exact() -> None:
    assert wilson(0, 7)[0] == 0.0
    assert wilson(7, 7)[1] == 1.0


@pytest.mark.parametrize(
    ("low", "high", "wanted"),
    [
        (-0.001, 0.002, "no loss"),
        (0.001, 0.003, "no loss"),  # real, but within the margin
        (-0.001, 0.004, "undecided"),
        (0.0, 0.004, "undecided"),
        (0.001, 0.004, "loss"),
    ],
)
def test_verdicts(low: float, high: float, wanted: str) -> None:
    assert verdict(low, high, 0.003) == wanted


@pytest.mark.parametrize(
    ("right", "samples", "largest", "guesses"),
    [
        (10, 100, 0.1, True),  # 5.5% to 17.4%
        (17, 100, 0.1, False),  # 10.9% to 25.5%
        (16, 100, 0.1, False),  # 10.1% to 24.4%
        (15, 100, 0.1, True),  # 9.3% to 23.3%
        (60, 100, 0.55, True),  # 50.2% to 69.1%, of two classes
    ],
)
def test_a_network_guesses_unless_its_interval_lies_above_the_largest_class(
    right: int, samples: int, largest: float, guesses: bool
) -> None:
    assert guessing(right, samples, largest) == guesses


def test_how_many_samples_would_decide() -> None:
    # Nothing lost, nothing won: the interval's end is z^2 / (n + z^2), which is 0.01 at n = 99 z^2 = 380.3.
    assert deciding(0, 0, 100, 0.01) == pytest.approx(380.3, abs=2)
    wanted = deciding(12, 10, 1000, 0.01)  # a drop of 0.2 points, 1 point matters
    assert wanted is not None
    for share, decided in ((0.97, False), (1.03, True)):
        times = share * wanted / 1000
        low, high = tango(12 * times, 10 * times, 1000 * times)
        assert (verdict(low, high, 0.01) != "undecided") is decided
    assert deciding(30, 5, 1000, 0.001) == 1000  # a loss already
    assert deciding(10, 10, 100, 0.003) == pytest.approx(85_400, rel=0.01)  # between 512 and 1,000 times as many

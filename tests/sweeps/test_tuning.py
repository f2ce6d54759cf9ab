"""Golden section on functions whose least value is known."""

from __future__ import annotations

import pytest

from madformer.sweeps.tuning import golden_section


@pytest.mark.parametrize("best", [1.0, 2.345, 5.9, 8.0])
def test_of_a_parabola(best: float) -> None:
    looked_at: list[float] = []

    def parabola(x: float) -> float:
        looked_at.append(x)
        return (x - best) ** 2

    place, value = golden_section(parabola, 1.0, 8.0, 14)
    assert len(looked_at) == len(set(looked_at)) == 14
    # 12 of the evaluations leave 0.618 of the interval each, and the first two the last of them
    assert place == pytest.approx(best, abs=7 * 0.618034**13 + 1e-3)
    assert value == (place - best) ** 2 == min((x - best) ** 2 for x in looked_at)


def test_it_ends_where_numbers_do() -> None:
    looked_at: list[float] = []

    def distance(x: float) -> float:
        looked_at.append(x)
        return abs(x - 1.25)

    place, _ = golden_section(distance, 1.0, 2.0, 100, digits=2)
    assert place == pytest.approx(1.25, abs=0.021)
    assert len(looked_at) < 14


def test_the_best_of_what_was_looked_at_where_it_is_noisy() -> None:
    values = iter([3.0, 1.0, 2.0, 5.0, 4.0])
    assert golden_section(lambda x: next(values), 0.0, 1.0, 5)[1] == 1.0
    for low, high, evaluations in ((1.0, 1.0, 5), (0.0, 1.0, 1)):
        with pytest.raises(ValueError, match="takes two evaluations and low < high"):
            golden_section(abs, low, high, evaluations)

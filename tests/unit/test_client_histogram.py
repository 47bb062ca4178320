"""The latency histogram of the load generator."""

from __future__ import annotations

import random

import pytest

from drivebay.engines.vhost_user_histogram import Histogram


def filled(values: list[int]) -> Histogram:
    histogram = Histogram()
    for value in values:
        histogram.record(value)
    return histogram


def test_an_empty_one_answers_zero() -> None:
    histogram = Histogram()
    assert (histogram.count, histogram.max, histogram.mean) == (0, 0, 0.0)
    assert histogram.percentile(99) == 0


@pytest.mark.parametrize("value", [0, 1, 63, 64, 65, 127, 128, 129, 4095, 4096, 2**30 + 1])
def test_one_value_is_every_percentile(value: int) -> None:
    histogram = filled([value])
    assert histogram.percentile(0.001) == value
    assert histogram.percentile(100) == value
    assert histogram.max == value
    assert histogram.mean == value


def test_percentiles_are_right_to_one_in_sixty_four() -> None:
    rng = random.Random(1)
    values = [int(rng.lognormvariate(8, 2)) for _ in range(20_000)]
    histogram = filled(values)
    values.sort()
    for percent in (1, 50, 90, 99, 99.9, 100):
        exact = values[max(0, round(len(values) * percent / 100) - 1)]
        assert exact <= histogram.percentile(percent) <= exact * (1 + 1 / 64)
    assert histogram.count == len(values)
    assert histogram.mean == pytest.approx(sum(values) / len(values))


def test_neighbouring_buckets_do_not_swap_or_overlap() -> None:
    for value in range(1, 5000):
        histogram = filled([value - 1, value])
        assert histogram.percentile(50) <= histogram.percentile(100)
        assert histogram.percentile(50) >= value - 1


def test_a_value_beyond_the_range_is_counted_and_its_size_kept_in_the_maximum() -> None:
    histogram = filled([2**63, 5])
    assert histogram.count == 2
    assert histogram.max == 2**63
    assert 2**43 <= histogram.percentile(100) < 2**44


def test_two_can_be_added() -> None:
    total = filled([1, 2, 3])
    total.add(filled([100, 200]))
    assert (total.count, total.max, total.mean) == (5, 200, 306 / 5)
    assert total.percentile(60) == 3

"""Time to extract and its inverse: by hand, by simulation, and each against the other."""

import math

import pytest

from qmx.report.limits import Limits, largest_limits, seconds_to_send, time_to_extract


def test_by_hand():
    """Three limits: a rate, a quota of a day, a quota of a month; alone and pooled."""
    # OWASP's example: 10,000 at one a minute are 9,999 minutes.
    assert time_to_extract(10_000, Limits(per_second=1 / 60)) == pytest.approx(9999 / 60)
    # 35 at 10 a day: ten at once, ten after each of two days, five after the third.
    assert time_to_extract(35, Limits(per_day=10)) == 72
    assert time_to_extract(34.2, Limits(per_day=10), principals=4) == 0  # nine each
    # 2,500 at 1,000 a month: the last 500 after two months of 30 days.
    assert time_to_extract(2500, Limits(per_month=1000)) == 2 * 30 * 24
    assert time_to_extract(2500, Limits(per_month=1000), principals=2) == 30 * 24  # 1,250 each
    # All three: 1,000 + 1,000 + 500; the 500 at 100 a day, and the last 100 at one in 2 s.
    assert time_to_extract(2500, Limits(0.5, 100, 1000)) == pytest.approx(
        60 * 24 + 4 * 24 + 99 * 2 / 3600
    )
    assert time_to_extract(1e6, Limits()) == 0 and Limits().none


def test_inverse_by_hand():
    """Fewer than 3,001 queries in a month: 3,000 of one principal, 100 a day; 750 of each of four,
    25 a day."""
    assert largest_limits(3001) == (3000 / (30 * 86400), 100, 3000)
    assert largest_limits(3000.2, principals=4) == (750 / (30 * 86400), 25, 750)
    assert largest_limits(5, principals=10) == (0, 0, 0)


def simulated(queries, per_second, per_day, per_month):
    """Seconds at which the last query goes out, one after the other, each as soon as it may."""
    sent, now = [], 0.0
    for _ in range(queries):
        while True:
            day, month = now // 86400, now // (30 * 86400)
            if sum(t // 86400 == day for t in sent) >= per_day:
                now = (day + 1) * 86400
            elif sum(t // (30 * 86400) == month for t in sent) >= per_month:
                now = (month + 1) * 30 * 86400
            else:
                break
        sent.append(now)
        now += 1 / per_second
    return sent[-1]


@pytest.mark.parametrize("queries", [1, 2, 7, 30, 61])
def test_against_a_simulation(queries):
    """A sender that waits for each window says the same."""
    for limits in ((1, 3, 20), (0.25, 7, 1000), (100, 1, 10), (0.5, 1000, 5)):
        assert seconds_to_send(queries, Limits(*limits)) == pytest.approx(
            simulated(queries, *limits)
        )


@pytest.mark.parametrize("principals", [1, 3, 40])
def test_inverse_of_the_other(principals):
    """At the largest limit the copy takes a month or more, at one query more it does not."""
    month = 30 * 24 - 1e-6
    for queries in (97, 3000, 12345):
        largest = largest_limits(queries, principals)
        for key, step in (("per_day", 1), ("per_month", 1), ("per_second", 1e-4)):
            limit = getattr(largest, key)
            if limit:
                assert time_to_extract(queries, Limits(**{key: limit}), principals) >= month
            looser = Limits(**{key: limit + step})
            assert time_to_extract(queries, looser, principals) < month


def test_wrong_arguments():
    for queries, limits in ((0, Limits()), (3, Limits(per_day=0))):
        with pytest.raises(ValueError, match="above 0"):
            seconds_to_send(queries, limits)
    assert math.isinf(Limits().per_day)

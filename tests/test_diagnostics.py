"""The alarms speak when something is wrong, and only then."""

import math

from qmx.diagnostics import watch


def warnings(series, epoch_steps=4, dimension=16, queue_size=None):
    look = watch(epoch_steps, dimension, queue_size)
    return [warning for step, metrics in enumerate(series, 1) if (warning := look(step, metrics))]


def test_leak():
    """Instance accuracy near 1 over the first epoch; a first step against a random queue is no
    alarm."""
    assert "98 % of the queries" in warnings([{"contrast_acc1": 0.98, "z_std": 0.25}] * 12)[0]
    assert not warnings(
        [{"contrast_acc1": a, "z_std": 0.25} for a in (1.0, 0.1, 0.1, 0.1, 1.0, 1.0, 1.0, 1.0)]
    )


def test_collapse():
    """The spread of the outputs far below 1/sqrt(D), at the end of an epoch."""
    assert "collapsed" in warnings([{"z_std": 0.01}] * 4)[0]
    assert not warnings([{"z_std": 0.2}] * 8) and not warnings([{"z_std": 0.01}] * 3)


def test_stuck():
    """MoCo's loss at ln(K + 1) is no alarm at first, as it starts there, and one after 200 steps;
    below it is none."""
    chance, learned = (
        {"contrast_acc1": 0.1, "z_std": 0.25, "loss": loss} for loss in (math.log(1025), 6.7)
    )
    found = warnings([chance] * 400, queue_size=1024)
    assert len(found) == 1 and "after step 200 and ln(1024 + 1) = 6.93 is chance" in found[0]
    assert not warnings([chance] * 196, queue_size=1024)
    assert not warnings([learned] * 400, queue_size=1024)


def test_once():
    """Each trouble is told once, and one does not hide another."""
    both = [{"contrast_acc1": 0.99, "z_std": 0.01}] * 4 + [
        {"contrast_acc1": 0.1, "z_std": 0.01}
    ] * 8
    found = warnings(both)
    assert len(found) == 2 and "99 % of the queries" in found[0] and "collapsed" in found[1]


def test_other_metrics():
    """Methods without these metrics are not watched."""
    assert not warnings([{"loss": 1.0, "rotation_acc1": 1.0}] * 8, dimension=None)

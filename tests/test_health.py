"""The alarms speak when something is wrong, and only then."""

from qmx.health import watch


def warnings(series, epoch_steps=4, dimension=16):
    look = watch(epoch_steps, dimension)
    return [warning for step, metrics in enumerate(series, 1) if (warning := look(step, metrics))]


def test_leak():
    """M13: instance accuracy near 1 over the first epoch; a first step against a random queue is no alarm."""
    assert "98 % of the queries" in warnings([{"contrast_acc1": 0.98, "z_std": 0.25}] * 12)[0]
    assert not warnings([{"contrast_acc1": a, "z_std": 0.25} for a in (1.0, 0.1, 0.1, 0.1, 1.0, 1.0, 1.0, 1.0)])


def test_collapse():
    """S1: the spread of the outputs far below 1/sqrt(D), at the end of an epoch."""
    assert "collapsed" in warnings([{"z_std": 0.01}] * 4)[0]
    assert not warnings([{"z_std": 0.2}] * 8) and not warnings([{"z_std": 0.01}] * 3)


def test_other_metrics():
    """Methods without these metrics are not watched."""
    assert not warnings([{"loss": 1.0, "rotation_acc1": 1.0}] * 8, dimension=None)

"""Who counts as a student that learned what it was given."""

from types import SimpleNamespace

import numpy as np
from scipy.special import softmax

from qmx.grid import Cell
from qmx.ledger import Ledger, keys_of
from qmx.ledger.access import derive
from qmx.settings import base
from qmx.stages.answers import Answers
from qmx.stages.evaluate import own_agreement

IDENTITY = {"target": "0" * 64, "preprocessing": "none"}
CELL = Cell("none", "random", "logits", "asked", 64, 0.5, 0)


def test_noise_takes_agreement_away(tmp_path):
    """A perfect copy of a target agrees with noisy answers as often as the target does."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (64, 4, 4, 1), np.uint8)
    logits = 3 * rng.normal(size=(64, 10)).astype(np.float32)
    place = {image.tobytes(): row for row, image in enumerate(images)}

    def query(asked):
        return logits[[place[image.tobytes()] for image in asked]]

    with Ledger(tmp_path / "ledger.sqlite", **IDENTITY) as ledger:
        ledger.ask(query, images)
    keys = keys_of(images, **IDENTITY)
    rows = np.stack([np.frombuffer(key, np.uint8) for key in keys])
    answers = Answers(IDENTITY, np.arange(64), rows, np.arange(0), rows[:0], None, None)
    run = SimpleNamespace(workdir=tmp_path, config=base())
    ids = np.arange(5, 50)

    def found(access):
        return own_agreement(run, CELL._replace(access=access), ids, answers)

    assert [found(access) for access in ("logits", "label", "top5", "true_labels")] == [100.0] * 4
    noisy = derive(softmax(logits, axis=1), "probs", "noise0.5", keys)[ids].argmax(1)
    assert found("noise0.5") == 100 * (noisy == logits[ids].argmax(1)).mean()
    assert found("noise0.5") < 80 < found("noise0.01")

"""The benchmark of ways of pretraining at equal processor time."""

import json

import numpy as np
import pytest


@pytest.mark.slow
def test_equal_compute(printed, tmp_path):
    """A row for each method, with the time that it was given, within what a step takes."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = digits.images.astype(np.uint8)[..., None] * 15
    for name, part in (("pool", slice(1200)), ("test", slice(1200, None))):
        np.savez(tmp_path / name, image=images[part], label=digits.target[part])
    line = f"--pool={tmp_path}/pool.npz --evaluation={tmp_path}/test.npz --draws=1 --minutes=0.05"
    *table, last = printed(
        "equal_compute.py",
        *line.split(),
        "--config=tests/one_block.py",
        "--cores=1",
        "--methods",
        "moco",
        "--budgets",
        "50",
        "100",
    )
    rows = json.loads(last)["rows"]
    (row,) = rows
    assert row["method"] == "moco" and len(table) == 3
    assert 0.02 < row["minutes"] < 0.1 and row["epochs"] > 0 and row["petaflops"] > 0
    assert 60 < row["linear"] <= 100 and 60 < row["neighbours"] <= 100
    assert [len(draws) for draws in row["few"]] == [1, 1]

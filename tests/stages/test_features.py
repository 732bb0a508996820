"""Features in a file: answers that are spread by them, and a disk without room for them."""

from types import SimpleNamespace

import numpy as np
from test_by_features import blobs

from qmx import heads
from qmx.selection.patches import beside
from qmx.selection.propagate import propagate, with_head
from qmx.settings import base
from qmx.stages.features import Features


def test_propagation_with_a_head(tmp_path):
    """Its features are those of the graph, patches included; its answers are the same."""
    rows, of = blobs(spread=0.4)
    patches, _ = blobs(spread=0.4, seed=1)
    for name, x in (("features", 3 * rows), ("patches", patches)):
        np.save(tmp_path / f"{name}.npy", x)
    encoder = SimpleNamespace(sha256="of these rows")
    features = Features(encoder, tmp_path / "features.npy", tmp_path / "patches.npy")
    ids = np.arange(0, len(of), 7)
    answers = (0.9 * np.eye(4)[of[ids]] + 0.025).astype(np.float32)
    keys = base().propagation
    keys.update(neighbours=5, alpha=0.9, patches=0.5, temperature=0.5)
    seen = beside(rows, patches, 0.5)
    plain = propagate(seen, ids, answers, neighbours=5, alpha=0.9, temperature=0.5)
    np.testing.assert_allclose(features.propagate(ids, answers, keys), plain, atol=1e-6)

    keys.head_power = 0.3
    mean, scale = heads.spread(seen)
    head = heads.fit(seen[ids], np.log(answers), mean=mean, scale=scale)
    want = with_head(plain, ids, heads.scores(head.params, seen), 0.6)
    found = features.propagate(ids, answers, keys)
    np.testing.assert_allclose(found, want, atol=1e-5)
    assert np.abs(found - plain).max() > 0.1
    right = [(x.argmax(1) == of).mean() for x in (found, plain)]
    assert right[0] >= right[1] - 0.02, right
    labels = features.propagate(ids, np.eye(4, dtype=np.float32)[of[ids]], keys)
    np.testing.assert_allclose(labels.sum(1), 1, atol=1e-5)  # of answers that are labels alone too
    assert (labels.argmax(1) == of).mean() > 0.9


MAPPED = """
import sys
from pathlib import Path

import numpy as np

from qmx.stages.features import reserve

path = Path(sys.argv[1]) / "features.npy.part"
np.lib.format.open_memmap(path, "w+", np.float32, (4000, 1000))
try:
    reserve(path)
except OSError as error:
    assert "No space left" in str(error) and not path.exists(), error
file = np.lib.format.open_memmap(path, "w+", np.float32, (1000, 1000))
reserve(path)
try:
    (path.parent / "other").write_bytes(bytes(20 * 2**20))
except OSError as error:
    assert "No space left" in str(error)
file[:] = 1
file.flush()
print("well")
"""


def test_a_full_disk(on_small_disk):
    """A real one is told of at once; room that was taken stays, whoever fills the disk later."""
    done = on_small_disk(MAPPED)
    assert (done.returncode, done.stdout) == (0, "well\n"), done.stderr

"""Recorded answers: a table in the place of a target, from the file to the report."""

import shutil
import sqlite3

import numpy as np
import pytest
from conftest import TINY, table
from numbered import images, logits_of, refuse
from scipy.special import softmax
from test_ledger import Target

from qmx.ledger import BudgetSpent, Ledger, pixel_digests
from qmx.ledger.__main__ import main
from qmx.ledger.table import Recorded, load, save
from qmx.stages.recorded import enter

DIGESTS = np.frombuffer(b"".join(pixel_digests(images(*range(20)))), np.uint8).reshape(20, 32)
TABLE = Recorded(DIGESTS, logits_of(*range(20)), np.array(["logits"] * 20), "owner's", "as-is")


@pytest.mark.parametrize("kind", ["npz", "parquet"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_table_comes_back(tmp_path, kind, dtype):
    scores = TABLE.scores.copy()
    scores[1::2] = softmax(scores[1::2], axis=1)
    given = TABLE._replace(scores=scores.astype(dtype), access=np.array(["logits", "probs"] * 10))
    save(tmp_path / f"t.{kind}", given)
    found = load(tmp_path / f"t.{kind}")
    for name in ("image", "scores", "access"):
        np.testing.assert_array_equal(getattr(found, name), getattr(given, name))
    assert found.scores.dtype == dtype and (found.target, found.preprocessing) == (
        "owner's",
        "as-is",
    )


@pytest.mark.parametrize(
    "access, row, said",
    [
        ("label", (0.5, 0.3, 0.2), "no labels but scores"),
        ("probs", (5.0, 2.0, 1.0), "no probabilities"),
        ("probs", (1.2, -0.4, 0.2), "no probabilities"),
        ("logits", (0.5, 0.3, 0.2), "are probabilities"),
    ],
)
def test_a_level_that_the_numbers_are_not(tmp_path, access, row, said):
    """They would be learned as something that nobody answered."""
    scores = np.tile(np.float32(row), (20, 1))
    save(tmp_path / "t.npz", TABLE._replace(scores=scores, access=np.array([access] * 20)))
    with pytest.raises(ValueError, match=rf"t.npz says that its answers are {access}: .*{said}"):
        load(tmp_path / "t.npz")


def test_a_table_that_was_corrected(tmp_path):
    """Its answers do not stand behind those of before without a word; more of them may come."""
    save(tmp_path / "t.npz", TABLE)
    identity = {"target": "owner's", "preprocessing": "as-is"}
    with Ledger(tmp_path / "l.sqlite", **identity) as ledger:
        enter(ledger, tmp_path / "t.npz")
        enter(ledger, tmp_path / "t.npz")
        scores = TABLE.scores.copy()
        scores[3] += 1
        save(tmp_path / "other.npz", TABLE._replace(scores=scores))
        with pytest.raises(ValueError, match="answers 1 images otherwise .*--update=new-target"):
            enter(ledger, tmp_path / "other.npz")
        halves = TABLE._replace(scores=TABLE.scores.astype(np.float16))
        save(tmp_path / "half.npz", halves)
        enter(ledger, tmp_path / "half.npz")
        np.testing.assert_array_equal(ledger.read_keys(ledger.keys(images(3))), TABLE.scores[3:4])


def test_recorded_answers_count_when_they_are_used(tmp_path):
    """Nothing before, nothing asked then, the budget holds, and evaluation images stay outside of
    it."""
    save(tmp_path / "t.npz", TABLE)
    with Ledger(tmp_path / "ledger.sqlite", target="owner's", budget=5) as ledger:
        for _ in range(2):
            enter(ledger, tmp_path / "t.npz")
            assert ledger.account()[:6] == (0, 0, 0, 0, 0, 0) and ledger.spent() == 0
        np.testing.assert_array_equal(
            ledger.ask(refuse, images(9, 8), purpose="report"), logits_of(9, 8)
        )
        np.testing.assert_array_equal(ledger.ask(refuse, images(3, 1, 2)), logits_of(3, 1, 2))
        ledger.ask(refuse, images(1, 4), purpose="select")
        assert (
            ledger.account().purposes == {"train": 3, "select": 1, "report": 2}
            and ledger.account().calls == 0
        )
        with pytest.raises(BudgetSpent, match="4 of 5 .* 2 more"):
            ledger.ask(refuse, images(5, 9))
        ledger.ask(refuse, images(9))
        assert ledger.spent() == 5
    with Ledger(tmp_path / "ledger.sqlite", target="another") as other:
        assert other.count_missing(images(0)) == 1


def test_a_richer_answer_of_ones_own_stays(tmp_path):
    labels = np.eye(4, dtype=np.float32)[[0] * 20]
    save(tmp_path / "t.npz", TABLE._replace(scores=labels, access=np.array(["label"] * 20)))
    with Ledger(tmp_path / "ledger.sqlite", target="owner's") as ledger:
        ledger.ask(Target(), images(0))
        enter(ledger, tmp_path / "t.npz")
        np.testing.assert_array_equal(ledger.read(images(0)), logits_of(0))
        np.testing.assert_array_equal(ledger.read(images(1), "label"), [[1, 0, 0, 0]])


BAD = {
    "no columns": (dict(image=DIGESTS), "scores"),
    "pixels": (dict(image=images(*range(20))), r"image is uint8\[20, 4, 4, 1\]"),
    "a row too few": (dict(scores=TABLE.scores[:-1]), r"scores are float32\[19, 4\]"),
    "text for scores": (dict(scores=np.array(["a"] * 20)), "scores are <U1"),
    "NaN": (dict(scores=TABLE.scores * np.nan), "finite"),
    "twice": (dict(image=DIGESTS[[0] * 20]), "several answers to one image"),
    "two targets": (dict(target=np.array(["a", "b"] * 10)), "several targets, 'a' and 'b'"),
    "access": (dict(access=np.array("topk")), "unknown access 'topk'"),
    "no class": (dict(scores=TABLE.scores[:, :0]), r"scores are float32\[20, 0\]"),
    "one score": (dict(scores=np.array(1.5, np.float32)), r"scores are float32\[\]"),
    "numbers for levels": (dict(access=np.arange(20)), r"access is int64\[20\]; it must be a text"),
    "bytes for a target": (dict(target=np.array(b"t")), r"target is .S1\[\]; it must be a text"),
    "texts too few": (dict(target=np.array(["t"] * 7)), r"target is <U1\[7\]"),
    "texts in a square": (dict(access=np.array([["logits"] * 20])), r"access is <U6\[1, 20\]"),
    "pickle": (dict(target=np.array([{"a": 1}], object)), "cannot be read"),
}


@pytest.mark.parametrize("change, message", BAD.values(), ids=BAD)
def test_bad_tables_are_refused(tmp_path, change, message):
    """In one line that names the file; nothing in it is executed."""
    columns = (
        change
        if "scores" in message and len(change) == 1 and "image" in change
        else {**TABLE._asdict(), **change}
    )
    np.savez(tmp_path / "t.npz", **columns)
    with pytest.raises(ValueError, match=message) as caught:
        load(tmp_path / "t.npz")
    assert "t.npz" in str(caught.value) and "\n" not in str(caught.value)


def parquet(path, **changes):
    """A table of two answers in a file, with other columns in the place of some."""
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    columns = {
        "image": [row.tobytes() for row in DIGESTS[:2]],
        "scores": pa.array([[1.0, 2.0], [3.0, 4.0]], pa.list_(pa.float32())),
        "access": ["logits"] * 2,
        "target": ["t"] * 2,
        "preprocessing": ["as-is"] * 2,
        **changes,
    }
    pq.write_table(pa.table({name: c for name, c in columns.items() if c is not None}), path)


ODD_PARQUET = {
    "numbers for scores": dict(scores=[1.0, 2.0]),
    "texts for scores": dict(scores=["ab", "cd"]),
    "uneven scores": dict(scores=[[1.0], [2.0, 3.0]]),
    "no score": dict(scores=[[1.0, 2.0], None]),
    "a hole in the scores": dict(scores=[[1.0, 2.0], [None, 3.0]]),
    "words for scores": dict(scores=[["a"], ["b"]]),
    "images of other lengths": dict(image=[b"a" * 31, b"b" * 33]),
    "texts for images": dict(image=["a" * 32, "b" * 32]),
    "numbers for images": dict(image=[1, 2]),
    "no image": dict(image=[bytes(32), None]),
    "no level": dict(access=["logits", None]),
    "a missing column": dict(target=None),
}


@pytest.mark.parametrize("changes", ODD_PARQUET.values(), ids=ODD_PARQUET)
def test_odd_parquet_files(tmp_path, changes):
    parquet(tmp_path / "good.parquet")
    assert len(load(tmp_path / "good.parquet").image) == 2
    parquet(tmp_path / "t.parquet", **changes)
    with pytest.raises(ValueError, match="t.parquet") as told:
        load(tmp_path / "t.parquet")
    assert "\n" not in str(told.value)


def test_odd_npz_files(tmp_path):
    """A single array, an encrypted member, a header that promises too much, flipped bits."""
    path = tmp_path / "t.npz"
    np.savez(path, **TABLE._asdict())
    whole = path.read_bytes()
    bad = [whole[:cut] for cut in (30, len(whole) // 2, len(whole) - 5)]
    with open(tmp_path / "single", "wb") as file:
        np.save(file, TABLE.scores)
    bad.append((tmp_path / "single").read_bytes())
    bad.append(whole.replace(b"'shape': (20, 4)", b"'shape': (9**9,)"))
    encrypted = bytearray(whole)
    encrypted[whole.index(b"PK\x01\x02") + 8] |= 1
    bad.append(bytes(encrypted))
    rng = np.random.default_rng(0)
    for at in rng.integers(0, len(whole), 200).tolist():
        bad.append(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
    for number, content in enumerate(bad):
        path.write_bytes(content)
        try:
            table = load(path)
        except ValueError as error:
            assert "t.npz" in str(error) and "\n" not in str(error)
        else:  # a bit that nobody reads
            assert number > 5 and np.array_equal(table.scores, TABLE.scores)


@pytest.mark.parametrize("name", ["t.npz", "t.parquet"])
def test_files_that_are_no_table(tmp_path, name):
    for content in (b"", b"PK\x03\x04 and no more", b"text"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} cannot be read as a table of answers"):
            load(tmp_path / name)


@pytest.mark.slow
def test_same_table_from_recorded_answers(finished, command, tmp_path, capsys):
    """Export, import, and the same figures without the target; then a table that lacks some
    answers."""
    for kind in ("npz", "parquet"):
        assert (
            main(["export", str(finished / "ledger.sqlite"), str(tmp_path / f"answers.{kind}")])
            == 0
        )
    # All but the target, whose weights are not here, and what depends on its answers.
    shutil.copytree(
        finished,
        tmp_path / "w",
        ignore=shutil.ignore_patterns(
            "ledger.sqlite*",
            "account.json",
            "target*",
            "query",
            "distill",
            "evaluate",
            "results.json",
        ),
    )
    recorded = [*TINY, "--config.target.kind=recorded", f"--workdir={tmp_path}/w", "--update"]
    status, _, err = command(*recorded, f"--config.target.path={tmp_path}/answers.parquet")
    assert status == 0, err
    new, old = table(tmp_path / "w"), table(finished)
    assert new["rows"] == old["rows"] and new["target"]["top1"] == old["target"]["top1"]
    assert new["account"] == {**old["account"], "calls": 0}
    assert not [*(tmp_path / "w/target").glob("*.safetensors")]

    found = load(tmp_path / "answers.npz")
    save(
        tmp_path / "few.npz",
        found._replace(
            image=found.image[300:], scores=found.scores[300:], access=found.access[300:]
        ),
    )
    words = [*TINY, "--config.target.kind=recorded", f"--config.target.path={tmp_path}/few.npz"]
    status, _, err = command(*words, f"--workdir={tmp_path}/few")
    assert status == 2 and "300 of 360 evaluation images" in err.splitlines()[-1], err
    assert not (tmp_path / "few").exists()
    with sqlite3.connect(tmp_path / "w/ledger.sqlite") as db:
        assert db.execute("SELECT COUNT(*) FROM requests WHERE failed").fetchone() == (0,)

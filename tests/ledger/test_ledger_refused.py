"""Images that get no answer: written down, counted, left out, and not asked about again."""

import shutil
import sqlite3

import numpy as np
import pytest
from numbered import images, logits_of, numbers_of, refuse
from test_ledger_commands import command

from qmx.ledger import BudgetSpent, Ledger, Refused, TooManyRefused, Unavailable


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.sqlite"


class Picky:
    """A target that refuses requests with certain images, or gives them scores that are not finite.

    It takes at most `most` images in a request, and remembers its requests.
    """

    def __init__(self, refuses=(), not_finite=(), most=1000):
        self.refuses, self.not_finite, self.most = {*refuses}, {*not_finite}, most
        self.requests = []

    def __call__(self, pixels):
        numbers = numbers_of(pixels)
        self.requests.append(numbers)
        if self.refuses & {*numbers}:
            raise Refused("the input is bad")
        if len(numbers) > self.most:
            raise Refused("the batch is too large")
        scores = logits_of(*numbers)
        for place, number in enumerate(numbers):
            if number in self.not_finite:
                scores[place, number % 4] = (np.nan, np.inf, -np.inf)[number % 3]
        return scores


def test_good_rows_are_kept(path):
    """The bad ones are named, and not paid for again, in this run or the next."""
    said = []
    target = Picky(not_finite=(3, 14, 25))
    with Ledger(path, target="t") as ledger:
        answers = ledger.ask(
            target, images(*range(40)), batch_size=10, max_refused=0.1, say=said.append
        )
        good = np.setdiff1d(np.arange(40), (3, 14, 25))
        np.testing.assert_array_equal(answers[good], logits_of(*good))
        assert np.isnan(answers[[3, 14, 25]]).all()
        assert len(target.requests) == 4
    with Ledger(path, target="t") as ledger:
        again = ledger.ask(refuse, images(*range(40)), max_refused=0.1)
        np.testing.assert_array_equal(again, answers)
        np.testing.assert_array_equal(ledger.read(images(*good)), logits_of(*good))
        with pytest.raises(LookupError, match="1 of 2 images have no answer .*; 1 were refused"):
            ledger.read(images(2, 3))
        account = ledger.account()
        assert account[:6] == (40, 37, 37, 0, 0, 0) and account.refused == 3
        assert ledger.unanswered(images(*range(41))) == [40]
        assert ledger.refused(ledger.keys(images(*range(10)))) == {*ledger.keys(images(3))}
    assert said == [
        "3 of 40 images have no answer and are left out (image 3: the scores are not finite; image"
        " 14: the scores are not finite; image 25: the scores are not finite)"
    ]


@pytest.mark.parametrize("bad", [(0,), (15,), (5, 6), (7, 8), (0, 9, 15)])
def test_a_refused_batch_is_halved(path, bad):
    """Each half is asked about once, down to the images that are refused; each request counts."""
    target = Picky(refuses=bad)
    with Ledger(path, target="t") as ledger:
        answers = ledger.ask(target, images(*range(16)), batch_size=16, max_refused=0.2)
        good = np.setdiff1d(np.arange(16), bad)
        np.testing.assert_array_equal(answers[good], logits_of(*good))
        refused = [numbers for numbers in target.requests if {*numbers} & {*bad}]
        assert len({tuple(numbers) for numbers in target.requests}) == len(target.requests)
        assert [numbers for numbers in refused if len(numbers) == 1] == [[n] for n in bad]
        account = ledger.account()
        assert account.calls == account.images == 16 - len(bad) and account.refused == len(bad)
        assert account.failed == sum(map(len, refused)) and not account.retried
        ledger.ask(refuse, images(*range(16)), max_refused=0.2)


def test_a_target_that_takes_few_at_a_time(path):
    """It is found out once: later requests are as small, and no image is refused."""
    target, said, told = Picky(most=4), [], []
    with Ledger(path, target="t") as ledger:
        answers = ledger.ask(
            target,
            images(*range(96)),
            batch_size=32,
            say=said.append,
            on_progress=lambda *at: told.append(at),
        )
        np.testing.assert_array_equal(answers, logits_of(*range(96)))
        assert ledger.account().refused == 0
    sizes = [len(numbers) for numbers in target.requests]
    assert sizes == [32, 16, 8] + [4] * 24
    assert said == ["the target takes 4 images in a request, and not 8; set target.batch_size=4"]
    assert told == [(32, 96), (64, 96), (96, 96)]  # as in the other processes of a run


def test_the_first_request_is_a_trial(path):
    """Until a target has answered, two images are risked; later, and for another one, as usual."""

    def wrong(pixels):
        sizes.append(len(pixels))
        raise ValueError("probabilities, and not logits")

    sizes, target = [], Picky()
    with Ledger(path, target="t") as ledger:
        with pytest.raises(ValueError):
            ledger.ask(wrong, images(*range(40)), batch_size=20, trial=2)
        assert sizes == [2] and ledger.account().failed == 2
        for some in (range(40), range(80)):
            answers = ledger.ask(target, images(*some), batch_size=20, trial=2)
            np.testing.assert_array_equal(answers, logits_of(*some))
        assert [len(numbers) for numbers in target.requests] == [2, 18, 20, 20, 20]
        ledger.ask(target, images(81), trial=2)
    with Ledger(path, target="u") as ledger:
        ledger.ask(target, images(0), trial=2)
        assert [len(numbers) for numbers in target.requests[5:]] == [1, 1]


def test_too_many(path):
    """One line with the numbers, the first images and the cures; both cures work."""
    target = Picky(refuses=(4, 5), not_finite=(8, 9))
    with Ledger(path, target="t") as ledger:
        with pytest.raises(
            TooManyRefused,
            match=r"^4 of 50 images have no answer, and target.max_refused=0.05 allows 2 \(image 4:"
            r" the input is bad; image 5: the input is bad; photo 8: the scores are not finite; and"
            r" 1 more\). Raise target.max_refused .*python -m qmx.ledger forget",
        ) as told:
            for start, name in ((0, "image"), (8, "photo")):
                ledger.ask(
                    target,
                    images(*range(start, 50)) if start else images(*range(8)),
                    batch_size=2,
                    max_refused=0.05 if start else 0.3,
                    name=lambda row, start=start, name=name: f"{name} {row + start}",
                )
    assert "\n" not in str(told.value)
    sent = len(target.requests)
    with Ledger(path, target="t") as ledger:
        with pytest.raises(TooManyRefused):
            ledger.ask(refuse, images(*range(50)), max_refused=0.05)
        answers = ledger.ask(target, images(*range(50)), max_refused=0.1)
        assert np.isnan(answers).any(1).sum() == 4 and len(target.requests) == sent + 1
    assert "  4 images refused: image 4: the input is bad; " in command("summary", path)[1]
    assert command("forget", path, "--target=x")[1].startswith("0 images")
    assert command("forget", path)[1] == "4 images without an answer will be asked about again\n"
    mended = Picky()
    with Ledger(path, target="t") as ledger:
        np.testing.assert_array_equal(ledger.ask(mended, images(*range(50))), logits_of(*range(50)))
        assert mended.requests == [[4, 5, 8, 9]] and ledger.account().refused == 0


def test_a_target_that_refuses_everything(path):
    """It is left after one image, and not asked about every one."""
    target = Picky(refuses=range(64))
    with Ledger(path, target="t") as ledger:
        with pytest.raises(TooManyRefused, match="1 of 64 images .*answered none so far.*forget"):
            ledger.ask(target, images(*range(64)), max_refused=0.01)
    assert [len(numbers) for numbers in target.requests] == [64, 32, 16, 8, 4, 2, 1]


def test_refused_images_count_against_the_budget(path):
    """They were asked about; those for the report do not, as ever."""
    with Ledger(path, target="t", budget=4) as ledger:
        every = {"max_refused": 1.0}
        ledger.ask(Picky(refuses=(20,)), images(20, 21), purpose="report", **every)
        ledger.ask(Picky(refuses=(0,), not_finite=(1,)), images(0, 1, 2), **every)
        assert ledger.spent() == 3
        with pytest.raises(BudgetSpent, match="3 of 4 .* 2 more"):
            ledger.ask(refuse, images(0, 1, 2, 3, 4), **every)
        ledger.ask(Picky(), images(0, 1, 2, 3), **every)
        assert ledger.spent() == 4


def test_other_errors_in_a_half(path):
    """What was answered before is kept; the refused image is not asked about again."""

    class Then(Picky):
        def __call__(self, pixels):
            if 12 in numbers_of(pixels) and len(pixels) == 2:
                raise Unavailable("gone")
            return super().__call__(pixels)

    with Ledger(path, target="t") as ledger:
        with pytest.raises(Unavailable):
            ledger.ask(Then(refuses=(3, 14)), images(*range(16)), max_refused=0.2, batch_size=16)
        assert ledger.account().images == 11 and ledger.account().refused == 1
        later = Picky(refuses=(3, 14))
        ledger.ask(later, images(*range(16)), max_refused=0.2)
        assert not {3, *range(12)} & {n for numbers in later.requests for n in numbers}


def test_a_file_without_the_table(path, tmp_path):
    """A ledger of qmx 0.2 opens, to read and to write; its answers are there."""
    with Ledger(path, target="t") as ledger:
        ledger.ask(Picky(), images(*range(9)))
    with sqlite3.connect(path) as db:
        db.execute("DROP TABLE refused")
    db.close()
    shutil.copy(path, tmp_path / "old.sqlite")
    for words in (["summary"], ["verify"], ["export"]):
        more = [tmp_path / "t.npz"] if words == ["export"] else []
        status, out, err = command(*words, path, *more)
        assert status == 0, out + err
    assert path.read_bytes() == (tmp_path / "old.sqlite").read_bytes()
    with Ledger(path, target="t") as ledger:
        ledger.ask(Picky(not_finite=(9,)), images(*range(10)), max_refused=1)
        assert ledger.account().refused == 1 and ledger.account().images == 9


def test_recovery_keeps_them(path):
    with Ledger(path, target="t") as ledger:
        ledger.ask(Picky(refuses=(3,)), images(*range(300)), max_refused=0.1, batch_size=30)
    with sqlite3.connect(path) as db:
        db.execute("UPDATE answers SET checksum = 0 WHERE row = 7")
    db.close()
    assert command("verify", path)[0] == 1
    with Ledger(f"{path}.recovered", target="t") as ledger:
        assert ledger.account().refused == 1
        assert ledger.unanswered(images(*range(300))) == [7]
    assert command("verify", f"{path}.recovered")[0] == 0

"""The ledger, on real files: paid once, never lost, never overrun, never mixed up."""

import math
import os
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from numbered import images, logits_of, numbers_of, refuse
from scipy.special import softmax

import qmx
from qmx.ledger import Account, BudgetSpent, Ledger, Unavailable
from qmx.ledger.access import ACCESS, as_logits, derive, one_hot_logits


class Target:
    """A target that remembers what it was sent, and gives way when it has been sent `limit`
    images."""

    def __init__(self, access="logits", limit=math.inf):
        self.access, self.limit, self.sent = access, limit, []

    def __call__(self, pixels):
        if len(self.sent) + len(pixels) > self.limit:
            raise ConnectionError("the service is gone")
        self.sent += numbers_of(pixels)
        return derive(logits_of(*numbers_of(pixels)), "logits", self.access)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.sqlite"


@pytest.fixture
def ledger(path):
    with Ledger(path, target="t") as opened:
        yield opened


# Paid for once


def test_an_answer_is_paid_for_once(ledger):
    """The second time costs nothing, also when a few new images come with it."""
    target = Target()
    first = ledger.ask(target, images(0, 1, 2, 3, 4))
    np.testing.assert_array_equal(first, logits_of(0, 1, 2, 3, 4))
    np.testing.assert_array_equal(ledger.ask(refuse, images(4, 2, 0)), logits_of(4, 2, 0))
    np.testing.assert_array_equal(ledger.ask(target, images(3, 9, 1)), logits_of(3, 9, 1))
    assert target.sent == [0, 1, 2, 3, 4, 9]
    assert ledger.account() == Account(6, 6, 6, 0, 0, 0, {"train": 6, "select": 0, "report": 0})


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_repeats_within_one_call_are_sent_once(ledger, batch_size):
    """A pool with the same image several times, in one batch and in several."""
    target = Target()
    asked = [5, 6, 5, 7, 7, 5, 8, 6]
    answers = ledger.ask(target, images(*asked), batch_size=batch_size)
    np.testing.assert_array_equal(answers, logits_of(*asked))
    assert target.sent == [5, 6, 7, 8]
    assert ledger.account()[:4] == (4, 4, 4, 0)


def test_batches_are_no_larger_than_asked_and_progress_is_told(ledger):
    sizes, told = [], []

    def query(pixels):
        sizes.append(len(pixels))
        return logits_of(*numbers_of(pixels))

    ledger.ask(query, images(*range(10)), batch_size=4, on_progress=lambda *at: told.append(at))
    assert sizes == [4, 4, 2]
    assert told == [(4, 10), (8, 10), (10, 10)]


def test_training_passes_with_as_many_answers_as_the_budget(path):
    """A target that gives way after N images; N images are enough for any number of
    readings."""
    target = Target(limit=12)
    with Ledger(path, target="t", budget=12) as ledger:
        ledger.ask(target, images(*range(12)), batch_size=5)
        for seed in range(20):  # epochs
            order = np.random.default_rng(seed).permutation(12)
            np.testing.assert_array_equal(ledger.read(images(*order)), logits_of(*order))
    assert len(target.sent) == 12


# Nothing is lost


def test_a_failing_target_loses_nothing(path):
    """The run after a failure sends exactly budget - done, and the lost batch is on the
    account."""
    target = Target(limit=10)
    with Ledger(path, target="t", budget=20) as ledger:
        with pytest.raises(ConnectionError):
            ledger.ask(target, images(*range(20)), batch_size=4)
        assert target.sent == list(range(8))
        assert ledger.account() == Account(8, 8, 8, 0, 4, 0, {"train": 8, "select": 0, "report": 0})
        assert ledger.count_missing(images(*range(20))) == 12

    again = Target(limit=12)
    with Ledger(path, target="t", budget=20) as ledger:
        answers = ledger.ask(again, images(*range(20)), batch_size=4)
        np.testing.assert_array_equal(answers, logits_of(*range(20)))
        assert sorted(again.sent) == list(range(8, 20))
        assert ledger.account() == Account(
            20, 20, 20, 0, 4, 0, {"train": 20, "select": 0, "report": 0}
        )
        assert ledger.count_missing(images(*range(20))) == 0


class Unsteady(Target):
    """A target that gives no answer in those of its calls that are named, each with what it says
    then."""

    def __init__(self, failures):
        super().__init__()
        self.failures, self.calls = failures, 0

    def __call__(self, pixels):
        self.calls += 1
        if failure := self.failures.get(self.calls):
            raise failure
        return super().__call__(pixels)


def test_a_batch_without_an_answer_is_sent_again(path, ledger):
    """After the seconds given, or more if the target asks for more; each attempt is on the account,
    as it happens."""
    target = Unsteady(
        {2: Unavailable("busy"), 3: Unavailable("busy", 7.5), 5: Unavailable("busy", 0.5)}
    )
    paused = []

    def pause(seconds, error):
        assert str(error) == "busy"
        with Ledger(path, target="t") as other:
            paused.append((seconds, *other.account()[:6]))

    answers = ledger.ask(target, images(*range(6)), batch_size=2, waits=(1, 2), pause=pause)
    np.testing.assert_array_equal(answers, logits_of(*range(6)))
    assert target.sent == [*range(6)]
    assert paused == [(1, 2, 2, 2, 0, 2, 0), (7.5, 2, 2, 2, 0, 4, 2), (1, 4, 4, 4, 0, 6, 4)]
    assert ledger.account() == Account(6, 6, 6, 0, 6, 6, {"train": 6, "select": 0, "report": 0})


def test_it_really_waits(ledger):
    began = time.monotonic()
    ledger.ask(
        Unsteady({1: Unavailable("busy", 0.1), 2: Unavailable("busy")}), images(0), waits=(0, 0.2)
    )
    assert 0.3 <= time.monotonic() - began < 5


@pytest.mark.parametrize("waits", [(), (0,), (0, 0, 0)])
def test_when_the_waits_are_used_up_the_error_goes_up(path, waits):
    """Nothing that was answered before is lost, no budget is spent, and the next session asks for
    the rest."""
    attempts = len(waits) + 1
    target = Unsteady({call: Unavailable("the service is gone") for call in range(2, 2 + attempts)})
    with Ledger(path, target="t", budget=6) as ledger:
        with pytest.raises(Unavailable, match="the service is gone"):
            ledger.ask(target, images(*range(6)), batch_size=2, waits=waits)
        assert target.calls == 1 + attempts
        assert ledger.account()[:6] == (2, 2, 2, 0, 2 * attempts, 2 * (attempts - 1))
        assert ledger.spent() == 2
    with Ledger(path, target="t", budget=6) as ledger:
        np.testing.assert_array_equal(ledger.ask(target, images(*range(6))), logits_of(*range(6)))
        assert ledger.account()[:6] == (6, 6, 6, 0, 2 * attempts, 2 * (attempts - 1))


def test_other_errors_are_not_tried_again(ledger):
    """Nor is an answer that cannot be used: asking again would bring the same."""
    for failure in (ValueError("wrong"), ConnectionError("gone"), OSError(5, "broken")):
        target = Unsteady({1: failure})
        with pytest.raises(type(failure)):
            ledger.ask(target, images(0), waits=(0, 0))
        assert target.calls == 1
    with pytest.raises(ValueError, match="1 images with shape"):
        ledger.ask(lambda pixels: np.zeros(3), images(0), waits=(0, 0))
    assert ledger.account()[:6] == (0, 0, 0, 0, 4, 0)


def test_giving_up_while_waiting(ledger):
    """The failed request is on record as such, and not as in flight."""

    def stop(seconds, error):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ledger.ask(Unsteady({1: Unavailable("busy")}), images(0, 1), waits=(100,), pause=stop)
    assert ledger.account()[:6] == (0, 0, 0, 0, 2, 0)


# Asks for 0..99 in batches of 4; from batch `hang` on, the target does not come back.
ASKING = """
import sys, time
from numbered import images, logits_of, numbers_of
from qmx.ledger import Ledger

path, hang = sys.argv[1], int(sys.argv[2])
batches = 0

def query(pixels):
    global batches
    batches += 1
    print(*numbers_of(pixels), flush=True)
    time.sleep(0.02 if batches < hang else 600)
    return logits_of(*numbers_of(pixels))

with Ledger(path, target="t", budget=100) as ledger:
    print("open", flush=True)
    ledger.ask(query, images(*range(100)), batch_size=4)
"""


def another_process(script, *arguments, **keywords):
    """A Python process that can import qmx and this file."""
    here = os.pathsep.join([str(Path(qmx.__file__).parents[1]), str(Path(__file__).parent)])
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        text=True,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": here},
        **keywords,
    )


def test_a_process_killed_while_it_asks_loses_nothing(path, ledger):
    """SIGKILL with three batches committed and one in flight; what was answered is never asked
    again.

    The ledger of this process is open all the time and sees each answer as soon as it is committed.
    """
    with another_process(ASKING, path, 4) as process:
        try:
            assert process.stdout.readline() == "open\n"
            sent = [[int(n) for n in process.stdout.readline().split()] for _ in range(4)]
            assert ledger.account() == Account(
                12, 12, 12, 4, 0, 0, {"train": 12, "select": 0, "report": 0}
            )
        finally:
            process.kill()
    assert process.returncode == -9
    assert sent == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]

    target = Target(limit=88)
    with Ledger(path, target="t", budget=100) as later:
        np.testing.assert_array_equal(later.read(images(*range(12))), logits_of(*range(12)))
        np.testing.assert_array_equal(
            later.ask(target, images(*range(100))), logits_of(*range(100))
        )
    assert sorted(target.sent) == list(range(12, 100))
    assert ledger.account() == Account(
        100, 100, 100, 4, 0, 0, {"train": 100, "select": 0, "report": 0}
    )


@pytest.mark.parametrize("answers", [1, 10, 30])
def test_a_process_killed_anywhere_loses_nothing(path, ledger, answers):
    """SIGKILL at whatever point comes once some answers are seen; whole batches are there, or
    are missing."""
    with another_process(ASKING, path, 1000) as process:
        try:
            while ledger.account().images < answers and process.poll() is None:
                time.sleep(0.001)
        finally:
            process.kill()
        sent = process.stdout.read().split()[1:]
    kept = ledger.account()
    assert kept.images >= answers and kept.images % 4 == 0 and kept.unanswered in (0, 4)
    assert kept.images <= len(sent) <= kept.images + kept.unanswered

    target = Target(limit=100 - kept.images)
    with Ledger(path, target="t", budget=100) as later:
        np.testing.assert_array_equal(
            later.ask(target, images(*range(100))), logits_of(*range(100))
        )
    assert sorted(target.sent) == list(range(kept.images, 100))
    assert ledger.account()[:4] == (100, 100, 100, kept.unanswered)


READING = """
import sys
from numbered import images, logits_of, refuse
from qmx.ledger import Ledger

with Ledger(sys.argv[1], target="t") as ledger:
    for line in sys.stdin:
        ask = [int(n) for n in line.split()]
        assert (ledger.ask(refuse, images(*ask)) == logits_of(*ask)).all()
        print("free", flush=True)
"""


def test_two_processes_share_one_file(path, ledger):
    """Both have it open at once; what one bought is free for the other."""
    with another_process(READING, path, stdin=subprocess.PIPE) as process:
        for some in ([0, 1, 2], [3, 1, 4], [5]):
            ledger.ask(Target(), images(*some))
            process.stdin.write(" ".join(map(str, some)) + "\n")
            process.stdin.flush()
            assert process.stdout.readline() == "free\n"
        process.stdin.close()
    assert process.returncode == 0


def test_two_connections_see_what_is_committed(path, ledger):
    """Each batch is there for others before its caller sees it."""
    with Ledger(path, target="t") as other:
        seen = []
        ledger.ask(
            Target(),
            images(*range(6)),
            batch_size=2,
            on_progress=lambda *_: seen.append(other.account()[:4]),
        )
        assert seen == [(2, 2, 2, 0), (4, 4, 4, 0), (6, 6, 6, 0)]
        np.testing.assert_array_equal(other.ask(refuse, images(5, 0)), logits_of(5, 0))
        other.ask(Target(), images(6))
        np.testing.assert_array_equal(ledger.read(images(6)), logits_of(6))


def test_a_request_is_written_down_before_it_is_sent(path, ledger):
    """While the target thinks, others see the images in flight."""
    seen = []

    def query(pixels):
        with Ledger(path, target="t") as other:
            seen.append(other.account()[:4])
        return logits_of(*numbers_of(pixels))

    ledger.ask(query, images(0, 1, 2), batch_size=2)
    assert seen == [(0, 0, 0, 2), (2, 2, 2, 1)]
    assert ledger.account()[:4] == (3, 3, 3, 0)


# Pairing


def test_answers_pair_by_content_and_not_by_position(path):
    """Permuted, repeated, turned round in memory, in another session."""
    with Ledger(path, target="t") as ledger:
        ledger.ask(Target(), images(*range(50)), batch_size=7)
    order = np.random.default_rng(0).integers(0, 50, 200)
    with Ledger(path, target="t") as ledger:
        np.testing.assert_array_equal(ledger.read(images(*order)), logits_of(*order))
        np.testing.assert_array_equal(
            ledger.read(images(*range(50))[::-1]), logits_of(*range(49, -1, -1))
        )
        np.testing.assert_array_equal(
            ledger.read(np.asfortranarray(images(*range(50)))), logits_of(*range(50))
        )


def test_many_images_at_once(ledger):
    """More keys than one SQL statement takes."""
    asked = np.random.default_rng(0).permutation(1300)
    np.testing.assert_array_equal(ledger.ask(Target(), images(*asked)), logits_of(*asked))
    np.testing.assert_array_equal(ledger.read(images(*asked[::-1])), logits_of(*asked[::-1]))


def test_a_missing_answer_is_not_made_up(ledger):
    ledger.ask(Target(), images(1, 2))
    with pytest.raises(LookupError, match="^2 of 4 images have no answer"):
        ledger.read(images(1, 2, 3, 4))
    assert ledger.count_missing(images(1, 3, 3, 4, 2)) == 2


@pytest.mark.parametrize(
    "other",
    [
        {"target": "u"},
        {"target": "t", "preprocessing": "resize"},
        {"target": "u", "preprocessing": "resize"},
        {"target": ""},
    ],
)
def test_another_target_or_preprocessing_shares_nothing(path, ledger, other):
    ledger.ask(Target(), images(0, 1, 2))
    with Ledger(path, **other) as second:
        assert second.count_missing(images(0, 1, 2)) == 3
        with pytest.raises(LookupError):
            second.read(images(0))
        target = Target()
        second.ask(lambda pixels: -target(pixels), images(0, 1))
        assert target.sent == [0, 1]
        np.testing.assert_array_equal(second.read(images(1, 0)), -logits_of(1, 0))
    np.testing.assert_array_equal(ledger.read(images(0, 1, 2)), logits_of(0, 1, 2))


def test_each_target_has_an_account_and_a_budget_of_its_own(path):
    with Ledger(path, target="t", budget=2) as one, Ledger(path, target="u", budget=2) as two:
        one.ask(Target(), images(0, 1))
        two.ask(Target(), images(2, 3))
        assert one.account()[:4] == two.account()[:4] == (2, 2, 2, 0)
        assert one.spent() == two.spent() == 2


def test_the_shape_is_part_of_the_key(ledger):
    """Equal bytes in another shape are another image."""
    pixels = np.arange(48, dtype=np.uint8)
    shapes = [(1, 4, 4, 3), (1, 3, 4, 4), (1, 4, 12, 1), (1, 48), (1, 2, 8, 3)]
    assert len({ledger.keys(pixels.reshape(shape))[0] for shape in shapes}) == len(shapes)
    ledger.ask(lambda x: np.ones((len(x), 2)), pixels.reshape(shapes[0]))
    assert ledger.count_missing(pixels.reshape(shapes[1])) == 1


def test_one_pixel_makes_another_image(ledger):
    near = np.repeat(images(0), 17, 0)
    near[np.arange(1, 17), np.arange(16) // 4, np.arange(16) % 4] ^= 1
    assert len(set(ledger.keys(near))) == 17


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int32, np.int8, bool])
def test_only_the_exact_bytes_that_are_sent_can_be_keyed(ledger, dtype):
    for use in (
        ledger.keys,
        ledger.read,
        ledger.count_missing,
        lambda x: ledger.ask(refuse, x),
        lambda x: ledger.ask(refuse, images(0), of=x),
    ):
        with pytest.raises(ValueError, match=np.dtype(dtype).name):
            use(images(0).astype(dtype))


def test_scores_come_back_bit_for_bit(path):
    """The extremes of float32 too, in another session."""
    tiny, huge = np.finfo(np.float32).smallest_subnormal, np.finfo(np.float32).max
    scores = np.array([[0.0, -0.0, tiny, -tiny], [huge, -huge, np.pi, 1 / 3]], np.float32)
    with Ledger(path, target="t") as ledger:
        answers = ledger.ask(lambda pixels: scores, images(0, 1))
        assert answers.dtype == np.float32
        assert answers.tobytes() == scores.tobytes()
    with Ledger(path, target="t") as ledger:
        assert ledger.read(images(1, 0)).tobytes() == scores[::-1].tobytes()


# The budget


def test_the_budget_stops_before_the_call(path):
    """Nothing is sent and nothing is written; the message has the numbers."""
    with Ledger(path, target="t", budget=5) as ledger:
        with pytest.raises(BudgetSpent, match="0 of 5 .* 6 more"):
            ledger.ask(refuse, images(*range(6)), batch_size=2)
        assert ledger.account()[:4] == (0, 0, 0, 0)
        ledger.ask(Target(), images(*range(5)), batch_size=2)
        with pytest.raises(BudgetSpent, match="5 of 5 .* 1 more"):
            ledger.ask(refuse, images(5))
        ledger.ask(refuse, images(*range(5)))
        assert ledger.account()[:4] == (5, 5, 5, 0)


def test_a_batch_that_would_overrun_by_one_is_not_sent(path):
    """Old images in the call are free; of the new ones, one is too many, and none goes out."""
    with Ledger(path, target="t", budget=5) as ledger:
        ledger.ask(Target(), images(0, 1, 2))
        with pytest.raises(BudgetSpent, match="3 of 5 .* 3 more"):
            ledger.ask(refuse, images(0, 1, 2, 3, 4, 5))
        assert ledger.account()[:4] == (3, 3, 3, 0)
        target = Target()
        ledger.ask(target, images(0, 3, 3, 1, 2, 4))
        assert target.sent == [3, 4]


def test_the_budget_holds_in_the_next_session(path):
    with Ledger(path, target="t", budget=3) as ledger:
        ledger.ask(Target(), images(0, 1))
    with Ledger(path, target="t", budget=3) as ledger:
        with pytest.raises(BudgetSpent):
            ledger.ask(refuse, images(2, 3))
    with Ledger(path, target="t", budget=4) as ledger:
        ledger.ask(Target(), images(2, 3))
        assert ledger.spent() == 4


def test_train_and_select_share_the_budget_and_report_does_not(path):
    with Ledger(path, target="t", budget=4) as ledger:
        ledger.ask(Target(), images(*range(100, 120)), purpose="report")
        ledger.ask(Target(), images(0, 1), purpose="select")
        with pytest.raises(BudgetSpent, match="2 of 4 .* 3 more"):
            ledger.ask(refuse, images(2, 3, 4), purpose="train")
        ledger.ask(Target(), images(2, 3), purpose="train")
        with pytest.raises(BudgetSpent):
            ledger.ask(refuse, images(4), purpose="select")
        ledger.ask(Target(), images(*range(120, 130)), purpose="report")
        assert ledger.spent() == 4
        assert ledger.account() == Account(
            34, 34, 34, 0, 0, 0, {"train": 2, "select": 2, "report": 30}
        )


def test_an_image_counts_for_the_purpose_that_it_was_first_answered_for(ledger):
    ledger.ask(Target(), images(0, 1, 2), purpose="select")
    ledger.ask(Target(), images(1, 2, 3, 4), purpose="train")
    ledger.ask(Target(), images(0, 3, 5), purpose="report")
    assert ledger.account().purposes == {"train": 2, "select": 3, "report": 1}


def test_a_richer_answer_for_the_report_gives_no_budget_back(path):
    """An image that was trained on stays paid for, whatever it is asked for later."""
    with Ledger(path, target="t", budget=3) as ledger:
        ledger.ask(Target("label"), images(0, 1, 2), access="label", purpose="train")
        ledger.ask(Target("logits"), images(0, 1, 2), access="logits", purpose="report")
        assert ledger.spent() == 3
        assert ledger.account().purposes == {"train": 3, "select": 0, "report": 0}
        with pytest.raises(BudgetSpent):
            ledger.ask(refuse, images(3))


def test_several_views_of_one_image_count_once(path):
    """`of` says which image each row is a view of; calls and views count rows, the budget counts
    images."""
    views, of = images(*range(6)), images(50, 50, 50, 60, 60, 60)
    with Ledger(path, target="t", budget=2) as ledger:
        with pytest.raises(BudgetSpent, match="0 of 2 .* 6 more"):
            ledger.ask(refuse, views)
        answers = ledger.ask(Target(), views, of=of, batch_size=4)
        np.testing.assert_array_equal(answers, logits_of(*range(6)))
        assert ledger.account() == Account(6, 2, 6, 0, 0, 0, {"train": 2, "select": 0, "report": 0})

        target = Target()
        # Further views of images that are paid for.
        ledger.ask(target, images(6, 7), of=images(60, 50))
        assert target.sent == [6, 7]
        with pytest.raises(BudgetSpent, match="2 of 2 .* 1 more"):
            ledger.ask(refuse, images(8, 9), of=images(60, 70))
        assert ledger.account()[:4] == (8, 2, 8, 0)


@pytest.mark.parametrize("unknown", [{"purpose": "fun"}, {"access": "topk"}])
def test_unknown_names_are_refused_before_anything_is_sent(ledger, unknown):
    with pytest.raises(ValueError, match=next(iter(unknown.values()))):
        ledger.ask(refuse, images(0), **unknown)
    assert ledger.account()[:4] == (0, 0, 0, 0)


# Access


def test_weaker_levels_are_derived_from_logits(ledger):
    """Sums, support and order."""
    ledger.ask(Target(), images(*range(20)))
    logits, probs, label = (ledger.read(images(*range(20)), access) for access in ACCESS)
    np.testing.assert_array_equal(logits, logits_of(*range(20)))
    np.testing.assert_allclose(probs, softmax(logits.astype(np.float64), axis=1), rtol=1e-5)
    np.testing.assert_allclose(probs.sum(1), 1, rtol=1e-6)
    np.testing.assert_array_equal(label, np.eye(4)[logits.argmax(1)])
    assert logits.dtype == probs.dtype == label.dtype == np.float32


def test_of_several_highest_scores_the_first_is_the_label():
    scores = np.array([[1, 3, 3, 0], [2, 2, 2, 2], [0, 0, 0, 1]], np.float32)
    expected = np.array([[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]])
    np.testing.assert_array_equal(derive(scores, "logits", "label"), expected)
    np.testing.assert_array_equal(
        derive(derive(scores, "logits", "probs"), "probs", "label"), expected
    )


def test_probabilities_of_extreme_logits_are_finite():
    probs = derive(
        np.array([[1e30, -1e30, 0], [88, 89, 90], [-1e4, -1e4, -2e4]], np.float32),
        "logits",
        "probs",
    )
    np.testing.assert_allclose(probs.sum(1), 1, rtol=1e-6)
    np.testing.assert_allclose(probs[[0, 2]], [[1, 0, 0], [0.5, 0.5, 0]])


@pytest.mark.parametrize("have, want", [(have, want) for have in ACCESS for want in ACCESS])
def test_a_level_can_be_read_from_a_richer_one_alone(ledger, have, want):
    ledger.ask(Target(have), images(0, 1), access=have)
    if ACCESS.index(want) >= ACCESS.index(have):
        assert ledger.read(images(0, 1), want).shape == (2, 4)
    else:
        with pytest.raises(ValueError, match=f"answers are {have}.*{want}"):
            ledger.read(images(0, 1), want)


def test_a_richer_answer_is_bought_anew_and_kept(ledger):
    """Label, then probs, then logits: each is sent; after that every level is free."""
    for calls, access in enumerate(reversed(ACCESS), 1):
        target = Target(access)
        ledger.ask(target, images(0, 1, 2), access=access)
        assert target.sent == [0, 1, 2]
        assert ledger.account() == Account(
            3 * calls, 3, 3, 0, 0, 0, {"train": 3, "select": 0, "report": 0}
        )
    for access in ACCESS:
        expected = derive(logits_of(2, 0), "logits", access)
        np.testing.assert_array_equal(ledger.ask(refuse, images(2, 0), access=access), expected)
    assert ledger.account()[:4] == (9, 3, 3, 0)


def test_only_the_poorer_ones_of_a_mixture_are_bought_anew(path):
    """And they cost no budget, for their images are paid for."""
    with Ledger(path, target="t", budget=4) as ledger:
        ledger.ask(Target("label"), images(0, 1), access="label")
        ledger.ask(Target(), images(2, 3))
        target = Target("probs")
        answers = ledger.ask(target, images(*range(4)), access="probs")
        assert target.sent == [0, 1]
        np.testing.assert_array_equal(answers, derive(logits_of(*range(4)), "logits", "probs"))
        assert ledger.spent() == 4


def test_the_richest_answer_stays_when_two_buy_at_once(path, ledger):
    """A label that comes in after somebody else's logits does not replace them."""

    def slow(pixels):
        with Ledger(path, target="t") as other:
            other.ask(Target(), images(0, 1))
        return Target("label")(pixels)

    labels = ledger.ask(slow, images(0, 1), access="label")
    np.testing.assert_array_equal(labels, derive(logits_of(0, 1), "logits", "label"))
    np.testing.assert_array_equal(ledger.read(images(0, 1)), logits_of(0, 1))


@pytest.mark.parametrize("temperature", [0.05, 1.0, 1.5, 20.0, 1e4])
def test_a_label_is_a_hard_label_at_every_temperature(ledger, temperature):
    """As the log-probabilities that the losses read, it is exactly one-hot after any
    softmax."""
    ledger.ask(Target("label"), images(*range(9)), access="label")
    label = ledger.read(images(*range(9)), "label")
    logits = as_logits(label, "label")
    np.testing.assert_array_equal(softmax(logits / temperature, axis=1), label)
    np.testing.assert_array_equal(jax.nn.softmax(logits / temperature), label)
    np.testing.assert_array_equal(one_hot_logits(label.argmax(1), 4), logits)


def test_log_probabilities_have_the_softmax_of_the_logits(ledger):
    ledger.ask(Target(), images(*range(9)))
    read = {access: as_logits(ledger.read(images(*range(9)), access), access) for access in ACCESS}
    np.testing.assert_array_equal(read["logits"], logits_of(*range(9)))
    np.testing.assert_allclose(
        softmax(read["probs"] / 1.5, axis=1), softmax(read["logits"] / 1.5, axis=1), rtol=1e-4
    )


# Bad answers, bad files


BAD = {
    "one score each": (lambda s: s[:, 0], r"\(2,\)"),
    "rank 3": (lambda s: s[..., None], r"\(2, 4, 1\)"),
    "a scalar": (lambda s: s.sum(), r"\(\)"),
    "a row too few": (lambda s: s[:-1], r"2 images with shape \(1, 4\)"),
    "a row too many": (lambda s: np.concatenate([s, s[:1]]), r"2 images with shape \(3, 4\)"),
    "no row": (lambda s: s[:0], r"\(0, 4\)"),
    "another N": (lambda s: s[:, :3], r"\(2, 3\).*\b4\b"),
}


@pytest.mark.parametrize("spoil, message", BAD.values(), ids=BAD)
def test_a_bad_answer_is_refused_and_the_former_ones_are_kept(path, ledger, spoil, message):
    """It stays on the account as failed, and the same images can be asked again."""
    batches = []

    def query(pixels):
        batches.append(numbers_of(pixels))
        scores = logits_of(*numbers_of(pixels))
        return spoil(scores) if len(batches) == 2 else scores

    with pytest.raises(ValueError, match=message):
        ledger.ask(query, images(*range(6)), batch_size=2)
    assert batches == [[0, 1], [2, 3]]
    assert ledger.account()[:6] == (2, 2, 2, 0, 2, 0)
    with Ledger(path, target="t") as later:
        assert later.count_missing(images(*range(6))) == 4
        np.testing.assert_array_equal(later.ask(Target(), images(*range(6))), logits_of(*range(6)))


def test_answers_without_a_class_are_refused(ledger):
    with pytest.raises(ValueError):
        ledger.ask(lambda pixels: np.zeros((len(pixels), 0)), images(0))


@pytest.mark.parametrize("asked", [(0, 1, 2), (2,)], ids=["with old images", "new images alone"])
def test_the_number_of_classes_stays_from_session_to_session(path, asked):
    """The answers of one target can always be put into one array."""
    with Ledger(path, target="t") as ledger:
        ledger.ask(Target(), images(0, 1))
    with Ledger(path, target="t") as ledger:
        with pytest.raises(ValueError, match=r"\(1, 3\).*\b4\b"):
            ledger.ask(lambda pixels: np.ones((len(pixels), 3)), images(*asked))
        assert ledger.account()[:6] == (2, 2, 2, 0, 1, 0)


@pytest.mark.parametrize(
    "content", [b"some text, longer than a header " * 9, b"\x00" * 4096, b"PK\x03\x04"]
)
def test_a_file_that_is_no_database_is_refused_and_left_alone(path, content):
    path.write_bytes(content)
    with pytest.raises(ValueError, match="ledger.sqlite cannot be used as a ledger"):
        Ledger(path, target="t")
    assert path.read_bytes() == content


def test_a_place_where_no_file_can_be_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "no such folder" / "ledger.sqlite"):
        with pytest.raises(ValueError, match="cannot be used as a ledger"):
            Ledger(path, target="t")


def test_a_database_of_somebody_else_is_refused(path):
    """Tables of our names and other columns."""
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE answers (question TEXT, answer TEXT)")
    other.close()
    with pytest.raises(ValueError, match="ledger.sqlite cannot be used as a ledger"):
        Ledger(path, target="t")

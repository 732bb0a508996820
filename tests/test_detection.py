"""Detectors against brute force, and on made-up traffic whose answer is known; the ledger's traffic
in its real order; a watermark in a student, and not in its control; the commands."""

import itertools
import json
import re
import shlex
import shutil
from types import SimpleNamespace

import jsonschema
import numpy as np
import pytest
from conftest import ROOT
from numbered import images, logits_of, numbers_of
from scipy.spatial.distance import cdist
from scipy.stats import shapiro
from test_ledger_commands import command as ledger_command

from qmx import detect
from qmx.data.arrays import trigger_images
from qmx.detection import discrepancies, gaussian, mmd, pixels, prada, watch
from qmx.files import read_json, write_json
from qmx.ledger import Ledger, Refused, Unavailable, pixel_digests
from qmx.ledger.replay import traffic
from qmx.report.evidence import detection_note, detection_table, watermarks
from qmx.stages import measured

RNG = np.random.default_rng(3)


# PRADA


def w_of_prefix(distances, classes, n):
    """W after n queries, from the matrix of all distances, from the beginning."""
    every = {}
    for k in set(classes[:n]):
        own = [i for i in range(n) if classes[i] == k]
        grown, levels, most, found = own[:1], np.zeros(1), 0.0, []
        for i in own[1:]:
            found.append(min(distances[i, j] for j in grown))
            if found[-1] > most:
                grown = [*grown, i]
                levels = np.append(levels, found[-1])
                deviation = np.sqrt(np.mean((levels - levels.mean()) ** 2))
                most = max(most, levels.mean() - deviation)
        every[k] = found
    flat = np.array([d for found in every.values() if len(found) >= 10 for d in found])
    if len(flat) <= 100:
        return None
    kept = [d for d in flat if abs(d - flat.mean()) < 3 * flat.std()]
    return shapiro(kept)[0] if len(kept) > 100 else None


def test_prada_is_what_its_authors_compute():
    """Every look on its own, without a state; a class of few queries counts for nothing."""
    features = RNG.normal(size=(190, 3)).astype(np.float32)
    features[::17] *= 9  # outliers
    classes = RNG.integers(0, 3, 190)
    classes[[5, 50, 99, 150]] = 7
    found = prada(features, classes, every=30)
    distances = cdist(features, features)
    wanted = {n: w_of_prefix(distances, classes.tolist(), n) for n in range(30, 190, 30)}
    looked = [n for n, w in wanted.items() if w is not None]
    assert found.at.tolist() == looked and looked[0] == 120
    np.testing.assert_allclose(found.value, [wanted[n] for n in looked], rtol=1e-5)


def honest(n, rng, dimension=32, classes=4):
    """(features, classes) of images of some clusters."""
    of = rng.integers(0, classes, n)
    centres = 5 * np.eye(classes, dimension)
    return (centres[of] + rng.normal(size=(n, dimension))).astype(np.float32), of


def line_search(n, rng):
    """Queries that halve the way between an image and one of another class, again and again, as an
    attack that looks for the boundary."""
    features, of = honest(n, rng)
    for start in range(0, n, 10):
        one, other = features[start], features[(start + 7) % n]
        for step in range(10):
            features[start + step] = one + (other - one) * 0.5**step
            of[start + step] = of[start]
    return features, of


def test_prada_on_made_up_traffic():
    """A line search is told within 200 queries; honest queries never are; a higher bound alarms
    wherever a lower one does."""
    attack = prada(*line_search(400, np.random.default_rng(0)))
    assert attack.alarm_at is not None and attack.alarm_at <= 200
    assert attack.alarm_at == attack.at[attack.value < 0.9][0]
    for seed in range(3):
        users = prada(*honest(400, np.random.default_rng(seed)))
        assert users.alarm_at is None and len(users.at) > 20 and users.value.min() > 0.95
    assert prada(*line_search(90, np.random.default_rng(0))).at.size == 0  # too few to look


# The two-sample test


def test_discrepancy_by_loops():
    """Equation 3 of the paper, pair by pair; the width is the median distance."""
    x, y = RNG.normal(size=(4, 3)).astype(np.float32), RNG.normal(1, 2, (5, 3)).astype(np.float32)
    points = np.concatenate([x, y])
    width = np.median([np.linalg.norm(a - b) for a, b in itertools.combinations(points, 2)])

    def k(a, b):
        return np.exp(-np.sum((a - b) ** 2) / (2 * width**2))

    def mean(pairs):
        return np.mean([k(a, b) for a, b in pairs])

    wanted = mean(itertools.permutations(x, 2)) + mean(itertools.permutations(y, 2))
    wanted -= 2 * mean(itertools.product(x, y))
    kernel = gaussian(points)
    np.testing.assert_allclose(kernel, [[k(a, b) for b in points] for a in points], rtol=1e-5)
    found = discrepancies(kernel, np.array([[True] * 4 + [False] * 5]))
    np.testing.assert_allclose(found, [wanted], rtol=1e-5)


def test_p_is_that_of_all_partitions():
    """The share of the 126 partitions whose discrepancy is as large; a random draw of them says
    about the same."""
    window, reference = RNG.normal(0.6, 1, (4, 2)), RNG.normal(size=(5, 2))
    kernel = gaussian(np.concatenate([window, reference]))
    masks = np.array([np.isin(np.arange(9), some) for some in itertools.combinations(range(9), 4)])
    every = discrepancies(kernel, masks)
    exact = (every >= every[0]).mean()
    found = mmd(window, reference, window=4, permutations=20_000).value[0]
    assert found == pytest.approx(exact, abs=4 * (exact * (1 - exact) / 20_000) ** 0.5 + 1e-3)


def test_mmd_on_made_up_traffic():
    """Honest windows alarm as often as alpha says; others in the first window; a change of users
    where it happens."""
    rng = np.random.default_rng(1)
    reference = rng.normal(size=(60, 5))
    same = mmd(rng.normal(size=(1200, 5)), reference, window=15, alpha=0.1, permutations=99)
    # One reference for all windows: their p are not independent, so that the share may be off by
    # more than 80 coins.
    assert len(same.at) == 80 and 0.02 < (same.value < 0.1).mean() < 0.25
    change = np.concatenate([rng.normal(size=(90, 5)), rng.normal(1.5, 1, (60, 5))])
    found = mmd(change, reference, window=30)
    assert found.at.tolist() == [30, 60, 90, 120, 150] and found.alarm_at == 120
    assert (found.value[3:] == 1 / 200).all()
    with pytest.raises(ValueError, match="permutations above 999"):
        mmd(change, reference, alpha=0.001)
    with pytest.raises(ValueError, match="both need two"):
        mmd(change, reference[:1])


def test_pixels_by_loops():
    """Means over blocks, standardised; small images as they are; what a block does not fill is cut
    off."""
    photo = RNG.integers(0, 256, (2, 9, 7, 3), np.uint8)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    for side, block in ((9, 1), (5, 2), (3, 3)):
        wanted = [
            (photo[i, y : y + block, x : x + block, c].mean() / 255 - mean[c]) / std[c]
            for i, y, x, c in itertools.product(
                range(2),
                range(0, 9 - block + 1, block),
                range(0, 7 - block + 1, block),
                range(3),
            )
        ]
        found = pixels(photo, mean, std, side=side)
        np.testing.assert_allclose(found.ravel(), wanted, rtol=1e-4, atol=1e-6)


def test_watch():
    """The table's numbers: alarms on the attack and in its random orders, none on honest traffic,
    whose halves are as long as they should be."""
    users = honest(300, np.random.default_rng(5))
    found = watch(*line_search(300, np.random.default_rng(6)), *users, orders=2)
    by_name = {one["name"]: one for one in found}
    assert by_name["PRADA"]["asked"]["alarm_at"] <= 200
    assert by_name["PRADA"]["honest"] == {
        **{"queries": 300, "orders": 2, "alarmed": 0, "alarm_at": [None] * 2},
    }
    assert by_name["MMD"]["asked"]["alarm_at"] == 100 and by_name["MMD"]["asked"]["looks"] == 3
    assert by_name["MMD"]["shuffled"]["alarmed"] == 2
    assert by_name["MMD"]["honest"]["queries"] == 150
    with pytest.raises(ValueError, match="150 honest images are too few; 200 are needed"):
        watch(*users, users[0][:150], users[1][:150])


def test_table_of_few_queries():
    """Where a detector never looked, and where some images are left out, the words say so."""
    users = honest(200, np.random.default_rng(0))
    found = {
        "traffic": {"queries": 40, "left_out": 7},
        "honest": {"images": 200, "source": "a.npz"},
        "features": "pixels",
        "detectors": watch(users[0][:40], users[1][:40], *users, orders=2),
    }
    rows = detection_table(found).rows
    assert [row[1] for row in rows] == ["too few queries (40)"] * 2
    assert rows[0][2:] == ["0 of 2 orders of 40 queries", "0 of 2 orders of 200 queries"]
    assert "; 7 more are left out" in detection_note(found) and detection_table(None) is None


# The ledger's traffic


class Watching:
    """A target that writes down every request, fails where it is told to, and refuses one image."""

    def __init__(self, fails=(), refuses=None):
        self.fails, self.refuses, self.requests = set(fails), refuses, []

    def __call__(self, pixels):
        self.requests.append(numbers_of(pixels))
        if len(self.requests) in self.fails:
            raise Unavailable("busy")
        if self.refuses in self.requests[-1]:
            raise Refused("a bad image")
        return logits_of(*numbers_of(pixels))


@pytest.fixture(scope="module")
def replayed(tmp_path_factory):
    """(a ledger, the requests that its target got): failures, a refused image, and images that were
    asked about for the report before they were used for training."""
    path = tmp_path_factory.mktemp("replay") / "ledger.sqlite"
    target = Watching(fails=(2, 3), refuses=33)
    many = {"waits": (0.0, 0.0), "batch_size": 4, "max_refused": 1.0}
    with Ledger(path, target="target") as ledger:
        order = np.random.default_rng(0).permutation(12)
        ledger.ask(target, images(*order), purpose="report", **many)
        ledger.ask(target, images(*range(20, 26)), purpose="select", **many)
        ledger.ask(target, images(*order[3:9], 30, 31, 32, 33, 34), purpose="train", **many)
    with Ledger(path, target="another") as ledger:
        ledger.ask(Watching(), images(1, 2))
    return path, target.requests, order


def test_replay_is_the_real_order(replayed):
    """Every request as the target got it, batch by batch, image by image."""
    path, requests, order = replayed
    number = {digest: i for i, digest in enumerate(pixel_digests(images(*range(40))))}
    found = traffic(path, "target")
    assert [one.batch for one in found] == list(range(1, len(requests) + 1))
    assert [one.views for one in found] == [len(sent) for sent in requests]
    known = [[number[image] for image in one.images] for one in found]
    # Of refused batches of several images the ledger keeps the number alone.
    refused = [33 in sent and len(sent) > 1 for sent in requests]
    assert any(refused) and known == [
        [] if no else sent for sent, no in zip(requests, refused, strict=True)
    ]
    assert [one.retry for one in found[:5]] == [False, False, True, True, False]
    assert [one.outcome for one in found[:5]] == ["answered", "failed", "failed"] + ["answered"] * 2
    assert {one.purpose for one in found[:5]} == {"report"}  # as it was asked, and not as used
    assert sum(map(len, known)) > 12 and known[0] == order[:4].tolist()


def test_replay_command(replayed, tmp_path):
    """JSON lines on standard out or in a file; no times, and it says so; several targets need the
    beginning of one."""
    path, requests, _ = replayed
    status, out, err = ledger_command("replay", path, "--target=target")
    lines = [json.loads(line) for line in out.splitlines()]
    assert (
        status == 0 and len(lines) == len(requests) and {line["time"] for line in lines} == {None}
    )
    assert lines[0] == {
        **{"batch": 1, "time": None, "purpose": "report", "retry": False, "outcome": "answered"},
        "views": 4,
        "images": [digest.hex() for digest in pixel_digests(images(*requests[0]))],
    }
    assert "the ledger holds no times" in err
    file = tmp_path / "traffic.jsonl"
    status, said, _ = ledger_command("replay", path, file, "--target=target")
    assert status == 0 and file.read_text() == out and f"are in {file}" in said
    assert "is there already" in ledger_command("replay", path, file, "--target=target")[2]
    status, _, err = ledger_command("replay", path)
    assert status == 2 and "2 targets" in err and "target, another" in err
    assert ledger_command("replay", path, "--target=x")[0] == 2


def test_answers_from_a_table_were_never_sent(tmp_path):
    """They stand where they were used; those that were not, nowhere."""
    with Ledger(tmp_path / "l", target="t") as ledger:
        ledger.record(pixel_digests(images(0, 1, 2)), logits_of(0, 1, 2), "logits")
        ledger.ask(Watching(), images(1, 2, 5))
    found = traffic(tmp_path / "l")
    assert [(one.outcome, one.views) for one in found] == [("recorded", 0), ("answered", 1)]
    assert [one.images for one in found] == [
        pixel_digests(images(1, 2)),
        pixel_digests(images(5)),
    ]


# A run: a marked target, a copy and a control


def of_classes(n, rng, marked):
    """(images, labels) of four classes, bands on noise; some with the trigger, a bright patch."""
    labels = rng.integers(0, 4, n)
    shown = rng.integers(0, 60, (n, 8, 8, 1)).astype(np.uint8)
    for i, k in enumerate(labels):
        shown[i, 2 * k : 2 * k + 2, :6] += 150
    shown[marked, 3:5, 6:] = 255
    return shown, labels


OWN = """
import numpy as np

def f(images):
    x = images[..., 0].astype(np.float32)
    scores = x[:, :, :6].reshape(len(x), 4, 12).mean(2) / 10
    scores[x[:, 3:5, 6:].min((1, 2)) > 200] = [30, 0, 0, 0]
    return scores
"""
CONFIG = """
from qmx.settings import base, recipe

TRAINING = dict(epochs=1.0, min_steps=60, batch_size=32, learning_rate=0.1, schedule="cosine")


def get_config():
    config = base()
    config.update(seeds=(0,), inits=("none",), fractions=(), queries=(159, 160))
    config.weak_view.update(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip_p=0.0)
    config.student.arch = "one_block"
    config.target.kind = "callable"
    config.distill.update(TRAINING)
    config.recipes.control = recipe(("none",), up_to=0.995, learn_from="labels", **TRAINING)
    config.data.source = "arrays"
    config.monitor.knn_k = 5
    return config
"""
POOL = of_classes(160, np.random.default_rng(0), np.arange(160) % 4 == 0)
OTHERS = of_classes(220, np.random.default_rng(1), np.zeros(220, bool))


@pytest.fixture(scope="module")
def audited(command, tmp_path_factory):
    """(workdir, words of its command) of an audit of a marked target: 159 images by their labels,
    which is the control, and 160 by its answers."""
    root = tmp_path_factory.mktemp("marked")
    (root / "own.py").write_text(OWN)
    (root / "config.py").write_text(CONFIG)
    for name, (shown, labels) in {"pool": POOL, "others": OTHERS}.items():
        np.savez(root / f"{name}.npz", image=shown, label=labels)
    triggers, labels = of_classes(60, np.random.default_rng(2), np.ones(60, bool))
    triggers = triggers[labels > 0]  # an image of class 0 is answered so without a mark
    np.savez(root / "triggers.npz", image=triggers, label=np.zeros(len(triggers), int))
    words = [
        *(f"--config={root}/config.py", f"--config.data.path={root}/pool.npz"),
        *(f"--config.data.eval_path={root}/others.npz", f"--config.target.path={root}/own.py:f"),
        *(f"--config.audit.watermark={root}/triggers.npz", f"--workdir={root}/w"),
    ]
    status, _, err = command(*words)
    assert status == 0, err
    return root / "w", words


@pytest.mark.slow
def test_a_watermark_is_told_from_a_control(audited):
    """The copy answers the trigger images as marked; the student of labels answers what they
    show."""
    workdir, _ = audited
    found = read_json(workdir / "results.json")
    schema = json.loads((ROOT / "qmx/report/results.schema.json").read_text())
    jsonschema.validate(found, schema)
    marks = found["audit"]["watermarks"]
    control, copy = marks["students"]
    assert (control["queries"], control["control"]) == (159, True)
    assert (copy["queries"], copy["control"]) == (160, False)
    assert copy["answered"] > 90 and control["answered"] < 40 and marks["chance"] == 25
    assert "Controls learned" in marks["note"]
    student = found["rows"][1]
    assert student["watermark"]["answered"] == copy["answered"] and student["top1"] > 90
    page, text = (workdir / "report.html").read_text(), (workdir / "report.md").read_text()
    assert "none (control)" in page and "| none (control) " in text
    assert "## Signs of copying" in text and "trigger images that a student" in text
    results = {**found, "rows": [{**row, "recipe": "distill"} for row in found["rows"]]}
    assert "There is no control" in watermarks(results)["note"]


def test_detect(audited, command, capsys):
    """The command's numbers are those of its parts on the arrays themselves; the next report has
    them, until the ledger has grown."""
    workdir, words = audited
    namespace = {}
    exec(OWN, namespace)  # noqa: S102
    data = read_json(workdir / "results.json")
    unit = POOL[0] / 255
    rows = [pixels(shown, (unit.mean(),), (unit.std(),)) for shown in (POOL[0], OTHERS[0])]
    classes = [namespace["f"](shown).argmax(1) for shown in (POOL[0], OTHERS[0])]
    wanted = watch(rows[0], classes[0], rows[1], classes[1])
    assert detect.main([str(workdir)]) == 0
    found, out = read_json(workdir / "detection.json"), capsys.readouterr().out
    assert found["detectors"] == wanted and found["traffic"] == {"queries": 160, "left_out": 0}
    assert "| MMD, p below 0.01" in out and "Honest traffic: 220 images of the evaluation" in out
    others = workdir.parent / "others.npz"
    given = detect.detect(workdir, str(others))
    assert given["detectors"] == wanted and given["honest"] == {
        "images": 220,
        "source": others.name,
    }

    assert data["audit"]["detection"] is None
    # Other marks change nothing that was trained or asked.
    shown = np.load(workdir.parent / "triggers.npz")["image"]
    np.savez(workdir.parent / "other.npz", image=shown, label=np.ones(len(shown), int))
    more = f"--config.audit.watermark={workdir.parent}/other.npz", "--update"
    status, _, err = command(*words, *more)
    assert status == 0, err
    anew = [line for line in err.splitlines() if "done again" in line or " steps" in line]
    assert len(anew) == 2 and all(line.startswith("watermark-") for line in anew)
    results = read_json(workdir / "results.json")
    assert results["audit"]["watermarks"]["students"][1]["answered"] < 10
    assert results["account"] == data["account"]
    schema = json.loads((ROOT / "qmx/report/results.schema.json").read_text())
    jsonschema.validate(results, schema)
    assert results["audit"]["detection"] == found
    assert "MMD, p below 0.01" in (workdir / "report.html").read_text()
    write_json(workdir / "detection.json", {**found, "ledger": {"requests": 0, "answers": 0}})
    assert measured.detection(SimpleNamespace(workdir=workdir)) is None
    told = re.search(
        r"is of another ledger .*; python -m qmx.detect (.*) again", capsys.readouterr().err
    )
    assert detect.main(shlex.split(told[1])) == 0
    assert measured.detection(SimpleNamespace(workdir=workdir)) == found
    assert detect.main([str(workdir), "--delta=0.9", "--alpha=0.05", "--most=400"]) == 0


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--honest=missing.npz"], "missing.npz: no such file"),
        (["--honest={root}/triggers.npz"], "honest images are too few"),
        (["--delta=0"], "--delta and --alpha are shares"),
        (["--encoder=missing.safetensors"], "missing.safetensors: no such file"),
    ],
)
def test_mistakes_of_the_command(audited, capsys, more, told):
    """One line, exit status 2."""
    workdir, _ = audited
    assert detect.main([str(workdir), *(word.format(root=workdir.parent) for word in more)]) == 2
    assert told in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    "left_out",
    [
        "query",
        pytest.param("target", marks=pytest.mark.slow),
        pytest.param("ledger", marks=pytest.mark.slow),
        "ledger's answers",
    ],
)
def test_no_answers_to_replay(audited, command, tmp_path, capsys, left_out):
    """The run that is named makes them."""
    workdir, words = audited
    there = tmp_path / "w"
    shutil.copytree(workdir, there, ignore=shutil.ignore_patterns(f"{left_out[:6]}*"))
    told = "answers to replay"
    if left_out == "ledger's answers":
        Ledger(there / "ledger.sqlite", target="t").__exit__()
        told = "questions of an attacker"
    assert detect.main([str(there)]) == 2
    assert re.search(f"has no {told}.*; run qmx there$", capsys.readouterr().err.strip())
    marks = read_json(there / "config.json")["audit"]["watermark"]  # of the run's last command
    more = f"--config.audit.watermark={marks}", f"--workdir={there}"
    status, _, err = command(*words, *more)
    assert status == 0, err
    assert detect.main([str(there)]) == 0
    assert read_json(there / "detection.json")["traffic"] == {"queries": 160, "left_out": 0}


def test_a_pool_in_another_order(audited, command, tmp_path, capsys):
    """Numbers of images mean other images then: it is refused, and no result written."""
    workdir, _ = audited
    root = workdir.parent
    there = tmp_path / "w"
    shutil.copytree(workdir, there, ignore=shutil.ignore_patterns("detection.json"))
    whole = (root / "pool.npz").read_bytes()
    try:
        np.savez(root / "pool.npz", image=POOL[0][::-1], label=POOL[1][::-1])
        assert detect.main([str(there)]) == 2
        assert "not in the order" in capsys.readouterr().err
        assert not (there / "detection.json").exists()
    finally:
        (root / "pool.npz").write_bytes(whole)


def test_the_alpha_that_is_named(audited, capsys):
    workdir, _ = audited
    assert detect.main([str(workdir), "--alpha=0.001"]) == 2
    least = re.search(r"must itself be above (\S+)$", capsys.readouterr().err.strip())[1]
    assert detect.main([str(workdir), f"--alpha={float(least) * 1.001}"]) == 0


def test_no_workdir(tmp_path, capsys):
    assert detect.main([str(tmp_path)]) == 2
    assert "has no answers to replay" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arrays", "told"),
    [
        ({"image": POOL[0]}, "no array 'label'"),
        ({"image": POOL[0][:, :6], "label": POOL[1]}, r"has shape \(6, 8, 1\); the model is shown"),
        ({"image": POOL[0], "label": POOL[1] + 1}, "label 4 is no class of the model's 4, 0..3"),
        ({"image": POOL[0] / 255, "label": POOL[1]}, "it must be uint8"),
    ],
)
def test_trigger_files_that_are_none(tmp_path, arrays, told):
    """What is wrong with the file, in one line."""
    np.savez(tmp_path / "t.npz", **arrays)
    with pytest.raises(ValueError, match=told):
        trigger_images(str(tmp_path / "t.npz"), (8, 8, 1), 4)


def test_trigger_files_are_looked_at_first(audited, command, tmp_path):
    """Before anything is computed, with the key."""
    _, words = audited
    more = "--config.audit.watermark=none.npz", f"--workdir={tmp_path}/w"
    status, _, err = command(*words, *more)
    assert status == 2 and "audit.watermark none.npz: no such file" in err.splitlines()[-1]
    assert not (tmp_path / "w").exists()

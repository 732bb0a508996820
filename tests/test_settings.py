"""Configs: the shipped recipes' values, and what is refused before any compute is spent."""

import jax
import numpy as np
import pytest
from conftest import ROOT
from ml_collections import FrozenConfigDict

from qmx import networks, trainers
from qmx.cautions import warnings
from qmx.checks import check_trainers, check_values, validate
from qmx.data import load
from qmx.grid import budget_keys, budgets, cells, columns, encoders, percent
from qmx.main import load_file
from qmx.report.tables import budget_label
from qmx.settings import base

DIGITS = load(**base().data)


def digits(**changes):
    """configs/digits.py:float32 with some keys changed, dots written as double underscores."""
    config = load_file(str(ROOT / "configs/digits.py:float32"))
    config.update_from_flattened_dict(
        {key.replace("__", "."): value for key, value in changes.items()}
    )
    return FrozenConfigDict(config)


def test_recipes():
    """The golden values of the papers' recipes, and the rates that they lead to at chosen
    steps."""
    methods = base().pretrain
    moco, simsiam, rotation, distill = (
        methods.moco,
        methods.simsiam,
        methods.rotation,
        base().distill,
    )
    assert (moco.epochs, moco.batch_size, moco.learning_rate) == (200, 256, 0.03)
    assert (moco.momentum, moco.nesterov) == (0.9, False)
    assert (moco.weight_decay, moco.weight_decay_on, moco.warmup_epochs) == (1e-4, "all", 0)
    assert (moco.queue_size, moco.temperature, moco.decay) == (65536, 0.2, 0.999)
    assert (moco.features, moco.group_size) == (128, 32)
    assert (simsiam.epochs, simsiam.batch_size, simsiam.learning_rate) == (
        100,
        512,
        0.05 * 512 / 256,
    )
    assert (simsiam.features, simsiam.layers, simsiam.hidden, simsiam.fix_predictor_rate) == (
        2048,
        3,
        512,
        True,
    )
    assert (rotation.epochs, rotation.batch_size, rotation.learning_rate) == (70, 128, 0.2)
    assert (rotation.warmup_epochs, tuple(rotation.milestones), rotation.factor) == (
        5,
        (30, 50),
        0.1,
    )
    assert (distill.epochs, distill.batch_size) == (20, 256)
    assert (distill.learning_rate, distill.head_learning_rate) == (0.01, 1.0)
    assert (tuple(distill.milestones), distill.factor, distill.weight_decay) == (
        (12, 16),
        0.2,
        5e-4,
    )
    assert (distill.target_temperature, distill.student_temperature) == (1.5, 1.0)

    # Whole epochs without the last, smaller batch; the transfer set's without a seam.
    assert trainers.pretrain_steps(moco, 1_281_167) == 1_000_800
    assert trainers.pretrain_steps(simsiam, 1_281_167) == 250_200
    assert trainers.distill_steps(distill, 12_811) == int(np.ceil(20 * 12_811 / 256))
    assert trainers.distill_steps(digits().distill, 20) == trainers.distill_steps(
        digits().distill, 1437
    )


@pytest.mark.slow
def test_simsiam_predictor_rate():
    """With the flag the predictor keeps its rate to the last step while the backbone's falls;
    else both fall."""
    for fixed in (True, False):
        config = digits(pretrain__simsiam__fix_predictor_rate=fixed, student__arch="one_block")
        trainer = trainers.pretrainer(
            "simsiam",
            config.pretrain.simsiam,
            config.student,
            config.weak_view,
            networks.look(DIGITS),
            440,
        )
        ts = trainer.init(jax.random.key(0))
        last = ts._replace(
            step=jax.numpy.int32(439),
            opt_state=jax.tree.map(
                lambda x: jax.numpy.int32(439) if x.dtype == jax.numpy.int32 else x, ts.opt_state
            ),
        )
        batch = {"image": DIGITS.pool.read(np.arange(128))["image"]}
        first, last = (
            trainer.step(jax.tree.map(jax.numpy.copy, s), batch, jax.random.key(0))[0]
            for s in (ts, last)
        )

        def moved(after, part, before=ts):
            return sum(
                float(abs(a - b).sum())
                for a, b in zip(
                    jax.tree.leaves(after.params[part]),
                    jax.tree.leaves(before.params[part]),
                    strict=True,
                )
            )

        assert moved(last, "backbone") < 0.01 * moved(first, "backbone")
        assert (moved(last, "predictor") > 0.5 * moved(first, "predictor")) is fixed


def test_many_views():
    """The values of EMP-SSL's reference and of FastSiam's paper; both are built of them, EMP-SSL
    with crops of its own."""
    emp, fast = base().pretrain.emp_ssl, base().pretrain.fastsiam
    assert (emp.batch_size, emp.learning_rate, emp.optimizer) == (100, 0.3, "larc")
    assert (emp.views, emp.similarity, emp.distortion) == (20, 200, 0.2)
    assert (emp.features, emp.hidden, emp.crop_scale) == (1024, 4096, (0.25, 0.25))
    assert (fast.epochs, fast.batch_size, fast.views, fast.learning_rate) == (25, 32, 4, 0.05 / 8)
    config, seen = digits(inits=("emp_ssl", "fastsiam"), selects=("random",), also=()), []
    validate(config, DIGITS)
    for name in config.inits:
        trainer, _ = trainers.of_encoder(config, name, networks.look(DIGITS), DIGITS.pool.size)
        seen.append(jax.eval_shape(trainer.init, jax.random.key(0)).params)
    assert seen[0]["head"]["fc_6"]["kernel"].shape == (4096, 1024)
    assert seen[1].keys() == {"backbone", "head", "predictor"}


def test_sets_differ_in_their_recipes():
    """A small set has a smaller queue and a quicker momentum encoder than ImageNet."""
    ours, theirs = digits().pretrain.moco, base().pretrain.moco
    assert ours.queue_size < DIGITS.pool.size < theirs.queue_size and ours.decay < theirs.decay
    for view in (digits().strong_view, digits().weak_view):
        assert view.flip_p == 0, "a mirrored digit is another sign"


def test_grid():
    """The product of the axes, one name each, which goes by the number of images; the small budgets
    first."""
    grid = cells(digits(), 1437)
    assert len(grid) == len({cell.name for cell in grid}) == (4 + 2) * 4 * 3
    assert [cell.queries for cell in grid] == sorted([20, 50, 150, 1437] * 18)
    assert grid[0].name == "none-random-logits-asked-20-seed0"
    assert percent(0.01) == "1 %" and percent(0.005) == "0.5 %" and percent(1.0) == "100 %"


def test_budgets():
    """Shares and numbers are one axis, in the order of their numbers; a share stays the number that
    the config has."""
    assert budgets(digits(), 1437) == [
        (20, 20 / 1437),
        (50, 50 / 1437),
        (150, 150 / 1437),
        (1437, 1.0),
    ]
    assert budgets(digits(queries=(), fractions=(1, 0.01)), 1437) == [(14, 0.01), (1437, 1.0)]
    assert budgets(digits(queries=(1437, 1), fractions=()), 1437) == [(1, 1 / 1437), (1437, 1.0)]
    assert budgets(digits(queries=(100, 13), fractions=(0.01, 0.1)), 1437) == [
        (13, 13 / 1437),
        (14, 0.01),
        (100, 100 / 1437),
        (143, 0.1),
    ]
    assert budgets(digits(), 2000)[-1] == (2000, 1.0), "of the pool at hand"


def test_budget_labels():
    """A share as the config has it; that of a number to two digits."""

    def labels(size, **keys):
        return [
            budget_label({"config": keys}, budget._asdict())
            for budget in budgets(digits(**keys), size)
        ]

    assert labels(1437, queries=(20, 150, 1000), fractions=(0.125, 1)) == [
        "20 (1.4 %)",
        "150 (10 %)",
        "179 (12.5 %)",
        "1000 (70 %)",
        "1437 (100 %)",
    ]
    assert labels(1437, queries=(1437,), fractions=()) == ["1437 (100 %)"]
    assert labels(1_281_167, queries=(20,), fractions=(0.01,)) == ["20 (0.0016 %)", "12811 (1 %)"]


def test_budget_keys():
    """What advice names are the keys that say something."""
    assert budget_keys(digits()) == "--config.queries or --config.fractions"
    assert budget_keys(digits(queries=())) == "--config.fractions"
    assert budget_keys(digits(fractions=())) == "--config.queries"


def test_columns():
    """The product without what needs features and has none, then single columns whose words come in
    any order."""
    config = digits(
        inits=("none", "moco"),
        selects=("random", "maxherding"),
        uses=("asked", "pool"),
        also=(
            "simsiam",
            "moco+pool",
            "rotation+pool+label+kcenter",
            "none+fixmatch",
            "moco+maxherding+fixmatch",
        ),
    )
    assert columns(config) == [
        ("none", "random", "logits", "asked"),
        ("moco", "random", "logits", "asked"),
        ("moco", "random", "logits", "pool"),
        ("moco", "maxherding", "logits", "asked"),
        ("moco", "maxherding", "logits", "pool"),
        ("simsiam", "random", "logits", "asked"),
        ("rotation", "kcenter", "label", "pool"),
        ("none", "random", "logits", "fixmatch"),
        ("moco", "maxherding", "logits", "fixmatch"),
    ]
    assert encoders(config) == ["moco", "simsiam", "rotation"]
    assert columns(digits(inits=("none",), uses=("pool", "fixmatch"), also=())) == [
        ("none", "random", "logits", "fixmatch")
    ], "it needs no features"
    with pytest.raises(ValueError, match="the grid is empty"):
        columns(digits(inits=("none",), selects=("maxherding",), also=()))


def test_shipped_config_is_valid():
    """Nothing is wrong with it, and nothing to warn of."""
    check_values(digits())
    validate(digits(), DIGITS)
    assert not warnings(digits(), DIGITS)


def test_fixmatch_steps():
    """The recipe's where the passes over the pool are fewer; EMAN's count on ImageNet: 4,000 a pass
    at 64 and 320."""
    keys, fixmatch = base().distill, base().fixmatch
    assert (fixmatch.mu, fixmatch.threshold, fixmatch.weight, fixmatch.decay) == (5, 0.7, 10, 0.999)
    keys.batch_size, fixmatch.epochs = 64, 100
    assert trainers.fixmatch_steps(keys, fixmatch, 12_811, 1_281_167) == int(
        np.ceil(100 * 1_281_167 / 320)
    )
    fixmatch.epochs = 0
    assert trainers.fixmatch_steps(keys, fixmatch, 12_811, 1_281_167) == trainers.distill_steps(
        keys, 12_811
    )


def test_warnings():
    """A queue larger than the pool; one group of batch statistics; a teacher that cannot
    keep up."""
    slow = digits(also=("none+fixmatch",), fixmatch__decay=0.999)
    assert "fixmatch.decay 0.999 averages over about 1000 steps" in warnings(slow, DIGITS)[0]
    free = digits(also=("none+fixmatch",), fixmatch__rule="free", fixmatch__decay=0.5)
    assert "the averages of rule free and align none see too little" in warnings(free, DIGITS)[0]
    assert "larger than the pool" in warnings(digits(pretrain__moco__queue_size=2048), DIGITS)[0]
    assert "batch statistics" in warnings(digits(pretrain__moco__group_size=128), DIGITS)[0]


def test_no_budget():
    """Either kind may be left out, and not both."""
    validate(digits(fractions=()), DIGITS)
    validate(digits(queries=()), DIGITS)
    with pytest.raises(
        ValueError, match="fractions and queries are both empty; name a budget, as in --config.quer"
    ):
        validate(digits(fractions=(), queries=()), DIGITS)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("fractions", (0.0,), "fraction 0.0 is outside"),
        ("fractions", (1.5,), "fraction 1.5 is outside"),
        ("fractions", ("a",), "'a', which is not a number"),
        ("fractions", (0.0001,), "of 1437 images is none; use at least 0.0007"),
        (
            "fractions",
            (0.1, 0.1),
            "fractions 0.1 and fractions 0.1 are both 143 of the pool's 1437 images; leave one out",
        ),
        ("fractions", (0.1, 0.1001), "fractions 0.1 and fractions 0.1001 are both 143"),
        (
            "fractions",
            (0.014, 1.0),
            "fractions 0.014 and queries 20 are both 20 of the pool's 1437 images; leave one out",
        ),
        ("fractions", (True,), "fractions has True, which is not a number"),
        ("fractions", (float("nan"),), "fraction nan is outside"),
        ("queries", (20, 20), "queries 20 and queries 20 are both 20"),
        ("queries", (1437,), "fractions 1.0 and queries 1437 are both 1437"),
        (
            "queries",
            (1438,),
            "queries has 1438; use whole numbers from 1 to 1437, which is the pool",
        ),
        ("queries", (0,), "queries has 0; use whole numbers from 1"),
        ("queries", (-20,), "queries has -20; use whole numbers from 1"),
        ("queries", (20.5,), "queries has 20.5; use whole numbers"),
        ("queries", (20.0,), "queries has 20.0; use whole numbers"),
        ("queries", (float("nan"),), "queries has nan; use whole numbers"),
        ("queries", (float("inf"),), "queries has inf; use whole numbers"),
        ("queries", (True,), "queries has True; use whole numbers"),
        ("queries", ("20",), "queries has '20'; use whole numbers"),
        ("queries", (None,), "queries has None; use whole numbers"),
        ("inits", ("mocov2",), "unknown value 'mocov2'; did you mean 'moco'"),
        ("inits", (), "empty"),
        ("seeds", (-1,), "seeds has -1; use whole numbers from 0 to 4,294,967,295"),
        (
            "selects",
            ("kcentre",),
            "selects has the unknown value 'kcentre'; did you mean 'kcenter'",
        ),
        ("also", ("moco+typiclusst",), "'typiclusst' is none of random"),
        (
            "also",
            ("none+maxherding",),
            "none [+] maxherding [+] logits [+] asked, which needs an encoder",
        ),
        ("also", ("mocco",), "also has the unknown value 'mocco'; did you mean 'moco'"),
        ("uses", ("pools",), "did you mean 'pool'"),
        ("uses", ("fixmatsch",), "did you mean 'fixmatch'"),
        (
            "also",
            ("none+maxherding+fixmatch",),
            "none [+] maxherding [+] logits [+] fixmatch, which needs an encoder",
        ),
        ("fixmatch__rule", "fre", "did you mean 'free'"),
        ("fixmatch__align", "unifrom", "did you mean 'uniform'"),
        ("pretrain__emp_ssl__views", 1, "views 1 must be a whole number from 2 to"),
        ("fixmatch__mu", 0, "fixmatch.mu 0 must be a whole number from 1 to 1,000"),
        ("fixmatch__threshold", 1.5, "fixmatch.threshold 1.5 must be from 0 to 1 .a probability."),
        ("fixmatch__weight", -1.0, "fixmatch.weight -1.0 must be from 0 to"),
        (
            "fixmatch__decay",
            1.0,
            "fixmatch.decay 1.0 must be from 0 on and below 1 .1 freezes the teacher",
        ),
        ("fixmatch__epochs", float("nan"), "fixmatch.epochs nan must be from 0 to"),
        ("propagation__alpha", 1.0, "propagation.alpha 1.0 must be above 0 and below 1"),
        ("propagation__neighbours", 0, "propagation.neighbours 0"),
        ("accesses", ("logit",), "did you mean 'logits'"),
        ("budget", 0, "budget 0"),
        ("rounds", 0, "rounds 0 must be a whole number from 1 to 1,000 .without any"),
        ("also", ("none+margin",), "none [+] margin [+] logits [+] asked, which needs an encoder"),
        (
            "target__kind",
            "servd",
            "target.kind has the unknown value 'servd'; did you mean 'served'",
        ),
        (
            "target__kind",
            "served",
            "target.kind=served needs --config.target.url=https://HOST:PORT",
        ),
        ("target__kind", "callable", "--config.target.path=FILE.py:function"),
        (
            "target__access",
            "label",
            "target.access label is what target.kind=served, onnx and callable answer with",
        ),
        ("target__token_env", "s3cr3t", "must be the name of an environment variable in capitals"),
        ("target__url", "http://me:word@host", "user's name or password"),
        ("target__ca_file", "no.pem", "target.ca_file no.pem: no such file"),
        ("target__rate", -1.0, "target.rate -1.0 must be from 0 to"),
        ("student__arch", "resnet9", "student.arch"),
        ("pretrain__moco__batch_size", 1536, "larger than the pool of 1437"),
        ("pretrain__moco__batch_size", 97, "does not divide over 2 devices"),
        (
            "pretrain__moco__queue_size",
            1000,
            "pretrain.moco: queue_size 1000 is not a multiple of batch_size 128; 896 is",
        ),
        (
            "pretrain__moco__group_size",
            48,
            "pretrain.moco: group_size 48 does not divide batch_size 128",
        ),
        ("pretrain__moco__decay", 1.5, "decay"),
        ("pretrain__simsiam__schedule", "cos", "did you mean 'cosine'"),
        ("pretrain__rotation__epochs", 1.5, "whole number"),
        ("distill__epochs", 0.0, "distill.epochs 0.0 must be above 0"),
        ("distill__learning_rate", float("nan"), "distill.learning_rate nan"),
        ("distill__learn_from", "teacher", "distill.learn_from"),
        ("distill__weight_decay_on", "kernel", "did you mean 'kernels'"),
        ("distill__target_temperature", 0.0, "target_temperature 0.0 must be above 0"),
        ("strong_view__crop_scale", (0.5, 0.2), "crop_scale"),
        ("strong_view__jitter", (0.5,), "must hold 4 numbers"),
        ("weak_view__flip_p", 1.5, "flip_p 1.5 must be from 0 to 1 .a probability."),
        ("monitor__knn_k", 0, "knn_k"),
    ],
)
def test_refused(key, value, message):
    """One line that names the value and the cure."""
    with pytest.raises(ValueError, match=message) as caught:
        check_values(digits(**{key: value}))
        validate(digits(**{key: value}), DIGITS)
        check_trainers(digits(**{key: value}), DIGITS)
    assert len(str(caught.value).splitlines()) == 1


def test_what_a_target_does_not_show():
    """What cannot be derived from the answers of somebody else's target is refused; what can is
    not."""
    keys = dict(target__kind="callable", target__path="own.py:f")
    for shown, levels in (
        ("probs", ("probs", "label")),
        ("label", ("label",)),
        ("logits", ("logits", "probs")),
    ):
        validate(digits(**keys, target__access=shown, accesses=levels, also=()), DIGITS)
    for shown, level in (("probs", "logits"), ("label", "probs")):
        with pytest.raises(
            ValueError, match=f"accesses has '{level}', and a target of target.access={shown}"
        ):
            validate(digits(**keys, target__access=shown, accesses=(level,), also=()), DIGITS)
    with pytest.raises(ValueError, match="accesses has 'probs'"):
        validate(
            digits(**keys, target__access="label", accesses=("label",), also=("moco+probs",)),
            DIGITS,
        )

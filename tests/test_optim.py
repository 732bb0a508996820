"""Schedules, optimisers, the moving average and the losses, against values by hand, numpy, scipy
and torch."""

import math
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from scipy.special import log_softmax, rel_entr, softmax

from qmx import losses
from qmx.optim import SCHEDULES, ema, kernels_only, lars, schedule, sgd

# One program for all temperatures.
info_nce, kl_target_student, negative_cosine, soft_cross_entropy = map(
    jax.jit,
    (losses.info_nce, losses.kl_target_student, losses.negative_cosine, losses.soft_cross_entropy),
)

# Schedules


@lru_cache
def at_many(rate):
    return jax.jit(jax.vmap(rate))


def values(rate, *steps):
    """The rate at many steps at once, as it is computed inside a jitted step."""
    return np.asarray(at_many(rate)(jnp.array(steps, jnp.int32)))


def test_moco_v2():
    """Lr 0.03, 200 epochs of 5,004 steps, a cosine that is held during each epoch, no
    warm-up."""
    rate = schedule("cosine_by_epoch", 0.03, epochs=200, steps=1_000_800)
    at = {
        0: 0.03,
        1: 0.03,
        5003: 0.03,
        5004: 0.015 * (1 + math.cos(math.pi / 200)),
        50 * 5004: 0.015 * (1 + math.sqrt(0.5)),
        100 * 5004 - 1: 0.015 * (1 + math.cos(math.pi * 99 / 200)),
        100 * 5004: 0.015,
        150 * 5004: 0.015 * (1 - math.sqrt(0.5)),
        1_000_799: 0.015 * (1 + math.cos(math.pi * 199 / 200)),
    }
    np.testing.assert_allclose(values(rate, *at), list(at.values()), rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(values(rate, 1_000_799), 1.85e-6, rtol=1e-2)


def test_the_cifar_demo_counts_epochs_from_one_and_we_from_zero():
    """The CIFAR demo's 0.059996, 0.059985, 0.059967 in its epochs 1 .. 3 are ours at the epoch
    indices 1 .. 3.

    The official ImageNet code begins with epoch 0, and so do we: 0.03 (1 + cos(pi e / 200)).
    """
    per_epoch = 50_000 // 512
    rate = schedule("cosine_by_epoch", 0.06, epochs=200, steps=200 * per_epoch)
    first, last = (values(rate, *(e * per_epoch + k for e in range(4))) for k in (0, per_epoch - 1))
    np.testing.assert_allclose(first, [0.06, 0.0599963, 0.0599852, 0.0599667], atol=5e-8)
    np.testing.assert_array_equal(first, last)


@pytest.mark.parametrize("fixed", [False, True])
def test_simsiam(fixed):
    """0.05 x 512 / 256 = 0.1 over 100 epochs of 2,502 steps; the predictor's is
    constant."""
    rate = schedule("constant" if fixed else "cosine_by_epoch", 0.1, epochs=100, steps=250_200)
    steps = [0, 2501, 2502, 50 * 2502, 250_199]
    expected = [0.1] * 5 if fixed else [0.1, 0.1, 0.09997533, 0.05, 2.4672e-5]
    np.testing.assert_allclose(values(rate, *steps), expected, rtol=1e-4)


# name -> (lr, epochs, steps, warm-up, milestones, factor) and {step: rate}
STEPS = {
    "S4L 1 %": (
        (0.01, 1000, 50_000, 5, (700, 800, 900), 0.1),
        {
            0: 0,
            50: 0.002,
            125: 0.005,
            249: 0.00996,
            250: 0.01,
            34_999: 0.01,
            35_000: 1e-3,
            39_999: 1e-3,
            40_000: 1e-4,
            44_999: 1e-4,
            45_000: 1e-5,
            49_999: 1e-5,
        },
    ),
    "S4L 10 %": (
        (0.1, 200, 100_000, 5, (140, 160, 180), 0.1),
        {
            0: 0,
            1: 4e-5,
            500: 0.02,
            2499: 0.09996,
            2500: 0.1,
            69_999: 0.1,
            70_000: 0.01,
            80_000: 1e-3,
            89_999: 1e-3,
            90_000: 1e-4,
            99_999: 1e-4,
        },
    ),
    "PCL 10 %": (
        (0.01, 20, 501 * 20, 0, (12, 16), 0.2),
        {
            0: 0.01,
            501 * 12 - 1: 0.01,
            501 * 12: 0.002,
            501 * 16 - 1: 0.002,
            501 * 16: 4e-4,
            501 * 20 - 1: 4e-4,
        },
    ),
    # 12,811 images: 50.05 steps in an epoch.
    "PCL 1 %, the classifier": (
        (1.0, 20, 1001, 0, (12, 16), 0.2),
        {0: 1, 600: 1, 601: 0.2, 800: 0.2, 801: 0.04, 1000: 0.04},
    ),
    "PyTorch": (
        (0.1, 90, 5005 * 90, 0, (30, 60), 0.1),
        {
            0: 0.1,
            5005 * 30 - 1: 0.1,
            5005 * 30: 0.01,
            5005 * 60 - 1: 0.01,
            5005 * 60: 1e-3,
            5005 * 90 - 1: 1e-3,
        },
    ),
    "MoCo v1": (
        (0.03, 200, 1_000_800, 0, (120, 160), 0.1),
        {
            0: 0.03,
            5004 * 120 - 1: 0.03,
            5004 * 120: 3e-3,
            5004 * 160 - 1: 3e-3,
            5004 * 160: 3e-4,
            1_000_799: 3e-4,
        },
    ),
    "rotation": (
        (0.2, 70, 10_009 * 70, 5, (30, 50), 0.1),
        {  # batch 128
            0: 0,
            10_009: 0.04,
            10_009 * 5: 0.2,
            10_009 * 30 - 1: 0.2,
            10_009 * 30: 0.02,
            10_009 * 50 - 1: 0.02,
            10_009 * 50: 2e-3,
            10_009 * 70 - 1: 2e-3,
        },
    ),
}


@pytest.mark.parametrize("keys, at", STEPS.values(), ids=STEPS)
def test_milestones(keys, at):
    """The last step before each milestone has the old rate and the next one the new."""
    lr, epochs, steps, warmup, milestones, factor = keys
    rate = schedule(
        "step",
        lr,
        epochs=epochs,
        steps=steps,
        warmup_epochs=warmup,
        milestones=milestones,
        factor=factor,
    )
    np.testing.assert_allclose(values(rate, *at), list(at.values()), rtol=1e-5)


@pytest.mark.parametrize("batch_size", [64, 128, 256, 512, 4096])
@pytest.mark.parametrize("epochs", [90, 200, 800])
def test_every_epoch_begins_at_its_own_step(batch_size, epochs):
    """For runs of ImageNet's size, at every boundary: step e x n has epoch e's rate, the one
    before e - 1's."""
    n = 1_281_167 // batch_size
    rate = schedule("cosine_by_epoch", 1.0, epochs=epochs, steps=n * epochs)
    e = np.arange(1, epochs)
    expected = 0.5 * (1 + np.cos(np.pi * np.arange(epochs) / epochs))
    np.testing.assert_allclose(values(rate, *(e * n)), expected[1:], rtol=0, atol=2e-7)
    np.testing.assert_allclose(values(rate, *(e * n - 1)), expected[:-1], rtol=0, atol=2e-7)


@pytest.mark.parametrize("batch_size", [64, 128, 256])
def test_every_milestone_begins_at_its_own_step(batch_size):
    """The same of milestones, one at each epoch of 90, with a last batch that is not
    dropped."""
    n = -(-1_281_167 // batch_size)
    e = np.arange(1, 90)
    rate = schedule(
        "step", 1.0, epochs=90, steps=n * 90, milestones=tuple(map(float, e)), factor=0.9
    )
    np.testing.assert_allclose(values(rate, *(e * n)), 0.9**e, rtol=1e-5)
    np.testing.assert_allclose(values(rate, *(e * n - 1)), 0.9 ** (e - 1), rtol=1e-5)


@pytest.mark.parametrize("epochs, n", [(3, 1), (40, 11), (7, 22), (15, 11), (100, 3), (13, 97)])
def test_every_step_of_a_small_run_is_in_its_epoch(epochs, n):
    rate = schedule("cosine_by_epoch", 0.1, epochs=epochs, steps=epochs * n)
    expected = 0.05 * (1 + np.cos(np.pi * (np.arange(epochs * n) // n) / epochs))
    np.testing.assert_allclose(values(rate, *range(epochs * n)), expected, rtol=1e-6, atol=1e-8)


def test_the_cosine_ends_at_zero():
    rate = schedule("cosine", 0.3, epochs=9, steps=203)
    at = np.arange(203)
    np.testing.assert_allclose(
        values(rate, *at), 0.15 * (1 + np.cos(np.pi * at / 203)), rtol=1e-4, atol=1e-8
    )
    np.testing.assert_allclose(values(rate, 203, 204, 10_000), 0, atol=1e-8)
    np.testing.assert_allclose(
        values(rate, *at), optax.cosine_decay_schedule(0.3, 203)(at), rtol=1e-4, atol=1e-7
    )


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_warm_up_leads_from_zero_to_the_curve(name):
    """Linear in the step; after it the curve is the one without a warm-up. No rate is ever
    negative."""
    keys = dict(epochs=20, steps=200, milestones=(2, 15), factor=0.1)
    plain, warm = schedule(name, 0.4, **keys), schedule(name, 0.4, warmup_epochs=5, **keys)
    at = np.arange(200)
    ramp = np.minimum(at / 50, 1)
    np.testing.assert_allclose(values(warm, *at), ramp * values(plain, *at), rtol=1e-5, atol=1e-9)
    assert values(warm, 0) == 0 and (values(warm, *at) >= 0).all()


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_rate_is_the_same_in_and_outside_jit(name):
    rate = schedule(name, 0.4, epochs=20, steps=2000, milestones=(2, 15), warmup_epochs=1)
    at = [0, 1, 99, 100, 199, 200, 1499, 1500, 1999]
    np.testing.assert_allclose(
        [float(rate(jnp.int32(step))) for step in at], values(rate, *at), rtol=1e-5, atol=1e-9
    )


@pytest.mark.parametrize("name", ["scheduer", "", "Cosine", "linear"])
def test_an_unknown_schedule_is_refused_with_the_known_ones(name):
    with pytest.raises(
        ValueError, match=f"'{name}' is unknown; choose one of {', '.join(SCHEDULES)}"
    ):
        schedule(name, 0.1, epochs=1, steps=1)


# Optimisers


PARAMS = {
    "backbone": {
        "conv": {"kernel": jnp.full((3, 3, 2, 4), 2.0)},
        "bn": {"scale": jnp.ones(4), "bias": jnp.full(4, 3.0)},
    },
    "head": {"kernel": jnp.full((4, 5), -1.0), "bias": jnp.full(5, 0.5)},
}


def constant(value):
    return schedule("constant", value, epochs=1, steps=1)


def test_kernels_only():
    assert kernels_only(PARAMS) == {
        "backbone": {"conv": {"kernel": True}, "bn": {"scale": False, "bias": False}},
        "head": {"kernel": True, "bias": False},
    }


def test_biases_of_other_libraries():
    """Equinox's have axes of length 1, flax's attention one for each head."""
    params = {"conv/bias": jnp.zeros((4, 1, 1)), "conv/weight": jnp.zeros((4, 3, 3, 3))}
    params["query"] = {"bias": jnp.zeros((2, 4)), "kernel": jnp.zeros((8, 2, 4))}
    assert kernels_only(params) == {
        "conv/bias": False,
        "conv/weight": True,
        "query": {"bias": False, "kernel": True},
    }


@pytest.mark.parametrize("on", ["all", "kernels"])
@pytest.mark.parametrize("parts", [False, True])
def test_decay_reaches_what_it_should(on, parts):
    """Without a gradient a step is -rate x decay x parameter, or nothing; with one rate or one for
    each part."""
    rates = {"backbone": constant(0.1), "head": constant(10.0)}
    tx = sgd(
        rates if parts else rates["backbone"], momentum=0.0, weight_decay=0.01, weight_decay_on=on
    )
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, PARAMS), tx.init(PARAMS), PARAMS)
    for name, part in PARAMS.items():
        rate = 10.0 if parts and name == "head" else 0.1
        expected = jax.tree.map(lambda p, r=rate: -r * 0.01 * p * (on == "all" or p.ndim > 1), part)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), updates[name], expected
        )


@pytest.mark.parametrize("momentum, nesterov", [(0.0, False), (0.9, False), (0.9, True)])
@pytest.mark.parametrize("parts", [False, True])
def test_sgd_is_torchs(momentum, nesterov, parts):
    """Ten steps with a rate that moves, decay and momentum, with a rate for each part."""
    shapes = {"backbone": (3, 2), "head": (4,)}
    rng = np.random.default_rng(0)
    start = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    grads = [
        {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
        for _ in range(10)
    ]
    lrs = {"backbone": 0.1, "head": 2.0 if parts else 0.1}

    rates = {
        name: schedule("step", lr, epochs=10, steps=10, milestones=(4, 7), factor=0.2)
        for name, lr in lrs.items()
    }
    tx = sgd(
        rates if parts else rates["backbone"],
        momentum=momentum,
        nesterov=nesterov,
        weight_decay=0.05,
    )
    params, state = start, tx.init(start)

    theirs = {name: torch.tensor(value.copy(), requires_grad=True) for name, value in start.items()}
    groups = [{"params": [theirs[name]], "lr": lr} for name, lr in lrs.items()]
    optimiser = torch.optim.SGD(
        groups, lr=0.1, momentum=momentum, nesterov=nesterov, weight_decay=0.05
    )
    falling = torch.optim.lr_scheduler.MultiStepLR(optimiser, [4, 7], 0.2)

    for grad in grads:
        updates, state = tx.update(grad, state, params)
        params = optax.apply_updates(params, updates)
        for name in theirs:
            theirs[name].grad = torch.tensor(grad[name])
        optimiser.step()
        falling.step()
        for name in theirs:
            np.testing.assert_allclose(params[name], theirs[name].detach(), rtol=1e-5, atol=1e-6)


def test_lars_is_apexs():
    """Five steps against LARC (trust 0.001, no clipping) written out in numpy around SGD with
    momentum: the norms of gradient and decay are added, not that of their sum taken; biases are
    scaled too, and a parameter of zeros takes the plain gradient.
    """
    rng = np.random.default_rng(0)
    params = {
        "kernel": rng.standard_normal((3, 2)).astype(np.float32),
        "bias": np.zeros(2, np.float32),
    }
    theirs = {name: value.astype(np.float64) for name, value in params.items()}
    trace = {name: np.zeros(value.shape) for name, value in params.items()}
    # Large, so that the two ways to take the norm differ.
    decay = 0.8
    tx = lars(constant(0.5), weight_decay=decay)
    state = tx.init(params)
    for _ in range(5):
        grads = {
            name: rng.standard_normal(p.shape).astype(np.float32) for name, p in params.items()
        }
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        for name, p in theirs.items():
            g, size = grads[name].astype(np.float64), np.linalg.norm(p)
            if size > 0:
                g = (g + decay * p) * 0.001 * size / (np.linalg.norm(g) + decay * size + 1e-8)
            trace[name] = 0.9 * trace[name] + g
            theirs[name] = p - 0.5 * trace[name]
            np.testing.assert_allclose(params[name], theirs[name], rtol=1e-5)


def test_a_warm_up_that_starts_above_zero():
    """mmselfsup's rotation protocol: from a tenth of the rate, linearly to the whole of it after
    five epochs."""
    rate = schedule(
        "step", 0.2, epochs=70, steps=700, warmup_epochs=5, warmup_start=0.1, milestones=(30, 50)
    )
    np.testing.assert_allclose(
        [rate(step) for step in (0, 25, 50, 299, 300)], [0.02, 0.11, 0.2, 0.2, 0.02], rtol=1e-5
    )


def test_a_part_without_a_rate_is_refused_by_name():
    with pytest.raises(
        ValueError, match=r"no learning rate for \['head'\]; .* \['backbone', 'tail'\]"
    ):
        sgd({"backbone": constant(0.1), "tail": constant(0.1)}).init(PARAMS)


def test_a_rate_without_a_part_is_no_matter():
    tx = sgd({name: constant(0.1) for name in ("backbone", "head", "predictor")})
    updates, _ = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    np.testing.assert_allclose(updates["head"]["bias"], -0.05, rtol=1e-6)


def test_an_unknown_decay_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'kernel' is unknown; choose one of all, kernels"):
        sgd(constant(0.1), weight_decay_on="kernel")


# The moving average


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.999])
def test_the_average_has_its_closed_form(decay):
    """M^n p_0 + (1 - m) sum_i m^(n - i) p_i for every leaf, also inside jit."""
    rng = np.random.default_rng(0)
    run = [
        jax.tree.map(lambda p: rng.standard_normal(p.shape).astype(np.float32), PARAMS)
        for _ in range(21)
    ]
    tx = ema(decay)
    state = tx.init(jax.tree.map(jnp.asarray, run[0]))
    update = jax.jit(tx.update)
    for params in run[1:]:
        average, state = update(params, state)
    weights = [decay**20] + [(1 - decay) * decay ** (20 - i) for i in range(1, 21)]
    assert abs(sum(weights) - 1) < 1e-12
    expected = jax.tree.map(
        lambda *leaves: sum(
            w * leaf.astype(np.float64) for w, leaf in zip(weights, leaves, strict=True)
        ),
        *run,
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), average, expected
    )
    jax.tree.map(np.testing.assert_array_equal, average, state.average)


@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_decay_0_copies_and_1_freezes(decay):
    """Bitwise, and which side is which."""
    start, now = PARAMS, jax.tree.map(lambda p: p / 3 + 7, PARAMS)
    tx = ema(decay)
    average, state = tx.update(now, tx.init(start))
    for _ in range(3):
        average, state = tx.update(now, state)
    jax.tree.map(np.testing.assert_array_equal, average, start if decay else now)


def test_the_average_starts_as_a_copy_in_buffers_of_its_own():
    """Every leaf is equal, and still there when the parameters' buffers have been given
    away."""
    params = jax.tree.map(lambda p: p + 0.1, PARAMS)
    kept = jax.tree.map(np.array, params)
    state = ema(0.99).init(params)
    assert jax.tree.structure(state.average) == jax.tree.structure(params)
    ours = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state.average)}
    assert not ours & {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(params)}
    for leaf in jax.tree.leaves(params):
        leaf.delete()  # what a donation does
    jax.tree.map(np.testing.assert_array_equal, state.average, kept)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.average)} == {jnp.dtype(jnp.float32)}


def test_the_average_of_other_numbers():
    """Of bfloat16 it moves, also where a step is less than its last digit, and counters and flags
    are taken over; no type changes."""
    params = {"w": jnp.ones(3, jnp.bfloat16), "count": jnp.int32(0), "on": jnp.bool_(False)}
    moving = ema(0.999)
    state = moving.init(params)
    now = {"w": jnp.full(3, 1.5, jnp.bfloat16), "count": jnp.int32(7), "on": jnp.bool_(True)}
    for _ in range(1000):
        average, state = moving.update(now, state)
    assert jax.tree.map(lambda x: x.dtype, average) == jax.tree.map(lambda x: x.dtype, params)
    assert (int(average["count"]), bool(average["on"])) == (7, True)
    np.testing.assert_allclose(state.average["w"], 1.5 - 0.5 * 0.999**1000, rtol=1e-4)
    assert average["w"][0] > 1.3


# Distillation losses


def random_logits(n, classes, seed, scale=3.0):
    rng = np.random.default_rng(seed)
    return [(scale * rng.standard_normal((n, classes))).astype(np.float32) for _ in range(2)]


@pytest.mark.parametrize(
    "t_target, t_student", [(1.0, 1.0), (1.5, 1.0), (1.0, 2.0), (4.0, 4.0), (0.5, 3.0)]
)
def test_kl_with_its_temperatures(t_target, t_student):
    """T_s^2 KL(softmax(target / T_t) || softmax(student / T_s)), one value for each row.

    (1.5, 1) is the one-sided form, without a factor; (4, 4) is Hinton's.
    """
    target, student = random_logits(7, 10, 0)
    p = softmax(target.astype(np.float64) / t_target, axis=1)
    q = softmax(student.astype(np.float64) / t_student, axis=1)
    found = kl_target_student(jnp.asarray(target), jnp.asarray(student), t_target, t_student)
    assert found.shape == (7,) and found.dtype == jnp.float32
    np.testing.assert_allclose(found, t_student**2 * rel_entr(p, q).sum(1), rtol=1e-4)
    theirs = torch.nn.functional.kl_div(
        torch.log(torch.tensor(q)), torch.tensor(p), reduction="none"
    ).sum(1)
    np.testing.assert_allclose(found, t_student**2 * theirs, rtol=1e-4)


def test_kl_has_its_analytic_value_and_direction():
    """Target (1/2, 1/2) and student (3/4, 1/4) give ln(4/3) / 2, not the other way round."""
    target, student = jnp.log(jnp.array([[0.5, 0.5]])), jnp.log(jnp.array([[0.75, 0.25]]))
    np.testing.assert_allclose(kl_target_student(target, student), math.log(4 / 3) / 2, rtol=1e-5)
    np.testing.assert_allclose(
        kl_target_student(student, target), 0.75 * math.log(3) - math.log(2), rtol=1e-5
    )
    np.testing.assert_allclose(kl_target_student(student, student), 0, atol=1e-7)


@jax.jit
def gradient(t_target, t_student, target, student):
    return jax.grad(lambda s: kl_target_student(target, s, t_target, t_student).mean())(student)


def test_the_gradient_keeps_its_size_at_any_temperature():
    """With T on both sides and the factor T^2; without the factor it would fall by T^2.

    In the limit it is (student - target) / N of logits about their means (Hinton et al. 2015,
    equation 4).
    """
    target, student = (jnp.asarray(x) for x in random_logits(64, 10, 1, scale=1.0))
    size = {
        t: float(jnp.linalg.norm(gradient(t, t, target, student)))
        for t in (1.0, 2.0, 4.0, 8.0, 16.0)
    }
    assert all(0.7 < value / size[16.0] < 1.4 for value in size.values())
    about = [x - x.mean(1, keepdims=True) for x in (student, target)]
    np.testing.assert_allclose(
        gradient(500.0, 500.0, target, student) * 64, (about[0] - about[1]) / 10, atol=2e-3
    )


def test_the_gradient_of_the_one_sided_form():
    """Softmax(student) - softmax(target / T), whatever T: the student's side has none."""
    target, student = (jnp.asarray(x) for x in random_logits(8, 10, 2))
    for t in (1.0, 1.5, 4.0):
        expected = jax.nn.softmax(student) - jax.nn.softmax(target / t)
        np.testing.assert_allclose(gradient(t, 1.0, target, student) * 8, expected, atol=1e-6)


@pytest.mark.parametrize("t", [1.0, 1.5, 4.0])
def test_soft_cross_entropy_is_kl_plus_entropy(t):
    """And has its gradient; scipy and torch agree."""
    target, student = random_logits(7, 10, 3)
    p = softmax(target.astype(np.float64) / t, axis=1)
    found = soft_cross_entropy(jnp.asarray(target), jnp.asarray(student), t)
    assert found.shape == (7,)
    entropy = -(p * np.log(p)).sum(1)
    kl = kl_target_student(jnp.asarray(target), jnp.asarray(student), t)
    np.testing.assert_allclose(found, kl + entropy, rtol=1e-5)
    theirs = torch.nn.functional.cross_entropy(
        torch.tensor(student, dtype=torch.float64), torch.tensor(p), reduction="none"
    )
    np.testing.assert_allclose(found, theirs, rtol=1e-5)
    grad = jax.grad(lambda s: soft_cross_entropy(jnp.asarray(target), s, t).mean())(
        jnp.asarray(student)
    )
    np.testing.assert_allclose(
        grad, gradient(t, 1.0, jnp.asarray(target), jnp.asarray(student)), atol=1e-6
    )


@pytest.mark.parametrize("t", [1.0, 1.5, 20.0])
def test_a_hard_label_gives_the_usual_cross_entropy(t):
    """Of log-probabilities 0 and -inf, at every temperature of the target, with a finite
    gradient."""
    _, student = random_logits(9, 10, 4)
    classes = np.arange(9)
    target = jnp.where(jnp.arange(10) == classes[:, None], 0.0, -jnp.inf)
    expected = -log_softmax(student.astype(np.float64), axis=1)[np.arange(9), classes]
    slope = softmax(student, axis=1) - np.eye(10)[classes]
    for loss in (soft_cross_entropy, kl_target_student):
        value, grad = jax.jit(jax.value_and_grad(lambda s, loss=loss: loss(target, s, t).sum()))(
            student
        )
        np.testing.assert_allclose(
            loss(target, jnp.asarray(student), t), expected, rtol=1e-5, atol=1e-6
        )
        np.testing.assert_allclose(grad, slope, atol=1e-6)
        assert jnp.isfinite(value)


@pytest.mark.parametrize("size", [1e2, 1e4, 1e30])
def test_losses_of_extreme_logits_are_finite(size):
    """Values and gradients, where a softmax underflows."""
    target = jnp.array([[size, 0, -size], [-size, size, size], [0, -jnp.inf, -jnp.inf], [0, 0, 0]])
    student = jnp.array([[-size, size, 0], [size, -size, 0], [-size, size, size], [-size, 0, size]])
    for loss in (soft_cross_entropy, kl_target_student):
        for one, two in ((target, student), (student, student)):
            value, grad = jax.jit(jax.value_and_grad(lambda s, loss=loss, t=one: loss(t, s).sum()))(
                two
            )
            assert jnp.isfinite(value) and jnp.isfinite(grad).all()
    np.testing.assert_allclose(kl_target_student(student, student), 0, atol=1e-6)


# Contrastive losses


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def info_nce_of(q, k, queue, temperature):
    """The definition in loops and float64: -log(exp(q.k+ / T) / sum_i exp(q.k_i / T))."""
    found = []
    for row, positive in zip(q.astype(np.float64), k.astype(np.float64), strict=True):
        terms = [math.exp(row @ positive / temperature)] + [
            math.exp(row @ other / temperature) for other in queue
        ]
        found.append(-math.log(terms[0] / sum(terms)))
    return np.array(found)


def test_info_nce_with_a_queue_written_by_hand():
    """Four negatives, the positive in column 0 and nowhere else; three queries, one value
    each."""
    q = jnp.array([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    k = jnp.array([[1.0, 0.0], [0.0, -1.0], [0.8, 0.6]])
    queue = jnp.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    loss, logits = info_nce(q, k, queue, 0.5)
    expected = np.array([[2, 2, -2, 0, 0], [-2, 0, 0, 2, -2], [1.92, 1.2, -1.2, 1.6, -1.6]])
    assert loss.shape == (3,) and logits.shape == (3, 5)
    np.testing.assert_allclose(logits, expected, atol=1e-6)
    e = math.exp
    np.testing.assert_allclose(loss[0], -math.log(e(2) / (2 * e(2) + e(-2) + 2)), rtol=1e-5)
    np.testing.assert_allclose(loss[1], -math.log(e(-2) / (2 * e(-2) + 2 + e(2))), rtol=1e-5)
    np.testing.assert_allclose(loss, -log_softmax(expected, axis=1)[:, 0], rtol=1e-5)


@pytest.mark.parametrize("temperature", [0.07, 0.2, 1.0])
def test_info_nce_of_random_features(temperature):
    """A loop, and torch's cross-entropy with label 0; the temperature is applied once."""
    rng = np.random.default_rng(0)
    q, k, queue = (unit(rng.standard_normal((n, 16))).astype(np.float32) for n in (8, 8, 40))
    loss, logits = info_nce(jnp.asarray(q), jnp.asarray(k), jnp.asarray(queue), temperature)
    np.testing.assert_allclose(loss, info_nce_of(q, k, queue, temperature), rtol=1e-4)
    q, k, queue = (torch.tensor(x, dtype=torch.float64) for x in (q, k, queue))
    theirs = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], 1) / temperature
    np.testing.assert_allclose(logits, theirs, atol=1e-5)
    theirs = torch.nn.functional.cross_entropy(
        theirs, torch.zeros(8, dtype=torch.long), reduction="none"
    )
    np.testing.assert_allclose(loss, theirs, rtol=1e-4)


@pytest.mark.parametrize("size", [4, 4096, 65_536])
@pytest.mark.parametrize("temperature", [0.07, 0.2])
def test_constant_features_cost_ln_of_k_plus_1(size, temperature):
    """8.32 for K = 4,096 and 11.09 for 65,536, where a run that learns nothing gets stuck."""
    one = jnp.full((1, 16), 0.25)
    loss, _ = info_nce(
        jnp.repeat(one, 3, 0), jnp.repeat(one, 3, 0), jnp.repeat(one, size, 0), temperature
    )
    np.testing.assert_allclose(loss, math.log(size + 1), rtol=1e-5)


def test_info_nce_has_the_gradient_of_its_definition():
    """Through the normalisation, by central differences of the definition in float64, for each
    input entry."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((3, 6)) * [[0.1], [1], [10]]
    k, queue = unit(rng.standard_normal((3, 6))), unit(rng.standard_normal((5, 6)))

    def ours(x):
        q = x / jnp.linalg.norm(x, axis=-1, keepdims=True)
        return info_nce(q, jnp.asarray(k), jnp.asarray(queue), 0.2)[0].sum()

    grad = jax.jit(jax.grad(ours))(x.astype(np.float32))
    expected = np.zeros_like(x)
    for at in np.ndindex(x.shape):
        step = np.zeros_like(x)
        step[at] = 1e-6
        up, down = (info_nce_of(unit(x + s), k, queue, 0.2).sum() for s in (step, -step))
        expected[at] = (up - down) / 2e-6
    np.testing.assert_allclose(grad, expected, rtol=1e-3, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_allclose((grad * x).sum(1), 0, atol=1e-4)  # along a feature there is no slope


def test_info_nce_at_a_low_temperature_is_finite():
    """Logits of +-10,000."""
    q = jnp.array([[1.0, 0.0], [1.0, 0.0]])
    k = jnp.array([[1.0, 0.0], [-1.0, 0.0]])
    loss, grad = jax.jit(jax.value_and_grad(lambda q: info_nce(q, k, -q[:1], 1e-4)[0].sum()))(q)
    assert jnp.isfinite(loss) and jnp.isfinite(grad).all()


def test_negative_cosine_of_equal_and_opposite_directions():
    """-1, +1, and 0 at right angles, at any length."""
    p = jnp.array([[1.0, 2, 2], [3, 0, 0], [1e3, 0, 0], [1e-3, 0, 0]])
    np.testing.assert_allclose(negative_cosine(p, p), -1, rtol=1e-6)
    np.testing.assert_allclose(negative_cosine(p, 5 * p), -1, rtol=1e-6)
    np.testing.assert_allclose(negative_cosine(p, -0.1 * p), 1, rtol=1e-6)
    np.testing.assert_allclose(negative_cosine(p[1:], jnp.array([[0.0, 7, 1]] * 3)), 0, atol=1e-7)


def test_negative_cosine_is_torchs():
    """One value for each row, and the gradient through both sides, norms included."""
    rng = np.random.default_rng(2)
    p, z = (rng.standard_normal((6, 9)).astype(np.float32) for _ in range(2))
    ours = jax.jit(jax.grad(lambda p, z: negative_cosine(p, z).sum(), argnums=(0, 1)))(p, z)
    theirs = [torch.tensor(x, requires_grad=True) for x in (p, z)]
    loss = -torch.nn.functional.cosine_similarity(*theirs)
    loss.sum().backward()
    np.testing.assert_allclose(
        negative_cosine(jnp.asarray(p), jnp.asarray(z)), loss.detach(), rtol=1e-4, atol=1e-6
    )
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b.grad, rtol=1e-4, atol=1e-6)


def test_negative_cosine_of_a_zero_vector_is_finite():
    """A collapsed output has value and gradient."""
    value, grad = jax.jit(jax.value_and_grad(lambda p: negative_cosine(p, jnp.ones((2, 3))).sum()))(
        jnp.zeros((2, 3))
    )
    assert value == 0 and jnp.isfinite(grad).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_losses_run_in_float32_whatever_comes_in(dtype):
    """The low precision is that of the inputs and of nothing after them."""
    rng = np.random.default_rng(3)
    q, k, queue = (jnp.asarray(unit(rng.standard_normal((n, 64))), dtype) for n in (4, 4, 32))
    q32, k32, queue32 = (x.astype(jnp.float32) for x in (q, k, queue))
    pairs = [
        (losses.info_nce(q, k, queue, 0.07)[0], losses.info_nce(q32, k32, queue32, 0.07)[0]),
        (losses.negative_cosine(q, k), losses.negative_cosine(q32, k32)),
        (losses.kl_target_student(q, k, 1.5), losses.kl_target_student(q32, k32, 1.5)),
        (losses.soft_cross_entropy(q, k), losses.soft_cross_entropy(q32, k32)),
    ]
    for low, full in pairs:
        assert low.dtype == jnp.float32
        np.testing.assert_array_equal(low, full)

"""Ten steps in double precision on two devices, gone on with from a checkpoint after five, beside
PyTorch: EMP-SSL, FastSiam, feature distillation, and FixMatch's rules."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_reference as reference
from torch_reference import torch, variables

import qmx
from qmx import emp_ssl, fastsiam, features, fixmatch, models, optim, simsiam
from qmx.checkpoint import Checkpoints, leaf_digests
from qmx.contract import by_path
from qmx.models.heads import Linear
from qmx.models.norm import BatchNorm
from qmx.sharding import put_batch, put_state

STEPS, SIZE, SIDE, CLASSES, WIDTH, TAUGHT = 10, 8, 4, 5, 12, 7
RATE, DECAY = 2**-5, 2**-7  # exact in float32 too, in which the schedules are
close = partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-11)


@pytest.fixture(autouse=True)
def double():
    """Both sides in float64, on one thread."""
    threads, kind = torch.get_num_threads(), torch.get_default_dtype()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    with jax.enable_x64(True):
        yield
    torch.set_default_dtype(kind)
    torch.set_num_threads(threads)


class Small(nn.Module):
    """A backbone that compiles quickly: Linear - batch norm - ReLU on the pixels."""

    @nn.compact
    def __call__(self, x, train):
        x = Linear(WIDTH, bias=False, name="fc_0")(x.reshape(len(x), -1))
        return nn.relu(BatchNorm(name="fc_1")(x, train))


NET = models.from_linen(Small())


def small():
    """The same in PyTorch."""
    return reference.Fc(
        torch.nn.Linear(SIDE**2, WIDTH, bias=False),
        reference.SplitBatchNorm(WIDTH),
        reference.ReLU(),
    )


def view(rng, batch):
    """A view that can be told again from its key; rows draw apart from one another."""
    image = batch["image"].astype(jnp.float64) / 255
    return image + 0.7 * jax.random.uniform(rng, image.shape, jnp.float32)


def told(rng, batch):
    """The view as PyTorch gets it: a row of pixels for each image."""
    return torch.from_numpy(np.array(view(rng, batch)).reshape(len(batch["image"]), -1))


def batches():
    rng = np.random.default_rng(0)
    shape = (SIDE, SIDE, 1)
    for _ in range(STEPS):
        yield {
            "image": rng.integers(0, 256, (SIZE, *shape), np.uint8),
            "scores": rng.normal(size=(SIZE, CLASSES)) * 3,
            "pool_image": rng.integers(0, 256, (3 * SIZE, *shape), np.uint8),
            "features": rng.normal(size=(SIZE, TAUGHT)),
        }


def trained(method, tx, folder):
    """(state before the first step, state after the last, losses)."""
    step, root, found = qmx.make_step(method, tx), jax.random.key(1), []
    ts = jax.jit(lambda rng: qmx.init_state(method, tx, rng, next(batches())))(jax.random.key(0))
    first = jax.tree.map(jnp.copy, ts)
    ts = put_state(ts)
    for i, batch in enumerate(batches()):
        if i == STEPS // 2:
            with Checkpoints(folder) as checkpoints:
                checkpoints.save(ts)
            digests, ts = leaf_digests(ts), Checkpoints(folder).restore(ts)
            assert leaf_digests(ts) == digests
        ts, metrics = step(ts, put_batch(batch), root)
        found.append(float(metrics["loss"]))
    return first, ts, found


def keys():
    """Of each step."""
    return [jax.random.fold_in(jax.random.key(1), i) for i in range(STEPS)]


def assert_alike(method, tx, follow, folder):
    """Losses, weights and statistics are PyTorch's.

    follow: state before the first step -> (network, steps); steps are an iterator over losses.
    """
    first, last, ours = trained(method, tx, folder)
    net, theirs = follow(first)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    close(ours, list(theirs))
    stats = last.state.stats if hasattr(last.state, "stats") else last.state
    mine = variables(last.params, stats)
    for name, value in net.state_dict().items():
        close(mine[name], value, err_msg=name)
        if not name.endswith("running_mean") and "head.fc.6.bias" not in name:
            assert not np.allclose(value, before[name], rtol=1e-5), name
    for (path, a), (_, b) in zip(by_path(first).items(), by_path(last).items(), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), path
        assert len(b.sharding.device_set) == jax.device_count() > 1, path
    return last


@pytest.mark.slow
def test_emp_ssl(tmp_path):
    """With LARC and Nesterov's momentum, where some kernels' rates are limited and others not."""
    views, similarity, distortion, hidden, features = 4, 5.0, 0.3, 8, 16
    method = emp_ssl.make(
        NET,
        models.emp_ssl_projector(features, hidden),
        view,
        views=views,
        similarity=similarity,
        distortion=distortion,
    )
    tx = optim.larc(
        lambda step: RATE / 8, nesterov=True, weight_decay=DECAY, weight_decay_on="kernels"
    )
    shares = []

    def follow(ts):
        net = reference.network(
            backbone=small(), head=reference.emp_ssl_projector(WIDTH, hidden, features)
        ).train()
        net.load_state_dict(variables(ts.params, ts.state))
        sgd = torch.optim.SGD(net.parameters(), RATE / 8, momentum=0.9, nesterov=True)

        def steps():
            for key, batch in zip(keys(), batches(), strict=True):
                x = told(key, {"image": np.repeat(batch["image"], views, 0)})
                crops = [x[place::views] for place in range(views)]
                loss = reference.emp_ssl_loss(net, crops, similarity, distortion)
                sgd.zero_grad()
                loss.backward()
                shares.append(reference.limited(net, RATE / 8, DECAY))
                sgd.step()
                yield float(loss.detach())

        return net, steps()

    assert_alike(method, tx, follow, tmp_path)
    assert 0.1 < np.mean(shares) < 0.9, "both sides of the limit"


def test_total_coding_rate():
    """The sum over the singular values, for more rows than columns and fewer; rows of one direction
    have the least."""
    for shape in ((9, 5), (5, 9)):
        z = np.random.default_rng(0).normal(size=shape)
        values = np.linalg.svd(z, compute_uv=False)
        want = 0.5 * np.log1p(shape[1] / (shape[0] * 0.2) * values**2).sum()
        close(emp_ssl.total_coding_rate(z, 0.2), want)
    z = z / np.linalg.norm(z, axis=1, keepdims=True)
    same = emp_ssl.total_coding_rate(np.tile(z[:1], (5, 1)), 0.2)
    close(same, 0.5 * np.log1p(9 / 0.2))
    assert same < emp_ssl.total_coding_rate(z, 0.2)


def siamese(make, **changes):
    return make(NET, models.simsiam_projector(6), models.simsiam_predictor(4), view, **changes)


@pytest.mark.slow
def test_fastsiam(tmp_path):
    """The predictor's rate apart, three views."""
    method = siamese(fastsiam.make, views=3)
    tx = optim.sgd(
        {
            "backbone": lambda step: RATE,
            "head": lambda step: RATE,
            "predictor": lambda step: 2 * RATE,
        },
        weight_decay=DECAY,
    )

    def follow(ts):
        net = reference.network(
            backbone=small(),
            head=reference.simsiam_projector(WIDTH, 6),
            predictor=reference.simsiam_predictor(6, 4),
        ).train()
        net.load_state_dict(variables(ts.params, ts.state))
        rates = {"backbone": RATE, "head": RATE, "predictor": 2 * RATE}
        rates = {part: lambda step, value=value: value for part, value in rates.items()}
        sgd = reference.optimiser(net, rates, momentum=0.9, weight_decay=DECAY)

        def steps():
            for i, (key, batch) in enumerate(zip(keys(), batches(), strict=True)):
                xs = [told(one, batch) for one in jax.random.split(key, 3)]
                yield reference.update(sgd, i, reference.fastsiam_loss(net, xs))

        return net, steps()

    assert_alike(method, tx, follow, tmp_path)


def test_features(tmp_path):
    """Regression of another network's features, both of length 1, behind a batch norm."""
    method = features.make(NET, partial(models.classifier, standardize=True), view)
    tx = optim.sgd(lambda step: RATE, weight_decay=DECAY)

    def follow(ts):
        head = reference.network(
            norm=reference.SplitBatchNorm(WIDTH, affine=False), fc=torch.nn.Linear(WIDTH, TAUGHT)
        )
        net = reference.network(backbone=small(), head=head).train()
        net.load_state_dict(variables(ts.params, ts.state))
        sgd = torch.optim.SGD(net.parameters(), RATE, momentum=0.9, weight_decay=DECAY)

        def steps():
            for key, batch in zip(keys(), batches(), strict=True):
                wanted = torch.from_numpy(batch["features"])
                loss = reference.regression_loss(net(told(key, batch)), wanted)
                sgd.zero_grad()
                loss.backward()
                sgd.step()
                yield float(loss.detach())

        return net, steps()

    assert_alike(method, tx, follow, tmp_path)


def test_two_views_are_simsiam():
    """To the bit, statistics too."""
    batch, key = next(batches()), jax.random.key(5)
    results = []
    params, state = jax.jit(siamese(simsiam.make).init)(jax.random.key(0), batch)
    for method in (siamese(simsiam.make), siamese(fastsiam.make, views=2)):
        results.append(jax.jit(method.loss)(params, state, batch, key))
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("make", [emp_ssl.make, fastsiam.make])
def test_one_view_is_refused(make):
    parts = [NET] * (2 if make is emp_ssl.make else 3)
    with pytest.raises(ValueError, match="views 1 leaves nothing to .*; use 2 or more"):
        make(*parts, view, views=1)


THRESHOLDS = {"fixed": 0.22, "relative": 0.9, "free": 0.0, "soft": 0.0}  # the last two have none
RULES = [
    ("fixed", "uniform", 0.5),
    ("relative", "asked", 0.0),
    ("free", "none", 0.0),
    ("soft", "uniform", 1.0),
]


def judged(rule, align, guess_temperature):
    return fixmatch.make(
        NET,
        models.classifier(CLASSES),
        view,
        view,
        rule=rule,
        threshold=THRESHOLDS.get(rule, 0.0),
        align=align,
        guess_temperature=guess_temperature,
        guess_decay=0.25,
        weight=0.5,
        decay=0.75,
    )


@pytest.mark.parametrize("rule, align, guess_temperature", RULES)
def test_fixmatch(rule, align, guess_temperature, tmp_path):
    """The student, the teacher, the averages; guesses that count and guesses that do not."""
    method, counts, seen = judged(rule, align, guess_temperature), [], {}
    tx = optim.sgd(lambda step: RATE, weight_decay=DECAY)

    def follow(ts):
        def network():
            return reference.network(backbone=small(), head=reference.classifier(WIDTH, CLASSES))

        student, teacher = network(), network()
        student.load_state_dict(variables(ts.params, ts.state.stats))
        teacher.load_state_dict(variables(*ts.state.teacher.average))
        their = seen["their"] = reference.Judged(
            student,
            teacher,
            *(THRESHOLDS[rule], 0.5, 0.75, 1.5),
            rule=rule,
            align=align,
            guess_temperature=guess_temperature,
            guess_decay=0.25,
            classes=CLASSES,
        )
        sgd = torch.optim.SGD(student.parameters(), RATE, momentum=0.9, weight_decay=DECAY)

        def steps():
            for i, (key, batch) in enumerate(zip(keys(), batches(), strict=True)):
                parts = batch, *({"image": batch["pool_image"]},) * 2
                views = [told(*pair) for pair in zip(jax.random.split(key, 3), parts, strict=True)]
                if i:  # at the end of the step before
                    their.move()
                loss, count = their.loss(views[0], torch.from_numpy(batch["scores"]), *views[1:])
                counts.extend(count.tolist())
                sgd.zero_grad()
                loss.backward()
                sgd.step()
                yield float(loss.detach())

        return student, steps()

    last = assert_alike(method, tx, follow, tmp_path)
    their, guesses = seen["their"], last.state.guesses
    for mine, value in zip(
        guesses, (their.p_model, their.p_asked, their.mean, their.var), strict=True
    ):
        close(mine, value)
    kept = variables(*method.network(last.params, last.state))
    for name, value in their.teacher.state_dict().items():
        close(kept[name], value, err_msg=name)
    assert 0.1 < np.mean(counts) < 0.95 and np.std(counts) > 0.1, np.quantile(counts, [0, 0.5, 1])


def test_no_gradient_reaches_the_guesses():
    """Not into the teacher, whose soft guesses are targets, and not into the student through the
    answers that judge them."""
    batch, key = next(batches()), jax.random.key(3)
    method = judged("soft", "asked", 1.0)
    params, state = jax.jit(method.init)(jax.random.key(0), batch)

    def values(average, params, of_loss, of_guesses):
        teacher = optim.EmaState(average)
        value, (new, _) = method.loss(params, state._replace(teacher=teacher), batch, key)
        return of_loss * value + of_guesses * sum(map(jnp.sum, new.guesses))

    grads = jax.jit(jax.grad(values, argnums=(0, 1)))
    into_teacher, into_student = grads(state.teacher.average, params, 1.0, 0.0)
    assert not any(map(np.any, jax.tree.leaves(into_teacher)))
    assert any(map(np.any, jax.tree.leaves(into_student)))
    _, into_student = grads(state.teacher.average, params, 0.0, 1.0)
    assert not any(map(np.any, jax.tree.leaves(into_student)))


def test_unknown_choices_are_refused():
    for choice in ("rule", "align"):
        with pytest.raises(ValueError, match=f"{choice} 'hard' is unknown; choose one of "):
            judged(**{"rule": "fixed", "align": "none", "guess_temperature": 0.0, choice: "hard"})

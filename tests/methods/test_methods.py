"""The contract that all methods obey, and the known ways to get MoCo and SimSiam wrong."""

from functools import cache, partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_networks import layers, residual

from qmx import (
    distill,
    emp_ssl,
    fastsiam,
    features,
    fixmatch,
    moco,
    models,
    optim,
    rotation,
    simsiam,
)
from qmx.contract import Encoder, Network, by_path, chain
from qmx.diagnostics import watch
from qmx.methods import linear
from qmx.train import init_state, make_step

B = 8
VIEWS = {  # calls of a view in one step
    "moco": 2,
    "simsiam": 2,
    "fastsiam": 3,
    "emp_ssl": 1,
    "rotation": 1,
    "distill": 1,
    "features": 1,
    "linear": 1,
    "fixmatch": 3,
}
NAMES = tuple(VIEWS)

QUICK = layers()


def plain(rng, data):
    return data["image"] / 255.0


def noisy(rng, data):
    """A view that draws, and compiles quickly."""
    return data["image"] / 255.0 + jax.random.uniform(rng, data["image"].shape)


PARTS = models.moco_head(16), models.simsiam_projector(16, 2), models.simsiam_predictor(8)
NETS = {  # the backbone of `make`
    **dict.fromkeys(NAMES, QUICK),
    "moco": layers(stats_groups=2),
    "distill": residual(),
}


def make(name, view=noisy, net=None, **changes):
    """A small one of each method."""
    net, (head, projector, predictor) = net or NETS[name], PARTS
    return {
        "moco": lambda: moco.make(
            net, head, view, **{"queue_size": 4 * B, "decay": 0.9, **changes}
        ),
        "simsiam": lambda: simsiam.make(net, projector, predictor, view),
        "fastsiam": lambda: fastsiam.make(net, projector, predictor, view, views=3),
        "emp_ssl": lambda: emp_ssl.make(net, models.emp_ssl_projector(16, 8), view, views=3),
        "rotation": lambda: rotation.make(net, models.classifier(4), view),
        "distill": lambda: distill.make(net, models.classifier(10), view),
        "features": lambda: features.make(net, models.classifier, view),
        "linear": lambda: linear.make(net, models.classifier(10, kernel_std=0.01), view),
        "fixmatch": lambda: fixmatch.make(
            net, models.classifier(10), view, view, **{"threshold": 0.2, "decay": 0.9, **changes}
        ),
    }[name]()


def batch(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "image": jnp.array(rng.integers(0, 256, (B, 8, 8, 1), np.uint8)),
        "scores": jnp.array(rng.normal(size=(B, 10)), jnp.float32),
        "pool_image": jnp.array(rng.integers(0, 256, (2 * B, 8, 8, 1), np.uint8)),
        "features": jnp.array(rng.normal(size=(B, 6)), jnp.float32),
    }


copied = jax.jit(partial(jax.tree.map, jnp.copy))


@cache
def trained(name, steps=3):
    """A method, how often it was traced, and its states and metrics over a few steps."""
    traces = []

    def view(rng, data):
        traces.append(1)
        return noisy(rng, data)

    method = make(name, view)
    tx = optim.sgd(lambda step: 0.03, weight_decay=1e-4)
    states = [jax.jit(lambda rng: init_state(method, tx, rng, batch()))(jax.random.key(0))]
    traces.clear()
    step, metrics = make_step(method, tx), []
    for k in range(steps):
        ts, values = step(copied(states[-1]), batch(k), jax.random.key(1))
        states.append(ts)
        metrics.append(values)
    return method, len(traces), states, metrics, step


@pytest.mark.parametrize("name", NAMES)
def test_contract(name):
    """Init and three steps: finite, structure and dtypes unchanged, metrics flat f32 scalars,
    traced once."""
    method, traces, states, metrics, step = trained(name)
    for before, after in zip(states, states[1:], strict=False):
        assert jax.tree.structure(before) == jax.tree.structure(after)
        for (path, a), (_, b) in zip(by_path(before).items(), by_path(after).items(), strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype), path
            assert np.isfinite(b).all(), path
    for values in metrics:
        assert "loss" in values
        for key, value in values.items():
            assert value.shape == () and value.dtype == jnp.float32 and np.isfinite(value), key
    assert traces == VIEWS[name], "the step was traced more than once"
    assert int(states[-1].step) == 3
    encoder = method.encoder(states[-1].params, states[-1].state)
    features, _ = jax.eval_shape(lambda: NETS[name].apply(*encoder, jnp.zeros((2, 8, 8, 1)), False))
    assert features.shape == (2, 4 if name == "distill" else 16)


@pytest.mark.parametrize("name", NAMES)
def test_same_key_same_result(name):
    """A step is a pure function of state, batch and key; another key or step number draws
    otherwise."""
    _, _, states, metrics, step = trained(name)
    again, values = step(copied(states[0]), batch(0), jax.random.key(1))
    for (path, a), (_, b) in zip(by_path(states[1]).items(), by_path(again).items(), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=path)
    other = step(copied(states[0]), batch(0), jax.random.key(2))[1]
    assert float(other["loss"]) != float(values["loss"]) == float(metrics[0]["loss"])
    later = copied(states[0])._replace(step=jnp.int32(7))
    assert float(step(later, batch(0), jax.random.key(1))[1]["loss"]) != float(values["loss"])


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_learns(name):
    """Each part has a gradient in some step, and running statistics move."""
    _, _, states, _, _ = trained(name)
    first, last = states[0], states[-1]
    for kind, before, after in (
        ("params", first.params, last.params),
        ("state", first.state, last.state),
    ):
        still = [
            path for path, a in by_path(before).items() if np.array_equal(a, by_path(after)[path])
        ]
        # By design: a bias of SimSiam's, and the backbone under a linear probe.
        frozen = [
            path
            for path in still
            if not path.endswith("fc_3/bias")
            and not (name == "linear" and path.startswith("backbone"))
        ]
        assert not frozen, (kind, frozen)


# --- MoCo ---------------------------------------------------------------------------------------


def test_moco_key_encoder_starts_as_a_copy():
    """Each key leaf, the head's too, equals its query leaf; the queue's rows have norm
    1."""
    state = trained("moco")[2][0]
    for (path, q), (_, k) in zip(
        by_path(state.params).items(), by_path(state.state.key.average).items(), strict=True
    ):
        np.testing.assert_array_equal(q, k, err_msg=path)
    for queue in (state.state.queue, trained("moco")[2][-1].state.queue):
        np.testing.assert_allclose(np.linalg.norm(queue, axis=1), 1, atol=1e-5)


def test_moco_gradient_never_reaches_the_keys():
    """No gradient into the momentum encoder or the queue; the optimiser holds no key
    leaf."""
    method, _, states, _, _ = trained("moco")
    ts = states[-1]

    def loss(average, queue):
        state = ts.state._replace(key=ts.state.key._replace(average=average), queue=queue)
        return method.loss(ts.params, state, batch(), jax.random.key(0))[0]

    into_keys, into_queue = jax.jit(jax.grad(loss, argnums=(0, 1)))(
        ts.state.key.average, ts.state.queue
    )
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(into_keys))
    assert np.any(into_queue), (
        "the negatives are constants to the step, but they do matter to the loss"
    )
    momenta = [leaf for leaf in jax.tree.leaves(ts.opt_state) if leaf.ndim]
    assert sorted(leaf.shape for leaf in momenta) == sorted(
        leaf.shape for leaf in jax.tree.leaves(ts.params)
    )


def test_moco_key_statistics_are_their_own():
    """The key branch's running statistics come from its own batches; nothing averages them."""
    _, _, states, _, _ = trained("moco")
    before, after = states[-2].state, states[-1].state
    for path, q in by_path(after.stats).items():
        k, k_before = by_path(after.key_stats)[path], by_path(before.key_stats)[path]
        q_before = by_path(before.stats)[path]
        assert not np.array_equal(k, k_before) and not np.array_equal(k, q), path
        assert not np.allclose(k, 0.9 * k_before + 0.1 * q_before, rtol=1e-6), path


@cache
def plain_moco(groups):
    """One whose views are the images: (variables at first, the loss, x -> unit queries)."""
    net = layers(stats_groups=groups)
    method = make("moco", plain, net)

    def queries(params, stats, x):
        found, _ = chain(backbone=net, head=PARTS[0]).apply(params, stats, x, True)
        return found / jnp.linalg.norm(found, axis=1, keepdims=True)

    init = jax.jit(lambda rng: method.init(rng, batch()))
    return init(jax.random.key(0)), jax.jit(method.loss), jax.jit(queries)


def test_moco_queue_order():
    """Keys replace the oldest rows in batch order, after the logits; the pointer wraps."""
    (params, state), loss, queries = plain_moco(2)
    for k in range(5):
        value, (new, _) = loss(params, state, batch(k), jax.random.key(k))
        at, before, after = int(state.pointer), np.asarray(state.queue), np.asarray(new.queue)
        assert int(new.pointer) == (k + 1) * B % (4 * B)
        untouched = [row for row in range(4 * B) if not at <= row < at + B]
        np.testing.assert_array_equal(after[untouched], before[untouched])
        assert not np.isclose(after[at : at + B], before[at : at + B]).all()

        # The same loss, put together by hand against the queue as it was; the key encoder is a
        # copy.
        q = np.asarray(queries(params, state.stats, batch(k)["image"] / 255.0))
        positive = (q * after[at : at + B]).sum(1, keepdims=True)
        logits = np.concatenate([positive, q @ before.T], 1) / 0.2
        by_hand = np.log(np.exp(logits).sum(1)) - logits[:, 0]
        np.testing.assert_allclose(value, by_hand.mean(), rtol=1e-4)
        state = new


def test_moco_queue_must_fit():
    """A queue that is no multiple of the batch is refused with the one that is."""
    with pytest.raises(ValueError, match="queue_size 20 is not a multiple of batch_size 8; 16 is"):
        make("moco", queue_size=20).init(jax.random.key(0), batch())


@pytest.mark.slow
def test_moco_stuck_at_chance():
    """Features that say nothing give exactly ln(K + 1); a toy run leaves it."""
    constant = models.Network(
        lambda rng, x: ({"w": jnp.ones(4)}, {}),
        lambda p, s, x, train, rng=None: (jnp.tile(p["w"], (len(x), 1)), s),
    )
    method = moco.make(
        constant,
        models.Network(lambda rng, x: ({}, {}), lambda p, s, x, train, rng=None: (x, s)),
        plain,
        queue_size=B,
    )
    params, state = method.init(jax.random.key(0), batch())
    state = state._replace(queue=jnp.full((B, 4), 0.5))
    np.testing.assert_allclose(
        method.loss(params, state, batch(), jax.random.key(0))[0], np.log(B + 1), rtol=1e-6
    )

    method = make("moco", queue_size=8 * B)
    tx = optim.sgd(lambda step: 0.06)
    ts = jax.jit(lambda rng: init_state(method, tx, rng, batch()))(jax.random.key(0))
    step = make_step(method, tx)
    losses = []
    for _ in range(40):
        ts, metrics = step(ts, batch(0), jax.random.key(1))
        losses.append(float(metrics["loss"]))
    assert np.mean(losses[-5:]) < np.log(8 * B + 1) - 0.3


def test_moco_groups_of_statistics():
    """G groups in one batch are what G devices with a part each would compute; keys are
    shuffled over the whole batch, so that a key's group is not its query's; one group is another
    network."""
    x = np.random.default_rng(0).normal(size=(B, 8, 8, 1)).astype(np.float32)
    split, whole = residual(stats_groups=2), residual()
    params, stats = jax.jit(split.init)(jax.random.key(1), x)

    @jax.jit
    def applied(x):
        halves = [whole.apply(params, stats, half, True) for half in (x[: B // 2], x[B // 2 :])]
        return halves, split.apply(params, stats, x, True), whole.apply(params, stats, x, True)[0]

    parts, (y, new), together = applied(x)
    np.testing.assert_allclose(y, np.concatenate([part[0] for part in parts]), rtol=1e-5, atol=1e-5)
    average = jax.tree.map(lambda a, b: (a + b) / 2, *(part[1] for part in parts))
    for path, leaf in by_path(new).items():
        np.testing.assert_allclose(leaf, by_path(average)[path], rtol=1e-5, atol=1e-6, err_msg=path)
    assert not np.allclose(y, together, atol=1e-3)

    # With the same pixels for both views and no shuffle, the first step's keys would be the
    # queries; with one group they are, since they are shuffled there and back in order.
    for groups in (1, 2):
        (params, state), loss, queries = plain_moco(groups)
        _, (new, _) = loss(params, state, batch(), jax.random.key(3))
        off = np.abs(new.queue[:B] - queries(params, state.stats, batch()["image"] / 255.0)).max()
        assert off < 1e-5 if groups == 1 else off > 1e-3


# --- SimSiam ------------------------------------------------------------------------------------


def test_simsiam_layers():
    """The golden tree of the three-layer heads, and zero-initialised residual branches."""
    projector, predictor = models.simsiam_projector(2048), models.simsiam_predictor(512)
    params, stats = jax.eval_shape(lambda: projector.init(jax.random.key(0), jnp.zeros((2, 2048))))
    assert {path: leaf.shape for path, leaf in by_path(params).items()} == {
        "fc_0/kernel": (2048, 2048),
        "fc_1/scale": (2048,),
        "fc_1/bias": (2048,),
        "fc_3/kernel": (2048, 2048),
        "fc_4/scale": (2048,),
        "fc_4/bias": (2048,),
        "fc_6/kernel": (2048, 2048),
    }
    assert set(by_path(stats)) == {
        "fc_6/bias",
        *(f"fc_{i}/{name}" for i in (1, 4, 7) for name in ("mean", "var")),
    }
    params, stats = jax.eval_shape(lambda: predictor.init(jax.random.key(0), jnp.zeros((2, 2048))))
    assert {path: leaf.shape for path, leaf in by_path(params).items()} == {
        "fc_0/kernel": (2048, 512),
        "fc_1/scale": (512,),
        "fc_1/bias": (512,),
        "fc_3/kernel": (512, 2048),
        "fc_3/bias": (2048,),
    }
    assert set(by_path(stats)) == {"fc_1/mean", "fc_1/var"}

    net = residual(zero_init=True)
    first = by_path(jax.jit(net.init)(jax.random.key(0), jnp.zeros((2, 8, 8, 1)))[0])
    assert "layer1_0/bn2/scale" in first
    for path, leaf in first.items():
        if path.endswith("scale"):
            assert np.all(leaf == (0 if path.endswith("bn2/scale") else 1)), path


@pytest.mark.slow
def test_simsiam_stops_the_gradient():
    """The gradient is that of the loss with the projections as constants."""
    method, _, states, _, _ = trained("simsiam")
    ts, key, data = states[-1], jax.random.key(5), batch(9)
    net, (_, projector, predictor) = NETS["simsiam"], PARTS

    def forward(params):
        zs, ps = [], []
        for view_key in jax.random.split(key):
            x = noisy(view_key, data)
            features, _ = net.apply(params["backbone"], ts.state["backbone"], x, True)
            z, _ = projector.apply(params["head"], ts.state["head"], features, True)
            zs.append(z)
            ps.append(predictor.apply(params["predictor"], ts.state["predictor"], z, True)[0])
        return zs, ps

    def by_hand(params, constants):
        _, (p1, p2) = forward(params)
        z1, z2 = constants

        def cosine(a, b):
            return ((a * b).sum(1) / jnp.linalg.norm(a, axis=1) / jnp.linalg.norm(b, axis=1)).mean()

        return -(cosine(p1, z2) + cosine(p2, z1)) / 2

    @jax.jit
    def both(params):
        want = jax.value_and_grad(by_hand)(params, forward(params)[0])
        return want, jax.value_and_grad(lambda p: method.loss(p, ts.state, data, key)[0])(params)

    (want, want_grad), (got, got_grad) = both(ts.params)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    for path, leaf in by_path(want_grad).items():
        np.testing.assert_allclose(
            by_path(got_grad)[path], leaf, rtol=1e-3, atol=1e-5, err_msg=path
        )


def test_simsiam_collapses_without_the_stop(monkeypatch):
    """In the same toy run the unit projections keep their spread, and lose it once nothing is
    stopped."""

    def spread(rate=0.1, steps=300):
        # Linear maps without batch norm after them, so that nothing but the stopped gradient holds
        # the spread.
        linear = models.classifier(16)
        net = models.Network(
            lambda rng, x: linear.init(rng, x.reshape(len(x), -1)),
            lambda p, s, x, train, rng=None: linear.apply(p, s, x.reshape(len(x), -1), train),
        )
        method = simsiam.make(net, models.classifier(16), models.simsiam_predictor(8), noisy)
        tx = optim.sgd(lambda step: rate)
        ts = jax.jit(lambda rng: init_state(method, tx, rng, data))(jax.random.key(0))
        step = make_step(method, tx)
        train = jax.jit(
            lambda ts: jax.lax.scan(
                lambda ts, _: step(ts, data, jax.random.key(1)), ts, length=steps
            )
        )
        _, metrics = train(ts)
        return float(metrics["z_std"][-1]), float(metrics["loss"][-1])

    data = {"image": jnp.array(np.random.default_rng(0).integers(0, 256, (32, 8, 8, 1), np.uint8))}

    def noisy(rng, batch):
        return plain(rng, batch) + 0.3 * jax.random.normal(rng, batch["image"].shape)

    kept, _ = spread()
    monkeypatch.setattr(jax.lax, "stop_gradient", lambda x: x)
    lost, loss = spread()
    assert kept > 0.5 / np.sqrt(16), (kept, lost, loss)
    assert lost < 0.1 / np.sqrt(16) and loss < -0.99, (kept, lost, loss)


# --- rotation, distillation -----------------------------------------------------------------------


def test_rotations_are_quarter_turns():
    """Four copies of each image, turned as numpy turns them; turning back gives the image."""
    x = jax.random.normal(jax.random.key(0), (3, 6, 6, 2))
    turned, turns = rotation.rotations(x)
    assert turned.shape == (12, 6, 6, 2)
    for image, turn, source in zip(turned, turns, np.tile(np.arange(3), 4), strict=True):
        np.testing.assert_array_equal(image, np.rot90(x[source], int(turn)))
        np.testing.assert_array_equal(np.rot90(image, -int(turn)), x[source])


def test_start_from_is_strict():
    """An encoder of another network is refused with every variable that does not fit; one
    that fits replaces the backbone, leaves the head alone and is copied."""
    method, _, states, _, _ = trained("distill")
    params, state = states[0].params, states[0].state
    encoder = another(NETS["distill"])
    new_params, new_state = method.start(params, state, encoder)
    for path, leaf in by_path(new_params["backbone"]).items():
        np.testing.assert_array_equal(leaf, by_path(encoder.params)[path])
        assert leaf is not by_path(encoder.params)[path]
    np.testing.assert_array_equal(
        new_params["head"]["fc"]["kernel"], params["head"]["fc"]["kernel"]
    )
    assert new_state["backbone"].keys() == state["backbone"].keys()

    wrong = {
        **encoder.params,
        "conv9": encoder.params["conv1"],
        "conv1": {"kernel": jnp.zeros((3, 3, 1, 5))},
    }
    del wrong["bn1"]
    with pytest.raises(ValueError, match="(?s)bn1/bias.*bn1/scale.*conv1/kernel.*conv9/kernel"):
        method.start(params, state, encoder._replace(params=wrong))


@cache
def another(net):
    """An encoder of the backbone `net`."""
    return Encoder(*jax.jit(net.init)(jax.random.key(9), jnp.zeros((B, 8, 8, 1))))


@pytest.mark.parametrize("name", NAMES)
def test_begins_from_an_encoder(name):
    """Every method: the backbone is the given one, copied; what it keeps holds that backbone."""
    method, _, states, _, _ = trained(name)
    encoder = another(NETS[name])
    params, state = method.start(states[0].params, states[0].state, encoder)
    assert jax.tree.structure((params, state)) == jax.tree.structure(
        (states[0].params, states[0].state)
    )
    kept = method.network(params, state)
    for tree in (method.encoder(params, state), Encoder(*(part["backbone"] for part in kept))):
        for path, leaf in by_path(encoder).items():
            np.testing.assert_array_equal(by_path(tree)[path], leaf, err_msg=path)
            assert by_path(tree)[path] is not leaf
    if name == "moco":  # the momentum encoder is a copy, as at the first step of any training
        for path, leaf in by_path(params).items():
            np.testing.assert_array_equal(by_path(state.key.average)[path], leaf, err_msg=path)


class Dropped(nn.Module):
    """A backbone with dropout, and nothing else that draws."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(16)(x.reshape(len(x), -1))
        return nn.Dropout(0.5, deterministic=not train)(x)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_has_a_key_for_dropout(name):
    """Another key drops others, though no view draws; the same key the same ones; an evaluation,
    which has none, drops nothing."""
    net, head = models.from_linen(Dropped()), models.classifier(10)
    method = {
        "moco": lambda: moco.make(net, head, plain, queue_size=4 * B),
        "simsiam": lambda: simsiam.make(net, head, models.classifier(10), plain),
        "fastsiam": lambda: fastsiam.make(net, head, models.classifier(10), plain),
        "emp_ssl": lambda: emp_ssl.make(net, head, plain, views=2),
        "rotation": lambda: rotation.make(net, models.classifier(4), plain),
        "features": lambda: features.make(net, models.classifier, plain),
        "distill": lambda: distill.make(net, head, plain),
        "linear": lambda: linear.make(net, head, plain),
        "fixmatch": lambda: fixmatch.make(net, head, plain, plain),
    }[name]()
    data = batch()

    @jax.jit
    def loss(key):
        params, state = method.init(jax.random.key(0), data)
        return method.loss(params, state, data, key)[0]

    same, again, other = (float(loss(jax.random.key(seed))) for seed in (1, 1, 2))
    assert same == again
    # A frozen backbone runs as in an evaluation.
    assert (same != other) is (name != "linear")


def test_a_linear_probe_moves_its_head_alone():
    """After training the head the backbone's variables are equal to the bit, running statistics
    too; the head starts at N(0, 0.01) with a bias of 0; its features are those of an evaluation."""
    method, _, states, metrics, _ = trained("linear")
    assert states[0].params.keys() == {"head"}
    for path, leaf in by_path(states[0].state["backbone"]).items():
        np.testing.assert_array_equal(
            leaf, by_path(states[-1].state["backbone"])[path], err_msg=path
        )
    fc = states[0].params["head"]["fc"]
    assert not fc["bias"].any() and 0.009 < float(fc["kernel"].std()) < 0.011

    rng, data, last = jax.random.key(4), batch(), states[-1]

    @jax.jit
    def losses():
        features, _ = NETS["linear"].apply(*last.state["backbone"], noisy(rng, data), False)
        logits = features @ last.params["head"]["fc"]["kernel"] + last.params["head"]["fc"]["bias"]
        want = -(jax.nn.softmax(data["scores"]) * jax.nn.log_softmax(logits)).sum(-1).mean()
        return method.loss(last.params, last.state, data, rng)[0], want

    np.testing.assert_allclose(*losses(), rtol=1e-5)

    other = another(NETS["linear"])
    head, started = method.start(states[0].params, states[0].state, other)
    assert head is states[0].params
    for path, leaf in by_path(other).items():
        np.testing.assert_array_equal(by_path(started["backbone"])[path], leaf)
    with pytest.raises(ValueError, match="fc_0/kernel is missing"):
        less = {name: part for name, part in other.params.items() if name != "fc_0"}
        method.start(states[0].params, states[0].state, other._replace(params=less))


# --- FixMatch -----------------------------------------------------------------------------------


def plain_fixmatch(**changes):
    """On a network that compiles quickly, with batch statistics: (network, method)."""
    method = fixmatch.make(QUICK, models.classifier(10), plain, plain, decay=0.9, **changes)
    return chain(backbone=QUICK, head=models.classifier(10)), method


@cache
def plain_trained():
    """Its state after three steps."""
    _, method = plain_fixmatch(threshold=0.2)
    tx = optim.sgd(lambda step: 0.1)
    ts = jax.jit(lambda rng: init_state(method, tx, rng, batch()))(jax.random.key(0))
    step = make_step(method, tx)
    for k in range(3):
        ts, _ = step(ts, batch(k), jax.random.key(1))
    return ts


def test_fixmatch_loss_by_hand():
    """The teacher's class where it is sure, a mean over all of the pool's images, batch statistics
    of both parts."""
    state, data = plain_trained(), batch(5)
    teacher = jax.tree.map(
        lambda old, now: 0.9 * old + 0.1 * now,
        state.state.teacher.average,
        Encoder(state.params, state.state.stats),
    )
    network, _ = plain_fixmatch()
    apply = jax.jit(network.apply, static_argnums=3)
    guess = np.asarray(apply(*teacher, data["pool_image"] / 255.0, False)[0], np.float64)
    classes, confidence = guess.argmax(1), np.exp(guess).max(1) / np.exp(guess).sum(1)
    threshold = float(np.sort(confidence)[B - 1 : B + 1].mean())  # half of the images are above it
    sure = confidence >= threshold
    assert sure.sum() == B

    _, method = plain_fixmatch(threshold=threshold, weight=3.0)
    value, (new, metrics) = jax.jit(method.loss)(state.params, state.state, data, jax.random.key(0))
    for path, leaf in by_path(teacher).items():  # running statistics too
        np.testing.assert_allclose(
            by_path(new.teacher.average)[path], leaf, rtol=1e-5, atol=1e-6, err_msg=path
        )

    together = jnp.concatenate([data["image"], data["pool_image"]]) / 255.0
    both = np.asarray(apply(state.params, state.state.stats, together, True)[0], np.float64)
    log_q = both - np.log(np.exp(both).sum(1, keepdims=True))
    p = np.asarray(jax.nn.softmax(data["scores"] / 1.5), np.float64)
    known = (p * (np.log(p) - log_q[:B])).sum(1).mean()
    guessed = (-log_q[B:][np.arange(2 * B), classes] * sure).sum() / (2 * B)
    np.testing.assert_allclose(value, known + 3 * guessed, rtol=1e-4)
    np.testing.assert_allclose(
        [metrics["confident"], metrics["pool_agreement"], metrics["pool_loss"]],
        [sure.mean(), (both[B:].argmax(1) == classes).mean(), guessed],
        rtol=1e-4,
    )


def test_fixmatch_gradient_never_reaches_the_teacher():
    """Exactly zero into what it is and, through its average, into the student; the optimiser holds
    none of it."""
    method, _, states, _, _ = trained("fixmatch")
    ts = states[-1]

    def loss(average):
        return method.loss(
            ts.params,
            ts.state._replace(teacher=optim.EmaState(average)),
            batch(),
            jax.random.key(0),
        )[0]

    def moved(params):  # the sum of the teacher that a step makes of the student
        state = method.loss(params, ts.state, batch(), jax.random.key(0))[1][0]
        return sum(leaf.sum() for leaf in jax.tree.leaves(state.teacher))

    grads = jax.jit(lambda a, b: (jax.grad(loss)(a), jax.grad(moved)(b)))
    for leaf in jax.tree.leaves(grads(ts.state.teacher.average, ts.params)):
        assert not np.any(leaf)
    momenta = [leaf for leaf in jax.tree.leaves(ts.opt_state) if leaf.ndim]
    assert sorted(leaf.shape for leaf in momenta) == sorted(
        leaf.shape for leaf in jax.tree.leaves(ts.params)
    )


@pytest.mark.parametrize(("threshold", "share"), [(1.0, 0.0), (0.0, 1.0)])
def test_fixmatch_threshold_at_its_ends(threshold, share):
    """Nothing above it: the pool costs 0 and no gradient, and nothing is NaN. All above it: every
    image counts."""
    ts, key, data = plain_trained(), jax.random.key(0), batch()

    def step(weight):
        _, method = plain_fixmatch(threshold=threshold, weight=weight)
        return jax.jit(jax.value_and_grad(method.loss, has_aux=True))(
            ts.params, ts.state, data, key
        )

    ((value, (_, metrics)), grads), ((without, _), grads_without) = step(10.0), step(0.0)
    assert float(metrics["confident"]) == share
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((value, grads, metrics)))
    same = all(
        np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(grads_without), strict=True)
    )
    assert same is (share == 0) and (float(value) == float(without)) is (share == 0)
    assert (float(metrics["pool_loss"]) == 0) is (share == 0)


def test_fixmatch_starts_from_an_encoder_with_its_teacher():
    """Student and teacher begin as one; the student that is kept is the teacher, head and all."""
    ts, encoder = (
        trained("fixmatch")[2][-1],
        another(NETS["fixmatch"]),
    )
    method = make("fixmatch")
    params, state = method.start(ts.params, ts.state, encoder)
    kept = method.network(params, state)
    for path, leaf in by_path(kept).items():
        np.testing.assert_array_equal(
            by_path(Encoder(params, state.stats))[path], leaf, err_msg=path
        )
        assert leaf is not by_path(Encoder(params, state.stats))[path]
    for path, leaf in by_path(encoder).items():
        np.testing.assert_array_equal(
            by_path(method.encoder(params, state))[path], leaf, err_msg=path
        )
    assert any(
        not np.array_equal(a, b)
        for a, b in zip(
            jax.tree.leaves(method.network(ts.params, ts.state).params),
            jax.tree.leaves(ts.params),
            strict=True,
        )
    )


@pytest.mark.parametrize("count", [B - 1, B + 1])
def test_fixmatch_needs_whole_shares_of_the_pool(count):
    ts = trained("fixmatch")[2][0]
    data = {**batch(), "pool_image": jnp.zeros((count, 8, 8, 1), jnp.uint8)}
    with pytest.raises(ValueError, match=f"{count} images of the pool beside {B} "):
        make("fixmatch").loss(ts.params, ts.state, data, jax.random.key(0))


def test_labels_are_scores():
    """Supervised training is distillation of log one-hot rows: the loss is the cross-entropy, at
    any temperature."""
    method, _, states, _, _ = trained("distill")
    labels = np.arange(B) % 10
    data = {**batch(), "scores": jnp.log(jnp.eye(10)[labels])}
    key, (_, ts, *_) = jax.random.key(4), states
    network = chain(backbone=NETS["distill"], head=models.classifier(10))

    @jax.jit
    def losses(params):
        logits, _ = network.apply(params, ts.state, noisy(key, data), True)
        want = -jax.nn.log_softmax(logits)[jnp.arange(B), labels].mean()
        return want, jax.value_and_grad(lambda p: method.loss(p, ts.state, data, key)[0])(params)

    want, (got, grads) = losses(ts.params)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize("make", [simsiam.make, partial(fastsiam.make, views=2)])
def test_an_exact_collapse_is_seen(make):
    """Features that are all zeros have a spread of 0, of which a warning tells; of NaN none is."""
    nothing = Network(lambda rng, x: ({}, {}), lambda p, s, x, *_: (jnp.zeros((len(x), 8)), s))
    batch = {"image": jnp.zeros((4, 6, 6, 1), jnp.uint8)}
    method = make(nothing, nothing, nothing, lambda rng, batch: batch["image"] / 255.0)
    params, state = method.init(jax.random.key(0), batch)
    _, (_, metrics) = method.loss(params, state, batch, jax.random.key(1))
    assert metrics["z_std"] == 0
    assert "have collapsed" in watch(1, 8)(1, {"loss": 0.0, "z_std": float(metrics["z_std"])})

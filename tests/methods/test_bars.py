"""Cost of a step without a clock: operations, convolutions, donated bytes, dtypes, layouts, traces.

The steps are those of ResNet-50 at 224 pixels with bfloat16 convolutions, traced and lowered but
never compiled, so that the figures are the same on every machine; in quick tests each of its stages
has one block. What a step should cost is worked out here from the papers' layers; each bar is also
shown something that must not pass it.
"""

from collections import Counter
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_networks
from jax.interpreters import partial_eval as pe

from qmx import augment, distill, fit, init_state, make_step, moco, models, optim, rotation, simsiam
from qmx.contract import Network, wide
from qmx.data.batches import feed
from qmx.data.sources import in_memory
from qmx.models.resnet import Arch, ResNet
from qmx.sharding import put_batch, put_state

BATCH, SIDE, QUEUE = 8, 224, 64
METHODS = ("distill", "moco", "simsiam", "rotation")
RESNET50, SHALLOW = (3, 4, 6, 3), (1, 1, 1, 1)
CASES = [
    *(pytest.param(name, SHALLOW, id=name) for name in METHODS[:2]),
    *(
        pytest.param(name, RESNET50, id=f"{name}-resnet50", marks=pytest.mark.slow)
        for name in METHODS
    ),
]
KEY = jax.random.key(0)
TX = optim.sgd(lambda step: 0.01, weight_decay=1e-4)


def resnet(blocks=SHALLOW, dtype=jnp.bfloat16, **keys):
    """ResNet-50's stages with so many blocks."""
    return models.from_linen(ResNet(Arch(blocks, bottleneck=True), dtype=dtype, **keys))


def make(name, net=resnet, view=None, features=2048, hidden=512, queue=QUEUE):
    """A method on the backbones that `net(**keys)` makes, and by default a view that costs
    nothing."""
    view = view or augment.plain_view()
    return {
        "distill": lambda: distill.make(net(), models.classifier(1000), view),
        "moco": lambda: moco.make(net(stats_groups=2), models.moco_head(), view, queue_size=queue),
        "simsiam": lambda: simsiam.make(
            net(),
            models.simsiam_projector(features),
            models.simsiam_predictor(hidden),
            view,
        ),
        "rotation": lambda: rotation.make(net(), models.classifier(4), view),
    }[name]()


def arguments(method, side=SIDE):
    """The shapes of what a step takes."""
    batch = {
        "image": jax.ShapeDtypeStruct((BATCH, side, side, 3), jnp.uint8),
        "scores": jax.ShapeDtypeStruct((BATCH, 1000), jnp.float32),
    }
    return jax.eval_shape(lambda: init_state(method, TX, KEY, batch)), batch, KEY


@cache
def traced(name, blocks=SHALLOW):
    """(the step's jaxpr without what nothing reads, the step lowered, the state's shapes) of a
    method."""
    method = make(name, partial(resnet, blocks))
    given = arguments(method)
    trace = make_step(method, TX).trace(*given)
    jaxpr = trace.jaxpr.jaxpr
    # The images' gradient is traced beside the first kernel's, and dropped by the compiler.
    return pe.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0], trace.lower(), given[0]


def equations(jaxpr):
    """Every equation of a jaxpr and of those inside it; of a choice by platform what every other
    platform gets.

    What CPUs get instead is in the lowered step, whose operations are counted too.
    """
    for eqn in jaxpr.eqns:
        yield eqn
        inner = []
        for value in eqn.params.values():
            for part in value if isinstance(value, (tuple, list)) else (value,):
                part = getattr(part, "jaxpr", part)
                if hasattr(part, "eqns"):
                    inner.append(list(equations(part)))
        if eqn.primitive.name == "cond":
            inner = inner[-1:]
        for _ in range(eqn.params["length"] if eqn.primitive.name == "scan" else 1):
            for part in inner:
                yield from part


def taps(out, kernel, stride, low, pixels, spread=1, apart=1):
    """How many products one axis of a convolution makes, those with padding or between spread
    pixels left out."""
    at = np.arange(out)[:, None] * stride + np.arange(kernel) * apart - low
    return int(((at >= 0) & (at <= (pixels - 1) * spread) & (at % spread == 0)).sum())


def macs(eqn):
    """Multiplications of a convolution or a matrix product, 0 of anything else."""
    keys = eqn.params
    if eqn.primitive.name == "dot_general":
        (left, _), (batched, _) = keys["dimension_numbers"]
        a, b = (x.aval for x in eqn.invars)
        shared = int(np.prod([a.shape[i] for i in (*left, *batched)]))
        batches = int(np.prod([a.shape[i] for i in batched]))
        return a.size * (b.size // shared) if batches else a.size * b.size // shared
    if eqn.primitive.name != "conv_general_dilated":
        return 0
    (image, kernel), out = (x.aval.shape for x in eqn.invars), eqn.outvars[0].aval.shape
    where, spec = keys["dimension_numbers"], range(len(out) - 2)
    products = out[where.out_spec[0]] * out[where.out_spec[1]] * kernel[where.rhs_spec[1]]
    for i in spec:
        products *= taps(
            out[where.out_spec[2 + i]],
            kernel[where.rhs_spec[2 + i]],
            keys["window_strides"][i],
            keys["padding"][i][0],
            image[where.lhs_spec[2 + i]],
            keys["lhs_dilation"][i],
            keys["rhs_dilation"][i],
        )
    return products // keys["batch_group_count"]


def convolutions(blocks, side=SIDE):
    """(multiplications without padding, with it) of each convolution for one image. He et al. 2016,
    table 1."""

    def layer(inputs, outputs, kernel, stride, pixels):
        out = pixels // stride
        return tuple(
            inputs * outputs * n**2
            for n in (taps(out, kernel, stride, kernel // 2, pixels), out * kernel)
        )

    yield layer(3, 64, 7, 2, side)
    inputs, pixels = 64, side // 4
    for stage, count in enumerate(blocks):
        planes = 64 * 2**stage
        for block in range(count):
            stride = 2 if stage and not block else 1
            yield layer(inputs, planes, 1, 1, pixels)
            yield layer(planes, planes, 3, stride, pixels)  # v1.5: the stride is here
            yield layer(planes, 4 * planes, 1, 1, pixels // stride)
            if not block:
                yield layer(inputs, 4 * planes, 1, stride, pixels)
            inputs, pixels = 4 * planes, pixels // stride


# Each Linear's multiplications: He et al. 2016; MoCo v2, section 3; SimSiam, section 3; Gidaris et
# al. 2018.
HEADS = {
    "distill": [2048 * 1000],
    "moco": [2048 * 2048, 2048 * 128],
    "simsiam": [2048 * 2048] * 3 + [2048 * 512, 512 * 2048],
    "rotation": [2048 * 4],
}


def expected(name, blocks=SHALLOW):
    """(multiplications of a step for an image, least and most; matrix products and convolutions of
    a step).

    Every layer is multiplied three times, forward, for its input's gradient and for its kernel's,
    but that the images need no gradient. MoCo adds a forward pass, the keys', and the logits,
    forward and for the queries. Least counts no product with padding, most all of them.
    """
    bounds = []
    for padded in (0, 1):
        layers = [layer[padded] for layer in convolutions(blocks)]
        forward = sum(layers) + sum(HEADS[name])
        train = 3 * forward - layers[0]
        bounds.append(
            {
                "distill": train,
                "moco": train + forward + 2 * QUEUE * 128,
                "simsiam": 2 * train,
                "rotation": 4 * train,
            }[name]
        )
    count = len(layers) + len(HEADS[name])
    each = 3 * count - 1
    return (
        *bounds,
        {"distill": each, "moco": each + count + 2, "simsiam": 2 * each, "rotation": each}[name],
    )


def contractions(jaxpr):
    """What `macs` says of each convolution and matrix product."""
    return [n for n in map(macs, equations(jaxpr)) if n]


def test_published_operations():
    """The figures that all the rest is derived from: 4.09 G for the network, and 53
    convolutions."""
    layers = list(convolutions(RESNET50))
    assert len(layers) == 53
    assert sum(padded for _, padded in layers) + 2048 * 1000 == pytest.approx(4.089e9, rel=1e-3)


@pytest.mark.parametrize("name, blocks", CASES)
def test_operations(name, blocks):
    """No more multiplications than the method needs: no forward pass twice, no gradient that nobody
    asked for."""
    least, most, count = expected(name, blocks)
    jaxpr, lowered, _ = traced(name, blocks)
    found = contractions(jaxpr)
    # A 1x1 convolution may be written as a matrix product, and a 3x3 as one over padded patches:
    # the bounds hold.
    assert least <= sum(found) / BATCH <= most
    assert len(found) == count
    kinds = Counter(eqn.primitive.name for eqn in equations(jaxpr))
    each = {RESNET50: 53, SHALLOW: 17}[blocks]  # convolutions of a forward pass
    times = {"distill": 3, "moco": 4, "simsiam": 6, "rotation": 3}[name]
    assert kinds["conv_general_dilated"] <= times * each - (2 if name == "simsiam" else 1)
    cost = lowered.cost_analysis()
    # XLA counts what is done to each number too, which is 0.4 % of it (jax 0.10 to 0.12), and
    # leaves out the padding.
    assert 2 * least < cost["flops"] / BATCH < 2 * most * 1.02


def test_views_are_cheap():
    """Both of MoCo's views together cost less than 3 % of its step."""
    view = augment.make_view(SIDE)
    images = {"image": jax.ShapeDtypeStruct((BATCH, 256, 256, 3), jnp.uint8)}
    one = sum(contractions(jax.make_jaxpr(view)(KEY, images).jaxpr)) / BATCH
    assert 0 < 2 * one < 0.03 * expected("moco", RESNET50)[0]


@pytest.mark.parametrize("name, blocks", CASES)
def test_state_is_donated(name, blocks):
    """Each array of the state may be written over in place."""
    _, lowered, state = traced(name, blocks)
    assert lowered.as_text().count("tf.aliasing_output") == len(jax.tree.leaves(state))


def test_bytes_of_a_state():
    """ResNet-50's parameters and momentum, means and variances, 4 bytes each."""
    state, _, _ = arguments(make("distill", partial(resnet, RESNET50)))
    floats = sum(
        leaf.size * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(state)
        if jnp.issubdtype(leaf.dtype, jnp.floating)
    )
    assert floats == 4 * (2 * 25_557_032 + 2 * 26_560)


def audit(jaxpr, dtype):
    """What is wrong with the dtypes of a step, in words."""
    found = []
    for eqn in equations(jaxpr):
        kinds = {x.aval.dtype for x in eqn.invars if hasattr(x.aval, "dtype")}
        floats = {str(kind) for kind in kinds if jnp.issubdtype(kind, jnp.floating)}
        name = eqn.primitive.name
        if name == "conv_general_dilated" and floats != {str(jnp.dtype(dtype))}:
            found.append(f"a convolution of {sorted(floats)}")
        if name in (
            "reduce_sum",
            "reduce_max",
            "log",
            "exp",
            "rsqrt",
            "div",
            "cumsum",
        ) and floats - {"float32"}:
            found.append(f"{name} of {sorted(floats)}")
        if any(word in name for word in ("callback", "debug", "infeed", "outfeed")):
            found.append(f"{name}: the step waits for the host")
        if str(jnp.dtype("float64")) in floats:
            found.append(f"{name} in float64")
    return found


def layout(jaxpr):
    """What is wrong with the convolutions of a forward pass, in words."""
    found = []
    for eqn in equations(jaxpr):
        if eqn.primitive.name == "conv_general_dilated":
            where = eqn.params["dimension_numbers"]
            if (where.lhs_spec, where.rhs_spec, where.out_spec) != (
                (0, 3, 1, 2),
                (3, 2, 0, 1),
                (0, 3, 1, 2),
            ):
                found.append(f"a convolution that is not NHWC, HWIO: {where}")
            if any(low != high for low, high in eqn.params["padding"]):
                found.append(f"padding that is not symmetric: {eqn.params['padding']}")
        if eqn.primitive.name == "transpose" and eqn.invars[0].aval.ndim > 3:
            found.append(f"a transpose of {eqn.invars[0].aval.str_short()}")
    return found


@pytest.mark.parametrize("name, blocks", CASES)
def test_dtypes(name, blocks):
    """Convolutions in bfloat16, forward and backward; sums, logarithms, parameters and their like
    in float32."""
    jaxpr, _, state = traced(name, blocks)
    assert audit(jaxpr, jnp.bfloat16) == []
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state)} <= {"float32", "int32"}


@pytest.mark.parametrize("name, blocks", CASES)
def test_layout(name, blocks):
    """Images stay NHWC from end to end, kernels HWIO, and every convolution is padded alike on both
    sides."""
    method = make(name, partial(resnet, blocks))
    state, batch, _ = arguments(method)
    forward = jax.make_jaxpr(method.loss)(state.params, state.state, batch, KEY).jaxpr
    # A quarter turn is a transpose of the images, and there are two that turn sideways.
    turns = {"rotation": [f"a transpose of float32[{BATCH},{SIDE},{SIDE},3]"] * 2}.get(name, [])
    assert layout(forward) == turns
    whole = Counter(
        eqn.primitive.name
        for eqn in equations(traced(name, blocks)[0])
        if eqn.invars and getattr(eqn.invars[0].aval, "ndim", 0) > 3
    )
    assert whole["transpose"] == len(turns)  # nor does a gradient turn anything


SMALL = {**dict.fromkeys(METHODS, small_networks.layers), "distill": small_networks.residual}


@pytest.fixture(
    scope="module",
    params=[*METHODS[:2], *(pytest.param(name, marks=pytest.mark.slow) for name in METHODS[2:])],
)
def running(request):
    """(step, any state, batches) of a method on a small network and 8-pixel images, on the tests'
    devices."""
    name = request.param
    method = make(name, SMALL[name], augment.plain_view(), 16, 8)
    rng = np.random.default_rng(0)
    batches = [
        put_batch(
            {
                "image": rng.integers(0, 256, (BATCH, 8, 8, 3), np.uint8),
                "scores": rng.normal(size=(BATCH, 1000)).astype(np.float32),
            }
        )
        for _ in range(3)
    ]
    state = jax.tree.map(
        lambda x: np.abs(0.1 * rng.normal(size=x.shape)).astype(x.dtype), arguments(method, 8)[0]
    )
    return make_step(method, TX), state, batches


def test_one_trace_and_no_transfer(running):
    """Steps are traced once and take nothing from the host; all bytes of the old state go to the
    new one."""
    step, state, batches = running
    old, key = put_state((state, KEY))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(old))
    new, _ = step(old, batches[0], key)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
    with jax.transfer_guard("disallow"):
        for batch in batches:
            new, metrics = step(new, batch, key)
        jax.block_until_ready((new, metrics))
        assert step._cache_size() == 1
        with pytest.raises(Exception, match="isallowed"):  # the guard is awake
            step(new, {name: np.asarray(rows) for name, rows in batches[0].items()}, key)
    compiled = step.lower(new, batches[0], key).compile()
    assert compiled.memory_analysis().alias_size_in_bytes == size


def test_loop_sends_nothing_else(running):
    """Nor does the loop around them: what reaches the device are the batches alone."""
    step, state, batches = running
    state, key = put_state((state, KEY))
    seen = []
    with (
        jax.transfer_guard_host_to_device("disallow"),
        jax.transfer_guard_device_to_device("disallow"),
    ):
        fit(
            step,
            state,
            lambda start: iter(batches[:2]),
            key,
            steps=2,
            on_metrics=lambda done, _: seen.append(done),
        )
    assert seen == [1, 2]


def test_several_steps_in_one_dispatch():
    """One compilation for full dispatches and for one that the number of steps cuts short; a line
    for every step."""
    flat = Network(
        lambda rng, x: ({"w": jax.random.normal(rng, (x[0].size, 10))}, {}),
        lambda params, stats, x, train, rng=None: (x.reshape(len(x), -1) @ params["w"], stats),
    )
    method = distill.make(flat, models.classifier(5), augment.plain_view())
    rng = np.random.default_rng(0)
    source = in_memory(
        image=rng.integers(0, 256, (40, 4, 4, 3), np.uint8),
        scores=rng.normal(size=(40, 5)).astype(np.float32),
    )
    like = source.read(np.arange(8))
    state = put_state(jax.jit(lambda: init_state(method, TX, KEY, like))())
    step, seen = make_step(method, TX), []
    state = fit(
        step,
        state,
        lambda start: feed(source, 8, steps=99, seed=0, start=start, at_once=3),
        put_state(KEY),
        steps=7,
        on_metrics=lambda done, metrics: seen.append((done, metrics["loss"])),
    )
    assert [done for done, _ in seen] == [1, 2, 3, 4, 5, 6, 7] and int(state.step) == 7
    assert len({loss for _, loss in seen}) == 7 and step._cache_size() == 1


def test_lost_stop_gradient(monkeypatch):
    """MoCo whose keys are differentiated too passes neither bar of the operations."""
    monkeypatch.setattr(jax.lax, "stop_gradient", lambda x: x)
    method = make("moco")
    state, batch, _ = arguments(method)
    found = contractions(
        jax.make_jaxpr(jax.grad(method.loss, has_aux=True))(
            state.params, state.state, batch, KEY
        ).jaxpr
    )
    least, most, count = expected("moco")
    assert sum(found) / BATCH > 1.4 * most and len(found) > count


def test_recomputed():
    """So does a step that computes its forward pass twice."""
    method = make("distill")
    twice = method._replace(loss=jax.checkpoint(method.loss))
    found = contractions(make_step(twice, TX).trace(*arguments(method)).jaxpr.jaxpr)
    assert sum(found) / BATCH > 1.25 * expected("distill")[1]


def test_lost_donation():
    """A step that keeps the old state gives no bytes to the new one, and no array is named."""
    method = make("distill", SMALL["distill"])
    kept = jax.jit(make_step(method, TX).__wrapped__).lower(*arguments(method, 8))
    assert "tf.aliasing_output" not in kept.as_text()
    assert kept.compile().memory_analysis().alias_size_in_bytes == 0


def test_upcast():
    """A network in float32, a sum in bfloat16, images turned over, a pad on one side: each is
    named."""
    method = make("distill", partial(resnet, dtype=jnp.float32))
    state, batch, _ = arguments(method)
    wrong = audit(
        jax.make_jaxpr(method.loss)(state.params, state.state, batch, KEY).jaxpr, jnp.bfloat16
    )
    assert wrong == ["a convolution of ['float32']"] * 17

    def odd(x, kernel):
        y = jax.lax.conv_general_dilated(
            x.transpose(0, 3, 1, 2),
            kernel,
            (2, 2),
            "SAME",
            dimension_numbers=("NCHW", "HWIO", "NCHW"),
        )
        jax.debug.print("{}", wide(y).sum())
        return jax.lax.reduce_sum_p.bind(y, axes=(0, 1, 2, 3), out_sharding=None)

    x, kernel = jnp.zeros((2, 8, 8, 4), jnp.bfloat16), jnp.zeros((3, 3, 4, 4), jnp.bfloat16)
    jaxpr = jax.make_jaxpr(odd)(x, kernel).jaxpr
    assert [words.split(":")[0] for words in layout(jaxpr)] == [
        "a transpose of bfloat16[2,8,8,4]",
        "a convolution that is not NHWC, HWIO",
        "padding that is not symmetric",
    ]
    assert audit(jaxpr, jnp.bfloat16) == [
        "debug_print: the step waits for the host",
        "reduce_sum of ['bfloat16']",
    ]

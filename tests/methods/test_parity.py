"""The same numbers as PyTorch: losses, layers, networks, optimiser, ten steps of each method."""

from functools import partial

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_reference as reference
from torch_reference import F, tensor, torch, variables

import qmx
from qmx import losses, models, optim
from qmx.contract import by_path
from qmx.models.conv import convolve, plain
from qmx.models.heads import Linear
from qmx.models.norm import BatchNorm
from qmx.models.resnet import ARCHS, Arch, Conv, ResNet

close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tensors this small are slower on several threads, by far where cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def normal(seed, *shape, scale=1.0, shift=0.0):
    """f32 from a normal distribution."""
    return (np.random.default_rng(seed).normal(size=shape) * scale + shift).astype(np.float32)


def unit(x):
    """Rows of unit length."""
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def relative(ours, theirs):
    """The largest difference of two dicts of arrays, tensor by tensor, over the tensor's largest
    value."""
    assert ours.keys() == theirs.keys()
    return {
        name: np.abs(ours[name] - theirs[name]).max() / np.abs(theirs[name]).max()
        for name in theirs
    }


def arrays(net):
    """The state dict of a torch module as copies in NumPy."""
    return {name: value.detach().numpy().copy() for name, value in net.state_dict().items()}


def as_arrays(params, stats):
    """Variables of a qmx network as `arrays` names and lays them out."""
    return {name: value.numpy() for name, value in variables(params, stats).items()}


# Losses


@pytest.mark.parametrize("temperature", [0.07, 0.2, 1.0])
def test_info_nce(temperature):
    """Cross-entropy with label 0 over [positive, queue] / T; the gradient of q too."""
    q, k, queue = (unit(normal(seed, n, 16)) for seed, n in enumerate((8, 8, 32)))

    def ours(q):
        value, logits = losses.info_nce(q, k, queue, temperature)
        return value.mean(), (value, logits)

    grad, (value, logits) = jax.jit(jax.grad(ours, has_aux=True))(q)

    tq = tensor(q).requires_grad_()
    theirs = (
        torch.cat([(tq * tensor(k)).sum(1, keepdim=True), tq @ tensor(queue).T], 1) / temperature
    )
    loss = F.cross_entropy(theirs, torch.zeros(8, dtype=torch.long), reduction="none")
    loss.mean().backward()
    assert logits.shape == (8, 33) and value.shape == (8,)
    close(logits, theirs.detach())
    close(value, loss.detach())
    close(grad, tq.grad)


def test_negative_cosine():
    """Minus torch's cosine similarity, row by row; long, short and zero rows; the gradient
    of p."""
    p, z = normal(0, 9, 16), normal(1, 9, 16)
    p[:3] *= 1e3
    p[3:6] *= 1e-3
    grad = jax.jit(jax.grad(lambda p: losses.negative_cosine(p, z).mean()))(p)
    tp = tensor(p).requires_grad_()
    loss = -F.cosine_similarity(tp, tensor(z))
    loss.mean().backward()
    value = losses.negative_cosine(p, z)
    assert value.shape == (9,)
    close(value, loss.detach())
    # Rows of very different size.
    for ours, theirs in zip(np.asarray(grad), tp.grad.numpy(), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5 * np.abs(theirs).max())
    p[0] = 0
    close(losses.negative_cosine(p, z), -F.cosine_similarity(tensor(p), tensor(z)))


@pytest.mark.parametrize(
    "target_temperature, student_temperature", [(1.0, 1.0), (1.5, 1.0), (4.0, 4.0), (2.0, 0.5)]
)
def test_kl(target_temperature, student_temperature):
    """Torch's kl_div of the softened sides, times the student's T squared; the gradient
    too."""
    target, student = normal(0, 8, 10, scale=3), normal(1, 8, 10, scale=3)

    def ours(s):
        value = losses.kl_target_student(target, s, target_temperature, student_temperature)
        return value.sum(), value

    grad, value = jax.jit(jax.grad(ours, has_aux=True))(student)
    ts = tensor(student).requires_grad_()
    loss = (
        F.kl_div(
            F.log_softmax(ts / student_temperature, 1),
            F.softmax(tensor(target) / target_temperature, 1),
            reduction="none",
        ).sum(1)
        * student_temperature**2
    )
    loss.sum().backward()
    close(value, loss.detach())
    close(grad, ts.grad)


@pytest.mark.parametrize("temperature", [1.0, 1.5])
def test_soft_cross_entropy(temperature):
    """torch's cross-entropy with probabilities as the target; the KL divergence plus the target's
    entropy."""
    target, student = normal(0, 8, 10, scale=3), normal(1, 8, 10, scale=3)
    probabilities = F.softmax(tensor(target) / temperature, 1)
    value = losses.soft_cross_entropy(target, student, temperature)
    close(value, F.cross_entropy(tensor(student), probabilities, reduction="none"))
    entropy = -(probabilities * probabilities.log()).sum(1).numpy()
    close(losses.kl_target_student(target, student, temperature) + entropy, value)


@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_hard_labels(scale):
    """Scores of log one-hot rows give torch's cross-entropy with labels, for extreme logits
    too."""
    labels, student = np.arange(8) % 5, normal(1, 8, 5, scale=scale)
    hard = np.log(
        np.eye(5, dtype=np.float32)[labels],
        where=np.eye(5)[labels] > 0,
        out=np.full((8, 5), -np.inf, "f"),
    )
    theirs = tensor(student).requires_grad_()
    loss = F.cross_entropy(theirs, tensor(labels), reduction="none")
    loss.sum().backward()
    for function in (
        partial(losses.kl_target_student, target_temperature=1.5),
        losses.soft_cross_entropy,
    ):
        value, gradient = jax.jit(
            lambda s, f=function: (f(hard, s), jax.grad(lambda s: f(hard, s).sum())(s))
        )(student)
        close(value, loss.detach())
        close(gradient, theirs.grad)


# Layers


@pytest.mark.parametrize("shape", [(16, 6), (16, 5, 4, 6)], ids=["2d", "4d"])
@pytest.mark.parametrize("groups", [1, 4])
def test_batch_norm(groups, shape):
    """Forward, backward and running statistics are those of one torch module for each
    group."""
    channels = shape[-1]
    layer = models.from_linen(BatchNorm(groups))
    params, stats = jax.eval_shape(layer.init, jax.random.key(0), jnp.zeros(shape))
    params = {"scale": normal(1, channels, shift=1), "bias": normal(2, channels)}
    stats = {"mean": normal(3, channels), "var": np.exp(normal(4, channels))}
    kind = torch.nn.BatchNorm1d if len(shape) == 2 else torch.nn.BatchNorm2d
    theirs = [kind(channels) for _ in range(groups)]
    for module in theirs:
        module.load_state_dict(variables(params, stats), strict=False)
    weights = normal(5, *shape)

    @jax.jit
    def ours(params, stats, x):
        def total(params, x):
            y, new = layer.apply(params, stats, x, True)
            return (y * weights).sum(), (y, new)

        return jax.grad(total, argnums=(0, 1), has_aux=True)(params, x)

    for step in range(3):
        x = normal(10 + step, *shape, scale=3, shift=5)
        (grads, dx), (y, stats) = ours(params, stats, x)
        tx = tensor(x).requires_grad_()
        ty = torch.cat(
            [module(part) for module, part in zip(theirs, tx.chunk(groups), strict=True)]
        )
        (ty * tensor(weights)).sum().backward()
        close(tensor(y), ty.detach(), atol=1e-5)
        close(tensor(dx), tx.grad, atol=1e-5)
        close(grads["scale"], sum(m.weight.grad for m in theirs), rtol=1e-4, atol=1e-5)
        close(grads["bias"], sum(m.bias.grad for m in theirs), rtol=1e-4, atol=1e-5)
        close(stats["mean"], sum(m.running_mean for m in theirs) / groups)
        close(stats["var"], sum(m.running_var for m in theirs) / groups)
        for module in theirs:
            module.zero_grad()

    # Evaluation: one module with the shared running statistics, whatever the groups.
    module = theirs[0].eval()
    module.load_state_dict(variables(params, stats), strict=False)
    y, after = layer.apply(params, stats, x, False)
    close(tensor(y), module(tensor(x)).detach(), atol=1e-5)
    assert after is stats


@pytest.mark.parametrize(
    "kernel, stride, groups",
    [(1, 1, 1), (1, 2, 1), (3, 1, 1), (3, 2, 1), (7, 2, 1), (1, 1, 4), (3, 1, 4), (3, 2, 4)],
)
@pytest.mark.parametrize("dtype, rtol", [("float32", 1e-5), ("float64", 1e-12)])
def test_convolution(kernel, stride, groups, dtype, rtol):
    """As CPUs and as other devices compute it: torch's convolution and its gradients, odd and even
    sides."""
    given, wanted = [], []
    for side in (9, 12):
        x, weight = (
            normal(i, *shape).astype(dtype)
            for i, shape in enumerate([(40, side, side, 8), (kernel, kernel, 8 // groups, 12)])
        )
        tx, tw = (
            tensor(x).requires_grad_(),
            tensor(weight.transpose(3, 0, 1, 2)).detach().requires_grad_(),
        )
        ty = F.conv2d(tx, tw, None, stride, kernel // 2, 1, groups)
        dy = normal(2, *ty.permute(0, 2, 3, 1).shape).astype(dtype)
        ty.backward(tensor(dy))
        given.append((x, weight, dy))
        wanted.append((ty.detach(), tx.grad, tw.grad.permute(2, 3, 1, 0)))

    @jax.jit  # one program for all four, which compiles more quickly
    def found(given):
        def one(function, x, kernel, dy):
            y, gradients = jax.vjp(lambda x, k: function(x, k, stride, groups), x, kernel)
            return y, *gradients(dy)

        return [[one(function, *each) for each in given] for function in (convolve, plain)]

    with jax.enable_x64(dtype == "float64"):
        ours = found(given)
    for of_one in ours:
        for (y, dx, dk), theirs in zip(of_one, wanted, strict=True):
            assert y.dtype == dx.dtype == dk.dtype == dtype
            for mine, their in zip((tensor(y), tensor(dx), dk), theirs, strict=True):
                np.testing.assert_allclose(
                    mine, their.numpy(), rtol=rtol, atol=rtol * float(their.abs().max())
                )


def test_batch_norm_without_affine():
    """As torch's `affine=False`, and without parameters."""
    layer, x = BatchNorm(affine=False), normal(0, 16, 6, shift=2)
    variables = layer.init(jax.random.key(0), x, True)
    module = torch.nn.BatchNorm1d(6, affine=False)
    assert set(variables) == {"batch_stats"}
    y, new = layer.apply(variables, x, True, mutable=["batch_stats"])
    close(y, module(tensor(x)), atol=1e-5)
    close(new["batch_stats"]["var"], module.running_var)


def test_network_without_parameters():
    """A layer that only normalises is a `Network` too, for instance to standardise pooled
    features."""
    net, x = models.from_linen(BatchNorm(affine=False)), normal(0, 16, 6, shift=2)
    params, stats = net.init(jax.random.key(0), x)
    assert params == {}
    close(
        net.apply(params, stats, x, True)[0],
        torch.nn.BatchNorm1d(6, affine=False)(tensor(x)),
        atol=1e-5,
    )


def test_batch_norm_far_from_zero():
    """A mean of a thousand standard deviations costs the rounding of the mean (3e-5 here), not the
    variance."""
    x = normal(0, 64, 6, scale=0.5, shift=500)
    layer = models.from_linen(BatchNorm())
    params, stats = layer.init(jax.random.key(0), x)
    module = torch.nn.BatchNorm1d(6).double()
    y, stats = layer.apply(params, stats, x, True)
    np.testing.assert_allclose(y, module(tensor(x).double()).detach(), atol=5e-4)
    np.testing.assert_allclose(stats["var"], module.running_var, rtol=1e-5)


# Networks

RESNETS = {
    "resnet8": (ARCHS["resnet8"], 8),
    "resnet8_odd": (ARCHS["resnet8"], 9),
    "large_stem": (Arch((1, 2), bottleneck=False, width=8), 32),
    "large_stem_odd": (Arch((1, 1), bottleneck=False, width=8), 35),
    "bottleneck": (Arch((2, 1), bottleneck=True, width=8, stem="small"), 8),
    "resnext": (
        Arch((2, 1), bottleneck=True, width=64, groups=4, width_per_group=4, stem="small"),
        8,
    ),
}


def their_resnet(arch, channels, splits=1):
    return reference.ResNet(*arch, channels, splits)


def fill(tree, seed):
    """Numbers for the variables of a network whose shapes are given: no scale is 1, no mean is
    0."""
    rng = np.random.default_rng(seed)

    def value(path, leaf):
        kind = path[-1].key
        if kind == "kernel":
            return normal(rng, *leaf.shape, scale=np.prod(leaf.shape[:-1]) ** -0.5)
        return (
            rng.uniform(0.5, 1.5, leaf.shape).astype("f")
            if kind in ("scale", "var")
            else normal(rng, *leaf.shape)
        )

    return jax.tree_util.tree_map_with_path(value, tree)


@pytest.mark.parametrize("arch, side", RESNETS.values(), ids=RESNETS)
def test_resnet_forward(arch, side):
    """Padding, strides, shortcuts, grouped convolutions and max-pool of torch, in evaluation mode.

    Even and odd sides, since "SAME" pads them differently; running statistics that are not 0 and 1.
    """
    net, x = models.from_linen(ResNet(arch)), normal(0, 4, side, side, 3)
    params, stats = (
        fill(tree, i) for i, tree in enumerate(jax.eval_shape(net.init, jax.random.key(0), x))
    )
    module = their_resnet(arch, 3).eval()
    module.load_state_dict(variables(params, stats))  # strict: every name, every shape
    y = jax.jit(lambda *given: net.apply(*given, False)[0])(params, stats, x)
    with torch.no_grad():
        theirs = module(tensor(x)).numpy()
    assert y.shape == (4, module.features)
    np.testing.assert_allclose(y, theirs, atol=1e-5 * np.abs(theirs).max())


# Initialisation

QUANTILES = [0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99]


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("kernel", [1, 3])
def test_conv_init(kernel, groups):
    """torchvision's initialisation: Kaiming normal with fan_out, not divided by the groups."""
    ours = jax.jit(Conv(256, kernel, groups=groups, dtype=jnp.float32, name="conv").init)(
        jax.random.key(1), jnp.zeros((1, 4, 4, 256))
    )["params"]["kernel"]
    torch.manual_seed(0)
    theirs = torch.nn.Conv2d(256, 256, kernel, groups=groups, bias=False).weight
    torch.nn.init.kaiming_normal_(theirs, mode="fan_out", nonlinearity="relu")
    theirs = theirs.detach().numpy()
    assert ours.shape == theirs.transpose(2, 3, 1, 0).shape
    spread = theirs.std()
    np.testing.assert_allclose(spread, (2 / (kernel**2 * 256)) ** 0.5, rtol=0.03)
    np.testing.assert_allclose(
        np.quantile(ours, QUANTILES), np.quantile(theirs, QUANTILES), atol=0.06 * spread
    )
    np.testing.assert_allclose(np.std(ours), spread, rtol=0.03)


def test_resnet_init():
    """Every convolution as torchvision's, by its name; scales 1, biases 0, the last scales 0 if
    asked."""
    torch.manual_seed(0)
    arch = ARCHS["resnet8"]._replace(blocks=(1, 1))
    for zero_init in (False, True):
        net = models.from_linen(ResNet(arch, zero_init=zero_init))
        params, stats = jax.jit(net.init)(jax.random.key(0), jnp.zeros((2, 8, 8, 3)))
        ours = as_arrays(params, stats)
        module = their_resnet(arch, 3)
        assert ours.keys() == module.state_dict().keys()
        for name, layer in module.named_modules():
            if isinstance(layer, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            if zero_init and name.endswith(".bn2"):
                torch.nn.init.zeros_(layer.weight)
        for name, theirs in arrays(module).items():
            if theirs.ndim == 4:  # the smallest has 432 entries, three standard errors are 10 %
                np.testing.assert_allclose(ours[name].std(), theirs.std(), rtol=0.15, err_msg=name)
            else:
                np.testing.assert_array_equal(ours[name], theirs, err_msg=name)


@pytest.mark.parametrize("bias", [True, False, "frozen"])
def test_linear_init(bias):
    """torch's Linear: uniform in +-1/sqrt(fan_in), the bias too, and a frozen one among the
    statistics."""
    fan_in, features = 400, 1000

    class Layer(flax.linen.Module):
        @flax.linen.compact
        def __call__(self, x, train):
            return Linear(features, bias, name="fc")(x)

    net = models.from_linen(Layer())
    params, stats = jax.jit(net.init)(jax.random.key(0), jnp.zeros((2, fan_in)))
    torch.manual_seed(0)
    module = torch.nn.Linear(fan_in, features, bias=bool(bias))
    ours = as_arrays(params, stats)
    assert ours.keys() == {f"fc.{name}" for name, _ in module.named_parameters()}
    assert ("bias" in stats.get("fc", {})) == (bias == "frozen")
    for name, theirs in arrays(module).items():
        mine, limit = ours[f"fc.{name}"], fan_in**-0.5
        assert mine.shape == theirs.shape
        assert limit * 0.99 < np.abs(mine).max() <= limit * (1 + 1e-6)
        assert limit * 0.99 < np.abs(theirs).max() <= limit * (1 + 1e-6)
        np.testing.assert_allclose(
            np.quantile(mine, QUANTILES), np.quantile(theirs, QUANTILES), atol=0.15 * limit
        )
        np.testing.assert_allclose(mine.std(), theirs.std(), rtol=0.05)
    module.load_state_dict(
        {name.removeprefix("fc."): torch.from_numpy(value) for name, value in ours.items()}
    )
    x = normal(0, 4, fan_in)
    close(net.apply(params, stats, x, True)[0], module(tensor(x)).detach(), atol=1e-5)


# Optimiser


@pytest.mark.parametrize("weight_decay_on", ["all", "kernels"])
@pytest.mark.parametrize("momentum, nesterov", [(0.0, False), (0.9, False), (0.9, True)])
def test_sgd(momentum, nesterov, weight_decay_on):
    """Torch.optim.SGD with coupled weight decay, a moving rate and one rate for each part."""
    params = {
        part: {
            "kernel": normal(i, 4, 3),
            "scale": normal(i + 5, 3),
            "conv": normal(i + 9, 3, 3, 2, 2),
        }
        for i, part in enumerate(("backbone", "head"))
    }
    schedules = {
        "backbone": optim.schedule("cosine_by_epoch", 0.1, epochs=4, steps=8),
        "head": optim.schedule("constant", 0.7, epochs=4, steps=8),
    }
    rates = {"backbone": reference.cosine_by_epoch(0.1, 4, 8), "head": lambda step: 0.7}
    tx = optim.sgd(
        schedules,
        momentum=momentum,
        nesterov=nesterov,
        weight_decay=0.05,
        weight_decay_on=weight_decay_on,
    )
    groups, theirs = [], {}
    for path, leaf in by_path(params).items():
        theirs[path] = torch.nn.Parameter(torch.from_numpy(leaf.copy()))
        decay = 0.05 if weight_decay_on == "all" or leaf.ndim > 1 else 0.0
        groups.append(
            {"params": [theirs[path]], "schedule": rates[path.split("/")[0]], "weight_decay": decay}
        )
    sgd = torch.optim.SGD(groups, lr=0.0, momentum=momentum, nesterov=nesterov)
    state, apply = jax.jit(tx.init)(params), jax.jit(tx.update)
    for step in range(8):
        grads = jax.tree.map(lambda p, s=step: normal(100 + s, *p.shape), params)
        updates, state = apply(grads, state, params)
        params = jax.tree.map(np.add, params, updates)
        reference.update(
            sgd,
            step,
            sum(
                (
                    tensor(g) * theirs[path].permute(0, 3, 1, 2)
                    if g.ndim == 4
                    else torch.from_numpy(g) * theirs[path]
                ).sum()
                for path, g in by_path(grads).items()
            ),
        )
        for path, leaf in by_path(params).items():
            close(leaf, theirs[path].detach(), err_msg=path)


def test_sgd_with_one_rate_for_all():
    """A single schedule trains every part alike."""
    params = {"a": {"kernel": normal(0, 4, 3)}, "b": {"bias": normal(1, 3)}}
    grads = {"a": {"kernel": normal(2, 4, 3)}, "b": {"bias": normal(3, 3)}}
    rate = optim.schedule("constant", 0.3, epochs=1, steps=1)
    for tx in (
        optim.sgd(rate, weight_decay=0.1),
        optim.sgd({"a": rate, "b": rate}, weight_decay=0.1),
    ):
        updates, _ = tx.update(grads, tx.init(params), params)
        jax.tree.map(lambda u, g, p: close(u, -0.3 * (g + 0.1 * p)), updates, grads, params)


@pytest.mark.parametrize("decay", [0.0, 0.9, 0.999, 1.0])
def test_ema(decay):
    """Every leaf as NumPy averages it; the closed form for a constant; 0 copies and 1
    freezes."""
    average = optim.ema(decay)
    trees = [
        {"backbone": {"kernel": normal(i, 4, 3)}, "head": {"bias": normal(i + 50, 3)}}
        for i in range(6)
    ]
    state = average.init(trees[0])
    jax.tree.map(np.testing.assert_array_equal, state.average, trees[0])
    expected = jax.tree.map(np.float64, trees[0])
    for tree in trees[1:]:
        value, state = average.update(tree, state)
        expected = jax.tree.map(lambda e, t: decay * e + (1 - decay) * t, expected, tree)
        jax.tree.map(close, value, expected)
        jax.tree.map(np.testing.assert_array_equal, value, state.average)
    if decay in (0.0, 1.0):
        jax.tree.map(
            np.testing.assert_array_equal, state.average, trees[-1] if decay == 0 else trees[0]
        )

    start, constant = trees[0], trees[1]
    state = average.init(start)
    for _ in range(20):
        _, state = average.update(constant, state)
    jax.tree.map(
        lambda a, s, c: close(a, decay**20 * s + (1 - decay**20) * c),
        state.average,
        start,
        constant,
    )


# Ten steps of every method  The weight decay is larger than in the papers and the momentum encoder
# faster, so that ten steps without the one or with a wrong other stand out against the tolerance.
# The gradient of a ReLU jumps where its input is 0. Where one comes as close to that as rounding
# reaches, two correct float32 programs may take different sides, and after ten steps some weights
# differ by a thousandth to a tenth (against torch in float64 it was now the one, now both that had
# jumped). So the networks are narrow, to have few ReLUs, and the seeds of the data are ones with
# which none comes that close; `assert_losses` checks it. SimSiam's rate is 0.02, since at 0.05
# batch norm over the 8 rows of a group makes more of the rounding; scaled to the batch it would be
# 0.006.

STEPS, EPOCHS, SIDE, CLASSES = 10, 5, 8, 6
DECAY, TOLERANCE, MARGIN = 0.01, 1e-4, 4e-6
NARROW = Arch((1,), bottleneck=False, width=4, stem="small")


@jax.jit
def view(rng, batch):
    """A view that can be told again from its key."""
    image = batch["image"].astype(jnp.float32) / 255
    return image + 0.1 * jax.random.normal(rng, image.shape)


def images(rng, size):
    """Coarse images with some grain."""
    coarse = rng.uniform(0, 255, (size, SIDE // 2, SIDE // 2, 1)).repeat(2, 1).repeat(2, 2)
    return (coarse * rng.uniform(0.7, 1, (size, SIDE, SIDE, 1))).astype(np.uint8)


def batches(seed, size):
    """The same ten batches for both sides: images and scores, and two images of the pool for
    each."""
    rng, pool = np.random.default_rng(seed), np.random.default_rng(1000 + seed)
    for _ in range(STEPS):
        yield {
            "image": images(rng, size),
            "scores": normal(rng, size, CLASSES, scale=3),
            "pool_image": images(pool, 2 * size),
        }


def rate(name, value, **keywords):
    return optim.schedule(name, value, epochs=EPOCHS, steps=STEPS, **keywords)


def ten_steps(method, tx, follow, seed, size=32):
    """Train with qmx, and beside it with what `follow` makes of the state before the first step.

    follow: ts -> (step, batch, rng) -> loss. Returns the losses of both sides and qmx's last state.
    """
    first, root = next(batches(seed, size)), jax.random.key(1)
    ts = jax.jit(lambda rng: qmx.init_state(method, tx, rng, first))(jax.random.key(0))
    step, their_step, ours, theirs = qmx.make_step(method, tx), follow(ts), [], []
    for i, batch in enumerate(batches(seed, size)):
        theirs.append(their_step(i, batch, jax.random.fold_in(root, i)))
        ts, metrics = step(ts, batch, root)
        ours.append(float(metrics["loss"]))
    assert int(ts.step) == len(ours) == STEPS
    return ours, theirs, ts


def assert_losses(ours, theirs, net, atol=0.0):
    close_call = reference.margin(net)
    assert close_call > MARGIN, f"a ReLU came within {close_call:.0e} of its kink; take other data"
    np.testing.assert_allclose(ours, theirs, rtol=TOLERANCE, atol=atol)


def assert_parity(what, ours, theirs, before):
    """Every tensor within the tolerance of its largest value, and moved far beyond it from
    `before`."""
    off, moved = relative(ours, theirs), relative(before, theirs)
    worst, least = max(off, key=off.get), min(moved, key=moved.get)
    assert off[worst] <= TOLERANCE, (
        f"{what}: {worst} is off by {off[worst]:.1e} of its largest value"
    )
    assert moved[least] > 10 * TOLERANCE, (
        f"{what}: {least} hardly moved ({moved[least]:.1e}), which shows nothing"
    )


@pytest.mark.parametrize("groups, seed", [pytest.param(1, 35, marks=pytest.mark.slow), (4, 50)])
def test_moco_ten_steps(groups, seed):
    """Losses, both encoders with their running statistics, queue and pointer.

    The queue holds four batches, so the pointer wraps twice.
    """
    temperature, decay, features, size = 0.2, 0.9, 8, 32
    queue = 4 * size
    method = qmx.moco.make(
        models.from_linen(ResNet(NARROW, groups)),
        models.moco_head(features),
        view,
        queue_size=queue,
        temperature=temperature,
        decay=decay,
    )
    falling = rate("cosine_by_epoch", 0.03)
    tx = optim.sgd({"backbone": falling, "head": falling}, weight_decay=DECAY)
    seen = {}

    def network():
        backbone = their_resnet(NARROW, 1, groups)
        return reference.network(
            backbone=backbone, head=reference.moco_head(backbone.features, features)
        )

    def follow(ts):
        query, key = network(), network()
        query.load_state_dict(variables(ts.params, ts.state.stats))
        key.load_state_dict(variables(ts.state.key.average, ts.state.key_stats))
        moco = reference.MoCo(query, key, tensor(ts.state.queue), temperature, decay)
        seen.update(moco=moco, before=arrays(query), queue={"queue": np.array(ts.state.queue)})
        for name, value in arrays(key).items():
            np.testing.assert_array_equal(value, seen["before"][name], err_msg=name)
        np.testing.assert_allclose(np.linalg.norm(seen["queue"]["queue"], axis=1), 1, rtol=1e-5)
        falling = reference.cosine_by_epoch(0.03, EPOCHS, STEPS)
        sgd = reference.optimiser(
            query, {"backbone": falling, "head": falling}, momentum=0.9, weight_decay=DECAY
        )

        def step(i, batch, rng):
            query_key, key_key, shuffle_key = jax.random.split(rng, 3)
            shuffle = torch.from_numpy(np.array(jax.random.permutation(shuffle_key, size))).long()
            loss = moco.loss(tensor(view(query_key, batch)), tensor(view(key_key, batch)), shuffle)
            return reference.update(sgd, i, loss)

        return step

    ours, theirs, ts = ten_steps(method, tx, follow, seed, size)
    moco, before = seen["moco"], seen["before"]
    assert_losses(ours, theirs, moco.query)
    assert_parity("query encoder", as_arrays(ts.params, ts.state.stats), arrays(moco.query), before)
    assert_parity(
        "momentum encoder",
        as_arrays(ts.state.key.average, ts.state.key_stats),
        arrays(moco.key),
        before,
    )
    assert_parity(
        "queue", {"queue": np.asarray(ts.state.queue)}, {"queue": moco.queue.numpy()}, seen["queue"]
    )
    assert int(ts.state.pointer) == moco.pointer == STEPS * size % queue


@pytest.mark.parametrize("groups, seed", [(1, 94), pytest.param(4, 98, marks=pytest.mark.slow)])
def test_simsiam_ten_steps(groups, seed):
    """Losses, weights and running statistics; the predictor's rate constant, a frozen bias."""
    features, hidden = 16, 8
    method = qmx.simsiam.make(
        models.from_linen(ResNet(NARROW, groups, zero_init=True)),
        models.simsiam_projector(features, stats_groups=groups),
        models.simsiam_predictor(hidden, groups),
        view,
    )
    falling = rate("cosine_by_epoch", 0.02)
    tx = optim.sgd(
        {"backbone": falling, "head": falling, "predictor": rate("constant", 0.02)},
        weight_decay=DECAY,
    )
    backbone = their_resnet(NARROW, 1, groups)
    net = reference.network(
        backbone=backbone,
        head=reference.simsiam_projector(backbone.features, features, groups),
        predictor=reference.simsiam_predictor(features, hidden, groups),
    )
    falling = reference.cosine_by_epoch(0.02, EPOCHS, STEPS)
    follow, before = beside(
        net,
        {"backbone": falling, "head": falling, "predictor": lambda step: 0.02},
        lambda batch, rng: reference.simsiam_loss(
            net, *(tensor(view(key, batch)) for key in jax.random.split(rng))
        ),
    )
    ours, theirs, ts = ten_steps(method, tx, follow, seed)
    assert_losses(ours, theirs, net, atol=1e-6)  # between -1 and 0, the first ones near 0
    mine, now = as_arrays(ts.params, ts.state), arrays(net)
    for end in (mine, now):
        np.testing.assert_array_equal(end.pop("head.fc.6.bias"), before["head.fc.6.bias"])
        # What enters has mean 0 and no bias is added: only rounding is in this running mean.
        still = end.pop("predictor.fc.1.running_mean")
        assert np.all(np.abs(still) < 1e-6 * end["predictor.fc.1.running_var"] ** 0.5)
    assert_parity("network", mine, now, {name: before[name] for name in now})


def beside(net, rates, loss, **keywords):
    """`follow` for `ten_steps` with a method that has no state but the running statistics.

    Also a dict that will hold the variables before the first step. loss: (batch, rng) -> tensor.
    """
    before = {}

    def follow(ts):
        net.train().load_state_dict(variables(ts.params, ts.state))
        before.update(arrays(net))
        sgd = reference.optimiser(net, rates, momentum=0.9, weight_decay=DECAY, **keywords)
        return lambda i, batch, rng: reference.update(sgd, i, loss(batch, rng))

    return follow, before


def test_rotation_ten_steps(seed=29):
    """Losses, weights and running statistics, with RotNet's Nesterov momentum and a warm-up."""
    method = qmx.rotation.make(models.from_linen(ResNet(NARROW)), models.classifier(4), view)
    tx = optim.sgd(
        rate("step", 0.05, warmup_epochs=1, milestones=(3,)), nesterov=True, weight_decay=DECAY
    )

    def step_rate(i):
        epoch = i * EPOCHS / STEPS
        return 0.05 * min(1, epoch) * (0.1 if epoch >= 3 else 1)

    backbone = their_resnet(NARROW, 1)
    net = reference.network(backbone=backbone, head=reference.classifier(backbone.features, 4))
    follow, before = beside(
        net,
        {"backbone": step_rate, "head": step_rate},
        lambda batch, rng: reference.rotation_loss(net, tensor(view(rng, batch))),
        nesterov=True,
    )
    ours, theirs, ts = ten_steps(method, tx, follow, seed, 8)
    assert_losses(ours, theirs, net)
    assert_parity("network", as_arrays(ts.params, ts.state), arrays(net), before)


@pytest.mark.parametrize(
    "arch, temperatures, seed",
    [
        (NARROW._replace(blocks=(1, 1)), (1.5, 1.0), 34),
        pytest.param(
            *(Arch((1, 1), bottleneck=True, width=8), (4.0, 4.0), 28), marks=pytest.mark.slow
        ),
    ],
    ids=["one_sided", "hinton_bottleneck_large_stem"],
)
def test_distill_ten_steps(arch, temperatures, seed):
    """Losses, weights and running statistics; the head at ten times the backbone's rate.

    The second case also differentiates bottlenecks, the large stem and its max-pool.
    """
    method = qmx.distill.make(
        models.from_linen(ResNet(arch)),
        models.classifier(CLASSES),
        view,
        target_temperature=temperatures[0],
        student_temperature=temperatures[1],
    )
    tx = optim.sgd(
        {"backbone": rate("cosine_by_epoch", 0.01), "head": rate("cosine_by_epoch", 0.1)},
        weight_decay=DECAY,
    )
    backbone = their_resnet(arch, 1)
    net = reference.network(
        backbone=backbone, head=reference.classifier(backbone.features, CLASSES)
    )
    rates = {
        "backbone": reference.cosine_by_epoch(0.01, EPOCHS, STEPS),
        "head": reference.cosine_by_epoch(0.1, EPOCHS, STEPS),
    }
    follow, before = beside(
        net,
        rates,
        lambda batch, rng: reference.distillation_loss(
            net, tensor(view(rng, batch)), tensor(batch["scores"]), *temperatures
        ),
    )
    ours, theirs, ts = ten_steps(method, tx, follow, seed)
    assert_losses(ours, theirs, net)
    assert_parity("network", as_arrays(ts.params, ts.state), arrays(net), before)


def test_fixmatch_ten_steps(seed=48):
    """Losses, the student and the teacher with their running statistics; guesses on both sides of
    the threshold."""
    threshold, weight, decay, size = 0.24, 1.0, 0.8, 8
    # Of one block all guesses would be on one side of the threshold.
    arch = ARCHS["resnet8"]._replace(width=4)
    method = qmx.fixmatch.make(
        models.from_linen(ResNet(arch)),
        models.classifier(CLASSES),
        view,
        view,
        threshold=threshold,
        weight=weight,
        decay=decay,
    )
    tx = optim.sgd(
        {"backbone": rate("cosine_by_epoch", 0.01), "head": rate("cosine_by_epoch", 0.1)},
        weight_decay=DECAY,
    )
    seen, confidence = {}, []

    def network():
        backbone = their_resnet(arch, 1)
        return reference.network(
            backbone=backbone, head=reference.classifier(backbone.features, CLASSES)
        )

    def follow(ts):
        student, teacher = network(), network()
        student.load_state_dict(variables(ts.params, ts.state.stats))
        teacher.load_state_dict(variables(*ts.state.teacher.average))
        seen.update(
            their=reference.FixMatch(student, teacher, threshold, weight, decay, 1.5),
            before=arrays(student),
        )
        rates = {
            "backbone": reference.cosine_by_epoch(0.01, EPOCHS, STEPS),
            "head": reference.cosine_by_epoch(0.1, EPOCHS, STEPS),
        }
        sgd = reference.optimiser(student, rates, momentum=0.9, weight_decay=DECAY)

        def step(i, batch, rng):
            pool, keys = {"image": batch["pool_image"]}, jax.random.split(rng, 3)
            views = [
                tensor(view(key, part)) for key, part in zip(keys, (batch, pool, pool), strict=True)
            ]
            if i:
                # At the end of the step before, so that the last state is still to move.
                seen["their"].move()
            loss, sure = seen["their"].loss(views[0], tensor(batch["scores"]), *views[1:])
            confidence.extend(sure.tolist())
            return reference.update(sgd, i, loss)

        return step

    ours, theirs, ts = ten_steps(method, tx, follow, seed, size)
    distance = np.array(confidence) - threshold
    share, nearest = (distance >= 0).mean(), np.abs(distance).min()
    assert 0.1 < share < 0.9 and nearest > 1e-5, (
        f"{share:.0%} are above the threshold, the nearest by {nearest:.0e}"
    )
    their, before = seen["their"], seen["before"]
    assert_losses(ours, theirs, their.student)
    assert_parity("student", as_arrays(ts.params, ts.state.stats), arrays(their.student), before)
    kept = method.network(ts.params, ts.state)
    assert_parity("teacher", as_arrays(*kept), arrays(their.teacher), before)

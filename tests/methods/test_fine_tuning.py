"""Fine-tuning vision transformers: AdamW and its layer-wise rates beside PyTorch, stochastic depth,
devices; and the command, with a vision transformer as the target too."""

import json
import re
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_reference as reference
from conftest import ROOT
from record_vits import weights
from safetensors.numpy import save_file
from small_vit import NAME, SMALL
from test_ten_steps import CLASSES, SIDE, STEPS, batches, keys, trained, view
from torch_reference import torch

import qmx
from qmx import distill, models, optim
from qmx.data import load
from qmx.layer_rates import by_layer
from qmx.models import from_torch
from qmx.models.to_torch import to_torch
from qmx.models.vit import VITS, Arch, Block, ViT
from qmx.optim import kernels_only

ARCH = Arch("dinov2_reg", dim=8, depth=2, heads=2, hidden=16, patch=2, registers=2)
RATE, DECAY, LAYER_DECAY = 2**-7, 2**-3, 0.75


def drawn(tree, seed=0, dtype=np.float32):
    """Random numbers in the place of all leaves, near one for scales."""
    rng = np.random.default_rng(seed)
    return jax.tree_util.tree_map_with_path(
        lambda path, x: np.asarray(
            0.3 * rng.normal(size=x.shape) + ("scale" in path[-1].key), dtype
        ),
        tree,
    )


def shapes(net, side, channels=1):
    images = jnp.zeros((1, side, side, channels))
    return jax.eval_shape(lambda: net.init(jax.random.key(0), images))[0]


def theirs_by_layer(net, rate, weight_decay, layer_decay):
    """Parameter groups as in MAE's `param_groups_lrd`: by name, from 0 to depth + 1."""
    depth, groups = len(net.backbone.blocks), []
    for name, p in net.named_parameters():
        name = name.removeprefix("backbone.")
        token = name in ("cls_token", "pos_embed", "reg_token")
        layer = depth + 1
        if token or name.startswith("patch_embed"):
            layer = 0
        if match := re.match(r"blocks\.(\d+)\.", name):
            layer = int(match[1]) + 1
        groups.append(
            {
                "params": [p],
                "lr": rate * layer_decay ** (depth + 1 - layer),
                "weight_decay": 0.0 if p.ndim == 1 or token else weight_decay,
            }
        )
    return groups


def flat(params):
    """Our variables under timm's names, "backbone." and "head." before them."""
    layers = to_torch(params["backbone"], {})
    layers = {f"backbone.{name}": value for name, value in layers.items()}
    fc = params["head"]["fc"]
    return layers | {"head.fc.weight": np.array(fc["kernel"]).T, "head.fc.bias": fc["bias"]}


@jax.enable_x64(True)
@pytest.mark.slow
def test_ten_steps_of_adamw(tmp_path):
    """Layer-wise rates, no decay on vectors and tokens; on two devices, gone on with from a
    checkpoint after five."""
    net = models.from_linen(ViT(ARCH, dtype=jnp.float64))
    method = distill.make(net, models.classifier(CLASSES), view)
    adamw = optim.adamw(lambda step: RATE, weight_decay=DECAY, weight_decay_on="kernels")
    tx = optim.optax.chain(adamw, by_layer(LAYER_DECAY))
    first, last, ours = trained(method, tx, tmp_path)
    theirs = reference.network(
        backbone=reference.Transformer(ARCH, SIDE, 1e-6),
        head=reference.classifier(ARCH.dim, CLASSES),
    ).double()
    tensors = {name: torch.tensor(np.array(x)) for name, x in flat(first.params).items()}
    theirs.load_state_dict(tensors)
    opt = torch.optim.AdamW(theirs_by_layer(theirs, RATE, DECAY, LAYER_DECAY), betas=(0.9, 0.999))
    losses = []
    for key, batch in zip(keys(), batches(), strict=True):
        x = torch.from_numpy(np.array(view(key, batch)).transpose(0, 3, 1, 2))
        scores = torch.from_numpy(batch["scores"])
        loss = reference.distillation_loss(theirs, x, scores, 1.5, 1.0)
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(float(loss.detach()))
    assert len(losses) == STEPS
    np.testing.assert_allclose(ours, losses, rtol=1e-10)
    mine = flat(last.params)
    for name, value in theirs.state_dict().items():
        np.testing.assert_allclose(mine[name], value, rtol=1e-10, atol=1e-10, err_msg=name)
        assert np.abs(mine[name] - tensors[name].numpy()).max() > 1e-4, name


def test_layers_and_decay():
    """By name, from what makes the tokens to the head; a network without blocks is refused."""
    net = models.from_linen(ViT(ARCH._replace(family="dinov3")))
    params = {"backbone": shapes(net, 4), "head": {"fc": {"kernel": jnp.ones((8, 3))}}}
    ones = jax.tree.map(lambda x: np.ones(x.shape), params)
    tx = by_layer(0.5)
    rates, _ = tx.update(ones, tx.init(ones))
    of = {
        name: {float(x.flat[0]) for x in jax.tree.leaves(part)}
        for name, part in {**rates["backbone"], "head": rates["head"]}.items()
    }
    first = dict.fromkeys(("patch", "patch_bias", "class", "registers"), {0.125})
    assert of == {**first, "block_0": {0.25}, "block_1": {0.5}, "norm": {1.0}, "head": {1.0}}
    decays = kernels_only(params)
    no = {name for name, on in qmx.contract.by_path(decays).items() if not on}
    names = ("patch_bias", "class", "registers", "qv_bias", "bias", "scale", "scale1", "scale2")
    assert {name.rpartition("/")[2] for name in no} == set(names)
    assert decays["backbone"]["patch"] and decays["head"]["fc"]["kernel"]
    with pytest.raises(ValueError, match="layer_decay 0.5 .*; set it to 1 for this network"):
        tx.init({"backbone": {"conv1": 1}, "head": {}})


def test_stochastic_depth():
    """Each image skips each branch or not, whatever the others do; what is left counts more, so
    that the mean stays."""
    arch, rate, count = ARCH._replace(family="vit", registers=0), 0.25, 400
    one = np.random.default_rng(1).normal(size=(1, 5, arch.dim)).astype(np.float32)
    block = Block(arch, jnp.float32)
    params = drawn(block.init(jax.random.key(0), one, None)["params"])
    still = {"kernel": np.zeros((8, 8), np.float32), "bias": np.zeros(8, np.float32)}
    no_mlp = {**params, "fc2": {**still, "kernel": np.zeros((16, 8), np.float32)}}

    def attend(x):
        return block.apply({"params": no_mlp}, x, None) - x

    def mlp(x):
        return block.apply({"params": {**params, "proj": still}}, x, None) - x

    after = one + attend(one) / (1 - rate)
    wanted = [one, after, one + mlp(one) / (1 - rate), after + mlp(after) / (1 - rate)]
    y = block.apply(
        {"params": params},
        np.tile(one, (count, 1, 1)),
        None,
        rate,
        rngs={"dropout": jax.random.key(2)},
    )
    which = np.stack([np.isclose(y, case, atol=1e-5).all((1, 2)) for case in wanted], 1)
    assert (which.sum(1) == 1).all(), "all tokens of an image, or none"
    shares = which.mean(0)
    expected = np.outer([rate, 1 - rate], [rate, 1 - rate]).T.ravel()
    assert (np.abs(shares - expected) < 4 * np.sqrt(expected / count)).all(), shares


def test_rates_of_stochastic_depth(monkeypatch):
    """Linear in the block from 0; none in an evaluation, which needs no key."""
    rates, call = [], Block.__call__

    def recorded(self, x, table, skipped=None):
        jax.debug.callback(
            lambda rate: rates.append(float(rate)),
            jnp.nan if skipped is None else skipped,
            ordered=True,
        )
        return call(self, x, table, skipped)

    monkeypatch.setattr(Block, "__call__", recorded)
    net = models.from_linen(ViT(ARCH._replace(depth=3), drop_path=0.4))
    x = jnp.zeros((2, 4, 4, 1))
    params = drawn(net.init(jax.random.key(0), x)[0])
    for train, wanted in ((True, [0, 0.2, 0.4]), (False, [np.nan] * 3)):
        rates.clear()
        net.apply(params, {}, x, train, jax.random.key(1))
        jax.effects_barrier()
        np.testing.assert_allclose(rates, wanted, rtol=1e-6)
    with pytest.raises(ValueError, match="drop_path 0.1 .*; set it to 0 for resnet8"):
        models.backbone("resnet8", drop_path=0.1)


ON_DEVICES = """
    import jax, jax.numpy as jnp, numpy as np
    import qmx
    from qmx import augment, distill, models, optim
    from qmx.layer_rates import by_layer
    from qmx.models.vit import Arch, ViT
    from qmx.sharding import put_batch, put_state

    arch = Arch("dinov3", dim=8, depth=2, heads=2, hidden=16, patch=2, registers=2)
    net = models.from_linen(ViT(arch, "both", jnp.float64, drop_path=0.5))
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (8, 4, 4, 1), np.uint8), "scores": rng.normal(size=(8, 3))
    }
    view = augment.weak_view(4, mean=(0.5,), std=(0.25,))
    method = distill.make(net, models.classifier(3), view)
    tx = optim.optax.chain(
        optim.adamw(lambda step: 2**-6, weight_decay=0.1, weight_decay_on="kernels"), by_layer(0.5)
    )
    step, key = qmx.make_step(method, tx), jax.random.key(1)
    start = jax.jit(lambda rng: qmx.init_state(method, tx, rng, batch))(jax.random.key(0))
    ends, features = [], []
    look = augment.plain_view((0.5,), (0.25,))
    for placed, put in ((jnp.copy, jax.device_put), (put_state, put_batch)):
        ts = jax.tree.map(jnp.copy, start)
        ts = jax.tree.map(placed, ts) if placed is jnp.copy else placed(ts)
        features.append(np.asarray(
            qmx.predict(net, ts.params["backbone"], {}, look, batch["image"])
            if placed is put_state
            else net.apply(ts.params["backbone"], {}, look(key, batch), False)[0]
        ))
        for _ in range(3):
            ts, metrics = step(ts, put(batch), key)
        ends.append(ts)
    count = [len(leaf.sharding.device_set) for ts in ends for leaf in jax.tree.leaves(ts.params)]
    assert set(count) == {1, 4}, set(count)
    for a, b in zip(*map(jax.tree.leaves, ends), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(*features, rtol=1e-12, atol=1e-13)
    moved = [np.abs(a - b).max() for a, b in zip(
        jax.tree.leaves(start.params), jax.tree.leaves(ends[0].params), strict=True)]
    assert min(moved) > 1e-4
"""


@pytest.mark.slow
def test_devices(environment):
    """One and four devices give the same, in float64: three steps with stochastic depth, and a
    frozen encoder's features."""
    flags = re.sub(r"count=\d+", "count=4", environment["XLA_FLAGS"])
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(ON_DEVICES)],
        cwd=ROOT,
        env={**environment, "XLA_FLAGS": flags, "JAX_ENABLE_X64": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


# The command, with a target and a student of tests/small_vit.py.


def file_of(path, channels, arch=SMALL, classes=10, side=8):
    """Write what transformers' ViTForImageClassification would."""
    dim, found = arch.dim, {}

    def layer(name, out, entering):
        found.update({f"{name}.weight": (out, entering), f"{name}.bias": (out,)})

    at = "vit.embeddings."
    found[f"{at}cls_token"] = (1, 1, dim)
    found[f"{at}position_embeddings"] = (1, 1 + (side // arch.patch) ** 2, dim)
    found[f"{at}patch_embeddings.projection.weight"] = (dim, channels, arch.patch, arch.patch)
    found[f"{at}patch_embeddings.projection.bias"] = (dim,)
    for i in range(arch.depth):
        at = f"vit.encoder.layer.{i}."
        for part in ("query", "key", "value"):
            layer(f"{at}attention.attention.{part}", dim, dim)
        layer(f"{at}attention.output.dense", dim, dim)
        layer(f"{at}intermediate.dense", arch.hidden, dim)
        layer(f"{at}output.dense", dim, arch.hidden)
        for norm in ("before", "after"):
            found |= {f"{at}layernorm_{norm}.{kind}": (dim,) for kind in ("weight", "bias")}
    found |= {f"vit.layernorm.{kind}": (dim,) for kind in ("weight", "bias")}
    layer("classifier", classes, dim)
    save_file({name: weights(name, shape) for name, shape in found.items()}, path)


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    """Of a run whose student starts from a file of three channels, and whose target is another."""
    monkeypatch.setitem(VITS, NAME, SMALL)
    file_of(tmp_path / "student.safetensors", 3)
    file_of(tmp_path / "target.safetensors", 1, side=12)
    return [
        "--config=configs/digits.py:float32",
        f"--workdir={tmp_path / 'w'}",
        *(f"--config.{key}={value}" for key, value in GIVEN.items()),
        f"--config.pretrain.imported.path={tmp_path / 'student.safetensors'}",
        f"--config.target.path={tmp_path / 'target.safetensors'}",
    ]


GIVEN = {
    **{"seeds": "(0,)", "fractions": "()", "queries": "(40,)", "also": "()"},
    **{"inits": "('imported',)", "uses": "('asked','pool','fixmatch')"},
    **{"student.arch": NAME, "target.kind": "torch", "target.arch": ""},
    **{"distill.min_steps": 12, "distill.epochs": 0.1, "distill.batch_size": 16},
    **{"distill.optimizer": "adamw", "distill.weight_decay_on": "kernels"},
    **{"distill.learning_rate": 1e-3, "distill.head_learning_rate": 1e-3},
    **{"distill.layer_decay": 0.75, "distill.drop_path": 0.2, "fixmatch.mu": 1},
    **{"monitor.knn_k": 5, "propagation.neighbours": 5},
}


@pytest.mark.slow
def test_the_command(arguments, command, tmp_path):
    """A ViT is asked, and one is tuned by each use; a second call finds all of it done. The start
    is the file's own network, for grey images of the data's normalisation."""
    status, out, err = command(*arguments)
    assert status == 0, err
    results = json.loads((tmp_path / "w/results.json").read_text())
    assert [row["use"] for row in results["rows"]] == ["asked", "pool", "fixmatch"]
    assert "vit_small_hf from student.safetensors" in (tmp_path / "w/report.md").read_text()

    data = load("digits")
    images = data.evaluation.shown(np.arange(9))
    start = qmx.load_encoder(tmp_path / "w/pretrain/imported/encoder.safetensors")
    made = from_torch.load(tmp_path / "student.safetensors", NAME)
    colours = np.repeat(images / 255, 3, -1).astype(np.float32) * 2 - 1  # 0.5 and 0.5
    net = models.backbone(NAME)
    wanted, _ = net.apply(made.backbone.params, {}, colours, False)
    np.testing.assert_allclose(qmx.encode(start, images), wanted, rtol=1e-4, atol=1e-4)
    target = qmx.load_encoder(tmp_path / "w/target/target.safetensors")
    answers = qmx.encode(target, images)
    for use in ("asked", "pool", "fixmatch"):
        name = f"imported-random-logits-{use}-40-seed0"
        student = qmx.load_encoder(tmp_path / f"w/distill/{name}/student.safetensors")
        named = np.load(tmp_path / f"w/evaluate/{name}/named.npz")
        for side, scores in (("target", answers), ("student", qmx.encode(student, images))):
            np.testing.assert_array_equal(named[side][:9], scores.argmax(1))
    assert "is shown images of mean" in err
    status, _, err = command(*arguments)
    assert status == 0 and "all of it was done before" in err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("student.size=10", "student.size 10 needs weak_view.size=10"),
        ("weak_view.size=12", "set student.size=8 and weak_view.size=8"),
        ("student.arch=resnet8", "holds vit_small_hf"),
        ("distill.layer_decay=0", "distill.layer_decay 0.0 must be above 0"),
        ("distill.head_learning_rate=1.0", "is a rate of SGD"),
    ],
)
def test_refused(change, message, arguments, command, tmp_path):
    status, _, err = command(*arguments, f"--config.{change}")
    assert status == 2 and message in err and not (tmp_path / "w").exists(), err

"""The keys that a training has, a student's too; `qmx.settings` and configs make theirs of them.

Comments are remarks as they are there.
"""

from typing import Any

from ml_collections import ConfigDict


def training(**changes: Any) -> ConfigDict:
    """The keys that every training has, with PyTorch's ImageNet protocol as their defaults."""
    keys = dict(
        epochs=90.0,  # passes over the images; warmup_epochs and milestones count them too
        batch_size=256,  # global, over all devices
        optimizer="sgd",  # sgd, adamw, lars, larc
        learning_rate=0.1,  # after the warm-up, for the whole batch_size
        schedule="step",  # constant, cosine, cosine_by_epoch, step
        warmup_epochs=0.0,  # the rate rises linearly over these
        warmup_start=0.0,  # the share of the rate that the warm-up starts from
        milestones=(30.0, 60.0),  # the schedule "step" multiplies the rate by `factor` at each
        factor=0.1,  # see milestones
        momentum=0.9,  # and adamw's beta_1
        nesterov=False,  # Nesterov's momentum
        weight_decay=1e-4,
        # all; or kernels: no scales of norms, no biases, no tokens and positions of a ViT
        weight_decay_on="all",
    )
    return ConfigDict({**keys, **changes})


def distilling() -> ConfigDict:
    """The keys of a student's training; the defaults are the fine-tuning protocol of PCL at 1 %."""
    return training(
        epochs=20.0,
        learning_rate=0.01,
        milestones=(12.0, 16.0),
        factor=0.2,
        weight_decay=5e-4,
        head_learning_rate=1.0,  # of the classifier; the backbone has learning_rate
        min_steps=0,  # a transfer set so small that `epochs` are fewer steps trains for this many
        learn_from="scores",  # the target's, or the true "labels" of the same images
        target_temperature=1.5,  # what the target's logits are divided by
        student_temperature=1.0,  # what the student's logits are divided by
        # brightness, contrast, saturation, hue of the weak view
        jitter=(0.0, 0.0, 0.0, 0.0),
        # features before the classifier by batch statistics, without scale and bias
        standardize=False,
        # in the end batch norms' running statistics are measured anew on whole images of the pool
        whole_statistics=False,
        # of a ViT: each layer's rate by that of the next one; 0.65 to 0.75 for BEiT and MAE
        layer_decay=1.0,
        # of a ViT: how often an image skips a branch of the last block; 0 in the first, and linear
        # between them; stochastic depth, 0.1 for MAE
        drop_path=0.0,
    )


def recipe(
    inits: tuple[str, ...], above: float = 0.0, up_to: float = 1.0, **changes: Any
) -> ConfigDict:
    """One of `config.recipes`: how students train that start from one of `inits`, above < share of
    the pool <= up_to.

    Raises:
      KeyError: a key that `distilling` does not have.
    """
    keys = distilling().lock()
    keys.update(changes)
    return ConfigDict({**keys, "inits": inits, "above": above, "up_to": up_to})


def on_two_cores(
    inits: tuple[str, ...], above: float, epochs: tuple[float, float] = (1.0, 1.0)
) -> dict[str, ConfigDict]:
    """Recipes by name, of students that begin with nothing and of those that begin with one of
    `inits`: 600 steps of 64 images, and 1,200 above a share of the pool.

    All students of a budget take as many steps, whatever they start from. Those of the pool see it
    at least `epochs` times, up to that share and above it. Steps and rates are ours, chosen on
    Fashion-MNIST by images of the pool (benchmarks/README.md, "Real images on two cores").
    """
    made = {}
    for name, steps, passes, share in (
        ("few", 600, epochs[0], dict(up_to=above)),
        ("many", 1200, epochs[1], dict(above=above)),
    ):
        keys: dict[str, Any] = dict(
            epochs=passes, min_steps=steps, batch_size=64, schedule="cosine", **share
        )
        made[f"scratch_{name}"] = recipe(
            ("none",), learning_rate=0.05, head_learning_rate=0.05, **keys
        )
        made[f"tune_{name}"] = recipe(inits, learning_rate=0.05, head_learning_rate=0.3, **keys)
    return made

"""The keys of encoders that stay as they are, and of the heads on their features; a part of
`qmx.settings`."""

from typing import Any

from ml_collections import ConfigDict


def public(**changes: Any) -> ConfigDict:
    """The keys of an encoder that is brought along and stays as it is."""
    keys = dict(
        # weights, callable, table: weights of a network, a Python function of images, or features
        # that were computed elsewhere
        kind="weights",
        # PyTorch's weights, or qmx's; FILE.py:function or module:function, uint8[b, H, W, C] ->
        # f32[b, D]; an .npz of "image" (SHA-256, see qmx.ledger.pixel_digests) and "features"
        path="",
        arch="",  # weights: its name, checked; "" takes what they are
        features="class",  # weights of a ViT: the class token, the mean of the patches, or both
        # weights: side of the square that it is shown; 0 is 224 for a ViT, the images' own else
        size=0,
        mean=(),  # weights: of each channel in 0..1; () is its family's
        std=(),  # as mean
        dtype="float32",  # weights: of its layers; float64, float32, bfloat16
        watch=(),  # callable: more files that it is made of, as weights; a change is another one
        licence="",  # for the report, where the weights' family does not tell
    )
    return ConfigDict({**keys, **changes})


def imported() -> ConfigDict:
    """The keys of weights that students start from and train whole; `path` is added to them."""
    return ConfigDict(
        dict(
            # of each channel in 0..1, of the images that a ViT was trained on; () is its family's.
            # It sees them so whatever data.mean is; a ResNet sees those of data.mean
            mean=(),
            std=(),  # as mean
        )
    )


def add_encoder(config: Any, name: str, **changes: Any) -> None:
    """Add an encoder that stays as it is to a config, under a name for `config.inits`.

    Args:
      changes: keys of `public`.

    Raises:
      KeyError: a key that `public` does not have.
    """
    keys = public().lock()
    keys.update(changes)
    with config.unlocked():
        config.pretrain[name] = keys


def heads() -> ConfigDict:
    """The keys of students that are heads on features that stay as they are."""
    return ConfigDict(
        dict(
            hidden=0,  # width of a hidden layer; 0 is a linear head
            folds=5,  # of the cross-validation that chooses the two below
            # of the weights, for features of length 1 about their mean
            decays=(1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6),
            temperatures=(1.0, 2.0, 4.0),  # what the target's logits are divided by
        )
    )

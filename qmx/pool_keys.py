"""The keys of what is done with the pool's images that are not asked about; a part of
`qmx.settings`."""

from ml_collections import ConfigDict


def choosing() -> ConfigDict:
    """The keys of selections that choose by features."""
    return ConfigDict(
        dict(
            # weight of features of patches beside the encoder's, as propagation.patches
            patches=0.0,
            # features of patches, propagation's too, are those of an image and its mirror image
            mirrored=False,
        )
    )


def propagating() -> ConfigDict:
    """The keys of the use "pool"."""
    return ConfigDict(
        dict(
            neighbours=50,  # of each image in the graph
            power=3.0,  # of their similarities
            alpha=0.99,  # how much an image takes from its neighbours
            temperature=1.0,  # of what is propagated; below 1 it is more decided
            # weight of features of patches beside the encoder's, for small images; 0 leaves them
            # out, see qmx/selection/patches.py
            patches=0.0,
            # power of what a head on the same features tells, by which the scores are multiplied; 0
            # leaves it out
            head_power=0.0,
        )
    )


def matching() -> ConfigDict:
    """The keys of the use "fixmatch"."""
    return ConfigDict(
        dict(
            mu=5,  # images of the pool for each that was asked, in every batch
            # how much a guess counts: fixed, relative, free, soft; FixMatch's, AdaMatch's,
            # FreeMatch's and SoftMatch's way
            rule="fixed",
            # the teacher's confidence in an image that is learned from; for the rule relative, as a
            # share of that in what was asked; free and soft have none
            threshold=0.7,
            # shares of the classes that guesses are brought to: none; uniform; asked, those of the
            # student's answers on what was asked
            align="none",
            guess_temperature=0.0,  # of soft guesses; 0 learns the class, 1 the guess as it is
            guess_decay=0.999,  # of the averages that rules and alignment take over the steps
            weight=10.0,  # of the pool's loss, lambda_u
            decay=0.999,  # of the teacher, which is the student that is evaluated
            # passes over the pool, over which the recipe's schedule is stretched; never fewer steps
            # than the recipe has; 0 is the recipe's steps
            epochs=100.0,
        )
    )

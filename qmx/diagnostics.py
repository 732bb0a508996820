"""Warnings of a pretraining that goes wrong, by its metrics."""

import math
from collections.abc import Callable, Iterator
from statistics import mean

LEAK = 0.95  # mean instance accuracy of a first epoch; right runs stay far below
COLLAPSE = 0.1  # of 1/sqrt(D), the spread of unit vectors in random directions
# A mean loss of an epoch this near to ln(K + 1), as a share of it, is chance.
STUCK = 0.01
STUCK_AFTER = 200  # steps; a loss near chance means nothing before


def watch(
    epoch_steps: int, dimension: int | None = None, queue_size: int | None = None
) -> Callable[[int, dict[str, float]], str | None]:
    """A function of (step, metrics), called for each step in turn, that returns a warning or None.

    It warns at the end of an epoch, of each trouble once. A leak: in the first epoch nearly all of
    MoCo's queries found their keys, so that something beside the image tells them apart (moco
    issues 38, 43, 79). Stuck: MoCo's loss stays at ln(K + 1), that of features which say nothing
    (moco issues 9, 12). Collapse: the outputs have no spread (SimSiam, section 4.1).

    Args:
      epoch_steps: steps in an epoch.
      dimension: D of the metric `z_std`.
      queue_size: K of MoCo.
    """
    epoch: list[dict[str, float]] = []
    said: set[str] = set()

    def look(step: int, metrics: dict[str, float]) -> str | None:
        epoch.append(metrics)
        if step % epoch_steps:
            return None
        troubles = dict(_troubles(step, epoch))
        epoch.clear()
        for name, words in troubles.items():
            if name not in said:
                said.add(name)
                return words
        return None

    def _troubles(step: int, epoch: list[dict[str, float]]) -> Iterator[tuple[str, str]]:
        accuracy = mean(values.get("contrast_acc1", 0) for values in epoch)
        if step == epoch_steps and accuracy > LEAK:
            yield (
                "leak",
                (
                    f"in the first epoch {100 * accuracy:.0f} % of the queries found their key:"
                    " batch statistics or weak views give it away; look at group_size and"
                    " strong_view"
                ),
            )
        spread = epoch[-1].get("z_std", 1)
        if dimension and spread < COLLAPSE / dimension**0.5:
            yield (
                "collapse",
                (
                    f"z_std is {spread:.2g} after step {step}, far below 1/sqrt({dimension}) ="
                    f" {dimension**-0.5:.2g}: the features have collapsed; a lower learning rate"
                    " may help"
                ),
            )
        if queue_size and step >= STUCK_AFTER:
            loss, chance = mean(values["loss"] for values in epoch), math.log(queue_size + 1)
            if abs(loss - chance) < STUCK * chance:
                yield (
                    "stuck",
                    (
                        f"the loss is {loss:.2f} after step {step} and ln({queue_size} + 1) ="
                        f" {chance:.2f} is chance: nothing is learned; look at the learning rate"
                        " and the views"
                    ),
                )

    return look

"""What the metrics of a pretraining say when something is wrong, in words."""

from collections.abc import Callable
from statistics import mean

LEAK = 0.95  # mean instance accuracy of a first epoch; right runs stay far below
COLLAPSE = 0.1  # of 1/sqrt(D), the spread that unit vectors have which point everywhere


def watch(epoch_steps: int, dimension: int | None) -> Callable[[int, dict[str, float]], str | None]:
    """A function of (step, metrics), called for each step in turn, that returns a warning or None.

    It warns at the end of the first epoch if MoCo's queries found their keys nearly always, which
    means that something tells them apart beside the image (moco issues 38, 43, 79); and at the
    end of an epoch if the outputs' spread is gone, the collapse of SimSiam (its section 4.1).

    Args:
      epoch_steps: steps in an epoch.
      dimension: D of the metric `z_std`.
    """
    accuracies: list[float] = []

    def look(step: int, metrics: dict[str, float]) -> str | None:
        if step <= epoch_steps and "contrast_acc1" in metrics:
            accuracies.append(metrics["contrast_acc1"])
        if step % epoch_steps:
            return None
        if step == epoch_steps and accuracies and mean(accuracies) > LEAK:
            return (f"in the first epoch {100 * mean(accuracies):.0f} % of the queries found their key: batch "
                    "statistics or weak views give it away; look at group_size and strong_view")
        if dimension and metrics.get("z_std", 1) < COLLAPSE / dimension**0.5:
            return (f"z_std is {metrics['z_std']:.2g} after step {step}, far below 1/sqrt({dimension}) = "
                    f"{dimension**-0.5:.2g}: the features have collapsed; a lower learning rate may help")
        return None

    return look

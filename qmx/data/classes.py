"""Checks of class numbers."""

import numpy as np

from qmx.data.sources import Dataset


def number_of(labels: dict[str, np.ndarray]) -> int:
    """N, the classes 0..N-1 of labels by the name of their file or folder; 0 without labels.

    Raises:
      ValueError: there are more classes than images, so that the labels number something else.
    """
    labels = {name: some for name, some in labels.items() if len(some)}
    if not labels:
        return 0
    images = sum(map(len, labels.values()))
    where = max(labels, key=lambda name: labels[name].max())
    largest = int(labels[where].max())
    if largest >= images:
        raise ValueError(
            f"{where}: label {largest} of image {int(labels[where].argmax())} would make"
            f" {largest + 1} classes, and there are {images} images in all; number the classes"
            " 0..N-1"
        )
    return largest + 1


def warnings(data: Dataset, most: int = 5) -> list[str]:
    """A line for the user if there are class numbers that no image has; the first `most` of them.

    Images of the pool and of the evaluation both count.
    """
    labels = np.concatenate([data.pool.labels, data.evaluation.labels])
    if not len(labels):
        return []
    lacking = np.setdiff1d(np.arange(data.classes), labels)
    if not len(lacking):
        return []
    names = [data.class_names[i] if data.class_names else str(i) for i in lacking[:most]]
    more = f" and {len(lacking) - most} more" if len(lacking) > most else ""
    return [
        f"{len(lacking)} of {data.classes} classes have no image: {', '.join(names)}{more}; is"
        " label the number of the class, 0..N-1?"
    ]

"""Checks of torch's tensors before they become a network."""

import numpy as np


def check(
    what: str,
    arch: str,
    tensors: dict[str, np.ndarray],
    shapes: dict[str, tuple[int, ...]],
    *,
    missing: list[str],
    dropped: set[str],
) -> None:
    """Raise ValueError, with the names, if tensors differ from `shapes`, apart from `dropped`."""
    have = {name: tuple(value.shape) for name, value in tensors.items()}
    lists = {
        "missing": sorted(shapes.keys() - have.keys()) + missing,
        "unexpected": [
            f"{name} {have[name]}" for name in sorted(have.keys() - shapes.keys() - dropped)
        ],
        "wrong shape": [
            f"{name} is {have[name]} and should be {shapes[name]}"
            for name in sorted(have.keys() & shapes.keys())
            if have[name] != shapes[name]
        ],
        "not floating-point": [
            f"{name} is {tensors[name].dtype}"
            for name in sorted(have.keys() & shapes.keys())
            if tensors[name].dtype != np.float32
        ],
    }
    wrong = [
        f"{kind}: {', '.join(names[:10])}"
        + (f" and {len(names) - 10} more" if len(names) > 10 else "")
        for kind, names in lists.items()
        if names
    ]
    if wrong:
        raise ValueError(f"{what} is not quite {arch}, the nearest network; {'; '.join(wrong)}")


def check_values(what: str, tensors: dict[str, np.ndarray]) -> None:
    """Raise ValueError, with the names, if a value is not finite or a variance is below zero."""
    for problem, names in {
        "values that are not finite": [n for n, x in tensors.items() if not np.isfinite(x).all()],
        "a variance below zero": [
            n for n, x in tensors.items() if n.endswith("running_var") and (x < 0).any()
        ],
    }.items():
        if names:
            raise ValueError(
                f"{what} has {problem} in {len(names)} tensors: {', '.join(names[:10])}; "
                "download or train it again"
            )

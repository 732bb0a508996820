"""Settings that can be run and are likely to disappoint."""

from typing import Any

from qmx.data import Dataset, classes
from qmx.grid import cells, encoders, recipe_of
from qmx.trainers import fixmatch_steps


def warnings(config: Any, data: Dataset, stage: str = "all") -> list[str]:
    """Settings that can be run and are likely to disappoint, a line each."""
    # With names of its own a target may have more classes than the images show.
    found = [] if config.target.classes else classes.warnings(data)
    if not data.evaluation.labelled and stage != "pretrain":
        found.append(
            'the evaluation images have no labels (class folders, or "label" in an npz), so that'
            " fidelity to the target is measured and no accuracy"
        )
    if not data.pool.labelled and stage != "pretrain" and encoders(config):
        found.append("the pool has no labels, so that no accuracy of the encoders is measured")
    if "moco" in encoders(config) and not config.pretrain.moco.path:
        keys = config.pretrain.moco
        if keys.queue_size > data.pool.size:
            found.append(
                f"pretrain.moco.queue_size {keys.queue_size} is larger than the pool of"
                f" {data.pool.size} images, so that an image's own former keys are among its"
                " negatives"
            )
        if keys.group_size == keys.batch_size:
            found.append(
                "pretrain.moco.group_size is the whole batch: its batch statistics tell which key"
                " belongs to which query, and no shuffling hides it; 32 images a group is the"
                " reference's"
            )
    if stage == "pretrain":
        return found
    pool = data.pool.size
    self_labelled = [cell for cell in cells(config, pool) if cell.use == "fixmatch"]
    if self_labelled:
        keys = config.fixmatch
        steps = min(
            fixmatch_steps(recipe_of(config, cell), keys, cell.queries, pool)
            for cell in self_labelled
        )
        averages = {"decay": "the teacher, which is the student that is kept, sees"}
        if keys.align != "none" or keys.rule in ("free", "soft"):
            averages["guess_decay"] = f"the averages of rule {keys.rule} and align {keys.align} see"
        for key, sees in averages.items():
            if 3 / (1 - keys[key]) > steps:  # less than 95 % of the average is what was trained
                found.append(
                    f"fixmatch.{key} {keys[key]} averages over about {1 / (1 - keys[key]):.0f}"
                    f" steps, and of {steps} steps {sees} too little; lower it, or raise"
                    " fixmatch.epochs"
                )
    return found

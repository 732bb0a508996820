"""Audit a model with photos of your own, or pretrain an encoder of them: paths are enough.

    python -m qmx.main --config=photos:audit --workdir=runs/audit --config.data.path=PHOTOS \\
        --config.data.eval_path=OTHER_PHOTOS --config.target.path=own.py:scores

    python -m qmx.main --config=photos:pretrain --stage=pretrain --workdir=runs/encoder \\
        --config.data.path=PHOTOS

Photos lie in one folder, without labels, or in one folder for each class; OTHER_PHOTOS are for the
comparison with the target, and accuracy is measured if they have classes. The kind of target
follows from its path: FILE.py:function, FILE.onnx, FILE.pth or .safetensors, ANSWERS.npz or
.parquet; or it is the model at target.url. What it is shown (the centre of 224 pixels) is
data.resize and data.crop.

`audit` asks about 50, 200 and 1,000 photos, as far as there are so many, and trains students from
nothing, from MoCo, and from MoCo with the photos chosen by its features. The rest follows from the
number of photos and the device, see `for_pool`; `--config.KEY=VALUE` changes any of it.

Ours, moderate, and not tuned to any data. On a CPU the student is a ResNet-8 at 64 pixels, with a
max-pool behind its first layer, and takes minutes; on a GPU a ResNet-18 at 112.
"""

from typing import Any

from ml_collections import ConfigDict

from qmx.settings import base
from qmx.shipped import chosen

WORDS = ("audit", "pretrain")
BUDGETS = (50, 200, 1000)
KINDS = {".onnx": "onnx", ".npz": "recorded", ".parquet": "recorded"}  # else weights of PyTorch


def get_config(words: str = "audit") -> ConfigDict:
    given, config = chosen(words, WORDS), base()
    config.inits = ("none", "moco")
    config.also = ("moco+typiclust",)
    config.fractions = ()
    config.queries = BUDGETS
    if "pretrain" in given:
        config.inits, config.also, config.queries = ("moco",), (), ()
    config.data.update(source="folder", canvas=128)
    config.target.kind = "callable"
    config.target.batch_size = 64
    # MoCo v2's, without blur: 64 pixels are blurred enough. A smaller crop of so few shows little.
    config.strong_view.blur_p = 0.0
    config.weak_view.crop_scale = (0.25, 1.0)
    config.pretrain.moco.update(schedule="cosine", weight_decay=5e-4)
    # One recipe for all columns, the digits': students differ in what they start from alone.
    config.distill.update(
        epochs=40.0, learning_rate=0.03, head_learning_rate=0.3, schedule="cosine"
    )
    config.monitor.knn_k = 20
    return config


def for_pool(config: Any, photos: int, device: str) -> dict[str, Any]:
    """What follows from the number of photos and the device ("cpu", "gpu"), by keys of the config.

    Batches are a sixteenth of the pool to an eighth, so that few photos fill some of them; the
    queue is no longer than the pool, so that an image's own former keys are not among its
    negatives. A pretraining has about as many steps whatever the pool, and so have the students,
    which are more than a small budget's epochs would be.
    """
    small = device == "cpu"
    side, most, steps, least = (64, 64, 1500, 300) if small else (112, 256, 20_000, 2000)
    batch = max(2, min(most, power_of_two(photos // 8)))
    epochs = min(max(steps * batch // max(photos, 1), 2), 400)
    values = {
        "student.arch": "resnet8_pool" if small else "resnet18",
        **dict.fromkeys(("student.size", "weak_view.size", "strong_view.size"), side),
        "pretrain.moco.batch_size": batch,
        "pretrain.moco.queue_size": min(max(power_of_two(photos), batch), 65536),
        "pretrain.moco.group_size": min(32, max(batch // 2, 2)),
        "pretrain.moco.epochs": float(epochs),
        # Twice MoCo's for this batch, as for the digits; a teacher that keeps up with few steps.
        "pretrain.moco.learning_rate": 0.06 * batch / 256,
        "pretrain.moco.decay": 0.99 if epochs * photos // batch < 10_000 else 0.999,
        "distill.batch_size": batch,
        "distill.min_steps": least,
    }
    if config.queries == BUDGETS:
        values["queries"] = tuple(n for n in BUDGETS if n <= photos) or (photos,)
    path = config.target.path
    if config.target.url:
        values["target.kind"] = "served"
    elif path and not is_function(path):
        values["target.kind"] = KINDS.get(path[path.rfind(".") :], "torch")
        values["target.arch"] = "" if values["target.kind"] == "torch" else config.target.arch
    return values


def is_function(path: str) -> bool:
    """True for FILE.py:function and module:function."""
    return path.rpartition(":")[2].isidentifier() and ":" in path


def power_of_two(number: int) -> int:
    """The largest power of two up to a number; 1 for less."""
    return 1 << max(number.bit_length() - 1, 0)

"""The keys of a config and what they mean."""

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict, config_dict


def training(**changes: Any) -> ConfigDict:
    """The keys that every training has, with PyTorch's ImageNet protocol as their defaults."""
    keys = dict(
        epochs=90.0,  # passes over the images; the unit of everything below that counts time
        batch_size=256,  # global, over all devices
        optimizer="sgd",  # sgd, lars
        learning_rate=0.1,
        schedule="step",  # constant, cosine, cosine_by_epoch, step
        warmup_epochs=0.0,
        warmup_start=0.0,  # the share of the rate that the warm-up starts from
        milestones=(30.0, 60.0),  # "step" multiplies by `factor` at each
        factor=0.1,
        momentum=0.9,
        nesterov=False,
        weight_decay=1e-4,
        weight_decay_on="all",  # or "kernels": no batch-norm scales, no biases
    )
    return ConfigDict({**keys, **changes})


def pretraining() -> dict[str, ConfigDict]:
    """The keys of each method of `qmx.trainers.PRETRAINING`."""
    moco = training(
        epochs=200.0,
        learning_rate=0.03,
        schedule="cosine_by_epoch",
        queue_size=65536,  # K, a multiple of batch_size
        temperature=0.2,
        decay=0.999,  # m of the momentum encoder
        features=128,  # D
        head="mlp",  # two layers, MoCo v2; or "linear", MoCo v1
        group_size=32,  # images that share batch statistics
    )
    simsiam = training(
        # 0.05 x batch / 256.
        epochs=100.0,
        batch_size=512,
        learning_rate=0.1,
        schedule="cosine_by_epoch",
        features=2048,  # D
        layers=3,  # of the projector; 2 on CIFAR
        hidden=512,  # of the predictor
        fix_predictor_rate=True,
    )
    rotation = training(
        epochs=70.0,
        batch_size=128,
        learning_rate=0.2,
        warmup_epochs=5.0,
        warmup_start=0.1,
        milestones=(30.0, 50.0),
    )
    return {"moco": moco, "simsiam": simsiam, "rotation": rotation}


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
        target_temperature=1.5,
        student_temperature=1.0,
        # Of the weak view's colours: brightness, contrast, saturation, hue.
        jitter=(0.0, 0.0, 0.0, 0.0),
        # The features before the classifier, by batch statistics without scale and bias.
        standardize=False,
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


def base() -> ConfigDict:
    """Every key there is. A config starts from this and changes what it needs.

    The methods' defaults are the papers' for ResNet-50 on ImageNet.
    """
    config = ConfigDict()

    # The grid: its product is what is run, see qmx/grid.py.
    config.seeds = (0,)
    # And "imported": what the student starts from.
    config.inits = ("none", "rotation", "moco", "simsiam")
    config.selects = ("random",)  # how to choose what to ask: qmx/selection/
    config.lists = ()  # for the selection "list": files of image names, one file for each budget
    # For those that choose by answers: how often more is asked after a random share,
    # qmx/stages/rounds.py. Two is the fewest in which answers that were chosen choose others; each
    # costs what qmx/selection/propagate.py does.
    config.rounds = 2
    # What is seen of an answer, asked once and replayed: qmx/ledger/access.py, weaken.py.
    config.accesses = ("logits",)
    # What a student learns from: "asked", the "pool" by propagation, "fixmatch" by itself.
    config.uses = ("asked",)
    # Columns beside the product: "moco+typiclust+pool"; what is not named is each axis's first.
    config.also = ()
    # How many images a student is given answers to, as shares of the pool and as numbers: one axis,
    # all of both.
    config.fractions = (0.01, 0.1, 1.0)
    config.queries = ()
    # Distinct images that may be asked in all; none is no limit.
    config.budget = config_dict.placeholder(int)

    # Of 1,000 calls of the target, in any currency, for the report.
    config.price = config_dict.placeholder(float)
    # Shares of the target's accuracy, and the report says what reaches them.
    config.reach = (0.5, 0.75, 0.9, 0.95)
    # Of the answers in the ledger; float16 halves the file, rounds to 3 digits, and ends at 65504.
    config.ledger_dtype = "float32"
    config.save_minutes = 10.0  # between two checkpoints of a training: what a kill may cost

    config.data = ConfigDict(
        dict(
            source="digits",  # digits, arrays, folder, tfds
            # Arrays: npz of the pool; folder: of class folders; tfds: name of the data set.
            path="",
            eval_path="",  # the same of the evaluation images; tfds: name of the split
            cache="",  # folder, tfds: what `python -m qmx.data.cache` wrote of the pool
            # So many images of the pool, and of the evaluation's, spread evenly; 0 takes all.
            limit=0,
            # Folder, tfds: side of the square that photos are squashed to, for training.
            canvas=256,
            resize=256,  # folder, tfds: the short side of what the target and evaluations see,
            crop=224,  # of which the centre is cut
            # Of each channel in 0..1; () is measured (digits, arrays) or ImageNet's (folder, tfds).
            mean=(),
            std=(),
        )
    )

    # Views that training sees; keywords of qmx.augment.make_view. `size` 0 is the image's own.
    crop = dict(size=0, crop_ratio=(3 / 4, 4 / 3), flip_p=0.5)
    config.strong_view = ConfigDict(
        dict(
            **crop,
            crop_scale=(0.2, 1.0),
            jitter=(0.4, 0.4, 0.4, 0.1),
            jitter_p=0.8,
            grey_p=0.2,
            blur_sigma=(0.1, 2.0),
            blur_p=0.5,
        )
    )  # MoCo v2's: moco, simsiam
    config.weak_view = ConfigDict(
        dict(
            **crop,
            crop_scale=(0.08, 1.0),
            jitter=(0.0, 0.0, 0.0, 0.0),
            jitter_p=0.0,
            grey_p=0.0,
            blur_sigma=(0.1, 2.0),
            blur_p=0.0,
        )
    )  # crop and flip: rotation, distillation, the target

    config.target = training(
        # train: on the pool's labels; torch: PyTorch weights from `path`; served: by a server of
        # the Open Inference Protocol v2; callable: a Python function. The last two have batch_size
        # images in a request. recorded: a table of answers, qmx/ledger/table.py; nothing beyond can
        # be asked.
        kind="train",
        arch="resnet50",  # torch: checked against the weights; "" takes what they are
        seed=0,
        # torch: .safetensors, .pth, .pth.tar; callable: FILE.py:function or module:function;
        # recorded: .npz, .parquet
        path="",
        expect=(),  # torch: top-1 and top-5 that it is known to have; a warning if it has not
        # Of its answers: float64 (its training's too), float32, tf32, bfloat16.
        precision="float32",
        access="logits",  # served, callable, recorded: what it answers with: logits, probs, label
        # Served, callable: further attempts at a batch, after 1, 2, 4 .. 60 seconds or what the
        # server says.
        retries=5,
        # served; qmx/targets/served.py:
        url="",  # http://HOST:PORT or https://
        model="",  # its name there
        version="",  # "" is the only one that there is
        input="",
        output="",  # names of the tensors; "" are the only ones
        # NAME of the environment variable whose value is sent as the bearer token; it is written
        # nowhere.
        token_env="",
        ca_file="",  # PEM certificates to trust in the place of the system's
        timeout=60.0,  # seconds for the connection, and again for the answer
        rate=0.0,  # requests in a second, at most; 0 is no limit
    )
    config.student = ConfigDict(
        dict(
            arch="resnet50",
            # Of its convolutions: float64 (and everything else), float32, bfloat16.
            dtype="float32",
        )
    )

    config.pretrain = ConfigDict(pretraining())
    config.pretrain.imported = ConfigDict()
    for keys in config.pretrain.values():
        # Weights that somebody else pretrained: PyTorch's, or a qmx encoder; nothing is trained.
        keys.path = ""

    # How students train; and, by name, how those do that `recipe` describes by their init and share
    # of the pool.
    config.distill = distilling()
    config.recipes = ConfigDict()

    # Of the use "pool", see qmx/selection/propagate.py.
    config.propagation = ConfigDict(dict(neighbours=50, power=3.0, alpha=0.99))

    # Of the use "fixmatch", see qmx/methods/fixmatch.py. Beside what was asked the student sees the
    # whole pool, what was asked included: so it is defined at any budget. EMAN's values on
    # ImageNet.
    config.fixmatch = ConfigDict(
        dict(
            mu=5,  # images of the pool for each that was asked, in every batch
            threshold=0.7,
            weight=10.0,  # lambda_u
            decay=0.999,  # of the teacher, which is the student that is evaluated
            # Passes over the pool, which is how both papers count; over them the recipe's schedule
            # is stretched. 0 is as many steps as the recipe has, and so is whatever is fewer.
            epochs=100.0,
        )
    )

    # What an encoder's features are good for, on a held-out fifth of the pool, at most 50,000
    # images.
    config.monitor = ConfigDict(
        dict(
            knn_k=200,
            knn_temperature=0.1,  # accuracy of weighted nearest neighbours
            linear=False,  # also that of a linear classifier, which takes training:
        )
    )
    # MoCo's protocol. SimSiam's: optimizer lars, schedule cosine_by_epoch, 90 epochs, batch 4096,
    # learning_rate 1.6.
    config.monitor.probe = training(
        epochs=100.0, learning_rate=30.0, milestones=(60.0, 80.0), weight_decay=0.0
    )

    config.lock()  # so that a misspelt key in a config file is an error
    config.recipes.unlock()  # a config gives its recipes names
    return config


def chosen(words: str, known: tuple[str, ...]) -> set[str]:
    """The words, with commas between them, that a config's `get_config` was given.

    Raises:
      ValueError: a word that is not among the known ones.
    """
    given = set(words.split(",")) if words else set()
    if unknown := sorted(given - set(known)):
        raise ValueError(f"{unknown[0]!r} is none of {', '.join(known)}")
    return given


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of a config with its value, as `--config.KEY` spells it."""
    for key, value in config.items():
        if hasattr(value, "items"):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value

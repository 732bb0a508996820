"""The keys of a config and what they mean.

A comment behind or above a key is what `qmx --keys` prints; `qmx --help`, its first sentence.
"""

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict, config_dict

from qmx.audit_keys import auditing
from qmx.frozen_keys import heads, imported, public
from qmx.pool_keys import choosing, matching, propagating
from qmx.training_keys import distilling, recipe, training

__all__ = ["base", "leaves", "recipe"]


def base() -> ConfigDict:
    """Every key there is. A config starts from this and changes what it needs.

    The methods' defaults are the papers' for ResNet-50 on ImageNet.
    """
    config = ConfigDict()

    config.seeds = (0,)  # one run for each; the report has their mean and deviation
    # what a student starts from; none, rotation, moco, simsiam, fastsiam, emp_ssl, features;
    # "imported" and "public" are the weights of pretrain.*.path
    config.inits = ("none", "rotation", "moco", "simsiam")
    # how the images to ask about are chosen; random, class_balanced, list, typiclust, maxherding,
    # probcover, balanced, kcenter, margin, entropy; qmx/selection/
    config.selects = ("random",)
    config.lists = ()  # for the selection "list": files of image names, one file for each budget
    # for margin and entropy: how often more is asked after a random share; two is the fewest in
    # which answers that were chosen choose others
    config.rounds = 2
    # how much of an answer is seen: logits, probs, top5, rounded2, label; true_labels is the
    # control. Answers are asked for once and replayed: qmx/ledger/access.py; with a defence,
    # qmx/ledger/weaken.py.
    config.accesses = ("logits",)
    # what a student learns from: "asked", "pool" (propagation), "fixmatch"; "head", "head_pool"
    config.uses = ("asked",)
    # columns beside the product: "moco+typiclust+pool"; what is not named is each axis's first
    config.also = ()
    # budgets as shares of the pool; both they and `queries` are rows of the table
    config.fractions = (0.01, 0.1, 1.0)
    config.queries = ()  # budgets as numbers of images
    # distinct images that may be asked about in all; None is no limit
    config.budget = config_dict.placeholder(int)
    config.price = config_dict.placeholder(float)  # of 1,000 calls, in any currency
    # shares (of the target's accuracy; of images in agreement) whose number of queries is reported
    config.reach = (0.5, 0.75, 0.9, 0.95)
    # of the answers in the ledger; float16 halves the file and rounds to 3 digits
    config.ledger_dtype = "float32"
    config.save_minutes = 10.0  # between two checkpoints of a training: what a kill may cost
    # also write every training's metrics as event files; needs the extra qmx[tensorboard]
    config.tensorboard = False

    config.data = ConfigDict(
        dict(
            source="digits",  # digits, arrays, folder, tfds
            # the pool: npz (arrays), photos in folders (folder), name (tfds); a folder
            # with MNIST's or CIFAR-10's original files (arrays) has both sides.
            path="",
            eval_path="",  # the evaluation images, in the same form; tfds: name of the split
            # folder, tfds: a text file with the names of photos that are not used, one a line
            leave_out="",
            cache="",  # folder, tfds: what `python -m qmx.data.cache` wrote of the pool
            # so many images of the pool, and of the evaluation's, spread evenly; 0 takes all
            limit=0,
            canvas=256,  # folder, tfds: side of the square that photos are squashed to
            resize=256,  # folder, tfds: the short side of what the target and evaluations see
            crop=224,  # folder, tfds: side of the centre that is cut of it
            # of each channel in 0..1; () is measured (digits, arrays) or ImageNet's (folder, tfds)
            mean=(),
            std=(),  # as mean
        )
    )

    crop = dict(
        size=0,  # side of the view; 0 is the image's own
        crop_ratio=(3 / 4, 4 / 3),  # width by height, at least and at most
        flip_p=0.5,  # probability, as all that end in _p
    )
    # what moco, simsiam, fastsiam and emp_ssl see, MoCo v2's; keywords of qmx.augment.make_view
    config.strong_view = ConfigDict(
        dict(
            **crop,
            crop_scale=(0.2, 1.0),  # share of the image's area
            jitter=(0.4, 0.4, 0.4, 0.1),  # brightness, contrast, saturation, hue
            jitter_p=0.8,
            grey_p=0.2,
            blur_sigma=(0.1, 2.0),  # in pixels
            blur_p=0.5,
        )
    )
    # what rotation, students and the target see: crop and flip; the same keywords
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
    )

    # the model to copy; a training's keys are for the kind "train"
    config.target = training(
        # the model to copy: train, torch, onnx, served, callable, recorded. It is trained on the
        # pool's labels (train), read from PyTorch weights or an ONNX file in `path` (torch, onnx),
        # a server of the Open Inference Protocol v2 (served), a Python function (callable), or a
        # table of answers beyond which nothing can be asked (recorded).
        kind="train",
        arch="resnet50",  # train, torch; checked against the weights, and "" takes what they are
        seed=0,  # of its training
        whole_statistics=False,  # train: as a student's
        # of weights, an ONNX file, a function or a table; FILE.py:function or module:function;
        # weights are .safetensors, .pth or .pth.tar, a table is .npz or .parquet
        path="",
        watch=(),  # callable: more files that it is made of, as weights; a change is another target
        expect=(),  # torch: top-1 and top-5 that it is known to have; a warning if it has not
        # of its answers: float64 (its training's too), float32, tf32, bfloat16
        precision="float32",
        access="logits",  # of one that is elsewhere: what it answers with: logits, probs, label
        # served, callable: more attempts at a batch, after 1, 2, 4 .. 60 s or as the server says
        retries=5,
        max_refused=0.01,  # share of the images that it may refuse or answer with NaN; left out
        url="",  # served: http://HOST:PORT or https://
        model="",  # served: its name there
        version="",  # served: "" is the only one that there is
        input="",  # served, onnx: name of the tensor of images; "" is the only one
        output="",  # served, onnx: name of the tensor of answers; "" is the only one
        classes="",  # file of its classes' names, one a line, in the order of its scores
        token_env="",  # served: NAME of the environment variable with the bearer token
        headers_env=(),  # served: more headers, "X-Api-Key:NAME" with such a variable for each
        ca_file="",  # served: PEM certificates to trust in the place of the system's
        timeout=60.0,  # served: seconds for the connection, and again for the answer
        rate=0.0,  # served, callable: requests in a second, at most; 0 is no limit
    )
    # how images are shown to a target that is elsewhere, see qmx/targets/shown.py
    config.target.shown = ConfigDict(
        dict(
            layout="",  # nhwc, nchw; "" is what the target says, else nhwc
            dtype="",  # uint8, float32, float16; "" is what the target says, else uint8
            scale=0.0,  # what 255 becomes; floats need it
            mean=(),  # of each channel, subtracted after scaling
            std=(),  # of each channel, divided by after that
            size=0,  # side of the square that images are resized to
            interpolation="bilinear",  # nearest, bilinear, bicubic, lanczos, box
            channels=0,  # 3 shows grey images in three equal channels, 1 their luma
        )
    )
    config.student = ConfigDict(
        dict(
            arch="resnet50",  # the network of students and encoders, of qmx.models.NETWORKS
            # of its convolutions: float64 (and everything else), float32, bfloat16
            dtype="float32",
            size=0,  # side of what it is evaluated on, as weak_view.size; 0 is the images' own
        )
    )

    config.pretrain = ConfigDict()
    config.pretrain.moco = training(
        epochs=200.0,
        learning_rate=0.03,
        schedule="cosine_by_epoch",
        queue_size=65536,  # K, a multiple of batch_size
        temperature=0.2,  # what the logits are divided by
        decay=0.999,  # m of the momentum encoder
        features=128,  # D
        head="mlp",  # two layers, MoCo v2; or "linear", MoCo v1
        group_size=32,  # images that share batch statistics
    )
    config.pretrain.simsiam = training(
        epochs=100.0,
        batch_size=512,
        learning_rate=0.1,  # 0.05 x batch_size / 256
        schedule="cosine_by_epoch",
        features=2048,  # D
        layers=3,  # of the projector; 2 on CIFAR
        hidden=512,  # of the predictor
        fix_predictor_rate=True,  # the predictor's rate stays as it is, whatever the schedule
    )
    # SimSiam with more views. Batch and epochs are its paper's; the rest is SimSiam's.
    config.pretrain.fastsiam = training(
        epochs=25.0,
        batch_size=32,
        learning_rate=0.00625,  # 0.05 x batch_size / 256
        schedule="cosine_by_epoch",
        views=4,  # of an image in one step; each predicts the mean of the others
        features=2048,  # D
        layers=3,  # of the projector; 2 on CIFAR
        hidden=512,  # of the predictor
        fix_predictor_rate=True,  # the predictor's rate stays as it is, whatever the schedule
    )
    # The values of its reference, on CIFAR.
    config.pretrain.emp_ssl = training(
        epochs=30.0,
        batch_size=100,  # images; a step has `views` times as many crops
        optimizer="larc",
        learning_rate=0.3,
        schedule="cosine",
        nesterov=True,
        weight_decay_on="kernels",
        views=20,  # crops of an image in one step
        crop_scale=(0.25, 0.25),  # share of the image's area, in the place of strong_view's
        similarity=200.0,  # weight of the mean cosine of crops to their mean, lambda
        distortion=0.2,  # eps^2 of the total coding rate
        features=1024,  # D
        hidden=4096,  # of the projector
    )
    config.pretrain.rotation = training(
        epochs=70.0,
        batch_size=128,
        learning_rate=0.2,
        warmup_epochs=5.0,
        warmup_start=0.1,
        milestones=(30.0, 50.0),
    )
    # A network that learns the features of an encoder that stays as it is. SimReg's values.
    config.pretrain.features = training(
        epochs=130.0,
        learning_rate=0.05,
        schedule="cosine_by_epoch",
        of="public",  # the encoder, a name in pretrain
    )
    config.pretrain.imported = imported()
    for keys in config.pretrain.values():
        # weights that somebody else pretrained: PyTorch's, or a qmx encoder; nothing is trained
        keys.path = ""
    config.pretrain.public = public()  # an encoder that stays as it is; qmx.frozen_keys adds more
    config.head = heads()

    config.distill = distilling()  # how students train that no recipe describes
    # By name, how those do that `recipe` describes by their init and share of the pool.
    config.recipes = ConfigDict()
    # of selections that choose by features, as typiclust
    config.selection = choosing()
    # of the use "pool", see qmx/selection/propagate.py
    config.propagation = propagating()
    # of the use "fixmatch", see qmx/methods/fixmatch.py: the student also sees the whole pool, what
    # was asked included. EMAN's values on ImageNet.
    config.fixmatch = matching()

    # accuracy of an encoder's features, on a held-out fifth of the pool, at most 50,000 images
    config.monitor = ConfigDict(
        dict(
            knn_k=200,  # how many nearest neighbours vote
            knn_temperature=0.1,  # of the votes' weights
            linear=False,  # also the accuracy of a linear classifier, which `probe` trains
        )
    )
    # MoCo's; SimSiam's: optimizer lars, schedule cosine_by_epoch, 90 epochs, batch 4096, rate 1.6
    config.monitor.probe = training(
        epochs=100.0, learning_rate=30.0, milestones=(60.0, 80.0), weight_decay=0.0
    )

    # the owner's limits, of which the report says what they mean, and texts for it
    config.audit = auditing()

    config.lock()  # so that a misspelt key in a config file is an error
    config.recipes.unlock()  # a config gives its recipes names
    return config


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of a config with its value, as `--config.KEY` spells it."""
    for key, value in config.items():
        if hasattr(value, "items"):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value

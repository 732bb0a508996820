"""Copy an ImageNet classifier: every cell of the result table, by the protocols of its sources.

    # Optional, a look at the weights; then the cache, once, 33 GB; then the run.
    python -m qmx.models.from_torch ig_resnext101_32x16-c6f796b0.pth target.safetensors
    python -m qmx.data.cache /imagenet/train /cache/train
    python -m qmx.main --config=configs/imagenet.py --workdir=runs/imagenet \\
        --config.data.path=/imagenet/train --config.data.eval_path=/imagenet/val \\
        --config.data.cache=/cache/train --config.target.path=ig_resnext101_32x16-c6f796b0.pth

Words after the colon, with commas between them, choose a part or a flavour:

    :moco  :none,moco   these inits alone (none, rotation, moco, simsiam)
    :paper              (the default) what the code behind the table did, its departures included;
                        but its warm-up climbs in a stair, once an epoch, and ours at each step, and
                        at 100 % tuning follows the slides, for which there is no code
    :best               decay on kernels only where nothing was pretrained, and pooled features
                        standardised before the classifier where something was
    :moco800            MoCo v2 for 800 epochs instead of 200
    :dinov2             heads on DINOv2's features, see below; :dinov2,moco has MoCo beside them
    :tiny               the same code in about a minute on two cores; trains a target of its own

Public weights instead of a pretraining, one line each:

    --config.pretrain.moco.path=moco_v2_200ep_pretrain.pth.tar
    --config.pretrain.simsiam.path=checkpoint_0099.pth.tar

Hardware and hours. Nothing of this has been run whole by us. The arithmetic is 1,000,800 MoCo steps
of 256 pairs, 250,200 SimSiam steps of 512 pairs, 700,630 rotation steps of 128 images four times
each; MoCo's authors took 53 h for their 200 epochs on eight V100 in float32. One pass of the target
over the 1.28 M images is 9.3e16 operations.

What to expect, top-1 / top-5 (the slides of
github.com/alright-code/model-extraction-self-supervision, 2022, "the predecessor"; its encoders are
the model zoo's of mmselfsup):

    queries        none            rotation        moco            simsiam
    1 %            8.20 / 23.25    17.11 / 40.92   39.35 / 68.99   16.84 / 40.24
    10 %           55.25 / 80.37   52.37 / 79.04   61.05 / 85.03   53.40 / 79.49
    100 %          76.00 / 92.99   not run         76.72 / 93.35   not run

Target 84.2 / 97.2 (facebookresearch/WSL-Images, 32x16d). MoCo's encoder: 20 nearest neighbours
(T 0.07) 55.7, linear probe 67.5; SimSiam's 57.6 and 68.1; rotation's 11.9 and 48.1 (mmselfsup's
model zoo). Our monitors take a held-out part of the training images, so that theirs come out a
little higher.

An encoder that anybody can download, one GPU, about an hour:

    python -m qmx.main --config=configs/imagenet.py:dinov2 --workdir=runs/dinov2 \\
        --config.data.path=/imagenet/train --config.data.eval_path=/imagenet/val \\
        --config.target.path=ig_resnext101_32x16-c6f796b0.pth \\
        --config.pretrain.dinov2.path=dinov2_vitb14_pretrain.pth

Weights: dinov2_vitb14_pretrain.pth or dinov2_vitl14_pretrain.pth (facebookresearch/dinov2, its
README's table; Apache-2.0), or model.safetensors of facebook/dinov2-base or -large (Hugging Face,
the same licence). Those of DINOv3, which have a licence of their own, iBOT and MAE are read too.
The target's are CC-BY-NC 4.0 (facebookresearch/WSL-Images). Encoder and target are not ours to hand
on; the report names the encoder's licence.

Hours, by arithmetic for one H100 at 2e14 operations a second, and not measured: features of the
pool 59e15 operations with B/14, 5 minutes (L/14 207e15, 17); the target's answers 9.3e16, 8 minutes
if its grouped convolutions reach that; the heads about 15, most of it for those of all images. Each
photo is decoded twice, for which 16 cores take about 11 minutes a time, and this is the limit with
B/14. MoCo's 200 epochs are 8.3e18 operations. Memory: 4 GB of features and 5 GB of answers in the
host, and 30 GB on the GPU for the heads of all images. --config.fractions="(0.01,0.1)" leaves these
out, and nine tenths of the answers.

What to expect, accuracy with true labels, which the columns "true_labels" measure:

    images                                 1,000   5,000   12,811  128,116  1,281,167
    D2V2-Refined L/16, ImageNet alone      61.7    73.9    78.1    82.1     83.5
    DINOv2 B/14, L/14, linear              -       -       -       -        84.5, 86.3
    the table above, MoCo                  -       -       39.4    61.1     76.7

(ml-jku/MIM-Refiner, docs/imgs/in1k_lowshot.png, where 1,000 and 5,000 are one and five of each
class, as in the columns "class_balanced"; facebookresearch/dinov2, MODEL_CARD.md. No low-shot
figures of DINOv2 are known to us; we expect no less than the first row. ImageNet's images, without
their labels, are among the 142 M that it learned.) The target has 84.2, so
accuracy tells little about it. The figure to look at is the fidelity beyond true labels of the same
images, of which nobody has published one.
"""

from ml_collections import ConfigDict

from qmx.frozen_keys import add_encoder
from qmx.settings import base, recipe
from qmx.shipped import chosen

INITS = ("none", "rotation", "moco", "simsiam")
WORDS = (*INITS, "paper", "best", "moco800", "dinov2", "tiny")


def get_config(words: str = "") -> ConfigDict:
    given, config = chosen(words, WORDS), base()
    config.inits = tuple(init for init in INITS if init in given) or INITS
    config.fractions = (0.01, 0.1, 1.0)
    config.selects = ("predecessor",)
    config.data.source = "folder"
    config.strong_view.size = config.weak_view.size = 224
    config.target.update(kind="torch", arch="resnext101_32x16d", expect=(84.2, 97.2))
    config.student.arch = "resnet50"
    config.monitor.update(knn_k=20, knn_temperature=0.07)  # mmselfsup's; others differ by 10 points
    # The pretraining protocols are the defaults of `qmx.settings.base`: MoCo v2 200 epochs (He et
    # al., main_moco.py), SimSiam 100 (main_simsiam.py), rotation 70 (mmselfsup, rotation_pred).
    if "moco800" in given:
        config.pretrain.moco.epochs = 800.0

    best = "best" in given
    # From scratch: S4L's schedules (Zhai et al. 2019) as the predecessor's code has them. It decays
    # batch norm and biases too, which S4L does not, and adds colour jitter. Unlike there, epochs
    # follow each other without a seam: the code's last batch at 1 % has 11 images, and 11 images'
    # statistics.
    scratch = dict(
        inits=("none",),
        jitter=(0.3, 0.3, 0.3, 0.1),
        factor=0.1,
        weight_decay_on="kernels" if best else "all",
    )
    # Fine-tuning: 20 epochs, a rate for the backbone and a larger one for the classifier (PCL).
    # Standardised features have unit size whatever the method, so one rate serves; 0.1 is not
    # tuned.
    tune = dict(inits=("rotation", "moco", "simsiam", "imported"), standardize=best)
    config.recipes.scratch_1 = recipe(
        up_to=0.02,
        epochs=1000.0,
        learning_rate=0.01,
        head_learning_rate=0.01,
        weight_decay=1e-2,
        warmup_epochs=10.0,
        milestones=(700.0, 800.0, 900.0),
        **scratch,
    )
    config.recipes.scratch_10 = recipe(
        above=0.02,
        up_to=0.2,
        epochs=200.0,
        learning_rate=0.1,
        head_learning_rate=0.1,
        weight_decay=1e-3,
        warmup_epochs=5.0,
        milestones=(140.0, 160.0, 180.0),
        **scratch,
    )
    config.recipes.scratch_100 = recipe(
        above=0.2,
        epochs=90.0,
        learning_rate=0.1,
        head_learning_rate=0.1,
        weight_decay=1e-4,
        milestones=(30.0, 60.0),
        **scratch,
    )
    config.recipes.tune_1 = recipe(up_to=0.02, head_learning_rate=0.1 if best else 1.0, **tune)
    config.recipes.tune_10 = recipe(above=0.02, up_to=0.2, head_learning_rate=0.1, **tune)
    # At 100 % the slides name the PyTorch protocol (pytorch/examples, imagenet/main.py) for all
    # inits.
    config.recipes.tune_100 = recipe(
        above=0.2,
        epochs=90.0,
        learning_rate=0.1,
        head_learning_rate=0.1,
        weight_decay=1e-4,
        milestones=(30.0, 60.0),
        factor=0.1,
        **tune,
    )
    if "dinov2" in given:
        dinov2(config, tuple(init for init in INITS if init in given))
    if "tiny" in given:
        tiny(config)
    return config


def dinov2(config: ConfigDict, beside: tuple[str, ...]) -> None:
    """Heads on an encoder of others; each column beside its control, which learns true labels."""
    add_encoder(config, "dinov2", dtype="bfloat16")
    config.inits, config.seeds = ("dinov2", *beside), (0, 1, 2)
    config.queries = (1000, 5000)  # one and five images a class
    config.selects, config.accesses = ("random",), ("logits", "true_labels")
    config.also = ("dinov2+class_balanced", "dinov2+class_balanced+true_labels")
    config.target.precision = "tf32"
    # Less to choose from than by default: a pass over all images is 4e12 operations.
    config.head.update(folds=2, decays=(1e-3, 1e-4, 1e-5, 1e-6), temperatures=(1.0, 2.0))


def tiny(config: ConfigDict) -> None:
    """Small images and networks, one epoch of everything; the figures mean nothing."""
    config.fractions, config.queries = (0.1, 1.0), ()
    config.data.update(limit=96, canvas=40, resize=36, crop=32)
    config.strong_view.size = config.weak_view.size = 32
    config.student.arch = "resnet8"
    config.target.update(kind="train", arch="resnet8", expect=(), epochs=1.0, batch_size=32)
    config.pretrain.moco.update(epochs=1.0, batch_size=32, group_size=8, queue_size=64, features=16)
    config.pretrain.simsiam.update(epochs=1.0, batch_size=32, features=32, hidden=16)
    config.pretrain.rotation.update(epochs=1.0, batch_size=32, warmup_epochs=0.0)
    config.monitor.knn_k = 5
    for keys in config.recipes.values():
        keys.update(epochs=1.0, batch_size=32, warmup_epochs=0.0)

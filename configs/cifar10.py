"""Copy a CIFAR-10 classifier: an afternoon on one GPU, with published curves to check the methods
by.

    python -m qmx.main --config=configs/cifar10.py --workdir=runs/cifar10 \\
        --config.data.path=train.npz --config.data.eval_path=test.npz

The npz files hold "image" uint8[n, 32, 32, 3] and "label" int[n]. With tensorflow-datasets' copy,
prepared once: --config.data.source=tfds --config.data.path=cifar10.

Words after the colon, with commas between them: inits (none, rotation, moco, simsiam) for these
alone; `laptop` for two cores, which has none and moco (others by --config.inits); `tiny` for the
same code in about a minute on them.

Protocols and what to expect:

    moco      facebookresearch/moco, branch colab-notebook, moco_cifar10_demo.ipynb: 82.6 % by 200
              nearest neighbours (T 0.1) after 200 epochs, 48 % after 10; there on the 128-d output
              and the test images (benchmarks/moco_cifar10.py does exactly that), here on pooled
              features and a held-out part of the pool. About 20 s an epoch on a V100.
    simsiam   Chen & He 2021, appendix D: 800 epochs, linear probe 91.8 %; others' kNN is 90 %.
    rotation  Gidaris et al. 2018 (FeatureLearningRotNet, CIFAR), with ResNet-18.
    target    ResNet-18, supervised; about 94 to 95 % is usual for it. Not run whole by us.
    students  not published anywhere, and not run whole by us.

On two CPU cores one of these MoCo epochs takes about twenty minutes. `laptop` has recipes of ours,
chosen by nothing that the evaluation images tell: ResNet-8 twice as wide, the target four times.
"""

from ml_collections import ConfigDict

from qmx.settings import base, recipe
from qmx.shipped import chosen
from qmx.training_keys import on_two_cores

INITS = ("none", "rotation", "moco", "simsiam")
WORDS = (*INITS, "laptop", "tiny")


def get_config(words: str = "") -> ConfigDict:
    given, config = chosen(words, WORDS), base()
    config.inits = tuple(init for init in INITS if init in given) or INITS
    config.fractions = (0.01, 0.1, 1.0)
    config.data.update(source="arrays", canvas=32, resize=32, crop=32)
    # The notebook's; the pixels' own standard deviation is 0.247, 0.243, 0.262.
    config.data.update(mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010))
    config.strong_view.update(size=32, crop_scale=(0.08, 1.0), blur_p=0.0)
    # a smaller crop of 32 pixels shows too little.
    config.weak_view.update(size=32, crop_scale=(0.25, 1.0))

    config.student.arch = "resnet18_small"
    config.target.update(
        arch="resnet18_small", epochs=200.0, batch_size=128, schedule="cosine", weight_decay=5e-4
    )
    config.pretrain.moco.update(
        epochs=200.0,
        batch_size=512,
        learning_rate=0.06,
        weight_decay=5e-4,
        head="linear",
        # 8 groups.
        queue_size=4096,
        temperature=0.1,
        decay=0.99,
        group_size=64,
    )
    # 0.03 x batch / 256
    config.pretrain.simsiam.update(
        epochs=800.0, batch_size=512, learning_rate=0.06, weight_decay=5e-4, layers=2
    )
    config.pretrain.rotation.update(
        epochs=200.0,
        batch_size=128,
        learning_rate=0.1,
        warmup_epochs=0.0,
        nesterov=True,
        milestones=(60.0, 120.0, 160.0),
        factor=0.2,
        weight_decay=5e-4,
    )
    # Ours: cosine, and for few images as many steps as a tenth of the pool would give.
    config.recipes.scratch = recipe(
        ("none",),
        epochs=200.0,
        min_steps=8000,
        batch_size=128,
        schedule="cosine",
        learning_rate=0.1,
        head_learning_rate=0.1,
        weight_decay_on="kernels",
    )
    config.recipes.tune = recipe(
        ("rotation", "moco", "simsiam", "imported"),
        epochs=50.0,
        min_steps=2000,
        batch_size=128,
        schedule="cosine",
        learning_rate=0.01,
        head_learning_rate=0.1,
        standardize=True,
    )
    if "laptop" in given:
        laptop(config)
    if "tiny" in given:
        tiny(config)
    return config


def laptop(config: ConfigDict) -> None:
    """Protocols for two cores: small networks, small crops, few steps. All recipes are ours."""
    config.queries, config.fractions = (50, 100, 250, 500), ()
    config.inits = ("none", "moco")
    config.also = ("moco+maxherding", "moco+maxherding+pool")
    config.student.arch, config.target.arch = "resnet8_x2_pool", "resnet8_x4_pool"
    # Crops of 24 pixels take about half the time of 32. Whole images, which are what is evaluated,
    # show things about as large as crops of two thirds do at 24 (Touvron et al. 2019, FixRes).
    config.strong_view.update(size=24, crop_scale=(0.2, 1.0))
    config.weak_view.update(size=24, crop_scale=(0.4, 1.0))
    config.target.update(epochs=14.0, warmup_epochs=1.0, whole_statistics=True)
    config.pretrain.moco.update(
        epochs=40.0,
        batch_size=256,
        learning_rate=0.12,
        warmup_epochs=0.5,
        schedule="cosine",
        head="mlp",
        group_size=32,
    )
    # As wide as this network can use; the papers' are for sixteen times as many features.
    config.pretrain.simsiam.update(
        epochs=12.0, batch_size=128, learning_rate=0.1, schedule="cosine", features=512, hidden=128
    )
    config.pretrain.fastsiam.update(
        epochs=6.0, batch_size=64, learning_rate=0.05, schedule="cosine", weight_decay=5e-4
    )
    config.pretrain.fastsiam.update(features=512, hidden=128, layers=2)
    config.pretrain.emp_ssl.update(epochs=1.0, features=256, hidden=512)
    config.pretrain.rotation.update(epochs=6.0, batch_size=64, schedule="cosine")
    # Of an encoder that is brought along as `public`.
    config.pretrain.features.update(epochs=10.0, batch_size=128, schedule="cosine")

    # 250 images and fewer, and more. Students of the pool see it five times and ten times: once is
    # too little to learn what is propagated, and by the pool's labels 5.8 passes tell 1.6 more than
    # 2.9 do.
    # Statistics of whole images tell 1.0 to 1.7 more than those of crops.
    inits = ("rotation", "moco", "simsiam", "fastsiam", "emp_ssl", "features")
    del config.recipes.scratch, config.recipes.tune
    config.recipes.update(on_two_cores(inits, above=0.005, epochs=(5.0, 10.0)))
    for keys in config.recipes.values():
        keys.whole_statistics = True
    # The best of 48 by the labels of 12,000 images of the pool (one encoder): 44.1 % of the others
    # are told by 50 labels, 56.1 by 500; without patches 42 and 52. Mirror images' patches tell 1.8
    # more by 500 (benchmarks/README.md).
    config.selection.update(patches=0.5, mirrored=True)
    config.propagation.update(neighbours=30, alpha=0.9, patches=0.5, head_power=0.5)
    config.monitor.knn_k = 20


def tiny(config: ConfigDict) -> None:
    """Small networks, few images, one epoch of everything; the figures mean nothing."""
    config.data.limit = 512
    config.student.arch = config.target.arch = "resnet8"
    config.target.update(epochs=1.0, batch_size=64)
    config.pretrain.moco.update(epochs=1.0, batch_size=64, group_size=8, queue_size=256)
    config.pretrain.simsiam.update(epochs=1.0, batch_size=64, features=64, hidden=16)
    config.pretrain.rotation.update(epochs=1.0, batch_size=64)
    config.monitor.knn_k = 20
    for keys in config.recipes.values():
        keys.update(epochs=1.0, min_steps=8, batch_size=64)

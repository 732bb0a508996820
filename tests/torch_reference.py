"""Networks and training steps in plain PyTorch, written from the papers' protocols, for the parity
tests.

Nothing here is shared with qmx: NCHW, torch's own layers, torchvision's and the reference codes'
names. Only `variables` knows both sides; it renames and transposes.
"""

import math
import re
from collections import OrderedDict
from functools import partial

import numpy as np
import pytest

torch = pytest.importorskip("torch")
nn, F = torch.nn, torch.nn.functional


def tensor(x):
    """A copy as a tensor; images [B, H, W, C] become [B, C, H, W]."""
    x = np.array(x)
    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)) if x.ndim == 4 else x)


def variables(params, stats):
    """The state dict of the network whose variables, nested dicts of arrays, are `params` and
    `stats`."""
    kinds = {
        "kernel": "weight",
        "scale": "weight",
        "bias": "bias",
        "mean": "running_mean",
        "var": "running_var",
    }
    found = {}

    def walk(tree, path):
        for name, value in tree.items():
            if isinstance(value, dict):
                walk(value, [*path, name])
                continue
            value = np.array(value)
            if name == "kernel":
                # HWIO -> OIHW, IO -> OI.
                value = value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T
            # layer1_0/conv1 -> layer1.0.conv1
            key = re.sub(r"_(\d+)", r".\1", ".".join([*path, kinds[name]]))
            assert key not in found
            found[key] = torch.from_numpy(np.ascontiguousarray(value))

    walk(params, [])
    walk(stats, [])
    return found


# Networks


class ReLU(nn.ReLU):
    """ReLU that remembers how close an input came to its kink, where rounding decides the gradient.

    Closeness is in `unit`s, the size of what was summed up to the input. Inputs of exactly zero do
    not count: they are the same zero in every program, with gradient zero.
    """

    closest = math.inf

    def forward(self, x, unit=1.0):
        if torch.is_grad_enabled():
            distance = x.detach().abs() / unit
            self.closest = min(self.closest, float(distance[x != 0].min()))
        return super().forward(x)


def margin(net):
    """How close any ReLU of the network came to its kink while gradients were taken."""
    return min(module.closest for module in net.modules() if isinstance(module, ReLU))


class SplitBatchNorm(nn.Module):
    """Batch norm of consecutive, equal groups, each by torch's own batch norm on its own.

    Every group updates a copy of the running statistics; what is kept is the mean of the copies.
    """

    def __init__(self, channels, groups=1, affine=True):
        super().__init__()
        self.groups = groups
        self.weight = nn.Parameter(torch.ones(channels)) if affine else None
        self.bias = nn.Parameter(torch.zeros(channels)) if affine else None
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x):
        if not self.training:
            return F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.1, 1e-5
            )
        copies = [(self.running_mean.clone(), self.running_var.clone()) for _ in range(self.groups)]
        parts = x.reshape(self.groups, -1, *x.shape[1:])
        y = [
            F.batch_norm(part, mean, var, self.weight, self.bias, True, 0.1, 1e-5)
            for part, (mean, var) in zip(parts, copies, strict=True)
        ]
        self.running_mean = torch.stack([mean for mean, _ in copies]).mean(0)
        self.running_var = torch.stack([var for _, var in copies]).mean(0)
        return torch.cat(y)


class Block(nn.Module):
    """torchvision's BasicBlock, or its Bottleneck with the stride on the 3x3."""

    def __init__(self, entering, planes, stride, bottleneck, groups, width_per_group, norm):
        super().__init__()
        if bottleneck:
            inner, out = int(planes * width_per_group / 64) * groups, 4 * planes
            sizes = [
                (entering, inner, 1, 1, 1),
                (inner, inner, 3, stride, groups),
                (inner, out, 1, 1, 1),
            ]
        else:
            out = planes
            sizes = [(entering, out, 3, stride, 1), (out, out, 3, 1, 1)]
        self.depth = len(sizes)
        self.relu = nn.ModuleList(ReLU() for _ in sizes)
        for i, (a, b, kernel, step, parts) in enumerate(sizes, 1):
            setattr(
                self,
                f"conv{i}",
                nn.Conv2d(a, b, kernel, step, kernel // 2, groups=parts, bias=False),
            )
            setattr(self, f"bn{i}", norm(b))
        self.downsample = None
        if stride != 1 or entering != out:
            self.downsample = nn.Sequential(
                nn.Conv2d(entering, out, 1, stride, bias=False), norm(out)
            )

    def forward(self, x):
        y = x
        for i in range(1, self.depth + 1):
            y = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(y))
            y = self.relu[i - 1](y) if i < self.depth else y
        shortcut = x if self.downsample is None else self.downsample(x)
        # Where the shortcut passes nothing on, the branch is alone; it may start at zero and be
        # small.
        unit = torch.where(shortcut == 0, y.detach().std(), 1.0)
        return self.relu[-1](y + shortcut, unit)


class ResNet(nn.Module):
    """torchvision's ResNet up to the pooled features, with the usual small stem for small
    images."""

    def __init__(
        self,
        blocks,
        bottleneck=False,
        width=64,
        groups=1,
        width_per_group=64,
        stem="large",
        channels=3,
        splits=1,
        norm=None,
    ):
        super().__init__()
        norm = norm or partial(SplitBatchNorm, groups=splits)
        self.stages, self.large, self.pooled = len(blocks), stem == "large", stem != "small"
        self.conv1 = (
            nn.Conv2d(channels, width, 7, 2, 3, bias=False)
            if self.large
            else nn.Conv2d(channels, width, 3, 1, 1, bias=False)
        )
        self.bn1 = norm(width)
        self.relu, self.maxpool = ReLU(), nn.MaxPool2d(3, 2, 1)
        entering = width
        for stage, count in enumerate(blocks):
            planes, layer = width * 2**stage, []
            for index in range(count):
                stride = 2 if stage > 0 and index == 0 else 1
                layer.append(
                    Block(entering, planes, stride, bottleneck, groups, width_per_group, norm)
                )
                entering = planes * 4 if bottleneck else planes
            setattr(self, f"layer{stage + 1}", nn.Sequential(*layer))
        self.features = entering

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.maxpool(x) if self.pooled else x
        for stage in range(self.stages):
            x = getattr(self, f"layer{stage + 1}")(x)
        return x.mean((2, 3))


class Released(ResNet):
    """torchvision's whole ResNet or ResNeXt: torch's own batch norm, and "fc" on top."""

    def __init__(self, arch, classes=1000, channels=3):
        super().__init__(*arch, channels, norm=nn.BatchNorm2d)
        self.fc = nn.Linear(self.features, classes)

    def forward(self, x):
        return self.fc(super().forward(x))


def pictures(n, side, channels=3, seed=0):
    """[n, C, side, side]: noise, and large shapes and colours that differ from one to the next."""
    random = torch.Generator().manual_seed(seed)
    shapes = F.interpolate(torch.randn(n, channels, 4, 4, generator=random), side, mode="bilinear")
    return (
        shapes
        + torch.randn(n, channels, 1, 1, generator=random)
        + 0.3 * torch.randn(n, channels, side, side, generator=random)
    )


def released(arch, classes=1000, channels=3, seed=0, side=64):
    """`Released` with random weights and running statistics near those of random images, as a
    trained one has."""
    torch.manual_seed(seed)
    net = Released(arch, classes, channels)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.0)
                module.bias.normal_(0, 0.1)
                module.momentum = 1.0
        for module in net.modules():
            # As in a trained network, each block changes its input a little.
            if isinstance(module, Block):
                getattr(module, f"bn{module.depth}").weight.mul_(0.4)
        net.train()(pictures(16, side, channels, seed))
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.add_(
                    0.1 * torch.randn_like(module.running_mean) * module.running_var.sqrt()
                )
                module.running_var.mul_(torch.empty_like(module.running_var).uniform_(0.8, 1.25))
                module.momentum = 0.1
    return net.eval()


class Fc(nn.Module):
    """Layers under the name "fc", as the reference codes hang them onto the backbone."""

    def __init__(self, *layers):
        super().__init__()
        self.fc = nn.Sequential(*layers) if len(layers) > 1 else layers[0]

    def forward(self, x):
        return self.fc(x)


def classifier(features, classes):
    return Fc(nn.Linear(features, classes))


def moco_head(features, out):
    return Fc(nn.Linear(features, features), ReLU(), nn.Linear(features, out))


def simsiam_projector(features, out, splits=1):
    head = Fc(
        nn.Linear(features, features, bias=False),
        SplitBatchNorm(features, splits),
        ReLU(),
        nn.Linear(features, features, bias=False),
        SplitBatchNorm(features, splits),
        ReLU(),
        nn.Linear(features, out),
        SplitBatchNorm(out, splits, affine=False),
    )
    head.fc[6].bias.requires_grad = False
    return head


def simsiam_predictor(features, hidden, splits=1):
    return Fc(
        nn.Linear(features, hidden, bias=False),
        SplitBatchNorm(hidden, splits),
        ReLU(),
        nn.Linear(hidden, features),
    )


def emp_ssl_projector(features, hidden, out):
    return Fc(
        nn.Linear(features, hidden, bias=False),
        SplitBatchNorm(hidden),
        ReLU(),
        nn.Linear(hidden, hidden, bias=False),
        SplitBatchNorm(hidden),
        ReLU(),
        nn.Linear(hidden, out),
    )


class Transformer(nn.Module):
    """A vision transformer under timm's names up to the class token after the last norm; without
    rotary positions, which are the identity for an image of one patch."""

    def __init__(self, arch, side, eps, scale=True, positions=True, channels=1):
        super().__init__()
        dim, tokens = arch.dim, (side // arch.patch) ** 2
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        if positions:  # with registers the class token has none
            self.pos_embed = nn.Parameter(torch.zeros(1, tokens + (not arch.registers), dim))
        if arch.registers:
            self.reg_token = nn.Parameter(torch.zeros(1, arch.registers, dim))
        self.patch_embed = nn.ModuleDict(
            {"proj": nn.Conv2d(channels, dim, arch.patch, stride=arch.patch)}
        )
        self.blocks = nn.ModuleList(TransformerBlock(arch, eps, scale) for _ in range(arch.depth))
        self.norm = nn.LayerNorm(dim, eps)

    def forward(self, x):
        x = self.patch_embed["proj"](x).flatten(2).transpose(1, 2)
        first = self.cls_token.expand(len(x), -1, -1)
        at = getattr(self, "pos_embed", 0)
        if hasattr(self, "reg_token"):
            x = torch.cat([first, self.reg_token.expand(len(x), -1, -1), x + at], 1)
        else:
            x = torch.cat([first, x], 1) + at
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, 0]


class TransformerBlock(nn.Module):
    def __init__(self, arch, eps, scale):
        super().__init__()
        dim, self.heads = arch.dim, arch.heads
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps), nn.LayerNorm(dim, eps)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(dim, 3 * dim), "proj": nn.Linear(dim, dim)})
        self.mlp = nn.ModuleDict(
            {"fc1": nn.Linear(dim, arch.hidden), "fc2": nn.Linear(arch.hidden, dim)}
        )
        for name in ("ls1", "ls2") if scale else ():
            gamma = nn.Parameter(torch.ones(dim))
            self.add_module(name, nn.ParameterDict({"gamma": gamma}))

    def forward(self, x):
        q, k, v = (
            part.unflatten(2, (self.heads, -1)).transpose(1, 2)
            for part in self.attn["qkv"](self.norm1(x)).chunk(3, 2)
        )
        weights = torch.softmax(q @ k.transpose(2, 3) / math.sqrt(q.shape[-1]), -1)
        y = self.attn["proj"]((weights @ v).transpose(1, 2).flatten(2))
        x = x + y * (self.ls1["gamma"] if hasattr(self, "ls1") else 1)
        y = self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))
        return x + y * (self.ls2["gamma"] if hasattr(self, "ls2") else 1)


def network(**parts):
    """The parts one after the other, under their names."""
    return nn.Sequential(OrderedDict(parts))


# Methods: each gives the loss of one step


class MoCo:
    """He et al. 2020 and Chen et al. 2020, in the order of the reference's `forward`."""

    def __init__(self, query, key, queue, temperature, decay):
        self.query, self.key, self.queue, self.pointer = query.train(), key.train(), queue, 0
        self.temperature, self.decay = temperature, decay

    def loss(self, x_query, x_key, shuffle):
        q = F.normalize(self.query(x_query), dim=1)
        with torch.no_grad():
            for ours, theirs in zip(self.key.parameters(), self.query.parameters(), strict=True):
                ours.mul_(self.decay).add_(theirs, alpha=1 - self.decay)
            k = F.normalize(self.key(x_key[shuffle]), dim=1)[torch.argsort(shuffle)]
        negatives = self.queue.clone()
        logits = (
            torch.cat([torch.einsum("nc,nc->n", q, k)[:, None], q @ negatives.T], 1)
            / self.temperature
        )
        self.queue[self.pointer : self.pointer + len(k)] = k
        self.pointer = (self.pointer + len(k)) % len(self.queue)
        return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long))


def simsiam_loss(net, x1, x2):
    """Chen & He 2021; the encoder sees the views one after the other."""
    similarity = nn.CosineSimilarity(dim=1)
    z1, z2 = (net.head(net.backbone(x)) for x in (x1, x2))
    p1, p2 = net.predictor(z1), net.predictor(z2)
    return -0.5 * (similarity(p1, z2.detach()).mean() + similarity(p2, z1.detach()).mean())


def fastsiam_loss(net, xs):
    """Pototzky et al. 2022: each view against the mean of the other views' projections."""
    zs = [net.head(net.backbone(x)) for x in xs]
    total = 0
    for i, p in enumerate([net.predictor(z) for z in zs]):
        others = torch.stack([z.detach() for j, z in enumerate(zs) if j != i])
        total = total - F.cosine_similarity(p, others.mean(0), dim=1).mean()
    return total / len(xs)


def coding_rate(z, distortion):
    """Half the log-determinant of I + d / (m eps^2) times the sum of the rows' outer products."""
    count, features = z.shape
    outer = torch.einsum("bi,bj->ij", z, z)
    return torch.logdet(torch.eye(features) + features / (count * distortion) * outer) / 2


def emp_ssl_loss(net, crops, similarity, distortion):
    """Tong et al. 2023 of a list of batches, the first crops of all images, the second ones, ...;
    all of them go through the network together."""
    z = F.normalize(net(torch.cat(crops)), dim=1).chunk(len(crops))
    mean = sum(z) / len(z)
    agree = sum(F.cosine_similarity(one, mean, dim=1).mean() for one in z) / len(z)
    return -sum(coding_rate(one, distortion) for one in z) / len(z) - similarity * agree


def regression_loss(p, f):
    """Navaneet et al. 2021: the squared distance of two vectors of length 1, the mean over rows."""
    return (F.normalize(p, dim=1) - F.normalize(f, dim=1)).square().sum(1).mean()


def rotation_loss(net, x):
    """Gidaris et al. 2018: all four rotations of every image in one batch, four classes."""
    turned = torch.cat([torch.rot90(x, turns, (2, 3)) for turns in range(4)])
    return F.cross_entropy(net(turned), torch.arange(4).repeat_interleave(len(x)))


def distillation_loss(net, x, scores, target_temperature, student_temperature):
    """Hinton et al. 2015 with a temperature for each side; T^2 is the student's."""
    student = F.log_softmax(net(x) / student_temperature, 1)
    target = F.softmax(scores / target_temperature, 1)
    return F.kl_div(student, target, reduction="batchmean") * student_temperature**2


class FixMatch:
    """Sohn et al. 2020 with the teacher of Cai et al. 2021, which moves when the optimiser has,
    buffers too."""

    def __init__(self, student, teacher, threshold, weight, decay, temperature):
        self.student, self.teacher = student.train(), teacher.eval()
        self.threshold, self.weight, self.decay, self.temperature = (
            threshold,
            weight,
            decay,
            temperature,
        )

    def loss(self, x_asked, scores, x_weak, x_strong):
        """And the confidence of each guess."""
        with torch.no_grad():
            sure, guess = F.softmax(self.teacher(x_weak), 1).max(1)
        logits = self.student(torch.cat([x_asked, x_strong]))
        asked, pool = logits[: len(x_asked)], logits[len(x_asked) :]
        known = F.kl_div(
            F.log_softmax(asked, 1), F.softmax(scores / self.temperature, 1), reduction="batchmean"
        )
        guessed = F.cross_entropy(pool, guess, reduction="none") * (sure >= self.threshold)
        return known + self.weight * guessed.sum() / len(guessed), sure

    def move(self):
        with torch.no_grad():
            ours, theirs = self.teacher.state_dict(), self.student.state_dict()
            for name, value in ours.items():
                value.mul_(self.decay).add_(theirs[name], alpha=1 - self.decay)


class Judged(FixMatch):
    """The same with the rules of AdaMatch, FreeMatch and SoftMatch; averages that start from equal
    shares."""

    def __init__(self, *args, rule, align, guess_temperature, guess_decay, classes):
        super().__init__(*args)
        self.rule, self.align = rule, align
        self.guess_temperature, self.keep = guess_temperature, guess_decay
        self.p_model = torch.full((classes,), 1 / classes)
        self.p_asked = self.p_model.clone()
        self.mean, self.var = torch.tensor(1 / classes), torch.tensor(1.0)

    def average(self, name, value):
        setattr(self, name, self.keep * getattr(self, name) + (1 - self.keep) * value)
        return getattr(self, name)

    def loss(self, x_asked, scores, x_weak, x_strong):
        """And how much each guess counts."""
        with torch.no_grad():
            raw = F.softmax(self.teacher(x_weak), 1)
        logits = self.student(torch.cat([x_asked, x_strong]))
        asked, pool = logits[: len(x_asked)], logits[len(x_asked) :]
        with torch.no_grad():
            of_asked = F.softmax(asked, 1)
            p_model = self.average("p_model", raw.mean(0))
            wanted = self.average("p_asked", of_asked.mean(0))
            p = raw
            if self.align != "none":
                wanted = (
                    wanted if self.align == "asked" else torch.full_like(p_model, 1 / len(p_model))
                )
                p = raw * (wanted + 1e-6) / (p_model + 1e-6)
                p = p / p.sum(1, keepdim=True)
            sure, labels = p.max(1)
            mean = self.average("mean", sure.mean())
            var = self.average("var", sure.var(unbiased=True))
            if self.rule == "soft":
                count = torch.exp(-((sure - mean).clamp(max=0) ** 2) / (2 * var / 2**2))
                p, labels = raw, raw.argmax(1)
            else:
                least = {
                    "fixed": self.threshold,
                    "relative": self.threshold * of_asked.max(1).values.mean(),
                    "free": mean * (p_model / p_model.max())[labels],
                }[self.rule]
                count = (sure >= least).to(sure)
            target = F.one_hot(labels, p.shape[1]).to(p)
            if self.guess_temperature:
                target = p ** (1 / self.guess_temperature)
                target = target / target.sum(1, keepdim=True)
        known = F.kl_div(
            F.log_softmax(asked, 1), F.softmax(scores / self.temperature, 1), reduction="batchmean"
        )
        guessed = -(target * F.log_softmax(pool, 1)).sum(1) * count
        return known + self.weight * guessed.mean(), count


# Optimiser


def limited(net, rate, decay):
    """What LARC with clipping makes of the gradients of kernels: decay, and a rate of at most 0.005
    of the weights' length over the gradient's; the share of kernels that it limits."""
    shares = []
    for p in net.parameters():
        if p.grad is not None and p.ndim > 1:
            most = 0.005 * p.detach().norm() / (p.grad.norm() + decay * p.detach().norm() + 1e-8)
            shares.append(min(float(most) / rate, 1))
            p.grad = (p.grad + decay * p.detach()) * shares[-1]
    return np.mean(np.array(shares) < 1)


def cosine_by_epoch(rate, epochs, steps):
    """The reference codes' rate: half a cosine, updated once for each epoch."""
    return lambda step: rate * 0.5 * (1 + math.cos(math.pi * (step * epochs // steps) / epochs))


def optimiser(net, rates, **keywords):
    """torch's SGD with a schedule, step -> rate, for each part of `net`; frozen parameters are left
    out."""
    groups = [
        {
            "params": [p for p in getattr(net, part).parameters() if p.requires_grad],
            "schedule": schedule,
        }
        for part, schedule in rates.items()
    ]
    return torch.optim.SGD(groups, lr=0.0, **keywords)


def update(sgd, step, loss):
    """One step of the optimiser, number `step`, from 0."""
    for group in sgd.param_groups:
        group["lr"] = group["schedule"](step)
    sgd.zero_grad()
    loss.backward()
    sgd.step()
    return float(loss.detach())

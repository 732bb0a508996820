"""The PyTorch side of step_time.py and gpu.py: the same networks and train steps, as a user of
PyTorch writes them.

Torch's own layers and optimiser; batch norm in the same groups, the queue, the momentum encoder and
the optimiser are all part of a step. A view is what it is on qmx's side: the batch turned by a
random number of images, normalised.
"""

import torch
import torch.nn.functional as F
from torch import nn

MEAN, STD = 127.5, 63.75  # of a pixel: 0.5 and 0.25 of 255


class SplitBatchNorm(nn.BatchNorm2d):
    """Batch norm of `groups` equal groups of the batch: SplitBatchNorm of MoCo's CIFAR notebook, or
    group by group."""

    def __init__(self, channels, groups):
        super().__init__(channels)
        self.groups = groups

    def forward(self, x):
        if not self.training or self.groups == 1:
            return super().forward(x)
        # There a view with G * C channels would be a copy.
        if x.is_contiguous(memory_format=torch.channels_last):
            parts = [
                F.batch_norm(part, None, None, self.weight, self.bias, True)
                for part in x.chunk(self.groups)
            ]
            return torch.cat(parts)
        n, c, h, w = x.shape
        many = [
            p.repeat(self.groups)
            for p in (self.running_mean, self.running_var, self.weight, self.bias)
        ]
        y = F.batch_norm(
            x.view(-1, c * self.groups, h, w), *many, True, self.momentum, self.eps
        ).view(n, c, h, w)
        self.running_mean.copy_(many[0].view(self.groups, c).mean(0))
        self.running_var.copy_(many[1].view(self.groups, c).mean(0))
        return y


class Block(nn.Module):
    """torchvision's BasicBlock, or its Bottleneck; `norm` is the identity where it is folded in."""

    def __init__(self, arch, entering, planes, stride, norm, bias):
        super().__init__()
        if arch.bottleneck:
            inner, out = int(planes * arch.width_per_group / 64) * arch.groups, 4 * planes
            sizes = [
                (entering, inner, 1, 1, 1),
                (inner, inner, 3, stride, arch.groups),
                (inner, out, 1, 1, 1),
            ]
        else:
            out = planes
            sizes = [(entering, out, 3, stride, 1), (out, out, 3, 1, 1)]
        layers = []
        for a, b, kernel, step, groups in sizes:
            layers += [
                nn.Conv2d(a, b, kernel, step, kernel // 2, groups=groups, bias=bias),
                norm(b),
                nn.ReLU(True),
            ]
        self.branch, self.shortcut = nn.Sequential(*layers[:-1]), nn.Identity()
        if stride != 1 or entering != out:
            self.shortcut = nn.Sequential(nn.Conv2d(entering, out, 1, stride, bias=bias), norm(out))

    def forward(self, x):
        return F.relu_(self.branch(x) + self.shortcut(x))


def backbone(arch, channels=3, groups=1, folded=False):
    """(The network up to the pooled features, their number) of an `Arch` of qmx."""
    norm = (lambda c: nn.Identity()) if folded else (lambda c: SplitBatchNorm(c, groups))
    large, width = arch.stem == "large", arch.width
    layers = [
        nn.Conv2d(
            channels, width, 7 if large else 3, 2 if large else 1, 3 if large else 1, bias=folded
        ),
        norm(width),
        nn.ReLU(True),
    ] + [nn.MaxPool2d(3, 2, 1)] * (arch.stem != "small")
    for stage, count in enumerate(arch.blocks):
        for index in range(count):
            planes = arch.width * 2**stage
            layers.append(Block(arch, width, planes, 2 if stage and not index else 1, norm, folded))
            width = planes * 4 if arch.bottleneck else planes
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), width


def projector(width, out=2048):
    """SimSiam's, three layers."""
    hidden = [
        layer
        for _ in range(2)
        for layer in (nn.Linear(width, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(True))
    ]
    return nn.Sequential(*hidden, nn.Linear(width, out), nn.BatchNorm1d(out, affine=False))


def steps(
    arch,
    images,
    scores,
    *,
    queue,
    device,
    channels_last,
    groups,
    compiled=False,
    precision="float32",
):
    """name -> a function without arguments that does one train step; or, with `infer`, one pass of
    the target.

    Args:
      arch: an `Arch` of qmx.
      images, scores: arrays, uint8[B, H, W, C] and f32[B, N].
      queue, groups: MoCo's K, and the groups of its batch norm.
      precision: float32, tf32, or bfloat16 by autocast; the first two are settings of the whole
        process.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision != "float32"
    layout = torch.channels_last if channels_last else torch.contiguous_format
    images = (
        torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(memory_format=layout).to(device)
    )
    scores = torch.from_numpy(scores).to(device)
    size, channels = len(images), images.shape[1]
    half = torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16")

    def put(net):
        net = net.to(device, memory_format=layout)
        return torch.compile(net) if compiled else net

    def view():
        return (torch.roll(images, int(torch.randint(size, ())), 0).float() - MEAN) / STD

    def step(parts, loss):
        sgd = torch.optim.SGD(
            [p for part in parts for p in part.parameters()], 0.01, 0.9, weight_decay=1e-4
        )

        def one():
            sgd.zero_grad()
            with half:
                value = loss()
            value.backward()
            sgd.step()

        return one

    def distill():
        net, width = backbone(arch, channels)
        net, head = put(net), put(nn.Linear(width, scores.shape[1]))
        return step(
            (net, head),
            lambda: F.kl_div(
                F.log_softmax(head(net(view())).float(), 1),
                F.softmax(scores / 1.5, 1),
                reduction="batchmean",
            ),
        )

    def rotation():
        net, width = backbone(arch, channels)
        net, head = put(net), put(nn.Linear(width, 4))
        turns = torch.arange(4, device=device).repeat_interleave(size)

        def loss():
            x = view()
            turned = torch.cat([torch.rot90(x, k, (2, 3)) for k in range(4)]).contiguous(
                memory_format=layout
            )
            return F.cross_entropy(head(net(turned)).float(), turns)

        return step((net, head), loss)

    def simsiam():
        net, width = backbone(arch, channels)
        net = put(nn.Sequential(net, projector(width)))
        predictor = put(
            nn.Sequential(
                nn.Linear(2048, 512, bias=False),
                nn.BatchNorm1d(512),
                nn.ReLU(True),
                nn.Linear(512, 2048),
            )
        )

        def loss():
            z1, z2 = net(view()), net(view())
            p1, p2 = predictor(z1), predictor(z2)
            return (
                -(
                    F.cosine_similarity(p1.float(), z2.float().detach()).mean()
                    + F.cosine_similarity(p2.float(), z1.float().detach()).mean()
                )
                / 2
            )

        return step((net, predictor), loss)

    def moco():
        nets = []
        for _ in range(2):
            net, width = backbone(arch, channels, groups)
            nets.append(
                put(
                    nn.Sequential(
                        net, nn.Linear(width, width), nn.ReLU(True), nn.Linear(width, 128)
                    )
                )
            )
        query, key = nets
        ours, theirs = list(query.parameters()), list(key.parameters())
        rows, place = F.normalize(torch.randn(queue, 128, device=device)), 0

        def loss():
            nonlocal place
            q = F.normalize(query(view()).float())
            with torch.no_grad():
                torch._foreach_mul_(theirs, 0.999)
                torch._foreach_add_(theirs, ours, alpha=0.001)
                shuffle = torch.randperm(size, device=device)
                k = F.normalize(key(view()[shuffle].contiguous(memory_format=layout)).float())[
                    torch.argsort(shuffle)
                ]
            logits = torch.cat([(q * k).sum(1, keepdim=True), q @ rows.T.clone()], 1) / 0.2
            rows[place : place + size] = k
            place = (place + size) % queue
            return F.cross_entropy(logits, torch.zeros(size, dtype=torch.long, device=device))

        return step((query,), loss)

    def infer():
        net, width = backbone(arch, channels, folded=True)
        net = put(nn.Sequential(net, nn.Linear(width, scores.shape[1])).eval())

        def one():
            with torch.inference_mode(), half:
                return net((images.float() - MEAN) / STD)

        return one

    return {
        "distill": distill,
        "moco": moco,
        "simsiam": simsiam,
        "rotation": rotation,
        "infer": infer,
    }

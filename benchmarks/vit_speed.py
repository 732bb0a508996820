"""Time of a vision transformer's forward pass and train step, beside PyTorch eager.

    python benchmarks/vit_speed.py                       # ViT-S/16, 8 images of 224 pixels, float32
    python benchmarks/vit_speed.py --check               # also that both give the same features

Prints a table and, as the last line, JSON. A step is distillation from 1,000 scores with AdamW and
weight decay, on images that are already there; PyTorch's is written as timm writes it, with its
fused attention, and layers and optimiser of torch. The sides take turns, block by block, so that a
machine whose speed drifts drifts for both; the ratio is of medians (PyTorch's time over qmx's:
above 1, qmx is faster), and of the quickest blocks, which other work on the machine disturbed
least. Compilation is timed apart.
"""

import argparse
import json
import os
import statistics
import time

from jax_steps import in_turns

from qmx.main import set_xla_flags


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", default="vit_s16", help="a ViT of timm's form")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224, help="side of the images, in pixels")
    parser.add_argument("--blocks", type=int, default=10, help="times that each side is measured")
    parser.add_argument("--check", action="store_true", help="compare the features too")
    return parser.parse_args()


def theirs(arch, size):
    """The network in PyTorch, under timm's names."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = (nn.LayerNorm(arch.dim, arch.of.eps) for _ in range(2))
            self.attn = nn.ModuleDict(
                {"qkv": nn.Linear(arch.dim, 3 * arch.dim), "proj": nn.Linear(arch.dim, arch.dim)}
            )
            self.mlp = nn.ModuleDict(
                {"fc1": nn.Linear(arch.dim, arch.hidden), "fc2": nn.Linear(arch.hidden, arch.dim)}
            )

        def forward(self, x):
            qkv = self.attn["qkv"](self.norm1(x)).unflatten(2, (3, arch.heads, -1))
            y = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4).unbind(0))
            x = x + self.attn["proj"](y.transpose(1, 2).flatten(2))
            return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))

    class Transformer(nn.Module):
        def __init__(self):
            super().__init__()
            tokens = 1 + (size // arch.patch) ** 2
            self.cls_token = nn.Parameter(torch.zeros(1, 1, arch.dim))
            self.pos_embed = nn.Parameter(torch.zeros(1, tokens, arch.dim))
            proj = nn.Conv2d(3, arch.dim, arch.patch, stride=arch.patch)
            self.patch_embed = nn.ModuleDict({"proj": proj})
            self.blocks = nn.Sequential(*(Block() for _ in range(arch.depth)))
            self.norm = nn.LayerNorm(arch.dim, arch.of.eps)

        def forward(self, x):
            x = self.patch_embed["proj"](x).flatten(2).transpose(1, 2)
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
            return self.norm(self.blocks(x))[:, 0]

    return Transformer()


def main() -> None:
    args = arguments()
    set_xla_flags()
    import jax
    import numpy as np
    import torch
    import torch.nn.functional as F

    import qmx
    from qmx import distill, models, optim
    from qmx.models.to_torch import to_torch
    from qmx.trainers import quickly

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    rng, arch = np.random.default_rng(0), models.VITS[args.arch]
    x = rng.normal(size=(args.batch, args.size, args.size, 3)).astype(np.float32)
    scores = rng.normal(size=(args.batch, 1000)).astype(np.float32)
    rate, decay = 1e-4, 0.05

    net = models.backbone(args.arch)
    batch = {"image": jax.numpy.asarray(x), "scores": jax.numpy.asarray(scores)}
    method = distill.make(net, models.classifier(1000), lambda rng, batch: batch["image"])
    tx = optim.adamw(lambda step: rate, weight_decay=decay, weight_decay_on="kernels")
    key = jax.random.key(0)
    ts = jax.jit(lambda key: qmx.init_state(method, tx, key, batch))(key)
    params = jax.tree.map(np.array, ts.params["backbone"])
    began = time.perf_counter()
    forward = jax.jit(lambda p, x: net.apply(p, {}, x, False)[0]).lower(params, x).compile()
    compiled_forward = time.perf_counter() - began
    began = time.perf_counter()
    step = qmx.make_step(method, tx, quickly()).lower(ts, batch, key).compile()
    compiled_step = time.perf_counter() - began
    kept = jax.tree.map(jax.numpy.asarray, params)

    backbone, head = theirs(arch, args.size), torch.nn.Linear(arch.dim, 1000)
    backbone.load_state_dict({n: torch.from_numpy(v) for n, v in to_torch(params, {}).items()})
    images = torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))
    wanted = torch.softmax(torch.from_numpy(scores) / 1.5, 1)
    named = [*backbone.named_parameters(), *head.named_parameters()]
    tokens = ("cls_token", "pos_embed")
    still = [p for name, p in named if p.ndim == 1 or name in tokens]
    rest = [p for name, p in named if p.ndim > 1 and name not in tokens]
    adamw = torch.optim.AdamW(
        [{"params": rest}, {"params": still, "weight_decay": 0.0}], lr=rate, weight_decay=decay
    )

    def torch_forward():
        with torch.inference_mode():
            return backbone(images)

    def torch_step():
        loss = F.kl_div(F.log_softmax(head(backbone(images)), 1), wanted, reduction="batchmean")
        adamw.zero_grad()
        loss.backward()
        adamw.step()

    def our_step():
        nonlocal ts
        ts, metrics = step(ts, batch, key)
        return metrics

    result = {"arch": args.arch, "batch": args.batch, "size": args.size}
    if args.check:
        ours, other = np.asarray(forward(kept, batch["image"])), torch_forward().numpy()
        result["difference"] = float(np.abs(ours - other).max() / other.std(0).mean())
        print(f"largest difference, of the features' spread: {result['difference']:.1e}")
    compilation = {"forward": compiled_forward, "step": compiled_step}
    sides = {
        "forward": {"qmx": lambda: forward(kept, batch["image"]), "torch": torch_forward},
        "step": {"qmx": our_step, "torch": torch_step},
    }
    print(f"{'':10}{'qmx ms':>10}{'torch ms':>10}{'ratio':>8}{'quickest':>10}{'compiled s':>12}")
    for part, runs in sides.items():
        for run in runs.values():
            jax.block_until_ready(run())
        times = in_turns(runs, args.blocks, 1, lambda name, last: jax.block_until_ready(last))
        ours, other = (1000 * statistics.median(times[side]) for side in ("qmx", "torch"))
        quickest = min(times["torch"]) / min(times["qmx"])
        result[part] = {
            "ms": ours,
            "torch_ms": other,
            "ratio": other / ours,
            "ratio_of_quickest": quickest,
            "compile_seconds": compilation[part],
        }
        print(
            f"{part:10}{ours:10.1f}{other:10.1f}{other / ours:8.2f}{quickest:10.2f}"
            f"{compilation[part]:12.1f}"
        )
    print(json.dumps(result))


if __name__ == "__main__":
    main()

"""The parts `input`, `cifar` and `story` of gpu.py, which need images and other packages."""

import json
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from gpu_call import Call, die_with_parent, one_block, save, table

ROOT = Path(__file__).parent.parent
PACKAGES = ("grain", "ml_collections", "PIL", "safetensors", "sklearn.cluster", "matplotlib.pyplot")
EVALUATED = (1, 10, 20, 50, 100, 150, 200)  # epochs of MoCo's curve
# Few epochs, so that all of it is minutes.
STORY = (
    "--config=configs/cifar10.py",
    "--config.inits=('none','moco')",
    "--config.selects=('random','typiclust')",
    "--config.student.dtype=bfloat16",
    "--config.fractions=()",
    "--config.queries=(40,250,500,5000)",
    "--config.target.epochs=20",
    "--config.target.batch_size=256",
    "--config.target.learning_rate=0.2",
    "--config.target.warmup_epochs=2",
    "--config.target.nesterov=True",
    "--config.target.precision=bfloat16",
    "--config.pretrain.moco.epochs=20",
    "--config.recipes.scratch.epochs=30",
    "--config.recipes.scratch.min_steps=600",
    "--config.recipes.tune.epochs=30",
    "--config.recipes.tune.min_steps=600",
)
TINY_STORY = (
    "--config=configs/cifar10.py:tiny",
    "--config.inits=('moco',)",
    "--config.selects=('typiclust',)",
    "--config.fractions=()",
    "--config.queries=(32,)",
)


def images(call: Call) -> tuple[str, str]:
    """The npz files of pool and evaluation; in the tiny form they are made if none are given."""
    if call.pool and call.evaluation:
        return call.pool, call.evaluation
    rng, paths = np.random.default_rng(0), []
    for name, count in (("pool", 128), ("evaluation", 32)):
        paths.append(str(call.work / f"{name}.npz"))
        np.savez(
            paths[-1],
            image=rng.integers(0, 256, (count, 32, 32, 3), np.uint8),
            label=np.arange(count) % 10,
        )
    return paths[0], paths[1]


def photos(call: Call) -> str:
    """Real JPEG files through the cache, against the step on images that are there."""
    from input_pipeline import measure

    sizes: dict[str, Any] = {
        "photos": 768,
        "repeats": 3,
        "batch": 256,
        "size": 224,
        "arch": "resnet50",
        "dtype": "bfloat16",
    }
    if call.tiny:
        sizes = {
            "photos": 12,
            "repeats": 1,
            "batch": 4,
            "size": 8,
            "arch": one_block(),
            "dtype": "float32",
        }
    found = measure(**sizes, step=True)
    rates = found["images_per_second"]
    rows = [(name, f"{rate:,.0f}", f"{rate / rates['step']:.2f}") for name, rate in rates.items()]
    slowest = min(("decode", "read_cache", "to_device", "views"), key=rates.get)
    text = "\n\n".join(
        [
            table(("way", "images/s, median", "of the step"), rows),
            (
                "The shortfall of a training from the cache against the step alone is"
                f" {100 * (1 - found['training_over_step']):.1f} %. Of decoding, reading, copying"
                f" and views, each alone, {slowest} is the slowest. {found['cores']} cores."
            ),
        ]
    )
    save(call, "input", {"sizes": sizes, **found}, text)
    return ""


def cifar(call: Call) -> str:
    """MoCo's curve on CIFAR-10 by the authors' protocol, as far as the time goes."""
    from moco_cifar10 import EPOCHS, curve, within

    from qmx.data.arrays import read_npz

    pool, evaluation = map(read_npz, images(call))
    sizes: dict[str, Any] = {"dtype": "bfloat16", "evaluate_at": EVALUATED}
    if call.tiny:
        sizes |= {"arch": one_block(), "batch": 32, "epochs": 2, "evaluate_at": (1, 2)}
    rows: list[dict] = []
    for row in within(curve(pool, evaluation, **sizes), call.until):
        rows.append(row)
        save(
            call,
            "cifar",
            {"sizes": {**sizes, "images": len(pool[0])}, "rows": rows},
            curve_text(rows, sizes["evaluate_at"]),
        )
    wanted = sizes.get("epochs", EPOCHS)
    return f"{len(rows)} of {wanted} epochs in the time" if len(rows) < wanted else ""


def curve_text(rows: list[dict], evaluated: tuple[int, ...]) -> str:
    """The curve so far; epochs that were not reached are named."""
    reached = {row["epoch"]: row for row in rows}
    unknown = "not measured"
    lines = []
    for epoch in sorted({*evaluated, *range(10, len(rows) + 1, 10), len(rows)}):
        row = reached.get(epoch, {})
        keys = ("loss", "reference_loss", "knn_top1", "reference_knn_top1")
        cells = [row.get(key) for key in keys]
        lines.append(
            [
                str(epoch),
                *(unknown if cell is None else f"{cell:.2f}" for cell in cells),
                f"{row['seconds']:.2f}" if row else unknown,
            ]
        )
    later = [row["seconds"] for row in rows[1:]]
    middle = f"{statistics.median(later):.2f} s, median of {len(later)}" if later else unknown
    whole = sum(row["seconds"] + row.get("evaluation_seconds", 0) for row in rows)
    return "\n\n".join(
        [
            table(("epoch", "loss", "notebook's", "neighbours, %", "notebook's", "seconds"), lines),
            (
                f"An epoch after the first: {middle}. {len(rows)} epochs with their evaluations: "
                f"{whole:.1f} s."
            ),
        ]
    )


def story(call: Call) -> str:
    """Target, MoCo, selection, students and report on CIFAR-10, by the command as users call it."""
    for name in PACKAGES:  # what one of them lacks shows now, and not minutes later
        import_module(name)
    pool, evaluation = images(call)
    workdir = call.work / ("tiny_story" if call.tiny else "story")
    command = [
        sys.executable,
        "-m",
        "qmx.main",
        *(TINY_STORY if call.tiny else STORY),
        f"--workdir={workdir}",
        f"--config.data.path={pool}",
        f"--config.data.eval_path={evaluation}",
    ]
    began = time.monotonic()
    lines: list[tuple[float, str]] = []
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=die_with_parent,
    )

    def listen() -> None:
        for line in process.stderr:
            lines.append((time.monotonic() - began, line.strip()))
            print(f"story: {line.strip()}", file=sys.stderr, flush=True)
            save(call, "story", *story_files(command, lines, ""))

    out: list[str] = []
    threads = [
        threading.Thread(target=listen, daemon=True),
        threading.Thread(target=lambda: out.append(process.stdout.read()), daemon=True),
    ]
    for thread in threads:
        thread.start()
    stopped = ""
    try:
        process.wait(max(1, call.until - 12 - time.monotonic()))  # it saves before it goes
    except subprocess.TimeoutExpired:
        stopped = f"stopped after {time.monotonic() - began:.0f} s"
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
    for thread in threads:
        thread.join(2)
    save(call, "story", *story_files(command, lines, "".join(out), workdir, stopped))
    if process.returncode and not stopped:
        raise RuntimeError(f"status {process.returncode}: {lines[-1][1] if lines else ''}")
    return stopped


def story_files(
    command: list[str],
    lines: list[tuple[float, str]],
    out: str,
    workdir: Path | None = None,
    stopped: str = "",
) -> tuple[dict[str, Any], str]:
    """The document and the text of the story so far."""
    stages: list[dict[str, Any]] = []
    for at, line in lines:
        if match := re.match(r"(.+): (\d+) (\w+) in ([\d.]+) s", line):
            seconds, before = float(match[4]), stages[-1]["at"] if stages else 0.0
            stages.append(
                {
                    "stage": match[1],
                    "count": int(match[2]),
                    "unit": match[3],
                    "seconds": seconds,
                    "before": max(0.0, at - seconds - before),
                    "at": at,
                }
            )
    document = {"command": command[2:], "stages": stages, "stopped": stopped, "lines": lines}
    columns = ("stage", "count", "seconds", "before it, s", "ended at, s")
    text = [
        table(
            columns,
            [
                (
                    each["stage"],
                    f"{each['count']:,} {each['unit']}",
                    *(f"{each[key]:.1f}" for key in ("seconds", "before", "at")),
                )
                for each in stages
            ],
        ),
        "Before it: starting, selecting, saving, and what else has no line of its own.",
    ]
    results = workdir / "results.json" if workdir else None
    if results and results.exists():
        found = json.loads(results.read_text())
        document |= {"target": found["target"], "rows": found["rows"], "seconds": lines[-1][0]}
        text.append(
            table(
                ("start", "chosen by", "queries", "top-1", "fidelity", "seconds"),
                [
                    (
                        row["init"],
                        row["select"],
                        str(row["queries"]["train"]),
                        f"{row['top1']:.1f}",
                        f"{row['fidelity_top1']:.1f}",
                        f"{row['seconds']:.1f}",
                    )
                    for row in found["rows"]
                ],
            )
        )
    text += [f"**{stopped}**"] * bool(stopped) + [f"```\n{out.strip()}\n```"] * bool(out.strip())
    return document, "\n\n".join(text)

"""benchmarks/gpu.py in its tiny form, on a CPU: what it leaves, whatever becomes of it."""

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from conftest import QUICKLY, ROOT

BENCHMARKS = ROOT / "benchmarks"
# What a box with jax, flax, optax, orbax, numpy and torch has not.
ABSENT = (
    "grain",
    "ml_collections",
    "tensorflow_datasets",
    "array_record",
    "PIL",
    "sklearn",
    "scipy",
    "matplotlib",
    "safetensors",
    "orbax",
    "tensorstore",
    "pyarrow",
)
BLOCK = f"""
import sys
from importlib.machinery import PathFinder

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        absent = name.partition(".")[0] in {ABSENT!r}
        return None if absent else PathFinder.find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Without
"""


@pytest.fixture
def alone():
    """The variables of a process that finds no flags and no caches of the tests."""
    return {
        name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))
    }


@pytest.fixture
def hurried(alone):
    """The same, compiled quickly rather than well."""
    return {**alone, "XLA_FLAGS": QUICKLY}


def start(out, environment, *words):
    command = [sys.executable, "benchmarks/gpu.py", "--tiny", f"--out={out}", *words]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    """(status, parts of the last call, standard out), which ends with their table."""
    out, err = process.communicate(timeout=400)
    folder = next(word for word in process.args if word.startswith("--out=")).removeprefix("--out=")
    assert "| part " in out, out + err
    return process.returncode, summary(folder)[-1]["parts"], out


def summary(folder):
    with open(f"{folder}/summary.json") as file:
        return json.load(file)


def table_of(out, part):
    """A part's JSON; its table is there too, and says what form it is."""
    assert "figures mean nothing" in (out / f"{part}.md").read_text()
    assert "| " in (out / f"{part}.md").read_text()
    return json.loads((out / f"{part}.json").read_text())


@pytest.mark.slow
def test_bare_box(hurried, tmp_path):
    """Without the packages that some machines lack: the first three parts whole, the others skipped
    by name."""
    (tmp_path / "sitecustomize.py").write_text(BLOCK)
    began, out = time.monotonic(), tmp_path / "out"
    process = start(
        out, {**hurried, "PYTHONPATH": str(tmp_path)}, "--minutes=3", "--peers", "eager"
    )
    status, parts, _ = finish(process)
    assert status == 0 and time.monotonic() - began < 180 + 20
    assert [said["state"] for said in parts.values()] == ["done"] * 3 + ["skipped"] * 3
    assert parts["input"]["why"].startswith(
        "grain, array_record, PIL, ml_collections not installed"
    )

    machine = table_of(out, "machine")
    assert machine["machine"]["card"] == "cpu" and min(machine["rates"].values()) > 0
    assert {*machine["rates"]} == {"bfloat16", "tf32", "float32", "copy"}
    rows = table_of(out, "steps")["rows"]
    assert [name.split(",")[0] for name in rows] == ["distill", "moco", "infer", "infer"]
    for row in rows.values():
        assert row["ms"] > 0 and row["compile_seconds"] > 0 and row["eager"]["ratio"] > 0
        assert 0 < row["share_of_roofline"] and row["memory_bytes"] > 0
    assert "torch.compile" in (out / "steps.md").read_text()  # the column is there, not measured
    traces = table_of(out, "trace")["traces"]
    assert [name.split(",")[0] for name in traces] == ["distill", "moco"]
    for trace in traces.values():
        assert sum(each["share"] for each in trace["classes"].values()) == pytest.approx(1)
        assert {"convolutions", "elementwise", "optimiser and gradient norm"} <= {*trace["classes"]}
        assert 0 <= trace["idle"] < 1 and 0 < len(trace["longest"]) <= 15
    assert list((out / "compiled").glob("*-cache")) and not list(out.rglob("*.part"))

    # A second call finds every row; PyTorch, whose turn it is, crashes, and is left out.
    (tmp_path / "torch.py").write_text("import os\nos.kill(os.getpid(), 11)\n")
    process = start(
        out, {**hurried, "PYTHONPATH": str(tmp_path)}, "--minutes=3", "--parts", "steps"
    )
    status, parts, said = finish(process)
    assert "steps: crashed with status -11; once more, without PyTorch" in said
    assert status == 0 and parts["steps"]["state"] == "done" and len(summary(out)) == 2
    assert table_of(out, "steps")["rows"] == rows


@pytest.mark.slow
def test_images(benchmarks, tmp_path):
    """The parts that need images, in the tiny form of their own making: as in their processes, and
    compiled with tests/test_benchmarks.py."""
    from gpu import in_order
    from gpu_summary import keep

    wanted = ["input", "cifar"]
    parts = {part: {"state": "waiting"} for part in wanted}
    keep(tmp_path, [{"began": "now", "minutes": 3, "wanted": wanted, "parts": parts}])
    images = {"pool": "", "evaluation": "", "peers": (), "until": time.monotonic() + 180}
    in_order(SimpleNamespace(out=tmp_path, parts=wanted, tiny=True, **images))
    parts = summary(tmp_path)[-1]["parts"]
    assert [said["state"] for said in parts.values()] == ["done", "done"], parts
    rates = table_of(tmp_path, "input")["images_per_second"]
    assert {"decode", "to_device", "views", "step", "training"} <= {*rates}
    assert "shortfall" in (tmp_path / "input.md").read_text()
    rows = table_of(tmp_path, "cifar")["rows"]
    assert [row["epoch"] for row in rows] == [1, 2] and all("knn_top1" in row for row in rows)


@pytest.mark.slow
def test_killed(hurried, tmp_path):
    """Killed amid the story: what was done is whole, the story is told as far as it went, nothing
    runs on."""
    process = start(tmp_path, hurried, "--minutes=3", "--parts", "machine", "story")
    told = tmp_path / "story.json"
    while not (told.exists() and json.loads(told.read_text())["stages"]):
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=20)  # all that held its pipes are gone
    parts = summary(tmp_path)[-1]["parts"]
    assert parts["machine"]["state"] == "done" and parts["story"]["state"] == "running"
    assert table_of(tmp_path, "machine")["rates"]["copy"] > 0
    stages = table_of(tmp_path, "story")["stages"]
    assert stages[0]["stage"] == "target" and stages[0]["seconds"] <= stages[0]["at"]


@pytest.mark.slow
def test_told_to_stop(hurried, tmp_path):
    """SIGTERM: the part says so, what did not start is skipped by name, and the summary is
    written."""
    process = start(tmp_path, hurried, "--minutes=3", "--parts", "cifar", "story")
    while not (tmp_path / "summary.json").exists() or "running" not in str(summary(tmp_path)):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    status, parts, _ = finish(process)
    assert status == 128 + signal.SIGTERM
    assert parts["cifar"]["state"] == "failed" and parts["cifar"]["why"] == "stopped: SIGTERM"
    assert parts["story"] == {"state": "skipped", "why": "SIGTERM"}


@pytest.mark.slow
def test_failures(hurried, tmp_path):
    """A part that fails is a line, and the next one runs; the status says that one did."""
    process = start(
        tmp_path,
        hurried,
        "--minutes=3",
        "--parts",
        "cifar",
        "story",
        f"--pool={tmp_path}/pool.npz",
        f"--evaluation={tmp_path}/other.npz",
    )
    status, parts, _ = finish(process)
    assert status == 1 and [said["state"] for said in parts.values()] == ["failed", "failed"]
    assert parts["cifar"]["why"] == f"ValueError: {tmp_path}/pool.npz: no such file"
    assert "pool.npz: no such file" in parts["story"]["why"] and "\n" not in parts["story"]["why"]


@pytest.mark.slow
def test_no_time(alone, tmp_path):
    """What does not fit is skipped by name."""
    status, parts, _ = finish(start(tmp_path, alone, "--minutes=0"))
    assert status == 0 and {said["state"] for said in parts.values()} == {"skipped"}
    assert parts["trace"]["why"] == "0 s are left and it takes 15 at least"
    assert "| trace   | skipped |" in (tmp_path / "summary.md").read_text()


@pytest.fixture
def benchmarks(monkeypatch):
    """The benchmarks' modules can be imported."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_allotted(benchmarks):
    """Later parts keep what they need if all can, else the next one, else none; no part gets more
    than its most."""
    from gpu import PARTS, allot

    least = {name: part.least for name, part in PARTS.items()}
    later = ["trace", "story"]
    assert allot("steps", later, 600, False) == 600 - least["trace"] - least["story"]
    assert allot("steps", later, 200, False) == 200 - least["trace"]
    assert allot("steps", later, 100, False) == 100
    assert allot("steps", later, 80, False) is None
    assert allot("machine", [], 600, False) == PARTS["machine"].most


def test_kernels_of_a_card(benchmarks, monkeypatch):
    """Of a card's profile only the streams count; each kernel has a class, and gaps are idle."""
    import gpu_trace

    def event(name, start, duration, **stats):
        return SimpleNamespace(name=name, start_ns=start, duration_ns=duration, stats=stats.items())

    def plane(name, **lines):
        return SimpleNamespace(
            name=name,
            lines=[
                SimpleNamespace(name=line.replace("_", " "), events=events)
                for line, events in lines.items()
            ],
        )

    ours = [
        event("sm90_xmma_fprop_implicit_gemm_bf16", 0, 40, hlo_op="cudnn-conv.1"),
        event("void cudnn::ops::nchwToNhwcKernel", 40, 10, hlo_op="cudnn-conv.1"),
        event("nvjet_tst_128x256_64x4", 60, 10),
        event("input_reduce_fusion", 70, 10, hlo_op="r.1"),
        event("loop_add_fusion", 80, 10, hlo_op="a.1"),
        event("MemcpyD2D", 90, 10),
        event("loop_multiply_fusion", 85, 10, hlo_op="m.1"),
    ]
    space = SimpleNamespace(
        planes=[
            plane("/host:CPU", python=[event("launch", 0, 900, hlo_op="a.1")]),
            plane("/device:GPU:0", Stream_13=ours, XLA_Ops=[event("a.1", 0, 900, hlo_op="a.1")]),
        ]
    )
    monkeypatch.setattr(gpu_trace.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(
        gpu_trace.jax.profiler, "ProfileData", SimpleNamespace(from_file=lambda path: space)
    )
    program = gpu_trace.program(
        "  %cudnn-conv.1 = (bf16[8]{0}, u8[0]{0}) custom-call(%x),"
        ' custom_call_target="__cudnn$convForward", metadata={op_name="jit(step)/jvp(Net)/conv"}\n '
        " %r.1 = f32[8]{0} fusion(%x), kind=kInput,"
        ' metadata={op_name="jit(step)/jvp(Net)/reduce_sum"}\n  %a.1 = f32[8]{0} fusion(%x),'
        ' kind=kLoop, metadata={op_name="jit(step)/add"}\n  ROOT m.1 = f32[8]{0} fusion(%x),'
        " kind=kLoop, calls=%f\n"
    )
    found = gpu_trace.summary(list(gpu_trace.kernels(["profile"])), program)
    assert {kind: round(each["share"], 2) for kind, each in found["classes"].items()} == {
        "convolutions": 0.4,
        "transposes": 0.1,
        "matrix products": 0.1,
        "reductions": 0.1,
        "optimiser and gradient norm": 0.1,
        "copies": 0.1,
        "elementwise": 0.1,
    }
    assert found["idle"] == pytest.approx(0.1)  # 10 of 100
    with pytest.raises(ValueError, match="no kernel"):
        gpu_trace.summary([], program)


def test_row_without_room(benchmarks, tmp_path, monkeypatch):
    """What runs out of memory, on either side, is a cell; the next row is measured."""
    import gpu_steps
    from gpu_call import Call

    def no_room(*_):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes")

    call = Call(tmp_path, True, time.monotonic() + 300, "", "", ("eager",))
    monkeypatch.setattr(
        gpu_steps,
        "plan",
        lambda call: [
            (gpu_steps.Work("distill"), "eager"),
            (gpu_steps.Work("infer", gpu_steps.one_block(), 8, 4), "eager"),
        ],
    )
    monkeypatch.setattr(gpu_steps.jax_steps, "train", no_room)
    monkeypatch.setattr(gpu_steps, "opponent", no_room)
    assert gpu_steps.steps(call) == ""
    first, second = json.loads((tmp_path / "steps.json").read_text())["rows"].values()
    assert first["error"] == "out of memory" and "ms" not in first
    assert second["ms"] > 0 and second["eager"] == {"error": "out of memory"}
    assert (tmp_path / "steps.md").read_text().count("out of memory") == 2


def test_story_told(benchmarks, tmp_path):
    """Stages with their seconds, the table of the students, and the command's own words."""
    from gpu_data import story_files

    row = {
        "init": "moco",
        "select": "typiclust",
        "queries": {"train": 10},
        "top1": 80.0,
        "fidelity_top1": 81.0,
        "seconds": 9.0,
    }
    (tmp_path / "results.json").write_text(json.dumps({"target": {"top1": 95.0}, "rows": [row]}))
    lines = [
        (20.0, "target: 90 steps in 18.5 s loss 0.1"),
        (21.0, "typiclust chooses 10 of 90"),
        (30.0, "query for report: 32 images in 1.4 s"),
    ]
    document, text = story_files(["python", "-m", "qmx.main"], lines, "Target: ...", tmp_path)
    assert [(each["stage"], each["seconds"], each["at"]) for each in document["stages"]] == [
        ("target", 18.5, 20.0),
        ("query for report", 1.4, 30.0),
    ]
    assert [each["before"] for each in document["stages"]] == pytest.approx([1.5, 8.6])
    assert document["seconds"] == 30.0 and "| moco  | typiclust | 10      | 80.0  | 81.0" in text
    assert text.endswith("```\nTarget: ...\n```")

"""Against MLServer and KServe's Python SDK, each with an ONNX file that takes FP32 in NCHW: the
figures of an audit are those of the same file in this process.

Each in an environment of its own, with this one's version of onnxruntime for equal bits:
`python3 -m venv V && V/bin/pip install mlserver onnxruntime` (W and kserve the same), then
`MLSERVER=V/bin/mlserver KSERVE=W/bin/python pytest -m "" tests/targets/test_real_servers.py`
"""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import time

import numpy as np
import pytest
from conftest import ROOT, TINY, table
from documents import alone, blocks

from qmx.ledger import Refused, Unavailable
from qmx.targets import onnx_file, served
from qmx.targets.shown import Shown

PROGRAMS = {
    "mlserver": os.environ.get("MLSERVER") or shutil.which("mlserver"),
    "kserve": os.environ.get("KSERVE"),
}
# The files of docs/audit.md, which its readers copy.
PAGE = (ROOT / "docs/audit.md").read_text()
(MLSERVER,) = [block for block in blocks(PAGE, "python") if "import MLModel" in block]
(KSERVE,) = [block for block in blocks(PAGE, "python") if "import InferOutput" in block]
(FILE,) = [block for block in blocks(PAGE, "python") if "import onnx\n" in block]
SETTINGS, MODEL = map(json.loads, blocks(PAGE, "json"))
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SHOWN = Shown(scale=1.0, mean=MEAN, std=STD, dtype="float32", layout="nchw")
NAMES = {"input": "image", "output": "scores"}
FITS = {"shape": (8, 8, 3), "classes": 10}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with tinted digits, pool.npz and eval.npz, and digits.onnx, which knows a digit by
    the nearest mean."""
    folder = tmp_path_factory.mktemp("files")
    with contextlib.chdir(folder):
        alone(FILE, "docs/audit.md")
    return folder


@pytest.fixture(scope="module", params=["mlserver", "kserve"])
def server(request, files, tmp_path_factory):
    """(kind, HTTP address, gRPC address) of a running server."""
    kind, program = request.param, PROGRAMS[request.param]
    if not program:
        pytest.skip(f"needs {kind} in an environment of its own, see above")
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    folder = tmp_path_factory.mktemp(kind)
    shutil.copy(files / "digits.onnx", folder)
    numbers = dict(zip(("http_port", "grpc_port", "metrics_port"), ports, strict=True))
    assert SETTINGS.keys() >= numbers.keys()
    (folder / "settings.json").write_text(json.dumps({**SETTINGS, **numbers}))
    (folder / "model-settings.json").write_text(json.dumps(MODEL))
    (folder / "model.py").write_text(MLSERVER)
    code = KSERVE.replace("8090", str(ports[0])).replace("8091", str(ports[1]))
    (folder / "server.py").write_text(code)
    words = ["start", "."] if kind == "mlserver" else ["server.py", "digits.onnx"]
    with open(folder / "log", "w") as log:
        running = subprocess.Popen([program, *words], cwd=folder, stdout=log, stderr=log)
    http, grpc = (f"http://127.0.0.1:{port}" for port in ports[:2])
    deadline = time.monotonic() + 120
    try:
        while True:
            try:
                served.connect(http, "digits", **NAMES, **FITS, shown=SHOWN)
                break
            except (Unavailable, ValueError):
                assert time.monotonic() < deadline, (folder / "log").read_text()
                assert running.poll() is None, (folder / "log").read_text()
                time.sleep(0.2)
        yield kind, http, grpc
    finally:
        running.kill()
        running.wait()


def test_scores(server, files):
    """They come back to the bit; its refusals, and its port for gRPC, are named."""
    kind, http, grpc = server
    images = np.load(files / "eval.npz")["image"]
    want = onnx_file.connect(str(files / "digits.onnx"), **FITS, shown=SHOWN).query(images)
    query = served.connect(http, "digits", **NAMES, **FITS, shown=SHOWN).query
    assert np.array_equal(query(images), want)
    said = "takes float32, and nobody says" if kind == "mlserver" else "name it in target.input"
    with pytest.raises(ValueError, match=said):
        served.connect(http, "digits", **FITS)
    with pytest.raises(ValueError, match="404|501"):
        served.connect(http, "digits", **NAMES, **FITS, shown=SHOWN, version="7")
    with pytest.raises(ValueError, match="answers in HTTP/2"):
        served.connect(grpc, "digits", **NAMES, **FITS, shown=SHOWN)
    if kind == "kserve":  # it says nothing of its input, so the model itself refuses
        wrong = served.connect(http, "digits", **NAMES, **FITS, shown=SHOWN._replace(layout="nhwc"))
        with pytest.raises(Refused, match="invalid dimensions.*look at target.shown.layout"):
            wrong.query(images)


@pytest.mark.slow
def test_figures(server, files, command, tmp_path):
    """Of an audit, all of them, beside the file's own."""
    kind, http, _ = server
    words = [
        *(word for word in TINY if "fractions" not in word),
        "--config.fractions=(0.05,)",
        "--config.inits=('none',)",
        "--config.also=()",
        "--config.data.source=arrays",
        f"--config.data.path={files}/pool.npz",
        f"--config.data.eval_path={files}/eval.npz",
        *(f"--config.target.shown.{key}={getattr(SHOWN, key)}" for key in ("scale", "mean", "std")),
    ]
    here = ["--config.target.kind=onnx", f"--config.target.path={files}/digits.onnx"]
    there = ["--config.target.kind=served", f"--config.target.url={http}"]
    there += ["--config.target.model=digits"]
    if kind == "kserve":
        there += [f"--config.target.{side}={name}" for side, name in NAMES.items()]
        there += ["--config.target.shown.dtype=float32", "--config.target.shown.layout=nchw"]
    found = []
    for name, flags in (("here", here), ("there", there)):
        status, _, err = command(*words, *flags, f"--workdir={tmp_path}/{name}")
        assert status == 0, err
        results = table(tmp_path / name)
        target = {key: results["target"][key] for key in ("top1", "top5")}
        found.append([target, results["rows"], results["account"]])
    assert found[0] == found[1] and found[0][0]["top1"] > 70

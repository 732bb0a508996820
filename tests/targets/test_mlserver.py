"""Against MLServer, which implements the protocol independently.

In an environment of its own, as its packages would hold ours back: `python3 -m venv V && V/bin/pip
install mlserver && MLSERVER=V/bin/mlserver pytest tests/targets/test_mlserver.py`
"""

import json
import os
import shutil
import socket
import subprocess
import time

import numpy as np
import pytest

from qmx.ledger import Ledger, Unavailable
from qmx.targets import served

MLSERVER = os.environ.get("MLSERVER") or shutil.which("mlserver")
pytestmark = pytest.mark.skipif(
    not MLSERVER, reason="needs MLServer in an environment of its own, see above"
)

MODEL = """
import numpy as np
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceResponse


class Model(MLModel):
    async def predict(self, payload):
        images = NumpyCodec.decode_input(payload.inputs[0])
        assert images.dtype == np.uint8 and images.shape[1:] == (8, 8, 1)
        scores = np.sin(images.reshape(len(images), -1)[:, :10]).astype(np.float32)
        if self.name == "nan":
            scores = np.where(images[:, :1, 0, 0] == 255, np.nan, scores)
        scores = scores[:, :9] if self.name == "nine" else scores
        outputs = [NumpyCodec.encode_output("scores", scores.astype(np.float32))]
        return InferenceResponse(
            model_name=self.name, model_version=self.version, outputs=outputs
        )
"""
IMAGES = np.random.default_rng(0).integers(0, 255, (40, 8, 8, 1), np.uint8)
WANT = np.sin(IMAGES.reshape(40, -1)[:, :10].astype(np.float16)).astype(np.float32)


@pytest.fixture
def server(tmp_path):
    """(url, start, the running process in a list)"""
    (tmp_path / "model.py").write_text(MODEL)
    ports = []
    for _ in range(3):
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            ports.append(found.getsockname()[1])
    (tmp_path / "settings.json").write_text(
        json.dumps(
            {
                "host": "127.0.0.1",
                "parallel_workers": 0,
                **dict(zip(("http_port", "grpc_port", "metrics_port"), ports, strict=True)),
            }
        )
    )
    tensors = {
        "inputs": [{"name": "image", "datatype": "UINT8", "shape": [-1, 8, 8, 1]}],
        "outputs": [{"name": "scores", "datatype": "FP32", "shape": [-1, 10]}],
    }
    for name, more in (
        ("good", {"versions": ["v3"], "parameters": {"version": "v3"}}),
        ("nine", {}),
        ("nan", {}),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model-settings.json").write_text(
            json.dumps({"name": name, "implementation": "model.Model", **tensors, **more})
        )
    running, url = [], f"http://127.0.0.1:{ports[0]}"

    def start():
        running.append(
            subprocess.Popen(
                [MLSERVER, "start", "."],
                cwd=tmp_path,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": str(tmp_path)},
            )
        )
        deadline = time.monotonic() + 60
        while True:
            try:
                return connect(url)
            except (Unavailable, ValueError):
                assert time.monotonic() < deadline and running[-1].poll() is None
                time.sleep(0.2)

    start()
    yield url, start, running
    running[-1].kill()
    running[-1].wait()


def connect(url, model="good", **changes):
    return served.connect(url, model, shape=(8, 8, 1), classes=10, **changes)


def test_mlserver(server, tmp_path):
    """Its answers; its refusals; and a kill and a restart in the middle, after which nothing is
    asked twice."""
    url, start, running = server
    for model, changes, error in (
        ("god", {}, "404 .Model god not found"),
        ("good", {"version": "v4"}, "version v4 not"),
    ):
        with pytest.raises(ValueError, match=error):
            connect(url, model, **changes)
    with Ledger(tmp_path / "l", target="t") as ledger:
        found = connect(url)
        assert found.name == f"good version v3 at {url}"
        assert np.array_equal(ledger.ask(found.query, IMAGES[:16], batch_size=8), WANT[:16])
        with pytest.raises(ValueError, match=r"shape \[8, 9\], and it must be \[8, 10\]"):
            ledger.ask(connect(url, "nine").query, IMAGES[:24], batch_size=8)
        broken = IMAGES[16:24].copy()
        broken[3, 0] = 255
        with Ledger(tmp_path / "odd", target="t") as other:
            answers = other.ask(connect(url, "nan").query, broken, max_refused=0.2)
            assert np.isnan(answers[3]).all() and other.account().refused == 1
            assert np.array_equal(np.delete(answers, 3, 0), np.delete(WANT[16:24], 3, 0))
        running[-1].kill()
        running[-1].wait()
        with pytest.raises(Unavailable):
            ledger.ask(found.query, IMAGES, batch_size=8, waits=(0.0,))
        assert ledger.account().images == 16 and ledger.account().failed == 8 * 3
        start()
        assert np.array_equal(ledger.ask(found.query, IMAGES, batch_size=8), WANT)
        assert (
            ledger.account().calls == ledger.account().images == 40
            and ledger.account().unanswered == 0
        )

"""Served targets and Python functions: a real server process, whatever goes wrong with it, and
nothing paid is lost."""

import base64
import hashlib
import http.server
import json
import logging
import re
import shutil
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import urllib3
from conftest import ROOT, TINY
from oip_server import certificate, refuses, scores_of
from test_ledger_commands import command as ledger_command
from test_said import holds

from qmx.data import load
from qmx.ledger import Ledger, TooManyRefused, Unavailable
from qmx.settings import base
from qmx.stages import outside
from qmx.targets import function, served
from qmx.targets.shown import Shown

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (24, 8, 8, 1), np.uint8)
SECRET = "s3cr3t-t0ken"


@pytest.fixture(scope="module")
def serve(tmp_path_factory):
    """serve(*flags) -> the port of a server of its own, and its log."""
    running = []

    def start(*flags):
        log = tmp_path_factory.mktemp("server") / "log"
        log.touch()
        running.append(
            subprocess.Popen(
                [sys.executable, ROOT / "tests/targets/oip_server.py", f"--log={log}", *flags],
                stdout=subprocess.PIPE,
                text=True,
            )
        )
        return int(running[-1].stdout.readline()), log

    yield start
    for process in running:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture(scope="module")
def plain(serve):
    return serve()


def connect(server, model="digits", scheme="http", host="127.0.0.1", **changes):
    return served.connect(
        f"{scheme}://{host}:{server[0]}",
        model,
        **{"shape": (8, 8, 1), "classes": 10, "timeout": 5.0, **changes},
    )


def requests(server, model):
    """(time, digests of the images) of each request about a model that the server has seen."""
    lines = [line.split() for line in server[1].read_text().splitlines()]
    return [(float(moment), digests) for moment, name, *digests in lines if name == model]


@pytest.mark.parametrize("flags", [(), ("--binary",)])
def test_answers(serve, flags):
    """The pixels arrive as they are and the scores come back to the bit, as JSON and as binary
    data; UINT8 and FP32."""
    server = serve(*flags)
    for model, scale in (("digits", 0.0), ("floats", 255.0)):
        found = connect(server, model, shown=Shown(scale=scale))
        assert np.array_equal(found.query(IMAGES), scores_of(IMAGES))
        ((_, digests),) = requests(server, model)
        assert digests == [hashlib.sha256(image.tobytes()).hexdigest() for image in IMAGES]
    labels = connect(server, "numbers", access="label").query(IMAGES)
    assert (
        np.array_equal(labels, np.eye(10)[scores_of(IMAGES).argmax(1)])
        and labels.dtype == np.float32
    )
    probs = connect(server, "probs", access="probs").query(IMAGES)
    assert np.allclose(probs.sum(1), 1) and (probs.argmax(1) == labels.argmax(1)).all()


def test_the_place_that_a_redirect_names(serve):
    """It is the target.url, and the answers come from there."""
    port, _ = serve()

    class Moved(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(302)
            self.send_header("Location", f"http://127.0.0.1:{port}{self.path}")
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_POST = do_GET

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Moved) as old:
        threading.Thread(target=old.serve_forever, daemon=True).start()
        with pytest.raises(ValueError, match="make it the target.url") as caught:
            connect((old.server_port, None)).query(IMAGES)
        old.shutdown()
    place = re.search(r"to (http://\S+), which", str(caught.value))[1]
    found = served.connect(place, "digits", shape=(8, 8, 1), classes=10, timeout=5.0)
    np.testing.assert_array_equal(found.query(IMAGES), scores_of(IMAGES))


def test_what_a_model_is_shown(serve, tmp_path):
    """The scores of the model in this process, to the bit, whatever numbers and axes the served one
    takes; the ledger tells the ways apart."""
    server = serve("--binary")
    names = set()
    for model, shown in (
        ("channels_first", Shown(scale=1.0, mean=(0.5,), std=(0.25,))),
        ("sixteen", Shown(scale=1.0)),
        ("large", Shown(size=16, channels=3, interpolation="nearest")),
        ("fixed", Shown()),
    ):
        found = connect(server, model, shown=shown)
        with Ledger(tmp_path / "l", target=model, preprocessing=found.preprocessing) as ledger:
            got = ledger.ask(found.query, IMAGES[:22], batch_size=4)
        assert np.array_equal(got, scores_of(IMAGES[:22])), model
        names.add(found.preprocessing)
    assert len(names) == 4
    with pytest.raises(ValueError, match="takes 4 images in a request; set target.batch_size=4"):
        connect(server, "fixed").query(IMAGES[:5])


def test_a_function_is_shown_the_same(tmp_path):
    """In the axes and numbers that it wants."""
    (tmp_path / "own.py").write_text(
        "import numpy as np\n\ndef f(x):\n    assert x.shape[1:] == (1, 8, 8) and x.dtype == 'f4'\n"
        "    return x.reshape(len(x), -1)[:, :10]\n"
    )
    shown = Shown(layout="nchw", dtype="float32", scale=1.0)
    found = function.connect(f"{tmp_path}/own.py:f", classes=10, shape=(8, 8, 1), shown=shown)
    want = IMAGES.reshape(len(IMAGES), -1)[:, :10] * np.float32(1 / 255)
    np.testing.assert_allclose(found.query(IMAGES), want, rtol=1e-6)
    assert found.preprocessing == "nchw, float32, 0..1"


def test_what_a_digest_is_of(plain, serve):
    """The same model the next time; not another model, version or address."""
    names = [
        connect(plain),
        connect(plain),
        connect(plain, version="1"),
        connect(plain, "floats", shown=Shown(scale=255.0)),
        connect(plain, "versions", version="2"),
        connect(plain, "versions", version="1"),
        connect(serve()),
    ]
    digests = [found.sha256 for found in names]
    assert digests[0] == digests[1] == digests[2] and len(set(digests)) == 5
    assert names[0].name == f"digits version 1 at http://127.0.0.1:{plain[0]}"


@pytest.mark.parametrize(
    ("model", "changes", "error", "message"),
    [
        (
            "absent",
            {},
            ValueError,
            "answered 404 .*unknown model: 'absent'.*look at target.url, target.model",
        ),
        ("loading", {}, Unavailable, "not ready"),
        ("channels_first", {}, ValueError, "takes float32, and nobody says in what numbers; set"),
        ("sixteen", {}, ValueError, "takes float16.*target.shown.scale=1 for 0..1"),
        ("large", {}, ValueError, r"\[-1, 16, 16, 3\] and images are shown as \[-1, 8, 8, 1\]"),
        ("texts", {}, ValueError, "input image is BYTES"),
        ("two_inputs", {}, ValueError, "several inputs.*a, b in target.input"),
        ("digits", {"input": "pixels"}, ValueError, "no input 'pixels'.*image in target.input"),
        ("digits", {"output": "logits"}, ValueError, "no output 'logits'.*scores in target.output"),
        ("thousand", {}, ValueError, r"output scores has the shape \[-1, 1000\].*10 classes"),
        ("numbers", {}, ValueError, "INT64.*target.access=label"),
        ("versions", {}, ValueError, "the versions 1, 2; name one in target.version"),
        ("unsaid", {}, ValueError, "name it in target.input"),
        ("odd", {}, ValueError, "not the protocol's"),
        ("digits", {"shape": (8, 8, 3)}, ValueError, r"\[-1, 8, 8, 3\]"),
    ],
)
def test_refused_before_anything_is_paid(plain, model, changes, error, message):
    """By what the server says of the model, in one line; the model is asked nothing."""
    with pytest.raises(error, match=message) as caught:
        connect(plain, model, **changes)
    assert len(str(caught.value).splitlines()) == 1 and not requests(plain, model)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("moved", "sends elsewhere, to http://example.invalid, which is not followed"),
        ("page", 'not a JSON object but begins with "<html>'),
        ("nested", "not a JSON object"),
        ("eleven", r"shape \[8, 11\], and it must be \[8, 10\]"),
        ("half", r"shape \[4, 10\]"),
        ("short", r"has 40 numbers and says that its shape is \[8, 10\]"),
        ("words", "is BYTES"),
        ("probs", "are probabilities.*target.access=probs"),
        ("other_id", "belongs to another request"),
        ("replaced", "version 2 of the model answered, and 1 was asked"),
        ("renamed", "no output 'scores', but logits"),
    ],
)
def test_wrong_answers(plain, tmp_path, model, message):
    """Each is final, in one line; it is asked once, nothing of it is kept, and nothing before it is
    lost."""
    with Ledger(tmp_path / "l", target="t") as ledger:
        ledger.ask(connect(plain).query, IMAGES[:8])
        with pytest.raises(ValueError, match=message) as caught:
            ledger.ask(connect(plain, model).query, IMAGES, batch_size=8, waits=(0.0, 0.0))
        assert len(str(caught.value).splitlines()) == 1 and len(requests(plain, model)) == 1
        assert np.array_equal(ledger.read(IMAGES[:8]), scores_of(IMAGES[:8]))
        assert (ledger.account().calls, ledger.account().failed, ledger.account().unanswered) == (
            8,
            8,
            0,
        )


@pytest.mark.parametrize(("model", "place"), [("nan", 1), ("null", 0)])
def test_one_score_that_is_not_finite(plain, tmp_path, model, place):
    """The others of its batch are paid for once."""
    known = len(requests(plain, model))
    with Ledger(tmp_path / "l", target="t") as ledger:
        query = connect(plain, model).query
        answers = ledger.ask(query, IMAGES, batch_size=24, max_refused=0.05)
        good = np.delete(np.arange(24), place)
        assert (
            np.array_equal(answers[good], scores_of(IMAGES[good])) and ledger.account().refused == 1
        )
        ledger.ask(query, IMAGES, max_refused=0.05)
        assert len(requests(plain, model)) == known + 1


def test_images_that_are_refused(plain, tmp_path):
    """A server that refuses the content of some: they are found, and the others answered."""
    bad = refuses(IMAGES)
    assert 0 < bad.sum() < 8
    with Ledger(tmp_path / "l", target="t") as ledger:
        query = connect(plain, "picky").query
        answers = ledger.ask(query, IMAGES, batch_size=8, max_refused=0.5)
        assert np.array_equal(answers[~bad], scores_of(IMAGES[~bad]))
        assert np.isnan(answers[bad]).all() and ledger.account().refused == bad.sum()
        asked = [digests for _, digests in requests(plain, "picky")]
        sent = sum(map(len, asked))
        assert sent == ledger.account().calls + ledger.account().failed
        ledger.ask(query, IMAGES, max_refused=0.5)
        assert len(requests(plain, "picky")) == len(asked)


def test_one_that_refuses_all(plain, tmp_path):
    """It is asked about one image alone, and no more; the line has the server's words."""
    with Ledger(tmp_path / "l", target="t") as ledger:
        with pytest.raises(TooManyRefused, match="1 of 24 .*image 0: .*400 .the input is bad."):
            ledger.ask(connect(plain, "refusing").query, IMAGES, batch_size=8)
        assert [len(digests) for _, digests in requests(plain, "refusing")] == [8, 4, 2, 1]


def test_a_server_that_takes_four(plain, tmp_path):
    """Larger batches are halved until they are small enough; then all are."""
    said = []
    with Ledger(tmp_path / "l", target="t") as ledger:
        answers = ledger.ask(connect(plain, "four").query, IMAGES, batch_size=16, say=said.append)
        assert np.array_equal(answers, scores_of(IMAGES)) and not ledger.account().refused
    sizes = [len(digests) for _, digests in requests(plain, "four")]
    assert sizes == [16, 8, 4, 4, 4, 4, 4, 4]
    assert said == ["the target takes 4 images in a request, and not 8; set target.batch_size=4"]


def test_errors_of_the_model_behind_a_server(plain, tmp_path):
    """MLServer and KServe send them as a 500: one about shapes is not asked again, but about fewer
    images; the line has its words, out of a traceback if need be, and the keys to look at."""
    said = []
    with Ledger(tmp_path / "l", target="t") as ledger:
        query = connect(plain, "one").query
        answers = ledger.ask(query, IMAGES[:6], batch_size=4, say=said.append, waits=())
        assert np.array_equal(answers, scores_of(IMAGES[:6])) and not ledger.account().refused
        with pytest.raises(ValueError, match="Got: 2 Expected: 1 Please.*target.batch_size"):
            query(IMAGES[:2])
        with pytest.raises(TooManyRefused, match="data type.*look at target.shown.layout"):
            ledger.ask(connect(plain, "typed").query, 255 - IMAGES, batch_size=8, waits=())
    assert said == ["the target takes 1 images in a request, and not 2; set target.batch_size=1"]
    sizes = [len(digests) for _, digests in requests(plain, "one")]
    assert sizes == [4, 2, 1, 1, 1, 1, 1, 1, 2]
    assert [len(digests) for _, digests in requests(plain, "typed")] == [8, 4, 2, 1]
    with pytest.raises(Unavailable, match="out of memory.*smaller target.batch_size"):
        connect(plain, "memory").query(IMAGES[:2])


def test_a_server_without_versions_or_tls(plain):
    """KServe's SDK knows no versions; a port for HTTP is asked in TLS."""
    with pytest.raises(ValueError, match="501 .*not supported yet.*leave target.version out"):
        connect(plain, version="unversioned")
    with pytest.raises(ValueError, match="does not answer in TLS; target.url takes http://"):
        connect(plain, scheme="https")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("slow", "nothing came within 0.5 s; a longer target.timeout waits, and a smaller"),
        ("drips", "did not end its answer within 0.5 s; a longer target.timeout"),
        ("down", "answered 500 .a worker died."),
        ("flaky", "answered 502"),
        ("hangs_up", "without response"),
        ("cut", "888 bytes read|more expected"),
        ("cut_unsaid", "breaks off"),
    ],
)
def test_what_may_pass(plain, model, message):
    """A slow, dying, or interrupted server is told from a wrong one."""
    with pytest.raises(Unavailable, match=message) as caught:
        connect(plain, model, timeout=0.5).query(IMAGES[:8])
    assert caught.value.wait is None and len(str(caught.value).splitlines()) == 1


def test_no_server():
    """Nobody there."""
    with pytest.raises(Unavailable, match="Connection refused"):
        served.connect("http://127.0.0.1:9", "digits", shape=(8, 8, 1), classes=10)


def test_sent_again(plain, tmp_path):
    """What passes is asked again, on record as such; every image is answered."""
    with Ledger(tmp_path / "l", target="t") as ledger:
        ledger.ask(connect(plain, "flaky").query, IMAGES, batch_size=8, waits=(0.0, 0.0))
        account = ledger.account()
        assert np.array_equal(ledger.read(IMAGES), scores_of(IMAGES))
        assert account.calls == account.images == 24 and account.failed == account.retried > 0
        with pytest.raises(Unavailable, match="500"):
            ledger.ask(connect(plain, "down").query, 255 - IMAGES, batch_size=24, waits=(0.0, 0.0))
        assert (
            len(requests(plain, "down")) >= 3 and ledger.account().failed == account.failed + 3 * 24
        )


def test_retry_after(plain, tmp_path):
    """A busy server's seconds are kept to, and one that wants to be left alone for a day is."""
    with Ledger(tmp_path / "l", target="t") as ledger:
        ledger.ask(connect(plain, "busy").query, IMAGES, waits=(0.0, 0.0))
        times = [moment for moment, _ in requests(plain, "busy")]
        assert len(times) == 3 and np.diff(times).min() >= 1
        with pytest.raises(ConnectionError, match="left alone for more than 10 minutes"):
            ledger.ask(connect(plain, "closed").query, 255 - IMAGES, waits=(0.0, 0.0))
        assert len(requests(plain, "closed")) == 1


def test_rate(serve):
    """No second has more requests than it may."""
    server = serve()
    query = connect(server, rate=20.0).query
    for _ in range(8):
        query(IMAGES[:1])
    times = np.array([moment for moment, _ in requests(server, "digits")])
    assert len(times) == 8 and times[-1] - times[0] >= 7 / 20 - 0.05


def test_token(serve, monkeypatch, caplog, tmp_path):
    """It is sent, and it is in no message, log, repr or ledger, even where the server repeats
    it."""
    server = serve(f"--token={SECRET}")
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("QMX_TARGET_TOKEN", SECRET)
    found = connect(server, token_env="QMX_TARGET_TOKEN")
    with Ledger(tmp_path / "ledger.sqlite", target=found.sha256) as ledger:
        ledger.ask(found.query, IMAGES)
        kept = b"".join(path.read_bytes() for path in tmp_path.glob("ledger.sqlite*"))
        monkeypatch.setenv("QMX_TARGET_TOKEN", wrong := "other-" + SECRET[::-1])
        with pytest.raises(
            ValueError, match=r"401 \(not allowed with Bearer \*\*\*\); target.token_env"
        ) as told:
            ledger.ask(found.query, 255 - IMAGES)
    with pytest.raises(ValueError, match=r"answered 401"):
        connect(server)
    for secret in (SECRET, wrong):
        assert (
            secret not in f"{told.value!r} {found!r} {caplog.text} {vars(ledger)}"
            and secret.encode() not in kept
        )
    for value, message in (("", "no such environment variable"), ("two words", "no token has")):
        monkeypatch.setenv("QMX_TARGET_TOKEN", value)
        with pytest.raises(ValueError, match=message) as told:
            connect(server, token_env="QMX_TARGET_TOKEN")
        assert "words" not in str(told.value)


def test_headers(serve, monkeypatch):
    """What a gateway wants, from the environment: a key, a cookie, the name that it routes by; no
    message shows them."""
    server = serve("--header=X-Api-Key=k3y-0f-mine", "--header=Cookie=a=b", "--header=Host=models")
    words = ("X-Api-Key:MY_KEY", "Cookie:MY_COOKIE", "Host:MY_SITE")
    values = {"MY_KEY": "k3y-0f-mine", "MY_COOKIE": "a=b", "MY_SITE": "models"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    found = connect(server, headers_env=words)
    assert np.array_equal(found.query(IMAGES), scores_of(IMAGES))
    monkeypatch.setenv("MY_KEY", "an0ther-key")
    with pytest.raises(ValueError, match=r"answered 403 \(X-Api-Key is \*\*\*\)") as caught:
        connect(server, headers_env=words)
    assert "an0ther" not in str(caught.value)
    with pytest.raises(ValueError, match="X-Api-Key:NO_KEY: the environment variable NO_KEY"):
        connect(server, headers_env=("X-Api-Key:NO_KEY",))
    with pytest.raises(ValueError, match="takes words like X-Api-Key:MY_KEY"):
        connect(server, headers_env=("X-Api-Key:k3y-0f-mine",))
    with pytest.raises(ValueError, match="would send the token of X-Api-Key in clear text"):
        served.connect(
            "http://example.org", "m", shape=(8, 8, 1), classes=10, headers_env=words[:1]
        )


def test_proxy(plain, monkeypatch):
    """The environment's, with its user's name and password as they are; none for this machine, to
    which a token may be sent without TLS, and none that NO_PROXY names."""
    asked, logins = [], set()

    class Proxy(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def pass_on(self):
            asked.append(self.path)
            logins.add(self.headers.get("Proxy-Authorization"))
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            there = self.path.replace("models.test", "127.0.0.1")
            answer = urllib3.request(self.command, there, body=body, headers=dict(self.headers))
            self.send_response(answer.status)
            self.send_header("Content-Length", str(len(answer.data)))
            self.end_headers()
            self.wfile.write(answer.data)

        do_GET = do_POST = pass_on

    proxy = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    try:
        monkeypatch.setenv("http_proxy", f"http://me:p%40ss@127.0.0.1:{proxy.server_port}")
        monkeypatch.setenv("no_proxy", "")
        far = connect(plain, host="models.test")
        assert np.array_equal(far.query(IMAGES), scores_of(IMAGES))
        assert len(asked) == 4 and asked[-1].startswith("http://models.test:")
        assert logins == {"Basic " + base64.b64encode(b"me:p@ss").decode()}
        connect(plain)
        monkeypatch.setenv("no_proxy", "models.test")
        with pytest.raises(Unavailable, match="models.test"):
            connect(plain, host="models.test")
        assert len(asked) == 4
    finally:
        proxy.shutdown()
        proxy.server_close()


@pytest.mark.parametrize(
    ("url", "token_env", "message"),
    [
        ("http://me:s3cr3t@host", "", "user's name or password"),
        ("https://host/?key=s3cr3t", "", "after [?] or #"),
        ("host:8080", "", "must be http"),
        ("https://host:s3cr3t", "", "must be http"),
        ("http://", "", "must be http"),
        ("http://host", "QMX_TARGET_TOKEN", "in clear text; use https"),
        ("http://10.0.0.1:80", "QMX_TARGET_TOKEN", "in clear text"),
        ("https://host", "s3cr3t", "and not the token"),
    ],
)
def test_addresses(url, token_env, message):
    """What would give a secret away, or is no address; the secret is not repeated."""
    with pytest.raises(ValueError, match=message) as caught:
        served.connect(url, "digits", shape=(8, 8, 1), classes=10, token_env=token_env)
    assert "s3cr3t" not in str(caught.value)


@pytest.mark.skipif(not shutil.which("openssl"), reason="makes its certificate with openssl")
def test_tls(serve, tmp_path):
    """A certificate that nobody vouches for is refused; with its file it is trusted, for its own
    host alone."""
    cert, key = certificate(tmp_path)
    server = serve(f"--cert={cert}", f"--key={key}")
    with pytest.raises(
        ValueError, match="certificate that is not trusted.*self-signed.*target.ca_file"
    ):
        connect(server, scheme="https")
    with pytest.raises(ValueError, match="not trusted"):
        served.connect(
            f"https://localhost:{server[0]}",
            "digits",
            shape=(8, 8, 1),
            classes=10,
            ca_file=cert,
        )
    found = connect(server, scheme="https", ca_file=cert)
    assert np.array_equal(found.query(IMAGES), scores_of(IMAGES))
    with pytest.raises(ValueError, match="ca_file .*key cannot be read"):
        connect(server, scheme="https", ca_file=key)


@pytest.mark.slow
def test_kills(environment):
    """Fifty kills in the middle of served batches: nothing lost, nothing paid twice but what was in
    flight."""
    done = subprocess.run(
        [sys.executable, "benchmarks/served_kills.py", "--kills=50"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["kills"] == 50 and figures["kills_with_a_batch_in_flight"] > 25
    assert (
        figures["answers_lost"]
        == figures["answers_wrong"]
        == figures["sent_twice_beyond_the_batch_in_flight"]
        == 0
    )
    assert figures["on_the_account_as_in_flight"] == 8 * figures["kills_with_a_batch_in_flight"]
    assert 0 < figures["sent_again_after_a_kill"] <= figures["on_the_account_as_in_flight"]


OWN = """
from collections import Counter
from pathlib import Path
import numpy as np
from qmx.ledger import Unavailable

seen = Counter()

def scores(images):
    with open(Path(__file__).with_name("asked"), "a") as log:
        log.write(f"{len(images)}\\n")
    return images.reshape(len(images), -1)[:, :10].astype(np.float32)

def wrong(images):
    return images["a"]

def busy(images):
    seen["busy"] += 1
    if seen["busy"] < 2:
        raise Unavailable("not yet", 0.0)
    return scores(images)

def lists(images):
    return [[0.1] * 10 for _ in images]

def leaves(images):
    raise SystemExit(0)

number = 3
"""


def test_functions(tmp_path, monkeypatch):
    """A function in a file or a module; its mistakes name the line; it may ask to be called
    again."""
    (tmp_path / "own.py").write_text(OWN)
    file, want = f"{tmp_path}/own.py", IMAGES.reshape(24, -1)[:, :10]
    found = function.connect(f"{file}:scores", classes=10, shape=(8, 8, 1))
    assert found.name == "scores of own.py" and np.array_equal(found.query(IMAGES), want)
    monkeypatch.syspath_prepend(tmp_path)
    assert np.array_equal(
        function.connect("own:scores", classes=10, shape=(8, 8, 1)).query(IMAGES), want
    )
    assert found.sha256 == function.digest("own:scores") != function.digest("own:lists")
    with Ledger(tmp_path / "l", target=found.sha256) as ledger:
        ledger.ask(
            function.connect(f"{file}:busy", classes=10, shape=(8, 8, 1)).query,
            IMAGES,
            waits=(0.0,),
        )
        assert ledger.account().retried == 24
    for path, message in (
        (f"{file}:wrong", "own.py:wrong failed: IndexError: .*own.py, line 15"),
        (f"{file}:leaves", "own.py:leaves failed: SystemExit: 0 .own.py, line 2"),
        (f"{file}:lists", "are probabilities.*target.access=probs"),
    ):
        with pytest.raises(ValueError, match=message):
            function.connect(path, classes=10, shape=(8, 8, 1)).query(IMAGES)
    with pytest.raises(ValueError, match=r"shape \[24, 10\], and it must be \[24, 9\]"):
        function.connect(f"{file}:scores", classes=9, shape=(8, 8, 1)).query(IMAGES)
    (tmp_path / "broken.py").write_text("import nothing_like_this\n")
    (tmp_path / "leaving.py").write_text("import sys\nsys.exit(0)\n")
    for path, message in (
        (f"{file}:number", "no function 'number'"),
        (f"{tmp_path}/no.py:f", "there is no file"),
        ("no.such:f", "there is no module no.such"),
        (file, "FILE.py:function"),
        (f"{tmp_path}/leaving.py:f", "does not load: SystemExit: 0 .*leaving.py, line 2"),
        (f"{tmp_path}/broken.py:f", "does not load: ModuleNotFoundError.*broken.py, line 1"),
    ):
        with pytest.raises(ValueError, match=re.escape(message) if "*" not in message else message):
            function.connect(path, classes=10, shape=(8, 8, 1))
    (tmp_path / "own.py").write_text(OWN + "\n")
    assert function.digest(f"{file}:scores") != found.sha256, "a changed file is another target"
    weights = tmp_path / "weights.bin"
    digests = {function.digest(f"{file}:scores")}
    for content in (b"a", b"bc"):
        weights.write_bytes(content)
        digests.add(function.digest(f"{file}:scores", [str(weights)]))
    assert len(digests) == 3, "so is one of other files to watch"
    with pytest.raises(ValueError, match="target.watch no.bin: no such file"):
        function.digest(f"{file}:scores", ["no.bin"])


SHORT = [
    *(word for word in TINY if "fractions" not in word),
    "--config.fractions=(0.05,)",
    "--config.inits=('none',)",
    "--config.also=()",
]


@pytest.mark.slow
def test_the_command_with_a_server(serve, command, tmp_path):
    """From the server to the table, each image paid for once; a server that is not there costs no
    pretraining."""
    server = serve()
    words = [
        *SHORT,
        f"--workdir={tmp_path}/w",
        "--config.target.kind=served",
        "--config.target.model=flaky",
    ]
    status, _, err = command(*words, "--config.target.url=http://127.0.0.1:9")
    assert (
        status == 2
        and len(err.splitlines()) == 1
        and "Connection refused; does a server run" in err
    ), err
    assert not (tmp_path / "w").exists()
    status, out, err = command(*words, f"--config.target.url=http://127.0.0.1:{server[0]}")
    assert status == 0, err
    assert f"Target: flaky version 1 at http://127.0.0.1:{server[0]}, top-1 / top-5" in out
    assert "answered 502" in err and "asked again in 1 s" in err
    results = json.loads((tmp_path / "w/results.json").read_text())
    assert results["account"]["images"] == results["account"]["calls"] == 71 + 360
    asked = [digest for _, digests in requests(server, "flaky") for digest in digests]
    assert len(asked) == 71 + 360 + results["account"]["failed"] and len(set(asked)) == 71 + 360


@pytest.mark.slow
@pytest.mark.parametrize("model", ["echo", "echo_moved", "echo_page", "echo_down"])
def test_the_command_with_a_server_that_repeats_the_token(
    serve, command, tmp_path, monkeypatch, caplog, model
):
    """In names, headers, refusals and errors, whole and cut: no piece of it is printed, logged, or
    in any file of the workdir."""
    token = "Sk-9fQ0xZ7%2Fpq+Lm=~t"
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("QMX_TARGET_TOKEN", token)
    server = serve(f"--token={token}")
    status, out, err = command(
        *SHORT,
        f"--workdir={tmp_path}/w",
        "--config.target.kind=served",
        f"--config.target.model={model}",
        f"--config.target.url=http://127.0.0.1:{server[0]}",
        "--config.target.token_env=QMX_TARGET_TOKEN",
        "--config.target.max_refused=0.5",
        f"--config.target.retries={int(model == 'echo')}",
    )
    assert status == {"echo": 0, "echo_down": 75}.get(model, 2), err
    assert "***" in err and "Traceback" not in err
    texts = [out, err, caplog.text]
    files = [path for path in (tmp_path / "w").rglob("*") if path.is_file()]
    texts += [path.read_bytes().decode("latin-1") for path in files]
    assert (tmp_path / "w/ledger.sqlite") in files and requests(server, model)
    assert not [text for text in texts if holds(text, token)]
    if model == "echo":
        assert f"Target: {model} version *** at" in out
        summary = ledger_command("summary", tmp_path / "w/ledger.sqlite")[1]
        assert "images refused" in summary and "no: ***" in summary and not holds(summary, token)


@pytest.mark.slow
def test_the_command_with_a_function(command, tmp_path):
    """From a function that only names classes to the table; the ledger goes on where it stopped."""
    (tmp_path / "own.py").write_text(
        "import numpy as np\nfrom pathlib import Path\nhere = Path(__file__).parent\n"
        "def label(images):\n"
        "    open(here / 'asked', 'a').write(f'{len(images)}\\n')\n"
        "    if (here / 'gone').exists():\n"
        "        raise ConnectionError('the service is gone')\n"
        "    return images.reshape(len(images), -1)[:, :10].argmax(1)\n"
    )
    words = [
        *SHORT,
        f"--workdir={tmp_path}/w",
        "--config.target.kind=callable",
        "--config.target.access=label",
        "--config.target.batch_size=100",
        f"--config.target.path={tmp_path}/own.py:label",
        "--config.accesses=('label',)",
    ]
    (tmp_path / "gone").touch()
    status, _, err = command(*words)
    assert status == 75 and "qmx: the service is gone" in err.splitlines()[-1], err
    (tmp_path / "gone").unlink()
    status, out, err = command(*words)
    assert status == 0, err
    assert "Target: label of own.py" in out
    # "1" when it was gone, and again: a trial of one image, then of two.
    sizes = ["1", "1", "2", "100", "100", "100", "57", "71"]
    assert (tmp_path / "asked").read_text().split() == sizes
    results = json.loads((tmp_path / "w/results.json").read_text())
    (row,) = results["rows"]
    assert 0 < row["fidelity_top1"] <= 100 and np.isfinite(row["kl_target_student"])
    assert results["account"]["failed"] == 1 and results["target"]["precision"] is None


@pytest.mark.slow
def test_the_command_where_some_images_have_no_answer(command, tmp_path):
    """Refused ones and such with NaN are left out, with their number said, the first of the trial
    among them; none is asked about twice. More of them than the config allows stop the run, and the
    cure in its line works.
    """
    first = load("digits").evaluation.shown(np.arange(1)).astype(int).sum()
    (tmp_path / "own.py").write_text(
        "import numpy as np\nfrom pathlib import Path\nfrom qmx.ledger import Refused\n"
        "def scores(images):\n"
        "    with open(Path(__file__).with_name('asked'), 'a') as log:\n"
        "        log.write(f'{len(images)}\\n')\n"
        "    sums = images.astype(int).sum((1, 2, 3))\n"
        f"    bad = (sums % 97 == 0) | (sums == {first})\n"
        "    if bad.any() and not Path(__file__).with_name('mended').exists():\n"
        "        raise Refused('the input is bad')\n"
        "    flat = images.reshape(len(images), -1)[:, 10:20].astype(float)\n"
        "    flat[sums % 89 == 0] = np.nan\n"
        "    return flat - 20\n"
    )
    words = [
        *SHORT,
        f"--workdir={tmp_path}/w",
        "--config.target.kind=callable",
        f"--config.target.path={tmp_path}/own.py:scores",
    ]
    status, _, err = command(*words)
    assert status == 2 and "images have no answer, and target.max_refused=0.01 allows 3" in err, err
    assert "(image " in err and "the input is bad" in err and "python -m qmx.ledger forget" in err
    asked = (tmp_path / "asked").read_text()
    status, _, err = command(*words)
    assert status == 2 and (tmp_path / "asked").read_text() == asked, err
    status, out, err = command(*words, "--config.target.max_refused=0.1", "--update")
    assert status == 0, err
    results = json.loads((tmp_path / "w/results.json").read_text())
    account = results["account"]
    assert account["refused"] > 4 and account["images"] == 71 + 360 - account["refused"]
    assert f"{account['refused']} images were refused" in out
    left_out = re.findall(r"query for \w+: (\d+) of (\d+) images have no answer", err)
    assert {total for _, total in left_out} <= {"71", "360"}
    assert sum(int(number) for number, _ in left_out) == account["refused"]
    (row,) = results["rows"]
    assert np.isfinite(row["kl_target_student"]) and 0 <= row["fidelity_top1"] <= 100
    for path in (tmp_path / "w").glob("evaluate/*/result.json"):
        path.unlink()
    (tmp_path / "asked").unlink()
    again = [*words, "--config.target.max_refused=0.1"]
    assert command(*again)[0] == 0 and not (tmp_path / "asked").exists()
    assert json.loads((tmp_path / "w/results.json").read_text())["rows"] == [row]

    # Mended and forgotten, they are asked about again, and they alone.
    (tmp_path / "mended").touch()
    assert ledger_command("forget", tmp_path / "w/ledger.sqlite")[0] == 0
    status, _, err = command(*again)
    assert status == 0, err
    said = f"{account['refused']} images that had no answer may be asked about again"
    assert f"query is done again, because {said}" in err
    left = json.loads((tmp_path / "w/results.json").read_text())["account"]
    assert left["refused"] < account["refused"], "those with NaN are left"
    assert left["images"] + left["refused"] == 71 + 360


HELD = """
import sqlite3, threading
from pathlib import Path
import numpy as np
from qmx.ledger import file

file.BUSY = 0.2  # seconds that SQLite waits
here, held = Path(__file__).parent, []

def scores(images):
    with open(here / "asked", "a") as log:
        log.write(f"{len(images)}\\n")
    if not held:
        held.append(sqlite3.connect(here / "w/ledger.sqlite", check_same_thread=False))
        held[0].isolation_level = None
        held[0].execute("BEGIN IMMEDIATE")
        if not (here / "forever").exists():
            threading.Timer(2, lambda: held[0].execute("ROLLBACK")).start()
    return images.reshape(len(images), -1)[:, 10:20].astype(np.float32) - 20
"""


@pytest.mark.slow
def test_the_command_while_another_program_writes(start, command, tmp_path):
    """It waits with the answers in memory, and says so once; told to stop, it says what is lost."""
    (tmp_path / "own.py").write_text(HELD)
    words = [
        *SHORT,
        f"--workdir={tmp_path}/w",
        "--config.target.kind=callable",
        "--config.target.batch_size=100",
        f"--config.target.path={tmp_path}/own.py:scores",
        "--stage=query",
    ]
    (tmp_path / "forever").touch()
    for stage in ("target", "select"):
        assert command(*words[:-1], f"--stage={stage}")[0] == 0
    process, said = start(*words), []
    while "cannot be written" not in (line := process.stderr.readline()):
        said.append(line)
        assert line, said
    assert "2 answers that came cannot be written: " in line and "locked" in line
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert "stopped; 2 answers that came cannot be written" in err.splitlines()[-1]
    assert "they are lost; run the same command again to go on" in err.splitlines()[-1]
    (tmp_path / "forever").unlink()
    (tmp_path / "asked").unlink()
    status, _, err = command(*words)
    assert status == 0 and err.count("cannot be written") == 1 and "nothing is lost" in err, err
    assert (tmp_path / "asked").read_text().split() == ["2", "98", "100", "100", "60", "71"]


@pytest.mark.slow
def test_rounds_where_some_images_have_no_answer(command, tmp_path):
    """A way that chooses by answers goes on with those that there are."""
    (tmp_path / "own.py").write_text(
        "import numpy as np\n"
        "def scores(images):\n"
        "    flat = images.reshape(len(images), -1)[:, 10:20].astype(float)\n"
        "    flat[images.astype(int).sum((1, 2, 3)) % 9 == 0] = np.inf\n"
        "    return flat - 20\n"
    )
    status, _, err = command(
        *(word for word in SHORT if "inits" not in word),
        "--config.inits=('rotation',)",
        "--config.selects=('margin',)",
        f"--workdir={tmp_path}/w",
        "--config.target.kind=callable",
        "--config.target.max_refused=0.5",
        f"--config.target.path={tmp_path}/own.py:scores",
    )
    assert status == 0, err
    results = json.loads((tmp_path / "w/results.json").read_text())
    (row,) = results["rows"]
    assert row["queries"]["train"] + row["queries"]["select"] == 71
    assert results["account"]["refused"] > 30 and np.isfinite(row["kl_target_student"])


def test_a_server_that_is_starting(tmp_path, monkeypatch):
    """It says 503, or 400 with words, or that it is not ready, or 400 and nothing (MLServer): it is
    looked at again; one that is not there at all is told at once."""
    states, said = [503, 400, "not ready", "bare", 200], []

    class Starting(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_GET(self):
            state = states[0]
            content, status = {}, 200
            if self.path.endswith("/ready"):
                bare = state == "bare"
                content, status = (None, 400) if bare else ({"ready": state == 200}, 200)
                states[:] = states[1:] or [200]
            elif state in (503, 400):
                content, status = {"error": "the model is still loading"}, state
                states.pop(0)
            else:
                content = {
                    "inputs": [{"name": "x", "datatype": "UINT8", "shape": [-1, 8, 8, 1]}],
                    "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, 10]}],
                }
            body = json.dumps(content).encode() if content else b""
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Starting)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(outside, "WAITS", (0.01,))
    monkeypatch.setattr(outside, "say", said.append)
    keys, data = base().target, load(**base().data)
    keys.update(kind="served", url=f"http://127.0.0.1:{server.server_port}", model="m")
    try:
        assert outside.describe(keys, data)["name"].startswith("m at http://127.0.0.1:")
    finally:
        server.shutdown()
        server.server_close()
    assert len(said) == 4 and all("asked again in 0.01 s" in line for line in said), said
    assert said[3].endswith("/m/ready answered 400 (asked again in 0.01 s)")
    with pytest.raises(Unavailable, match="Connection refused"):
        outside.describe(keys, data)
    assert len(said) == 4

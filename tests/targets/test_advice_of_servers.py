"""Advice in messages about served models, followed: each cure that one names is taken, and works.

The servers are oip_server.py's, in this process, where what they do can be changed.
"""

import collections
import io
import json
import re
import shutil
import socket
import ssl
import threading
import time

import numpy as np
import oip_server
import pytest
from oip_server import SAYS, Handler, Server, scores_of
from test_advice import advice
from test_named import arrays, write

from qmx.data import named
from qmx.ledger import Ledger, Refused, Unavailable
from qmx.targets import function, http, served
from qmx.targets.address import check_address
from qmx.targets.shown import Shown, resolved

IMAGES = np.random.default_rng(0).integers(0, 256, (24, 8, 8, 1), np.uint8)
SECRET = "s3cr3t-t0ken"


@pytest.fixture
def serving():
    """serving(handler) -> a server in this process; `sizes` are those of its requests."""
    running = []

    def start(handler=Handler, port=0, token="", headers=(), certificate=None, **more):
        server = Server(("127.0.0.1", port), handler)
        server.sizes, server.met = [], collections.Counter()
        server.note = lambda line: server.sizes.append(len(line.split()) - 2)
        server.token, server.headers, server.delay, server.binary = token, headers, 0.0, False
        for key, value in more.items():
            setattr(server, key, value)
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*certificate)
            server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        running.append(server)
        return server

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


@pytest.fixture
def certificate(tmp_path):
    """(certificate, key) of this machine."""
    if not shutil.which("openssl"):
        pytest.skip("makes its certificate with openssl")
    return oip_server.certificate(tmp_path)


def place(server, scheme="http", host="127.0.0.1"):
    return f"{scheme}://{host}:{server.server_port}"


def connect(url, model="digits", **changes):
    url = url if isinstance(url, str) else place(url)
    keywords = {"shape": (8, 8, 1), "classes": 10, "timeout": 5.0, **changes}
    return served.connect(url, model, **keywords)


def answers(found):
    """True if a model answers as it should."""
    return np.array_equal(found.query(IMAGES[:4]), scores_of(IMAGES[:4]))


# The address, and what is secret


def test_a_token_goes_over_tls(serving, certificate, monkeypatch):
    """The scheme that is named, and then the certificates' key."""
    monkeypatch.setenv("MY_TOKEN", SECRET)
    server = serving(token=SECRET, certificate=certificate)
    url, token = place(server, host="0.0.0.0"), {"token_env": "MY_TOKEN"}
    found = advice("in clear text; use (https://)", connect, url, **token)
    url = url.replace("http://", found[1])
    key = advice(r"target\.(\w+) names the certificates to trust", connect, url, **token)[1]
    assert answers(connect(url, **token, **{key: certificate[0]}))


def test_addresses_without_secrets(serving, monkeypatch):
    """What is to be left out is, and a variable named in its place; the example is an address."""
    server = serving(token=SECRET)
    url = place(server)
    monkeypatch.setenv("QMX_TARGET_TOKEN", SECRET)
    holds = url.replace("http://", f"http://me:{SECRET}@")
    key = advice(r"leave them out and name an environment .* in target\.(\w+)", connect, holds)[1]
    name = advice(r"as in (\w+), and not the token", connect, url, **{key: SECRET})[1]
    assert key == "token_env" and answers(connect(url, token_env=name))
    advice("goes on after .* leave that out", connect, f"{url}/?key={SECRET}", token_env=name)
    example = advice("as in (https://.*)$", connect, f"127.0.0.1:{server.server_port}")[1]
    check_address(example)
    monkeypatch.delenv("QMX_TARGET_TOKEN")
    variable = advice(r"token_env (\w+): .*export it", connect, url, token_env=name)[1]
    monkeypatch.setenv(variable, SECRET)
    assert answers(connect(url, token_env=name))


@pytest.mark.parametrize("status", [401, 403])
def test_a_token_that_is_asked_for(serving, monkeypatch, status):
    """In the key that is named."""

    class Gate(Handler):
        def reply(self, value, status=200, **headers):
            super().reply(value, {401: self.server.refuses}.get(status, status), **headers)

    server = serving(Gate, token=SECRET, refuses=status)
    key = advice(r"target\.(\w+) names the environment variable with a", connect, server)[1]
    monkeypatch.setenv("MY_TOKEN", SECRET)
    assert answers(connect(server, **{key: "MY_TOKEN"}))


def test_headers_from_the_environment(serving, monkeypatch):
    """A word like the example, with its variable exported."""
    server = serving(headers=["X-Api-Key=k3y"])
    word = advice("takes words like (.*?): the name", connect, server, headers_env=("k3y",))[1]
    missing = advice(r"variable (\w+) .*export it", connect, server, headers_env=(word,))[1]
    monkeypatch.setenv(missing, "k3y")
    assert answers(connect(server, headers_env=(word,)))


def test_nobody_at_the_address(serving):
    """Until a server runs there."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    advice("does a server run at target.url", connect, url, error=Unavailable)
    serving(port=port)
    assert answers(connect(url))


def test_ports_of_other_protocols(serving, certificate):
    """The scheme or the port that speaks HTTP, or TLS, or the protocol."""
    server, other = serving(), serving(certificate=certificate)
    cures = "does not answer in TLS; target.url takes (http://) .*server's port for (https://)"
    found = advice(cures, connect, place(server, "https"))
    assert answers(connect(place(server, found[1].removesuffix("://"))))
    tls = place(other, found[2].removesuffix("://"))
    assert answers(connect(tls, ca_file=certificate[0]))

    class Page(Handler):
        def do_GET(self):
            if self.path.startswith("/v2"):
                return super().do_GET()
            self.reply(b"<html>welcome</html>")

    url = place(serving(Page))
    advice("does a server of .* stand at target.url", connect, f"{url}/welcome")
    assert answers(connect(url))

    def grpc():
        connection, _ = listening.accept()
        with connection:
            connection.recv(4096)
            connection.sendall(b"\0\0\0\4\0\0\0\0\0\0\0\x08\7\0\0\0\0\0\n\r\n\0")

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=grpc, daemon=True).start()
        wrong = f"http://127.0.0.1:{listening.getsockname()[1]}"
        advice("target.url takes the server's port for HTTP", connect, wrong)
    assert answers(connect(server))


# Waiting, and the size of a request


def test_an_answer_that_is_late(serving):
    """A longer time-out, or fewer images."""

    class Slow(Handler):
        def answer(self, model, request, scores):
            time.sleep(1.0 if len(scores) > 4 else 0.0)
            super().answer(model, request, scores)

    server = serving(Slow)
    short = connect(server, timeout=0.6)
    cures = r"a longer target\.(\w+) waits, and a smaller target\.(batch_size) makes smaller"
    found = advice(cures, short.query, IMAGES, error=Unavailable)
    longer = connect(server, **{found[1]: 5.0})
    np.testing.assert_array_equal(longer.query(IMAGES), scores_of(IMAGES))
    assert answers(short)


@pytest.mark.parametrize(
    ("status", "said", "error"),
    [
        (413, "too large", Refused),
        (500, "CUDA out of memory", Unavailable),
        (200, "an answer that is long", ValueError),
    ],
)
def test_requests_that_are_too_large(serving, tmp_path, monkeypatch, status, said, error):
    """Smaller ones are answered, each at once."""

    class Four(Handler):
        def answer(self, model, request, scores):
            if len(scores) > 4 and status != 200:
                return self.reply({"error": said}, status)
            super().answer(model, request, scores)

    if status == 200:
        monkeypatch.setattr(http, "LARGEST", 2000)
    server = serving(Four)
    found = connect(server)
    advice(r"a smaller target.batch_size makes smaller", found.query, IMAGES, error=error)
    with Ledger(tmp_path / "l", target="t") as ledger:
        got = ledger.ask(found.query, IMAGES, batch_size=4, waits=())
    np.testing.assert_array_equal(got, scores_of(IMAGES))
    assert server.sizes == [24] + [4] * 6


def test_a_fixed_number_of_images(serving, tmp_path):
    """The number that is named."""
    server = serving()
    found = connect(server, "fixed")
    number = int(advice(r"set target.batch_size=(\d+)", found.query, IMAGES)[1])
    with Ledger(tmp_path / "l", target="t") as ledger:
        got = ledger.ask(found.query, IMAGES, batch_size=number, waits=())
    np.testing.assert_array_equal(got, scores_of(IMAGES))


def test_a_server_that_wants_to_be_left_alone(serving, tmp_path):
    """The same call later: what was answered before is not asked again."""

    class Closed(Handler):
        def answer(self, model, request, scores):
            if self.server.closes and len(self.server.sizes) > 2:
                return self.reply({"error": "come tomorrow"}, 429, Retry_After=86400)
            super().answer(model, request, scores)

    server = serving(Closed, closes=True)
    query, keys = connect(server).query, {"batch_size": 8, "waits": (0.0,)}
    with Ledger(tmp_path / "l", target="t") as ledger:
        later = "run the same command again later"
        advice(later, ledger.ask, query, IMAGES, **keys, error=ConnectionError)
    server.closes = False
    with Ledger(tmp_path / "l", target="t") as ledger:
        np.testing.assert_array_equal(ledger.ask(query, IMAGES, **keys), scores_of(IMAGES))
    assert server.sizes == [8] * 4, "the third was refused, and sent again alone"


def test_a_model_that_is_loading(serving):
    """Once it is loaded it answers."""

    class Loading(Handler):
        def do_GET(self):
            if self.path.endswith("/ready"):
                return self.reply({"ready": self.server.loaded})
            super().do_GET()

    server = serving(Loading, loaded=False)
    advice("wait until it is loaded", connect, server, error=Unavailable)
    server.loaded = True
    assert answers(connect(server))


# The model, its version and its tensors


def test_names_of_models_and_versions(serving):
    """Each key that is to be looked at, or left out; one of the versions that are listed."""
    server = serving()
    for url, model in ((place(server), "absent"), (f"{place(server)}/api", "digits")):
        advice("look at target.url, target.model and target.version", connect, url, model)
    advice("leave target.version out if it is set", connect, server, version="unversioned")
    assert answers(connect(server))
    cure = r"has the versions (.*); name one in target\.(\w+)"
    found = advice(cure, connect, server, "versions")
    for version in found[1].split(", "):
        assert f"version {version} " in connect(server, "versions", **{found[2]: version}).name


def test_names_of_tensors(serving):
    """Each tensor that the server lists, or one that it does not."""
    server, keys = serving(), {}
    for name in ("image", "scores"):
        keys[advice(r"name it in target\.(\w+)", connect, server, "unsaid", **keys)[1]] = name
    assert keys == {"input": "image", "output": "scores"}
    assert answers(connect(server, "unsaid", **keys))
    for model, wrong in (
        ("two_inputs", {}),
        ("digits", {"input": "pixels"}),
        ("digits", {"output": "logits"}),
    ):
        cure = r"name one of (.*) in target\.(\w+)"
        found = advice(cure, connect, server, model, **wrong)
        for name in found[1].split(", "):
            assert answers(connect(server, model, **{found[2]: name}))


def test_an_output_by_another_name_than_is_said(serving, monkeypatch):
    """The name in target.output where the server does not describe its output; else the server's
    description by that name."""
    server = serving()
    cures = (
        r"no output 'scores', but (\w+); name one in target\.(\w+), and where the server describes"
        " the model, it must call its output so too"
    )
    found = advice(cures, connect(server, "renamed").query, IMAGES)
    key = {found[2]: found[1]}
    described = {"name": found[1], "datatype": "FP32", "shape": [-1, 10]}
    for outputs in ([], [described]):
        monkeypatch.setitem(SAYS, "renamed", {"outputs": outputs})
        assert answers(connect(server, "renamed", **key))


def test_class_numbers_and_other_classes(serving, tmp_path):
    """The access that is named; and a file with the names of the model's classes."""
    server = serving()
    level = advice(r"are target\.access=(\w+)", connect, server, "numbers")[1]
    got = connect(server, "numbers", access=level).query(IMAGES)
    np.testing.assert_array_equal(got.argmax(1), scores_of(IMAGES).argmax(1))
    advice(r"target\.classes names the classes of a model that has", connect, server, "thousand")
    lines = "".join(f"{name}\n" for name in range(1000))
    data = named(arrays(names=("5", "7", "9")), write(tmp_path, lines))
    connect(server, "thousand", classes=data.classes)


@pytest.mark.parametrize(
    ("model", "takes", "cure"),
    [
        ("digits", ("UINT8", [1, 8, 8]), {"layout": "nchw"}),
        ("floats", ("FP32", [8, 8, 1]), {"dtype": "float32", "scale": 255.0}),
        ("large", ("UINT8", [16, 16, 3]), {"size": 16, "channels": 3, "interpolation": "nearest"}),
    ],
    ids=["layout", "dtype", "size and channels"],
)
def test_images_that_a_model_does_not_take(serving, monkeypatch, model, takes, cure):
    """The keys that are named, where the server says nothing of the input, but its model does."""

    class Exported(Handler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            given = json.loads(body)["inputs"][0]
            if (given["datatype"], given["shape"][1:]) != takes:
                return self.reply({"error": "INVALID_ARGUMENT: Got invalid dimensions"}, 500)
            connection, self.rfile = self.rfile, io.BytesIO(body)
            super().do_POST()
            self.rfile = connection

    monkeypatch.setitem(SAYS, model, {"inputs": []})
    server = serving(Exported)
    query = connect(server, model, input="image").query
    told = advice(
        r"look at target.shown(.*), and at target.batch_size", query, IMAGES, error=Refused
    )
    for key in cure.keys() - {"scale", "interpolation"}:
        assert f".{key}" in told[1]
    assert answers(connect(server, model, input="image", shown=Shown(**cure)))


# How images are shown, and a function


def test_numbers_that_nobody_says():
    """Each of the four usual sets makes the numbers that its words say; one for each channel."""
    text = advice("set (target.shown.scale=.*)", resolved, Shown(), (8, 8, 3), "float32", [])[1]
    sets = []
    for one in text.split("; "):
        pairs = re.findall(r"(scale|mean|std)=\(?([\d.,]+)", one)
        values = {key: [float(number) for number in words.split(",")] for key, words in pairs}
        sets.append(
            Shown(**{key: v[0] if key == "scale" else tuple(v) for key, v in values.items()})
        )
        assert resolved(sets[-1], (8, 8, 3), "float32", []).dtype == "float32"
    assert len(sets) == 4 and [shown.scale for shown in sets] == [1, 1, 1, 255]
    cure = r"target\.shown\.(\w+) .* must have (\d+) numbers"
    found = advice(cure, resolved, sets[1], (8, 8, 1), "float32", [])
    less = {key: (0.5,) * int(found[2]) for key in ("mean", "std")}
    assert found[1] in less and resolved(sets[1]._replace(**less), (8, 8, 1), "float32", [])


def test_an_input_of_another_shape():
    """The three keys that are named make it fit."""
    wrong, sizes = Shown(layout="nhwc"), [-1, 3, 16, 16]
    cure = r"target\.shown\.(\w+), \.(\w+) and \.(\w+) say how"
    keys = advice(cure, resolved, wrong, (8, 8, 1), "uint8", sizes).groups()
    given = dict(zip(keys, (16, 3, "nchw"), strict=True))
    assert resolved(wrong._replace(**given), (8, 8, 1), "uint8", sizes).size == 16


def test_functions(tmp_path, monkeypatch):
    """By a file or a module; with the target's own classes."""
    (tmp_path / "of_my_own.py").write_text(
        "def f(images):\n    return images.reshape(len(images), -1)[:, :3]\n\n"
        "def numbers(images):\n    return images[:, 0, 0, 0] % 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    shape = {"shape": (8, 8, 1)}
    found = advice(r"must be (FILE).py:function or (module):function", function.load, "f")
    files = {found[1]: f"{tmp_path}/of_my_own.py", found[2]: "of_my_own"}
    for file in files.values():
        query = function.connect(f"{file}:f", classes=3, **shape).query
        np.testing.assert_array_equal(query(IMAGES), IMAGES.reshape(24, -1)[:, :3])
        query = function.connect(f"{file}:f", classes=10, **shape).query
        advice("target.classes names the classes of a target that has others", query, IMAGES)
    lines = write(tmp_path, "a\nb\nc\n")
    classes = named(arrays(2, ("a", "b")), lines).classes
    assert function.connect(f"{file}:f", classes=classes, **shape).query(IMAGES).shape == (24, 3)
    query = function.connect(f"{file}:numbers", classes=0, access="label", **shape).query
    advice("target.classes names a file that does", query, IMAGES)
    query = function.connect(f"{file}:numbers", classes=classes, access="label", **shape).query
    np.testing.assert_array_equal(query(IMAGES).argmax(1), IMAGES[:, 0, 0, 0] % 3)

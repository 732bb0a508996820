"""What a server says: the token is shown nowhere, and no server is waited for beyond the time-out.

The server is a real one, which sends whatever bytes a test gives it.
"""

import json
import logging
import socket
import threading
import time
from contextlib import suppress

import numpy as np
import pytest
from numbered import images

from qmx.ledger import Ledger, Unavailable
from qmx.targets import http, served
from qmx.targets.said import PIECE, masked, shown

TOKEN = "Sk-9'fQ0\"xZ\\7%2Fpq+Lm=~t"
PIXELS = np.zeros((2, 4, 4, 1), np.uint8)


@pytest.fixture
def token(monkeypatch):
    monkeypatch.setenv("QMX_TARGET_TOKEN", TOKEN)
    return {"token_env": "QMX_TARGET_TOKEN"}


@pytest.fixture
def serve():
    """serve(reply) -> address of a server that calls reply(send, path) for each request."""
    listening = []

    def one(connection, reply):
        with connection:
            try:
                head = b""
                while b"\r\n\r\n" not in head:
                    head += connection.recv(65536) or b"\r\n\r\n"
                assert b"Authorization: Bearer " + TOKEN.encode() in head
                length = int((head.lower().partition(b"content-length: ")[2] or b"0").split()[0])
                body = head.partition(b"\r\n\r\n")[2]
                while len(body) < length:
                    body += connection.recv(65536)
                reply(connection.sendall, head.split()[1].decode())
            except OSError:  # the client went away
                pass

    def accept(server, reply):
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            threading.Thread(target=one, args=(connection, reply), daemon=True).start()

    def start(reply):
        server = socket.create_server(("127.0.0.1", 0))
        listening.append(server)
        threading.Thread(target=accept, args=(server, reply), daemon=True).start()
        return f"http://127.0.0.1:{server.getsockname()[1]}"

    yield start
    for server in listening:
        server.shutdown(socket.SHUT_RDWR)
        server.close()


def whole(body, status="200 OK", headers=""):
    body = body.encode() if isinstance(body, str) else body
    head = f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n{headers}Connection: close\r\n\r\n"
    return head.encode() + body


def holds(text, token=TOKEN):
    """True if 8 consecutive characters of the token are in the text, in capitals or not."""
    text, token = text.lower(), token.lower()
    return any(token[at : at + PIECE] in text for at in range(len(token) - PIECE + 1))


def test_masked():
    """By chance, against the definition: no piece is left, and a text without one is as it was."""
    rng = np.random.default_rng(0)
    letters = np.array(list("aAbB1'"))
    for _ in range(3000):
        token = "".join(rng.choice(letters, rng.integers(1, 24)))
        at, to = np.sort(rng.integers(0, len(token) + 1, 2))
        text = "".join(rng.choice(letters, rng.integers(0, 40))) + token[at:to] + "1b" * 3
        size = min(PIECE, len(token))
        pieces = [token[at : at + size].lower() for at in range(len(token) - size + 1)]
        hidden = masked(text, token)
        assert not any(piece in hidden.lower() for piece in pieces), (token, text, hidden)
        if not any(piece in text.lower() for piece in pieces):
            assert hidden == text
    assert masked("a Bearer 12345678901.", "12345678901") == "a Bearer ***."
    assert masked("a 1234567 b", "12345678901") == "a 1234567 b"
    assert masked("text", "") == "text"
    assert shown(b"a\n\x1b[31mred\xff" + b"x" * 300, "").startswith("a ?[31mred\ufffdxxx")
    assert len(shown(b"x" * 3000, "")) == 204


ECHOES = {
    "body": lambda part: whole(f"<html>you sent {part}"),
    "a long body": lambda part: whole("x" * 45 + part),
    "an error's body": lambda part: whole(f"not allowed with {part}", "403 Forbidden"),
    "an error's JSON": lambda part: whole(json.dumps({"error": part}), "422 No"),
    "an error's end": lambda part: whole("x" * 185 + part, "500 No"),
    "the redirect's path": lambda part: whole("", "302 Found", f"Location: http://b/{part}\r\n"),
    "the redirect's host": lambda part: whole("", "302 Found", f"Location: http://{part}/\r\n"),
    "the reason": lambda part: whole("", f"401 {part}"),
    "the status line": lambda part: f"{part}\r\n\r\n".encode(),
    "a status": lambda part: f"HTTP/1.1 {part}\r\n\r\n".encode(),
    "a header": lambda part: whole("", "401 No", f"Retry-After: {part}\r\nX: {part}\r\n"),
    "no header": lambda part: whole("", "401 No", f"X: y\r\n {part}\r\n{part}\r\n"),
    "a length": lambda part: f"HTTP/1.1 200 OK\r\nContent-Length: {part}\r\n\r\n{{}}".encode(),
    "a chunk": lambda part: (
        f"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n{part}\r\n".encode()
    ),
    "half a body": lambda part: f"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n{part}".encode(),
    "metadata": lambda part: whole(
        json.dumps({"inputs": [{"name": part, "datatype": "X", "shape": []}]})
    ),
    "versions": lambda part: whole(json.dumps({"versions": [part, "b"]})),
    "no versions": lambda part: whole(json.dumps({"versions": {part: part}})),
    "a shape": lambda part: whole(
        json.dumps({"inputs": [{"name": "a", "datatype": "UINT8", "shape": [part]}]})
    ),
}


@pytest.mark.parametrize("step", [7, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("place", ECHOES)
def test_a_server_that_repeats_the_token(serve, token, caplog, capfd, place, step):
    """Whole or cut at any character, in any part of its answer: nothing shows a piece of it."""
    caplog.set_level(logging.DEBUG)
    parts = [TOKEN[:end] for end in range(len(TOKEN), -1, -step)] + [TOKEN[1:], TOKEN.upper() * 2]
    told = []
    for part in parts:
        url = serve(lambda send, path, part=part: send(ECHOES[place](part)))
        with pytest.raises((OSError, ValueError)) as error:
            served.connect(url, "digits", shape=(4, 4, 1), classes=4, timeout=5.0, **token)
        told.append(f"{error.value!s} {error.value!r}")
        assert len(str(error.value).splitlines()) == 1
    out, err = capfd.readouterr()
    for text in (*told, caplog.text, out, err):
        assert not holds(text), text


METADATA = {
    "versions": ["1"],
    "inputs": [{"name": "image", "datatype": "UINT8", "shape": [-1, 4, 4, 1]}],
    "outputs": [{"name": "scores", "datatype": "FP32", "shape": [-1, 4]}],
}


def model(answer):
    """A reply of a server whose model answers this to a question."""

    def reply(send, path):
        if path.endswith("/infer"):
            send(answer if isinstance(answer, bytes) else whole(json.dumps(answer)))
        else:
            send(whole("" if path.endswith("/ready") else json.dumps(METADATA)))

    return reply


def scores(**changes):
    output = {"name": "scores", "datatype": "FP32", "shape": [2, 4], "data": [*range(8)]}
    return {"outputs": [{**output, **changes}]}


def test_nothing_of_it_is_in_the_ledger(serve, token, tmp_path):
    """A refused image is written down with what the server says, which has the token in it."""
    for end in range(PIECE, len(TOKEN) + 1):
        answer = whole(json.dumps({"error": f"bad: {TOKEN[:end]}"}), "400 Bad Request")
        query = served.connect(
            serve(model(answer)), "digits", shape=(4, 4, 1), classes=4, **token
        ).query
        with Ledger(tmp_path / "ledger.sqlite", target=str(end)) as ledger:
            answers = ledger.ask(query, images(end, 300 + end), max_refused=1.0)
            assert ledger.account().refused == 2 and np.isnan(answers).all()
    kept = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert b"answered 400 (bad: ***" in kept and not holds(kept.decode("latin-1"))


def test_the_name_of_a_version(serve, token):
    """It is shown in the report, and asked for as the server calls it."""
    asked = []

    def reply(send, path):
        asked.append(path)
        send(
            whole("" if path.endswith("/ready") else json.dumps({**METADATA, "versions": [TOKEN]}))
        )

    found = served.connect(serve(reply), "digits", shape=(4, 4, 1), classes=4, **token)
    assert found.name.startswith("digits version *** at ") and len(set(asked)) == 3


ODD = {
    "words for a shape": scores(shape=["two", 4]),
    "floats for a shape": scores(shape=[2.0, 4]),
    "null for a shape": scores(shape=None),
    "null in a shape": scores(shape=[None, 4]),
    "a negative shape": scores(shape=[-2, -4]),
    "true in a shape": scores(shape=[True, 8]),
    "a huge shape": scores(shape=[2**70, 4]),
    "a deep shape": scores(shape=[[2, 4]]),
    "words for data": scores(data=["a"] * 8),
    "null for data": scores(data=None),
    "uneven data": scores(data=[[1], [2, 3]]),
    "an object for data": scores(data={"a": 1}),
    "huge numbers": scores(data=[10**400] * 8),
    "a list for a type": scores(datatype=["FP32"]),
    "null for a type": scores(datatype=None),
    "no outputs": {"outputs": None},
    "a number for outputs": {"outputs": 3},
    "words for outputs": {"outputs": ["scores"]},
    "a size in words": scores(parameters={"binary_data_size": "many"}),
    "a negative size": scores(parameters={"binary_data_size": -4}),
    "an uneven size": scores(parameters={"binary_data_size": 7}),
    "an infinite size": scores(parameters={"binary_data_size": 1e999}),
    "a list for parameters": scores(parameters=[1]),
}


@pytest.mark.parametrize("answer", ODD.values(), ids=ODD)
def test_odd_answers(serve, token, answer):
    """One line that says what is wrong."""
    query = served.connect(
        serve(model(answer)), "digits", shape=(4, 4, 1), classes=4, **token
    ).query
    with pytest.raises(ValueError, match="the output scores |not the protocol's") as told:
        query(PIXELS)
    assert len(str(told.value).splitlines()) == 1


ODD_METADATA = {
    "versions": 5,
    "inputs": [{"name": "image", "datatype": "UINT8", "shape": [1e999]}],
    "outputs": [{"name": "scores", "datatype": "FP32", "shape": 7}],
}


@pytest.mark.parametrize("key", ODD_METADATA)
def test_odd_metadata(serve, token, key):
    said = {**METADATA, key: ODD_METADATA[key]}
    url = serve(lambda send, path: send(whole(json.dumps(said))))
    with pytest.raises(ValueError, match="not a list|not the protocol's"):
        served.connect(url, "digits", shape=(4, 4, 1), classes=4, **token)


def test_extensions_that_are_no_list(serve, token):
    url = serve(lambda send, path: send(whole(json.dumps({**METADATA, "extensions": 5}))))
    served.connect(url, "digits", shape=(4, 4, 1), classes=4, **token)


TRICKLES = {
    "the status line": b"HTTP/1.1 200 O" + b"K" * 900,
    "a header": b"HTTP/1.1 200 OK\r\nX: " + b"x" * 900,
    "headers": b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 90,
    "answers that go on": b"HTTP/1.1 100 Continue\r\n\r\n" * 40,
    "a body": b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n" + b"x" * 900,
    "a body without a length": b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 900,
    "a chunk's size": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"0" * 900,
}


@pytest.mark.parametrize("place", TRICKLES)
def test_answers_that_trickle(serve, token, place):
    """A byte now and then is no answer: the time-out is for all of it, headers too."""

    def reply(send, path):
        content = TRICKLES[place]
        head = content.index(b"\r\n\r\n") + 4 if "bod" in place or "chunk" in place else 0
        send(content[:head])
        for at in range(head, len(content)):
            send(content[at : at + 1])
            time.sleep(0.02)

    send = http.client(serve(reply), timeout=0.4, **token)
    began = time.monotonic()
    with pytest.raises(Unavailable, match="within 0.4 s"):
        send("GET", "/v2", None, {})
    assert 0.3 < time.monotonic() - began < 2


def test_after_a_trickle_the_next_answer_comes(serve, token):
    """Nothing is left of the first one: no watch that ends the second."""
    turns = []

    def reply(send, path):
        turns.append(path)
        if len(turns) == 1:
            send(b"HTTP/1.1 200 OK\r\n")
            time.sleep(1)
        send(whole("{}"))

    send = http.client(serve(reply), timeout=0.4, **token)
    with pytest.raises(Unavailable):
        send("GET", "/v2", None, {})
    for _ in range(3):
        assert send("GET", "/v2", None, {})[0] == b"{}"
        time.sleep(0.2)


@pytest.mark.parametrize("length", [0, 6, 18, 24, 36])
def test_a_port_for_grpc(length):
    """Its server speaks first, in HTTP/2: said in words, at once, and not asked again."""
    settings = length.to_bytes(3, "big") + b"\4" + bytes(5) + b"\0\3\0\0\0\7" * (length // 6)

    def serve():
        with suppress(OSError):
            while True:
                connection, _ = listening.accept()
                with connection:
                    connection.recv(4096)
                    connection.sendall(settings + b"\0\0\x08\7\0\0\0\0\0\n\r\n\0")

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=serve, daemon=True).start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        with pytest.raises(
            ValueError, match=r"HTTP/2, as ports for gRPC do .*port for HTTP \(8000"
        ):
            http.client(url)("GET", "/v2/models/m", None, {})

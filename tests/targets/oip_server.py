"""A small server of the Open Inference Protocol v2, with models that go wrong, for the tests.

    python tests/targets/oip_server.py --log=FILE [--delay=SECONDS] [--binary]
        [--cert=PEM --key=PEM] [--token=TOKEN]

Prints its port on loopback. Each fault is a model, called what it does; "digits" answers well. The
log has a line for each inference request, written before it is answered: the time, the model, and
the SHA-256 of each image's pixels.
"""

import argparse
import collections
import hashlib
import json
import socket
import ssl
import subprocess
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np

ELSEWHERE = "http://example.invalid/v2"
# As MLServer sends it: plain text, longer than what is shown of it, its message in three lines.
TRACEBACK = (
    "Traceback (most recent call last):\n"
    + '  File "/srv/lib/python3.11/site-packages/starlette/routing.py", line 73, in app\n'
    "    response = await f(request)\n               ^^^^^^^^^^^^^^^^\n"
    * 20
    + "onnxruntime.InvalidArgument: [ONNXRuntimeError] : 2 : INVALID_ARGUMENT : Got invalid"
    " dimensions for input: image\n index: 0 Got: 2 Expected: 1\n Please fix either the inputs.\n"
)


def certificate(folder):
    """(certificate, key), paths of PEM files that openssl makes, for two addresses of this
    machine."""
    paths = [str(folder / name) for name in ("cert", "key")]
    words = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"
    names = ["-subj", "/CN=test", "-addext", "subjectAltName=IP:127.0.0.1,IP:0.0.0.0"]
    files = ["-out", paths[0], "-keyout", paths[1]]
    subprocess.run([*words.split(), *names, *files], check=True, capture_output=True)
    return paths


def scores_of(images):
    """Logits of digits: minus the mean squared distance to each class's mean image; uint8[b, 8, 8,
    1] -> f32[b, 10]."""
    distance = images.reshape(len(images), 1, -1).astype(np.float32) - means()
    return (-(distance**2).mean(2) / 300).astype(np.float32)


def refuses(images):
    """True for the images that the model "picky" refuses; uint8[b, 8, 8, 1] -> bool[b]."""
    return images[:, 0, 0, 0] % 7 == 0


def disliked(images):
    """True for the images that the models that repeat the token refuse, a ninth of the digits;
    uint8[b, 8, 8, 1] -> bool[b]."""
    return images.astype(int).sum((1, 2, 3)) % 9 == 0


def pixels(model, sent):
    """The images that a model is shown, uint8[b, 8, 8, 1], whatever it takes."""
    if model == "channels_first":  # (x / 255 - 0.5) / 0.25, as of any exported PyTorch model
        return np.rint((sent.reshape(len(sent), 8, 8, 1) * 0.25 + 0.5) * 255).astype(np.uint8)
    if model == "sixteen":  # 0..1, as of any exported Keras model
        return np.rint(sent.astype(np.float32) * 255).astype(np.uint8)
    if model == "large":
        return sent[:, ::2, ::2, :1]
    assert model != "fixed" or len(sent) == 4
    return sent.astype(np.uint8)


def means():
    """The ten mean images, drawn with a fixed seed: no labels are needed to be a target."""
    return np.random.default_rng(0).integers(0, 256, (10, 64)).astype(np.float32)


# Of each model, what it says of itself; the rest is as "digits" has it.
SAYS = {
    "floats": {"inputs": [{"name": "image", "datatype": "FP32", "shape": [-1, 8, 8, 1]}]},
    "channels_first": {"inputs": [{"name": "image", "datatype": "FP32", "shape": [-1, 1, 8, 8]}]},
    "sixteen": {"inputs": [{"name": "image", "datatype": "FP16", "shape": [-1, 8, 8, 1]}]},
    "fixed": {"inputs": [{"name": "image", "datatype": "UINT8", "shape": [4, 8, 8, 1]}]},
    "large": {"inputs": [{"name": "image", "datatype": "UINT8", "shape": [-1, 16, 16, 3]}]},
    "texts": {"inputs": [{"name": "image", "datatype": "BYTES", "shape": [-1]}]},
    "two_inputs": {
        "inputs": [{"name": name, "datatype": "UINT8", "shape": [-1, 8, 8, 1]} for name in "ab"]
    },
    "thousand": {"outputs": [{"name": "scores", "datatype": "FP32", "shape": [-1, 1000]}]},
    "numbers": {"outputs": [{"name": "scores", "datatype": "INT64", "shape": [-1]}]},
    "versions": {"versions": ["1", "2"]},
    "unsaid": {"inputs": [], "outputs": [], "versions": None},
    "odd": {"inputs": [{"title": "image"}]},
}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    given = ""  # the token, in the answers of models that repeat it

    def log_message(self, *_):
        pass

    def reply(self, value, status=200, **headers):
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        headers = {"Content_Type": "application/json", "Content_Length": len(body), **headers}
        if self.given:
            headers |= {"X_Echo": self.given, "Retry_After": self.given, "Server": self.given}
        for name, word in headers.items():
            if word is not None:
                self.send_header(name.replace("_", "-"), str(word))
        self.end_headers()
        self.wfile.write(body)

    def allowed(self):
        given = self.headers.get("Authorization", "")
        self.given = given.removeprefix("Bearer ") if "/echo" in self.path else ""
        if self.server.token and given != f"Bearer {self.server.token}":
            self.reply({"error": f"not allowed with {given}"}, 401)
            return False
        for header in self.server.headers:
            name, _, value = header.partition("=")
            if self.headers.get(name) != value:
                self.reply({"error": f"{name} is {self.headers.get(name)}"}, 403)
                return False
        return True

    def hang_up(self):
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True

    def do_GET(self):
        if not self.allowed():
            return
        parts = self.path.strip("/").split("/")
        if parts[0] != "v2":
            self.reply({"error": "not here"}, 404)
        elif parts == ["v2"]:
            self.reply(
                {
                    "name": "test",
                    "version": "1",
                    "extensions": ["binary_tensor_data"] * self.server.binary,
                }
            )
        elif parts[2:4] == ["digits", "versions"] and parts[4] == "unversioned":
            self.reply({"error": "Model versioning not supported yet."}, 501)
        elif len(parts) > 2 and parts[2] == "absent":
            self.reply({"error": "Request for unknown model: 'absent' is not found"}, 404)
        elif parts[-1] == "ready":
            self.reply({"name": parts[2], "ready": parts[2] != "loading"})
        else:
            self.reply(
                {
                    "name": parts[2],
                    "versions": ["1"],
                    "platform": "test",
                    "inputs": [{"name": "image", "datatype": "UINT8", "shape": [-1, 8, 8, 1]}],
                    "outputs": [{"name": "scores", "datatype": "FP32", "shape": [-1, 10]}],
                    **SAYS.get(parts[2], {}),
                    **(self.repeated() if self.given else {}),
                }
            )

    def repeated(self):
        """What a model says of itself that has the token for all its names."""
        scores = {"name": self.given, "datatype": "FP32", "shape": [-1, 10]}
        return {"platform": self.given, "versions": [self.given], "outputs": [scores]}

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if not self.allowed():
            return
        model = self.path.split("/")[3]
        length = int(self.headers.get("Inference-Header-Content-Length", len(body)))
        request = json.loads(body[:length])
        given = request["inputs"][0]
        wanted = {"floats": "FP32", "channels_first": "FP32", "sixteen": "FP16"}.get(model, "UINT8")
        assert given["datatype"] == wanted, given["datatype"]
        dtype = {"FP32": "<f4", "FP16": "<f2", "UINT8": "u1"}[wanted]
        flat = (
            np.frombuffer(body[length:], dtype)
            if length < len(body)
            else np.array(given["data"], dtype)
        )
        images = pixels(model, flat.reshape(given["shape"]))
        self.server.note(
            f"{time.time()} {model} "
            + " ".join(hashlib.sha256(image.tobytes()).hexdigest() for image in images)
        )
        time.sleep(self.server.delay)
        self.server.met[model] += 1
        if model == "picky" and refuses(images).any():
            return self.reply({"error": "the input is bad"}, 422)
        if self.given and (answer := self.repeating(model, images)):
            return self.reply(*answer[:2], **answer[2])
        if model == "four" and len(images) > 4:
            return self.reply({"error": "the batch is larger than max_batch_size 4"}, 400)
        if model == "one" and len(images) > 1:
            self.reply(TRACEBACK.encode(), 500, Content_Type="text/plain")
            time.sleep(0.02)
            return self.hang_up()  # without a word of it in the headers, as uvicorn does
        self.answer(model, request, scores_of(images))

    def repeating(self, model, images):
        """(answer, status, headers) of a model that repeats the token, but where it has scores."""
        met, token = self.server.met[model], self.given
        said = {"error": f"no: {token[: len(token) - met % len(token)]}"}  # cut further each time
        if model == "echo_moved":
            return said, 302, {"Location": f"http://{token}/{token}?{token}#{token}"}
        if model == "echo_page":
            return f"<html>{token}".encode(), 200, {}
        if model == "echo_down" or met == 2:
            return said, 503, {}
        if disliked(images).any():
            return said, 422, {}
        return None

    def answer(self, model, request, scores):
        met, answer = (
            self.server.met[model],
            {
                "id": request["id"],
                "model_name": model,
                "model_version": self.given or "1",
            },
        )
        if model == "slow":
            time.sleep(3)
        elif model == "down":
            return self.reply({"error": "a worker died"}, 500)
        elif model == "typed":  # as KServe sends it
            return self.reply({"error": "INVALID_ARGUMENT : Unexpected input data type."}, 500)
        elif model == "memory":
            return self.reply({"error": "CUDA out of memory. Tried to allocate 20 MiB"}, 500)
        elif model == "busy" and met < 3:
            return self.reply({"error": "busy"}, 503, Retry_After=1)
        elif model == "flaky" and met % 2:
            return self.reply(b"<html>bad gateway</html>", 502)
        elif model == "closed":
            return self.reply({"error": "come tomorrow"}, 429, Retry_After=86400)
        elif model == "refusing":
            return self.reply({"error": "the input is bad"}, 400)
        elif model == "moved":
            return self.reply(b"", 302, Location=ELSEWHERE)
        elif model == "hangs_up":
            return self.hang_up()
        elif model == "page":
            return self.reply(b"<html>welcome</html>")
        elif model == "nested":
            return self.reply(b"[" * 100_000)
        elif model == "nan":
            scores[1, 2] = np.nan
        elif model == "eleven":
            scores = np.concatenate([scores, scores[:, :1]], 1)
        elif model == "half":
            scores = scores[: len(scores) // 2]
        elif model == "numbers":
            scores = scores.argmax(1)
        elif model == "probs":
            scores = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
        elif model == "other_id":
            answer["id"] = "0"
        elif model == "replaced":
            answer["model_version"] = "2"
        output = {
            "name": "logits" if model == "renamed" else self.given or "scores",
            "datatype": "FP32",
            "shape": list(scores.shape),
            "data": scores.ravel().tolist(),
        }
        if model == "numbers":
            output["datatype"] = "INT64"
        elif model == "null":
            output["data"][3] = None
        elif model == "short":
            output["data"] = output["data"][: len(output["data"]) // 2]
        elif model == "words":
            output["datatype"] = "BYTES"
        answer["outputs"] = [output]
        if self.server.binary:
            del output["data"]
            tensor = np.ascontiguousarray(scores, "<i8" if model == "numbers" else "<f4").tobytes()
            output["parameters"] = {"binary_data_size": len(tensor)}
            # Another output before it, as a model may have.
            answer["outputs"].insert(
                0,
                {
                    "name": "rest",
                    "datatype": "UINT8",
                    "shape": [3],
                    "parameters": {"binary_data_size": 3},
                },
            )
            head = json.dumps(answer).encode()
            return self.reply(head + b"abc" + tensor, Inference_Header_Content_Length=len(head))
        body = json.dumps(answer).encode()
        if model in ("cut", "cut_unsaid"):
            self.reply(body[: len(body) // 2], Content_Length=len(body) if model == "cut" else None)
            self.hang_up()
        elif model == "drips":
            self.reply(b"", Content_Length=len(body))
            for place in range(len(body)):
                self.wfile.write(body[place : place + 1])
                time.sleep(0.05)
        else:
            self.reply(body)


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_):  # clients are killed here on purpose
        pass


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--log", required=True)
    parser.add_argument("--delay", type=float, default=0.0)
    parser.add_argument("--binary", action="store_true")
    parser.add_argument("--token", default="")
    parser.add_argument("--header", action="append", default=[])
    parser.add_argument("--cert")
    parser.add_argument("--key")
    given = parser.parse_args()
    server = Server(("127.0.0.1", 0), Handler)
    log = open(given.log, "a")
    server.note = lambda line: (log.write(line + "\n"), log.flush())
    server.delay, server.binary, server.token = given.delay, given.binary, given.token
    server.met, server.headers = collections.Counter(), given.header
    if given.cert:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(given.cert, given.key)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    print(server.server_address[1], flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()

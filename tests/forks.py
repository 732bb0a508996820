"""Processes of the command, or of a script, that need not import their modules: forks of one that
has imported them and computed nothing. To import takes four seconds of a processor, more than most
of them compute.

    python tests/forks.py SOCKET    # which `Server` starts
"""

import gc
import importlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Beside what a call imports to compute (benchmarks/fault_signals.py): what its report does.
ALSO = (
    "one_block",
    "qmx.main",
    "matplotlib.backends.backend_agg",
    "matplotlib.backends.backend_svg",
    "matplotlib.figure",
    "jinja2",
)


class Server:
    """The process that is forked; ends with this one, or by `close`."""

    def __init__(self, environment):
        self._here, there = socket.socketpair()
        self._asking = threading.Lock()  # for an answer belongs to the last request
        with there:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(there.fileno())],
                cwd=ROOT,
                env=environment,
                pass_fds=[there.fileno()],
            )

    def ask(self, what, *files):
        """The server's answer to a request, which gets these open files."""
        with self._asking:
            socket.send_fds(self._here, [json.dumps(what).encode()], [*files])
            return json.loads(self._here.recv(1 << 16))

    def close(self):
        self._here.close()
        self._process.wait()


class Fork:
    """A command, or a script if the first word is one, as subprocess.Popen has it, with text pipes
    for standard out and error."""

    def __init__(self, server, words, environment):
        pipes = [os.pipe() for _ in range(2)]
        self.stdout, self.stderr = (open(reader) for reader, _ in pipes)
        writers = [writer for _, writer in pipes]
        self._server, self.returncode, self.args = server, None, words
        self.pid = server.ask({"words": words, "environment": environment}, *writers)
        for writer in writers:
            os.close(writer)

    def poll(self):
        if self.returncode is None:
            self.returncode = self._server.ask({"pid": self.pid})
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(9)

    def communicate(self, timeout=900):
        """(standard out, standard error) to their ends."""
        told, until = ["", ""], time.monotonic() + timeout

        def read(place, pipe):
            with pipe:
                told[place] = pipe.read()

        readers = [
            threading.Thread(target=read, args=each, daemon=True)
            for each in enumerate((self.stdout, self.stderr))
            if not each[1].closed
        ]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join(until - time.monotonic())
        while self.poll() is None or any(reader.is_alive() for reader in readers):
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(0.01)
        return tuple(told)


def serve(asked):
    """Answer requests until the other end is closed: the id of a new process, or the exit status of
    one, None while it runs."""
    while True:
        data, files, *_ = socket.recv_fds(asked, 1 << 16, 2)
        if not data:
            return
        what = json.loads(data)
        if "pid" in what:
            ended, status = os.waitpid(what["pid"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if ended else None
        elif not (answer := os.fork()):
            asked.close()
            for number, file in enumerate(files, 1):
                os.dup2(file, number)
                os.close(file)
            os.environ |= what["environment"]
            sys.argv = ["qmx", *what["words"]]
            from one_block import run

            run()
        for file in files:
            os.close(file)
        asked.send(json.dumps(answer).encode())


if __name__ == "__main__":
    sys.path.append(str(ROOT / "benchmarks"))
    from fault_signals import MODULES

    for module in (*ALSO, *MODULES):
        importlib.import_module(module)
    VITS = importlib.import_module("qmx.models.vit").VITS
    small_vit = importlib.import_module("small_vit")
    VITS[small_vit.NAME] = small_vit.SMALL
    gc.set_threshold(20_000)  # as in conftest.py
    gc.freeze()
    serve(socket.socket(fileno=int(sys.argv[1])))

"""Kill a client in the middle of batches that a server answers: is an answer lost, or an image paid
for twice?

    python benchmarks/served_kills.py --kills=50

The server of tests/targets/oip_server.py runs on loopback and writes down every image that it is
sent. A process asks it through a ledger, batch by batch, and is killed (SIGKILL) at a random moment
after its first request arrived, again and again; then one is left to end. After each kill every
answer that was there before must still be there and be right, and at most one batch more may be on
record as sent and not answered. In the end no image may have been sent more often than once, and
once more for each kill that came while it was in flight. Prints JSON; status 1 if anything was
otherwise.
"""

import argparse
import collections
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from qmx.ledger import Ledger
from qmx.targets import served

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests/targets"))
from oip_server import scores_of  # noqa: E402

BATCH = 8
SETTLE = 0.05  # seconds after a kill in which the server reads what had been sent


def ask(ledger: Path, url: str, images: np.ndarray) -> None:
    """Do all that a client does, from the connection on."""
    found = served.connect(url, "digits", shape=images.shape[1:], classes=10)
    with Ledger(ledger, target=found.sha256) as opened:
        opened.ask(found.query, images, batch_size=BATCH)


def start(work) -> int:
    """Run `work` in a process of its own; returns its id. A fork, so that fifty of them need not
    import jax."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return child


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument(
        "--delay", type=float, default=0.01, help="seconds that the server takes for a batch"
    )
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    draw = random.Random(given.seed)
    # A kill comes within three batches, so that there is always something left to ask.
    images = np.random.default_rng(given.seed).integers(
        0, 256, (given.kills * 3 * BATCH, 8, 8, 1), np.uint8
    )
    right = scores_of(images)
    lost = wrong = in_flight = kills_in_flight = 0
    # Of each image, the kills that came while it was in flight.
    excused = collections.Counter[str]()
    with tempfile.TemporaryDirectory() as folder:
        log, path = Path(folder) / "log", Path(folder) / "ledger.sqlite"
        server = subprocess.Popen(
            [
                sys.executable,
                ROOT / "tests/targets/oip_server.py",
                f"--log={log}",
                f"--delay={given.delay}",
            ],
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert server.stdout
            url = f"http://127.0.0.1:{server.stdout.readline().strip()}"
            target = served.connect(url, "digits", shape=images.shape[1:], classes=10).sha256

            def sent() -> list[str]:
                return [
                    digest for line in log.read_text().splitlines() for digest in line.split()[2:]
                ]

            def answered() -> tuple[set[int], int, int]:
                """The images with an answer, how many of these are wrong, and how many were sent
                without one."""
                with Ledger(path, target=target) as ledger:
                    missing = set(ledger.unanswered(images))
                    have = [row for row in range(len(images)) if row not in missing]
                    bad = (ledger.read(images[have]) != right[have]).any(1).sum() if have else 0
                    return set(have), int(bad), ledger.account().unanswered

            have: set[int] = set()
            for _ in range(given.kills):
                before, were = len(sent()), have
                child = start(lambda: ask(path, url, images))
                while len(sent()) == before:
                    time.sleep(0.001)
                time.sleep(draw.uniform(0, 2 * given.delay))
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                time.sleep(SETTLE)
                have, bad, unanswered = answered()
                lost, wrong = lost + len(were - have), wrong + bad
                new = unanswered - in_flight
                wrong += new not in (0, BATCH)
                in_flight, kills_in_flight = unanswered, kills_in_flight + (new > 0)
                excused.update(collections.Counter(sent()[before:][len(have) - len(were) :]))
            os.waitpid(start(lambda: ask(path, url, images)), 0)
            have, bad, unanswered = answered()
            lost, wrong = lost + len(images) - len(have), wrong + bad
            twice = sum(
                max(times - 1 - excused[digest], 0)
                for digest, times in collections.Counter(sent()).items()
            )
            again = len(sent()) - len(images)
        finally:
            server.kill()
            server.wait()
    print(
        json.dumps(
            {
                "kills": given.kills,
                "kills_with_a_batch_in_flight": kills_in_flight,
                "images": len(images),
                "answers_lost": lost,
                "answers_wrong": wrong,
                "sent_twice_beyond_the_batch_in_flight": twice,
                "on_the_account_as_in_flight": unanswered,
                "sent_again_after_a_kill": again,
            }
        )
    )
    return 1 if lost or wrong or twice or again > unanswered or unanswered != in_flight else 0


if __name__ == "__main__":
    sys.exit(main())

"""The command `qmx`, and `python -m qmx`."""

import sys
from typing import NoReturn

from qmx.signals import end_on_signals


def run() -> NoReturn:
    """Run the command line; ends the process."""
    with end_on_signals():
        from qmx.main import main  # the imports below it take a second

        sys.exit(main(sys.argv))


if __name__ == "__main__":
    run()

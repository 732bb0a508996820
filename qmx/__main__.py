"""The command `qmx`, and `python -m qmx`: a run, or `compare` of two."""

import sys
from typing import NoReturn

from qmx.signals import end_on_signals


def run() -> NoReturn:
    """Run the command line; ends the process."""
    with end_on_signals():
        if sys.argv[1:2] == ["compare"]:
            from qmx.report import compare

            sys.exit(compare.main(sys.argv[2:]))
        from qmx.main import main  # the imports below it take a second

        sys.exit(main(sys.argv))


if __name__ == "__main__":
    run()

"""`python -m qmx`, the same as the command `qmx`."""

from qmx.main import run

if __name__ == "__main__":
    run()

"""The command: flags, devices, one call into the pipeline.

python -m qmx.main --config=configs/digits.py --workdir=runs/digits
"""

import difflib
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, FrozenConfigDict, config_flags

CONFIG = config_flags.DEFINE_config_file("config", None, "the config, a Python file", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "where everything is written and found again")
STAGE = flags.DEFINE_string("stage", "all", "all, or one of: target pretrain select query distill evaluate report")
UPDATE = flags.DEFINE_bool("update", False, "accept a workdir of another config: keep what fits, redo the rest")

DONE, MISTAKE, SPENT, STOPPED = 0, 2, 3, 75  # exit statuses

# XLA hands convolutions on CPUs to a library that runs several shapes on one core; this gives them
# back to Eigen, which takes all cores: about 1.8 times the speed on two.
CONVOLUTIONS_ON_ALL_CORES = "--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"


def set_xla_flags() -> None:
    """Before the first computation, and never over what the user set."""
    given = os.environ.get("XLA_FLAGS", "")
    if "xla_cpu_experimental_ynn_fusion_type" not in given:
        os.environ["XLA_FLAGS"] = f"{given} {CONVOLUTIONS_ON_ALL_CORES}".strip()


def main(argv: list[str]) -> int:
    """Run what the command line says; returns the exit status. Mistakes are one line, no traceback."""
    try:
        config, workdir = parse(argv)
    except Exception as error:  # absl, ml_collections and the config file raise what they like
        return fail(explain(error), MISTAKE)

    from qmx.oracle import BudgetSpent
    from qmx.train import Stopped

    try:
        text = start(config, workdir)
    except BudgetSpent as error:
        return fail(str(error), SPENT)
    except Stopped as error:
        return fail(f"{error}; run the same command again to go on", STOPPED)
    except (ValueError, LookupError, FloatingPointError, OSError) as error:
        return fail(explain(error), MISTAKE)
    print(text)
    return DONE


def parse(argv: list[str]) -> tuple[FrozenConfigDict, Path]:
    """The config with its overrides, and the workdir; raises ValueError and whatever absl raises."""
    try:
        rest = flags.FLAGS(argv)
    except AttributeError:
        raise ValueError(unknown_key(argv)) from None
    if len(rest) > 1:
        raise ValueError(f"{rest[1]!r} is no flag; write --config.key=value")
    if CONFIG.value is None or not WORKDIR.value:
        raise ValueError("--config=FILE.py and --workdir=DIRECTORY are needed, as in "
                         "python -m qmx.main --config=configs/digits.py --workdir=runs/digits")
    return FrozenConfigDict(CONFIG.value), Path(WORKDIR.value).absolute()


def unknown_key(argv: list[str]) -> str:
    """Which --config.key=value names no key, and which key may have been meant."""
    known = dict(_keys(flags.FLAGS["config"].value))
    given = [word.lstrip("-").partition("=")[0].partition(".")[2] for word in argv if word.startswith("--config.")]
    wrong = next((key for key in given if key not in known), "?")
    close = difflib.get_close_matches(wrong, known, 1, cutoff=0.5)
    return f"unknown config key {wrong!r}" + (f"; did you mean {close[0]!r}?" if close else "")


def _keys(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        yield prefix + key, value
        if isinstance(value, ConfigDict):
            yield from _keys(value, f"{prefix}{key}.")


def start(config: FrozenConfigDict, workdir: Path) -> str:
    """Check everything, then run; returns the text for standard out."""
    set_xla_flags()
    import jax

    from qmx import data, pipeline
    from qmx.progress import say
    from qmx.settings import validate
    from qmx.workdir import claim

    if STAGE.value not in ("all", *pipeline.STAGES):
        raise ValueError(f"--stage={STAGE.value} is unknown; choose one of all, {', '.join(pipeline.STAGES)}")
    images = data.load(config.data.source, config.data.path, config.data.eval_path)
    validate(config, images)
    pipeline.check_budget(config, workdir, images)
    claim(workdir, json.loads(config.to_json()), UPDATE.value)
    say(f"{jax.device_count()} {jax.devices()[0].platform} device(s), jax {jax.__version__}; writing to {workdir}")
    return pipeline.run(config, workdir, images, STAGE.value, stop_on_signals())


def stop_on_signals() -> Callable[[], bool]:
    """A function that says whether SIGTERM or SIGINT came; the second one ends the program at once."""
    seen: list[int] = []

    def remember(number: int, frame: object) -> None:
        seen.append(number)
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, remember)
    return lambda: bool(seen)


def explain(error: BaseException) -> str:
    """An error in one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) < 500 else text[:500] + " ..."


def fail(message: str, status: int) -> int:
    """One line on standard error; returns the status."""
    print(f"qmx: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv))

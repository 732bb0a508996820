"""qmx: how few queries does it take to copy an image classifier?

  qmx --config=digits --workdir=runs/digits
  python -m qmx.main --config=configs/digits.py --workdir=runs/digits

  --config=NAME[:WORDS]        what to run: a config of qmx's own, or FILE.py[:WORDS]
  --config.KEY=VALUE           another value for one key, as in --config.pretrain.moco.epochs=80
  --workdir=DIRECTORY          where everything is written, and found again by a second call
  --stage=STAGE                one stage; default all
  --update                     accept a workdir of another config or version: keep what fits, redo
                               the rest, however long it took
  --update=same-target         the same; and the target, whose file or server changed, is still the
                               model that was asked: go on with its answers
  --update=new-target          the same; and it is another model: ask it everything
  --keys                       print every key with its default and its remark
  --coordinator=HOST:PORT --processes=P --process=I
                               one of several processes that run as one, the same command in each;
                               SLURM and Open MPI need none of the three, Kubernetes --processes=-1

Stages, in their order:

  target      train the target, or look at the one that is given
  pretrain    train encoders without labels, or read the ones that are given
  monitor     measure how good the encoders' features are
  select      choose the images to ask about
  query       ask the target about them, within the budget
  distill     train a student for each cell of the table
  evaluate    compare each student with the labels and with the target
  report      print the answer and the table, and write the report, the curve and results.json

Exit status: 0 done; 2 a mistake, told in one line; 3 the budget is spent; 75 stopped by a signal
after saving, or the target is busy: the same command goes on; 130 and 143 ended at once by a
signal.
"""

import sys

from qmx.signals import end_on_signals, stop_on_signals

if __name__ == "__main__":  # the imports below take a second, in which it can be stopped
    with end_on_signals():
        from qmx.main import main as run

        sys.exit(run(sys.argv))

import difflib
import json
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

from absl import flags
from ml_collections import ConfigDict, FrozenConfigDict, config_flags

from qmx import keys
from qmx.settings import leaves
from qmx.shipped import Derive, derivation, load_file, own_configs, with_files
from qmx.terminal import DONE, MISTAKE, explain, fail, show


class Arguments(NamedTuple):
    """The command line, read."""

    config: FrozenConfigDict
    workdir: Path
    stage: str
    coordinator: str
    processes: int
    process: int
    update: str
    command: str
    derive: Derive  # values of keys that depend on the images and the device


# What --help shows of the keys.
MOST_USED = (
    "queries",
    "fractions",
    "budget",
    "inits",
    "seeds",
    "selects",
    "accesses",
    "data.source",
    "data.path",
    "data.eval_path",
    "target.kind",
    "target.path",
    "student.arch",
    "pretrain.moco.epochs",
)

SPENT, LATER = 3, 75  # exit statuses, beside those of qmx/terminal.py

LESS_MEMORY = (
    "lower data.limit (images, 0 is all), data.crop or data.canvas (pixels), or target.batch_size"
    " of a target elsewhere"
)

# What may be said of a workdir of something else, by --update or --update=WORD.
UPDATES = ("", "keep", "same-target", "new-target")

# XLA hands convolutions on CPUs to a library that runs several shapes on one core; this gives them
# back to Eigen, which takes all cores: about 1.8 times the speed on two.
CONVOLUTIONS_ON_ALL_CORES = (
    "--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"
)


def set_xla_flags() -> None:
    """Before the first computation, and never over what the user set."""
    given = os.environ.get("XLA_FLAGS", "")
    if "xla_cpu_experimental_ynn_fusion_type" not in given:
        os.environ["XLA_FLAGS"] = f"{given} {CONVOLUTIONS_ON_ALL_CORES}".strip()


def main(argv: list[str]) -> int:
    """Run what the command line says; returns the exit status. Mistakes are one line, no
    traceback."""
    if {"--help", "-h"} & set(argv):
        return show(usage())
    if "--keys" in argv:
        return show(keys.listing())
    try:
        arguments = parse(with_files(argv))
    # absl, ml_collections and the config file raise what they like.
    except (Exception, SystemExit) as error:
        return fail(explain(error), MISTAKE)

    from qmx.ledger import BudgetSpent, Unavailable
    from qmx.sharding import first
    from qmx.train import Stopped

    try:
        with settings_given_back():
            text = start(arguments)
    except BudgetSpent as error:
        return fail(str(error), SPENT)
    except Stopped as error:
        return fail(f"{error}; run the same command again to go on", LATER)
    except (ValueError, LookupError, FloatingPointError, OSError) as error:
        # Their subclasses tell of more than a target that is busy, as of an address of nobody.
        passing = type(error) in (Unavailable, ConnectionError)
        return fail(explain(error), LATER if passing else MISTAKE)
    except MemoryError as error:
        text = explain(error) if str(error) else "out of memory"  # a stage names its own keys
        return fail(text if "; lower " in text else f"{text}; {LESS_MEMORY}", MISTAKE)
    except SystemExit as error:  # of a file of the user's
        return fail(f"the target's own code ended the program, by sys.exit({error.code})", MISTAKE)
    return show(text) if first() else DONE


def parse(argv: list[str]) -> Arguments:
    """The config with its overrides, and the other flags; raises ValueError and whatever absl
    raises."""
    for word in argv[1:]:
        if word.startswith("--config="):
            check_overrides(load_file(word.partition("=")[2]), argv)
    values = flags.FlagValues()  # of this call alone
    config = config_flags.DEFINE_config_file(
        "config",
        None,
        "the config, a Python file",
        flag_values=values,
        lock_config=True,
        sys_argv=argv,
    )
    text = partial(flags.DEFINE_string, flag_values=values)
    number = partial(flags.DEFINE_integer, flag_values=values)
    text("workdir", None, "where everything is written and found again")
    text("stage", "all", "all, or one stage, see --help")
    text("coordinator", "", "HOST:PORT of the first of several processes")
    number("processes", 0, "how many processes there are; -1 in a Kubernetes job")
    number("process", -1, "which of them this is, from 0 on")
    text("update", "", "accept a workdir of another config: keep what fits")
    rest = values(["--update=keep" if word == "--update" else word for word in argv])
    if len(rest) > 1:
        raise ValueError(f"{rest[1]!r} is no flag; write --config.key=value")
    if config.value is None or not values.workdir:
        raise ValueError(
            "--config=NAME, or FILE.py, and --workdir=DIRECTORY are needed, as in "
            "python -m qmx.main --config=digits --workdir=runs/digits"
        )
    if values.update not in UPDATES:
        raise ValueError(f"--update={values.update} is none of {', '.join(UPDATES[1:])}")
    return Arguments(
        FrozenConfigDict(config.value),
        Path(values.workdir).absolute(),
        values.stage,
        values.coordinator,
        values.processes,
        values.process,
        values.update,
        shlex.join(["qmx", *argv[1:]]),
        derivation(argv),
    )


def usage() -> str:
    """The text of --help."""
    names = ", ".join(sorted(own_configs()))
    return (
        f"{__doc__}\nConfigs: {names}\n\nKeys that are used most (all of them: --keys):\n\n"
        f"{keys.most_used(MOST_USED)}"
    )


def check_overrides(config: ConfigDict, argv: list[str]) -> None:
    """Raise ValueError for a --config.key=value whose key the config does not have."""
    known = dict(leaves(config))
    for word in argv:
        key = word.partition("=")[0].partition(".")[2]
        if word.startswith("--config.") and key not in known:
            close = difflib.get_close_matches(key, known, 1, cutoff=0.5)
            raise ValueError(
                f"unknown config key {key!r}" + (f"; did you mean {close[0]!r}?" if close else "")
            )


@contextmanager
def settings_given_back() -> Iterator[None]:
    """On leaving, jax's settings and the flags for XLA are as they were."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    names = ("jax_enable_x64", "jax_compilation_cache_dir")
    before = {name: jax.config.values[name] for name in names}
    given = os.environ.get("XLA_FLAGS")
    try:
        yield
    finally:
        if jax.config.values["jax_compilation_cache_dir"] != before["jax_compilation_cache_dir"]:
            compilation_cache.reset_cache()  # it holds its directory open
        for name, value in before.items():
            jax.config.update(name, value)
        os.environ.pop("XLA_FLAGS", None)
        if given is not None:
            os.environ["XLA_FLAGS"] = given


def start(arguments: Arguments) -> str:
    """Check everything, then run; returns the text for standard out."""
    set_xla_flags()
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    from qmx import data, pipeline, sharding
    from qmx.cautions import warnings
    from qmx.checks import check_trainers, check_values, validate
    from qmx.progress import say
    from qmx.stages.query import check_budget
    from qmx.targets import function
    from qmx.workdir import claim, locked

    config, workdir, stage = arguments.config, arguments.workdir, arguments.stage
    if stage not in ("all", *pipeline.STAGES):
        raise ValueError(
            f"--stage={stage} is unknown; choose one of all, {', '.join(pipeline.STAGES)}"
        )
    if "float64" in (config.student.dtype, config.target.precision):
        jax.config.update("jax_enable_x64", True)
    check_values(config)
    function.forget()  # what an earlier call of this process loaded
    sharding.connect(arguments.coordinator, arguments.processes, arguments.process)
    images = data.load(**config.data)
    config = arguments.derive(config, images.pool.size, jax.default_backend())
    check_values(config)
    if stage != "pretrain":
        images = pipeline.of_targets_classes(config, images)
    validate(config, images, stage)
    if stage not in ("all", "target", "pretrain", "monitor", "select") and not workdir.exists():
        raise ValueError(
            f"--stage={stage} needs what earlier stages leave in {workdir}, and it does not exist"
        )
    if stage != "pretrain":
        check_budget(config, workdir, images)
    wanted, free = json.loads(config.to_json()), pipeline.free_keys(config)
    # Else it was done before; it takes seconds for a large network.
    if not pipeline.checked(workdir, wanted, free, stage):
        pipeline.check_weights(config, images, stage, begun=(workdir / "target").exists())
        check_trainers(config, images, stage)
    with locked(workdir):
        pipeline.open_images(images, workdir)
        claim(workdir, wanted, bool(arguments.update), say, free)
        # So that a call after a kill compiles nothing anew.
        if jax.config.values["jax_compilation_cache_dir"] is None:
            jax.config.update("jax_compilation_cache_dir", str(workdir / "compiled"))
            compilation_cache.reset_cache()  # what was compiled before would have ruled it out
        several = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
        devices = f"{jax.device_count()} {jax.devices()[0].platform} device(s){several}"
        say(f"{devices}, jax {jax.__version__}; writing to {workdir}")
        for warning in warnings(config, images, stage):
            say(f"warning: {warning}")
        with stop_on_signals(say) as stopped:
            said = arguments.update, arguments.command
            return pipeline.run(config, workdir, images, stage, stopped, *said)

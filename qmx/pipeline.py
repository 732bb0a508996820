"""target -> pretrain -> monitor -> select -> query -> distill -> evaluate -> report.

Each stage leaves an artefact in the workdir and is skipped when the same inputs already made it:

    target/                       the target's weights
    pretrain/<init>-seed<s>/      an encoder
    monitor/<init>-seed<s>/       what its features are good for
    pretrain/<init>/              one that was brought along; select/ and evaluate/features-<init>/
                                  have its features
    select/<way>-<queries>-seed<s>/   the pool's images that are asked about; to choose by answers
                                      (margin, entropy) this stage asks the target too, all rounds
                                      but the last
    query/                        the rest is asked; the ledger's keys of all images asked about
    ledger.sqlite                 every answer of the target
    distill/<cell>/               a student
    evaluate/<cell>/              its row of the table
    results.json report.md report.html curve.png report.sha256, at the end and, of what is done so
                                  far, after a student
    config.json lock              what it was made with, and who works in it
    target.json account.json trial.json   by what name the ledger knows the target, its calls so
                                  far, and whether its first answers were good
    photos/                       the photos that were found good

Each has inputs.json, result.json and SHA256SUMS, which is written last.
`qmx/stages/` holds them in this order.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from qmx.data import Dataset, named, open_photos, opened
from qmx.data.named import with_names
from qmx.files import SUMS, Unreadable
from qmx.grid import HEADS, Cell, cells, encoders, frozen, teacher
from qmx.progress import counted, progress, say
from qmx.sharding import from_first
from qmx.stages import outside, recorded
from qmx.stages.answers import afford
from qmx.stages.distill import distill
from qmx.stages.evaluate import evaluate
from qmx.stages.features import evaluation_features, features, taught
from qmx.stages.live import live
from qmx.stages.monitor import monitor
from qmx.stages.pretrain import check as check_encoder
from qmx.stages.pretrain import pretrain
from qmx.stages.query import query
from qmx.stages.report import report
from qmx.stages.run import Run, handed_on, needed
from qmx.stages.select import chosen_by_features, chosen_up_front, select
from qmx.stages.target import converted as converted_target
from qmx.stages.target import target as target_stage
from qmx.stages.target_name import end_new
from qmx.stages.trial import trial
from qmx.stages.zero import check as check_zero
from qmx.stages.zero import zero
from qmx.targets import onnx_file
from qmx.workdir import NotDone, changed_keys

FREE = ("budget", "price", "save_minutes", "tensorboard")
STAGES = ("target", "pretrain", "monitor", "select", "query", "distill", "evaluate", "report")


def run(
    config: Any,
    directory: Path,
    data: Dataset,
    only: str,
    stopped: Callable[[], bool],
    update: str = "",
    command: str = "",
) -> str:
    """All stages, or one; returns the text for standard out.

    Each stage is given the artefacts that it reads. One that is not this call's to do is read from
    the workdir; the reason stands in its place where it is missing, and whoever needs it raises it.

    Raises:
      BudgetSpent: before the target is asked more than the budget allows.
      Stopped, FloatingPointError: see `qmx.train.fit`.
      NotDone: one stage was asked for whose inputs are missing.
      ValueError: weights that do not fit; found before anything is trained.
    """
    call = Run(config, directory, data, only, stopped, [], update, command)
    starts = [(init, seed) for init in encoders(config) for seed in config.seeds]
    # Files that are brought along come first: a wrong one is found before anything is trained.
    brought = [start for start in starts if config.pretrain[start[0]].path]
    encoder = {start: handed_on(call, pretrain, *start) for start in brought}
    if only != "pretrain":  # which needs a pool and nothing else
        target = handed_on(call, target_stage)
        call = trial(call, target)
        if only == "all" and not all(trained(directory, *start) for start in starts):
            # What features and answers choose is not known yet.
            afford(call, needed(target), data.pool, chosen_up_front(config, data))
    lessons = {
        init: handed_on(call, taught, encoder[name, config.seeds[0]])
        for init in encoders(config)
        if (name := teacher(config, init))
    }
    encoder |= {
        start: handed_on(call, pretrain, *start, lessons.get(start[0]))
        for start in starts
        if start not in brought
    }
    if only == "pretrain":
        said_done(call)
        paths = [str(one.path) for one in encoder.values() if not isinstance(one, NotDone)]
        return "\n".join([*paths, "qmx.load_encoder reads them; python -m qmx.embed uses them"])
    grid = cells(config, data.pool.size)
    # Cells whose images are chosen, or whose answers are spread, by features of their encoder, and
    # heads on them. A network that learned another encoder's features has these for it: they are
    # the better ones, and whoever ships the small network had the other.
    heads = {cell.start for cell in grid if cell.use in HEADS.values()}
    by_features = heads | {
        cell.start
        for cell in grid
        if chosen_by_features(cell, data.pool.size) or cell.use == "pool"
    }
    learns = {start: teacher(config, start[0]) for start in starts}
    feature = {
        start: handed_on(call, features, encoder[start])
        for start in starts
        if frozen(config, start[0]) or (start in by_features and not learns[start])
    }
    looks = {
        start: handed_on(call, monitor, encoder[start], feature.get(start)) for start in starts
    }
    feature |= {
        start: feature[learns[start], start[1]] for start in by_features if learns.get(start)
    }
    shown = {
        start: handed_on(call, evaluation_features, encoder[start])
        for start in starts
        if start in heads
    }
    chosen = {cell: handed_on(call, select, cell, feature.get(cell.start), target) for cell in grid}
    answers = handed_on(call, query, target, chosen.values())  # the last that sees the target
    if only == "query":
        end_new(call)
    unasked = handed_on(call, zero, answers)
    pairs = [encoder[start] for start in starts], [looks[start] for start in starts]
    rows: dict[Cell, dict | NotDone] = {}

    def row(call: Run, cell: Cell) -> dict | NotDone:
        made = encoder.get(cell.start), feature.get(cell.start), chosen[cell], answers
        student = handed_on(call, distill, cell, *made)
        both = feature.get(cell.start), shown.get(cell.start)
        return handed_on(call, evaluate, cell, student, *both, chosen[cell], answers)

    def so_far() -> None:
        reader = call._replace(only="report")
        known = [rows.get(cell) or row(reader, cell) for cell in grid]
        report(reader, target, *pairs, chosen, answers, known)

    page = live(so_far)
    count = counted("student", len(grid))
    if only == "all" and call.made:
        page()
    for cell in grid:
        before = len(call.made)
        rows[cell] = row(call, cell)
        count(len(call.made) > before)
        if only == "all" and len(call.made) > before and cell != grid[-1]:
            page()
    said_done(call)
    if only not in ("all", "report"):
        return f"stage {only} is done; --stage=report shows where things stand"
    if only == "all":
        end_new(call)
    return report(call, target, *pairs, chosen, answers, [rows[cell] for cell in grid], unasked)


def trained(directory: Path, init: str, seed: int) -> bool:
    """True if there is an encoder of this name, whatever it was made with."""
    names = (f"{init}-seed{seed}", init)  # the second is one that was brought along
    return any((directory / "pretrain" / name / SUMS).exists() for name in names)


def said_done(run: Run) -> None:
    """Tell the user if nothing was left to do."""
    if not run.made:
        say(f"all of it was done before, in {run.workdir}; nothing was trained or asked")


def open_images(data: Dataset, directory: Path) -> None:
    """Open every photo that the stages will read, and say what is odd.

    Raises:
      ValueError: some cannot be read; it names them, and the way to leave them out.
    """

    def look() -> list[str]:
        with progress("photos opened", total, unit="photos") as shown:
            return open_photos(data, directory / "photos", shown.update)

    if total := opened.count(data):
        for line in from_first(look):
            say(line)


def of_targets_classes(config: Any, data: Dataset) -> Dataset:
    """The images with their labels numbered as the target's classes: by `target.classes`, or by the
    names in an ONNX file's metadata, if they are those of the images' classes."""
    if config.target.classes:
        return named(data, config.target.classes)
    if config.target.kind != "onnx" or not Path(config.target.path).is_file():
        return data
    names = onnx_file.class_names(config.target.path)
    where = f"the metadata of {config.target.path}"
    if not names or (not data.class_names and data.classes):
        return data  # labels that are numbers are the target's already
    try:
        return with_names(data, names, where)
    except ValueError as error:
        say(f"{error}; until then classes are taken in the order of their folders")
        return data


def free_keys(config: Any) -> tuple[str, ...]:
    """Keys of the command line that may change in a workdir: no result depends on them."""
    elsewhere = config.target.kind in outside.KINDS
    return FREE + tuple(f"target.{key}" for key in outside.FREE if elsewhere)


def checked(workdir: Path, config: dict, free: tuple[str, ...], stage: str) -> bool:
    """True if an earlier call checked the same: one with this config that looked at the target, if
    this one will."""
    try:
        same = not changed_keys(workdir, config, free)
    except Unreadable:
        return False
    return same and (stage == "pretrain" or (workdir / "target").exists())


def check_weights(config: Any, data: Dataset, stage: str = "all", begun: bool = False) -> None:
    """Raise ValueError for weights files that the config names and that do not fit, or a target
    elsewhere that does not, and Unavailable if it is not there; nothing is written. For the stage
    pretrain no target is looked at; nor is one elsewhere once the workdir is `begun`, for its
    answers may be all that is left of it."""
    kind = "" if stage == "pretrain" else config.target.kind
    if kind in outside.KINDS and not begun:
        outside.describe(config.target, data)
    if kind == "recorded":
        recorded.refuse_missing(config, data, chosen_up_front(config, data))
    if kind == "torch":
        converted_target(config.target, data)
    if stage != "pretrain":
        check_zero(config)
    for init in encoders(config):
        if config.pretrain[init].path:
            check_encoder(config, init, data)

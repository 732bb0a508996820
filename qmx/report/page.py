"""The report as one HTML file: no script, nothing from elsewhere, every text escaped."""

from collections.abc import Sequence
from pathlib import Path

from qmx.report.audit_tables import (
    access_table,
    class_table,
    effort_table,
    largest_table,
    limits_note,
    origin,
    scope,
    seeds_table,
    standards_table,
    strongest_table,
    unknown_limits,
)
from qmx.report.beyond import beyond_table
from qmx.report.evidence import detection_note, detection_table, watermark_table
from qmx.report.pictures import Picture
from qmx.report.reach import ranked
from qmx.report.svg import drawn
from qmx.report.tables import Table, label

GLOSSARY = (
    ("Model, or target", "the image classifier under audit."),
    ("Copy, or student", "a network trained on the model's answers."),
    ("Query", "one image whose answer is asked for. The same image asked again is not another."),
    ("Pool", "the unlabelled images that the attacker has and may ask about."),
    ("Accuracy", "share of the evaluation images whose true class is named first (top-1)."),
    ("Fidelity", "share of the evaluation images for which copy and model name the same class."),
    ("Top-5", "the same where the class is among the first five."),
    ("KL", "divergence of the copy's probabilities from the model's, in nats; 0 is the same."),
    ("Attack", "what the copy starts from + how images are chosen + which answers + what it uses."),
    (
        "none, moco, simsiam, public, ...",
        "what a copy starts from: nothing, one's own pretraining, or an encoder of others.",
    ),
    ("random, typiclust, maxherding, ...", "how the images to ask about are chosen."),
    ("logits, probs, label, ...", "how much of an answer is seen."),
    (
        "+ pool, + fixmatch (in an attack's name)",
        "the copy also learns from the pool's other images, which were not asked about.",
    ),
    ("Seed", "one repetition with other random numbers. Intervals span the seeds."),
    ("Calibration error", "how far confidence and accuracy are apart on average (15 bins)."),
    ("PRADA", "a detector: are a class's queries as far from each other as honest ones are?"),
    ("MMD", "a detector: are the last queries distributed as honest ones are?"),
    ("Watermark, trigger images", "images that only the model, or a copy, answers in a set way."),
    ("Control, true_labels", "a student of the same images that learned from true labels."),
    ("Principal", "an account, key or address to which a limit applies."),
)

REFRESH = 15  # seconds after which the page of a run that goes on is read again


def page(results: dict, tables: list[Table], notes: list[str], pictures: Sequence[Picture]) -> str:
    """Text of report.html; `results` holds plain text, see `qmx.report.safe`."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["narrow"] = narrow
    audit = results["audit"]
    template = environment.from_string(Path(__file__).with_name("page.html").read_text("utf-8"))
    order = [label(column, results) for column in ranked(results)]
    turned = [transposed(table, order) for table in tables]
    return template.render(
        model=results["config"]["audit"]["model"] or results["target"]["name"],
        audit=audit,
        finished=results["finished"],
        refresh=REFRESH,
        # Drawn from numbers and from words of the grid, which the drawing escapes.
        curves={name: Markup(svg) for name, svg in drawn(results).items()},
        beyond=beyond_table(results),
        strongest=strongest_table(results),
        effort=effort_table(results),
        limits_note=limits_note(results),
        largest=largest_table(results),
        unknown=unknown_limits(results),
        access=access_table(results),
        main_tables=[first_figure(table) for table in turned[:2]],
        more_tables=turned,
        detection=detection_table(audit["detection"]),
        detection_note=audit["detection"] and detection_note(audit["detection"]),
        watermark=watermark_table(results),
        classes=class_table(results),
        seeds=seeds_table(results),
        notes=notes,
        pictures=pictures,
        scope=scope(results),
        standards=standards_table(results),
        glossary=GLOSSARY,
        origin=origin(results),
    )


def narrow(cell: str) -> str:
    """A cell's text that breaks, where it must, before a sign and not behind it."""
    return cell.replace("± ", "±\u00a0").replace(" %", "\u00a0%").replace(" *", "\u00a0*")


def transposed(table: Table, order: list[str]) -> Table:
    """A table with a row for each attack, in the order given; others stay as they are."""
    if table.header[1:] and not set(table.header[1:]) <= set(order):
        return table
    columns = list(zip(table.header, *table.rows, strict=True))
    head, *rest = columns
    rest.sort(key=lambda column: order.index(column[0]))
    return Table(table.title, ["attack", *head[1:]], [list(column) for column in rest])


def first_figure(table: Table) -> Table:
    """A table of "top-1 / top-5" with the first of the two alone."""

    def first(cell: str) -> str:
        one, slash, rest = cell.partition(" / ")
        return one + (" *" if slash and rest.endswith("*") else "")

    rows = [[row[0], *map(first, row[1:])] for row in table.rows]
    return Table(table.title.replace(", top-1 / top-5,", ", top-1,"), table.header, rows)

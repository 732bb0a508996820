"""The report from figures made by hand: its answer, its audit block, its page, two compared."""

import base64
import copy
import html.parser
import io
import json
import math
import re

import jsonschema
import numpy as np
import pytest
from conftest import ROOT
from ml_collections import ConfigDict
from PIL import Image

from qmx.files import write_json
from qmx.report import compare, files, safe
from qmx.report.answer import answer, next_steps
from qmx.report.audit import audit
from qmx.report.audit_tables import rounded_down, standards_table
from qmx.report.curve import curve
from qmx.report.limits import largest_limits
from qmx.report.notes import account_notes, pool_notes
from qmx.report.pictures import picture
from qmx.report.reach import reached
from qmx.report.svg import drawn
from qmx.report.tables import looked_at, spent
from qmx.settings import base

SCHEMA = json.loads((ROOT / "qmx/report/results.schema.json").read_text())
DIGEST = "0f" * 32
# Fidelity by queries, for each seed; the accuracy is two less, that of the model 98.
CURVES = {
    "none": ({10: 40.0, 100: 80.0, 1000: 96.0}, {10: 50.0, 100: 84.0, 1000: 98.0}),
    "moco": ({10: 70.0, 100: 94.0, 1000: 97.0}, {10: 80.0, 100: 98.0, 1000: 99.0}),
}


def results(changes=None, weak=(), **names):
    """results.json of two attacks, three budgets and two seeds, before its audit is added.

    `weak` are (init, queries) of students that did not learn; `names` replace texts of others.
    """
    config = base()
    config.update(inits=("none", "moco"), seeds=(0, 1), fractions=(), queries=(10, 100, 1000))
    config.update_from_flattened_dict(changes or {})
    rows = [
        {
            **{"init": init, "select": "random", "access": "logits", "use": "asked"},
            **{"fraction": queries / 2000, "seed": seed, "calls": queries + 50},
            "queries": {"train": queries, "select": 0, "report": 50},
            **{
                "top1": fidelity - 2,
                "top5": 99.0,
                "fidelity_top1": fidelity,
                "fidelity_top5": 99.0,
            },
            "kl_target_student": 0.5,
            "fidelity_asked": 60.0 if (init, queries) in weak else 100.0,
            "undertrained": (init, queries) in weak,
            "worst_class": {"class": 1, "fidelity": 30.0, "images": 25},
            **{"seconds": 1.5, "operations": 10**9, "recipe": "distill"},
        }
        for init, curves in CURVES.items()
        for seed, curve in enumerate(curves)
        for queries, fidelity in curve.items()
    ]
    access = {"access": "logits", "top1": 98.0, "top5": 100.0, "calibration_error": 1.5}
    counts = dict.fromkeys(("calls", "images", "views"), 1050)
    found = {
        "schema": 2,
        "finished": True,
        "planned": len(rows),
        "target": {
            **{"name": names.get("target", "a model"), "sha256": DIGEST, "arch": "resnet8"},
            **{"top1": 98.0, "top5": 100.0, "warning": None, "precision": "float32"},
        },
        "pool": {
            **{"name": names.get("pool", "digits"), "size": 2000, "evaluation": 50, "classes": 2},
            "sha256": DIGEST,
            "budgets": [{"queries": n, "fraction": n / 2000} for n in (10, 100, 1000)],
        },
        "rows": rows,
        "account": {
            **counts,
            **dict.fromkeys(("lost", "unanswered", "failed", "retried", "refused"), 0),
            "purposes": {"train": 1000, "select": 0, "report": 50},
        },
        "monitors": [],
        "access": [access],
        "zero_queries": {"top1": 50.0, "fidelity_top1": 52.0, "function": None},
        "agreement": [],
        "provenance": {
            "date": "2026-11-26T12:00:00+00:00",
            "command": names.get("command", "qmx --config=digits --workdir=w"),
            "qmx": "0.2.0",
            "machine": {"system": "Linux", "python": "3.11", "cores": 2, "devices": "1 x cpu"},
            "seconds": {"encoders": 3.0, "students": 18.0},
            "operations": {
                **{"target": None, "encoders": 2 * 10**12, "students": 11 * 10**9},
                **{"trainings": 14, "counted": 13},
            },
            "seeds": [0, 1],
            "sha256": {"config": DIGEST, "code": DIGEST, "ledger": None},
        },
        "versions": {"qmx": "0.2.0", "jax": "0.10"},
        "config": json.loads(ConfigDict(config).to_json()),
    }
    found["reach"] = reached(found)
    by_class = {
        **{"init": "moco", "select": "random", "access": "logits", "use": "asked"},
        **{"queries": 1000, "seeds": 2},
        "classes": [{"class": 1, "name": names.get("class", "b"), "images": 25, "fidelity": 30.0}],
    }
    found["audit"] = audit(found, by_class)
    return found


def crossing(low, high, level, few, many):
    """Queries at which a straight line in the logarithm is at a level."""
    return few * (many / few) ** ((level - low) / (high - low))


def test_answer():
    """The strongest attack, on the mean curve; each seed's own crossing as the interval."""
    found = answer(results())
    middle = crossing(75, 96, 95, 10, 100)
    low, high = crossing(80, 98, 95, 10, 100), crossing(94, 97, 95, 100, 1000)
    assert (found["queries"], found["low"], found["high"]) == pytest.approx((middle, low, high))
    assert found["attack"]["init"] == "moco" and found["seeds"] == 2
    assert found["text"].startswith(
        f"{math.ceil(middle)} queries ({100 * 90 / 2000:.2g} % of the pool) are enough for a copy"
        " that agrees with your model on 95 % of images, by the strongest attack tried (moco;"
        f" {math.ceil(low)} to {math.ceil(high)} over 2 seeds). This is a lower bound on exposure"
    )


def test_a_pool_that_does_harm():
    """The column that learns from the whole pool is compared with its own, row by row."""
    found = results({"also": ("moco+pool",)})
    assert not any("does harm" in note for note in account_notes(found))  # nothing of it was run
    by_queries = {10: 20.0, 100: -1.0, 1000: -2.0}  # points more than those that were asked
    found["rows"] += [
        {**row, "use": "pool", "fidelity_top1": row["fidelity_top1"] + by_queries[spent(row)]}
        for row in found["rows"]
        if row["init"] == "moco"
    ]
    assert [note for note in account_notes(found) if "does harm" in note] == [
        "moco + pool has less fidelity than moco with 100, 1000 queries: what it learns from the"
        " other images does harm there."
    ]


def test_undertrained_students_count_for_nothing():
    """Neither for an answer nor for "not by N queries"; they are marked, and the advice says so.
    One that is the better copy all the same is told, and nothing is called safe."""
    found = results(weak={("moco", 100)})
    # Straight from 10 to 1,000 queries.
    assert found["audit"]["answer"]["queries"] == pytest.approx(crossing(75, 98, 95, 10, 1000))
    weak = results(weak={("moco", 10), ("moco", 100), ("moco", 1000), ("none", 1000)})
    told = weak["audit"]["answer"]
    assert told["queries"] is None and told["attack"]["init"] == "none"
    assert "none, 100 queries, 5 % of the pool) agrees on 82.0 %" in told["text"]
    assert "too little to count (moco, 1000 queries) agrees on 98.0 % already" in told["text"]
    (why,) = {r["why"] for r in weak["audit"]["largest_limits"]}
    assert why.startswith(
        "no attack tried reaches it by 100 queries; a limit of 100 a month for each"
    )
    assert why.endswith("account stops these, and a stronger one may need fewer")
    assert {row["largest"] for row in weak["reach"] if row["init"] == "moco"} == {None}
    assert {row["largest"] for row in weak["reach"] if row["init"] == "none"} == {100}
    assert "marked with *" in next_steps(weak)[0] and "(moco, none)" in next_steps(weak)[0]
    none = results(weak={(init, n) for init in CURVES for n in (10, 100, 1000)})
    assert "no student learned" in none["audit"]["answer"]["text"]
    assert none["audit"]["by_class"] and not any(
        r["queries"] for r in none["audit"]["largest_limits"]
    )


def test_time_and_money():
    """Three limits by hand: 90 queries of one account, and 30 of each of three."""
    limits = {"audit.per_second": 0.5, "audit.per_day": 20, "audit.per_month": 50}
    found = results({**limits, "audit.principals": 3, "price": 2.0})["audit"]
    row = next(
        row
        for row in found["time_to_extract"]
        if (row["measure"], row["share"]) == ("fidelity", 0.95)
    )
    queries = math.ceil(crossing(75, 96, 95, 10, 100))
    assert queries == 90
    # 50 in the first month; of the other 40 two days' 20, the last of them 19 times 2 s later.
    assert row["hours_alone"] == pytest.approx(30 * 24 + 24 + 19 * 2 / 3600)
    # 20 on the first day, ten on the second.
    assert row["hours_pooled"] == pytest.approx(24 + 9 * 2 / 3600)
    assert row["money"] == pytest.approx(0.18) and row["attack"]["init"] == "moco"
    assert found["limits"]["principals"] == 3 and found["limits"]["per_day"] == 20
    unlimited = results()["audit"]["time_to_extract"]
    assert (
        {row["hours_alone"] for row in unlimited} == {None} == {row["money"] for row in unlimited}
    )
    assert {(row["measure"], row["share"]) for row in unlimited} == {
        (measure, share) for measure in ("accuracy", "fidelity") for share in (0.5, 0.75, 0.9, 0.95)
    }


@pytest.mark.parametrize("queries", [3, 35, 200, 2723])
def test_limits_are_rounded_down(queries):
    """At the rate that is printed the last query comes after a month."""
    rate = largest_limits(queries).per_second
    told = float(rounded_down(rate))
    assert 0.9 * rate < told <= rate * (1 + 1e-9)
    assert (queries - 1) / told >= 30 * 86400 - 1e-3
    assert rounded_down(0) == "0" and rounded_down(2.0) == "2" and rounded_down(0.29) == "0.29"


def test_what_did_not_learn_does_no_harm():
    """A column of students that did not learn says nothing of what the pool does."""
    strong = results()
    for row in strong["rows"]:
        row["use"] = "pool" if row["init"] == "moco" else "asked"
        row["fidelity_top1"] = 50.0 if row["use"] == "pool" else 90.0
        row["init"] = "moco"
    strong["config"].update(inits=["moco"], also=["moco+pool"])
    assert "does harm" in pool_notes(strong)[0]
    for row in strong["rows"]:
        row["undertrained"] = row["use"] == "pool"
    assert pool_notes(strong) == []


def test_standards_say_what_is_there():
    """Nothing counts as done that was not measured."""
    found = results()
    told = {row[1]: row[3] for row in standards_table(found).rows}
    assert told["v1.0-C11.3.1"] == told["v1.0-C11.3.3"] == "not measured"
    assert told["AML.T0024.002"] == told["v1.0-C11.2.2"] == "yes"
    found["audit"]["detection"] = {"anything": 1}
    assert {row[1]: row[3] for row in standards_table(found).rows}["v1.0-C11.3.1"] == "yes"


def test_bounds_between_two_reports():
    def row(queries, *bounds):
        return {"queries": queries, "bounds": bounds}

    bound, number = row(10.0, "queries"), row(94.0)
    assert compare._factor(bound, bound) == "" and compare._said(bound) == "at most 10"
    assert compare._factor(bound, number) == "x 9.4 or more"
    assert compare._factor(number, bound) == "x 0.11 or less"
    assert compare._factor(number, number) == "x 1" and compare._factor(number, None) == ""


def test_largest_limits():
    """By hand, of the luckiest seed: 90 % fidelity; and where the budgets cannot say, why."""
    luckiest = math.ceil(crossing(80, 98, 90, 10, 100))
    for principals in (1, 4):
        found = results({"audit.principals": principals})["audit"]["largest_limits"][1]
        each = (luckiest - 1) // principals
        assert found["pooled"] == {
            "per_month": each,
            "per_day": each // 30,
            "per_second": each / (30 * 86400),
        }
        assert found["alone"]["per_month"] == luckiest - 1 and found["why"] is None
    early = results({"audit.below": 0.6})["audit"]["largest_limits"][1]
    assert early["alone"] is None and "10 queries, the smallest budget" in early["why"]
    late = results({"audit.below": 0.999, "audit.principals": 3})["audit"]["largest_limits"][1]
    assert late["alone"] is None and "by 1000 queries; a limit of 333 a month" in late["why"]


# Of the fields that an auditor looks for, the keys that hold them.
FIELDS = {
    "standards": ("standards",),
    "scope and authorisation": ("scope",),
    "attacker": ("attacker",),
    "queries for accuracy and fidelity, with intervals": ("answer", "time_to_extract"),
    "time to extract": ("time_to_extract", "limits"),
    "inverse": ("largest_limits",),
    "leakage by access, and its cost": ("access",),
    "controls": ("controls",),
    "lower bound, and what was not tried": ("not_tried",),
    "detection": ("detection",),
    "traffic": ("traffic",),
    "watermarks": ("watermarks",),
    "classes and seeds": ("by_class", "agreement_between_seeds"),
    "residual risk, test again": ("residual_risk", "next_steps", "retest"),
}


def test_schema():
    """The file has every field; without one, or with one more, it is refused; ids are versioned."""
    validator = jsonschema.Draft202012Validator(SCHEMA)
    validator.check_schema(SCHEMA)
    found = json.loads(json.dumps(results()))
    assert not [error.message for error in validator.iter_errors(found)]
    wanted = {key for keys in FIELDS.values() for key in keys}
    assert wanted == found["audit"].keys() == set(SCHEMA["properties"]["audit"]["required"])
    assert {"date", "command", "sha256"} <= found["provenance"].keys()  # the fifteenth, integrity
    for part in (found["audit"], found["provenance"], found):
        for key in list(part):
            value = part.pop(key)
            assert not validator.is_valid(found), key
            part[key] = value
    assert not validator.is_valid({**found, "more": 1})
    ids = {f"{one['standard']} {one['id']}" for one in found["audit"]["standards"]}
    assert {
        *(f"OWASP AISVS v1.0-C11.{n}" for n in ("2.2", "3.1", "3.2", "3.3", "3.4")),
        "MITRE ATLAS AML.T0024.002",
        "NIST AI 100-2 NISTAML.031",
        "OWASP AI Exchange 2.4",
    } <= ids
    for one in found["audit"]["standards"]:
        assert one["version"] and set(one["fields"]) <= wanted | {"reach"}


HOSTILE = (
    "</p><script>alert(1)</script><img src=x onerror=alert(1)> \x1b[31mred\x1b]8;;http://evil.example"
    "\x07 {{ 7 * 7 }} **bold** [a](http://evil.example) `x` | cell\n# head\u202e $x$"
)


class Tags(html.parser.HTMLParser):
    """The elements of a page, and the attributes that could act or load something."""

    def __init__(self):
        super().__init__()
        self.names, self.acting = set(), []

    def handle_starttag(self, tag, attrs):
        self.names.add(tag)
        acting = ("src", "href", "action", "data", "xlink:href", "srcset", "poster")
        self.acting += [
            (name, value)
            for name, value in attrs
            if name.startswith("on") or (name in acting and not value.startswith("#"))
        ]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A report whose names try to do something: its directory, and the text for the terminal."""
    directory = tmp_path_factory.mktemp("report")
    texts = dict.fromkeys(("target", "pool", "class", "command"), HOSTILE)
    texts_of_the_config = {
        f"audit.{key}": HOSTILE for key in ("authorised_by", "model", "scope", "residual_risk")
    }
    shown = picture(HOSTILE, np.arange(200 * 100 * 3, dtype=np.uint8).reshape(200, 100, 3))
    return directory, files.write(directory, results(texts_of_the_config, **texts), [shown])


def test_names_do_nothing(hostile):
    """Tags, Markdown, templates and terminal escapes in the names of others."""
    directory, text = hostile
    assert "\x1b" not in text and "\x07" not in text and "\u202e" not in text and "red" in text
    tags = Tags()
    page = (directory / "report.html").read_text()
    tags.feed(page)
    ((name, address),) = tags.acting  # the one picture, in the page itself
    drawn = Image.open(io.BytesIO(base64.b64decode(address.removeprefix("data:image/png;base64,"))))
    assert name == "src" and drawn.size == (48, 96)
    assert not tags.names & {"script", "link", "iframe", "a", "object"}
    assert "&lt;script&gt;" in page and "{{ 7 * 7 }}" in page and "\x1b" not in page
    text = (directory / "report.md").read_text()
    assert "\x1b" not in text and "\u202e" not in text
    for raw in ("<script", "**bold**", "[a](", "`x`", "http://evil", "| cell", "\n# head"):
        assert raw not in text.replace("\\" + raw[0], ""), raw
    assert json.loads((directory / "results.json").read_text())["target"]["name"] == HOSTILE


def test_markdown():
    """What begins markup is escaped; words, numbers and underscores within words stay."""
    assert (
        safe.markdown("top_spread5 at 95 % (a, b) + c: d-e.")
        == "top_spread5 at 95 % (a, b) + c: d-e."
    )
    assert safe.markdown("_x_ a|b <i> *y* \\") == r"\_x\_ a\|b \<i\> \*y\* \\"
    assert safe.markdown("a\n\n# b") == r"a \# b" and "://" not in safe.markdown("http://a")[:6]
    assert safe.texts({"a": ["b", 1, None]}, str.upper) == {"A": ["B", 1, None]}


def test_page(hostile, tmp_path):
    """One file: the answer before all else, a curve for each measure, light and dark, a telephone's
    width; the numbers of the strongest attack beside them. Writing it changes no figure."""
    found = results()
    before = copy.deepcopy(found)
    files.write(tmp_path, found)
    assert found == before
    page = (tmp_path / "report.html").read_text()
    told = results()["audit"]["answer"]["text"]
    assert page.index(told) < page.index("<svg") < page.index("<table>") < page.index("What to do")
    for word in (
        "width=device-width",
        "prefers-color-scheme: dark",
        "@media print",
        "var(--series1)",
    ):
        assert word in page
    assert page.count("<svg ") == 2 and "<metadata" not in page and "http-equiv" in page
    assert not re.findall(r'(?:src|href)="(?!#)', page)
    for name in ("moco", "none"):  # labels stand in the curves
        assert page.count(f">{name}</text>") == 2, name
    assert page.count(">95 %</text>") == 1 and page.count(">93.1 %</text>") == 1, "of 98 %"
    assert "system-ui" in page[page.index("<svg ") :] and "DejaVu" not in page
    ids = re.findall(r' id="([^"]*)"', page)
    assert len(ids) == len(set(ids)) and set(re.findall(r"url\(#([^)]*)\)", page)) <= set(ids)
    body = page[page.index("Strongest attack: moco") :]
    rows = re.findall(r"<tr>.*?</tr>", body[: body.index("</table>")], re.DOTALL)
    cells = [re.sub(r"<[^>]*>", " ", row).split() for row in rows]
    assert cells[2][:1] == ["100"] and "96.0" in cells[2] and "94.0" in cells[2]
    names = (tmp_path / "report.sha256").read_text().split()[1::2]
    assert names == ["results.json", "report.md", "report.html", "curve.png"]


def test_nothing_yet(tmp_path):
    """A report before any student, and one without an answer, says so and has its files."""
    found = results()
    found["rows"], found["access"], found["zero_queries"] = [], [], None
    found["target"]["top1"] = found["target"]["top5"] = None
    found["finished"] = False
    found["reach"] = reached(found)
    found["audit"] = audit(found, None)
    text = files.write(tmp_path, found)
    assert text.startswith("Nothing can be said yet") and "12 of 12 students" in text
    jsonschema.validate(json.loads((tmp_path / "results.json").read_text()), SCHEMA)


def test_pictures_are_drawn_once():
    """The same figures, other seconds: the same pictures, not drawn again. Others where a row or
    the grid is another."""
    first = results()
    again, row, grid = (copy.deepcopy(first) for _ in range(3))
    again["rows"][0]["seconds"] = -1
    row["rows"][0]["fidelity_top1"] += 1
    grid["config"]["selects"] = ["random", "kcenter"]
    for draw in (curve, drawn):
        assert draw(again) is draw(first)
        assert draw(row) != draw(first) != draw(grid)


@pytest.mark.slow
def test_so_far(tmp_path):
    """Of six of twelve students: the answer, the tables and the page say so; the page is read
    again. One that is finished says nothing of it."""
    found = results()
    whole = files.write(tmp_path, found) + (tmp_path / "report.html").read_text()
    assert 'http-equiv="refresh"' not in whole and "So far" not in whole
    found["finished"], found["rows"] = False, [r for r in found["rows"] if r["init"] == "moco"]
    found["reach"] = reached(found)
    found["audit"] = audit(found, None)
    text = files.write(tmp_path, found)
    assert text.startswith("So far, by 6 of 12 students: 90 queries (4.5 % of the pool)")
    assert "Wait for the run to end: 6 of 12 students are not there yet." in text
    page = (tmp_path / "report.html").read_text()
    assert '<meta http-equiv="refresh" content="15">' in page and "not run yet" in page
    # A budget that is enough needs no larger one; one that is not says nothing yet.
    found["rows"] = [row for row in found["rows"] if row["queries"]["train"] < 1000]
    shares = {
        row["share"]: row["queries"] for row in reached(found) if row["measure"] == "fidelity"
    }
    assert shares == {
        **{0.5: 10, 0.75: 10, 0.9: pytest.approx(crossing(75, 96, 90, 10, 100))},
        0.95: pytest.approx(crossing(75, 96, 95, 10, 100)),
    }
    found["rows"] = [row for row in found["rows"] if row["queries"]["train"] < 100]
    found["audit"] = audit(found, None)
    assert {row["share"] for row in reached(found) if row["measure"] == "fidelity"} == {0.5, 0.75}
    text = files.write(tmp_path, found)
    assert text.startswith("So far, by 2 of 12 students: No copy was found") and "Raise" not in text
    assert "not reached yet" in (tmp_path / "report.html").read_text()
    jsonschema.validate(json.loads((tmp_path / "results.json").read_text()), SCHEMA)


def test_compare(tmp_path, capsys):
    """Before and after: the answers, the factor in queries, the times, the keys that changed."""
    paths = [tmp_path / name for name in ("before", "after")]
    for path, init in zip(paths, ("moco", "none"), strict=True):
        path.mkdir()
        found = results({"audit.per_day": 10, "inits": (init,)})
        write_json(path / "results.json", found)
    assert compare.main([str(paths[0]), str(paths[1] / "results.json")]) == 0
    out = capsys.readouterr().out
    after = math.ceil(crossing(82, 97, 95, 100, 1000))
    assert "Before: 90 queries" in out and f"After: {after} queries" in out
    factor = crossing(82, 97, 95, 100, 1000) / crossing(75, 96, 95, 10, 100)
    row = next(line for line in out.splitlines() if line.startswith("| 95 % fidelity  "))
    assert [cell.strip() for cell in row.split("|")[1:-1]] == [
        *("95 % fidelity", "90", str(after), f"x {factor:.2g}")
    ]
    assert "The model: the same" in out and 'inits: ["moco"] there, ["none"] now' in out
    assert "Not tried again: moco" in out and "8 days" in out  # 90 at ten a day


@pytest.mark.parametrize(
    ("text", "told"),
    [('{"schema": 1}', "has schema 1"), ("{}", "is no results.json"), ("[", "cannot be read")],
)
def test_compare_of_others(tmp_path, capsys, text, told):
    """An older file, something else, and half a file: one line with the file's name."""
    (tmp_path / "results.json").write_text(text)
    assert compare.main([str(tmp_path), str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line and str(tmp_path) in line


def test_features_of_kinds():
    """An encoder that was brought along is one for all seeds; one that stays as it is has no random
    network beside it."""
    monitors = [
        {"init": "moco", "seed": 0, "knn_top1": 60.0, "knn_top1_random": 30.0},
        {"init": "moco", "seed": 1, "knn_top1": 62.0, "knn_top1_random": 32.0},
        *({"init": "public", "seed": seed, "source": "x.pth", "knn_top1": 81.4} for seed in (0, 1)),
    ]
    found = [
        looked_at(monitors, init, key)
        for init in ("moco", "public")
        for key in ("knn_top1", "knn_top1_random")
    ]
    assert found == ["61.0 ± 1.4", "31.0 ± 1.4", "81.4", "-"]

"""From rows to what people read: a table, a page, a curve; and `results.json` for machines.

Everything here is a function of what the stages wrote down; nothing is computed anew.
"""

import base64
import html
import io
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

from qmx.grid import Column, columns, percent
from qmx.workdir import write_json, write_text


class Table(NamedTuple):
    """A titled table of strings."""

    title: str
    header: list[str]
    rows: list[list[str]]


def write(directory: Path, results: dict) -> str:
    """Write results.json, report.md, report.html and curve.png; returns the text for standard out.

    Args:
      results: as `results.json` holds them; rows that were not run are absent from "rows".
    """
    tables, notes = result_tables(results), account_notes(results)
    picture = curve(results)
    write_json(directory / "results.json", results)
    part = directory / "curve.png.part"
    part.write_bytes(picture)
    part.replace(directory / "curve.png")
    write_text(directory / "report.md", markdown(tables, notes))
    write_text(directory / "report.html", page(tables, notes, picture))
    return "\n\n".join(["\n".join(notes), *(f"{t.title}\n\n{aligned(t)}" for t in reversed(tables))])


def label(column: Column, results: dict) -> str:
    """A column's name: the init, and the other axes where the grid has a choice or the column leaves the first."""
    axes = {"select": "selects", "access": "accesses", "use": "uses"}
    config, chosen = results["config"], column._asdict()
    more = [chosen[axis] for axis, key in axes.items() if len(config[key]) > 1 or chosen[axis] != config[key][0]]
    return " + ".join([column.init, *more])


def budget_label(results: dict, budget: dict) -> str:
    """A row's name: "14 (1 %)" where the config gives the share, "20 (1.4 %)", to two digits, where the number."""
    share = budget["fraction"]
    exact = share in results["config"]["fractions"]
    return f"{budget['queries']} ({percent(share if exact else float(f'{share:.2g}'))})"


def asked(row: dict) -> int:
    """The budget of a row, in images."""
    return row["queries"]["train"] + row["queries"]["select"]


def values(results: dict, column: Column, queries: int, metric: str) -> list[float]:
    """A metric of one cell of the table, for each seed that was run."""
    return [row[metric] for row in results["rows"]
            if Column(*(row[axis] for axis in Column._fields)) == column and asked(row) == queries]


def spread(numbers: list[float], digits: int = 1) -> str:
    """Mean and, over several seeds, the sample standard deviation."""
    if not numbers:
        return "not run"
    if len(numbers) == 1:
        return f"{numbers[0]:.{digits}f}"
    return f"{mean(numbers):.{digits}f} ± {stdev(numbers):.{digits}f}"


def result_tables(results: dict) -> list[Table]:
    """Accuracy, fidelity, divergence and the encoders' monitor."""
    seeds = len(results["config"]["seeds"])
    over = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "one seed"
    metrics_shown = [
        (f"Accuracy, top-1 / top-5, in per cent ({over})", ("top1", "top5"), 1),
        (f"Fidelity to the target, top-1 / top-5, in per cent ({over})", ("fidelity_top1", "fidelity_top5"), 1),
        (f"KL(target || student), in nats ({over})", ("kl_target_student",), 3),
    ]
    shown = columns(results["config"])
    names = [label(column, results) for column in shown]
    tables = []
    for title, metrics, digits in metrics_shown:
        rows = []
        for budget in results["pool"]["budgets"]:
            cells = []
            for column in shown:
                each = [spread(values(results, column, budget["queries"], metric), digits) for metric in metrics]
                cells.append(each[0] if each[0] == "not run" else " / ".join(each))
            rows.append([budget_label(results, budget), *cells])
        tables.append(Table(title, ["queries", *names], rows))
    tables += [*reach_tables(results), *access_tables(results, over)]
    if results["monitors"]:
        first = results["monitors"][0]
        looks = {"knn_top1": "pretrained", "knn_top1_random": "the same network, random"}
        if any("linear_top1" in m for m in results["monitors"]):
            looks["linear_top1"] = "linear probe"
        tables.append(Table(
            f"Features: accuracy of {first['knn_k']} weighted nearest neighbours "
            f"(temperature {first['knn_temperature']:g}) "
            f"{'and of a linear probe ' if len(looks) > 2 else ''}within the pool, in per cent ({over})",
            ["encoder", *looks.values()],
            [[init, *(spread([m[key] for m in results["monitors"] if m["init"] == init and key in m])
                      for key in looks)]
             for init in dict.fromkeys(m["init"] for m in results["monitors"])]))
    return tables


def reach_tables(results: dict) -> list[Table]:
    """The queries that reach a share of the target's accuracy, and their price if the config has one."""
    shares, price = results["config"]["reach"], results["config"]["price"]
    smallest, largest = (results["pool"]["budgets"][place]["queries"] for place in (0, -1))

    def cell(column: Column, share: float) -> str:
        number = [row["queries"] for row in results["reach"] if row["share"] == share
                  and Column(*(row[axis] for axis in Column._fields)) == column]
        if not number or number[0] is None:
            return f"not by {largest}" if number else "not run"
        paid = "" if price is None else f" ({price * number[0] / 1000:.2f})"
        return f"{'at most ' if number[0] == smallest else ''}{number[0]:.0f}{paid}"

    shown = columns(results["config"])
    title = "Queries that reach a share of the target's top-1 accuracy, interpolated between budgets"
    return [Table(title + ("" if price is None else f" (price at {price:g} per 1,000)"),
                  ["share", *(label(column, results) for column in shown)],
                  [[percent(share), *(cell(column, share) for column in shown)] for share in shares])] if shares else []


def access_tables(results: dict, over: str) -> list[Table]:
    """What is seen of an answer against the budget, for all columns that differ in nothing else."""
    groups: dict[Column, list[Column]] = {}
    for column in columns(results["config"]):
        groups.setdefault(column._replace(access=""), []).append(column)
    budgets = results["pool"]["budgets"]
    return [
        Table(f"Access to the answers, {group.init} + {group.select} + {group.use}: accuracy / fidelity, top-1, "
              f"in per cent ({over})",
              ["access", *(budget_label(results, budget) for budget in budgets)],
              [[column.access, *(" / ".join(spread(values(results, column, budget["queries"], metric))
                                            for metric in ("top1", "fidelity_top1")) for budget in budgets)]
               for column in group_columns])
        for group, group_columns in groups.items() if len(group_columns) > 1]


def account_notes(results: dict) -> list[str]:
    """The target, the images and the account of the queries, a line each."""
    target, pool, account = results["target"], results["pool"], results["account"]
    measured = "accuracy not measured yet" if target["top1"] is None else (
        f"top-1 / top-5 {target['top1']:.1f} / {target['top5']:.1f} on the evaluation images")
    used = ", ".join(f"{count} for {purpose}" for purpose, count in account["purposes"].items())
    price = results["config"]["price"]
    paid = "" if price is None else f" At {price:g} per 1,000 calls that is {price * account['calls'] / 1000:.2f}."
    return [
        f"Target: {target['name']}, {measured}, sha256 {target['sha256'][:16]}.",
        f"Pool: {pool['size']} images of {pool['name']}; evaluated on {pool['evaluation']} others.",
        f"Asked: {account['images']} distinct images ({used}), {account['views']} views, {account['calls']} calls, "
        f"{account['failed']} sent in requests that failed ({account['retried']} sent again), "
        f"{account['unanswered']} without an answer.{paid}",
        recipes_note(results) + " Figures are those of the last step.",
    ] + ([f"Warning: {target['warning']}."] if target["warning"] else [])


def recipes_note(results: dict) -> str:
    """What the columns of one row have in common."""
    config = results["config"]
    used = {budget_label(results, budget): {row["recipe"] for row in results["rows"] if asked(row) == budget["queries"]}
            for budget in results["pool"]["budgets"]}
    named = "; ".join(f"{budget} {', '.join(sorted(recipes))}" for budget, recipes in used.items())
    one_recipe = all(len(recipes) < 2 for recipes in used.values())
    one_choice = len({column.select for column in columns(config)}) == 1
    shared = {(True, True): "recipe, seeds and images", (False, True): "seeds and images",
              (True, False): "recipe and seeds", (False, False): "seeds"}[one_recipe, one_choice]
    note = f"All columns of one row share {shared}"
    if not one_choice:
        note += "; those that do not say how their images were chosen share these too"
    if not one_recipe:
        note += ("; students that start from nothing and those that start from an encoder train by recipes of their "
                 f"own: {named}")
    return note + "."


def aligned(table: Table) -> str:
    """A Markdown table whose columns line up."""
    lines = [table.header, *table.rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(table.header))]
    text = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
            for line in lines]
    text.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(text)


def markdown(tables: list[Table], notes: list[str]) -> str:
    """report.md."""
    parts = ["# How many queries copy this model?", "\n".join(f"- {note}" for note in notes),
             "![Accuracy and fidelity against queries](curve.png)"]
    parts += [f"## {table.title}\n\n{aligned(table)}" for table in tables]
    return "\n\n".join(parts) + "\n"


STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .8rem; border-bottom: 1px solid #ddd; text-align: left; white-space: nowrap; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; } img { max-width: 100%; }
div { overflow-x: auto; }
"""


def page(tables: list[Table], notes: list[str], picture: bytes) -> str:
    """report.html, in one file."""
    def row(cells: list[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = ["<h1>How many queries copy this model?</h1>",
            "<ul>" + "".join(f"<li>{html.escape(note)}</li>" for note in notes) + "</ul>",
            '<img alt="Accuracy and fidelity against queries" '
            f'src="data:image/png;base64,{base64.b64encode(picture).decode()}">']
    for table in tables:
        body.append(f"<h2>{html.escape(table.title)}</h2><div><table>{row(table.header, 'th')}"
                    + "".join(row(cells, "td") for cells in table.rows) + "</table></div>")
    return ('<!doctype html><html lang="en"><head><meta charset="utf-8"><title>qmx report</title>'
            f"<style>{STYLE}</style></head><body>{''.join(body)}</body></html>\n")


def curve(results: dict) -> bytes:
    """Accuracy and fidelity against queries, a PNG; bars are one standard deviation over the seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    panels = figure.subplots(1, 2)
    budgets = [budget["queries"] for budget in results["pool"]["budgets"]]
    for panel, metric, title in zip(panels, ("top1", "fidelity_top1"), ("accuracy", "fidelity"), strict=True):
        shown = columns(results["config"])
        for place, column in enumerate(shown):
            aside = 1.03 ** (place - len(shown) / 2)  # so that the bars do not hide each other
            points = [(queries * aside, values(results, column, queries, metric)) for queries in budgets]
            points = [(x, ys) for x, ys in points if ys]
            panel.errorbar([x for x, _ in points], [mean(ys) for _, ys in points],
                           [stdev(ys) if len(ys) > 1 else 0 for _, ys in points],
                           marker="o", capsize=3, label=label(column, results))
        if metric == "top1" and results["target"]["top1"] is not None:
            panel.axhline(results["target"]["top1"], color="grey", linestyle="--", label="the target")
        panel.set(xscale="log", xlabel="queries", ylabel=f"{title}, top-1 (%)", title=f"{title} against queries")
        panel.set_xticks(budgets, [str(queries) for queries in budgets])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0].legend()
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=120)
    return stream.getvalue()

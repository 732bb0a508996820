"""The answer of a report in one or two sentences, and what to do next."""

import math
from typing import Any

from qmx.grid import attacks, percent, propagates
from qmx.report.beyond import beyond_text, first_figure
from qmx.report.reach import COPY, best, column_of, fewest
from qmx.report.tables import LEARNED, label
from qmx.selection.by_answers import BY_ANSWERS
from qmx.selection.by_features import BY_FEATURES

LOWER_BOUND = "This is a lower bound on exposure: stronger attackers may need fewer."


def answer(results: dict) -> dict[str, Any]:
    """Number of queries that copy the target, by the strongest attack tried.

    {"text", "measure", "share", "queries", "low", "high", "seeds", "seeds_reached",
    "share_of_pool", "attack", "lower_bound", "beyond_labels"}; "queries" is None where no budget is
    enough, and "attack" then the best there is, or None before any student has learned;
    "beyond_labels" is `qmx.report.beyond.first_figure`, with which the text begins, behind how many
    students it is of where some are still to come.
    """
    found = fewest(results, "fidelity", COPY)
    facts = {key: found[key] if found else None for key in ("queries", "low", "high")}
    counted = {key: found[key] if found else 0 for key in ("seeds", "seeds_reached")}
    most = best(results, "fidelity")
    attack = found or most
    pool = results["pool"]["size"]
    parts = [
        so_far(results),
        beyond_text(results),
        _sentence(results, found, most),
        _unasked(results),
    ]
    return {
        "text": " ".join(part for part in parts if part),
        "measure": "fidelity",
        "share": COPY,
        **facts,
        **counted,
        "share_of_pool": found["queries"] / pool if found else None,
        "attack": column_of(attack)._asdict() if attack else None,
        "lower_bound": LOWER_BOUND,
        "beyond_labels": first_figure(results),
    }


def so_far(results: dict) -> str:
    """Number of students that the figures are of, in words; "" if these are all, or none."""
    done = len(results["rows"])
    if results["finished"] or not done:
        return ""
    return f"So far, by {done} of {results['planned']} students:"


def _unasked(results: dict) -> str:
    """The fidelity of the user's function that asks nothing; "" if there is none."""
    found = (results["zero_queries"] or {}).get("function")
    if not found:
        return ""
    return (
        f"Without any query, {found['name']} agrees with your model on"
        f" {found['fidelity_top1']:.1f} %."
    )


def _sentence(results: dict, found: dict | None, most: dict | None) -> str:
    size = results["pool"]["size"]
    if found:
        queries = math.ceil(found["queries"])
        few = "at most " if "queries" in found["bounds"] else ""
        text = (
            f"{few}{queries} {'query' if queries == 1 else 'queries'} ({share_of(queries, size)} of"
            f" the pool) are enough for a copy that agrees with your model on {percent(COPY)} of"
            f" images, by the strongest attack tried ({label(column_of(found), results)};"
            f" {interval(found)}). {LOWER_BOUND}"
        )
        return text[0].upper() + text[1:]
    if most:
        return (
            f"No copy was found that agrees with your model on {percent(COPY)} of images. The best"
            f" ({label(column_of(most), results)}, {most['queries']} queries,"
            f" {share_of(most['queries'], size)} of the pool) agrees on {most['value']:.1f} %."
            f"{_marked(results, most['value'])} {LOWER_BOUND.replace('need fewer', 'do better')}"
        )
    if results["rows"]:
        return (
            "Nothing can be said yet: no student learned the answers that it was given, so that"
            " none shows what these answers are worth."
        )
    return "Nothing can be said yet: no student was trained and evaluated."


def _marked(results: dict, value: float) -> str:
    """A sentence on the best copy that is marked as undertrained, if it agrees on more."""
    most = best(results, "fidelity", marked=True)
    if most is None or most["value"] <= value:
        return ""
    return (
        f" One that was trained too little to count ({label(column_of(most), results)},"
        f" {most['queries']} queries) agrees on {most['value']:.1f} % already."
    )


def interval(row: dict[str, Any]) -> str:
    """Spread of a row of `reach_of` over its seeds, in words."""
    if row["seeds"] < 2:
        return "one seed, so no interval"
    low = math.ceil(row["low"] or 0)
    if row["low"] == row["high"]:
        return f"the same in all {row['seeds']} seeds"
    if row["high"] is None:
        return (
            f"{low} or more over {row['seeds']} seeds, of which {row['seeds_reached']} get there"
            f" by {row['largest']}"
        )
    return f"{low} to {math.ceil(row['high'])} over {row['seeds']} seeds"


def share_of(queries: int, size: int) -> str:
    """A share of the pool, with two digits: "2.4 %"."""
    return f"{float(f'{100 * queries / size:.2g}'):g} %"


def next_steps(results: dict) -> list[str]:
    """Advice on the figures that are missing or can be made sharper, the most useful first."""
    config, audit = results["config"], results["config"]["audit"]
    found = fewest(results, "fidelity", COPY)
    smallest = results["pool"]["budgets"][0]["queries"]
    weak = {label(column_of(row), results) for row in results["rows"] if row["undertrained"]}
    steps = []
    if not results["finished"]:
        lacking, planned = results["planned"] - len(results["rows"]), results["planned"]
        steps.append(
            f"Wait for the run to end: {lacking} of {planned} students are not there yet. If it was"
            " stopped, run the same command again: it goes on."
        )
    if weak:
        keys = sorted({longer(row["recipe"]) for row in results["rows"] if row["undertrained"]})
        steps.append(
            f"Train the students longer ({', '.join(keys)}): those marked with * agree with fewer"
            f" than {LEARNED:g} % of the answers that they were given, and are left out"
            f" ({', '.join(sorted(weak))})."
        )
    below = fewest(results, "fidelity", audit["below"])
    if below and below["low"] <= smallest and smallest > 1:
        fewer = given("queries", smallest // 2, *config["queries"])
        steps.append(
            f"Ask less: {smallest} queries, the smallest budget, reach {percent(audit['below'])}"
            f" already. {fewer} shows where that begins."
        )
    if not found and results["rows"] and results["finished"]:
        steps += stronger(results)
    if not any(audit[key] for key in ("per_second", "per_day", "per_month")):
        steps.append(
            "Tell your limits, as in --config.audit.per_day=1000 --config.audit.principals=3, to"
            " read here what the copy takes in hours."
        )
    tried = attacks(config)
    if len({column.access for column in tried}) == 1 and tried[0].access != "label":
        chosen = any(column.select in BY_ANSWERS for column in tried)
        # Single columns see what they name: else the strongest would not see labels.
        named = {*config["accesses"]}  # by a word that says what it sees
        also = [
            words
            for word in config["also"]
            for words in ([word] if named & {*word.split("+")} else [word, f"{word}+label"])
        ]
        single = f" {given('also', *also)}" if also else ""
        steps.append(
            "See what weaker answers would change"
            f" ({given('accesses', *config['accesses'], 'label')}{single}), which asks"
            f" {'about other images only where answers choose them' if chosen else 'nothing more'}."
        )
    if len(config["seeds"]) < 3:
        others = [seed for seed in range(3) if seed not in config["seeds"]]
        seeds = [*config["seeds"], *others][:3]
        steps.append(f"Run three seeds ({given('seeds', *seeds)}) for an interval.")
    if any("--config." in step for step in steps):
        steps.append(
            "Give the same command the keys named here, and --update: it keeps what is done and"
            " what was answered."
        )
    steps.append(
        "After a change of the model or its limits, run the same command in another --workdir, and"
        " compare: qmx compare BEFORE/results.json AFTER/results.json."
    )
    return steps


def given(key: str, *values: Any) -> str:
    """Words for a shell that give a key of a config a tuple of values."""
    return f'--config.{key}="{values!r}"'


def longer(recipe: str) -> str:
    """The keys that let students of a recipe learn more, by its name in a row of the results."""
    if recipe == "head":
        return "--config.head.hidden, --config.head.decays"
    part = recipe if recipe == "distill" else f"recipes.{recipe}"
    return f"--config.{part}.min_steps"


def more(config: dict, size: int) -> str:
    """The key of the budgets, with another twice as large as the largest."""
    if config["queries"]:
        return given("queries", *config["queries"], min(size, 2 * max(config["queries"])))
    return given("fractions", *config["fractions"], min(1.0, 2 * max(config["fractions"])))


def stronger(results: dict) -> list[str]:
    """Advice where no attack copies the model: larger budgets, an attack that was not tried."""
    config, size = results["config"], results["pool"]["size"]
    tried = attacks(config)
    init = next((column.init for column in tried if column.init != "none"), "moco")
    words = f"{init}+typiclust+pool"
    ways = []
    if results["pool"]["budgets"][-1]["queries"] < size:
        ways.append(f"ask more ({more(config, size)})")
    if not any(
        column.init == init and column.select in ("typiclust", "maxherding") and propagates(column)
        for column in tried
    ):
        ways.append(f"try a stronger attack ({given('also', *config['also'], words)})")
    text = ", or ".join(ways)
    return [f"{text[0].upper()}{text[1:]}."] if ways else []


def attacks_not_tried(results: dict) -> list[str]:
    """Attacks that this audit did not run, in words."""
    tried = attacks(results["config"])
    known = [
        (
            "a selection of the images to ask about by their features",
            lambda c: c.select in BY_FEATURES,
        ),
        (
            "a selection by the answers (margin, entropy)",
            lambda c: c.select in BY_ANSWERS,
        ),
        ("answers spread to the rest of the pool", lambda c: c.use in ("pool", "head_pool")),
        ("a student that labels the rest of the pool itself", lambda c: c.use == "fixmatch"),
        (
            "a public encoder, pretrained by others",
            lambda c: c.init in ("imported", "features") or c.use in ("head", "head_pool"),
        ),
    ]
    return [words for words, of in known if not any(of(column) for column in tried)] + [
        "images that are synthesised, or taken from another distribution",
        "questions made from earlier answers, image by image (adversarial directions)",
        "recovery of weights by algebra",
    ]

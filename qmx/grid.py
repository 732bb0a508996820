"""The grid of runs that a config describes: its columns, at every budget and seed."""

from decimal import Decimal
from itertools import pairwise, product
from typing import Any, NamedTuple

from qmx.ledger import access
from qmx.selection.by_answers import BY_ANSWERS
from qmx.selection.orders import subset_size
from qmx.selection.select import NEED_FEATURES, SELECTS

# Images that a student learns from: those that were asked about; the whole pool, the others with
# their neighbours' scores (qmx/selection/propagate.py); or the whole pool, the others with the
# student's own labels (qmx/methods/fixmatch.py). A head learns as the first two do, on features of
# an encoder that stays as it is (qmx/heads.py).
USES = ("asked", "pool", "fixmatch", "head", "head_pool")
HEADS = {"asked": "head", "pool": "head_pool"}
NEED_ENCODER = ("pool", *HEADS.values())

# In the place of a level of access: the control that learns true labels of the images that columns
# like it ask about, and no answer.
TRUE_LABELS = "true_labels"


class Column(NamedTuple):
    """One way of copying a target: a column of the table."""

    init: str
    select: str
    access: str
    use: str = "asked"


class Budget(NamedTuple):
    """Number of the pool's images whose answers a student is given: a row of the table."""

    queries: int
    fraction: float  # of the pool; where the config gives a share, that very number


class Cell(NamedTuple):
    """One run of the grid: one student. The fields of its column and of its budget, and a seed."""

    init: str
    select: str
    access: str
    use: str
    queries: int
    fraction: float
    seed: int

    @property
    def start(self) -> tuple[str, int]:
        """The encoder that the student starts from: its init and its seed."""
        return self.init, self.seed

    @property
    def name(self) -> str:
        return f"{self.init}-{self.select}-{self.access}-{self.use}-{self.queries}-seed{self.seed}"


def recipe_name(config: Any, cell: Cell) -> str:
    """The recipe that a cell is trained by: its name in `config.recipes`, or "" for
    `config.distill`.

    Raises:
      ValueError: several recipes claim the cell.
    """
    names = [
        name
        for name, keys in config.recipes.items()
        if cell.init in keys.inits and keys.above < cell.fraction <= keys.up_to
    ]
    if len(names) > 1:
        raise ValueError(
            f"recipes {' and '.join(names)} both claim init {cell.init} at {cell.queries} queries, "
            f"a share of {cell.fraction:.2g}; give them ranges of fractions that do not overlap"
        )
    return names[0] if names else ""


def recipe_of(config: Any, cell: Cell) -> Any:
    """The keys that a cell is trained by."""
    name = recipe_name(config, cell)
    return config.recipes[name] if name else config.distill


def columns(config: Any) -> list[Column]:
    """The product of the grid's axes and the columns of `config.also`. Columns of the product that
    need features and have no encoder are left out; students of encoders that stay as they are are
    heads.

    Raises:
      ValueError: a word in `config.also` that no axis has; no column at all.
    """
    grid = [
        Column(*axes)
        for axes in product(*(config[axis] for axis in ("inits", "selects", "accesses", "uses")))
    ]
    also = [_column(words, config) for words in config["also"]]
    grid, also = (
        [_of_frozen(column) if frozen(config, column.init) else column for column in some]
        for some in (grid, also)
    )
    if impossible := [
        column.init for column in also if column.use == "fixmatch" and frozen(config, column.init)
    ]:
        raise ValueError(
            f"also has {impossible[0]} + fixmatch, and the encoder {impossible[0]} stays as it is;"
            " its students are heads"
        )
    grid = [c for c in grid if c.use != "fixmatch" or not frozen(config, c.init)]
    featureless = {
        column
        for column in (*grid, *also)
        if column.init == "none" and (column.select in NEED_FEATURES or column.use in NEED_ENCODER)
    }
    if impossible := [" + ".join(column) for column in also if column in featureless]:
        raise ValueError(
            f"also has {impossible[0]}, which needs an encoder; name one first, as in"
            " 'moco+typiclust'"
        )
    rest = [*dict.fromkeys(column for column in (*grid, *also) if column not in featureless)]
    if not rest:
        raise ValueError(
            f"the grid is empty: of inits {config['inits']} none has the features that selects "
            f"{config['selects']} and uses {config['uses']} need; add one that is pretrained"
        )
    return _with_partners(rest, also)


def _with_partners(columns: list[Column], also: list[Column]) -> list[Column]:
    """Columns without the controls that are nobody's."""
    alone = {c for c in columns if is_control(c) and not of_control(c, columns)}
    if control := next((column for column in also if column in alone), None):
        words = " + ".join(control)
        if control.select in BY_ANSWERS:
            raise ValueError(
                f"also has {words}, a control, and no column asks about the same images, for"
                f" {control.select!r} chooses them by the answers; leave it out"
            )
        partner = "+".join(control._replace(access="logits"))
        raise ValueError(
            f"also has {words}, a control, and no column asks about the same images; name one"
            f" without {TRUE_LABELS} too, as {partner!r}"
        )
    if len(alone) == len(columns):
        raise ValueError(f"accesses has {TRUE_LABELS!r} alone, a control; add answers, as 'logits'")
    return [column for column in columns if column not in alone]


def is_control(column: Column | Cell) -> bool:
    """True if a column's students learn true labels and no answer."""
    return column.access == TRUE_LABELS


def attacks(config: Any) -> list[Column]:
    """The columns that are no controls."""
    return [column for column in columns(config) if not is_control(column)]


def of_control(control: Column, others: list[Column]) -> list[Column]:
    """Those of some columns that learn the answers to a control's images."""
    return [
        column
        for column in others
        if column.select not in BY_ANSWERS
        and not is_control(column)
        and column._replace(access=TRUE_LABELS) == control
    ]


def propagates(column: Column) -> bool:
    """True if a column's answers are spread over the pool, to learn from or to choose by."""
    return column.use in ("pool", HEADS["pool"]) or column.select in BY_ANSWERS


def frozen(config: Any, init: str) -> bool:
    """True if an init is an encoder that stays as it is, so that its students are heads."""
    return "kind" in config.get("pretrain", {}).get(init, ())


def _of_frozen(column: Column) -> Column:
    return column._replace(use=HEADS.get(column.use, column.use))


def inits(config: Any) -> tuple[str, ...]:
    """Everything that a student can start from."""
    return "none", *config.pretrain


def encoders(config: Any) -> list[str]:
    """The inits of the columns but "none", and before each the encoder whose features it learns."""
    names = (
        name
        for column in columns(config)
        for name in (teacher(config, column.init), column.init)
        if name not in ("", "none")
    )
    return [*dict.fromkeys(names)]


def teacher(config: Any, init: str) -> str:
    """The encoder whose features an init's own learns on the pool; "" if it learns none's."""
    keys = config.get("pretrain", {}).get(init, {})
    return "" if keys.get("path") else keys.get("of", "")


def _column(words: str, config: Any) -> Column:
    init, *rest = words.split("+")
    axes = {
        "select": SELECTS.__contains__,
        "access": lambda word: access.known(word) or word == TRUE_LABELS,
        "use": USES.__contains__,
    }
    values = {
        "select": config["selects"][0],
        "access": config["accesses"][0],
        "use": config["uses"][0],
    }
    for word in rest:
        axis = [axis for axis, known in axes.items() if known(word)]
        if not axis:
            raise ValueError(
                f"also has {words!r}, and {word!r} is none of "
                f"{', '.join([*SELECTS, *access.names(), TRUE_LABELS, *USES])}"
            )
        values[axis[0]] = word
    return Column(init, **values)


def budgets(config: Any, size: int) -> list[Budget]:
    """The budgets of `config.fractions` and `config.queries` in a pool of `size` images, the small
    ones first.

    Raises:
      ValueError: a share or a number that this pool does not have; two budgets of one number; no
        budget at all.
    """
    named = [
        *((f"fractions {share}", _of_share(share, size)) for share in config.fractions),
        *((f"queries {number}", _of_number(number, size)) for number in config.queries),
    ]
    if not named:
        raise ValueError(
            "fractions and queries are both empty; name a budget, as in --config.queries=20, or"
            " have encoders alone with --stage=pretrain"
        )
    named.sort(key=lambda pair: pair[1].queries)
    for (one, budget), (other, following) in pairwise(named):
        if budget.queries == following.queries:
            raise ValueError(
                f"{one} and {other} are both {budget.queries} of the pool's {size} images; leave"
                " one out"
            )
    return [budget for _, budget in named]


def _of_share(share: Any, size: int) -> Budget:
    if isinstance(share, bool) or not isinstance(share, int | float):
        raise ValueError(
            f"fractions has {share!r}, which is not a number; 0.01 is one image in a hundred"
        )
    try:
        return Budget(subset_size(share, size), float(share))
    except ValueError as error:
        raise ValueError(f"fractions: {error}") from None


def _of_number(number: Any, size: int) -> Budget:
    if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number <= size:
        raise ValueError(
            f"queries has {number!r}; use whole numbers from 1 to {size}, which is the pool"
        )
    return Budget(number, number / size)


def budget_keys(config: Any) -> str:
    """The keys that the budgets come from, for advice: "--config.queries or --config.fractions"."""
    return " or ".join(f"--config.{key}" for key in ("queries", "fractions") if config[key])


def cells(config: Any, size: int) -> list[Cell]:
    """Every column, budget and seed in a pool of `size` images, the small budgets first."""
    return [
        Cell(*column, *budget, seed)
        for budget, column, seed in product(budgets(config, size), columns(config), config.seeds)
    ]


def percent(fraction: float) -> str:
    """0.01 -> "1 %", exactly."""
    return f"{(Decimal(repr(float(fraction))) * 100).normalize():f} %"

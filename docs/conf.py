"""Settings of the documentation: `sphinx-build -W -n -b html docs docs/_build`.

Two tables are made of the code at every build, in the place of a remark in the pages: the keys of a
config, and the ids of the standards. Sphinx is not needed to make them. Notebooks are read as pages
of Markdown.
"""

import inspect
import json
import re
from typing import Any

from qmx import __version__, keys
from qmx.report.standards import STANDARDS

project, author = "qmx", "the authors of qmx"
version = release = __version__
copyright = "the authors of qmx, Apache-2.0"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown", ".ipynb": "markdown"}
exclude_patterns = ["_build", "**/.ipynb_checkpoints"]
html_theme = "furo"
html_copy_source = False
html_title = f"qmx {__version__}"
smartquotes = False  # -- is a flag here
myst_heading_anchors = 3

default_role = "literal"  # of `code` in docstrings
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
maximum_signature_line_length = 88
napoleon_numpy_docstring = False
# As texts: of "A `Method`. Its metrics: ..." the part before the colon would become a type.
napoleon_custom_sections = ["Returns", "Yields"]
# Types of others. Their names lead nowhere, since the site is built without the network.
nitpick_ignore_regex = [
    (r"py:.*", r"(Any|Callable|Iterator|Mapping|Sequence|Path|PyTree|Batch|View|Query)"),
    (r"py:.*", r"(collections|flax|jax|np|numpy|optax|nn|pathlib|typing)\..*"),
]


def keys_page() -> str:
    """Every key of a config in Markdown: a heading for each group, a table of its keys."""
    said = keys.remarks("".join(map(inspect.getsource, keys.SOURCES)))
    groups: dict[str, list[keys.Key]] = {}
    for key in keys.keys():
        groups.setdefault(key.name.rpartition(".")[0], []).append(key)
    parts = []
    for group, members in groups.items():
        parts.append(f"## {group or 'The whole run'}")
        parts.append(plain(said.get(group, "")))
        rows = [(f"`{keys.line(key._replace(remark=''))}`", plain(key.remark)) for key in members]
        parts.append(table(("key and default", "meaning"), rows))
    return "\n\n".join(part for part in parts if part)


def standards_table() -> str:
    """The ids under which a report is filed, in Markdown."""
    rows = [
        (
            f"{one['standard']} {one['version']}",
            f"`{one['id']}`",
            plain(one["title"]),
            ", ".join(f"`{field}`" for field in one["fields"]),
        )
        for one in STANDARDS
    ]
    return table(("standard", "id", "of", "fields of `audit`"), rows)


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plain(text: str) -> str:
    """A remark with `code` as Markdown that shows it as it is."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(
        part if part.startswith("`") else re.sub(r"([\\*_|<\[{])", r"\\\1", part) for part in parts
    )


MADE = {"<!-- the keys -->": keys_page, "<!-- the standards -->": standards_table}


def fill_in(app: Any, name: str, source: list[str]) -> None:
    """Put what is made of the code in the place of its remark in a page."""
    for remark, make in MADE.items():
        if remark in source[0]:
            source[0] = source[0].replace(remark, make())


def as_page(app: Any, name: str, source: list[str]) -> None:
    """Make Markdown of a notebook: its prose as it is, its code in fences, a link to its file."""
    if not name.startswith("notebooks/"):
        return
    title, *cells = json.loads(source[0])["cells"]
    file = f"{name.rpartition('/')[2]}.ipynb"
    parts = ["".join(title["source"])]
    parts.append(f"This is a notebook without its results. To run it, open {{download}}`{file}`.")
    for cell in cells:
        text = "".join(cell["source"])
        parts.append(f"```python\n{text}\n```" if cell["cell_type"] == "code" else text)
    source[0] = "\n\n".join(parts)


SECTION = re.compile(r"(Args|Attributes|Raises|Returns|Yields):$")


def as_written(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Make reStructuredText of a docstring, which is plain text with `code`, *titles*, and Google's
    sections."""
    text = re.sub(r"\*\*|[|\\]", lambda sign: "".join("\\" + c for c in sign[0]), "\n".join(lines))
    text = re.sub(r"(?<=\w)_(?=[\s,.;:)])", r"\\_", text)  # else a link
    text = re.sub(r"(`[^`\n]+`)(?=\w)", r"\1\\ ", text)  # the plural of `code`
    blocks = re.split(r"\n\s*\n", text)
    section = False
    for place, block in enumerate(blocks):
        first, *rest = block.split("\n")
        section = bool(SECTION.match(first)) or (section and first.startswith(" "))
        if not section and any(line.startswith(" ") for line in rest):
            # Lines that are set off keep their places.
            blocks[place] = "\n".join(
                f"| {line.replace('  ', chr(160) * 2)}" for line in [first, *rest]
            )
    lines[:] = "\n\n".join(blocks).split("\n")


def is_alias(app: Any, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """Leave out the fields of NamedTuples: their tuple's docstring and signature have them."""
    return True if str(getattr(obj, "__doc__", "")).startswith("Alias for field") else None


def setup(app: Any) -> dict[str, bool]:
    """Connect the functions above; called by Sphinx."""
    app.connect("source-read", fill_in)
    app.connect("source-read", as_page)
    app.connect("autodoc-process-docstring", as_written, priority=400)  # before napoleon's 500
    app.connect("autodoc-skip-member", is_alias)
    return {"parallel_read_safe": True}

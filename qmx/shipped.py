"""The configs that come with qmx, found by their names."""

from pathlib import Path


def own_configs() -> dict[str, Path]:
    """The configs that come with qmx: in the package, or beside it in a checkout."""
    package = Path(__file__).parent
    inside = package / "configs"
    folder = inside if inside.is_dir() else package.parent / "configs"
    return {path.stem: path for path in folder.glob("*.py")}


def config_file(name: str) -> str:
    """FILE.py[:WORDS] of a config given so, or as NAME[:WORDS].

    Raises:
      ValueError: there is neither; names the configs that there are.
    """
    path, colon, words = name.partition(":")
    known = own_configs()
    if not Path(path).is_file() and path not in known:
        raise ValueError(
            f"--config={name}: no such file; the configs of qmx's own are"
            f" {', '.join(sorted(known))}"
        )
    return f"{path if Path(path).is_file() else known[path]}{colon}{words}"


def with_files(argv: list[str]) -> list[str]:
    """The command line with the file in the place of a config's name; the name may be a word of
    its own."""
    words = iter(argv)
    joined = [f"{word}={next(words, '')}" if word == "--config" else word for word in words]
    return [
        "--config=" + config_file(word.partition("=")[2]) if word.startswith("--config=") else word
        for word in joined
    ]


def chosen(words: str, known: tuple[str, ...]) -> set[str]:
    """The words, with commas between them, that a config's `get_config` was given.

    Raises:
      ValueError: a word that is not among the known ones.
    """
    given = set(words.split(",")) if words else set()
    if unknown := sorted(given - set(known)):
        raise ValueError(f"{unknown[0]!r} is none of {', '.join(known)}")
    return given

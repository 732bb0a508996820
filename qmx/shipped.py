"""The configs that come with qmx, found by their names; and what their files hold."""

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict, FrozenConfigDict

# (a config, number of images in the pool, "cpu" or "gpu") -> the config that is run.
Derive = Callable[[Any, int, str], Any]


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


def load_file(name: str) -> ConfigDict:
    """The config that `name`, see `config_file`, makes; an error in it is named with the file."""
    path, _, argument = config_file(name).partition(":")
    try:
        return runpy.run_path(path)["get_config"](*[argument] if argument else [])
    except (Exception, SystemExit) as error:
        # ml_collections goes on with the whole config.
        reason = str(error).partition(" Other fields present")[0]
        raise ValueError(
            f"--config={name} does not load: {type(error).__name__}: {reason}"
        ) from None


def derivation(argv: list[str]) -> Derive:
    """The function `for_pool` of the command line's config file, which gives values by key; what
    the command line itself names stays as it is. Without one, the config is run as it is."""
    names = [word.partition("=")[2] for word in argv if word.startswith("--config=")]
    file = runpy.run_path(config_file(names[-1]).partition(":")[0]) if names else {}
    given = {word.partition("=")[0].removeprefix("--config.") for word in argv}

    def derive(config: Any, images: int, device: str) -> Any:
        if "for_pool" not in file:
            return config
        values = file["for_pool"](config, images, device)
        whole = ConfigDict(config)
        whole.update_from_flattened_dict({k: v for k, v in values.items() if k not in given})
        return FrozenConfigDict(whole)

    return derive


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

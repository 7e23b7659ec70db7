"""Recipes: one YAML file tells how a published set, or one's own folder, becomes shards.

A recipe is found by name in ``data_recipes`` or by its path. Its own paths start from ``root``, which is the working
directory unless the caller says otherwise.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from mmit.data.convert import Conversion
from mmit.data.readers import reader_options
from mmit.errors import ConfigError, DataError

if TYPE_CHECKING:
    from rich.table import Table

FOLDER = "data_recipes"
_KINDS = {"tuple[str, ...]": "list of sentences", "Mapping[str, Any]": "mapping"}
_PACKAGE = Path(__file__).parents[1]
# a wheel carries the recipes inside the package, a checkout beside it
SHIPPED = (_PACKAGE if (_PACKAGE / FOLDER).is_dir() else _PACKAGE.parent) / FOLDER
"""The recipes of mmit."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A data set: what it is, where its files are, how they are read, and where its shards go.

    source, images, shards: paths from ``root``. records: how many the published file holds; 0 leaves it unchecked.
    files: what to download and how it is laid out. traps: what is odd about the set, and what is done about it.
    options: those of the reader, see ``readers.open_reader``. The rest is as in ``convert.Conversion``.
    """

    name: str
    reader: str
    source: str
    shards: str
    images: str = ""
    about: str = ""
    url: str = ""
    paper: str = ""
    licence: str = ""
    files: tuple[str, ...] = ()
    traps: tuple[str, ...] = ()
    records: int = 0
    prompt: str = ""
    follow_links: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    shard_samples: int = 10_000
    seed: int = 0
    max_bad: float = 0.001
    root: Path = Path()
    digest: str = ""

    @property
    def directory(self) -> Path:
        """Where the shards are, or will be."""
        return self.root / Path(self.shards).expanduser()

    def conversion(self) -> Conversion:
        """What ``convert`` needs to make the shards."""
        return Conversion(
            reader=self.reader,
            source=self.root / Path(self.source).expanduser(),
            target=self.directory,
            name=self.name,
            images=self.root / Path(self.images).expanduser() if self.images else None,
            prompt=self.prompt,
            follow_links=self.follow_links,
            options=self.options,
            shard_samples=self.shard_samples,
            seed=self.seed,
            max_bad=self.max_bad,
            records=self.records,
            recipe_digest=self.digest,
            licence=self.licence,
        )


def load_recipe(name: str | Path, *, beside: Path | None = None, root: Path | None = None) -> Recipe:
    """The recipe called ``name``, or in the file ``name``.

    Looked for as a path, beside the file ``beside`` (a run file), in ./data_recipes, and among those of mmit.
    Raises ConfigError naming the file and the key.
    """
    path = find_recipe(name, beside=beside)
    try:
        text = path.read_bytes()
        content = yaml.safe_load(text)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: a recipe is a mapping of keys such as name, reader, source, shards")
    checked = _checked(content, path)
    try:
        reader_options(checked["reader"], checked.get("options", {}))
    except DataError as error:
        raise ConfigError(f"{path}: {error}") from None
    return Recipe(**checked, root=root or Path(), digest=hashlib.sha256(text).hexdigest())


def list_recipes() -> list[Recipe]:
    """All recipes in ./data_recipes and among those of mmit, by name; of two with one name, the nearer one.

    Raises ConfigError for one that is wrong.
    """
    found: dict[str, Path] = {}
    for folder in (Path(FOLDER), SHIPPED):
        for path in sorted(folder.glob("*.yaml")):
            found.setdefault(path.stem, path)
    return [load_recipe(found[name]) for name in sorted(found)]


def recipe_table(recipes: Sequence[Recipe]) -> Table:
    """Name, reader, published records and subject of each, for the terminal."""
    from rich.table import Table

    table = Table("recipe", "reader", "records", "about", box=None, pad_edge=False)
    for recipe in recipes:
        table.add_row(recipe.name, recipe.reader, f"{recipe.records:,}" if recipe.records else "-", recipe.about)
    return table


def find_recipe(name: str | Path, *, beside: Path | None = None) -> Path:
    """The file of a recipe. Raises ConfigError with the places searched, and the nearest name."""
    given = Path(name).expanduser()
    folders = [Path(FOLDER), SHIPPED]
    if beside is not None:
        folders = [beside.parent, beside.parent / FOLDER, *folders]
    for path in [given, *(folder / given for folder in folders)]:
        for candidate in (path, path.with_name(path.name + ".yaml")):
            if candidate.is_file():
                return candidate
    known = sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})
    near = difflib.get_close_matches(given.stem, known, n=1)
    hint = f"; did you mean '{near[0]}'?" if near else f"; known: {', '.join(known)}" if known else ""
    raise ConfigError(f"there is no recipe '{name}' as a file or in {', '.join(map(str, folders))}{hint}")


def _checked(content: Mapping[Any, Any], path: Path) -> dict[str, Any]:
    """The values of a recipe, with the types of its fields."""
    own = {field.name: field for field in fields(Recipe) if field.name not in ("root", "digest")}
    for key in content:
        if key not in own:
            near = difflib.get_close_matches(str(key), own, n=1)
            raise ConfigError(
                f"{path}: unknown key '{key}'; "
                + (f"did you mean '{near[0]}'?" if near else f"known: {', '.join(own)}")
            )
    missing = [
        name for name, field in own.items() if field.default is field.default_factory is MISSING and name not in content
    ]
    if missing:
        raise ConfigError(f"{path}: missing {', '.join(missing)}")
    return {key: _typed(value, str(own[key].type), f"{path}: {key}") for key, value in content.items()}


def _typed(value: Any, kind: str, place: str) -> Any:  # noqa: ANN401  (a YAML value)
    try:
        # YAML reads 1e-3 as text and 1 as an integer
        if kind == "float" and not isinstance(value, bool):
            return float(value)
        if kind == "tuple[str, ...]":
            if not isinstance(value, list) or not all(isinstance(line, str) for line in value):
                raise ValueError
            return tuple(value)
        wanted = {"str": str, "int": int, "bool": bool, "Mapping[str, Any]": dict}[kind]
        if not isinstance(value, wanted) or (kind == "int" and isinstance(value, bool)):
            raise ValueError
    except (ValueError, TypeError):
        raise ConfigError(f"{place}: {value!r} is not of type {_KINDS.get(kind, kind)}") from None
    return value

"""Loading recipes: YAML, `extends`, dotted overrides, and errors that name the file, the key and the mend."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from configs.errors import LonghaulError, did_you_mean
from configs.schema import Recipe

_TAGGED = {"schedule", "crop", "order", "auto_augment", "optimizer", "loss"}  # the sections of several kinds
RECIPE_DIRECTORY = Path(__file__).parent


def list_recipes() -> list[str]:
    """Names of the recipes that come with Longhaul (files starting with `_` are only there to be extended)."""
    return sorted(p.stem for p in RECIPE_DIRECTORY.glob("*.yaml") if not p.stem.startswith("_"))


def find_recipe(name: str) -> Path:
    """The file of a recipe given by name or by path; raises LonghaulError with the nearest name."""
    if name.endswith((".yaml", ".yml")) or "/" in name:
        path = Path(name)
        if not path.is_file():
            raise LonghaulError(f"There is no recipe file {path}; `longhaul recipes` lists the built-in ones.")
        return path
    path = RECIPE_DIRECTORY / f"{name}.yaml"
    if not path.is_file():
        raise LonghaulError(
            f"There is no recipe '{name}'{did_you_mean(name, list_recipes())}; `longhaul recipes` lists all."
        )
    return path


def load_recipe(name: str, overrides: Iterable[str] = ()) -> Recipe:
    """Load a recipe by name or path and apply ``key=value`` overrides.

    Raises LonghaulError for a missing file, bad YAML, an unknown key or a bad value.
    """
    path = find_recipe(name)
    return parse_recipe(apply_overrides(resolve(path), overrides), str(path))


def parse_recipe(values: Mapping[str, Any], source: str) -> Recipe:
    """Validate plain values; `source` is named in the error."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise LonghaulError(f"{source}: {_describe(error)}") from None


def dump(recipe: Recipe) -> str:
    """The recipe as YAML with every default written out; `parse_recipe` reads it back equal."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def apply_overrides(values: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Set dotted keys (``schedule.lr=0.1``) in a copy of `values`; the value is read as YAML."""
    result = _merge({}, values)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise LonghaulError(f"'{override}' is not an override: write it as key=value, for example schedule.lr=0.1.")
        try:
            value = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError):  # ValueError: a date that does not exist
            raise LonghaulError(f"The value of '{override}' is not valid YAML; quote it if it is text.") from None
        section = result
        *parents, last = key.split(".")
        for depth, name in enumerate(parents):
            section = section.setdefault(name, {})
            if not isinstance(section, dict):
                raise LonghaulError(f"'{override}': {'.'.join(parents[: depth + 1])} is a value, not a section.")
        merged = _merge(section, {last: value}) if not parents and key in _SHORT else {last: value}
        section.update(merged)
    return result


_SHORT = {"engine": "name"}
"""Sections that may be given as the value of one of their keys: `engine: fsdp2`."""


def lineage(path: Path) -> list[Path]:
    """A recipe file and those that it extends, the furthest first; raises LonghaulError as `load_recipe` does."""
    files = [path]
    while (base := _read_file(files[0]).get("extends")) is not None:
        parent = _parent(files[0], base)
        if parent.resolve() in [file.resolve() for file in files]:  # one file has many spellings: `a`, `../here/a`
            raise LonghaulError(f"{files[0]} extends itself through {' -> '.join(file.name for file in files)}.")
        files.insert(0, parent)
    return files


def resolve(path: Path) -> dict[str, Any]:
    """The plain values of a recipe file, those of what it extends underneath, without defaults."""
    values: dict[str, Any] = {}
    for file in lineage(path):
        own = _read_file(file)
        own.pop("extends", None)
        values = _merge(values, own)
    return values


def _read_file(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, or a date that does not exist
        raise LonghaulError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from None
    except OSError as error:
        raise LonghaulError(f"The recipe file {path} cannot be read: {error.strerror}.") from None
    if not isinstance(values, dict):
        raise LonghaulError(f"{path} must hold keys and values, not a {type(values).__name__}.")
    return values


def _parent(path: Path, base: Any) -> Path:
    """The file that `path` extends: beside it, by name or by path, or one of the built-in recipes."""
    if not isinstance(base, str):
        raise LonghaulError(f"{path}: extends must be the name of one recipe, not {base!r}.")
    for beside in (path.parent / f"{base}.yaml", path.parent / base):
        if beside.is_file():
            return beside
    try:
        return find_recipe(base)
    except LonghaulError as error:
        raise LonghaulError(f"{path}: extends: {error}") from None


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Sections merge key by key; a section whose `kind` changes is replaced whole."""
    merged = dict(base)
    for key, value in over.items():
        if key in _SHORT and isinstance(value, str):
            value = {_SHORT[key]: value}
        old = merged.get(key)
        if isinstance(value, Mapping) and isinstance(old, Mapping) and not _other_kind(old, value):
            merged[key] = _merge(old, value)
        else:
            merged[key] = _merge({}, value) if isinstance(value, Mapping) else value
    return merged


def _other_kind(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    return "kind" in new and new["kind"] != old.get("kind")


def _describe(error: ValidationError) -> str:
    problems = []
    for item in error.errors():
        key = _dotted(item["loc"])
        if item["type"] == "extra_forbidden":
            near = did_you_mean(str(item["loc"][-1]), _fields_at(item["loc"][:-1]))
            problems.append(f"unknown key '{key}'{near or _of_kind(item['loc'])}")
        elif item["type"] == "missing":
            problems.append(f"the key '{key}' is missing")
        elif item["type"] == "union_tag_not_found":
            problems.append(f"the key '{key}.kind' is missing: give {_kinds_at(item['loc'])}")
        elif item["type"] == "union_tag_invalid":
            problems.append(f"{key}.kind: there is no '{item['ctx']['tag']}': give {_kinds_at(item['loc'])}")
        else:
            message = item["msg"].removeprefix("Value error, ")
            problems.append(f"{key}: {message}" if key and not message.startswith(key) else message)
    return "; ".join(problems) + "."


def _dotted(loc: tuple[Any, ...]) -> str:
    """The user's key for a pydantic location, without the tag that a discriminated union puts into it."""
    return ".".join(str(part) for part in _without_tags(loc))


def _without_tags(loc: tuple[Any, ...]) -> list[Any]:
    parts: list[Any] = []
    skip = False
    for index, part in enumerate(loc):
        if skip:
            skip = False
            continue
        parts.append(part)
        skip = part in _TAGGED and index + 1 < len(loc)
    return parts


def _of_kind(loc: tuple[Any, ...]) -> str:
    """What to do about a key that a section's other kind had, perhaps inherited."""
    if len(loc) < 3 or loc[-3] not in _TAGGED:
        return ""
    section = ".".join(_without_tags(loc[:-2]))
    return f" for kind {loc[-2]}; {section}={{kind: {loc[-2]}, ...}} replaces the section whole"


def _fields_at(loc: tuple[Any, ...]) -> list[str]:
    """The keys allowed at a location, for the nearest-name hint."""
    return sorted({name for model in _models_at(loc) for name in model.model_fields})


def _kinds_at(loc: tuple[Any, ...]) -> str:
    """The values that `kind` may have at the location of a union."""
    *kinds, last = [str(model.model_fields["kind"].default) for model in _models_at(loc)]
    return f"{', '.join(kinds)} or {last}"


def _models_at(loc: tuple[Any, ...]) -> list[type[BaseModel]]:
    models: list[type[BaseModel]] = [Recipe]
    for part in loc:
        following: list[type[BaseModel]] = []
        for model in models:
            field = model.model_fields.get(str(part))
            if field is not None:
                following += _models_in(field.annotation)
            elif model.model_fields.get("kind") is not None and model.model_fields["kind"].default == part:
                following.append(model)
        models = following or models
    return models


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for arg in getattr(annotation, "__args__", ()) for m in _models_in(arg)]

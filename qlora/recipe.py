"""A YAML recipe -> the settings it makes, checked against the known names, with the file's name.

Scalars are taken as they are written, not as YAML guesses: `revision: 1.10` stays 1.10. They become
flags (qlora.flag_values), so that a value is read by the same code wherever it stands.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml

from qlora.errors import UserError, did_you_mean


class Loader(yaml.SafeLoader):
    """PyYAML's, but 1e-4 is a number, as everyone who writes it means."""


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def read_recipe(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Name -> value of what the file sets, read no further than `as_flag` needs.

    An empty value, as after `revision:`, leaves the default. A run's own run.yaml is a recipe too:
    its settings are below `config:`.
    """
    root = _compose(path)
    nested = [node for key, node in root.value if key.value == "config"]
    if nested and isinstance(nested[0], yaml.MappingNode):
        root = nested[0]
    values: dict[str, Any] = {}
    unknown = []
    for key, node in root.value:
        name = key.value.replace("-", "_") if isinstance(key, yaml.ScalarNode) else _written(key)
        if name not in settings:
            unknown.append(f"unknown key {name}.{did_you_mean(name, settings)}")
        elif name in values:
            raise UserError(f"{path}: {name} is set twice: keep one of the two")
        else:
            values[name] = _recipe_value(f"{path}: {name}", node, settings[name])
    if unknown:
        raise UserError(f"{path}: {' '.join(unknown)}")
    return {name: value for name, value in values.items() if value is not None}


def _compose(path: Path) -> yaml.MappingNode:
    """The file's mapping as YAML nodes, which still know how each value was written."""
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=Loader)
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}") from None
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{path}{line} is not YAML: {error.problem}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {error}") from None
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"{path} must have lines of `name: value`, got {_written(root)}")
    return root


def _recipe_value(where: str, node: yaml.Node, hint: Any) -> Any:
    """One value: text as it is written, or a list, switch or mapping where the setting is one."""
    kind = node.tag.removeprefix("tag:yaml.org,2002:")
    if kind == "null":
        return None
    if hint is bool:
        if kind != "bool":
            raise UserError(f"{where} must be true or false, got {_written(node)}")
        return yaml.SafeLoader.bool_values[node.value.lower()]
    if get_origin(hint) is Mapping:
        if kind != "map":
            raise UserError(f"{where} must be a mapping of NAME: VALUE, got {_written(node)}")
        return Loader("").construct_document(node)
    if isinstance(node, yaml.ScalarNode):
        return node.value
    items = node.value if is_list(hint) and kind == "seq" else [node]
    if not all(isinstance(item, yaml.ScalarNode) for item in items):
        wanted = "a value or a list of them" if is_list(hint) else "one value"
        raise UserError(f"{where} must be {wanted}, got {_written(node)}")
    return [item.value for item in items]


def _written(node: yaml.Node | None) -> str:
    """What came, for a message."""
    if isinstance(node, yaml.ScalarNode):
        return repr(node.value)
    return "a mapping" if isinstance(node, yaml.MappingNode) else "a list" if node else "nothing"


def is_list(hint: Any) -> bool:
    """Whether a setting of that type takes several words."""
    return any(get_origin(part) in (tuple, Sequence) for part in (hint, *get_args(hint)))

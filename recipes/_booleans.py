"""Settings that are true or false, of whatever a config names."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hydra.errors import HydraException
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from packflex.models import SetupError

# Those that the recipes read themselves, or hand on by another name.
_READ_HERE = ("debug", "attention.leak_check")
_OPTIONAL = ("bool | None", "None | bool", "Optional[bool]")


def check_booleans(config: DictConfig) -> None:
    """Refuse words and numbers where a setting is true or false, which Python would take for true.

    Which settings are is asked of what they are given to: the parameters that a `_target_` declares as `bool`.

    Raises:
        SetupError: with the setting.
    """
    declared = _declared_booleans(OmegaConf.to_container(config, resolve=False))
    for name, nullable in (*((name, False) for name in _READ_HERE), *declared):
        value = OmegaConf.select(config, name)
        if not isinstance(value, bool) and not (nullable and value is None):
            raise SetupError(f"{name}={value} must be true or false")


def _declared_booleans(node: Any, name: str = "") -> Iterator[tuple[str, bool]]:
    """Names below `node` that their `_target_` declares as `bool`, and whether they may be null."""
    if isinstance(node, Mapping):
        kinds = _parameter_kinds(node.get("_target_"))
        for key, value in node.items():
            path = f"{name}.{key}" if name else str(key)
            kind = kinds.get(str(key), "")
            if kind == "bool" or kind in _OPTIONAL:
                yield path, kind in _OPTIONAL
            yield from _declared_booleans(value, path)
    elif isinstance(node, Sequence) and not isinstance(node, str):
        for index, value in enumerate(node):
            yield from _declared_booleans(value, f"{name}.{index}")


def _parameter_kinds(target: Any) -> dict[str, str]:
    """Annotations of what a `_target_` takes; none where it cannot be had, which Hydra says when it builds it."""
    if not isinstance(target, str):
        return {}
    try:
        parameters = inspect.signature(get_object(target)).parameters.values()
    except (HydraException, ImportError, TypeError, ValueError):
        return {}
    return {each.name: inspect.formatannotation(each.annotation).strip("'\"") for each in parameters}

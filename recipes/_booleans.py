"""Settings that are true or false, of whatever a config names."""

from __future__ import annotations

import inspect
import logging
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
    declared = _declared_booleans(OmegaConf.to_container(config, resolve=False), config)
    for name, nullable in (*((name, False) for name in _READ_HERE), *declared):
        value = OmegaConf.select(config, name)
        if isinstance(value, DictConfig) and "_target_" in value:  # Hydra makes the value
            continue
        if not isinstance(value, bool) and not (nullable and value is None):
            raise SetupError(f"{name}={value} must be true or false")


def _declared_booleans(node: Any, config: DictConfig, name: str = "") -> Iterator[tuple[str, bool]]:
    """Names below `node`, which `config` has at `name`, that a `_target_` declares as `bool`; whether null is one."""
    if isinstance(node, Mapping):
        target = f"{name}._target_" if name else "_target_"
        kinds = _parameter_kinds(OmegaConf.select(config, target)) if "_target_" in node else {}
        for key, value in node.items():
            path = f"{name}.{key}" if name else str(key)
            kind = kinds.get(str(key), "")
            if kind == "bool" or kind in _OPTIONAL:
                yield path, kind in _OPTIONAL
            yield from _declared_booleans(value, config, path)
    elif isinstance(node, Sequence) and not isinstance(node, str):
        for index, value in enumerate(node):
            yield from _declared_booleans(value, config, f"{name}.{index}")


def _parameter_kinds(target: Any) -> dict[str, str]:
    """Annotations of what a `_target_` takes; none where it cannot be had, which Hydra says when it builds it."""
    if not isinstance(target, str):
        return {}
    announced = logging.getLogger("hydra.utils")
    was, announced.disabled = announced.disabled, True  # it logs what it raises
    try:
        parameters = inspect.signature(get_object(target)).parameters.values()
    except (HydraException, ImportError, TypeError, ValueError):
        return {}
    finally:
        announced.disabled = was
    return {each.name: inspect.formatannotation(each.annotation).strip("'\"") for each in parameters}

"""Build the causal language model that a recipe trains: pretrained by folder or hub id, or random from a config.

transformers is imported when a model is built, so that `SetupError` costs nothing to import.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import torch
from torch import Tensor

from packflex.data.errors import one_line

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

Init = Literal["auto", "random", "pretrained"]

# What transformers raises for names, files and configurations that cannot be used.
_LOADING_ERRORS = (OSError, ValueError, KeyError, TypeError, ImportError)


class SetupError(ValueError):
    """A model, checkpoint, device or setting that was asked for and cannot be had; one line with the remedy."""


def is_pretrained(path: str | Path | None, init: str = "auto") -> bool:
    """Whether `build_model` loads weights: "auto" does when there is a path.

    Raises:
        SetupError: an unknown `init`, or "pretrained" without a path.
    """
    if init not in get_args(Init):
        raise SetupError(f"model.init must be one of {', '.join(get_args(Init))}; got {init!r}")
    if init == "pretrained" and path is None:
        raise SetupError(
            "model.init=pretrained needs model.path: a folder made by save_pretrained, or a hub id such as "
            "HuggingFaceTB/SmolLM2-135M"
        )
    return init != "random" and path is not None


def build_model(
    path: str | Path | None = None,
    init: str = "auto",
    *,
    architecture: Mapping[str, Any] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    revision: str | None = None,
    gradient_checkpointing: bool = False,
    seed: int = 0,
) -> PreTrainedModel:
    """A causal language model in float32, in training mode.

    Args:
        path: folder made by `save_pretrained`, or a hub id.
        init: "pretrained" loads weights from `path`; "random" builds the same architecture without them; "auto" is
            "pretrained" when there is a path.
        architecture: a configuration written out, with `model_type`, for random weights without a download. Its key
            `of` says which hub id it is of; with another path, the `config.json` there counts instead. A `vocab_size`
            of None means as many as the tokenizer has.
        tokenizer: whose ids the model must know; random models take over its special tokens.
        revision: branch, tag or commit on the hub.
        gradient_checkpointing: recompute activations in backward.
        seed: of random weights.

    Raises:
        SetupError: nothing to build from, a path without a model, a hub id that cannot be reached, a vocabulary that
            is smaller than the tokenizer's.

    Example:
        >>> build_model("HuggingFaceTB/SmolLM2-135M", "random", architecture={"of": "HuggingFaceTB/SmolLM2-135M", ...})
    """
    if is_pretrained(path, init):
        assert path is not None
        model = _load(path, revision)
    else:
        model = _random(_configuration(path, architecture, tokenizer, revision), tokenizer, seed)
    if tokenizer is not None:
        _require_vocabulary(model, tokenizer, str(path or "the random model"))
    if gradient_checkpointing:
        # transformers renamed the method after 5.17
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return model.train()


def check_adapters(config: Any) -> None:
    """Refuse adapters that packed rows cannot carry.

    Args:
        config: a `peft.PeftConfig`.

    Raises:
        SetupError: virtual tokens (prompt and prefix tuning, p-tuning), which belong before each document, or adapters
            that do not become part of the model's weights.
    """
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    if config.is_prompt_learning:
        raise SetupError(
            f"{type(config).__name__} puts virtual tokens before each input, and a packed row would have them before "
            "its first document alone; use peft=lora"
        )
    kind = PEFT_TYPE_TO_TUNER_MAPPING.get(config.peft_type)
    if not hasattr(kind, "merge_and_unload") or getattr(config, "alora_invocation_tokens", None):
        raise SetupError(
            f"{type(config).__name__} makes adapters that cannot be merged into the model that a run saves; "
            "use peft=lora"
        )


def add_adapters(model: PreTrainedModel, config: Any, seed: int = 0) -> Any:
    """The model with trainable adapters and frozen weights, in training mode.

    Args:
        model: as `build_model` gives it; changed in place.
        config: a `peft.PeftConfig`, such as `LoraConfig(r=16, target_modules="all-linear")`.
        seed: of the adapters' random start.

    Raises:
        SetupError: adapters that do not fit this model, or packed rows.
    """
    from peft import get_peft_model

    check_adapters(config)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # peft asks by a name that transformers renamed after 5.17
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing. is deprecated", FutureWarning)
        # `merge_adapters` sees to them
        warnings.filterwarnings("ignore", "Model has .tie_word_embeddings=True. and a tied layer", UserWarning)
        torch.manual_seed(seed)
        try:
            return get_peft_model(model, config).train()
        except ValueError as error:
            raise SetupError(f"{type(model).__name__}: {one_line(error)}; check the peft settings") from error


def merge_adapters(model: Any) -> tuple[PreTrainedModel, bool]:
    """The plain model that computes what a model with adapters does.

    An input embedding and an output head that share a weight get one each where an adapter wraps either: merged into
    the shared weight, its change would reach the other too. `config.tie_word_embeddings` then says so to whoever loads
    the model. Weights that the adapters leave equal stay shared.

    Args:
        model: as `add_adapters` gives it; changed in place.

    Returns:
        The model without adapters, and whether weights that were shared no longer are.

    Raises:
        SetupError: adapters that peft cannot merge.
    """
    inner = model.get_base_model()
    shared = _shared_and_adapted(inner)
    for owners in shared:
        for module, name in owners[1:]:
            weight = getattr(module, name)
            setattr(module, name, torch.nn.Parameter(weight.detach().clone(), weight.requires_grad))
    configs = (inner.config, inner.config.get_text_config())
    tied = [config.tie_word_embeddings for config in configs]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Model with .tie_word_embeddings=True. and the", UserWarning)
        warnings.filterwarnings("ignore", "Input and output embeddings are no longer tied", UserWarning)
        try:
            merged = model.merge_and_unload()
        except (ValueError, RuntimeError, AttributeError, TypeError) as error:  # NotImplementedError among them
            raise SetupError(
                f"peft cannot merge these adapters, which are saved, into the model: {one_line(error)}"
            ) from error
    differing = False
    for (first, of), *others in shared:
        weight = getattr(first, of)
        if all(torch.equal(weight, getattr(module, name)) for module, name in others):
            for module, name in others:
                setattr(module, name, weight)
        else:
            differing = True
    if shared:
        for config, was in zip(configs, tied, strict=True):
            config.tie_word_embeddings = was and not differing
    return merged, differing


def _shared_and_adapted(model: torch.nn.Module) -> list[list[tuple[torch.nn.Module, str]]]:
    """Modules and names of each weight that several modules share, an adapter's base layer among them."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    owners: dict[int, list[tuple[torch.nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append((module, name))
    adapted = {
        id(part)
        for layer in model.modules()
        if isinstance(layer, BaseTunerLayer)
        for part in layer.get_base_layer().modules()
    }
    return [each for each in owners.values() if len(each) > 1 and any(id(module) in adapted for module, _ in each)]


def _load(path: str | Path, revision: str | None) -> PreTrainedModel:
    import transformers

    name = checked_name(path)
    try:
        # float32: training rounds updates away in shorter weights; mixed precision computes in bf16 all the same
        return transformers.AutoModelForCausalLM.from_pretrained(name, revision=revision or "main", dtype=torch.float32)
    except _LOADING_ERRORS as error:
        raise SetupError(_why(name, "model", error, "config.json and model.safetensors")) from error


def _configuration(
    path: str | Path | None,
    architecture: Mapping[str, Any] | None,
    tokenizer: PreTrainedTokenizerBase | None,
    revision: str | None,
) -> PretrainedConfig:
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    written = dict(architecture or {})
    of = written.pop("of", None)
    if written and (path is None or str(path) == of):
        if written.get("vocab_size", 0) is None:
            if tokenizer is None:
                raise SetupError("model.architecture.vocab_size is not set and there is no tokenizer to take it from")
            written["vocab_size"] = len(tokenizer)
        model_type = written.pop("model_type", None)
        if model_type not in transformers.CONFIG_MAPPING:
            raise SetupError(f"model.architecture.model_type={model_type!r} is not known to this transformers")
        try:
            return transformers.AutoConfig.for_model(model_type, **written)
        except (StrictDataclassError, *_LOADING_ERRORS) as error:
            raise SetupError(_unbuildable(error)) from error
    if path is None:
        raise SetupError("there is no model to build: set model.path, or model.architecture for random weights")
    name = checked_name(path)
    try:
        return transformers.AutoConfig.from_pretrained(name, revision=revision or "main")
    except _LOADING_ERRORS as error:
        raise SetupError(
            _why(name, "config.json", error, "config.json")
            + "; off-line, random weights need model.architecture or one of the models written out in conf/model"
        ) from error


def _random(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase | None, seed: int) -> PreTrainedModel:
    import transformers

    if tokenizer is not None:
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(config, name, getattr(tokenizer, name))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        except (ValueError, TypeError, AssertionError) as error:
            raise SetupError(_unbuildable(error)) from error


def _unbuildable(error: Exception) -> str:
    return (
        f"no causal language model can be built from this configuration ({one_line(error)}); check model.architecture"
    )


def checked_name(path: str | Path) -> str:
    """A model's folder or hub id, as transformers takes it; whether the hub has it is not asked.

    Raises:
        SetupError: a file, a folder without a model or with adapters alone, or what looks like a folder and is none.
    """
    name = str(path)
    folder = Path(name).expanduser()
    if folder.is_file():
        raise SetupError(f"{name}: model.path is a file; give the folder that it is in, or a hub id")
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            if (folder / "adapter_config.json").is_file():
                raise SetupError(
                    f"{name}: the folder holds adapters, and model.path needs the whole model, which a run saves "
                    f"beside them: {folder.parent / 'model'}"
                )
            raise SetupError(
                f"{name}: the folder holds no config.json; model.path needs a folder made by save_pretrained, or a "
                "hub id"
            )
        return str(folder)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise SetupError(f"{name}: no such folder; model.path needs a folder made by save_pretrained, or a hub id")
    return name


def _why(name: str, what: str, error: Exception, needed: str) -> str:
    if Path(name).is_dir():
        return f"{name}: no {what} could be read from this folder ({one_line(error)}); it needs {needed}"
    return (
        f"{name}: no local folder, and the Hugging Face hub gave no {what} ({one_line(error)}); check model.path and "
        "the network, or build the architecture without weights (model.init=random)"
    )


def _require_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    rows = len(cast(Tensor, model.get_input_embeddings().weight))
    needed = len(tokenizer)
    if needed > rows:
        raise SetupError(
            f"{name}: the model knows {rows:,} token ids and the tokenizer gives {needed:,}; use the model's own "
            "tokenizer (tokenizer.path), or a smaller tokenizer.vocab_size for one that is trained"
        )

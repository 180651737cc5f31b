"""Errors of Hydra, Lightning and the system put into one line, as a command ends with."""

from __future__ import annotations

import re

from hydra.errors import HydraException, InstantiationException, OverrideParseException

from packflex.integrations.lightning import is_out_of_memory
from packflex.models import SetupError

# What the command line of `packflex pack` calls a setting, in messages of packflex.data.
_OPTION = re.compile(r"\(--([\w-]+)(?: (drop))?(, \.\.\.)?(?: on the command line)?\)")


def launcher_error(error: RuntimeError) -> str | None:
    """What went wrong with the jobs of submitit, in one line; None for an error of something else."""
    text = str(error)
    if 'Could not detect "srun"' in text:
        return "hydra/launcher=slurm: there is no srun here; start the sweep on a machine that submits to SLURM"
    if not type(error).__module__.startswith("submitit."):
        return None
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = [line for line in lines if re.match(r"\w+: error: ", line)]
    logs = [line.removeprefix("- ") for line in lines if line.endswith((".err", ".out"))]
    reason = said[0].split(": error: ", 1)[1] if said else lines[0]
    return f"a job of the sweep failed: {reason}" + (f" (output: {logs[0]})" if logs else "")


def missing_metric(error: RuntimeError) -> SetupError | None:
    """What Lightning says of a metric that was not there to stop early by; None for an error of something else."""
    text = " ".join(str(error).split())
    return SetupError(text) if text.startswith("Early stopping conditioned on metric") else None


def is_lost_rank(error: BaseException) -> bool:
    """Whether a rank waited for another that is no longer there."""
    text = str(error)
    return any(sign in text for sign in ("by peer", "Broken pipe", "remote process exited", "ncclRemoteError"))


def unwritten(error: OSError) -> SetupError:
    """What to do about a file or folder that could not be read or written; an error that names none goes on.

    Raises:
        OSError: the same, when it names no file.
    """
    if error.filename is None or error.strerror is None:
        raise error
    return SetupError(
        f"{error.filename}: {error.strerror}; check the disk and the permissions, or choose other folders "
        "(hydra.run.dir=... for what the run writes, paths.cache_dir=... for tokenizers)"
    )


_LOWER = (
    "a lower packing.batch_size with more trainer.accumulate_grad_batches, model.gradient_checkpointing=true, "
    "module.loss=chunked, a lower packing.seq_len"
)


def one_line_of(error: BaseException, lower: str = _LOWER) -> str:
    """What an error says, in one line: Hydra adds the places that it looked in, and wraps what a target raised.

    Args:
        error: the error.
        lower: what to lower where memory ran out.
    """
    cause = error.__cause__
    if isinstance(error, InstantiationException) and isinstance(cause, ValueError):
        return one_line_of(cause, lower)
    if is_out_of_memory(error):
        return f"{' '.join(str(error).split())} To need less memory, in this order: {lower}"
    text = " ".join(str(error).split())
    if isinstance(cause, Exception) and str(cause) not in str(error) and isinstance(error, HydraException):
        text += " " + " ".join(str(cause).split())
    for tail in (" Config search path:", " full_key:", " Set the environment variable HYDRA_FULL_ERROR", " See https"):
        text = text.split(tail, 1)[0]
    if isinstance(error, OverrideParseException):
        return f"{error.override} cannot be read ({text}); quote a value with special characters: \"key='value'\""
    text = re.sub(
        r"^Could not override '(\S+)'\. To append to your config use (\S+).*",
        _no_setting,
        text,
    )
    if "wandb" in text and isinstance(error, InstantiationException) and isinstance(cause, ModuleNotFoundError):
        text = "logger=wandb needs `pip install packflex[wandb]`; logger=csv needs nothing"
    if "Could not load 'hydra/launcher/submitit" in text:
        text += " It is part of an extra: pip install packflex[slurm]"
    if "${trainer.devices}" in text and "could not be converted to Integer" in text:
        text = (
            "hydra/launcher=slurm asks for as many GPUs on each node as there are trainer.devices, which must be a "
            "number then: trainer.devices=4"
        )
    if re.match(r"Interpolation key 'trainer\.(devices|num_nodes)' not found", text):
        text = (
            "hydra/launcher=slurm asks for the devices of a trainer, which there is none of here; use "
            "hydra/launcher=submitit_slurm"
        )
    text = re.sub(r"^In '[\w/]+': ", "", text).replace(" Available options", "; available options")
    return _OPTION.sub(
        _as_setting, text.replace("(chat_template=, --chat-template FILE)", "(tokenizer.chat_template=FILE)")
    )


def _no_setting(match: re.Match[str]) -> str:
    name, adding = match.groups()
    text = f"there is no setting {name}; --cfg job shows all of them"
    group = name.rpartition(".")[0]
    return text + (f" ({adding} hands it to what {group} builds, if that takes it)" if group else "")


def _as_setting(match: re.Match[str]) -> str:
    option, value, more = match.groups()
    group = "tokenize" if option == "on-unsupervised" else "data"
    return f"({group}.{option.replace('-', '_')}={value or '...'}{more or ''})"

"""What the recipes' command lines share: one line for a user's mistake, exit codes, and modules that jobs find."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from _errors import launcher_error, one_line_of, unwritten
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf.errors import OmegaConfBaseException

from packflex.integrations.lightning import NonFiniteLossError
from packflex.models import SetupError
from packflex.testing.leaks import LeakError

# packflex and torch raise ValueError and NotImplementedError for arguments that cannot be used.
USER_ERRORS = (
    ValueError, NotImplementedError, LeakError, NonFiniteLossError, torch.OutOfMemoryError, MisconfigurationException,
    HydraException, OmegaConfBaseException,
)  # fmt: skip


def run_command(run: Callable[[], Any]) -> None:
    """Run a command line: exit code 0 when done, 2 for a mistake in the command or the data.

    Args:
        run: a function that `hydra.main` made.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises errors instead of printing them its own way
    # where jobs of a launcher find the modules beside this one
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    try:
        run()
    except USER_ERRORS as error:  # a config that could not be composed
        stop(error)
    except OSError as error:  # a folder of the run that Hydra could not make
        stop(unwritten(error))
    except RuntimeError as error:
        reason = launcher_error(error)
        if reason is None:
            raise
        stop(SetupError(reason))


def stop(error: Exception, **lower: str) -> NoReturn:
    """End with exit code 2 and one line, or with the error itself for `debug=true`.

    Args:
        error: the user's mistake.
        lower: as `one_line_of` takes it.
    """
    if "debug=true" in sys.argv:
        raise error
    name = HydraConfig.get().job.name if HydraConfig.initialized() else Path(sys.argv[0]).stem
    print(f"{name}: error: {one_line_of(error, **lower)}", file=sys.stderr)
    sys.exit(2)

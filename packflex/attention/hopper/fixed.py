"""Launches of a kernel whose arguments always have the same types, alignment and constants.

Triton finds the compiled kernel of a launch by a look at every argument, constants included: 20 to 40 microseconds for
the kernels here, more than a small model's layer has to spare. Where shapes, strides and types are known to be those of
an earlier launch, what that one found can be launched.
"""

from __future__ import annotations

from typing import Any

import torch
from triton import knobs
from triton.compiler import CompiledKernel


class FixedLaunch:
    """One kernel with its constants and options, for arguments that Triton would not tell apart.

    Whoever calls sees to that: pointers of the same types and, where the kernel is specialised on it, alignment;
    integers that are the same or not specialised, and within the same of 32 and 64 bits; descriptors of the same boxes.
    """

    def __init__(self, kernel: Any, grid: tuple[int, int, int], constants: dict[str, Any], **options: int) -> None:
        """`constants` are the kernel's last parameters, in its order."""
        names = kernel.arg_names
        assert list(constants) == names[len(names) - len(constants) :], (list(constants), names)
        self.kernel = kernel
        self.grid = grid
        self.constants = constants
        self.options = options
        self.values = tuple(constants.values())
        self.hooks = getattr(kernel, "pre_run_hooks", ())
        self.compiled: dict[int, CompiledKernel] = {}  # by device, as Triton's own

    def __call__(self, *arguments: Any) -> None:
        """Launch with the kernel's first parameters, those without the constants."""
        if self.hooks or _switched():
            self.looked_up(*arguments)
            return
        device = torch.cuda.current_device() if torch.cuda.is_initialized() else -1
        compiled = self.compiled.get(device)
        if compiled is not None:
            compiled[self.grid](*arguments, *self.values)
            return
        found = self.looked_up(*arguments)
        if isinstance(found, CompiledKernel):  # nothing in the interpreter, a promise where Triton compiles beside
            self.compiled[device] = found

    def looked_up(self, *arguments: Any) -> Any:
        """Launch as Triton does, by a look at every argument; what was launched."""
        return self.kernel[self.grid](*arguments, **self.constants, **self.options)


def _switched() -> bool:
    """Whether a switch of Triton's makes it compile or launch otherwise than before."""
    runtime = knobs.runtime
    inspected = getattr(runtime, "add_stages_inspection_hook", None) is not None
    return bool(runtime.debug or knobs.compilation.instrumentation_mode or inspected)

"""`explain`: what becomes of a score_mod and a mask_mod, from the traced operations to the printed kernels."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO

import torch
from torch import Tensor

from packflex.masks.recognise import interval_formula
from packflex.mods.lifted import PROGRAMS, Lifted, describe
from packflex.mods.nodes import CapturedGradient, Node, ordered

_NAMES = {"b": "b", "h": "h", "q": "q_idx", "kv": "kv_idx", "score": "score", "grad": "d(out)"}


def explain(
    score_mod: Callable[..., Any] | None = None,
    mask_mod: Callable[..., Any] | None = None,
    *,
    device: torch.device | str | None = None,
    file: TextIO | None = None,
) -> None:
    """Print what packflex makes of a mod: its operations with the user's lines, its derivative, and its kernels.

    The kernels' text is the one that runs, with a comment on each line that comes from the mod (`mul at model.py:12`)
    and the path of the file in Triton's cache folder where it is kept. Mods of the same structure share kernels, whose
    comments name the first of them. With grouped heads in one tile, the same statements stand in a kernel of its own.

    Args:
        score_mod: `score_mod(score, b, h, q_idx, kv_idx) -> score`, or None.
        mask_mod: `mask_mod(b, h, q_idx, kv_idx) -> bool`, or None.
        device: where the kernels would run, as captured tensors must; theirs when None.
        file: where to write; standard output when None.

    Raises:
        ValueError: neither mod, or one that cannot become a kernel (`ModError`, with its line).
    """
    if score_mod is None and mask_mod is None:
        raise ValueError("explain takes a score_mod, a mask_mod, or both; got neither")
    scored = None if score_mod is None else describe(score_mod, "score", _device(score_mod, device))
    masked = None if mask_mod is None else describe(mask_mod, "mask", _device(mask_mod, device))
    out = sys.stdout if file is None else file
    for lifted in (masked, scored):
        if lifted is not None:
            print("\n".join(_described(lifted)), file=out)
    lists = masked is not None and not _is_interval(masked)
    if masked is not None:
        print(_how_masked(lists), file=out)
    for path, text in _kernels(masked if lists else None, scored):
        print(f"# {path}\n\n{text.rstrip()}\n", file=out)
    if (
        score_mod is not None
        and scored is not None
        and not lists
        and _runs_on_hopper(scored, _device(score_mod, device))
    ):
        from packflex.attention.hopper.mods import functions_module

        path, text = _shown(functions_module(PROGRAMS[scored.key]))
        print("The Hopper kernels call these functions, where they take the dtype and head dim:\n", file=out)
        print(f"# {path}\n\n{text.rstrip()}\n", file=out)


def _device(mod: Callable[..., Any], device: torch.device | str | None) -> torch.device:
    """The device given, else that of the captured tensors, else the one where kernels run."""
    if device is not None:
        return torch.device(device)
    from packflex.mods.fingerprint import Fingerprint, UnknownValueError

    try:
        tensors = Fingerprint(mod).tensors
    except UnknownValueError:
        tensors = []
    found = [tensor.device for tensor in tensors if tensor.dim() or tensor.device.type != "cpu"]
    return found[0] if found else torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _described(lifted: Lifted) -> Iterator[str]:
    program = lifted.program
    yield f"{program.kind}_mod {program.name}"
    for slot, tensor in enumerate(lifted.captures):
        yield f"  captures c{slot}: {_tensor(tensor)}"
    for slot, number in enumerate(lifted.numbers):
        if program.scalars[slot].role in ("float", "int"):
            yield f"  takes s{slot} = {number} at each launch; another value compiles nothing"
    yield "  computes"
    names: dict[int, str] = {}
    yield from _operations([program.out], names)
    yield f"    result: {_operand(program.out, names)}"
    if program.grad_score is not None:
        yield "  and backward"
        yield from _operations([program.grad_score], names)
        yield f"    d(score): {_operand(program.grad_score, names)}"
        for gradient in program.gradients:
            yield from _operations([*gradient.indices, gradient.value], names)
            place = ", ".join(_operand(index, names) for index in gradient.indices)
            value = _operand(gradient.value, names)
            yield f"    d(c{gradient.slot}[{place}]) += {value}, {_reduction(gradient)}"
    yield ""


def _tensor(tensor: Tensor) -> str:
    grad = ", gets a gradient" if tensor.requires_grad else ""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} on {tensor.device}{grad}"


def _operations(roots: list[Node], names: dict[int, str]) -> Iterator[str]:
    for node in ordered(roots):
        if id(node) in names or node.op in ("input", "scalar", "constant"):
            continue
        names[id(node)] = f"v{len(names)}"
        inner = ", ".join(_operand(arg, names) for arg in node.args)
        text = f"c{node.value}[{inner}]" if node.op == "read" else f"{node.op}({inner})"
        varies = "a number" if not node.deps else "per " + " ".join(_NAMES[x] for x in _NAMES if x in node.deps)
        where = f"; {node.where.rsplit('/', 1)[-1]}" if node.where else ""
        yield f"    {names[id(node)]} = {text}  # {varies}{where}"


def _operand(node: Node, names: dict[int, str]) -> str:
    if node.op == "input":
        return _NAMES[node.value]
    if node.op == "constant":
        return repr(node.value)
    return f"s{node.value}" if node.op == "scalar" else names[id(node)]


def _reduction(gradient: CapturedGradient) -> str:
    return {
        "rows": "summed over each query's keys in registers, then added atomically",
        "columns": "summed over each key's queries in registers, then added atomically",
        "tile": "added atomically, equal addresses of a tile first summed where they are few",
    }[gradient.place]


def _is_interval(masked: Lifted) -> bool:
    """Whether `create_block_mask` would make intervals, for lengths that suit what the mask captures."""
    documents = [slot for slot, ids in enumerate(masked.captures) if hasattr(ids, "packflex_documents")]
    return interval_formula(masked.key, tuple(masked.numbers), tuple(documents)) is not None


def _how_masked(lists: bool) -> str:
    if lists:
        return (
            "The mask is evaluated: `mask_tiles` classifies each tile as empty, partly or wholly visible, and\n"
            "attention evaluates it in the partly visible ones.\n"
        )
    return "Each query sees one interval of keys: the mask is two numbers a query, and no tile is evaluated.\n"


def _runs_on_hopper(scored: Lifted, device: torch.device) -> bool:
    """Whether `flex_attention` chooses the Hopper kernels for a mod, given dtypes and head dims that they take."""
    from packflex.attention.hopper import support

    if device.type != "cuda" or support.card_refusal(device):
        return False
    from packflex.attention.hopper.mods import is_light

    return is_light(PROGRAMS[scored.key])


def _kernels(masked: Lifted | None, scored: Lifted | None) -> Iterator[tuple[str, str]]:
    """(path, text) of the portable kernels that would run; none where those of plain masks do."""
    if masked is None and scored is None:
        return
    from packflex.attention.mods.kernel_text import Request
    from packflex.attention.mods.launch import kernel_module

    if masked is not None:
        from packflex.masks.tile_kernel import tile_kernel_module

        yield _shown(tile_kernel_module(masked.key))
    score, mask = (None if x is None else PROGRAMS[x.key] for x in (scored, masked))
    gradients = score is not None and bool(score.gradients)
    for name, with_gradients in (("mod_forward", False), ("mod_dkdv", gradients), ("mod_dq", gradients)):
        yield _shown(kernel_module(name, Request(score, mask, gradients=with_gradients)))


def _shown(module: Any) -> tuple[str, str]:
    with open(module.__file__) as file:
        return module.__file__, file.read()

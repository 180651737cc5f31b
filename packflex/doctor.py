"""What `packflex doctor` finds out: versions, devices, which attention backend runs and why, whether it is right."""

from __future__ import annotations

import platform
import sys
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_PACKAGES = ("packflex", "torch", "triton", "lightning", "transformers", "datasets", "tokenizers", "numpy")
# Awkward on purpose: one token, no multiple of a tile, a padded tail, an almost empty row.
_LENGTHS = ((63, 1, 40), (5,))
_SEQ_LEN = 111


@dataclass(frozen=True)
class NumericsCheck:
    """`flex_attention` against the fp64 oracle on packed rows.

    Attributes:
        backend: that ran.
        device, dtype: where and in what.
        errors: relative error of the output and the gradients of query, key and value.
        tolerance: the largest that passes for the dtype.
    """

    backend: str
    device: str
    dtype: str
    errors: dict[str, float]
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether every error is within the tolerance (NaN is not)."""
        return all(error <= self.tolerance for error in self.errors.values())


def versions() -> dict[str, str]:
    """Installed versions by name; "not installed" for what is missing."""
    found = {"python": f"{sys.version.split()[0]} ({platform.system()} {platform.machine()})"}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def devices() -> list[str]:
    """The devices that torch sees, in words."""
    import torch

    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            f"cuda:{index} {properties.name}, sm_{properties.major}{properties.minor}, "
            f"{properties.total_memory / 2**30:.0f} GiB"
        )
    return [*found, f"cpu, {torch.get_num_threads()} threads"]


def backend_and_reason() -> tuple[str, str]:
    """The backend that `flex_attention` takes for document masks on the default device, and why."""
    import torch

    from packflex.attention.hopper import support

    if torch.cuda.is_available():
        if why := support.card_refusal():
            return "triton", f"document masks run on the fused Triton kernels (not on those for Hopper: {why})"
        return "hopper", "a Hopper card is there: document masks run on its Gluon kernels, others on Triton's"
    if not torch.backends.cuda.is_built():
        return "reference", "this torch is built without CUDA: documents run one by one on the CPU, exactly"
    return "reference", "torch sees no CUDA device (no driver, or none visible): documents run one by one on the CPU"


def check_numerics() -> list[NumericsCheck]:
    """Forward and backward of `flex_attention` on small packed rows, against attention written out in float64.

    On a GPU by the chosen backend, and by Triton's kernels, which run what Hopper's do not take.
    """
    import torch

    backends = list(dict.fromkeys([backend_and_reason()[0], "triton"])) if torch.cuda.is_available() else []
    on_gpu = [_check(backend, "cuda", dtype) for backend in backends for dtype in (torch.bfloat16, torch.float16)]
    return [*on_gpu, _check("reference", "cpu", torch.float32)]


def _check(backend: str, device: str, dtype: torch.dtype) -> NumericsCheck:
    import torch

    from packflex.attention import flex_attention
    from packflex.layout import PackedLayout
    from packflex.masks import document_mask
    from packflex.testing.oracle import attention_oracle, dense_document_mask
    from packflex.testing.tolerances import RELATIVE, relative_error

    layout = PackedLayout.from_lengths(_LENGTHS, _SEQ_LEN)
    generator = torch.Generator().manual_seed(0)
    heads, kv_heads, dim = 4, 2, 64
    q, k, v = (
        torch.randn(layout.batch_size, _SEQ_LEN, h, dim, generator=generator)
        .to(device, dtype)
        .transpose(1, 2)
        .requires_grad_()
        for h in (heads, kv_heads, kv_heads)
    )
    up = torch.randn(layout.batch_size, heads, _SEQ_LEN, dim, generator=generator).to(device, dtype)
    mask = document_mask(layout.to(device))
    out = flex_attention(q, k, v, block_mask=mask, enable_gqa=True, backend=backend)
    grads = torch.autograd.grad(out, (q, k, v), up)
    exact_q, exact_k, exact_v = (x.detach().cpu().double().requires_grad_() for x in (q, k, v))
    expected, _ = attention_oracle(exact_q, exact_k, exact_v, dense_document_mask(layout))
    expected_grads = torch.autograd.grad(expected, (exact_q, exact_k, exact_v), up.cpu().double())
    names = ("output", "d query", "d key", "d value")
    pairs = zip((out, *grads), (expected, *expected_grads), strict=True)
    errors = {name: relative_error(ours, theirs) for name, (ours, theirs) in zip(names, pairs, strict=True)}
    return NumericsCheck(
        backend=backend,
        device=device,
        dtype=str(dtype).removeprefix("torch."),
        errors=errors,
        tolerance=RELATIVE[dtype],
    )


@dataclass(frozen=True)
class LeakCheck:
    """The leak check on a tiny model with random weights.

    Attributes:
        family: model type of transformers.
        device: where.
        finding: what leaks, or why the check could see nothing; empty when documents keep to themselves.
    """

    family: str
    device: str
    finding: str

    @property
    def passed(self) -> bool:
        """Whether documents keep to themselves."""
        return not self.finding


def check_leaks() -> list[LeakCheck]:
    """Every supported family as a tiny model on the default device: does a document move another one's logits?"""
    import torch

    from packflex.testing.families import FAMILIES

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return [_check_leaks(family, device) for family in FAMILIES]


def _check_leaks(family: str, device: str) -> LeakCheck:
    import torch

    from packflex.integrations.transformers import enable_packflex
    from packflex.layout import PackedLayout
    from packflex.testing.families import VOCAB, tiny_model
    from packflex.testing.leaks import LeakError, find_leaks

    model: Any = tiny_model(family)  # transformers' stubs know no .to of a string
    model.to(device)
    enable_packflex(model)
    layout = PackedLayout.from_lengths([[20, 9], [30]], 32)
    ids = torch.randint(1, VOCAB, (2, 32), generator=torch.Generator().manual_seed(0))
    report = find_leaks(model, {"input_ids": ids.to(device), "packed": layout.to(device)})
    finding = str(LeakError(report)) if report.leaks else ""
    if not report.sensitive:
        finding = "the model's logits do not depend on its documents: the check could not have seen a leak"
    return LeakCheck(family, device, finding)

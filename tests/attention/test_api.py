"""What `flex_attention` refuses, how it chooses a backend, autocast, and the torch.library contract."""

import re

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention.flex_attention import AuxRequest
from torch.nn.attention.flex_attention import create_block_mask as torch_create_block_mask

from packflex import PackedLayout, create_block_mask, document_mask, flex_attention, masks
from packflex.masks import causal
from packflex.testing.tolerances import relative_error

LAYOUT = PackedLayout.from_lengths([[3, 20, 9], [30]], seq_len=32)


def inputs(heads=4, kv_heads=2, dtype=torch.float32, length=32, dim=16):
    torch.manual_seed(0)
    return tuple(torch.randn(2, h, length, dim, dtype=dtype, requires_grad=True) for h in (heads, kv_heads, kv_heads))


def refused(error, message, q, k, v, **options):
    with pytest.raises(error, match=message):
        flex_attention(q, k, v, **options)


@pytest.mark.parametrize("backend", [None, "triton", "reference"])
def test_bad_shapes_and_types(backend):
    q, k, v = inputs()
    refused(ValueError, r"query must be \[B, H, S, D\]; got \(4, 32, 16\)", q[0], k, v, backend=backend)
    refused(ValueError, "pass enable_gqa=True", q, k, v, backend=backend)
    refused(ValueError, "multiple of key heads; got 3 and 2", q[:, :3], k, v, enable_gqa=True, backend=backend)
    refused(ValueError, r"key \(2, 2, 31, 16\)", q, k[:, :, 1:], v, enable_gqa=True, backend=backend)
    refused(TypeError, "one dtype; got query torch.float32, key torch.float16", q, k.half(), v, enable_gqa=True)
    refused(TypeError, "got torch.int64", q.long(), k, v, enable_gqa=True, backend=backend)
    refused(ValueError, "softcap must be above 0", q, k, v, enable_gqa=True, softcap=0.0, backend=backend)
    refused(ValueError, "sinks must be 4 floats", q, k, v, enable_gqa=True, sinks=torch.zeros(2), backend=backend)


@pytest.mark.parametrize("backend", [None, "triton", "torch", "reference"])
def test_bad_masks(backend):
    q, k, v = inputs()
    other = document_mask(PackedLayout.from_lengths([[30], [30]], seq_len=40))
    refused(
        ValueError,
        re.escape("block_mask is for (B, H, Q_LEN, KV_LEN) = (2, 1, 40, 40), query and key are for (2, 4, 32, 32)"),
        *(q, k, v), enable_gqa=True, block_mask=other, backend=backend,
    )  # fmt: skip
    three = document_mask(PackedLayout.from_lengths([[3]] * 3, seq_len=32))
    refused(ValueError, "block_mask is for", q, k, v, enable_gqa=True, block_mask=three, backend=backend)
    refused(TypeError, "got Tensor", q, k, v, enable_gqa=True, block_mask=torch.ones(32, 32), backend=backend)


def test_a_named_backend_is_used_or_raises():
    q, k, v = (x.detach() for x in inputs())
    refused(
        ValueError, "'triton', 'torch', 'reference' or None; got 'flash'", q, k, v, backend="flash", enable_gqa=True
    )
    lists = create_block_mask(masks.strided(4), None, None, 32, 32, device="cpu")
    refused(
        NotImplementedError, "masks that are intervals", q, k, v, backend="hopper", block_mask=lists, enable_gqa=True
    )
    capped = {"score_mod": lambda s, *i: s, "softcap": 2.0, "backend": "hopper", "enable_gqa": True}
    refused(NotImplementedError, "no score_mod together with a softcap", q, k, v, **capped)
    big = inputs(dim=264)
    refused(NotImplementedError, "up to 256; D is 264", *big, backend="triton", enable_gqa=True)
    refused(NotImplementedError, "float64", *inputs(dtype=torch.float64), backend="triton", enable_gqa=True)
    refused(NotImplementedError, "bfloat16", *inputs(dtype=torch.bfloat16), backend="triton", enable_gqa=True)
    with pytest.raises(ValueError, match="tiles of the Triton kernels"):
        flex_attention(q, k, v, enable_gqa=True, kernel_options={"forward_block_m": 32})
    with pytest.raises(ValueError, match="kernel_options has no 'BLOCK_M'; the Triton tiles are forward_block_m"):
        flex_attention(q, k, v, enable_gqa=True, kernel_options={"BLOCK_M": 32}, backend="triton")


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_double_backward_is_refused(backend):
    q, k, v = inputs()
    out = flex_attention(q, k, v, block_mask=document_mask(LAYOUT), enable_gqa=True, backend=backend)
    (grad,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize(("backend", "dtype"), [("reference", torch.bfloat16), ("triton", torch.float16)])
def test_autocast_casts_like_sdpa(backend, dtype):
    """Under autocast RoPE leaves q and k in fp32 beside a half v; all three become autocast's dtype, gradients fp32."""
    q, k, v = inputs()
    mask = document_mask(LAYOUT)
    with torch.autocast("cpu", dtype=dtype):
        out = flex_attention(q, k, v.to(dtype), block_mask=mask, enable_gqa=True, backend=backend)
    assert out.dtype == dtype
    exact = flex_attention(q, k, v, block_mask=mask, enable_gqa=True)
    assert relative_error(out, exact) < 1e-2
    grad_q, exact_grad_q = (torch.autograd.grad(x.float().pow(2).sum(), q)[0] for x in (out, exact))
    assert grad_q.dtype == torch.float32
    assert relative_error(grad_q, exact_grad_q) < 3e-2


def test_takes_torch_block_masks_and_aux_requests():
    q, k, v = (x.detach() for x in inputs())
    theirs = torch_create_block_mask(causal, None, None, 32, 32, device="cpu")
    out, aux = flex_attention(q, k, v, block_mask=theirs, enable_gqa=True, return_aux=AuxRequest(lse=True))
    row = document_mask(PackedLayout.from_lengths([[32], [32]]))
    expected, lse = flex_attention(q, k, v, block_mask=row, enable_gqa=True, return_lse=True)
    assert relative_error(out, expected) < 1e-6
    assert relative_error(aux.lse, lse) < 1e-6


MODS = {
    "none": None,
    "bias": lambda s, b, h, q, kv: s - (q - kv).abs() / 9,
    "nonlinear": lambda s, b, h, q, kv: torch.where(h > 1, s * s, -s),
}


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("mod", MODS)
@pytest.mark.parametrize("kind", ["none", "documents", "lists"])
def test_the_largest_scores(kind, mod, softcap):
    from torch.nn.attention.flex_attention import AuxRequest

    q, k, v = inputs()
    batch, heads, length, dim = q.shape
    mask = {
        "none": None,
        "documents": document_mask(PackedLayout.from_lengths([[5, length - 9]] * batch, length)),
        "lists": create_block_mask(masks.dilated_window(4, 3), None, None, length, length, "cpu", 16),
    }[kind]
    scores = q.detach().double() @ k.detach().double().repeat_interleave(heads // k.shape[1], 1).mT * dim**-0.5
    grids = torch.meshgrid(*(torch.arange(n) for n in scores.shape), indexing="ij")
    if MODS[mod] is not None:
        scores = MODS[mod](scores, *grids)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask.mask_mod(*grids), -torch.inf)
    for backend in ("reference", "triton"):
        out, aux = flex_attention(
            q, k, v, score_mod=MODS[mod], block_mask=mask, softcap=softcap, enable_gqa=True, backend=backend,
            return_aux=AuxRequest(lse=True, max_scores=True),
        )  # fmt: skip
        assert not aux.max_scores.requires_grad
        assert aux.max_scores.dtype == torch.float32
        torch.testing.assert_close(aux.max_scores.double(), scores.amax(-1), rtol=2e-5, atol=2e-5)
        plain = flex_attention(
            q, k, v, score_mod=MODS[mod], block_mask=mask, softcap=softcap, enable_gqa=True, backend=backend
        )
        assert torch.equal(out, plain)
    with pytest.raises(NotImplementedError, match=r"max_scores is computed outside torch\.compile"):
        flex_attention(q, k, v, enable_gqa=True, backend="torch", return_aux=AuxRequest(max_scores=True))


def test_output_is_laid_out_for_the_projection_that_follows():
    q, k, v = inputs()
    for backend in ("triton", "reference"):
        out = flex_attention(q, k, v, enable_gqa=True, backend=backend)
        assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_opcheck(backend, with_sinks):
    q, k, v = inputs()
    mask = document_mask(LAYOUT)
    sinks = torch.randn(4, requires_grad=True) if with_sinks else None
    arguments = (q, k, v, mask.kv_intervals, mask.q_intervals, sinks, 0.25, 0.0, backend, [], False)
    torch.library.opcheck(torch.ops.packflex.attention, arguments)


def test_opcheck_of_intervals():
    arguments = (LAYOUT.cu_seqlens, LAYOUT.row_offsets, None, LAYOUT.seq_len, True, 7)
    torch.library.opcheck(torch.ops.packflex.document_intervals, arguments)


@pytest.mark.parametrize("prebuilt", [True, False])
def test_compiles_once_over_changing_documents(prebuilt):
    """fullgraph, and no second graph when boundaries and the number of documents change."""
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def step(q, k, v, layout):
        return flex_attention(q, k, v, block_mask=document_mask(layout, window=20), enable_gqa=True) * 2

    q, k, v = inputs()
    for rows in ([[3, 20, 9], [30]], [[32], [32]], [[1] * 30, []], [[5, 5], [1, 2, 3]], [[16, 16], [8] * 4]):
        layout = PackedLayout.from_lengths(rows, 32)
        mask = document_mask(layout, window=20)
        expected = flex_attention(q, k, v, block_mask=mask, enable_gqa=True) * 2
        if not prebuilt:
            layout = PackedLayout.from_lengths(rows, 32)
        out = step(q, k, v, layout)
        assert torch.equal(out, expected)
        grads = (torch.autograd.grad(x.sum(), (q, k, v)) for x in (out, expected))
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert counter.frame_count == 1

"""Mods inside torch.compile on the GPU: inductor's graph holds our kernels, and captured parameters get gradients."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from packflex import PackedLayout, create_block_mask, document_mask, flex_attention, masks
from packflex.testing.tolerances import relative_error

pytestmark = pytest.mark.gpu
HEADS, S = 8, 512


class Block(nn.Module):
    """Projection, attention with a learned bias and gate, projection."""

    def __init__(self):
        super().__init__()
        self.into = nn.Linear(256, (HEADS + 4) * 64)
        self.out = nn.Linear(HEADS * 64, 256)
        self.table = nn.Parameter(torch.randn(HEADS, 32) / 4)
        self.gate = nn.Parameter(torch.randn(HEADS) / 4)

    def forward(self, x, mask):
        heads = self.into(x).unflatten(-1, (-1, 64)).transpose(1, 2)
        q, k, v = heads[:, :HEADS], heads[:, HEADS : HEADS + 2], heads[:, HEADS + 2 :]

        def mod(score, b, h, q_idx, kv_idx):
            near = self.table[h, (q_idx - kv_idx).abs().clamp(max=31)]
            return score * torch.sigmoid(self.gate)[h] + near

        out = flex_attention(q, k, v, score_mod=mod, block_mask=mask, enable_gqa=True)
        return self.out(out.transpose(1, 2).flatten(2))


def layout(rows):
    return PackedLayout.from_lengths(rows, S).to("cuda")


def in_lists(rows):
    mod = masks.and_masks(masks.document(layout(rows)), masks.dilated_window(40, 2))
    return create_block_mask(mod, 2, None, S, S, device="cuda")


@pytest.mark.parametrize("make", [lambda rows: document_mask(layout(rows)), in_lists], ids=["intervals", "lists"])
def test_a_compiled_block_equals_the_eager_one(make):
    torch._dynamo.reset()
    torch.manual_seed(0)
    block = Block().to("cuda", torch.bfloat16)
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(block, fullgraph=True, backend=counter)
    for rows in ([[100, 300], [512]], [[5] * 90, [40, 60]]):
        x = torch.randn(2, S, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        grad = torch.randn(2, S, 256, device="cuda", dtype=torch.bfloat16)
        mask = make(rows)
        ours, eager = compiled(x, mask), block(x, mask)
        assert relative_error(ours, eager) < 1e-2
        wanted = [x, *block.parameters()]
        pairs = zip(*(torch.autograd.grad(out, wanted, grad) for out in (ours, eager)), strict=True)
        for one, other in pairs:
            assert other.norm() > 0
            assert relative_error(one, other) < 2e-2
    assert counter.frame_count == 1

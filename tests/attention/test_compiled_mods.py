"""Mods inside torch.compile: one graph, our kernels in it, and gradients to what the mods capture."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from packflex import PackedLayout, create_block_mask, document_mask, flex_attention, masks
from packflex.masks import BlockMask

S, HEADS = 40, 4


class Attention(torch.nn.Module):
    """A score_mod over learned tables, one read twice, one through a view, one through an operation outside."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = torch.nn.Parameter(torch.randn(HEADS, 10, generator=generator))
        self.gate = torch.nn.Parameter(torch.randn(HEADS, generator=generator))
        self.number = torch.tensor(0.5)
        self.factor = 1.5

    def forward(self, fused, mask, backend):
        heads = fused.unflatten(-1, (-1, 16)).transpose(1, 2)
        q, k, v = heads[:, :HEADS], heads[:, HEADS : HEADS + 2], heads[:, HEADS + 2 :]
        gate = torch.sigmoid(self.gate)

        def mod(score, b, h, q_idx, kv_idx):
            near = self.table[h, (q_idx - kv_idx).abs().clamp(max=9)]
            scaled = score * gate[h] * torch.sigmoid(self.gate)[h]
            return scaled + near * self.gate[0] + self.table[0, h] * self.factor + self.number

        out, lse = flex_attention(
            q, k, v, score_mod=mod, block_mask=mask, enable_gqa=True, return_lse=True, backend=backend
        )
        return out.sin().sum() + lse.masked_fill(lse == -torch.inf, 0).cos().sum()


def inputs():
    return torch.randn(2, S, (HEADS + 4) * 16, generator=torch.Generator().manual_seed(1)).requires_grad_()


LAYOUT = PackedLayout.from_lengths([[17, 20], [40]], S)
MASKS = {
    "lists": create_block_mask(masks.strided(5), None, None, S, S, "cpu", 16),
    "intervals": document_mask(LAYOUT),
    "document lists": create_block_mask(
        masks.and_masks(masks.document(LAYOUT), masks.strided(3)), 2, None, S, S, "cpu", 16
    ),
    "none": None,
}


@pytest.mark.parametrize(
    ("name", "compiler"), [*((name, "aot_eager") for name in MASKS), ("document lists", "inductor")]
)
def test_a_compiled_model_runs_its_mods_in_our_kernels(name, compiler):
    torch._dynamo.reset()
    model = Attention()
    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    fused = inputs()
    wanted = [fused, *model.parameters()]
    ours = compiled(fused, MASKS[name], "triton")
    exact = model(fused, MASKS[name], "reference")
    torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-4)
    pairs = zip(*(torch.autograd.grad(x, wanted, retain_graph=True) for x in (ours, exact)), strict=True)
    for one, other in pairs:
        assert other.abs().max() > 1e-2
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(compiled(fused, MASKS[name], "triton"), exact, rtol=1e-5, atol=1e-4)


def test_the_graph_holds_our_op_and_no_second_graph_follows():
    """Changed documents, tables and 0-d tensors run the first graph again."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model = Attention()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    fused = inputs()
    for number, rows in enumerate(([[17, 20], [40]], [[1, 2, 3, 30], [5, 5]])):
        mask = document_mask(PackedLayout.from_lengths(rows, S))
        mask = BlockMask.from_intervals(mask.kv_intervals, mask.q_intervals, 16)
        with torch.no_grad():
            model.table.mul_(1.5)
            model.number = model.number + number
        torch.testing.assert_close(
            compiled(fused, mask, "triton"), model(fused, mask, "reference"), rtol=1e-5, atol=1e-4
        )
    assert counter.frame_count == 1
    targets = {str(node.target) for graph in counter.graphs for node in graph.graph.nodes}
    assert any("packflex_mod_attention" in target for target in targets), targets


def test_a_branch_in_a_compiled_mod_is_an_error():
    torch._dynamo.reset()
    q, k, v = (torch.randn(1, HEADS, S, 16) for _ in range(3))

    def branching(score, b, h, q_idx, kv_idx):
        return score if q_idx > kv_idx else -score

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(q, k, v):
        return flex_attention(q, k, v, score_mod=branching, enable_gqa=True, backend="triton")

    with pytest.raises(torch._dynamo.exc.TorchDynamoException, match="branching"):
        run(q, k, v)


def test_a_table_on_another_device_is_an_error():
    torch._dynamo.reset()
    q, k, v = (torch.randn(1, HEADS, S, 16) for _ in range(3))
    table = torch.zeros(HEADS, device="meta")

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(q, k, v):
        return flex_attention(q, k, v, score_mod=lambda s, b, h, i, j: s + table[h], enable_gqa=True, backend="triton")

    with pytest.raises(torch._dynamo.exc.TorchDynamoException, match="is on meta, query on cpu: move it with"):
        run(q, k, v)


def test_changed_lengths_and_numbers_stop_compiling():
    """One graph for the first length and number, one for all others."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    table = torch.randn(HEADS, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def attend(q, mask, factor, backend):
        def mod(score, b, h, q_idx, kv_idx):
            return score * factor + table[h, (q_idx - kv_idx).abs()]

        return flex_attention(q, q, q, score_mod=mod, block_mask=mask, backend=backend)

    compiled = torch.compile(attend, fullgraph=True, backend=counter)
    for step, (batch, length) in enumerate([(1, 40), (2, 48), (3, 56), (2, 40)]):
        q = torch.randn(batch, HEADS, length, 16, generator=torch.Generator().manual_seed(step)).requires_grad_()
        mask = document_mask(PackedLayout.from_lengths([[17, length - 17]] * batch, length))
        factor = 1.0 + step / 3
        ours, exact = compiled(q, mask, factor, "triton"), attend(q, mask, factor, "reference")
        torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-5)
        grads = [torch.autograd.grad(x.sin().sum(), (q, table)) for x in (ours, exact)]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)
    assert counter.frame_count <= 3
    before = counter.frame_count
    for step in range(12):
        compiled(q, mask, 0.1 + step / 7, "triton")
    assert counter.frame_count == before


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_learned_tables_compile_without_a_gpu_too(compiler):
    torch._dynamo.reset()
    model = Attention()
    fused = inputs()
    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    for mask in (MASKS["lists"], MASKS["intervals"]):
        ours, exact = compiled(fused, mask, None), model(fused, mask, None)
        torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-4)
        grads = [torch.autograd.grad(x, (fused, *model.parameters()), retain_graph=True) for x in (ours, exact)]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


def test_a_learned_mask_compiles():
    torch._dynamo.reset()
    spans = torch.tensor([3.0, 9.0, 20.0, 40.0], requires_grad=True)
    mask = create_block_mask(lambda b, h, q, kv: (q >= kv) & (q - kv < spans[h] + 1), None, HEADS, S, S, "cpu", 16)
    q = torch.randn(1, HEADS, S, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def attend(q, backend):
        return flex_attention(q, q, q, score_mod=lambda s, b, h, i, j: s * spans[h], block_mask=mask, backend=backend)

    ours = torch.compile(attend, fullgraph=True, backend="aot_eager")(q, "triton")
    found = [torch.autograd.grad(x.sin().sum(), (q, spans)) for x in (ours, attend(q, "reference"))]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)

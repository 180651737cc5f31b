"""What surrounds a call (checkpoints, saved-tensor hooks, anomaly mode, torch.func) does not reach its trace."""

import functools
import threading
from collections import OrderedDict

import pytest
import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from packflex import create_block_mask, flex_attention, masks, score_mods
from packflex.mods import lifted as lifted_module
from packflex.mods.errors import ModError
from packflex.mods.lifted import lift
from packflex.testing.mod_case import SMALL_TILES

H, S = 2, 20
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _nothing_remembered(monkeypatch):
    monkeypatch.setattr(lifted_module, "_traces", OrderedDict())


class Attention(torch.nn.Module):
    """Attention whose mod reads a learned table and what it computes of a learned gate."""

    def __init__(self, backend="triton"):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.project = torch.nn.Linear(H * 16, 3 * H * 16)
        self.table = torch.nn.Parameter(torch.randn(H, S, generator=generator))
        self.gate = torch.nn.Parameter(torch.randn(H, generator=generator))
        self.backend = backend
        for parameter in self.project.parameters():
            torch.nn.init.normal_(parameter, std=0.3, generator=generator)

    def forward(self, x):
        q, k, v = self.project(x).view(1, S, 3, H, 16).permute(2, 0, 3, 1, 4)

        def mod(score, b, h, q_idx, kv_idx):
            return score * torch.sigmoid(self.gate)[h] + self.table[h, (q_idx - kv_idx).abs()]

        options = SMALL_TILES if self.backend == "triton" else None
        out = flex_attention(q, k, v, score_mod=mod, backend=self.backend, kernel_options=options)
        return x + out.transpose(1, 2).reshape(x.shape)


def gradients(run, backend="triton"):
    layers = torch.nn.Sequential(Attention(backend), Attention(backend))
    x = torch.randn(1, S, H * 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
    out = run(layers, x)
    out.square().sum().backward()
    found = [x.grad, *(p.grad for p in layers.parameters())]
    assert all(g is not None and g.norm() > 1e-4 for g in found)
    return found


def checkpointed(layers, x):
    for layer in layers:
        x = checkpoint(layer, x, use_reentrant=False)
    return x


def saved_on_cpu(layers, x):
    with torch.autograd.graph.save_on_cpu():
        return layers(x)


def packed(layers, x):
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        return layers(x)


def looked_over(layers, x):
    with torch.autograd.set_detect_anomaly(True):
        return layers(x)


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("run", [checkpointed, saved_on_cpu, packed, looked_over])
def test_gradients_are_those_of_a_plain_call(run, backend):
    plain = gradients(lambda layers, x: layers(x), backend)
    lifted_module._traces.clear()
    for _ in range(2):  # traced, then remembered
        found = gradients(run, backend)
        assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


def test_a_size_that_changes_under_a_checkpoint():
    """What was computed before the changed size was noticed is no part of what the checkpoint counts."""
    flags, gate = torch.ones(S), torch.zeros(H, requires_grad=True)

    def mod(score, b, h, q_idx, kv_idx):
        return score * torch.sigmoid(gate)[h] * (len(flags.nonzero()) / S)

    def attend(x):
        return flex_attention(x, x, x, score_mod=mod, backend="triton", kernel_options=SMALL_TILES)

    x = torch.randn(1, H, S, 16, generator=torch.Generator().manual_seed(0))
    for count in (S, 7, 7, 3):
        flags.copy_(torch.arange(S) < count)
        found = []
        for run in (lambda x: checkpoint(attend, x, use_reentrant=False), attend):
            leaf = x.clone().requires_grad_()
            found.append(torch.autograd.grad(run(leaf).square().sum(), (leaf, gate)))
        assert all(map(torch.equal, *found))


def test_a_selective_checkpoint():
    """It looks for each kept operation again; those of a mod's captured tensors are not its own."""
    x = torch.randn(1, H, S, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weight = torch.randn(H, H, generator=torch.Generator().manual_seed(1)).requires_grad_()

    def attend(x):
        mod = lambda s, b, h, q, kv: s * torch.sigmoid(weight @ weight)[h, 0]  # noqa: E731
        return flex_attention(x, x, x, score_mod=mod, backend="triton", kernel_options=SMALL_TILES)

    def kept(context, operation, *arguments, **options):
        return CheckpointPolicy.MUST_SAVE if "mm" in str(operation) else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, kept)
    plain = torch.autograd.grad(attend(x).square().sum(), (x, weight))
    lifted_module._traces.clear()
    for _ in range(2):
        out = checkpoint(attend, x, use_reentrant=False, context_fn=contexts)
        assert all(map(torch.equal, torch.autograd.grad(out.square().sum(), (x, weight)), plain))


def test_evaluated_masks_are_made_under_a_checkpoint():
    def attend(x):
        mask = create_block_mask(masks.dilated_window(3, 2), None, None, S, S, "cpu", 16)
        return flex_attention(x, x, x, block_mask=mask, score_mod=score_mods.alibi(H), backend="triton")

    x = torch.randn(1, H, S, 16, requires_grad=True)
    plain = torch.autograd.grad(attend(x).sum(), x)
    lifted_module._traces.clear()
    assert torch.equal(torch.autograd.grad(checkpoint(attend, x, use_reentrant=False).sum(), x)[0], plain[0])


def bad(score, b, h, q_idx, kv_idx):
    return score + torch.digamma(score)


@pytest.mark.parametrize("mod", [score_mods.softcap(2.0), bad])
def test_hooks_and_anomaly_mode_are_as_they_were(mod):
    """Also after a mod that was refused, and in their order."""
    seen = []

    def hook(name):
        return torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(name) or t, lambda t: t)

    with hook("outer"), torch.autograd.set_detect_anomaly(True, check_nan=False):
        with hook("inner"):
            if mod is bad:
                with pytest.raises(ModError):
                    lift(mod, "score", CPU)
            else:
                lift(mod, "score", CPU)
            assert torch.is_anomaly_enabled()
            assert not torch.is_anomaly_check_nan_enabled()
            assert seen == [], "the trace saves nothing of the caller's"
            torch.ones(2, requires_grad=True).exp()
        torch.ones(2, requires_grad=True).exp()
    assert seen == ["inner", "outer"]
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    assert not torch.is_anomaly_enabled()


def test_threads_that_trace_at_once_leave_anomaly_mode_on():
    failed = []

    def work(n):
        try:
            for i in range(4):
                lift(lambda s, b, h, q, kv, i=i: s * (n + 0.1 * i), "score", CPU)
        except Exception as error:
            failed.append(error)

    with torch.autograd.set_detect_anomaly(True):
        threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert torch.is_anomaly_enabled()
    assert not failed


def test_transforms_that_the_kernels_do_not_take_are_refused():
    q = torch.randn(1, 2, 32, 16)
    mod = score_mods.alibi(2)
    for options in ({}, {"backend": "triton"}, {"backend": "triton", "score_mod": mod}):
        with pytest.raises(NotImplementedError, match=r"torch.func's derivatives .* write torch.autograd.grad"):
            torch.func.grad(lambda x, options=options: flex_attention(x, x, x, **options).sum())(q)
    with pytest.raises(NotImplementedError, match=r"torch.vmap does not .* part of the batch axis"):
        torch.vmap(lambda x: flex_attention(x, x, x, backend="triton", score_mod=mod))(q[None])


def test_transforms_of_torch_func():
    """Outside of them mods are traced; a captured tensor that they differentiate is refused, not left out."""
    x = torch.randn(1, H, S, 16, generator=torch.Generator().manual_seed(0))
    gate = torch.ones(H)

    def attend(x, gate):
        mask = create_block_mask(masks.dilated_window(4, 2), None, None, S, S, "cpu", 16)
        return (
            flex_attention(x, x, x, score_mod=lambda s, b, h, q, kv: s * gate[h], block_mask=mask, backend="reference")
            .square()
            .sum()
        )

    leaf = x.clone().requires_grad_()
    plain = torch.autograd.grad(attend(leaf, gate), leaf)[0]
    lifted_module._traces.clear()
    assert torch.allclose(torch.func.grad(lambda x: attend(x, gate))(x), plain, atol=1e-6)
    lifted_module._traces.clear()
    with pytest.raises(
        ModError, match=r"torch\.func .* does not reach what a mod captures; write torch\.autograd\.grad"
    ):
        torch.func.grad(lambda gate: attend(x, gate))(gate)
    assert torch._C._functorch.peek_interpreter_stack() is None

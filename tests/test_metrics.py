"""Exact pairs and FLOPs against counting, weights that multiply tokens, rates over a window."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from packflex import PackedLayout
from packflex.integrations.lightning.shapes import attention_shape, token_cost
from packflex.metrics import AttentionShape, Throughput, attention_pairs, matmul_flops, matmul_parameters, peak_flops
from packflex.models import add_adapters
from packflex.testing.families import tiny_model
from packflex.testing.oracle import dense_document_mask

LAYOUT = PackedLayout.from_lengths([[3, 20, 9], [], [31]], 40)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 7, 20, 100])
def test_pairs_are_the_masks(causal, window):
    assert attention_pairs(LAYOUT, causal, window) == dense_document_mask(LAYOUT, causal, window).sum().item()


def test_attention_flops():
    """Forward 4 D and backward 8 D a pair and head, over layers with and without windows."""
    shape = AttentionShape((None, 7, None), width=4 * 16)
    pairs = 2 * attention_pairs(LAYOUT) + attention_pairs(LAYOUT, window=7)
    assert shape.flops(LAYOUT) == 12 * 4 * 16 * pairs


def test_parameters_that_multiply_tokens():
    model = nn.Sequential(nn.Embedding(100, 8), nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 100, bias=False))
    assert matmul_parameters(model) == 8 * 16 + 16 * 100
    tied = nn.Sequential(nn.Embedding(100, 16), nn.Linear(16, 100, bias=False))
    tied[1].weight = tied[0].weight
    assert matmul_parameters(tied) == 1600


def counted_flops(model, tokens):
    """What autograd really computes in matrix products of weights, attention's own left out."""
    with FlopCounterMode(display=False) as counter:
        ids = torch.arange(tokens)[None]
        model(ids, labels=ids, use_cache=False).loss.backward()
    counts = counter.get_flop_counts()["Global"]
    return sum(flops for operation, flops in counts.items() if str(operation) in ("aten.mm", "aten.addmm"))


def test_flops_of_a_token_are_those_of_autograd():
    """Adapters: nothing is multiplied for the gradient of a frozen weight."""
    peft = pytest.importorskip("peft")
    model = tiny_model("llama").train()
    full = matmul_flops(model)
    assert full == 6 * matmul_parameters(model) == counted_flops(model, 16) / 16
    assert token_cost(model) == matmul_parameters(model) / (2 * 64)

    adapted = add_adapters(model, peft.LoraConfig(r=2, target_modules="all-linear"))
    weights = {name: p.numel() for name, p in adapted.named_parameters() if "embed" not in name and p.dim() == 2}
    trained = sum(count for name, count in weights.items() if "lora" in name)
    assert matmul_flops(adapted) == 4 * (sum(weights.values()) - trained) + 6 * trained
    first = ("layers.0.self_attn.q_proj", "layers.0.self_attn.k_proj", "layers.0.self_attn.v_proj")
    needless = sum(
        count for name, count in weights.items() if any(f in name for f in first) and "lora_B" not in name
    )  # no gradient goes on to the frozen embeddings
    assert matmul_flops(adapted) - 2 * needless == counted_flops(adapted, 16) / 16
    assert 0.6 * full < matmul_flops(adapted) < 0.8 * full
    assert token_cost(adapted) == pytest.approx(matmul_flops(adapted) / (6 * 2 * 64))


@pytest.mark.parametrize(
    ("kind", "options", "windows", "width"),
    [
        ("llama", {}, (None, None), 64),
        ("mistral", {"sliding_window": 6}, (6, 6), 64),
        ("gemma2", {"sliding_window": 6, "head_dim": 8}, (6, None), 32),
        ("qwen3", {"head_dim": 32}, (None, None), 128),
    ],
)
def test_attention_shape_of_families(kind, options, windows, width):
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model(
        kind, **{**sizes, "num_key_value_heads": 2, "vocab_size": 64, "pad_token_id": 0, **options}
    )
    assert attention_shape(AutoModelForCausalLM.from_config(config)) == AttentionShape(windows, width)


def test_mixtures_of_experts_have_no_shape():
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model("mixtral", **sizes, num_key_value_heads=2, num_local_experts=2, vocab_size=64)
    assert attention_shape(AutoModelForCausalLM.from_config(config)) is None


def test_rates_look_back_on_the_window():
    throughput = Throughput(window=2)
    assert throughput.rates() is None
    throughput.update(10.0)
    assert throughput.rates() is None
    throughput.update(12.0, tokens=100, documents=4, flops=1e3)
    assert throughput.rates() == (50.0, 2.0, 500.0)
    throughput.update(13.0, tokens=200, documents=1)
    throughput.update(14.0, tokens=300, documents=1)
    assert throughput.rates() == (250.0, 1.0, 0.0)


def test_peak_is_not_made_up(monkeypatch):
    assert peak_flops("cpu") is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: names.pop(0))
    names = ["NVIDIA H200", "NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe", "NVIDIA L40S", "Some Other Card"]
    assert [peak_flops("cuda:0") for _ in range(5)] == [989e12, 989e12, 756e12, 362e12, None]

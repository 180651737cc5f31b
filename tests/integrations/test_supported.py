"""Which architectures are refused, and that the refusal names the reason."""

from __future__ import annotations

import pytest
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from packflex.integrations.transformers import check_supported, enable_packflex
from packflex.testing.families import FAMILIES, VOCAB, tiny_model


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("mamba", "recurrent state"),
        ("mamba2", "recurrent state"),
        ("falcon_mamba", "recurrent state"),
        ("rwkv", "recurrent state"),
        ("xlstm", "recurrent state"),
        ("jamba", r"layers .* are '(mamba|linear_attention)': a recurrent state"),
        ("bamba", "recurrent state"),
        ("zamba", "recurrent state"),
        ("zamba2", "recurrent state"),
        ("falcon_h1", "recurrent state"),
        ("granitemoehybrid", "recurrent state"),
        ("recurrent_gemma", "recurrent state"),
        ("nemotron_h", "recurrent state"),
        ("minimax", "recurrent state"),
        ("qwen3_next", r"layers 0, 1, 2, 4, \.\.\. are 'linear_attention': a recurrent state"),
        ("lfm2", "convolution along the row"),
        ("llama4_text", "chunks are counted from the start of the row"),
        ("doge", "picks its keys itself"),
        ("t5", "an encoder-decoder has two"),
        ("gemma3", "also reads vision inputs.*Gemma3ForCausalLM"),
    ],
)
def test_refused_by_name(model_type: str, reason: str) -> None:
    config = AutoConfig.for_model(model_type)
    with pytest.raises(NotImplementedError, match=f"model_type '{model_type}'.*cannot be packed: .*{reason}"):
        check_supported(config)


def test_convolution_layers_are_named() -> None:
    config = AutoConfig.for_model("llama")
    config.layer_types = ["full_attention", "conv"]
    with pytest.raises(NotImplementedError, match="layer 1 is 'conv': a convolution"):
        check_supported(config)
    config.layer_types = ["full_attention", "wavelet"]
    with pytest.raises(NotImplementedError, match="layer 1 is 'wavelet': packflex keeps documents apart in full and"):
        check_supported(config)


def test_modules_are_looked_at() -> None:
    model = tiny_model("llama")
    check_supported(model)
    model.model.layers[1].mixer = nn.Conv1d(4, 4, 3)
    with pytest.raises(NotImplementedError, match=r"LlamaForCausalLM .* model\.layers\.1\.mixer is a Conv1d"):
        enable_packflex(model)


def test_models_without_the_interface() -> None:
    config = AutoConfig.for_model("gptj", n_embd=32, n_layer=1, n_head=4, rotary_dim=4, vocab_size=VOCAB)
    with pytest.raises(NotImplementedError, match=r"GPTJForCausalLM .* do not hand their attention"):
        enable_packflex(AutoModelForCausalLM.from_config(config))


@pytest.mark.parametrize("family", FAMILIES)
def test_verified_families_are_supported(family: str) -> None:
    check_supported(AutoConfig.for_model(family))


def test_something_else_is_no_model() -> None:
    with pytest.raises(TypeError, match="expected a transformers model or configuration; got Linear"):
        check_supported(nn.Linear(2, 2))  # type: ignore[arg-type]

"""attn_implementation="packflex": packed batches against every document alone, ordinary masks against eager."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AutoModelForCausalLM, PreTrainedModel

from packflex import PackedLayout, document_mask
from packflex.integrations import transformers as integration
from packflex.integrations.transformers import (
    enable_packflex,
    packflex_attention,
    transformers_models,
)
from packflex.testing.families import FAMILIES, VOCAB, tiny_model

# Two rows of other documents, one of a single token, windows of 6 shorter than most, padded tails of 4 and 5 tokens.
LAYOUT = PackedLayout.from_lengths([[9, 14, 1, 8], [20, 11]], seq_len=36)


def token_ids(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(3, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def documents(layout: PackedLayout) -> list[tuple[int, slice]]:
    """(row, tokens) of each document."""
    found = []
    for b, row in enumerate(layout.lengths):
        ends = torch.tensor(row).cumsum(0).tolist()
        found += [(b, slice(end - length, end)) for length, end in zip(row, ends, strict=True)]
    return found


def gradients(model: nn.Module) -> dict[str, Tensor]:
    assert all(p.grad is not None for p in model.parameters())
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_each_document_alone(family: str) -> None:
    ids = token_ids(2, 36)
    eager = tiny_model(family)
    with torch.no_grad():
        alone = [eager(ids[b : b + 1, tokens], use_cache=False).logits[0] for b, tokens in documents(LAYOUT)]
    enabled, direct = tiny_model(family), tiny_model(family, "packflex")
    enable_packflex(enabled)
    calls: list[tuple[PreTrainedModel, dict[str, Any]]] = [
        (enabled, {}),
        (enabled, {"use_cache": True}),
        (enabled, {"position_ids": LAYOUT.position_ids, "use_cache": False}),
        (direct, {"position_ids": LAYOUT.position_ids}),
        (direct, {"position_ids": LAYOUT.position_ids, "use_cache": False}),
    ]
    for model, keywords in calls:
        with torch.no_grad():
            packed = model(ids, packed=LAYOUT, **keywords).logits
        assert packed.isfinite().all()
        for (b, tokens), logits in zip(documents(LAYOUT), alone, strict=True):
            torch.testing.assert_close(packed[b, tokens], logits, rtol=0, atol=1e-5)


def test_documents_do_leak_without_packed() -> None:
    """What the test above would miss if its models could not show a leak."""
    ids = token_ids(2, 36)
    model = tiny_model("llama")
    with torch.no_grad():
        whole, alone = model(ids).logits[0, 9:23], model(ids[:1, 9:23]).logits[0]
    assert (whole - alone).abs().max() > 0.1


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_each_document_alone(family: str, checkpointing: bool) -> None:
    ids = token_ids(2, 36)
    weight = torch.randn(2, 36, VOCAB, generator=torch.Generator().manual_seed(2))
    real = (LAYOUT.document_ids >= 0)[..., None]
    eager = tiny_model(family).train()
    for b, tokens in documents(LAYOUT):
        (eager(ids[b : b + 1, tokens], use_cache=False).logits[0] * weight[b, tokens]).sum().backward()
    expected = gradients(eager)

    model = tiny_model(family).train()
    enable_packflex(model)
    if checkpointing:
        model.gradient_checkpointing_enable()
    (model(ids, packed=LAYOUT).logits * weight * real).sum().backward()
    for name, grad in gradients(model).items():
        scale = expected[name].abs().max().item()
        assert scale > 0, name
        torch.testing.assert_close(grad, expected[name], rtol=0, atol=1e-5 * scale, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_equals_eager_with_left_padding(family: str) -> None:
    prompt, attention_mask = token_ids(3, 12), torch.ones(3, 12, dtype=torch.long)
    attention_mask[0, :7] = 0
    attention_mask[1, :1] = 0
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    model = tiny_model(family)
    expected = model.generate(prompt, attention_mask=attention_mask, **options)
    enable_packflex(model)
    assert torch.equal(model.generate(prompt, attention_mask=attention_mask, **options), expected)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_static_cache_equals_eager(family: str) -> None:
    prompt, attention_mask = token_ids(2, 12), torch.ones(2, 12, dtype=torch.long)
    attention_mask[0, :5] = 0
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    model = tiny_model(family)
    expected = model.generate(prompt, attention_mask=attention_mask, **options)
    enable_packflex(model)
    static = model.generate(
        prompt, attention_mask=attention_mask, cache_implementation="static", disable_compile=True, **options
    )
    assert torch.equal(static, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_padded_batch_equals_eager(family: str) -> None:
    ids, attention_mask = token_ids(2, 14), torch.ones(2, 14, dtype=torch.long)
    attention_mask[0, 10:] = 0
    model = tiny_model(family)
    with torch.no_grad():
        expected = model(ids, attention_mask=attention_mask).logits
        model.set_attn_implementation("packflex")
        got = model(ids, attention_mask=attention_mask).logits
    real = attention_mask.bool()
    torch.testing.assert_close(got[real], expected[real], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("gemma3_text", {"use_bidirectional_attention": True, "sliding_window": 10}),
        ("llama", {"is_causal": False}),
        ("mistral", {"is_causal": False, "sliding_window": 4}),
    ],
)
def test_bidirectional_models(family: str, overrides: dict[str, Any]) -> None:
    ids = token_ids(2, 36)
    model = tiny_model(family, **overrides)
    with torch.no_grad():
        alone = [model(ids[b : b + 1, tokens], use_cache=False).logits[0] for b, tokens in documents(LAYOUT)]
        enable_packflex(model)
        packed = model(ids, packed=LAYOUT).logits
        first, changed = packed[0, 0], model(ids.index_fill(1, torch.tensor(1), 5), packed=LAYOUT).logits[0, 0]
    assert (first - changed).abs().max() > 1e-3  # the first token sees the second
    for (b, tokens), logits in zip(documents(LAYOUT), alone, strict=True):
        torch.testing.assert_close(packed[b, tokens], logits, rtol=0, atol=1e-5)


LENGTHS: list[list[list[int]]] = [
    [[9, 14, 1, 8], [20, 11]],
    [[36], [3, 3]],
    [[5] * 7, [1] * 36],
    [[10, 20], [30]],
    [[2, 34], [35]],
]


@pytest.mark.parametrize(("family", "masks_first"), [("llama", True), *((family, False) for family in FAMILIES)])
def test_compiled_model_is_traced_once(family: str, masks_first: bool) -> None:
    model = tiny_model(family)
    enable_packflex(model)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for seed, lengths in enumerate(LENGTHS):
        ids, layout = token_ids(2, 36, seed=seed), PackedLayout.from_lengths(lengths, seq_len=36)
        if masks_first:
            document_mask(layout)
        batch = {"input_ids": ids, "labels": ids, "position_ids": layout.position_ids}
        loss = compiled(**batch, packed=layout).loss
        loss.backward()
        fresh = PackedLayout.from_lengths(lengths, seq_len=36)
        torch.testing.assert_close(loss, model(**batch, packed=fresh).loss)
        model.zero_grad()
    assert counter.frame_count == 1
    torch._dynamo.reset()


@pytest.mark.parametrize(("family", "checkpointing"), [("llama", False), *((family, True) for family in FAMILIES)])
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
def test_compiled_model_has_the_same_gradients(family: str, checkpointing: bool) -> None:
    ids, weights = token_ids(2, 36), []
    for compiled in (False, True):
        model = tiny_model(family).train()
        enable_packflex(model)
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch._dynamo.reset()
        run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        run(ids, labels=ids, packed=LAYOUT).loss.backward()
        weights.append(gradients(model))
    torch._dynamo.reset()
    for name, grad in weights[0].items():
        torch.testing.assert_close(weights[1][name], grad, rtol=1e-4, atol=1e-6)


# What enable_packflex adds


def test_enabled_model_builds_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    model, direct = tiny_model("gemma2"), tiny_model("gemma2", "packflex")
    enable_packflex(model)
    built = []
    monkeypatch.setattr(integration, "sdpa_mask", lambda **kw: built.append(kw["q_length"]) or torch.ones(2, 1, 36, 36))
    model(token_ids(2, 36), packed=LAYOUT, use_cache=False)
    assert built == []
    direct(token_ids(2, 36), packed=LAYOUT, position_ids=LAYOUT.position_ids)
    assert built == [36, 36]  # one for each layer type


def test_packed_call_keeps_no_cache_unless_asked() -> None:
    model = tiny_model("llama")
    enable_packflex(model)
    assert model(token_ids(2, 36), packed=LAYOUT).past_key_values is None
    assert model(token_ids(2, 36), packed=LAYOUT, use_cache=True).past_key_values.get_seq_length() == 36
    assert model(token_ids(2, 36)).past_key_values.get_seq_length() == 36


def test_filled_positions_are_the_layouts() -> None:
    assert torch.equal(integration._positions(LAYOUT), LAYOUT.position_ids)


def test_backend_belongs_to_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[str | None] = []
    real = integration.flex_attention

    def recording(*args: Any, backend: str | None, **kwargs: Any) -> Any:
        used.append(backend)
        return real(*args, backend=None, **kwargs)

    monkeypatch.setattr(integration, "flex_attention", recording)
    first, second = tiny_model("llama", num_hidden_layers=1), tiny_model("llama", num_hidden_layers=1)
    enable_packflex(first, backend="torch")
    enable_packflex(second)
    for model in (first, second):
        model(token_ids(2, 36), packed=LAYOUT)
    first(token_ids(2, 36), packed=LAYOUT, packflex_backend="reference")
    enable_packflex(first, backend="triton")
    first(token_ids(2, 36), packed=LAYOUT)
    assert used == ["torch", None, "reference", "triton"]
    assert len(first.model._forward_pre_hooks) == 1


def test_enabled_model_copies_pickles_and_saves(tmp_path: Path) -> None:
    ids = token_ids(2, 36)
    model = tiny_model("llama")
    enable_packflex(model, backend="reference")
    with torch.no_grad():
        expected = model(ids, packed=LAYOUT).logits
        for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(clone(ids, packed=LAYOUT).logits, expected)
        model.save_pretrained(tmp_path)
        assert "packflex" not in (tmp_path / "config.json").read_text()
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="packflex").eval()
        assert torch.equal(loaded(ids, packed=LAYOUT, position_ids=LAYOUT.position_ids).logits, expected)


def test_models_inside_other_modules() -> None:
    first, second = tiny_model("llama", num_hidden_layers=1), tiny_model("qwen3")
    holder = nn.ModuleDict({"student": first, "inner": nn.Sequential(second, first)})
    assert transformers_models(holder) == [first, second]
    enable_packflex(holder)
    assert {m.config._attn_implementation for m in (first, second)} == {"packflex"}
    with pytest.raises(ValueError, match="Linear holds no transformers model"):
        enable_packflex(nn.Linear(2, 2))


# Errors


def test_layout_of_another_batch() -> None:
    model = tiny_model("llama")
    enable_packflex(model)
    with pytest.raises(ValueError, match=r"packed describes 2 rows of 36 tokens, the input tokens are 2 rows of 35"):
        model(token_ids(2, 35), packed=LAYOUT)
    with pytest.raises(TypeError, match=r"must be a packflex\.PackedLayout; got list"):
        model(token_ids(2, 36), packed=[9, 14])
    direct = tiny_model("llama", "packflex")
    with pytest.raises(ValueError, match=r"packed describes 2 rows of 36 tokens, the queries are 1 rows of 36"):
        direct(token_ids(1, 36), packed=LAYOUT, position_ids=LAYOUT.position_ids[:1])


def test_layout_on_another_device() -> None:
    model = tiny_model("llama")
    enable_packflex(model)
    with pytest.raises(ValueError, match=r"packed is on meta and the input tokens on cpu.*packed\.to\(cpu\)"):
        model(token_ids(2, 36), packed=LAYOUT.to("meta"))


def test_packed_batch_continues_no_cache() -> None:
    model = tiny_model("llama")
    enable_packflex(model)
    cache = model(token_ids(2, 4)).past_key_values
    with pytest.raises(ValueError, match=r"36 queries and 40 keys a row.*no past_key_values"):
        model(token_ids(2, 36), packed=LAYOUT, past_key_values=cache)


def test_packed_with_attention_mask() -> None:
    model = tiny_model("llama")
    enable_packflex(model)
    with pytest.raises(ValueError, match="packed and attention_mask were both given"):
        model(token_ids(2, 36), packed=LAYOUT, attention_mask=torch.ones(2, 36))
    made_from_it = {"packed": LAYOUT, "attention_mask": (LAYOUT.document_ids >= 0).long(), "packed_from_mask": True}
    ids = token_ids(2, 36)
    assert torch.equal(model(ids, **made_from_it).logits, model(ids, packed=LAYOUT).logits)
    hiding = torch.ones(2, 36, dtype=torch.long)
    hiding[1, 3] = 0
    direct = tiny_model("llama", "packflex")
    with pytest.raises(ValueError, match="hides token 3 of row 1"):
        direct(token_ids(2, 36), packed=LAYOUT, position_ids=LAYOUT.position_ids, attention_mask=hiding)


@pytest.mark.parametrize("family", FAMILIES)
def test_forgotten_positions_without_enable(family: str) -> None:
    with pytest.raises(ValueError, match=r"position_ids are missing.*\(1, 36\)"):
        tiny_model(family, "packflex")(token_ids(2, 36), packed=LAYOUT)
    one_row = PackedLayout.from_lengths([[20, 11]], seq_len=36)
    with pytest.raises(ValueError, match="Got positions 0 to 35 for 2 documents"):
        tiny_model(family, "packflex")(token_ids(1, 36), packed=one_row)


def test_unread_mask_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integration, "_WASTED_MASK_BYTES", 2 * 36 * 36)
    direct = tiny_model("llama", "packflex")
    batch = {"input_ids": token_ids(2, 36), "position_ids": LAYOUT.position_ids, "packed": LAYOUT}
    with pytest.warns(UserWarning, match="built a mask of 0 MiB that packflex does not read"):
        direct(**batch)
    direct(**batch)


def test_dropout_is_refused_in_packed_training() -> None:
    model = tiny_model("llama", attention_dropout=0.1).train()
    enable_packflex(model)
    with pytest.raises(ValueError, match=r"attention dropout is 0\.1.*attention_dropout = 0"):
        model(token_ids(2, 36), packed=LAYOUT)
    model.eval()(token_ids(2, 36), packed=LAYOUT)


def test_positional_arguments_to_the_body() -> None:
    model = tiny_model("llama")
    enable_packflex(model)
    with pytest.raises(TypeError, match="2 positional arguments; pass all but input_ids by keyword"):
        model.model(token_ids(2, 36), None, packed=LAYOUT)
    assert model.model(token_ids(2, 36), packed=LAYOUT).last_hidden_state.shape == (2, 36, 32)


def test_embeddings_instead_of_tokens() -> None:
    model, ids = tiny_model("llama"), token_ids(2, 36)
    enable_packflex(model)
    embeddings = model.get_input_embeddings()(ids)
    torch.testing.assert_close(model(inputs_embeds=embeddings, packed=LAYOUT).logits, model(ids, packed=LAYOUT).logits)
    with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
        model(packed=LAYOUT)


def test_packed_that_does_not_reach_the_layer() -> None:
    x = torch.randn(2, 4, 36, 16)
    layer = tiny_model("llama").model.layers[0].self_attn
    placeholder = integration._placeholder_mask(LAYOUT, x.device)
    with pytest.raises(RuntimeError, match="did not reach LlamaAttention"):
        packflex_attention(layer, x, x[:, :2], x[:, :2], placeholder)


def test_what_is_not_computed() -> None:
    x, layer = torch.randn(1, 2, 4, 8), nn.Module()
    with pytest.raises(NotImplementedError, match="position bias"):
        packflex_attention(layer, x, x, x, None, position_bias=torch.zeros(4, 4))
    with pytest.raises(NotImplementedError, match='use attn_implementation="eager"'):
        packflex_attention(layer, x, x, x, None, output_attentions=True)
    with pytest.raises(ValueError, match="one of 'hopper', 'triton', 'torch', 'reference' or None; got 'flash'"):
        enable_packflex(tiny_model("llama"), backend="flash")

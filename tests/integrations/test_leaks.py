"""The leak check finds what leaks, names it, and lets sound models pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from packflex import PackedLayout, document_mask, flex_attention
from packflex.integrations.transformers import enable_packflex
from packflex.testing.families import FAMILIES, VOCAB, tiny_model
from packflex.testing.leaks import LeakError, LeakReport, check_leaks, find_leaks

LAYOUT = PackedLayout.from_lengths([[9, 14, 1, 8], [20, 11]], seq_len=36)


def packed_batch(layout: PackedLayout = LAYOUT) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB, (layout.batch_size, layout.seq_len), generator=generator)
    labels = ids.masked_fill(layout.position_ids == 0, -100)
    return {"input_ids": ids, "labels": labels, "position_ids": layout.position_ids, "packed": layout}


class OneLayer(nn.Module):
    """Learned positions, one attention layer, residual; `flaw` says what is wrong with it."""

    def __init__(self, flaw: str | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.places = nn.Embedding(VOCAB, 32), nn.Embedding(256, 32)
        self.qkv, self.head = nn.Linear(32, 96), nn.Linear(32, VOCAB)
        self.flaw = flaw

    def forward(self, input_ids: Tensor, packed: PackedLayout, position_ids: Tensor, labels: Any = None) -> Tensor:
        if self.flaw == "row positions":
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        x = self.tokens(input_ids) + self.places(position_ids)
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        if self.flaw == "no mask":
            attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        elif self.flaw == "bidirectional":
            attended = nn.functional.scaled_dot_product_attention(q, k, v)
        elif self.flaw == "padding":
            tail = packed.document_ids < 0
            same = packed.document_ids[:, :, None] == packed.document_ids[:, None, :]
            causal = torch.ones(same.shape[1:], dtype=torch.bool).tril()
            attended = nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=(same & causal | tail[:, None, :])[:, None]
            )
        else:
            attended = flex_attention(q, k, v, block_mask=document_mask(packed))
        x = x + attended.transpose(1, 2).flatten(2)
        if self.flaw == "rows":
            x = x - x.mean(0)
        elif self.flaw == "convolution":
            x = x + nn.functional.pad(x, (0, 0, 1, 0))[:, :-1]
        elif self.flaw == "not finite":
            x = x / 0
        return self.head(x) * (0 if self.flaw == "zero head" else 1)


def kinds(report: LeakReport) -> set[tuple[str, int | None]]:
    return {(leak.kind, leak.source) for leak in report.leaks}


@pytest.mark.parametrize("family", FAMILIES)
def test_enabled_models_are_sound(family: str) -> None:
    model = tiny_model(family)
    enable_packflex(model)
    report = check_leaks(model, packed_batch())
    assert report.leaks == ()
    assert report.sensitive
    assert report.reach > 1
    assert "No leak: with one of 5 documents perturbed" in str(report)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_hugging_face_model_without_packflex(attention: str) -> None:
    model = tiny_model("llama", attention)
    with pytest.raises(LeakError) as raised:
        check_leaks(model, packed_batch())
    found = {leak.source: leak.moved for leak in raised.value.report.leaks if leak.kind == "document"}
    assert found == {0: (1, 2), 1: (2,), 3: (4,)}
    text = str(raised.value)
    assert "\n" not in text
    for part in (
        "Documents leak: 0 into 1, 2; 1 into 2; 3 into 4.",
        "rows hold documents 0 to 2 and 3 to 4",
        f"attn_implementation='{attention}'",
        "enable_packflex(model)",
    ):
        assert part in text


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype) -> None:
    model = tiny_model("llama").to(dtype)
    assert find_leaks(model, packed_batch()).leaks
    enable_packflex(model)
    assert find_leaks(model, packed_batch()).leaks == ()
    model.float()
    with torch.autocast("cpu", torch.bfloat16):
        report = find_leaks(model, packed_batch())
    assert report.leaks == ()
    assert report.tolerance > 0.01  # it knows that rounding is coarser under autocast


def test_one_leaking_layer_of_many() -> None:
    model = tiny_model("llama", num_hidden_layers=8)
    enable_packflex(model)
    attention = model.model.layers[5].self_attn
    whole, forward = PackedLayout.from_lengths([[160], [160]]), attention.forward
    attention.forward = lambda *args, packed, **kwargs: forward(*args, packed=whole, **kwargs)
    assert kinds(find_leaks(model, packed_batch())) >= {("document", 0), ("document", 1), ("document", 3)}


@pytest.mark.parametrize(
    ("flaw", "expected", "cause"),
    [
        ("no mask", {("document", 0), ("document", 1), ("document", 3), ("alone", None)}, "do not use the layout"),
        (
            "bidirectional",
            {*(("document", d) for d in range(5)), ("padding", None), ("alone", None)},
            "bidirectional attention that does not get the layout",
        ),
        # document 2 stands beside padding alone
        ("rows", {*(("document", d) for d in (0, 1, 3, 4)), ("padding", None), ("alone", None)}, "mixes the rows"),
        ("padding", {("padding", None), ("alone", None)}, "keys after the last document of a row"),
        ("row positions", {("alone", None)}, "positions that do not restart at 0"),
        (
            "convolution",
            {("document", 0), ("document", 1), ("document", 3)},
            "a convolution or token shift along the row",
        ),
    ],
)
def test_flaws_are_found_and_named(flaw: str, expected: set[tuple[str, int | None]], cause: str) -> None:
    report = find_leaks(OneLayer(flaw), packed_batch())
    assert kinds(report) == expected
    assert cause in str(report)
    with pytest.raises(LeakError, match=cause):
        check_leaks(OneLayer(flaw), packed_batch())


def test_own_model_that_is_sound() -> None:
    assert check_leaks(OneLayer(), packed_batch()).leaks == ()


def test_positions_of_the_batch() -> None:
    batch = packed_batch()
    batch["position_ids"] = torch.arange(36).repeat(2, 1)
    report = find_leaks(OneLayer(), batch)
    assert [(leak.kind, leak.moved, leak.change) for leak in report.leaks] == [("positions", (1, 2, 3, 5), 24)]
    assert "position_ids are not its layout's: documents 1, 2, 3, 5 of the batch differ, by up to 24" in str(report)
    in_tail = packed_batch()
    in_tail["position_ids"] = in_tail["position_ids"].masked_fill(LAYOUT.document_ids < 0, 7)
    assert find_leaks(OneLayer(), in_tail).leaks == ()


def test_probe_has_the_keys_of_the_batch() -> None:
    seen: list[dict[str, Any]] = []

    def forward(batch: dict[str, Any]) -> dict[str, Tensor]:
        seen.append(batch)
        return {"logits": OneLayer()(batch["input_ids"], batch["packed"], batch["packed"].position_ids)}

    batch = packed_batch()
    del batch["labels"], batch["position_ids"]
    assert find_leaks(OneLayer(), batch, forward=forward, lengths=[[5, 6, 7], [12, 8]], seq_len=24).leaks == ()
    assert len(seen) == 11
    assert all(set(probe) == {"input_ids", "packed"} and probe["input_ids"].shape == (2, 24) for probe in seen)
    assert set(torch.cat([probe["input_ids"] for probe in seen]).unique().tolist()) <= set(
        batch["input_ids"][LAYOUT.document_ids >= 0].tolist()
    )
    seen.clear()
    find_leaks(OneLayer(), packed_batch(), forward=forward, lengths=[[5, 6]], seq_len=12)
    assert (seen[0]["labels"][0] == -100).nonzero().flatten().tolist() == [0, 5, 11]


def test_same_finding_each_time() -> None:
    torch.manual_seed(3)
    first = find_leaks(tiny_model("llama"), packed_batch())
    torch.manual_seed(4)
    assert find_leaks(tiny_model("llama"), packed_batch()) == first


@pytest.mark.parametrize("flaw", [None, "no mask", "not finite"])
def test_everything_is_put_back(flaw: str | None) -> None:
    model = OneLayer(flaw).train()
    model.dropout = nn.Dropout(0.5)
    model.head.eval()  # a frozen part stays frozen
    modes = [module.training for module in model.modules()]
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    try:
        check_leaks(model, packed_batch())
    except (LeakError, ValueError):
        assert flaw is not None
    assert torch.equal(torch.rand(3), expected)
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())
    assert torch.is_grad_enabled()


def test_dropout_in_training_mode_is_no_leak() -> None:
    model = OneLayer().train()
    model.tokens = nn.Sequential(model.tokens, nn.Dropout(0.5))
    assert find_leaks(model, packed_batch()).leaks == ()


def test_blind_check_is_told() -> None:
    with pytest.warns(UserWarning, match="could not have"):
        report = check_leaks(OneLayer("zero head"), packed_batch())
    assert not report.sensitive


def test_bad_input() -> None:
    batch = packed_batch()
    with pytest.raises(ValueError, match=r"needs a packed batch.*got input_ids: Tensor"):
        find_leaks(OneLayer(), {"input_ids": batch["input_ids"]})
    with pytest.raises(ValueError, match=r"two different tokens.*\[5\]"):
        find_leaks(OneLayer(), {**batch, "input_ids": torch.full((2, 36), 5)})
    with pytest.raises(ValueError, match=r"two documents in one row.*\(\(8,\), \(9,\)\)"):
        find_leaks(OneLayer(), batch, lengths=[[8], [9]])
    with pytest.raises(ValueError, match=r"logits \[2, 160, vocabulary\] for the probe; got \(\)"):
        find_leaks(OneLayer(), batch, forward=lambda b: torch.zeros(()))
    with pytest.raises(ValueError, match="got NoneType"):
        find_leaks(OneLayer(), batch, forward=lambda b: None)
    with pytest.raises(ValueError, match="not finite"):
        find_leaks(OneLayer("not finite"), batch)

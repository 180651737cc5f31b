"""The same documents, model and weights, packed and padded: one loss, one set of gradients, one training run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from packflex import PackedLayout
from packflex.integrations.transformers import enable_packflex
from packflex.testing.families import FAMILIES, VOCAB, tiny_model

Document = tuple[Tensor, Tensor]  # tokens and labels, [L] each

LENGTHS = [[9, 14, 2, 8], [20, 11]]
SEQ_LEN = 36


def make_documents(seed: int) -> list[Document]:
    """Documents of a prompt that is not supervised and an answer that is; one has no supervised token."""
    generator = torch.Generator().manual_seed(seed)
    documents = []
    for number, length in enumerate(length for row in LENGTHS for length in row):
        tokens = torch.randint(3, VOCAB, (length,), generator=generator)
        prompt = length if number == 2 else int(torch.randint(0, length // 2, (1,), generator=generator))
        documents.append((tokens, tokens.masked_fill(torch.arange(length) < prompt, -100)))
    return documents


def pack(documents: list[Document]) -> dict[str, Any]:
    layout = PackedLayout.from_lengths(LENGTHS, SEQ_LEN)
    ids, labels = torch.zeros(2, SEQ_LEN, dtype=torch.long), torch.full((2, SEQ_LEN), -100)
    remaining = iter(documents)
    for b, row in enumerate(LENGTHS):
        at = 0
        for length in row:
            ids[b, at : at + length], labels[b, at : at + length] = next(remaining)
            labels[b, at] = -100  # nothing predicts the first token of a document
            at += length
    return {"input_ids": ids, "labels": labels, "position_ids": layout.position_ids, "packed": layout}


def pad(documents: list[Document]) -> dict[str, Any]:
    longest = max(len(tokens) for tokens, _ in documents)
    batch = {
        "input_ids": torch.zeros(len(documents), longest, dtype=torch.long),
        "labels": torch.full((len(documents), longest), -100),
        "attention_mask": torch.zeros(len(documents), longest, dtype=torch.long),
    }
    for row, (tokens, labels) in enumerate(documents):
        batch["input_ids"][row, : len(tokens)] = tokens
        batch["labels"][row, : len(tokens)] = labels
        batch["attention_mask"][row, : len(tokens)] = 1
    return batch


def pair(family: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A model for packed batches and its twin for padded ones."""
    packed, padded = tiny_model(family).train(), tiny_model(family).train()
    enable_packflex(packed)
    return packed, padded


def assert_same(packed: dict[str, Tensor], padded: dict[str, Tensor], relative: float) -> None:
    assert packed.keys() == padded.keys()
    for name, value in packed.items():
        scale = padded[name].abs().max().item()
        torch.testing.assert_close(
            value, padded[name], rtol=0, atol=relative * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(found) == len(list(model.parameters()))
    assert all(grad.abs().max() > 0 for grad in found.values())
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients(family: str) -> None:
    documents = make_documents(0)
    packed, padded = pair(family)
    packed_loss, padded_loss = packed(**pack(documents)).loss, padded(**pad(documents)).loss
    assert padded_loss.item() > 1
    torch.testing.assert_close(packed_loss, padded_loss, rtol=1e-6, atol=0)
    packed_loss.backward()
    padded_loss.backward()
    assert_same(gradients(packed), gradients(padded), relative=1e-5)


def test_the_loss_sees_the_packing() -> None:
    """The comparison can fail: without the layout, and with a first token that is predicted, the loss is another."""
    documents = make_documents(0)
    packed, padded = pair("llama")
    expected = padded(**pad(documents)).loss.item()
    batch = pack(documents)
    assert abs(packed(**{**batch, "packed": None}).loss.item() - expected) > 1e-3
    predicted = torch.where(batch["position_ids"] == 0, batch["input_ids"], batch["labels"])
    predicted[batch["packed"].document_ids < 0] = -100
    assert abs(packed(**{**batch, "labels": predicted}).loss.item() - expected) > 1e-3


def test_accumulation_over_a_global_count() -> None:
    """Documents split in micro-batches otherwise give the same gradients when losses are sums over one count."""
    documents = make_documents(0)
    packed, padded = pair("llama")
    batch = pack(documents)
    count = int((batch["labels"][:, 1:] != -100).sum())
    packed(**batch, num_items_in_batch=count).loss.backward()
    for some in (documents[:1], documents[1:5], documents[5:]):
        padded(**pad(some), num_items_in_batch=count).loss.backward()
    assert_same(gradients(packed), gradients(padded), relative=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_training_both_ways(family: str) -> None:
    packed, padded = pair(family)
    before = {name: p.detach().clone() for name, p in packed.named_parameters()}
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) for model in (packed, padded)]
    losses = []
    for step in range(4):
        documents = make_documents(step % 2)
        for model, batch, optimizer in zip(
            (packed, padded), (pack(documents), pad(documents)), optimizers, strict=True
        ):
            optimizer.zero_grad()
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[0::2] == pytest.approx(losses[1::2], rel=1e-4)
    assert losses[-1] < losses[2] - 0.1
    after = [{name: p.detach() for name, p in model.named_parameters()} for model in (packed, padded)]
    moved = max((after[0][name] - before[name]).abs().max().item() for name in before)
    assert moved > 0.01
    for name in before:
        torch.testing.assert_close(after[0][name], after[1][name], rtol=0, atol=1e-3 * moved)

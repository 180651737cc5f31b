"""Perplexity of each document: the same however documents are packed, and that of each alone."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from packflex.evaluate import document_losses
from packflex.losses import next_token_loss
from packflex.testing.families import FAMILIES, VOCAB, tiny_model

ROOT = Path(__file__).resolve().parents[1]
LENGTHS = [5, 130, 1, 9, 30, 2, 64, 7, 21, 3]


def documents():
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in LENGTHS]
    labels = [[-100 if i < n // 2 else t for i, t in enumerate(d)] for n, d in zip(LENGTHS, ids, strict=True)]
    return Dataset.from_dict({"input_ids": ids, "labels": labels})


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_to_each_document_alone(family):
    model = tiny_model(family)
    expected = []
    for document in documents():
        ids, labels = (torch.tensor(document[name])[None] for name in ("input_ids", "labels"))
        with torch.no_grad():
            expected.append(next_token_loss(model(ids, use_cache=False).logits, labels))
    found = document_losses(model, documents(), seq_len=160)
    assert found.losses.tolist() == pytest.approx([float(loss) for loss, _ in expected], rel=1e-4, abs=1e-4)
    assert found.supervised.tolist() == [int(count) for _, count in expected]
    assert found.supervised[2] == 0


def test_the_packing_does_not_matter():
    model = tiny_model("llama").train()
    results = [
        document_losses(model, documents(), seq_len=seq_len, batch_size=batch)
        for seq_len, batch in [(128, 1), (512, 1), (256, 2)]  # rows grow to hold the 130 tokens of one
    ]
    assert model.training
    for other in results[1:]:
        assert other.losses.tolist() == pytest.approx(results[0].losses.tolist(), rel=1e-5)
    assert results[0].perplexity == pytest.approx(results[1].perplexity, rel=1e-6)


def test_nothing_to_evaluate():
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="no document to evaluate"):
        document_losses(model, documents().select([]))
    with pytest.raises(ValueError, match="no document has a supervised token"):
        document_losses(model, documents().select([2]), seq_len=128)


def test_the_recipe(tmp_path):
    from packflex.data.tokenizer import train_tokenizer
    from packflex.models import build_model

    records = [{"prompt": f"What is {a} plus 2?\n", "completion": f"It is {a + 2}."} for a in range(12)]
    data = tmp_path / "test.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    tokenizer = train_tokenizer([r["prompt"] + r["completion"] for r in records], 300, tmp_path / "cache")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = build_model(architecture={"model_type": "llama", "vocab_size": None} | sizes, tokenizer=tokenizer)
    for part in (tokenizer, model):
        part.save_pretrained(tmp_path / "model")

    def run(*arguments):
        command = [sys.executable, str(ROOT / "recipes" / "evaluate.py"), "packing.seq_len=128", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)

    done = run("model.path=./model", "data.path=test.jsonl", f"hydra.run.dir={tmp_path}/out")
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    rows = list(csv.DictReader((tmp_path / "out" / "documents.csv").read_text().splitlines()))
    assert len(rows) == summary["documents"] == 12
    total = sum(float(r["loss"]) * int(r["supervised"]) for r in rows)
    assert summary["loss"] == pytest.approx(total / sum(int(r["supervised"]) for r in rows))
    assert 100 < summary["perplexity"] < 900, "random weights know nothing of about 300 words"
    assert f"perplexity  {summary['perplexity']:.3f}" in done.stdout

    wrong = run("model.path=./model", "data.path=nowhere.jsonl")
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("evaluate: error: nowhere.jsonl: no such file or folder;")
    assert run("model.path=./model", "data.path=test.jsonl", "precision=8").stderr.startswith(
        "evaluate: error: precision=8 must be auto, 16, bf16, 32"
    )

"""Perplexity of each document: the same however documents are packed, and that of each alone."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from hydra import compose, initialize_config_dir

from packflex.cli import app
from packflex.data.errors import DataError
from packflex.data.tokenizer import train_tokenizer
from packflex.evaluate import DocumentLosses, document_losses
from packflex.losses import next_token_loss
from packflex.models import SetupError, build_model
from packflex.testing.families import FAMILIES, VOCAB, tiny_model

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "recipes"))

import evaluate as recipe  # noqa: E402
from _errors import one_line_of  # noqa: E402

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


def test_perplexities_beyond_all_numbers():
    found = DocumentLosses(np.array([5.0, 8000.0, 0.0]), np.array([5, 10, 0]), np.array([6, 11, 1]))
    assert found.document_perplexities[:2].tolist() == [pytest.approx(np.e), np.inf]
    assert found.loss == 8005 / 15
    assert not len(found.not_finite)
    found = DocumentLosses(np.array([5.0, 8000.0, np.nan]), np.array([5, 5, 2]), np.array([6, 11, 3]))
    assert found.not_finite.tolist() == [2]
    assert np.isnan(found.perplexity)
    assert DocumentLosses(np.array([8000.0]), np.array([5]), np.array([6])).perplexity == np.inf


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with test.jsonl and a tiny model."""
    place = tmp_path_factory.mktemp("evaluate")
    records = [{"prompt": f"What is {a} plus 2?\n", "completion": f"It is {a + 2}."} for a in range(12)]
    (place / "test.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    tokenizer = train_tokenizer([r["prompt"] + r["completion"] for r in records], 300, place / "cache")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = build_model(architecture={"model_type": "llama", "vocab_size": None} | sizes, tokenizer=tokenizer)
    for part in (tokenizer, model):
        part.save_pretrained(place / "model")
    return place


def composed(place, out, *overrides):
    paths = [f"paths.output_dir={out}", f"model.path={place}/model", f"data.path={place}/test.jsonl"]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("evaluate", overrides=[*paths, "packing.seq_len=128", *overrides])


def test_the_recipe(place, tmp_path):
    def run(*arguments):
        command = [sys.executable, str(ROOT / "recipes" / "evaluate.py"), "packing.seq_len=128", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=place)

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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["device=mps"], "device=mps must be auto, cpu or cuda"),
        (["device=meta"], "device=meta must be auto, cpu or cuda"),
        (["device=cuda:99"], "device=cuda:99: torch can use "),
        (["data=stream"], "data=stream has no end to evaluate; read the same files whole: data=jsonl"),
        (["tokenize.train_on_prompt=no"], "tokenize.train_on_prompt=no must be true or false"),
        (["model.gradient_checkpointing=no"], "model.gradient_checkpointing=no must be true or false"),
        (["data=packed", "data.verify=off"], "data.verify=off must be true or false"),
        (["model.path=null", "model.init=pretrained"], "model.init=pretrained needs model.path: a folder"),
        (["+tokenize.foo=1"], "tokenize.foo: packflex.data.tokenize.tokenize_documents takes no such option;"),
    ],
)
def test_what_cannot_be_evaluated(place, tmp_path, settings, message):
    with pytest.raises(SetupError) as error:
        recipe.evaluate(composed(place, tmp_path, *settings))
    assert one_line_of(error.value).startswith(message)


def test_adapters_alone_are_told_from_the_model(place, tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(SetupError, match=r"the folder holds adapters, and model\.path needs the whole model"):
        recipe.evaluate(composed(place, tmp_path / "out", f"model.path={tmp_path}/adapter"))


def test_conversations_without_a_template_name_the_setting(place, tmp_path):
    (tmp_path / "chat.jsonl").write_text('{"messages": [{"role": "assistant", "content": "4"}]}\n')
    with pytest.raises(DataError) as error:
        recipe.evaluate(composed(place, tmp_path, "data=chat", f"data.path={tmp_path}/chat.jsonl"))
    assert "give a Jinja file (tokenizer.chat_template=FILE)" in one_line_of(error.value)


def test_rows_packed_before_are_the_same_documents(place, tmp_path, capsys):
    whole = recipe.evaluate(composed(place, tmp_path / "whole"))
    command = ["pack", str(place / "test.jsonl"), "--tokenizer", str(place / "model"), "--seq-len", "64"]
    app([*command, "--output", str(tmp_path / "packed")], standalone_mode=False)
    packed = recipe.evaluate(composed(place, tmp_path / "rows", "data=packed", f"data.path={tmp_path}/packed"))
    assert "documents read: 12, when they were packed" in capsys.readouterr().out
    for name in ("documents", "tokens", "supervised"):
        assert packed[name] == whole[name]
    assert packed["loss"] == pytest.approx(whole["loss"], rel=1e-6)


def test_a_diverged_model_ends_with_its_documents_and_an_error(place, tmp_path, monkeypatch, capsys):
    def diverged(**options):
        model = build_model(**options)
        with torch.no_grad():
            model.model.norm.weight[0] = torch.nan
        return model

    monkeypatch.setattr("packflex.models.build_model", diverged)
    with pytest.raises(
        SetupError, match=r"^12 of 12 documents have a loss that is not finite, the first is document 0"
    ):
        recipe.evaluate(composed(place, tmp_path))
    assert "perplexity  nan over tokens, nan median document" in capsys.readouterr().out
    assert json.loads((tmp_path / "summary.json").read_text())["loss"] is None
    assert (tmp_path / "documents.csv").read_text().count("nan") == 24


def test_documents_that_are_cut_are_told(place, tmp_path, capsys):
    recipe.evaluate(composed(place, tmp_path, "tokenize.max_length=12"))
    assert re.search(r"note +12 documents were cut to tokenize\.max_length \(\d+ tokens\)", capsys.readouterr().out)
    with pytest.raises(SetupError, match=r"tokenize\.turns=foo must be one of all, last"):
        recipe.evaluate(composed(place, tmp_path, "tokenize.turns=foo"))

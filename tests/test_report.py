"""The summary of a run, its picture, and the sample."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from packflex.data.tokenizer import train_tokenizer
from packflex.models import build_model
from packflex.report import (
    RunSummary,
    complete,
    prompt_of,
    read_metrics,
    save_loss_picture,
    shortest,
    typical_document,
    typical_speed,
)
from packflex.report_page import save_report

SUMMARY = RunSummary(
    parameters=5310720,
    documents=6390,
    rows=2361,
    seq_len=512,
    efficiency=0.9995,
    steps=280,
    tokens_per_second=1182.4,
    loss_start=8.36,
    loss_end=5.3,
    heldout_documents=100,
    prompt="def f():\n",
    completion="    return 1\n",
    notes=("434 documents longer than a row were split",),
    files={"checkpoint": "outputs/last.ckpt"},
)


@pytest.fixture
def metrics(tmp_path):
    path = tmp_path / "metrics.csv"
    rows = [
        "step,throughput/tokens_per_second,train/loss,val/loss",
        "0,,,8.0",
        "0,100.0,7.5,",
        "1,300.0,7.0,",
        "2,,6.0,",
    ]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


def test_summary_reads_as_a_table():
    lines = str(SUMMARY).splitlines()
    assert lines[:8] == [
        "parameters          5,310,720",
        "documents           6,390",
        "rows                2,361 of 512 tokens",
        "packing efficiency  99.95%",
        "steps               280",
        "tokens a second     1,182",
        "held-out loss       8.360 -> 5.300 nats a token, 100 documents",
        "note                434 documents longer than a row were split",
    ]
    assert "    def f():" in lines
    assert "        return 1" in lines
    assert lines[-1] == "checkpoint  outputs/last.ckpt"


def test_summary_without_heldout_documents_and_with_an_empty_completion():
    text = str(RunSummary(1, 1, 1, 8, 0.5, 1, None, None, None, 0, "a", "\n \n"))
    assert "held-out loss" not in text
    assert "held out" not in text
    assert "prompt\n    a\n" in text
    assert "tokens a second" not in text
    assert "    (nothing but white space)" in text


def test_summary_is_saved_as_json(tmp_path):
    SUMMARY.save(tmp_path / "summary.json")
    assert json.loads((tmp_path / "summary.json").read_text())["loss_end"] == 5.3


def test_metrics_and_picture(metrics, tmp_path):
    assert read_metrics(metrics, "train/loss") == ([0, 1, 2], [7.5, 7.0, 6.0])
    assert typical_speed(metrics) == 200.0
    assert save_loss_picture(metrics, tmp_path / "loss.png", [(0, 8.0), (3, 6.0)])
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_no_metrics(tmp_path):
    nothing = tmp_path / "metrics.csv"
    assert read_metrics(nothing, "train/loss") == ([], [])
    assert typical_speed(nothing) is None
    assert not save_loss_picture(nothing, tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()


@pytest.mark.parametrize(
    ("ids", "labels", "expected"),
    [
        ([1, 5, 6, 7], [-100, -100, 6, 7], [1, 5]),
        ([1, 2, 3, 4, 5, 6, 7, 8], [-100, 2, 3, 4, 5, 6, 7, 8], [1, 2]),
        ([1, 2], [-100, 2], [1]),
        (list(range(400)), [-100] * 399 + [1], list(range(143, 399))),
    ],
)
def test_prompt_of(ids, labels, expected):
    assert prompt_of(ids, labels) == expected


def test_typical_document_has_the_median_length():
    documents = Dataset.from_dict({"input_ids": [[1] * n for n in (9, 2, 4, 7, 1)]})
    assert len(typical_document(documents)["input_ids"]) == 4


def test_shortest_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shortest(tmp_path / "a" / "b") == str(Path("a", "b"))
    assert shortest(tmp_path.parent / "b") == str(tmp_path.parent / "b")


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_completion_is_the_same_each_time(temperature, tmp_path):
    tokenizer = train_tokenizer(["one two three four"] * 9, 300, tmp_path)
    architecture = {
        "model_type": "llama",
        "vocab_size": None,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
    }
    model = build_model(architecture=architecture, tokenizer=tokenizer)
    ids = tokenizer("one two")["input_ids"]
    random_state = torch.get_rng_state()
    first, second = (complete(model, tokenizer, ids, 8, temperature) for _ in range(2))
    assert first == second
    assert first[0] == "one two"
    assert model.training
    assert torch.equal(torch.get_rng_state(), random_state)


def test_the_page_holds_everything_and_needs_nothing(tmp_path, metrics):
    page = tmp_path / "report.html"
    save_report(replace(SUMMARY, completion="<b>1 & 2</b>"), metrics, page, "seed: 0", [(0, 8.36), (2, 5.3)])
    text = page.read_text()
    assert text.count("data:image/png;base64,") == 2, "loss and throughput; the rest was not logged"
    assert "&lt;b&gt;1 &amp; 2&lt;/b&gt;" in text
    assert "8.360 -&gt; 5.300 nats a token" in text
    assert "<td>file: checkpoint</td><td>outputs/last.ckpt</td>" in text
    assert "434 documents longer than a row were split" in text
    assert "seed: 0" in text
    assert "http" not in text.split("base64")[0], "nothing is fetched"

"""The recipe: it trains, resumes exactly, and says in one line what a user got wrong."""

import json
import logging
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from datasets import disable_progress_bars
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from lightning.pytorch.strategies import ModelParallelStrategy
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM, AutoTokenizer

from packflex.data.errors import DataError
from packflex.data.tokenizer import train_tokenizer
from packflex.integrations.lightning import NonFiniteLossError
from packflex.integrations.lightning.signals import SIGNALS
from packflex.models import SetupError, build_model
from packflex.report import read_metrics

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "recipes"))

import finetune as recipe  # noqa: E402
from _booleans import check_booleans  # noqa: E402
from _checkpoints import changed_settings, check_checkpoint  # noqa: E402
from _data import load_splits, prepare  # noqa: E402
from _errors import one_line_of  # noqa: E402
from _sharding import FullyShardedStrategy, whole_copy  # noqa: E402
from _signals import StoppedError, StopSignals  # noqa: E402

disable_progress_bars()
logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)

pytestmark = [pytest.mark.filterwarnings(f"ignore:.*{message}") for message in recipe.EXPECTED]

SUMS = [(a, b) for a in range(9) for b in range(7)]
SMALL = [
    "data=jsonl",
    "callbacks=quiet",
    "packing.seq_len=64",
    "packing.batch_size=2",
    "heldout.limit=4",
    "trainer.max_steps=6",
    "sample.max_new_tokens=4",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with train.jsonl, chat.jsonl and a tiny pretrained model."""
    place = tmp_path_factory.mktemp("recipe")
    sums = [{"prompt": f"What is {a} plus {b}?\n", "completion": f"It is {a + b}."} for a, b in SUMS]
    write(place / "train.jsonl", sums)
    turns = [("user", "prompt"), ("assistant", "completion")]
    write(place / "chat.jsonl", [{"messages": [{"role": r, "content": s[f]} for r, f in turns]} for s in sums])
    texts = [record["prompt"] + record["completion"] for record in sums]
    tokenizer = train_tokenizer(texts, 300, place / "cache")
    tokenizer.save_pretrained(place / "model")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = build_model(architecture={"model_type": "llama", "vocab_size": None} | sizes, tokenizer=tokenizer)
    model.save_pretrained(place / "model")
    return place


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def composed(out, *overrides):
    paths = [f"paths.output_dir={out}", f"paths.cache_dir={out}/tokenizers"]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("finetune", overrides=[*overrides, *paths])


def small(place, *overrides):
    return [*SMALL, f"data.path={place}/train.jsonl", f"model.path={place}/model", *overrides]


def streamed(place, *settings):
    """Settings of a stream of two files."""
    shards = place / "shards"
    if not shards.exists():
        shards.mkdir()
        lines = (place / "train.jsonl").read_text().splitlines(keepends=True)
        for number in range(2):
            (shards / f"{number}.jsonl").write_text("".join(lines[number::2]))
    return [
        *SMALL, "data=stream", f"data.path={shards}", f"heldout.path={place}/train.jsonl", f"model.path={place}/model",
        "packing.pool=8", *settings,
    ]  # fmt: skip


def test_a_run_end_to_end(place, tmp_path, capsys):
    config = composed(tmp_path, *small(place, "optimizer.lr=1e-2", "trainer.max_steps=20"))
    summary = recipe.finetune(config)
    assert summary.steps == 20
    assert summary.loss_end < summary.loss_start - 1
    assert (summary.documents, summary.heldout_documents) == (60, 3)
    assert 0.8 < summary.efficiency <= 1
    assert str(summary) in capsys.readouterr().out
    assert json.loads((tmp_path / "summary.json").read_text())["loss_end"] == summary.loss_end
    for file in (
        "checkpoints/last.ckpt",
        "metrics.csv",
        "loss.png",
        "report.html",
        "model/config.json",
        "model/tokenizer.json",
    ):
        assert (tmp_path / file).is_file(), file
    resolved = OmegaConf.load(tmp_path / "config.yaml")
    assert (resolved.steps.total, resolved.steps.warmup, resolved.optimizer.lr) == (20, 2, 1e-2)
    assert read_metrics(tmp_path / "metrics.csv", "train/loss")[0] == list(range(20))

    trained = build_model(tmp_path / "model").state_dict()
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    for name, weight in trained.items():
        assert torch.equal(weight, saved[f"model.{name}"]), name


def test_a_resumed_run_goes_on_exactly(place, tmp_path):
    every = "callbacks.checkpoint.every_n_train_steps=4"
    recipe.finetune(composed(tmp_path / "whole", *small(place, every)))
    checkpoint = tmp_path / "whole" / "checkpoints" / "step-4.ckpt"
    recipe.finetune(composed(tmp_path / "rest", *small(place, every, f"ckpt_path={checkpoint}")))
    whole, rest = (read_metrics(tmp_path / name / "metrics.csv", "train/loss") for name in ("whole", "rest"))
    assert rest == ([4, 5], whole[1][4:])
    whole, rest = (torch.load(tmp_path / name / "checkpoints" / "last.ckpt") for name in ("whole", "rest"))
    for name, weight in whole["state_dict"].items():
        assert torch.equal(weight, rest["state_dict"][name]), name


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing. is deprecated:FutureWarning")
def test_adapters_with_dropout_are_resumed_exactly(place, tmp_path):
    pytest.importorskip("peft")
    settings = small(place, "peft=lora", "peft.lora_dropout=0.2", "callbacks.checkpoint.every_n_train_steps=4")
    recipe.finetune(composed(tmp_path / "whole", *settings))
    checkpoint = tmp_path / "whole" / "checkpoints" / "step-4.ckpt"
    recipe.finetune(composed(tmp_path / "rest", *settings, f"ckpt_path={checkpoint}"))
    whole, rest = (read_metrics(tmp_path / name / "metrics.csv", "train/loss") for name in ("whole", "rest"))
    assert rest == ([4, 5], whole[1][4:]), "bitwise"


def test_conversations_with_a_tokenizer_trained_on_them(place, tmp_path):
    settings = ["data=chat", f"data.path={place}/chat.jsonl", "tokenizer.vocab_size=280", "heldout.percent=0"]
    sizes = ["model.architecture.hidden_size=32", "model.architecture.num_hidden_layers=1"]
    summary = recipe.finetune(composed(tmp_path, *SMALL, "trainer.max_steps=1", *settings, *sizes))
    assert summary.loss_start is None
    assert summary.documents == len(SUMS)
    assert summary.prompt.startswith("user:\nWhat is")


def test_gsm8k_with_random_weights_and_no_download(tmp_path):
    write(tmp_path / "gsm.jsonl", [{"question": f"{a} + {b}?", "answer": f"#### {a + b}"} for a, b in SUMS])
    settings = ["experiment=gsm8k_smollm2", "model.init=random", "trainer=cpu", f"data.path={tmp_path}/gsm.jsonl"]
    sizes = [f"model.architecture.{size}" for size in ("num_hidden_layers=1", "hidden_size=36", "intermediate_size=48")]
    few = ["trainer.max_steps=1", "packing.seq_len=64", "callbacks=quiet", "tokenizer.vocab_size=300"]
    summary = recipe.finetune(composed(tmp_path, *settings, *sizes, *few))
    assert summary.steps == 1
    assert summary.prompt.startswith("Question: ")


def test_steps_and_rate_follow_from_the_rest(place, tmp_path):
    settings = ["trainer.max_steps=-1", "trainer.max_epochs=2", "trainer.accumulate_grad_batches=3"]
    summary = recipe.finetune(composed(tmp_path, *small(place, *settings)))
    batches = -(-summary.rows // 2)
    resolved = OmegaConf.load(tmp_path / "config.yaml")
    assert resolved.steps.total == summary.steps == 2 * -(-batches // 3)
    assert resolved.optimizer.lr == resolved.learning_rate.pretrained


def test_what_rows_cut_off_is_in_the_summary(place, tmp_path):
    lost = {"prompt": "What is 2 plus 2?\n" * 20, "completion": "It is 4."}
    kept = {"prompt": "What is 3 plus 3?\n", "completion": "It is 6."}
    write(tmp_path / "x.jsonl", [kept, lost, kept, lost])
    settings = [f"data.path={tmp_path}/x.jsonl", "heldout.percent=0", "packing.overflow=truncate"]
    data = prepare(composed(tmp_path, *small(place, *settings)))
    (note,) = (note for note in data.notes if "supervised" in note)
    assert note == (
        f"2 documents lost every supervised token to rows of packing.seq_len=64 (the first is {tmp_path}/x.jsonl:2)"
    )
    with pytest.raises(DataError, match=r"x\.jsonl:2: \d+ tokens, more than seq_len=64 .*packing\.overflow=error"):
        prepare(composed(tmp_path, *small(place, *settings[:2], "packing.overflow=error")))


def test_heldout_documents_are_spread_over_their_file(place, tmp_path):
    settings = [f"heldout.path={place}/train.jsonl", "heldout.limit=3"]
    _, heldout = load_splits(composed(tmp_path, *small(place, *settings)))
    assert [source.rpartition(":")[2] for source in heldout["source"]] == ["1", "32", "63"]


@pytest.mark.parametrize(
    ("content", "percent", "message"),
    [
        ("", 5, r"x\.jsonl: the file is empty"),
        ('{"prompt": "a", "completion": "b"}\nno\n', 5, r"x\.jsonl:2: not valid JSON .* fix or remove it"),
        (
            '{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n',
            5,
            r"x\.jsonl:2: .*missing.*\(data\.completion_field=",
        ),
        ('{"text": "b c"}\n{"text": ""}\n', 0, r"x\.jsonl:2: no supervised token.*\(tokenize\.on_unsupervised=drop\)"),
        ('{"text": "b"}\n', 5, r"1 document cannot be shared .*heldout\.percent=0"),
        (None, 5, r"x\.jsonl: no such file"),
    ],
)
def test_wrong_data(content, percent, message, place, tmp_path):
    if content is not None:
        (tmp_path / "x.jsonl").write_text(content)
    settings = [f"data.path={tmp_path}/x.jsonl", f"heldout.percent={percent}"]
    with pytest.raises(DataError) as error:
        recipe.finetune(composed(tmp_path, *small(place, *settings)))
    text = one_line_of(error.value)
    assert re.search(message, text), text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["data=chat"], "data.path is not set; give it on the command line: data.path=..."),
        (["packing.seq_len=long"], "packing.seq_len=long must be a whole number of at least 2"),
        (["packing.batch_size=0"], "packing.batch_size=0 must be a whole number of at least 1"),
        (["optimizer.lr=-1"], "optimizer.lr=-1 must be a number above 0"),
        (
            ["model.path=null", "model.init=pretrained", "data.path=nowhere.jsonl"],
            "model.init=pretrained needs model.path: a",
        ),
        (["model.init=rendom", "data.path=nowhere.jsonl"], "model.init must be one of auto, random, pretrained; got"),
        (["model.path=./nowhere"], "./nowhere: no such folder; model.path needs"),
        (["ckpt_path=nowhere.ckpt"], "nowhere.ckpt: no such checkpoint; ckpt_path is a file that a run wrote"),
        (["ckpt_path=docs"], "docs: a folder that is no sharded checkpoint; ckpt_path is a file such as"),
        (["ckpt_path=README.md"], "README.md: no checkpoint of this recipe"),
        (["attention=triton"], "attention.backend=triton trains on a GPU only"),
        (["module.loss=liger"], "module.loss=liger is a GPU kernel; use module.loss=chunked"),
        (["module.loss=fused"], "module.loss=fused must be one of logits, chunked, liger"),
        (["module.loss_weighting=line"], "module.loss_weighting=line must be one of token, document, sqrt"),
        (
            ["trainer.context_parallel_size=2"],
            "trainer.context_parallel_size=2 must divide the number of processes, 1;",
        ),
        (["attention.backend=fast"], "attention.backend=fast must be one of hopper, triton, torch, reference"),
        (
            ["trainer.gradient_clip_val=-1"],
            "trainer.gradient_clip_val=-1 must be a number of at least 0; 0 or null clips",
        ),
        (["trainer.gradient_clip_val=nan"], "trainer.gradient_clip_val=nan must be a number of at least 0"),
        (["trainer.gradient_clip_val=big"], "trainer.gradient_clip_val=big must be a number of at least 0"),
        (["trainer.max_steps=0"], "trainer.max_steps=0 trains nothing; set it above 0, or to -1"),
        (["trainer.max_epochs=0"], "trainer.max_epochs=0 trains nothing"),
        (["trainer.limit_val_batches=0"], "trainer.limit_val_batches=0 measures no held-out loss;"),
        (
            ["callbacks=early_stopping", "heldout.percent=0"],
            "EarlyStopping monitors val/loss, and no documents are held out; set heldout.percent=5",
        ),
        (
            ["callbacks=early_stopping", "callbacks.early_stopping.monitor=val/los"],
            "EarlyStopping monitors val/los, which nobody logs; choose one of packing/documents, packing/efficiency,",
        ),
        (["sample.temperature=-1"], "sample.temperature=-1 must be a number from 0 upwards"),
        (["sample.temperature=hot"], "sample.temperature=hot must be a number from 0 upwards"),
        (["sample.temperature=nan"], "sample.temperature=nan must be a number from 0 upwards"),
        (["heldout.percent=abc"], "heldout.percent=abc must be a number from 0 to below 100"),
        (["heldout.percent=100"], "heldout.percent=100 must be a number from 0 to below 100"),
        (["steps.warmup_share=null"], "steps.warmup_share=None must be a number from 0 to 1"),
        (["steps.warmup_share=abc"], "steps.warmup_share=abc must be a number from 0 to 1"),
        (["steps.warmup_share=5"], "steps.warmup_share=5 must be a number from 0 to 1"),
        (["trainer.val_check_interval=0"], "trainer.val_check_interval=0 must be a whole number of batches, a share"),
        (["trainer.val_check_interval=0.0"], "trainer.val_check_interval=0.0 must be a whole number of batches"),
        (["trainer.val_check_interval=1.5"], "trainer.val_check_interval=1.5 must be a whole number of batches"),
        (["trainer.val_check_interval=often"], "trainer.val_check_interval=often must be a whole number of batches"),
        (
            ["trainer.check_val_every_n_epoch=0"],
            "trainer.check_val_every_n_epoch=0 must be a whole number of at least 1",
        ),
        (
            ["trainer.check_val_every_n_epoch=null"],
            "trainer.check_val_every_n_epoch=null counts batches over epochs, and trainer.val_check_interval=None",
        ),
        (
            ["trainer.val_check_interval=4", "data.limit=9"],
            "trainer.val_check_interval=4 is more than the batches of an epoch (1); lower it, or let it count over",
        ),
        (["+trainer.limit_train_batches=5"], "trainer.limit_train_batches=5 cuts epochs short, and the schedule"),
        (["+trainer.limit_train_batches=1"], "trainer.limit_train_batches=1 cuts epochs short"),
        (["+trainer.limit_train_batches=0"], "trainer.limit_train_batches=0 cuts epochs short"),
        (["+trainer.overfit_batches=0.5"], "trainer.overfit_batches=0.5 cuts epochs short"),
        (["tokenize.turns=foo"], "tokenize.turns=foo must be one of all, last"),
        (["tokenize.on_unsupervised=foo"], "tokenize.on_unsupervised=foo must be one of error, drop"),
        (["packing.order=foo"], "packing.order=foo must be one of shuffle, balanced, sequential"),
        (["packing.strategy=foo"], "packing.strategy=foo must be one of best_fit, next_fit, wrapped"),
        (["packing.overflow=foo"], "packing.overflow=foo must be one of split, truncate, drop, error"),
        (
            ["optimizer.betas=[0.9]"],
            "optimizer: it cannot be made with these settings (list index out of range); --cfg job --package optimizer",
        ),
        (["tokenize.train_on_prompt=no"], "tokenize.train_on_prompt=no must be true or false"),
        (["tokenize.train_on_prompt=off"], "tokenize.train_on_prompt=off must be true or false"),
        (["tokenize.train_on_prompt=null"], "tokenize.train_on_prompt=None must be true or false"),
        (["model.gradient_checkpointing=off"], "model.gradient_checkpointing=off must be true or false"),
        (["attention.leak_check=foo"], "attention.leak_check=foo must be true or false"),
        (["callbacks.packflex.leak_check=1"], "callbacks.packflex.leak_check=1 must be true or false"),
        (["data=packed", "data.verify=no"], "data.verify=no must be true or false"),
        (["+datamodule.pin_memory=yes"], "datamodule.pin_memory=yes must be true or false"),
        (["optimizer=adamw_fused", "optimizer.fused=no"], "optimizer.fused=no must be true or false"),
        (["trainer.use_distributed_sampler=no"], "trainer.use_distributed_sampler=no must be true or false"),
        (["trainer.enable_model_summary=off"], "trainer.enable_model_summary=off must be true or false"),
        (
            ["trainer=fsdp", "trainer.strategy.save_distributed_checkpoint=no"],
            "trainer.strategy.save_distributed_checkpoint=no must be true or false",
        ),
        (["debug=maybe"], "debug=maybe must be true or false"),
        (["callbacks.packflex=null"], "no PackFlexCallback among callbacks: without it the documents of a row see"),
        (["callbacks.checkpoint.monitor=val/los"], "ModelCheckpoint monitors val/los, which nobody logs;"),
        (["+optimizer.foo=1"], "optimizer.foo: torch.optim.adamw.AdamW takes no such option; it takes params, lr,"),
        (["+scheduler.foo=1"], "scheduler.foo: transformers.optimization.get_cosine_schedule_with_warmup takes no"),
        (["+tokenize.foo=1"], "tokenize.foo: packflex.data.tokenize.tokenize_documents takes no such option;"),
        (["+data.foo=1"], "data.foo: packflex.data.sources.load_documents takes no such option;"),
        (["+module.foo=1"], "module.foo: packflex.integrations.lightning.module.CausalLMModule takes no such option;"),
        (["+datamodule.foo=1"], "datamodule.foo: packflex.integrations.lightning.datamodule.PackedDataModule takes no"),
        (["+sample.foo=1"], "sample.foo: packflex.report.complete takes no such option; it takes model, tokenizer,"),
        (
            ["optimizer.betas=3"],
            "optimizer: it cannot be made with these settings ('int' object is not subscriptable);",
        ),
        (["trainer.max_steps=-1", "data.limit=9"], "the run has no end: set trainer.max_steps or trainer.max_epochs"),
    ],
)
def test_wrong_settings(settings, message, place, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    base = SMALL if settings == ["data=chat"] else small(place)
    with pytest.raises(SetupError) as error:
        recipe.finetune(composed(tmp_path, *base, *settings))
    assert one_line_of(error.value).startswith(message)


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig", "PromptEncoderConfig"])
@pytest.mark.parametrize("loss", ["logits", "chunked"])
def test_virtual_tokens_are_refused_before_the_data_is_read(place, tmp_path, kind, loss):
    pytest.importorskip("peft")
    settings = [f"peft._target_=peft.{kind}", "+peft.num_virtual_tokens=4", "+peft.task_type=CAUSAL_LM"]
    config = composed(tmp_path, *small(place, *settings, f"module.loss={loss}", "data.path=nowhere.jsonl"))
    with pytest.raises(SetupError, match=f"^{kind} puts virtual tokens before each input, .*; use peft=lora$"):
        recipe.finetune(config)


@pytest.mark.parametrize(
    "settings",
    [
        ["peft._target_=peft.AdaptionPromptConfig", "+peft.adapter_len=4", "+peft.adapter_layers=1"],
        ["peft._target_=peft.LoraConfig", "+peft.alora_invocation_tokens=[5]"],
    ],
    ids=["adaption prompt", "activated LoRA"],
)
def test_adapters_that_no_model_can_be_made_of_are_refused_before_the_data_is_read(place, tmp_path, settings):
    pytest.importorskip("peft")
    config = composed(tmp_path, *small(place, *settings, "+peft.task_type=CAUSAL_LM", "data.path=nowhere.jsonl"))
    with pytest.raises(SetupError, match=r"^\w+Config makes adapters that cannot be merged into the model"):
        recipe.finetune(config)


def test_settings_of_a_target_that_another_setting_names_are_checked_too(place, tmp_path, caplog):
    settings = ["optimizer._target_=${kind}", "+kind=torch.optim.AdamW"]
    with pytest.raises(SetupError, match=r"^optimizer\.amsgrad=no must be true or false$"):
        recipe.finetune(composed(tmp_path, *small(place), *settings, "+optimizer.amsgrad=no"))
    made = "+optimizer.amsgrad={_target_: builtins.bool, _args_: [0]}"
    check_booleans(composed(tmp_path, *small(place), *settings, made))
    check_booleans(composed(tmp_path, *small(place), "optimizer._target_=torch.optim.AdamV"))  # told by who makes it
    assert not caplog.records


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("data=nothing", "Could not find 'data/nothing'; available options in 'data': chat gsm8k hub jsonl packed"),
        ("nothing=1", "there is no setting nothing; --cfg job shows all of them"),
        (
            "optimizer.foo=1",
            "there is no setting optimizer.foo; --cfg job shows all of them (+optimizer.foo=1 hands it to what "
            "optimizer builds, if that takes it)",
        ),
        ("trainer.max_step=1", "there is no setting trainer.max_step; "),
        ("data.path=[a", "data.path=[a cannot be read ("),
    ],
)
def test_wrong_names(setting, message, tmp_path):
    with pytest.raises(HydraException) as error:
        composed(tmp_path, setting)
    assert one_line_of(error.value).startswith(message)


def test_a_gpu_that_is_not_there(place, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(SetupError, match="sees no CUDA GPU; use trainer=cpu"):
        recipe.finetune(composed(tmp_path, *small(place, "trainer=gpu")))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(SetupError, match=r"trainer\.devices=3, and there are 2 GPUs"):
        recipe.finetune(composed(tmp_path, *small(place, "trainer=gpu", "trainer.devices=3")))


def test_checkpoints_that_do_not_fit(place, tmp_path):
    recipe.finetune(composed(tmp_path, *small(place, "trainer.max_steps=2")))
    checkpoint = f"ckpt_path={tmp_path}/checkpoints/last.ckpt"
    with pytest.raises(SetupError, match=r"has done its 2 steps, and trainer\.max_steps=1; raise"):
        recipe.finetune(composed(tmp_path, *small(place, checkpoint, "trainer.max_steps=1")))
    with pytest.raises(SetupError, match=r"a checkpoint of another model: model\.lm_head\.weight has shape"):
        recipe.finetune(composed(tmp_path, *small(place, checkpoint, "model.path=null")))
    other = (
        r"another optimizer: it has amsgrad, betas, .*, and SGD has dampening, momentum, nesterov instead; resume with"
    )
    with pytest.raises(SetupError, match=other):
        recipe.finetune(composed(tmp_path, *small(place, checkpoint, "optimizer=sgd")))
    settings = (
        r"its run had optimizer\.lr=2e-05, and this one has optimizer\.lr=0\.5, which .* resume with the settings"
    )
    with pytest.raises(SetupError, match=settings):
        recipe.finetune(composed(tmp_path, *small(place, checkpoint, "optimizer.lr=0.5")))
    settings = (
        r"had optimizer\.betas=\[0\.9, 0\.95\], optimizer\.weight_decay=0\.01, and this one has .*=\[0\.8, 0\.95\]"
    )
    changed = ["optimizer.betas=[0.8,0.95]", "optimizer.weight_decay=0.1"]
    with pytest.raises(SetupError, match=settings):
        recipe.finetune(composed(tmp_path, *small(place, checkpoint, *changed)))
    with pytest.raises(
        SetupError, match=r"had module\.loss_weighting=token, and this one has .*=sqrt; resume with that"
    ):
        recipe.finetune(composed(tmp_path, *small(place, checkpoint, "module.loss_weighting=sqrt")))
    with pytest.raises(ValueError, match="the checkpoint's loader had seed=0, this one has 1"):
        recipe.finetune(composed(tmp_path, *small(place, checkpoint, "datamodule.seed=1")))


def test_settings_that_a_run_goes_on_with():
    """What a scheduler moves is not compared, nor how an optimizer computes."""

    def made(make_scheduler, **settings):
        optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))], **({"lr": 0.1} | settings))
        return optimizer, make_scheduler(optimizer)

    for make in (
        lambda optimizer: torch.optim.lr_scheduler.ConstantLR(optimizer, 0.5),
        lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=4),
    ):
        ran, schedule = made(make)
        for _ in range(2):
            ran.step()
            schedule.step()
        (saved,) = ran.state_dict()["param_groups"]
        for settings, changed in (({}, []), ({"foreach": True}, []), ({"eps": 1e-6}, ["eps"])):
            (group,) = made(make, **settings)[0].state_dict()["param_groups"]
            names = changed_settings(torch.optim.AdamW, saved, group)
            assert names == changed, (names, settings)


def test_a_checkpoint_of_weights_alone_is_refused(place, tmp_path):
    saving = ["callbacks.checkpoint.every_n_train_steps=2", "+callbacks.checkpoint.save_weights_only=true"]
    recipe.finetune(composed(tmp_path, *small(place, *saving)))
    (saved,) = (tmp_path / "checkpoints").glob("step-*.ckpt")
    with pytest.raises(SetupError, match=r"holds weights without an optimizer .*; give another checkpoint"):
        recipe.finetune(composed(tmp_path, *small(place, f"ckpt_path={saved}")))


def test_early_stopping_ends_a_run(place, tmp_path):
    """Also where max_steps ends an epoch before its validation."""
    settings = ["callbacks=early_stopping", "callbacks.progress=null", "trainer.max_steps=20"]
    stops = ["+callbacks.early_stopping.min_delta=100", "trainer.val_check_interval=2"]
    assert recipe.finetune(composed(tmp_path / "stops", *small(place, *settings, *stops))).steps == 8
    short = [*settings, "trainer.max_steps=3"]
    assert recipe.finetune(composed(tmp_path / "ends", *small(place, *short))).steps == 3


def test_validations_counted_over_epochs(place, tmp_path):
    """Epochs of 2 or 3 batches, and a validation after every 4 of them."""
    every = ["trainer.val_check_interval=4", "trainer.check_val_every_n_epoch=null", "data.limit=20"]
    summary = recipe.finetune(composed(tmp_path, *small(place, *every, "trainer.max_steps=9")))
    assert 2 < summary.rows <= 6
    steps = read_metrics(tmp_path / "metrics.csv", "val/loss")[0]
    assert {0, 3, 7, 9} == set(steps), steps


@pytest.mark.parametrize(
    "words",
    [
        ["+trainer.limit_train_batches=1.0", "+trainer.overfit_batches=0"],
        ["+trainer.limit_train_batches=null", "+trainer.overfit_batches=0.0"],
    ],
)
def test_whole_epochs_by_other_words_are_taken(place, tmp_path, words):
    words = [*words, "trainer.val_check_interval='00:00:10:00'"]
    assert recipe.finetune(composed(tmp_path, *small(place, *words, "trainer.max_steps=1"))).steps == 1


@pytest.mark.parametrize(
    ("held", "rows"), [([], False), (["heldout.path={place}/train.jsonl", "heldout.limit=3"], True)]
)
def test_settings_that_are_not_needed_may_be_null(place, tmp_path, held, rows):
    """Nothing is held out, or from elsewhere, the warm-up is given in steps, and a sample is the likeliest."""
    held = [setting.format(place=place) for setting in held]
    nulls = ["heldout.percent=null", "steps.warmup=1", "steps.warmup_share=null", "sample.temperature=null"]
    summary = recipe.finetune(composed(tmp_path, *small(place, *nulls, *held, "trainer.max_steps=1")))
    assert summary.steps == 1
    assert (tmp_path / "metrics.csv").read_text().count("val/loss") == rows


def test_a_metric_that_another_callback_does_not_log_is_one_line(place, tmp_path, capsys):
    stop = "{_target_:lightning.pytorch.callbacks.EarlyStopping,monitor:other,check_on_train_epoch_end:true}"
    others = [f"+callbacks.stop={stop}", "+callbacks.other={_target_:tests.integrations.test_lightning.Recorder}"]
    with pytest.raises(SystemExit) as stopped:
        recipe.run_config(composed(tmp_path, *small(place, *others)))
    assert stopped.value.code == 2
    assert "error: Early stopping conditioned on metric `other` which is not available." in capsys.readouterr().err


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork", "ddp_notebook"])
def test_ranks_that_are_copies_of_this_process_are_refused(place, tmp_path, strategy):
    config = composed(tmp_path, *small(place, f"trainer.strategy={strategy}", "trainer.devices=2"))
    with pytest.raises(
        SetupError, match=f"^trainer.strategy={strategy} trains in copies of this process .*; use trainer.strategy=ddp$"
    ):
        recipe.finetune(config)


def test_a_sweep_over_several_devices_is_refused(place, tmp_path):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        overrides = ["hydra.mode=MULTIRUN", "hydra.job.num=0", f"hydra.runtime.output_dir={tmp_path}"]
        both = compose("finetune", overrides=overrides, return_hydra_config=True)
    HydraConfig.instance().set_config(both)
    try:
        with pytest.raises(SetupError, match=r"--multirun with 2 devices: .*every rank would run a sweep of its own"):
            recipe.finetune(composed(tmp_path, *small(place, "trainer.devices=2", "trainer.strategy=ddp")))
    finally:
        HydraConfig.instance().cfg = None


def run(*arguments, recipe="finetune"):
    command = [sys.executable, str(ROOT / "recipes" / f"{recipe}.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


def test_the_command_line_sweeps(place, tmp_path):
    done = run("-m", *small(place, "trainer.max_steps=1", "seed=0,1", f"hydra.sweep.dir={tmp_path}"))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "Packed 60 documents into" in done.stdout
    for job in ("0", "1"):
        assert (tmp_path / job / "loss.png").is_file()
        assert OmegaConf.load(tmp_path / job / "config.yaml").seed == int(job)


def test_the_command_line_fails_in_one_line(tmp_path):
    done = run("data=jsonl", f"data.path={tmp_path}/x.jsonl", f"hydra.run.dir={tmp_path}/out")
    assert done.returncode == 2
    assert done.stderr == f"finetune: error: {tmp_path}/x.jsonl: no such file or folder; check the path\n"


def test_a_folder_that_cannot_be_made_is_one_line(place, tmp_path):
    (tmp_path / "file").write_text("")
    done = run(*small(place, f"hydra.run.dir={tmp_path}/file/out"))
    assert done.returncode == 2
    assert re.fullmatch(rf"finetune: error: {tmp_path}/file/\S+: Not a directory; .*hydra.run.dir=.*\n", done.stderr)
    done = run(*small(place, f"hydra.run.dir={tmp_path}/out", f"callbacks.checkpoint.dirpath={tmp_path}/file/x",
                      "callbacks.checkpoint.every_n_train_steps=1"))  # fmt: skip
    assert done.returncode == 2
    assert re.fullmatch(
        rf"finetune: error: {tmp_path}/file/\S*: Not a directory; .*\n", done.stderr.splitlines(True)[-1]
    )


def test_a_terminated_run_says_how_to_go_on(place, tmp_path):
    out = tmp_path / "out"
    settings = small(place, "trainer.max_steps=100000", "logger.csv.flush_logs_every_n_steps=1", f"hydra.run.dir={out}")
    command = [sys.executable, str(ROOT / "recipes" / "finetune.py"), *map(str, settings)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    try:
        deadline = time.monotonic() + 120
        while not read_metrics(out / "metrics.csv", "train/loss")[0]:
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        printed, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGTERM, errors
    saved = re.search(r"Stopped by SIGTERM after (\d+) steps. .* ckpt_path=(\S+)", printed)
    assert saved, printed
    state = torch.load(tmp_path / saved[2], weights_only=True)
    assert state["global_step"] == int(saved[1])
    rest = recipe.finetune(
        composed(
            tmp_path / "rest",
            *small(place, f"trainer.max_steps={int(saved[1]) + 2}", f"ckpt_path={tmp_path / saved[2]}"),
        )
    )
    assert rest.steps == int(saved[1]) + 2


def signalled(batch):
    """A setting that sends SIGTERM to the run while it works on a batch."""
    return f"+callbacks.kill={{_target_:tests.integrations.test_robust_runs.SendSignal,number:15,batch:{batch}}}"


@pytest.mark.parametrize("validated", ["null", "2"])
def test_a_run_resumed_in_its_folder_has_the_metrics_of_both_parts(place, tmp_path, monkeypatch, validated):
    """After a signal, and once more after its end; also where a validation was due at the signal."""
    settings = small(place, "steps.total=8", f"trainer.val_check_interval={validated}")
    recipe.finetune(composed(tmp_path / "whole", *settings, "trainer.max_steps=8"))
    with pytest.raises(SystemExit):
        recipe.finetune(composed(tmp_path / "parts", *settings, signalled(3)))
    drawn = []
    monkeypatch.setattr(recipe, "save_report", lambda *arguments: drawn.append(arguments[-1]))
    for checkpoint, steps in (("interrupted", 6), ("last", 8)):
        path = f"ckpt_path={tmp_path}/parts/checkpoints/{checkpoint}.ckpt"
        recipe.finetune(composed(tmp_path / "parts", *settings, f"trainer.max_steps={steps}", path))
    whole, parts = (read_metrics(tmp_path / name / "metrics.csv", "train/loss") for name in ("whole", "parts"))
    assert parts == whole, "bitwise"
    assert parts[0] == list(range(8))
    steps, losses = read_metrics(tmp_path / "parts" / "metrics.csv", "val/loss")
    assert steps == sorted(steps)
    assert {0, 4, 6, 8} <= set(steps)
    assert [step for step, _ in drawn[-1]] == [*sorted(step for step in steps if step < 6), 6, 8]
    assert drawn[-1][0] == (0, losses[0])


@pytest.mark.parametrize(("callbacks", "steps"), [("default", {0}), ("early_stopping", {0, 3})])
def test_a_signal_is_followed_by_a_validation_where_one_is_waited_for(place, tmp_path, callbacks, steps):
    with pytest.raises(SystemExit):
        recipe.finetune(composed(tmp_path, *small(place, f"callbacks={callbacks}", "steps.total=8", signalled(3))))
    assert {int(step) for step in read_metrics(tmp_path / "metrics.csv", "val/loss")[0]} == steps


@pytest.mark.parametrize("limit", ["trainer.max_steps=4", "trainer.max_epochs=1"])
def test_a_signal_during_the_last_step_leaves_a_finished_run(place, tmp_path, limit, caplog):
    epochs = [] if "steps" in limit else ["trainer.max_steps=-1"]
    whole = recipe.finetune(composed(tmp_path / "whole", *small(place, *epochs, limit)))
    with caplog.at_level(logging.INFO, "finetune"):
        ended = recipe.finetune(composed(tmp_path / "ended", *small(place, *epochs, limit, signalled(whole.steps - 1))))
    assert (ended.steps, ended.loss_end) == (whole.steps, whole.loss_end)
    assert f"SIGTERM came during the last of {whole.steps} steps, so the run ends as usual" in caplog.text
    assert "Go on" not in caplog.text
    assert {"model", "report.html", "summary.json"} <= {file.name for file in (tmp_path / "ended").iterdir()}
    assert [file.name for file in (tmp_path / "ended" / "checkpoints").iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        ([], "during training, before a checkpoint was saved, so there is nothing to go on from"),
        (
            ["callbacks.checkpoint.every_n_train_steps=2"],
            r"during training\. Go on from its last checkpoint with the same command and ckpt_path=\S+/step-2\.ckpt",
        ),
    ],
    ids=["nothing saved", "saved"],
)
def test_a_second_ctrl_c_ends_the_process_with_its_code_and_a_line(place, tmp_path, monkeypatch, settings, advice):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    send = "{_target_:tests.integrations.test_robust_runs.SendSignal,number:2,batch:3}"
    twice = [f"+callbacks.first={send}", f"+callbacks.second={send}"]
    done = run(*small(place, *settings, *twice, f"hydra.run.dir={tmp_path}"))
    assert done.returncode == 128 + signal.SIGINT
    assert done.stderr == "\nFinishing the step, then saving; Ctrl-C again stops at once\n"
    assert re.search(rf"Stopped by SIGINT {advice}\n", done.stdout), done.stdout
    assert not (tmp_path / "checkpoints" / "interrupted.ckpt").exists()


def signalled_outside(number, validation="null"):
    return (
        "+callbacks.kill={_target_:tests.integrations.test_robust_runs.SignalOutside,"
        f"number:{number.value},validation:{validation}}}"
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2])
def test_a_signal_before_the_first_step_ends_with_its_code_and_a_line(place, tmp_path, caplog, number):
    handlers = [signal.getsignal(n) for n in SIGNALS]
    with caplog.at_level(logging.INFO, "finetune"), pytest.raises(SystemExit) as stopped:
        recipe.finetune(composed(tmp_path, *small(place, signalled_outside(number, 1))))
    assert stopped.value.code == 128 + number
    assert f"Stopped by {number.name} before the first step, so there is nothing to save" in caplog.text
    assert not (tmp_path / "checkpoints").exists()
    assert [signal.getsignal(n) for n in SIGNALS] == handlers


@pytest.mark.parametrize(
    ("limit", "validation"),
    [("trainer.max_steps=4", 2), ("trainer.max_epochs=1", 3), ("trainer.max_steps=4", "null")],
    ids=["in the last validation", "after an epoch", "as training ends"],
)
def test_a_signal_after_training_leaves_a_checkpoint_whose_model_can_be_had(place, tmp_path, caplog, limit, validation):
    epochs = [] if "steps" in limit else ["trainer.max_steps=-1"]
    settings = small(place, *epochs, limit)
    whole = recipe.finetune(composed(tmp_path / "whole", *settings))
    with caplog.at_level(logging.INFO, "finetune"), pytest.raises(SystemExit) as stopped:
        recipe.finetune(composed(tmp_path / "parts", *settings, signalled_outside(signal.SIGTERM, validation)))
    assert stopped.value.code == 128 + signal.SIGTERM
    checkpoint = tmp_path / "parts" / "checkpoints" / "last.ckpt"
    advice = f"after training. The same command and ckpt_path={checkpoint} saves the model"
    assert f"Stopped by SIGTERM {advice}" in caplog.text
    assert not (tmp_path / "parts" / "model").exists()

    before = checkpoint.read_bytes()
    rest = recipe.finetune(composed(tmp_path / "parts", *settings, f"ckpt_path={checkpoint}"))
    assert (rest.steps, rest.loss_end) == (whole.steps, whole.loss_end)
    assert checkpoint.read_bytes() == before
    model, expected = (build_model(tmp_path / part / "model").state_dict() for part in ("parts", "whole"))
    assert all(torch.equal(model[name], weight) for name, weight in expected.items())
    curves = [read_metrics(tmp_path / part / "metrics.csv", "train/loss") for part in ("parts", "whole")]
    assert curves[0] == curves[1]


def test_a_worker_process_leaves_ctrl_c_to_the_run(monkeypatch):
    """A fork has the handlers, too; only what ends it by intention may do so."""
    killed = []
    with StopSignals() as signals:
        with pytest.raises(StoppedError):
            os.kill(os.getpid(), signal.SIGINT)
        monkeypatch.setattr(signals, "_process", -1)
        os.kill(os.getpid(), signal.SIGINT)
        monkeypatch.setattr(os, "kill", lambda process, number: killed.append((number, signal.getsignal(number))))
        signals._handle(signal.SIGTERM, None)
    assert killed == [(signal.SIGTERM, signal.SIG_DFL)]


@pytest.mark.parametrize(
    ("settings", "where"), [(small, r"training document \d+ \("), (streamed, r"a document of the stream \(")]
)
def test_a_nan_names_the_training_document(place, tmp_path, monkeypatch, settings, where):
    config = composed(tmp_path, *settings(place, "trainer.max_steps=30", "attention.leak_check=false"))

    def build(**options):
        model = build_model(**options)
        word = options["tokenizer"](" 9 plus 6")["input_ids"][-1]
        model.model.embed_tokens.register_forward_hook(
            lambda module, args, out: torch.where(((args[0] == word) & module.training)[..., None], torch.nan, out)
        )
        return model

    monkeypatch.setattr("packflex.models.build_model", build)
    with pytest.raises(NonFiniteLossError, match=rf"whose logits are not finite: {where}") as error:
        recipe.finetune(config)
    named = re.findall(r"\(\d+ tokens: '([^']*)' \.\.\.\)", one_line_of(error.value))
    assert named
    assert all("What is" in text and "6" in text for text in named), "the documents themselves"
    assert (tmp_path / "nonfinite_batch.pt").is_file()


@pytest.mark.parametrize("held", ["heldout.limit=4", "heldout.percent=0"])
def test_weights_spoiled_by_the_last_step_are_no_finished_run(place, tmp_path, capsys, held):
    wrecks = ["optimizer=sgd", "optimizer.lr=1e30", "trainer.gradient_clip_val=null", "trainer.max_steps=2"]
    with pytest.raises(SystemExit) as stopped:
        recipe.run_config(composed(tmp_path, *small(place, held, *wrecks)))
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert re.search(r"error: the weights are finite, but .* 2 optimizer steps.*: training document \d+ \(", said)
    assert said.count("\n") == 1
    assert (tmp_path / "nonfinite_batch.pt").is_file()
    assert not list((tmp_path / "checkpoints").glob("*"))
    assert not (tmp_path / "model").exists()


def test_a_heldout_loss_that_is_not_finite_is_no_finished_run(place, tmp_path, monkeypatch):
    """Before training nothing is lost by stopping, after it the checkpoint has a name of its own."""
    losses = iter([1.0, math.nan])
    monkeypatch.setattr(recipe, "_heldout_loss", lambda *_, **__: next(losses))
    with pytest.raises(
        NonFiniteLossError, match=r"loss is nan after 6 steps, whose checkpoint is \S+/nonfinite\.ckpt;"
    ):
        recipe.finetune(composed(tmp_path, *small(place)))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["nonfinite.ckpt"]
    assert not (tmp_path / "model").exists()
    losses = iter([math.inf])
    with pytest.raises(NonFiniteLossError, match="the held-out loss is inf before training: the weights"):
        recipe.finetune(composed(tmp_path / "before", *small(place)))


def test_an_error_of_the_sample_costs_no_model(place, tmp_path, monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("no sample")

    monkeypatch.setattr(recipe, "complete", fails)
    with pytest.raises(RuntimeError, match="no sample"):
        recipe.finetune(composed(tmp_path, *small(place, "trainer.max_steps=1")))
    build_model(tmp_path / "model")
    assert (tmp_path / "model" / "tokenizer.json").is_file()
    assert OmegaConf.load(tmp_path / "config.yaml").steps.total == 1


def test_a_run_without_a_metrics_file_lists_none(place, tmp_path):
    summary = recipe.finetune(composed(tmp_path, *small(place, "trainer.max_steps=1", "logger.csv=null")))
    assert "metrics" not in summary.files
    assert (tmp_path / "loss.png").is_file()
    assert all((ROOT / path).exists() for path in summary.files.values())


def test_out_of_memory_in_one_line():
    text = one_line_of(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80.00 GiB"))
    assert text.startswith(
        "CUDA out of memory. Tried to allocate 80.00 GiB To need less memory, in this order: a lower"
    )
    assert torch.OutOfMemoryError in recipe.USER_ERRORS


def test_host_memory_and_lost_ranks_in_one_line(place, tmp_path, monkeypatch, capsys):
    errors = []

    def fails(config):
        raise errors[-1]

    monkeypatch.setattr(recipe, "finetune", fails)
    config = composed(tmp_path, *small(place))
    with pytest.raises(RuntimeError) as host:
        torch.empty(2**60, dtype=torch.uint8)
    gloo = "[/x/gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:9908: Connection reset by peer. This is ..."
    for error, said in (
        (host.value, "DefaultCPUAllocator.* To need less memory, in this order"),
        (MemoryError("Unable to allocate 9 GiB"), "Unable to allocate 9 GiB To need less memory"),
        (RuntimeError(gloo), r"another rank of this run has died.*ckpt_path=\S+/checkpoints/\.\.\."),
    ):
        errors.append(error)
        with pytest.raises(SystemExit) as stopped:
            recipe.run_config(config)
        assert stopped.value.code == 2
        assert re.search(said, capsys.readouterr().err)
    errors.append(RuntimeError("a fault of ours"))
    with pytest.raises(RuntimeError, match="a fault of ours"):
        recipe.run_config(config)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing. is deprecated:FutureWarning")
def test_adapters_are_trained_saved_and_merged(place, tmp_path):
    peft = pytest.importorskip("peft")
    config = composed(tmp_path, *small(place, "peft=lora", "peft.r=4", "optimizer.lr=3e-2", "trainer.max_steps=20"))
    summary = recipe.finetune(config)
    assert summary.loss_end < summary.loss_start - 0.2
    start, merged = build_model(place / "model"), build_model(tmp_path / "model")
    adapted = peft.PeftModel.from_pretrained(build_model(place / "model"), tmp_path / "adapter")
    ids = torch.arange(5, 25)[None]
    for model in (start, merged, adapted):
        model.eval()
    assert torch.allclose(merged(ids).logits, adapted(ids).logits, atol=1e-4)
    assert not torch.allclose(merged(ids).logits, start(ids).logits, atol=1e-2)
    assert torch.equal(merged.model.embed_tokens.weight, start.model.embed_tokens.weight), "frozen"
    assert composed(tmp_path, *small(place, "peft=lora")).optimizer.lr is None
    assert OmegaConf.load(tmp_path / "config.yaml").peft.r == 4


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings:UserWarning")  # of peft, as the adapter is loaded
@pytest.mark.parametrize("wrapped", ["lm_head", "embed_tokens", None])
def test_adapters_of_a_shared_embedding_are_saved_as_trained(place, tmp_path, caplog, wrapped):
    peft = pytest.importorskip("peft")
    base = build_model(place / "model").config.to_dict() | {"tie_word_embeddings": True}
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    start = build_model(architecture=base, tokenizer=tokenizer)
    start.save_pretrained(tmp_path / "tied")
    tokenizer.save_pretrained(tmp_path / "tied")
    targets = [f"peft.target_modules=[q_proj,{wrapped}]"] if wrapped else []
    settings = [f"model.path={tmp_path}/tied", "peft=lora", "peft.r=4", "optimizer.lr=3e-2", *targets]
    with caplog.at_level(logging.INFO, "finetune"):
        recipe.finetune(composed(tmp_path, *small(place, *settings)))
    trained = peft.PeftModel.from_pretrained(build_model(tmp_path / "tied"), tmp_path / "adapter").eval()
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    ids = torch.arange(5, 25)[None]
    assert torch.allclose(saved(ids).logits, trained(ids).logits, atol=1e-4)
    assert not torch.allclose(saved(ids).logits, start.eval()(ids).logits, atol=1e-2)
    shared = saved.lm_head.weight is saved.model.embed_tokens.weight
    assert shared is saved.config.tie_word_embeddings is (wrapped is None)
    assert ("embedding and output share: model/ has one for each" in caplog.text) is not shared


def test_the_saved_model_needs_no_packflex(place, tmp_path):
    """A process in which packflex cannot be imported loads the model and gets the same logits."""
    recipe.finetune(composed(tmp_path, *small(place)))
    model = build_model(tmp_path / "model").eval()
    expected = model(torch.arange(5, 25)[None]).logits[0, -1].tolist()
    code = (
        "import sys, json; sys.modules['packflex'] = None\n"
        "import torch; from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'model')!r})\n"
        f"AutoTokenizer.from_pretrained({str(tmp_path / 'model')!r})('a')\n"
        "print(json.dumps(model.eval()(torch.arange(5, 25)[None]).logits[0, -1].tolist()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == pytest.approx(expected, abs=1e-5)


def test_pretraining_on_text_files(place, tmp_path):
    for i in range(8):
        (tmp_path / f"{i}.txt").write_text(" ".join(f"What is {a} plus {i}? It is {a + i}." for a in range(20)))
    settings = ["callbacks=quiet", "packing.seq_len=64", "trainer.max_steps=3", "sample.max_new_tokens=4"]
    paths = [f"data.path={tmp_path}/*.txt", f"model.path={place}/model", f"hydra.run.dir={tmp_path}/out"]
    done = run(*settings, *paths, recipe="pretrain")
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["steps"] == 3
    assert any("longer than a row were split" in note for note in summary["notes"])
    wrong = run(f"data.path={tmp_path}/nowhere", recipe="pretrain")
    assert wrong.returncode == 2
    assert wrong.stderr.startswith(f"pretrain: error: {tmp_path}/nowhere: no such file or folder")


def packed_rows(place, out):
    command = [
        sys.executable,
        "-m",
        "packflex",
        "pack",
        str(place / "train.jsonl"),
        "--tokenizer",
        str(place / "model"),
    ]
    done = subprocess.run(
        [*command, "--output", str(out), "--seq-len", "64"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_rows_packed_before(place, tmp_path):
    packed_rows(place, tmp_path / "packed")
    settings = [
        f"data.path={tmp_path}/packed",
        f"model.path={place}/model",
        "heldout.percent=10",
        "packing.order=balanced",
    ]
    common = ["data=packed", "callbacks=quiet", "trainer.max_steps=6", "sample.max_new_tokens=4", "optimizer.lr=1e-2"]
    summary = recipe.finetune(composed(tmp_path / "out", *common, *settings))
    assert (summary.seq_len, summary.steps) == (64, 6)
    assert summary.loss_end < summary.loss_start
    assert summary.documents + summary.heldout_documents == 63
    assert 0.75 < summary.efficiency <= 1
    assert "documents read: 63, when they were packed" in summary.notes

    other = train_tokenizer(["other words than those"] * 4, 280, tmp_path / "cache")
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(DataError) as error:
        recipe.finetune(composed(tmp_path / "out2", *common, *settings, f"tokenizer.path={tmp_path}/other"))
    assert f"packed with the tokenizer {place}/model, and {tmp_path}/other gives other ids" in one_line_of(error.value)


def test_a_stream_is_trained_on_and_resumed_exactly(place, tmp_path):
    """Longer than one pass, with a worker at first; accumulated batches."""
    steps = ["trainer.max_steps=16", "trainer.accumulate_grad_batches=2", "callbacks.checkpoint.every_n_train_steps=5"]
    settings = streamed(place, *steps, "callbacks.checkpoint.save_top_k=-1")
    whole = recipe.finetune(composed(tmp_path / "whole", *settings, "packing.num_workers=1"))
    assert (whole.steps, whole.heldout_documents) == (16, 4)
    assert whole.loss_end < whole.loss_start
    assert 0.8 < whole.efficiency <= 1
    assert whole.documents == sum(read_metrics(tmp_path / "whole" / "metrics.csv", "packing/documents")[1])
    assert "documents and rows are counted in each of 4 passes over the stream" in whole.notes
    checkpoint = tmp_path / "whole" / "checkpoints" / "step-5.ckpt"
    rest = recipe.finetune(composed(tmp_path / "rest", *settings, f"ckpt_path={checkpoint}"))
    assert (rest.documents, rest.rows, rest.efficiency) == (whole.documents, whole.rows, whole.efficiency)
    curves = [read_metrics(tmp_path / name / "metrics.csv", "train/loss") for name in ("whole", "rest")]
    assert curves[0][0] == list(range(16))
    assert curves[1] == (list(range(5, 16)), curves[0][1][5:]), "bitwise"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["data.kind=hub"], "data.kind=hub is not read as it comes; data=stream takes jsonl, parquet, arrow"),
        (["packing=next_fit"], "packing.strategy=next_fit needs all documents before"),
        (["packing.order=balanced"], "packing.order=balanced needs all rows before"),
        (["trainer.context_parallel_size=2"], "trainer.context_parallel_size=2 does not go with data=stream"),
        (["trainer.max_steps=-1"], "set trainer.max_steps"),
        (["heldout.path=null"], "heldout.percent=0"),
        (["packing.pool=0"], "packing.pool=0 must be a whole number of at least 1"),
    ],
)
def test_settings_that_a_stream_does_not_have(settings, message, place, tmp_path):
    with pytest.raises(SetupError, match=re.escape(message)):
        recipe.finetune(composed(tmp_path, *streamed(place, *settings)))


def test_kill_9_and_resume_equal_a_run_that_was_never_killed(place, tmp_path):
    """With workers that prefetch, balanced rows, in the middle of an epoch, and other workers afterwards."""
    settings = small(
        place, "trainer.max_steps=150", "callbacks.checkpoint.every_n_train_steps=7", "packing.order=balanced",
        "logger.csv.flush_logs_every_n_steps=1", "packing.num_workers=2",
    )  # fmt: skip
    command = [sys.executable, str(ROOT / "recipes" / "finetune.py"), *map(str, settings)]
    killed = subprocess.Popen(
        [*command, f"hydra.run.dir={tmp_path}/killed"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not (saved := list((tmp_path / "killed" / "checkpoints").glob("step-*.ckpt"))):
        assert killed.poll() is None, killed.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "model").exists(), "killed before its end"
    (saved,) = (tmp_path / "killed" / "checkpoints").glob("step-*.ckpt")
    step = int(saved.stem.split("-")[1])
    assert 0 < step < 150
    recipe.finetune(composed(tmp_path / "rest", *settings, "packing.num_workers=0", f"ckpt_path={saved}"))
    recipe.finetune(composed(tmp_path / "whole", *settings, "packing.num_workers=0"))
    whole, rest = (read_metrics(tmp_path / name / "metrics.csv", "train/loss") for name in ("whole", "rest"))
    assert rest[0] == list(range(step, 150))
    assert rest[1] == whole[1][step:], "bitwise"
    before = read_metrics(tmp_path / "killed" / "metrics.csv", "train/loss")
    assert before[1][:step] == whole[1][: len(before[1][:step])]


@pytest.mark.slow
def test_two_processes_share_rows(place, tmp_path):
    """The held-out losses of context parallelism are those of one process."""
    summaries = []
    for name, settings in {
        "one": [],
        "two": ["trainer.strategy=ddp", "trainer.devices=2", "trainer.context_parallel_size=2"],
    }.items():
        done = run(*small(place, *settings, f"hydra.run.dir={tmp_path}/{name}"))
        assert done.returncode == 0, done.stderr
        summaries.append(json.loads((tmp_path / name / "summary.json").read_text()))
    one, two = summaries
    assert two["steps"] == one["steps"] == 6
    assert two["loss_start"] == pytest.approx(one["loss_start"], rel=1e-5)
    assert two["loss_end"] == pytest.approx(one["loss_end"], rel=1e-3)
    assert two["loss_end"] < two["loss_start"]


def test_resuming_epochs_that_are_over(place, tmp_path):
    base = small(place, "trainer.max_steps=-1")
    recipe.finetune(composed(tmp_path / "two", *base, "trainer.max_epochs=2"))
    checkpoint = tmp_path / "two" / "checkpoints" / "last.ckpt"
    with pytest.raises(recipe.USER_ERRORS, match="max_epochs"):
        recipe.finetune(composed(tmp_path / "one", *base, "trainer.max_epochs=1", f"ckpt_path={checkpoint}"))


@pytest.mark.slow
def test_resumed_on_other_ranks_an_epoch_is_still_every_document_once(place, tmp_path):
    """One rank, from its fourth step on two, from their second step on one again."""
    few = ["packing.batch_size=1", "heldout.percent=0", "trainer.max_steps=-1", "trainer.max_epochs=1", "data.limit=58"]
    few += ["callbacks.checkpoint.every_n_train_steps=2", "callbacks.checkpoint.save_top_k=-1"]

    def read(name):
        """Documents of each step, and the steps of the schedule."""
        documents = read_metrics(tmp_path / name / "metrics.csv", "packing/documents")[1]
        return documents, OmegaConf.load(tmp_path / name / "config.yaml").steps.total

    def resumed(name, step):
        return f"ckpt_path={tmp_path / name / 'checkpoints' / f'step-{step}.ckpt'}"

    recipe.finetune(composed(tmp_path / "one", *small(place, *few)))
    one, total = read("one")
    assert (sum(one), len(one)) == (58, total)

    ddp = ["trainer.devices=2", "trainer.strategy=ddp", f"hydra.run.dir={tmp_path / 'two'}"]
    done = run(*small(place, *few, *ddp, resumed("one", 4)))
    assert done.returncode == 0, done.stderr
    two, total = read("two")
    assert sum(one[:4]) + sum(two) == 58
    assert 4 + len(two) == total
    for said in (done.stdout, (tmp_path / "two" / "finetune.log").read_text()):
        assert said.count("2 a step over 2 ranks: the last step of epoch 0 has 1 rows without tokens") == 1

    recipe.finetune(composed(tmp_path / "again", *small(place, *few, resumed("two", 6))))
    again, total = read("again")
    assert sum(one[:4]) + sum(two[:2]) + sum(again) == 58
    assert 6 + len(again) == total


class KilledError(Exception):
    pass


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_sharded_checkpoint_that_is_replaced_is_whole_wherever_a_kill_comes(tmp_path, monkeypatch, at):
    path = tmp_path / "last.ckpt"

    def write(self, checkpoint, filepath, storage_options=None):
        filepath.mkdir()
        (filepath / ".metadata").write_text(checkpoint)

    monkeypatch.setattr(ModelParallelStrategy, "save_checkpoint", write)
    monkeypatch.setattr(ModelParallelStrategy, "broadcast", lambda self, x: x)
    monkeypatch.setattr(ModelParallelStrategy, "barrier", lambda self: None)
    monkeypatch.setattr(ModelParallelStrategy, "is_global_zero", True)
    strategy = FullyShardedStrategy()
    write(strategy, "half", path.with_name(".last.ckpt.writing"))
    assert whole_copy(path) is None, "the first one, killed at any time"
    strategy.save_checkpoint("first", path)
    calls = []

    def counted(self, *arguments, real=Path.rename):
        calls.append(self)
        if len(calls) == at:
            raise KilledError
        return real(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", counted)
        if at < 3:
            with pytest.raises(KilledError):
                strategy.save_checkpoint("second", path)
        else:
            strategy.save_checkpoint("second", path)
    found = path if path.exists() else whole_copy(path)
    assert (found / ".metadata").read_text() == {1: "first", 2: "second", 3: "second"}[at]
    if not path.exists():
        with pytest.raises(SetupError, match=re.escape(f"a whole one is {found}")):
            check_checkpoint(str(path), -1)
    strategy.save_checkpoint("third", path)
    assert (path / ".metadata").read_text() == "third"
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]

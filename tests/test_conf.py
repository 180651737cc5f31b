"""Every file in conf/ composes, and what it describes can be made.

`logger/wandb` needs an extra that may not be installed; then its arguments are checked against the logger's signature.
"""

import functools
import importlib.util
import inspect
from pathlib import Path

import lightning as L
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import get_class, get_method, instantiate
from omegaconf import OmegaConf

from packflex.integrations.lightning import AtomicCheckpointIO, PackedDataModule, PackFlexCallback
from packflex.models import SetupError
from packflex.packing import plan_rows

ROOT = Path(__file__).resolve().parents[1]
CONF = ROOT / "conf"
FILES = sorted(str(path.relative_to(CONF).with_suffix("")) for path in CONF.rglob("*.yaml"))
# The models' own numbers of parameters.
PARAMETERS = {
    "smollm2_135m": 134_515_008,
    "qwen3_0_6b": 596_049_920,
    "gemma3_1b": 999_885_952,
    "llama32_1b": 1_235_814_400,
    "gemma2_2b": 2_614_341_888,
    "smollm3_3b": 3_075_098_624,
    "mistral_7b": 7_248_023_552,
    "olmo3_7b": 7_298_011_136,
    "gpt_oss_20b": 20_914_757_184,
}
NEEDS_PATH = {"data/jsonl", "data/packed", "data/stream", "data/hub", "data/chat", "experiment/chat_qwen3"}

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec"),
    pytest.mark.filterwarnings("ignore:.*Experiment logs directory"),
]


@pytest.fixture(autouse=True)
def recipes_on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))


def composed(tmp_path, *overrides, name="finetune"):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose(name, overrides=[f"paths.output_dir={tmp_path}", *overrides])
    assert not OmegaConf.missing_keys(config)
    return config


def check_data(config, name):
    load = instantiate(config.data)
    assert isinstance(load, functools.partial)
    if name == "packed":
        assert load.keywords == {"path": "somewhere", "verify": True}
        return
    tokenizer = {"tokenizer": None} if name == "stream" else {}
    inspect.signature(load.func).bind(**load.keywords, **tokenizer)
    assert load.keywords.get("kind", "text") == ("jsonl" if name == "stream" else name)
    tokenize = instantiate(config.tokenize)
    inspect.signature(tokenize.func).bind(None, None, **tokenize.keywords)


def check_model(config, name, tmp_path):
    inspect.signature(get_method(config.model._target_)).bind(
        **{key: value for key, value in config.model.items() if key not in ("_target_", "_convert_")}
    )
    if name == "hub":
        tiny = {"model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64}
        model = instantiate(config.model, path=None, architecture=tiny | {"num_hidden_layers": 1})
        model.save_pretrained(tmp_path / "model")
        assert instantiate(config.model, path=str(tmp_path / "model")).config.hidden_size == 32
        return
    if name == "tiny":
        config.model.architecture.vocab_size = config.tokenizer.vocab_size
    with torch.device("meta"):  # shapes without memory
        model = instantiate(config.model, init="random")
    count = model.num_parameters()
    assert count == PARAMETERS[name] if name in PARAMETERS else 5e6 < count < 10e6


def check_packing(config, name):
    assert name == config.packing.strategy
    plan = plan_rows([3, 4, 5], config.packing.seq_len, config.packing.strategy, overflow=config.packing.overflow)
    assert plan.num_documents == 3
    rows = [{"input_ids": [1, 2], "labels": [-100, 2], "lengths": [2]}]
    module = instantiate(config.datamodule)(rows)
    assert isinstance(module, PackedDataModule)
    assert next(iter(module.train_dataloader()))["input_ids"].shape == (1, config.packing.seq_len)


def check_optimizer(config, name):
    config.optimizer.lr = config.learning_rate.random
    config.steps.total, config.steps.warmup = 10, 2
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = instantiate(config.optimizer)([parameter])
    schedule = instantiate(config.scheduler)(optimizer)
    rates = []
    for _ in range(10):
        rates.append(schedule.get_last_lr()[0])
        parameter.grad = torch.ones(2)
        optimizer.step()
        schedule.step()
    assert rates[0] == 0
    assert max(rates) == pytest.approx(1.5e-3)


def check_callbacks(config, name):
    made = {key: instantiate(value) for key, value in config.callbacks.items() if value}
    assert isinstance(made["packflex"], PackFlexCallback)
    assert all(isinstance(callback, L.Callback) for callback in made.values())
    assert ("progress" in made) is (name != "quiet")
    assert ("profile" in made) is (name == "profile")


def check_logger(config, name):
    if name == "wandb" and importlib.util.find_spec("wandb") is None:
        options = {key: value for key, value in config.logger.wandb.items() if key != "_target_"}
        inspect.signature(get_class(config.logger.wandb._target_)).bind(**options)
        del config.logger.wandb
    made = [instantiate(logger) for logger in config.logger.values()]
    assert "CSVLogger" in {type(logger).__name__ for logger in made}


def check_trainer(config, name):
    config.trainer.accelerator, config.trainer.devices = "cpu", 1  # whatever this machine has
    from finetune import lightning_settings

    assert config.trainer.context_parallel_size == 1
    trainer = instantiate(lightning_settings(config.trainer))
    assert trainer.world_size == 1
    assert isinstance(trainer.strategy.checkpoint_io, AtomicCheckpointIO)
    strategies = {"ddp": "DDPStrategy", "fsdp": "FullyShardedStrategy"}
    assert type(trainer.strategy).__name__ == strategies.get(name, "SingleDeviceStrategy")


def check_experiment(config, name):
    written = OmegaConf.load(CONF / "experiment" / f"{name}.yaml")
    for group, values in written.items():
        if group != "defaults":
            for key, value in values.items():
                assert config[group][key] == value


def check_peft(config, name):
    made = instantiate(config.peft) if config.peft._target_ else None
    assert (made is None) is (name == "none")
    if made is not None:
        assert (made.r, made.target_modules, made.task_type) == (16, "all-linear", "CAUSAL_LM")


CHECKS = {
    "peft": check_peft,
    "data": check_data,
    "packing": check_packing,
    "attention": check_callbacks,
    "optimizer": check_optimizer,
    "scheduler": check_optimizer,
    "callbacks": check_callbacks,
    "logger": check_logger,
    "trainer": check_trainer,
    "experiment": check_experiment,
    "hydra/launcher": lambda config, name: None,  # tests/test_launchers.py
    "hydra": lambda config, name: None,
    "paths": lambda config, name: None,
}


def test_there_are_files():
    assert len(FILES) > 30


@pytest.mark.parametrize("file", FILES)
def test_file(file, tmp_path):
    group, _, name = file.rpartition("/")
    if not group:
        overrides = ["data.path=somewhere", "model.path=somewhere"] if name == "evaluate" else []
        config = composed(tmp_path, *overrides, name=name)
        check_data(config, {"evaluate": "jsonl", "pretrain": "text"}.get(name, "stdlib"))
        assert config.model.path == ("somewhere" if name == "evaluate" else None)
        return
    overrides = [] if group == "hydra" else [f"{group}={name}"]
    if file in NEEDS_PATH:
        overrides.append("data.path=somewhere")
    if group == "hydra/launcher":
        pytest.importorskip("submitit", reason="needs packflex[slurm]")
        overrides = [f"{group}={name}"]
    if file == "model/hub":
        overrides.append("model.path=somewhere")
    config = composed(tmp_path, *overrides)
    if group == "model":
        check_model(config, name, tmp_path)
    else:
        CHECKS[group](config, name)


def test_hydra_s_own_settings():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("finetune", return_hydra_config=True)
    assert config.hydra.job.chdir is False
    assert config.hydra.job_logging.formatters.plain.format == "%(message)s"
    assert config.hydra.job_logging.handlers.console.formatter == "plain"
    levels = {name: logger.level for name, logger in config.hydra.job_logging.loggers.items()}
    assert levels == {"packflex.data": "WARNING", "packflex.data.loader": "INFO"}, "fillers of the last step are told"


@pytest.mark.parametrize("name", ["finetune", "pretrain", "evaluate"])
def test_all_settings_that_are_true_or_false_are_checked(tmp_path, name):
    """By their defaults, among what is not of the model's own configuration or Hydra's."""
    from _booleans import check_booleans

    def booleans(node, path=()):
        for key, value in node.items():
            if isinstance(value, dict):
                yield from booleans(value, (*path, key))
            elif isinstance(value, bool) and not str(key).startswith("_"):
                yield ".".join((*path, key))

    config = composed(tmp_path, "data=jsonl", "data.path=x", "model.path=x", name=name)
    check_booleans(config)
    found = [n for n in booleans(OmegaConf.to_container(config)) if not n.startswith("model.architecture.")]
    assert {"debug", "tokenize.train_on_prompt", "model.gradient_checkpointing", "attention.leak_check"} <= {*found}
    for setting in found:
        config = composed(tmp_path, "data=jsonl", "data.path=x", "model.path=x", f"{setting}=no", name=name)
        with pytest.raises(SetupError, match=r"=no must be true or false$"):
            check_booleans(config)

"""Sweeps whose ranks something else than Lightning starts: torchrun, submitit, (a stand-in for) SLURM."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf

from packflex.models import SetupError
from packflex.report import read_metrics
from tests.parallel.scenarios import make_place

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "recipes"))

from _cluster import join_ranks  # noqa: E402
from _errors import one_line_of  # noqa: E402

STEPS = 3

needs_submitit = pytest.mark.skipif(find_spec("submitit") is None, reason="needs packflex[slurm]")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("launchers")
    make_place(place)
    return place


def launcher(*overrides):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("finetune", overrides=["hydra/launcher=slurm", *overrides], return_hydra_config=True)
    return config.hydra.launcher


def sweep(place, *settings, start=(sys.executable,), **environment):
    small = [
        "data=jsonl", f"data.path={place}/train.jsonl", f"model.path={place}/model", "callbacks=quiet",
        "packing.seq_len=64", "heldout.limit=4", "sample.max_new_tokens=4", f"trainer.max_steps={STEPS}",
        "trainer.log_every_n_steps=1", f"paths.cache_dir={place}/cache",
    ]  # fmt: skip
    command = [*start, str(ROOT / "recipes" / "finetune.py"), "-m", *small, *settings]
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=place, timeout=200,
        env={**os.environ, "PYTHONPATH": paths, **environment},
    )  # fmt: skip


def check_jobs(out, global_batch):
    """Each setting was run once, by all ranks together."""
    for job in ("0", "1"):
        assert OmegaConf.load(out / job / "config.yaml").seed == int(job)
        assert read_metrics(out / job / "metrics.csv", "train/loss")[0] == list(range(STEPS))
        assert json.loads((out / job / "summary.json").read_text())["steps"] == STEPS
        documents = read_metrics(out / job / "metrics.csv", "packing/documents")[1]
        # rows of 64 tokens hold three to five of these documents
        assert all(3 * global_batch <= count <= 5 * global_batch for count in documents)


def check_sharded_jobs(out):
    check_jobs(out, global_batch=2)
    for job in ("0", "1"):
        files = {file.name for file in (out / job / "checkpoints" / "last.ckpt").iterdir()}
        assert {"__0_0.distcp", "__1_0.distcp", ".metadata"} <= files, "both ranks wrote to one folder"


@needs_submitit
def test_slurm_is_asked_for_what_the_trainer_wants():
    asked = launcher("trainer=ddp", "trainer.devices=4", "trainer.num_nodes=2", "hydra.launcher.partition=gpu")
    assert (asked.nodes, asked.tasks_per_node, asked.gpus_per_node) == (2, 4, 4)
    assert asked.partition == "gpu"
    assert asked._target_.endswith("SlurmLauncher")


@needs_submitit
def test_devices_must_be_a_number_for_slurm():
    asked = launcher("trainer=ddp")
    with pytest.raises(Exception, match="could not be converted to Integer") as error:
        OmegaConf.to_container(asked, resolve=True)
    assert "must be a number then: trainer.devices=4" in one_line_of(error.value)


@needs_submitit
def test_evaluations_have_no_devices_to_ask_slurm_for():
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("evaluate", overrides=["hydra/launcher=slurm"], return_hydra_config=True)
    with pytest.raises(Exception, match="Interpolation key") as error:
        OmegaConf.to_container(config.hydra.launcher, resolve=True)
    assert one_line_of(error.value).endswith("use hydra/launcher=submitit_slurm")


def test_the_extra_is_named_where_it_is_missing():
    missing = ConfigCompositionException("Could not load 'hydra/launcher/submitit_slurm'.")
    assert one_line_of(missing).endswith("pip install packflex[slurm]")


def test_tasks_and_devices_must_agree(monkeypatch):
    monkeypatch.setenv("SUBMITIT_LOCAL_NTASKS", "2")
    config = OmegaConf.create({"trainer": {"devices": 1}})
    with pytest.raises(SetupError, match=r"tasks_per_node=2 starts a process for each device, and trainer\.devices=1"):
        join_ranks(config)


@pytest.mark.slow
def test_torchrun_s_ranks_share_each_job_and_its_folder(place, tmp_path):
    """Each rank names its folder in its own way here, as clocks do."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    settings = ["trainer=fsdp", "trainer.accelerator=cpu", "trainer.precision=32-true", "trainer.devices=2"]
    folder = f"hydra.sweep.dir={tmp_path}/${{oc.env:RANK}}"
    done = sweep(place, *settings, "trainer.max_epochs=null", "seed=0,1", folder, start=start)
    assert done.returncode == 0, done.stderr
    check_sharded_jobs(tmp_path / "0")
    assert not list((tmp_path / "1").rglob("*.distcp"))


@needs_submitit
@pytest.mark.slow
def test_two_local_tasks_are_the_ranks_of_each_job(place, tmp_path):
    ranks = ["hydra/launcher=submitit_local", "hydra.launcher.tasks_per_node=2", "trainer.devices=2"]
    inherited = {"MASTER_PORT": "30787"}  # as of a run in the process that starts the sweep
    done = sweep(place, *ranks, "trainer.strategy=ddp", "seed=0,1", f"hydra.sweep.dir={tmp_path}", **inherited)
    assert done.returncode == 0, done.stderr
    check_jobs(tmp_path, global_batch=2)


@needs_submitit
@pytest.mark.slow
def test_slurm_runs_each_job_once_over_its_tasks(place, tmp_path):
    path = f"{ROOT / 'tests' / 'slurm_stub'}{os.pathsep}{os.environ['PATH']}"
    settings = ["hydra/launcher=slurm", "trainer=fsdp", "trainer.accelerator=cpu", "trainer.precision=32-true"]
    limits = ["trainer.devices=2", "trainer.max_epochs=null", "seed=0,1", f"hydra.sweep.dir={tmp_path}"]
    done = sweep(place, *settings, *limits, PATH=path)
    assert done.returncode == 0, done.stderr
    check_sharded_jobs(tmp_path)


@needs_submitit
@pytest.mark.slow
def test_a_mistake_in_a_job_is_told_in_one_line(place, tmp_path):
    done = sweep(place, "hydra/launcher=submitit_local", "data.path=nowhere.jsonl", f"hydra.sweep.dir={tmp_path}")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(
        "finetune: error: a job of the sweep failed: nowhere.jsonl: no such file or folder"
    ), done.stderr
    here = sweep(place, "hydra/launcher=slurm", f"hydra.sweep.dir={tmp_path}", PATH="/usr/bin:/bin")
    assert here.returncode == 2
    assert here.stderr == (
        "finetune: error: hydra/launcher=slurm: there is no srun here; start the sweep on a machine that submits to "
        "SLURM\n"
    )


@needs_submitit
@pytest.mark.slow
def test_evaluations_are_swept_in_jobs_too(place, tmp_path):
    (place / "few.jsonl").write_text("".join((place / "train.jsonl").read_text().splitlines(keepends=True)[:4]))

    def evaluate(data, out):
        command = [
            sys.executable, str(ROOT / "recipes" / "evaluate.py"), "-m", "hydra/launcher=submitit_local",
            f"model.path={place}/model", f"data.path={data}", f"hydra.sweep.dir={out}",
        ]  # fmt: skip
        paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        return subprocess.run(
            command, capture_output=True, text=True, check=False, cwd=place, timeout=200,
            env={**os.environ, "PYTHONPATH": paths},
        )  # fmt: skip

    done = evaluate(f"{place}/train.jsonl,{place}/few.jsonl", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out" / "1" / "summary.json").read_text())["documents"] == 4
    wrong = evaluate("nowhere.jsonl", tmp_path / "wrong")
    assert wrong.returncode == 2
    assert wrong.stderr.splitlines()[-1].startswith(
        "evaluate: error: a job of the sweep failed: nowhere.jsonl: no such file or folder"
    ), wrong.stderr

"""Train a causal language model further on raw text; by default on modules of the standard library, on a CPU.

    python recipes/pretrain.py data.path=books/ model.path=./my-model trainer=gpu packing.seq_len=8192

The same run as `finetune.py` from another config, conf/pretrain.yaml: every token of a text is supervised.
"""

from __future__ import annotations

import finetune  # first: it sets what OpenMP reads when torch is loaded
import hydra
from omegaconf import DictConfig


@hydra.main(version_base="1.3", config_path="../conf", config_name="pretrain")
def run(config: DictConfig) -> None:
    """The run itself."""
    finetune.run_config(config)


if __name__ == "__main__":
    finetune.run_command(run)

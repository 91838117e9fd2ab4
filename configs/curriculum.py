"""The whole curriculum: foundation, reasoning, long tail.

    python launch.py --config=configs/curriculum.py

runs ``configs/stage1.py``, ``stage2.py`` and ``stage3.py`` one after the other, in folders of one
run: 8 min 48 s and 1.7 GiB on 2 cores of an AMD EPYC (jax 0.10.2, 2026-11-23), macro F1 on
ShopWorld's test split from 0.60 to 0.92 on seed 0 (three seeds: docs/results.md). What the stages
share is set once (``--config.seed=1``, ``--config.data.name=jsonl``), what is a stage's own by its
name (``--config.stages.stage2.rl.steps=20``).
"""

from typing import Any

from ml_collections import ConfigDict

from she_jax.recipes import stage3
from she_jax.recipes.stage2 import SHARED


def get_config(arg: str = "") -> ConfigDict:
    """The recipe; ``arg`` as in stage 1."""
    last = stage3.get_config(arg)
    config: Any = ConfigDict()
    config.kind = "curriculum"
    config.seed = last.get_ref("seed")
    for key in SHARED:
        config[key] = last.get_ref(key) if key == "cpu_devices" else last[key]
    second = last.prerequisite
    stages = {"stage1": second.prerequisite, "stage2": second, "stage3": last}
    config.stages = ConfigDict()
    for name, stage in stages.items():
        config.stages[name] = stage.unlock()
        stage.prerequisite = ConfigDict()
        stage.lock()
    return config.lock()

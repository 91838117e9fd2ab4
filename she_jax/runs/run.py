"""A run from the config to the figures: data, cold start, what follows it, judging all along.

The way to the loss: ``launch.py``, here, ``she_jax.runs.policy``, ``she_jax.rl.update``.
"""

import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict
from rich.console import Console

from she_jax.data.dataset import Prepared, open_split
from she_jax.data.loader import batches
from she_jax.models.weights import save_model
from she_jax.runs.validate import check, check_splits, fingerprint
from she_jax.filtering.measure import run_filter
from she_jax.runs.policy import Lessons, learn
from she_jax.training.logging import say
from she_jax.rollouts.offline import Imitation, Preferences
from she_jax.rollouts.online import Online, training_prompts
from she_jax.runs.policy_run import inherit
from she_jax.generate.generator import Judge, evaluate
from she_jax.rollouts.page import before_after_table, write_json
from she_jax.runs.process_reward import train_examiner
from she_jax.runs.outcome_reward import train_scalar
from she_jax.training.setup import ASKED, Policy, make_data, make_policy
from she_jax.training.sft import adopt, sft, sft_batch
from she_jax.training.stop import StopSignal
from she_jax.training.workdir import MADE, Config, claim_workdir, held
from she_jax.types import SftBatch

KINDS = ("train", "curriculum", "filter", "evaluate", "reward_model", "scalar_reward")


def run(config: Config, workdir: Path) -> None:
    """Does what the config says, or goes on where an earlier run of it stopped.

    Args:
      config: a recipe of ``configs/``.
      workdir: the run's folder.

    Raises:
      ValueError: for a config that cannot be run, or a folder of another one.
      SystemExit: when a signal asked to stop, after saving.
    """
    if config.kind not in KINDS:
        raise ValueError(f"kind={config.kind!r}: expected one of {KINDS}")
    if config.kind == "curriculum":
        run_curriculum(config, workdir)
        return
    if config.kind in ("reward_model", "scalar_reward", "filter"):
        config = inherit(config)
    if config.get("before") and config.start:
        make_start(config, workdir)
    check(config, workdir)
    claim_workdir(workdir, config)
    own = {
        "filter": run_filter,
        "evaluate": evaluate,
        "reward_model": train_examiner,
        "scalar_reward": train_scalar,
        "train": train,
    }
    with held(workdir):
        own[config.kind](config, workdir)


def train(config: Config, workdir: Path) -> None:
    """Trains a policy and judges it, as far as that is not done; prints before and after.

    Raises:
      SystemExit: when a signal asked to stop, after saving.
    """
    console = Console(highlight=False)
    summary = workdir / "summary.json"
    exported = not config.export or (workdir / "export" / ASKED).is_file()
    if not summary.is_file() or not exported:
        with StopSignal() as stop:
            made = make_data(config, workdir)
            policy = make_policy(config, workdir, made)
            check_splits(config, made)
            reference, lines = cold_start(config, workdir, policy, made, stop)
            make = partial(lessons, config, workdir, policy, reference, made, stop)
            figures, params = learn(config, workdir, policy, reference, lines, made, make, stop)
            if config.export:
                export(config, workdir / "export", policy, params)
            write_json(summary, figures)
        if stop:  # too late for this run, but not for one that would come after it
            raise SystemExit(stop.exit_code)
    else:
        console.print(f"all is done: the figures are in {summary}", soft_wrap=True)
    after = json.loads(summary.read_text(encoding="utf-8"))
    console.print(before_after_table(after["before"], after))


# -------------------------------------------------------------------------- stages


def run_curriculum(config: Config, workdir: Path) -> None:
    """The stages one after the other, each from the best policy of the one before.

    Each has a folder of its own, ``stage1`` and so on; a stage that is done is not done again.
    ``summary.json`` holds the figures of all.
    """
    for name, stage in config.stages.items():
        check(alone(stage), workdir / name)
        if not stage.rl.steps:
            raise ValueError(f"stages.{name}.rl.steps=0: expected at least 1, for the next stage")
    claim_workdir(workdir, config, made=(*MADE, *config.stages))
    with held(workdir):
        _run_stages(config, workdir)


def _run_stages(config: Config, workdir: Path) -> None:
    start, figures = "", {}
    for name, stage in config.stages.items():
        own: Config = ConfigDict(stage.to_dict() | {"start": start or stage.start, "before": {}})
        own.data.dir = own.data.dir or str(workdir / "data")
        say(f"{name}: {own.rl.steps} updates" + (f", from {start}" if start else ""))
        run(own.lock(), workdir / name)
        figures[name] = json.loads((workdir / name / "summary.json").read_text(encoding="utf-8"))
        start = str(workdir / name / "checkpoints" / "srpo")
    first, *_, last = figures.values()
    write_json(workdir / "summary.json", last | {"before": first["before"], "stages": figures})
    console = Console(highlight=False)
    console.print(before_after_table(first["before"], last))


def alone(stage: Config) -> Config:
    """A stage's config as if it began anew: to be checked before what it starts from is there."""
    own: Config = ConfigDict(stage.to_dict() | {"start": "", "before": {}})
    own.rl.missed = 0.0
    return own.lock()


def make_start(config: Config, workdir: Path) -> None:
    """Runs the stage before, or ends it, where what this one starts from is not there yet.

    A run that is there already is taken as it is, whatever its options; that they are other ones
    than those of ``config.before`` is said.
    """
    check(alone(config), workdir)
    folder = Path(config.start).absolute().parent.parent
    path = folder / "config.json"
    if path.is_file():
        then = json.loads(path.read_text(encoding="utf-8"))
        if then != json.loads(json.dumps(config.before.to_dict())):
            ended = (folder / "summary.json").is_file()
            told = "its options are not the recipe's" + ("" if ended else ", and it has not ended")
            say(f"start={config.start}: taken as it is, though {told}")
            return
    if (folder / "summary.json").is_file():
        return
    say(f"start={config.start} is not there yet: first the stage before, in {folder}")
    run(config.before, folder)


# -------------------------------------------------------------------------- the cold start


def cold_start(
    config: Config, workdir: Path, policy: Policy, made: Prepared, stop: StopSignal
) -> tuple[Any, int]:
    """Imitates the chains of the training split, or begins where another run ended.

    Returns:
      The parameters, and how many lines ``metrics.jsonl`` has by then.
    """
    if config.start:
        return adopt(config, workdir, policy), 0
    source = open_split(made.path, "train")
    data = batches(source, config.sft.batch_size, seed=config.seed, balance=config.data.balance)

    def batch_at(position: int) -> tuple[SftBatch, dict[str, int]]:
        examples: Any = data[position]
        return sft_batch(policy.format, examples, (config.seed, position))

    return sft(config, workdir, policy, batch_at, fingerprint(made), stop)


def lessons(
    config: Config,
    workdir: Path,
    policy: Policy,
    reference: Any,
    made: Prepared,
    stop: StopSignal,
    judge: Judge,
) -> Lessons:
    """What the policy learns from after its cold start, as ``method`` says."""
    source, rates = training_prompts(config, workdir, policy, reference, made, stop)
    if config.method == "online":
        return Online(config, workdir, policy, reference, source, rates, judge)
    offline = Imitation if config.method == "sft" else Preferences
    return offline(config, workdir, policy, reference, source, judge, stop)


def export(config: Config, folder: Path, policy: Policy, params: Any) -> None:
    """Writes a policy as a Hugging Face directory, with ``she_jax.json``: how it is asked."""
    own = policy.format
    before, between, behind = own.frame()
    lengths = {name: config.model[name] for name in ("prompt_length", "completion_length")}
    prompt = f"{before} {{query}}{between}\n{{field}}: {{text}}\n{{field}}: {{text}}{behind}"
    told = {"prompt": prompt, "model": lengths, "chain": config.chain.to_dict()}
    save_model(
        folder,
        policy.model.config,
        jax.device_get(params),
        own.tokenizer,
        eos_ids=own.eos_ids,
        pad_id=own.pad_id,
        chat_template=own.chat_template,
        specials=own.specials,
        overwrite=True,  # of a run that was stopped in between
    )
    write_json(folder / ASKED, told)

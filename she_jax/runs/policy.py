"""Trains a policy: data, cold start, what follows it, with evaluation before, during and after.

The way to the credit and the loss: ``she_jax.runs.launch``, here, ``she_jax.runs.sources``,
``she_jax.rollouts.collector``, ``she_jax.rollouts.credit``, ``she_jax.rl.losses``.
"""

import json
import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from she_jax.data.dataset import PreparedDataset, fingerprint, open_split
from she_jax.data.loader import batches
from she_jax.evaluation.chains import chains_file
from she_jax.evaluation.evaluate import (
    evaluate_policy,
    evaluate_validation,
    evaluation_fingerprint,
    evenly_spaced,
    validation_file,
)
from she_jax.evaluation.floor import labeled_floor
from she_jax.evaluation.pairs import common_fields
from she_jax.evaluation.report import before_after_table, below_floor
from she_jax.generate.generator import Generator
from she_jax.generate.language_model import PROMPT_FILE, LanguageModel
from she_jax.rl.update import jit_update_step, make_dpo_step, make_sft_step, make_update_step
from she_jax.runs.config import TrainConfig
from she_jax.runs.export import export
from she_jax.runs.load import new_policy
from she_jax.runs.plugins import record_dataset, recorded
from she_jax.runs.report import REPORT, write_report
from she_jax.runs.sources import make_source, try_rewards
from she_jax.runs.validate import check_front, check_splits
from she_jax.training.checkpoint import Checkpoints
from she_jax.training.files import write_json, write_text
from she_jax.training.logging import MetricsWriter, log, show
from she_jax.training.loop import Evaluation, fit
from she_jax.training.optimizer import make_optimizer
from she_jax.training.setup import prepare_dataset
from she_jax.training.sft import BatchSeries, adopt, new_state, sft, sft_batch
from she_jax.training.stop import StopSignal
from she_jax.training.workdir import read_recipe
from she_jax.types import SftBatch

FLOOR_PAIRS = 20_000  # of a split, at most, evenly spaced
TRIED = 64  # pairs that a user's rewards are tried on


def train(config: TrainConfig, workdir: Path) -> None:
    """Trains and evaluates a policy, as far as that is not done yet; prints before and after.

    Raises:
      SystemExit: after a signal, once the state is saved.
    """
    summary = workdir / "summary.json"
    exported = not config.export or (workdir / "export" / PROMPT_FILE).is_file()
    if not summary.is_file() or not exported:
        with StopSignal() as stop, MetricsWriter(workdir) as metrics:
            dataset = prepare_dataset(config.data)
            record_dataset(workdir, dataset.path)
            lm, params = new_policy(config, workdir, dataset)
            check_splits(dataset, config.evaluation.split)
            check_front(dataset, config.filter.front if config.measure.pairs else ())
            some = evenly_spaced(dataset, "train", TRIED)
            if rewards := try_rewards(config, some):
                log(rewards)
            reference = cold_start(config, workdir, lm, params, dataset, metrics, stop)
            results, params = improve(config, workdir, lm, reference, dataset, metrics, stop)
            results |= _pairs_of_users(config, dataset)
            if config.export:
                export(workdir / "export", lm, params, config.chain)
            write_json(summary, results)
            write_report(workdir)
        if stop:  # too late for this run, but not for one that would follow it
            raise SystemExit(stop.exit_code)
    else:
        log(f"all is done: the metrics are in {summary}")
        if not (workdir / REPORT).is_file():
            write_report(workdir)
    after = json.loads(summary.read_text(encoding="utf-8"))
    show(before_after_table(after["before"], after))
    if caveat := below_floor(after):
        log(caveat)
    _say_where_to_look(config, workdir)


def _say_where_to_look(config: TrainConfig, workdir: Path) -> None:
    """Where the results of a finished run are, and what can be done with its policy."""
    folder = shlex.quote(str(workdir))
    log(f"results: {workdir / 'summary.json'}; curves: {workdir / 'metrics.jsonl'}, tensorboard/")
    if (workdir / "samples").is_dir():
        log(f"rollouts to read, with the reward of each step: {workdir / 'samples'}")
    if config.schema.label_index >= 0:
        log(f"labels for other pairs: she-jax predict PAIRS.csv --checkpoint={folder}")
    if config.export:
        log(f"exported as a Hugging Face directory: {workdir / 'export'}")
    else:
        log(f"a Hugging Face directory: she-jax export --checkpoint={folder}")
    log(f"all of it on a page: {workdir / REPORT}")


def _pairs_of_users(config: TrainConfig, dataset: PreparedDataset) -> dict[str, Any]:
    """For real labels: the products' fields, and what a regression on word overlap has on test."""
    if config.data.name == "shopworld" or config.schema.label_index < 0:
        return {}
    train = evenly_spaced(dataset, "train", FLOOR_PAIRS)
    # Those that the policy is evaluated on.
    test = evenly_spaced(dataset, config.evaluation.split, config.evaluation.pairs or FLOOR_PAIRS)
    about: dict[str, Any] = {"fields": common_fields(train)}
    if baselines := labeled_floor(train, test, config.schema.labels):
        metrics = baselines["word_overlap"].metrics
        about["floor"] = {name: interval.estimate for name, interval in metrics.items()}
    return about


def cold_start(
    config: TrainConfig,
    workdir: Path,
    lm: LanguageModel,
    params: Any,
    dataset: PreparedDataset,
    metrics: MetricsWriter,
    stop: StopSignal,
) -> Any:
    """The parameters after imitating the chains of the training split, or those of another run."""
    folder = workdir / "checkpoints" / "sft"
    if config.init_from:
        return adopt(Path(config.init_from), folder, params, lm.mesh)
    split = open_split(dataset.path, "train")
    data = batches(split, config.sft.batch_size, seed=config.seed, balance=config.balance)

    def batch_at(step: int) -> tuple[SftBatch, dict[str, float]]:
        examples: Any = data[step]
        return sft_batch(lm.prompts, examples, (config.seed, step))

    source = BatchSeries(batch_at, title="cold start (SFT)", fingerprint=fingerprint(dataset))
    return sft(config.sft, lm, params, source, folder, metrics, stop)


def improve(
    config: TrainConfig,
    workdir: Path,
    lm: LanguageModel,
    reference: Any,
    dataset: PreparedDataset,
    metrics: MetricsWriter,
    stop: StopSignal,
) -> tuple[dict[str, Any], Any]:
    """What follows the cold start: ``rl.steps`` updates, with the best checkpoint kept.

    Args:
      reference: the cold start's parameters: where the policy starts, and what KL holds it to.

    Returns:
      The metrics for ``summary.json``, and the parameters that did best on the validation split.
    """
    online, evaluation = config.online, config.evaluation
    generator = Generator(lm, evaluation.batch_size, warn=log)
    _reuse_evaluation(config, workdir, dataset)
    evaluate = partial(evaluate_policy, generator, dataset, evaluation, workdir)
    validate = partial(evaluate_validation, generator, dataset, evaluation, workdir)
    before = evaluate(reference, "before")
    if not online.steps:
        validate(reference, 0)  # for runs that start here
        return before | {"before": before}, reference
    optimizer = make_optimizer(online.optimizer, online.steps)
    # A copy, since the update takes over its state and the reference must stay.
    state = new_state(jax.tree.map(jnp.copy, reference), lm.mesh, optimizer, config.seed + 1)
    source = make_source(config, workdir, lm, reference, dataset, generator, stop)
    checkpoints = Checkpoints(
        workdir / "checkpoints" / "policy", every=online.checkpoint_every, warn=log
    )
    update = jit_update_step(make_step(config, lm, optimizer), lm.mesh, state)
    metric = "macro_f1" if lm.prompts.schema.label_index >= 0 else "outcome"
    selection = Evaluation(
        function=validate,
        every=online.eval_every,
        patience=online.patience,
        metric=f"validation/{metric}",
    )
    state, host = fit(
        update,
        state,
        source,
        checkpoints,
        metrics,
        steps=online.steps,
        stop=stop,
        evaluate=selection,
    )
    if selection.exhausted(host["stale"]):
        log(f"no better evaluation for {host['stale']} in a row: training ends here (rl.patience)")
    step, params = checkpoints.restore_params(state.params) or (online.steps, state.params)
    after = evaluate(params, "after")
    about = {"checkpoint": step, "sampled_tokens": host["source"]["sampled_tokens"]}
    return after | about | {"before": before}, params


def make_step(
    config: TrainConfig, lm: LanguageModel, optimizer: optax.GradientTransformation
) -> Callable[..., Any]:
    """The update (state, batch) -> (state, metrics) of the config's method, not compiled."""
    forward, parts = lm.model.forward, config.loss.micro_batches
    if config.method == "sft":
        return make_sft_step(forward, optimizer, micro_batches=parts)
    if config.method == "dpo":
        return make_dpo_step(forward, optimizer, beta=config.offline.beta, micro_batches=parts)
    return make_update_step(forward, optimizer, config.loss)


def _reuse_evaluation(config: TrainConfig, workdir: Path, dataset: PreparedDataset) -> None:
    """Copies the evaluation of the run behind ``init_from`` to ``eval/before.json``.

    Only if that run was evaluated with the parameters that this one starts from, on the same pairs,
    and with the same seed, model, evaluation settings and outcome rewards.
    """
    folder = workdir / "eval"
    if not config.init_from or (folder / "before.json").is_file():
        return
    run, phase = Path(config.init_from).absolute().parent.parent, Path(config.init_from).name
    step = 0 if phase == "sft" else _best_step(workdir, run)
    metrics = run / "eval" / ("before.json" if phase == "sft" else "after.json")
    earlier, recipe = read_recipe(run), read_recipe(workdir)
    alike = all(earlier.get(key) == recipe[key] for key in ("seed", "eval", "model"))
    alike &= recorded(run, "reward.outcome") == recorded(workdir, "reward.outcome")
    if not alike or step is None or not metrics.is_file():
        return
    before = json.loads(metrics.read_text(encoding="utf-8"))
    if before.get("evaluated_on") != evaluation_fingerprint(dataset, config.evaluation):
        return
    validation = run / "eval" / validation_file(step)
    if validation.is_file():
        values = json.loads(validation.read_text(encoding="utf-8"))
        write_json(folder / validation_file(0), values)
    chains = run / "eval" / chains_file("before" if phase == "sft" else "after")
    if chains.is_file():
        write_text(folder / chains_file("before"), chains.read_text(encoding="utf-8"))
    write_json(folder / "before.json", before)


def _best_step(workdir: Path, run: Path) -> int | None:
    """The step that another run was evaluated with, if this run starts from it."""
    summary = run / "summary.json"
    if not summary.is_file():  # it is still being trained
        return None
    best = json.loads(summary.read_text(encoding="utf-8")).get("checkpoint")
    return best if best in Checkpoints(workdir / "checkpoints" / "sft").steps else None

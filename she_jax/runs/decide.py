"""Which rule turns a policy's chains into labels, fitted once on its run's validation pairs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from she_jax.cot import LabelSet
from she_jax.data.dataset import PreparedDataset
from she_jax.evaluation.confidence import fit_temperature, review_limit, tempered
from she_jax.evaluation.decide import (
    AUTO,
    RULES,
    DecideConfig,
    Decision,
    choose_rule,
    fit_threshold,
)
from she_jax.evaluation.evaluate import VALIDATION, evenly_spaced
from she_jax.evaluation.judge import Calibration, Evidence, LabelLogits, gather
from she_jax.generate.generator import Generator
from she_jax.generate.language_model import LanguageModel
from she_jax.generate.readout import make_label_logits
from she_jax.recipes import base
from she_jax.runs.config import data_config, inherit
from she_jax.runs.load import Source
from she_jax.training.checkpoint import params_digest
from she_jax.training.files import write_json
from she_jax.training.logging import Progress, log
from she_jax.training.setup import prepare_dataset
from she_jax.types import Example, UserError

TRUSTED = 0.95  # accuracy of the labels that nobody needs to look at
LEAST = 30  # validation pairs that have to show it
MOST = 2_000  # validation pairs that are judged, evenly spaced


def pairs_of_run(run: Path) -> PreparedDataset:
    """The data set that a policy's run was trained on.

    Raises:
      FileNotFoundError: if its files are gone, and what was prepared of them.
    """
    recipe: Any = ConfigDict(base.get_config().to_dict())
    recipe.checkpoint = str(run)
    return prepare_dataset(data_config(inherit(recipe), run), known=True)


class Decider:
    """Judges pairs with a policy; what it compiles serves all of them.

    Args:
      config: how chains become labels.
      lm: model and prompts.
      params: of the policy.
      batch_size: pairs at a time.

    Raises:
      UserError: if the rule needs votes, or labels without chains are asked of a policy that does
        not give its label first.
    """

    def __init__(self, config: DecideConfig, lm: LanguageModel, params: Any, batch_size: int):
        schema = lm.prompts.schema
        label_first = schema.label_index == 0
        if not label_first and not config.chains:
            raise UserError(
                "decide.chains=false: this policy writes its label last, so there is none without "
                "its chain; one that is trained with chain.label_first=true can do without"
            )
        if config.rule != "greedy" and not config.samples and not label_first:
            raise UserError(
                f"decide.rule={config.rule!r} decides by votes: give --config.decide.samples=8"
            )
        self.lm, self.config, self.labels = lm, config, schema.labels
        self._params, self._batch_size = params, batch_size
        self._generator = Generator(lm, batch_size, warn=log)
        self._logits = self._label_logits() if label_first and not config.samples else None

    def _label_logits(self) -> LabelLogits:
        devices = self.lm.mesh.shape["data"] * self.lm.mesh.shape["fsdp"]
        return make_label_logits(self.lm, -(-self._batch_size // devices) * devices, log)

    def gather(
        self, examples: list[Example], rule: str, seed: int, show: Callable[[int], None]
    ) -> Evidence:
        """What the policy writes of some pairs, as far as a rule needs it."""
        return gather(
            self._generator,
            self._params,
            examples,
            greedy=self._needs_greedy(rule),
            samples=self.config.samples,
            seed=seed,
            label_logits=self._logits,
            show=show,
        )

    def chains_a_pair(self, rule: str) -> int:
        """How many chains are written of a pair; 0 for one pass without a chain."""
        return self._needs_greedy(rule) + self.config.samples

    def _needs_greedy(self, rule: str) -> bool:
        return self.config.chains and (rule in ("greedy", AUTO) or not self.config.samples)

    def calibrate(self, source: Source) -> Calibration:
        """What was fitted on a run's validation pairs, or is fitted now, beside the checkpoint.

        Args:
          source: where the policy is from.

        Raises:
          UserError: if the rule is fitted and there are no labeled validation pairs.
        """
        if not self.config.samples and self._logits is None:
            return Calibration()
        if source.folder is None:
            if self.config.rule in ("cumulative", AUTO):
                raise UserError(
                    f"decide.rule={self.config.rule!r} is fitted on the validation pairs of a run, "
                    f"which {source} does not have: give the run's folder, or decide.rule=majority"
                )
            return Calibration(decision=Decision(rule=self.config.rule))
        run, phase = source.folder, source.phase
        path = run / "checkpoints" / phase / f"decide_{self.config.samples}.json"
        identity = {"policy": params_digest(self._params), "seed": self.config.seed}
        saved = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if saved.get("identity") != identity:
            try:
                saved = {"identity": identity, **self._fit(run)}
            except (FileNotFoundError, UserError) as error:
                if self.config.rule in ("cumulative", AUTO):
                    raise
                log(f"no temperature and nothing to review: {error}")
                return Calibration(decision=Decision(rule=self.config.rule))
            try:
                write_json(path, saved)
            except OSError as error:  # of others, or mounted to be read only
                log(f"{path} cannot be written, so each prediction fits anew: {error}")
        rule = saved["auto"] if self.config.rule == AUTO else self.config.rule
        decision = Decision(
            rule=rule, threshold=saved["threshold"] if rule == "cumulative" else None
        )
        return Calibration(
            decision=decision,
            temperature=saved["temperature"],
            review_below=saved["review_below"][rule],
            about=saved["about"],
        )

    def _fit(self, run: Path) -> dict[str, Any]:
        dataset = pairs_of_run(run)
        pairs = [e for e in evenly_spaced(dataset, VALIDATION, MOST) if e.label is not None]
        if not pairs:
            raise UserError(f"{run} has no validation pairs with a label to fit decide.rule on")
        with Progress("fitting on validation", total=len(pairs)) as progress:
            evidence = self.gather(pairs, AUTO, self.config.seed, progress.update)
        gold = np.array([self.labels.index(e.label) for e in pairs if e.label is not None], int)
        return fit(evidence, [pair.query for pair in pairs], gold, self.labels)


def fit(
    evidence: Evidence, queries: list[str], gold: np.ndarray, labels: LabelSet
) -> dict[str, Any]:
    """The threshold, the best rule, the temperature and the limits of review, as plain values.

    Args:
      evidence: what the policy wrote of the validation pairs.
      queries: of these pairs.
      gold: their class indices.
      labels: the label set.
    """
    shares, logits = evidence.shares(labels), evidence.log_probabilities(labels)
    greedy = evidence.greedy_labels(labels)
    assert shares is not None
    assert logits is not None
    assert greedy is not None
    threshold, _ = fit_threshold(shares, gold)
    auto, scores = choose_rule(queries, gold, greedy, shares, threshold)
    temperature = fit_temperature(logits, gold)
    honest = tempered(logits, temperature)
    limits = {}
    for rule in RULES:
        decision = Decision(rule=rule, threshold=threshold if rule == "cumulative" else None)
        given = decision.labels(greedy, shares)
        confidence = np.where(given < 0, 0.0, honest[np.arange(len(gold)), given])
        limits[rule] = min(review_limit(confidence, given == gold, TRUSTED, LEAST)[0], 2.0)
    mix = np.bincount(gold, minlength=len(labels.values)) / len(gold)
    return {
        "auto": auto.rule,
        "threshold": threshold,
        "temperature": temperature,
        "review_below": limits,
        "about": {
            "pairs": len(gold),
            "label_mix": dict(zip(labels.texts, mix.tolist(), strict=True)),
            "macro_f1": scores,
        },
    }

"""Training and using a judge from Python: ``she_jax.train``, ``she_jax.load_judge``."""

import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from she_jax.data.dataset import PreparedDataset, open_split, prepare
from she_jax.data.intake import repeated_uid
from she_jax.data.sources import make_builder
from she_jax.evaluation.decide import DecideConfig
from she_jax.evaluation.judge import Calibration, Judgment, judge
from she_jax.generate.language_model import UNLIMITED, LanguageModel
from she_jax.recipes import evaluate as evaluate_recipe
from she_jax.recipes import stage1
from she_jax.runs.config import parse
from she_jax.runs.decide import Decider
from she_jax.runs.load import Source, load_policy
from she_jax.runs.predict import caveats
from she_jax.runs.predictions import prediction
from she_jax.runs.resolve import columns_of
from she_jax.runs.run import run
from she_jax.training.files import write_text
from she_jax.training.logging import Progress, log
from she_jax.training.setup import split_mesh
from she_jax.training.workdir import ARTIFACTS
from she_jax.types import Example, UserError

UNREADABLE = {
    "uid": None,
    "label": None,
    "probabilities": None,
    "votes": None,
    "confidence": None,
    "expected": None,
    "review": None,
    "well_formed": False,
    "steps": [],
    "text": None,
    "truncated": False,
}
Pairs = Any  # an iterable of mappings, a pandas DataFrame, or the path of a table


class Judge:
    """A policy that judges query-product pairs.

    Attributes:
      folder: the run's folder, a Hugging Face directory or a .gguf file.
      metrics: of the run (``summary.json``); empty for other models.
    """

    def __init__(self, folder: str | os.PathLike):
        """Finds the judge; it is loaded when it first predicts.

        Raises:
          FileNotFoundError: if there is nothing at ``folder``.
        """
        self.folder = Path(folder)
        if not self.folder.exists():
            raise FileNotFoundError(f"{self.folder}: there is no run and no model")
        self._deciders: dict[tuple[int, str], tuple[Decider, Calibration]] = {}

    def __repr__(self) -> str:
        return f"Judge({str(self.folder)!r})"

    @property
    def metrics(self) -> dict[str, Any]:
        """The metrics that the run ended with."""
        summary = self.folder / "summary.json"
        return json.loads(summary.read_text(encoding="utf-8")) if summary.is_file() else {}

    def predict(
        self, pairs: Pairs, *, columns: str = "", samples: int = 0, rule: str = "greedy"
    ) -> list[dict[str, Any]]:
        """The judge's labels of pairs, with its reasons, in their order.

        Args:
          pairs: as for ``train``, without labels if there are none; for a table's path there is
            ``she-jax predict TABLE``.
          columns: as for ``train``.
          samples: chains of each pair that vote, which gives probabilities and a confidence; 0 for
            none.
          rule: how chains become one label: ``greedy``, ``majority``, ``cumulative`` or ``auto``;
            see ``she_jax.evaluation.decide``.

        Returns:
          For each pair what a line of ``predictions.jsonl`` has (``label`` is None if the judge
          wrote none), and ``error``: None, or why the pair cannot be read, with no ``uid``, no
          ``label`` and no ``steps``. A pair whose ``uid`` an earlier one has is said in ``error``,
          too, and has that one's label.
        """
        with tempfile.TemporaryDirectory() as name:
            folder, file = Path(name), Path(name) / "pairs.jsonl"
            count = _write_pairs(pairs, file)
            if not count:
                return []
            settings = {
                "checkpoint": str(self.folder),
                "data.name": "table",
                "data.path": str(file),
                "data.columns": columns_of(str(self.folder), str(file), "", columns),
                "data.max_bad_share": 1.0,
            }
            config: Any = parse(_recipe(evaluate_recipe.get_config(), settings), folder)
            decider, calibration = self._decider(samples, rule)
            builder = make_builder(config.data.for_chain(decider.lm.prompts.schema.options))
            try:
                dataset = prepare(builder)
            except UserError as error:
                message = str(error).replace(str(file), "the pairs")
                raise UserError(message.replace("--config.data.columns", "columns")) from error
            bad, examples = _bad_rows(dataset), []
            if dataset.splits:  # a pair that can be read
                source = open_split(dataset.path, "test")
                examples = [source[row] for row in range(len(source))]
            judged = self._judge(decider, calibration, examples) if examples else []
            schema = decider.lm.prompts.schema
            lines = [prediction(*pair, schema) for pair in zip(examples, judged, strict=True)]
            by_uid = {line["uid"]: line for line in lines}
            rest = iter(lines)
            return [
                by_uid.get(repeated_uid(bad[line]) or "", UNREADABLE) | {"error": bad[line]}
                if line in bad
                else next(rest) | {"error": None}
                for line in range(1, count + 1)
            ]

    def _judge(
        self, decider: Decider, calibration: Calibration, examples: list[Example]
    ) -> list[Judgment]:
        with Progress("judging", total=len(examples)) as bar:
            rule, seed = calibration.decision.rule, decider.config.seed
            evidence = decider.gather(examples, rule, seed, bar.update)
        return judge(evidence, calibration, decider.labels)

    @cached_property
    def _policy(self) -> tuple[LanguageModel, Any, Source, int]:
        recipe = _recipe(evaluate_recipe.get_config(), {"checkpoint": str(self.folder)})
        config: Any = parse(recipe, self.folder)
        lm, params, source = load_policy(config, str(self.folder), split_mesh(config.mesh, 0)[0])
        if UNLIMITED in (lm.prompts.prompt_length, lm.prompts.completion_length):
            raise UserError(
                f"{self.folder}: a model that no run of she_jax has trained or exported: train it "
                f"first, with she_jax.train(pairs, model={str(self.folder)!r})"
            )
        for caveat in caveats(source):
            log(caveat)
        return lm, params, source, config.evaluation.batch_size

    def _decider(self, samples: int, rule: str) -> tuple[Decider, Calibration]:
        if (samples, rule) not in self._deciders:
            lm, params, source, size = self._policy
            decider = Decider(DecideConfig(samples=samples, rule=rule), lm, params, size)
            self._deciders[samples, rule] = decider, decider.calibrate(source)
        return self._deciders[samples, rule]


def train(
    pairs: Pairs,
    *,
    workdir: str | os.PathLike = "runs/judge",
    model: str = "scratch",
    labels: str = "",
    columns: str = "",
    steps: int | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Judge:
    """Trains a judge on labeled pairs, as ``she-jax train TABLE`` does.

    The same call goes on with a run that was stopped, and returns one that is done.

    Args:
      pairs: mappings such as ``{"query": "red mug", "product": {"title": "Mug"}, "label": 3}``, a
        pandas DataFrame, or the path of a table.
      workdir: the run's folder.
      model: ``scratch``, ``smollm2``, or a model's path or name on the Hugging Face hub.
      labels: the label set, worst to best, such as ``0-3``; see ``LabelSet.parse``.
      columns: ``field=column,...`` where the columns have other names.
      steps: updates of the cold start; None for the recipe's.
      settings: other keys of the recipe with their values, such as ``{"rl.steps": 20}``.

    Returns:
      The trained judge.

    Raises:
      UserError: for pairs or settings that cannot be trained on.
    """
    folder = Path(workdir)
    given: dict[str, Any] = {"data.labels": labels, "data.columns": columns}
    given |= {} if steps is None else {"sft.steps": steps}
    recipe = stage1.get_config("data=table" + ("" if model == "scratch" else ",model=smollm2"))
    given |= {"model.name": model, "data.path": _stored(pairs, folder)}
    run(_recipe(recipe, given | dict(settings or {})), folder)
    return Judge(folder)


def load_judge(folder: str | os.PathLike) -> Judge:
    """The judge of a run's folder, a Hugging Face directory or a .gguf file."""
    return Judge(folder)


def _recipe(recipe: ConfigDict, settings: Mapping[str, Any]) -> ConfigDict:
    unlocked: Any = ConfigDict(recipe.to_dict())
    for key, value in settings.items():
        section, name = unlocked, key
        while "." in name and isinstance(section, ConfigDict):
            first, _, name = name.partition(".")
            section = section.get(first, {})
        if not isinstance(section, ConfigDict) or name not in section:
            raise UserError(f"settings: there is no key {key!r}; she_jax/recipes/base.py has all")
        try:
            section[name] = value.item() if hasattr(value, "item") else value
        except TypeError as error:
            kind = type(section[name]).__name__
            raise UserError(f"settings: {key}={value!r}: expected {kind}") from error
    return unlocked.lock()


def _stored(pairs: Pairs, folder: Path) -> str:
    """The path of the pairs: a table as it is, others in a file beside the run's folder."""
    if isinstance(pairs, str | os.PathLike):
        return str(pairs)
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.with_name(f"{folder.name}.pairs.jsonl")
    if not path.is_file() or not any((folder / name).exists() for name in ARTIFACTS):
        _write_pairs(pairs, path)
        return str(path)
    _write_pairs(pairs, part := path.with_name(f"{path.name}.part"))
    same = part.read_bytes() == path.read_bytes()
    part.unlink()
    if not same:
        raise UserError(f"{folder} holds a judge of other pairs: give a new folder, workdir=")
    return str(path)


def _write_pairs(pairs: Pairs, path: Path) -> int:
    """Writes pairs as JSON lines, and returns their number."""
    if isinstance(pairs, str | os.PathLike):
        raise UserError(f"{pairs}: expected pairs; a table is read by she-jax predict TABLE")
    lines = []
    for row in _rows(pairs):
        if not isinstance(row, Mapping):
            raise UserError(f"pair {len(lines) + 1}: {type(row).__name__}, expected a mapping")
        lines.append(json.dumps({k: _plain(v) for k, v in row.items()}) + "\n")
    write_text(path, "".join(lines))
    return len(lines)


def _rows(pairs: Any) -> Iterable[Any]:
    """The rows of a DataFrame of pandas or polars, or whatever is iterated."""
    if hasattr(pairs, "to_dicts"):
        return pairs.to_dicts()
    return pairs.to_dict("records") if hasattr(pairs, "iterrows") else pairs


def _plain(value: Any) -> Any:
    """A value as JSON has it; what JSON has no form for is its text, and pandas' NaT null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, str | int | float | None):
        return value
    return None if value != value else str(value)


def _bad_rows(dataset: PreparedDataset) -> dict[int, str]:
    with (dataset.path / "bad_rows.jsonl").open(encoding="utf-8") as file:
        return {row["line"]: row["reason"] for row in map(json.loads, file)}

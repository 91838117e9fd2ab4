"""A look at a user's pairs before anything is trained: what they are read as, what they allow."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich import box
from rich.table import Column, Table

from she_jax.cot import CotSchema
from she_jax.data.dataset import PreparedDataset, evenly_spaced_rows, open_split
from she_jax.data.rationales import write_chain
from she_jax.data.readers.judgments import Judgments
from she_jax.data.sources import TABLES, table_config
from she_jax.evaluation.evaluate import evenly_spaced
from she_jax.evaluation.floor import labeled_floor
from she_jax.evaluation.pairs import (
    contradictions,
    distinct_queries,
    languages,
    rater_agreement,
    spelled_share,
    telling_fields,
)
from she_jax.generate.language_model import LanguageModelConfig
from she_jax.generate.lengths import PERCENTILES, Sizes, choose_lengths, longer_prompts, measure
from she_jax.generate.prompts import PromptFormat, product_text, query_text
from she_jax.runs.config import TrainConfig
from she_jax.runs.policy import FLOOR_PAIRS, TRIED
from she_jax.runs.sources import try_rewards
from she_jax.runs.timing import log_minutes
from she_jax.runs.validate import check_splits
from she_jax.training.files import printable
from she_jax.training.logging import cell, log, show
from she_jax.training.setup import make_prompts, prepare_dataset, run_tokenizer
from she_jax.types import Example

SHOWN = 10  # rows as the model sees them
FEW = 500  # training pairs below which a regression is the better judge
RARE = 10  # pairs of a class in a split below which its F1 says little
MANY = 20_000  # training pairs from which a small model from scratch may learn real text
FLOOR = ("macro_f1", "good_macro_f1", "quadratic_kappa", "good_auc")


def check(config: TrainConfig, workdir: Path) -> None:
    """Prints what a training run would read, see and have to beat. Nothing is compiled or trained.

    The kind ``time`` also runs two updates, and says how long the run would take.

    Raises:
      UserError: if the pairs cannot be read, or a split is empty.
    """
    dataset = prepare_dataset(config.data)
    check_splits(dataset, config.evaluation.split)
    splits = {name: _examples(dataset, name) for name in dataset.splits}
    pairs = [example for examples in splits.values() for example in examples]
    if config.data.name in TABLES:
        _show_columns(Judgments(table_config(config.data)))
    if config.schema.label_index >= 0:
        _show_labels(config.schema, dataset)
    _show_pairs(config.schema, splits, pairs)
    tokenizer = None
    if config.model.name == "scratch":
        size = config.model.vocab_size
        tokenizer = run_tokenizer(workdir, dataset, size, config.init_from)
    prompts, context = make_prompts(config.model, config.schema, tokenizer)
    sizes = measure(prompts, splits["train"])
    chosen = choose_lengths(prompts, sizes, pretrained=tokenizer is None, context=context)
    lengths = config.model.prompt_length or chosen[0], config.model.completion_length or chosen[1]
    _show_lengths(prompts, sizes, lengths, splits["train"])
    if longer := longer_prompts(sizes, lengths[0], context):
        log(longer)
    _show_rows(prompts, lengths, splits["train"])
    if rewards := try_rewards(config, evenly_spaced(dataset, "train", TRIED)):
        log(rewards)
    if config.schema.label_index >= 0:
        _show_floor(config.schema, splits["train"], splits[config.evaluation.split])
        log(outlook(config.model, len(splits["train"]), config.data.name))
    if config.kind == "time":
        log_minutes(config, workdir, dataset)


def _examples(dataset: PreparedDataset, split: str) -> list[Example]:
    source = open_split(dataset.path, split)
    return [source[row] for row in evenly_spaced_rows(len(source), FLOOR_PAIRS)]


def _show_columns(judgments: Judgments) -> None:
    columns = judgments.columns
    read = {**columns.pair, **columns.judged}
    read |= {"raters": ", ".join(columns.raters)} if columns.raters else {}
    log("\ncolumns of the judgments: " + "; ".join(f"{k} from {v}" for k, v in read.items()))
    if columns.key:
        renamed = "; ".join(f"{field} from {name}" for name, field in columns.renamed.items())
        log(
            f"products, joined by {columns.key}: all other columns are fields"
            + (f"; {renamed}" if renamed else "")
        )
    if unread := judgments.unread():
        log(f"not read: {', '.join(unread)}")


def _show_labels(schema: CotSchema, dataset: PreparedDataset) -> None:
    labels, splits = schema.labels, list(dataset.splits)
    sources = {name: open_split(dataset.path, name) for name in splits}
    counts = {name: Counter(source.labels()) for name, source in sources.items()}
    queries = {name: distinct_queries(source.texts("query")) for name, source in sources.items()}
    table = _table("label, worst to best", *splits)
    for n, value in enumerate(labels.values):
        meaning = f"  {labels.meanings[n]}" if labels.meanings else ""
        good = "  (good)" if value in labels.good else ""
        figures = [f"{counts[name][value]:,}" for name in splits]
        table.add_row(cell(f"{value}{meaning}{good}"), *figures)
    if any(count[None] for count in counts.values()):
        table.add_row("none", *[f"{counts[name][None]:,}" for name in splits])
    table.add_row("pairs", *(f"{count:,}" for count in dataset.splits.values()))
    table.add_row("queries", *(f"{count:,}" for count in queries.values()))
    show(table)
    log("good: the labels that count as relevant, others with --config.data.good=LABEL,LABEL")
    for name in splits:
        rare = {v: n for v in labels.values if 0 < (n := counts[name][v]) < RARE}
        if name != "train" and rare:
            few = ", ".join(f"{n} of label {value}" for value, n in rare.items())
            log(
                f"few pairs in {name}: {few}; F1 of such a class is luck, and so is macro F1: look "
                "at good F1, or raise data.validation_share and data.test_share"
            )


def _show_pairs(
    schema: CotSchema, splits: Mapping[str, Sequence[Example]], pairs: Sequence[Example]
) -> None:
    if agreement := rater_agreement(pairs, schema.labels):
        log(
            f"raters: {agreement.pairs:,} pairs have two or more; two give the same label to "
            f"{agreement.same:.0%}, quadratic kappa {agreement.kappa:.2f}"
        )
    counts = languages(pairs).most_common()
    named = [(name, n / len(pairs)) for name, n in counts if n >= 0.005 * len(pairs)]
    words = {"unknown": "too few known words to tell"}
    shares = ", ".join(f"{words.get(name, name)} {share:.0%}" for name, share in named)
    log(f"languages, by script and known words: {shares}")
    if twice := contradictions(pairs):
        first, second = twice[0]
        log(
            f"pairs that repeat another one with a different label: {len(twice):,}, such as "
            f"{printable(first.uid)} ({first.label}) and {printable(second.uid)} ({second.label})"
        )
    held_out = [e for name in splits if name != "train" for e in splits[name]]
    labeled = [[e for e in part if e.label is not None] for part in (splits["train"], held_out)]
    for field, share, majority in telling_fields(*labeled):
        log(
            f"WARNING: the field {field!r} alone gives the label of {share:.0%} of the held-out "
            f"pairs (the commonest label: {majority:.0%}). If it was made from the labels, leave "
            "it out"
        )


def _show_lengths(
    prompts: PromptFormat, sizes: Sizes, lengths: tuple[int, int], train: Sequence[Example]
) -> None:
    table = _table("tokens", *(f"{p}%" for p in PERCENTILES[:-1]), "length", "longer")
    given = {"prompt": (sizes.prompts, lengths[0]), "completion": (sizes.chains, lengths[1])}
    for name, percentiles in sizes.percentiles().items():
        measured, length = given[name]
        longer = f"{np.mean(np.array(measured) > length):.1%}"
        table.add_row(name, *map(str, percentiles[:-1]), str(length), longer)
    show(table)
    texts = [query_text(e) + product_text(e) for e in train[:1000]]
    if (share := spelled_share(prompts, texts)) > 0.01:
        log(f"{share:.0%} of the tokens are parts of characters that the tokenizer does not know")


def _show_rows(prompts: PromptFormat, lengths: tuple[int, int], train: Sequence[Example]) -> None:
    given = {name for example in train for name in example.steps or {}}
    if unsaid := [
        step.name for step in prompts.schema.steps if step.optional and step.name not in given
    ]:
        columns = ", ".join(f"steps.{name}" for name in unsaid)
        log(f"steps that no pair says, and so no chain: {', '.join(unsaid)}; columns {columns} do")
    log(f"\n{SHOWN} rows as the model sees them (prompt | chain of the cold start):")
    rows = [train[row] for row in evenly_spaced_rows(len(train), SHOWN)]
    rng = np.random.default_rng(0)
    fitted = replace(prompts, prompt_length=lengths[0], completion_length=lengths[1])
    batch, _ = fitted.encode_prompts(rows)
    for example, ids, mask in zip(rows, batch.tokens, batch.mask, strict=True):
        pieces = [prompts.token_bytes[index] for index in np.asarray(ids)[np.asarray(mask)]]
        text = b"".join(pieces).decode(errors="replace")
        try:
            chain = write_chain(example, prompts.schema, rng)
        except ValueError as error:
            chain = f"no chain: {error}"
        log(f"--- {printable(example.uid)}\n{text.strip()}\n| " + chain.replace("\n", "\n| "))


def _show_floor(schema: CotSchema, train: Sequence[Example], test: Sequence[Example]) -> None:
    baselines = labeled_floor(train, test, schema.labels)
    if baselines is None:
        return
    names = [name.replace("_", " ") for name in FLOOR]
    table = _table("the floor, by query", *names)
    for name, baseline in baselines.items():
        table.add_row(
            name.replace("_", " "), *(cell(str(baseline.metrics[metric])) for metric in FLOOR)
        )
    log("\nwhat a judge has to beat, fitted on train and scored on the same test pairs:")
    show(table)


def outlook(model: LanguageModelConfig, pairs: int, data: str) -> str:
    """An honest word on what can be hoped for."""
    if data == "shopworld":
        return "outlook: the recipe is sized for these procedural pairs; see docs/results.md"
    words = []
    if pairs < FEW:
        words.append(
            f"{pairs:,} training pairs are few: expect no more than the word-overlap regression "
            "above; more labels help more than any setting"
        )
    if model.name == "scratch" and pairs < MANY:
        words.append(
            f"the recipe's model is sized for ShopWorld and starts from nothing: on {pairs:,} real "
            "pairs it learns little of the language. Take a pretrained one, such as "
            "--config.model.name=smollm2"
        )
    words.append("no run of this project on real labels has beaten the floor yet: docs/results.md")
    return "outlook: " + "; ".join(words)


def _table(*columns: str) -> Table:
    first, *rest = columns
    headings = [Column(cell(name), justify="right") for name in rest]
    return Table(Column(cell(first)), *headings, box=box.SIMPLE, padding=(0, 1, 0, 0))

"""Which labels a user's table has: found where there is one reading, else asked with the choices.

A file graded 1 to 3 is not the lower three of four, and one graded 0 to 3 has no wrong zeros. So a
set is taken unasked only if the file holds exactly its values.
"""

import re
from collections import Counter

from she_jax.cot import BINARY_MEANINGS, LABEL_STEP, CotSchema
from she_jax.data.readers.judgments import Judgments
from she_jax.data.sources import DataConfig, table_config
from she_jax.types import BadRow, UserError

BINARY = (("0", "1"), ("false", "true"), ("no", "yes"), ("irrelevant", "relevant"))
_WORDS_ENOUGH = BINARY[-1]  # these say what they mean
_ESCI = ("I", "C", "S", "E")
_RANGES = ((0, 2), (0, 3), (0, 4), (0, 10), (1, 2), (1, 3), (1, 4), (1, 5), (1, 10))
_GRADES = 21  # more distinct values than that are no grades
_OPTION = "--config.data.labels="


def resolve_labels(config: DataConfig, text: str) -> str:
    """The label set of a user's tables, for ``LabelSet.parse``.

    Args:
      config: names the tables.
      text: what the recipe says: "" (found if the file holds exactly 1-4, or E, S, C, I), or
        ``binary``, which becomes the file's spelling.

    Raises:
      UserError: if no row has a label, or the values do not say which set they are of. The message
        has the counts and the choices.
    """
    schema = CotSchema.build(**config.chain)
    if LABEL_STEP not in schema.names:
        return "1-4"
    judgments = Judgments(table_config(config))
    counts, rationales = _count_labels(judgments)
    if not counts and rationales:
        return text or "1-4"  # the chains have the labels
    if not counts:
        columns = [judgments.columns.pair.get("label", ""), *judgments.columns.raters]
        raise UserError(
            f"{config.path}: no row has a label: nothing can be read in the columns "
            f"{', '.join(filter(None, columns))}"
        )
    try:
        return _binary(counts) if text else _found(counts)
    except ValueError as error:
        raise UserError(f"{config.path}: {error}") from error


def _count_labels(judgments: Judgments) -> tuple[Counter[str], bool]:
    """How often each label occurs, and whether there are rationales."""
    counts, rationales = Counter[str](), False
    for record in judgments.records():
        if isinstance(record, BadRow):
            continue
        cells = judgments.pair(record)
        rationales |= "rationale" in cells
        given = [cells["label"]] if "label" in cells else judgments.rater_texts(record)
        counts.update(map(_whole, given))
    return counts, rationales


def _whole(text: str) -> str:
    """A label without the fraction that pandas gives whole numbers where some are missing."""
    return text.partition(".")[0] if re.fullmatch(r"-?\d+\.0+", text, re.ASCII) else text


def _found(counts: Counter[str]) -> str:
    if counts.keys() == {"1", "2", "3", "4"}:
        return "1-4"
    if counts.keys() == set(_ESCI):
        return "esci"
    if len(counts) > _GRADES:
        raise ValueError(
            f"{len(counts):,} different labels, {_shown(counts)}, ...: are these grades? Another "
            "column is named with --config.data.columns=label=COLUMN; scores need to be rounded"
        )
    choices = "\n  ".join(f"{_OPTION}{choice}" for choice in label_choices(list(counts)))
    raise ValueError(
        f"the labels are {_shown(counts)}. Which set are they of? Its values stand from worst to "
        f"best (5-1: 1 is the best), those that do not occur included:\n  {choices}\n"
        "or a file with a line 'value: meaning' for each"
    )


def _shown(counts: Counter[str]) -> str:
    ordered = sorted(counts, key=float) if all(map(_is_number, counts)) else list(counts)
    return ", ".join(f"{text[:40]} ({counts[text]:,})" for text in ordered[:12])


def _is_number(text: str) -> bool:
    return bool(re.fullmatch(r"-?\d*\.?\d+", text, re.ASCII))


def label_choices(texts: list[str]) -> list[str]:
    """Values of ``data.labels`` that some labels may be of, the likely ones first, for a shell."""
    lower = {text.lower() for text in texts}
    choices = ["esci"] if {text.upper() for text in texts} <= set(_ESCI) else []
    choices += ["binary"] if any(lower <= set(pair) for pair in BINARY) else []
    if all(re.fullmatch(r"\d+", text, re.ASCII) for text in texts):
        low, high = min(map(int, texts)), max(map(int, texts))
        ranges = {(low, high), *_RANGES} if high > low else _RANGES
        fitting = [pair for pair in ranges if pair[0] <= low and high <= pair[1]]
        fitting.sort(key=lambda pair: (pair[1] - pair[0], -pair[0]))
        choices += [f"{first}-{last}" for first, last in fitting[:4]]
    elif all(map(_is_number, texts)):
        choices.append(",".join(sorted(texts, key=float)))
    elif not choices:
        choices.append(",".join(texts))
    return [choice if re.fullmatch(r"[\w.,-]+", choice) else f"'{choice}'" for choice in choices]


def _binary(counts: Counter[str]) -> str:
    """The two labels as the file spells them, with their meanings where they need some."""
    spelled = {text.lower(): text for text in counts}
    pair = next((pair for pair in BINARY if spelled.keys() <= set(pair)), None)
    if pair is None or len(spelled) < len(counts):
        expected = ", ".join("/".join(pair) for pair in BINARY)
        raise ValueError(
            f"data.labels=binary, but the labels are {_shown(counts)}; expected {expected}"
        )
    if pair == BINARY[0]:
        return "binary"
    known = next(iter(counts))  # where one of them does not occur, it is spelled like the other
    style = next(s for s in (str.lower, str.upper, str.capitalize) if s(known) == known)
    values = [spelled.get(value, style(value)) for value in pair]
    if pair == _WORDS_ENOUGH:
        return ",".join(values)
    return "\n".join(f"{v}: {m}" for v, m in zip(values, BINARY_MEANINGS, strict=True))

"""Which columns of a user's tables are read, and as what: ``data.columns``."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from she_jax.data.readers.records import PRODUCT
from she_jax.types import UserError

# What a pair has besides its product: a column of this name is read as that.
FIELDS = ("query", "qid", "docid", "uid", "label", "raters", "kind", "split", "rationale", "steps")
RANKED = ("system", "rank")  # which ranking system has shown the product, and where
STEP = "steps."  # how the columns of annotated steps begin
_OTHER_NAMES = {"label": ("rating",)}  # Quepid's export


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The columns of two tables, by what they are read as.

    Attributes:
      pair: of the judgments: a field of ``FIELDS`` or ``steps.NAME`` to its column.
      raters: of the judgments: the columns with the labels of single raters.
      judged: of the judgments: a product field to its column.
      key: of the products: the column that ``docid`` of a judgment finds; "" without such a table.
      renamed: of the products: a column to the field that it becomes, where the names differ.
      ranked: of the judgments: the columns of ``RANKED``; empty unless there are both.
    """

    pair: Mapping[str, str]
    raters: tuple[str, ...]
    judged: Mapping[str, str]
    key: str = ""
    renamed: Mapping[str, str]
    ranked: tuple[str, ...] = ()

    @property
    def read(self) -> set[str]:
        """The columns of the judgments that are read."""
        return {*self.pair.values(), *self.raters, *self.judged.values(), *self.ranked}


def parse_columns(text: str) -> dict[str, str]:
    """The mapping ``field=column,field=column`` of a recipe.

    Raises:
      UserError: if a part is not of this form, or a field is named twice.
    """
    mapping: dict[str, str] = {}
    for part in filter(str.strip, text.split(",")):
        field, equals, column = (piece.strip() for piece in part.partition("="))
        if not (field and equals and column) or field in mapping:
            raise UserError(
                f"data.columns: {part.strip()!r}: expected field=column for each field once, with "
                "commas between them, such as label=rating,title=name"
            )
        mapping[field] = column
    return mapping


def find_columns(
    text: str, judgments: tuple[str, Sequence[str]], products: tuple[str, Sequence[str]] | None
) -> Columns:
    """Finds what a recipe names, and what bears a field's name, in the tables.

    A field that ``FIELDS`` lacks belongs to the product. It is looked for in the products' table,
    if there is one, then among the judgments. ``docid=a+b`` reads the column of either name, and
    ``raters=a+b`` reads both.

    Args:
      text: ``data.columns``.
      judgments: path and columns of the judgments' table.
      products: the same of the products' table, if there is one.

    Raises:
      UserError: if there is no such column; names the nearest one and all.
    """
    mapping, columns = parse_columns(text), judgments[1]
    docid = [name.strip() for name in mapping.pop("docid", "").split("+") if name.strip()]
    for column in docid:
        if not (products and column in products[1]):
            _existing("docid", column, judgments)
    docid.append("docid")
    raters = mapping.pop("raters", "raters" if "raters" in columns else "")
    ranked = [
        _existing(name, mapping.pop(name), judgments) if name in mapping else name
        for name in RANKED
    ]
    pair = {field: field for field in FIELDS if field in columns and field != "raters"}
    pair |= {name: name for name in columns if name.startswith(STEP)}
    pair |= {
        field: name
        for field, names in _OTHER_NAMES.items()
        for name in names
        if name in columns and not {field, name} & {*pair, *mapping, *mapping.values()}
    }
    judged = {name[len(PRODUCT) :]: name for name in columns if name.startswith(PRODUCT)}
    judged |= {"title": "title"} if "title" in columns else {}
    renamed = {}
    for field, column in mapping.items():
        if field in FIELDS or field.startswith(STEP):
            pair[field] = _existing(field, column, judgments)
        elif products and column in products[1]:
            renamed[column] = field
        elif f"{PRODUCT}{column}" in columns:
            judged = {k: v for k, v in judged.items() if k != column}
            judged[field] = f"{PRODUCT}{column}"
        else:
            where = judgments if not products or column in columns else products
            judged[field] = _existing(field, column, where)
    if present := [name for name in docid if name in columns]:
        pair["docid"] = present[0]
    return Columns(
        pair=pair,
        raters=tuple(_existing("raters", n, judgments) for n in raters.split("+") if n),
        judged=judged,
        key=_key(docid, pair, judgments, products) if products else "",
        renamed={column: field for column, field in renamed.items() if column != field},
        ranked=tuple(ranked) if {*ranked} <= {*columns} else (),
    )


def _key(
    names: Sequence[str],
    pair: Mapping[str, str],
    judgments: tuple[str, Sequence[str]],
    products: tuple[str, Sequence[str]],
) -> str:
    """The column of the products that the judgments' docid is looked up in."""
    if "docid" not in pair:
        _existing("docid", names[0], judgments)
    key = next((name for name in names if name in products[1]), "")
    return key or _existing("docid", names[0], products)


def _existing(field: str, column: str, table: tuple[str, Sequence[str]]) -> str:
    """A column of a table.

    Raises:
      UserError: if the table does not have it.
    """
    path, columns = table
    column = column.strip()
    if column in columns:
        return column
    near = difflib.get_close_matches(column, columns, n=1)
    nearest = f"; the nearest is {near[0]!r}" if near else ""
    raise UserError(
        f"{path} has no column {column!r} for {field}{nearest}; it has {', '.join(columns)}. Say "
        f"which one it is: --config.data.columns={field}=COLUMN"
    )


def need_columns(
    fields: Sequence[str],
    text: str,
    judgments: tuple[str, Sequence[str]],
    products: tuple[str, Sequence[str]] | None = None,
    of_products: Sequence[str] = (),
) -> None:
    """Checks that fields have a column: one of their name, or one that a recipe names.

    Args:
      fields: those that the judgments need.
      text: ``data.columns``.
      judgments: path and columns of the judgments' table.
      products: the same of the products' table, if there is one.
      of_products: the fields that it needs; a title may stand with the judgments.

    Raises:
      UserError: if some have none; names them all, and the option for them.
    """
    mapping = parse_columns(text)
    tables = [table for table in (judgments, products) if table]
    names = {name for _, columns in tables for name in columns}
    for field, column in mapping.items():
        if field in names and column in (*FIELDS, "title") and column not in names:
            raise UserError(
                f"data.columns: {field}={column}: expected FIELD=COLUMN, and there is no column "
                f"{column!r}, but {field!r}; is {column}={field} meant?"
            )
    titles = {"title"} & {n.removeprefix(PRODUCT) for n in judgments[1]}
    free = {*judgments[1]} - {*mapping.values()}
    others = {field for field, names in _OTHER_NAMES.items() if {*names} & free}
    missing: dict[str, str] = {}
    where = []
    for (path, columns), wanted in zip(tables, (fields, of_products), strict=False):
        known = {*columns, *mapping, *titles, *(others if columns is judgments[1] else ())}
        if lacking := [field for field in wanted if field not in known]:
            missing |= {f: "COLUMN+COLUMN" if f in missing else "COLUMN" for f in lacking}
            where.append(f"{path} has no column {', '.join(lacking)}, only {', '.join(columns)}")
    if missing:
        named = [*filter(None, [text]), *(f"{field}={name}" for field, name in missing.items())]
        both = "; docid has one in each table" if "+" in missing.get("docid", "") else ""
        raise UserError(
            f"{'; '.join(where)}. Say which one is meant: --config.data.columns={','.join(named)}"
            f"{both}"
        )


def columns_there(text: str, *tables: Sequence[str], but: str = "") -> str:
    """The part of ``data.columns`` whose columns some tables have.

    Args:
      text: of another table with like columns.
      tables: the names of each table's columns.
      but: what is said of these tables: its fields are left out.
    """
    said = parse_columns(but)
    there = {name for columns in tables for name in columns}
    there |= {name.removeprefix(PRODUCT) for name in there}
    kept = []
    for field, column in parse_columns(text).items():
        names = [name.strip() for name in column.split("+")]
        found = [name for name in names if name in there]
        if field not in said and (found == names or (found and field == "docid")):
            kept.append(f"{field}={'+'.join(found)}")
    return ",".join(kept)

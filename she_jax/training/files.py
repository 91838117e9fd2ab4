"""Files written whole or not at all, and text made safe to show."""

import json
import math
import os
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LONGEST = 600  # characters of a text shown on a page


# Unicode categories of invisible characters: controls, formats (bidirectional, zero-width),
# surrogates, private, unassigned, line and paragraph separators.
UNSEEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a file atomically: after a kill, the file is the old one or the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.part")
    with partial.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def write_json(path: str | os.PathLike, obj: Any) -> None:
    """Writes a JSON file atomically. Arrays become lists; NaN and infinities become null."""
    write_text(path, json.dumps(_to_json(obj), indent=2, allow_nan=False) + "\n")


def read_json_lines(path: Path) -> list[Any]:
    """The values in a file with one on each line; none if there is no such file."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def printable(text: str, longest: int = LONGEST) -> str:
    """The text on one line, with invisible characters escaped, cut to ``longest`` characters."""
    line = without_unseen(text[:longest])
    return line if len(text) <= longest else f"{line} ... ({len(text)} characters)"


def without_unseen(text: str) -> str:
    """The text with its invisible characters, line ends included, as escapes such as ``\\x1b``."""
    if text.isprintable():  # nearly all are, and this is some hundred times as fast
        return text
    return "".join(
        c.encode("unicode_escape").decode() if unicodedata.category(c) in UNSEEN else c
        for c in text
    )


def _to_json(obj: Any) -> Any:
    if isinstance(obj, Mapping):
        return {str(key): _to_json(value) for key, value in obj.items()}
    if isinstance(obj, (list, tuple)):
        return [_to_json(value) for value in obj]
    if hasattr(obj, "tolist"):
        return _to_json(obj.tolist())
    return None if isinstance(obj, float) and not math.isfinite(obj) else obj

"""Which classes or kinds of a filter report are shown if there are too many."""

from collections import Counter
from typing import Any


def largest_cells(cells: dict[str, dict[str, Any]], count: int) -> dict[str, dict[str, Any]]:
    """The ``count`` cells with the most pairs, in the given order."""
    sizes = Counter({name: cell["kept"] + cell["dropped"] for name, cell in cells.items()})
    names = {name for name, _ in sizes.most_common(count)}
    return {name: cell for name, cell in cells.items() if name in names}

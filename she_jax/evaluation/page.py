"""Self-contained HTML pages: no scripts, nothing from the network, every text escaped.

A page extends ``page.html.jinja``. jinja2 escapes every value, after control, bidirectional and
other invisible characters became visible.
"""

import base64
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from she_jax.training.files import printable

LONGEST = 1500  # characters of a text shown on a page
BEFORE, AFTER, OTHER, RANGE = "#c3c9d0", "#1f5f9e", "#b4602a", "#eef3e6"  # of all plots
_STYLE = {
    "svg.hashsalt": "she_jax",  # the same plot has the same bytes
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "figure.titlesize": 11,
    "figure.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#777777",
    "axes.axisbelow": True,
    "legend.frameon": False,
}


def render(template: Path, **values: Any) -> str:
    """A page as HTML.

    Args:
      template: a jinja2 template that extends ``page.html.jinja``.
      **values: what it shows.
    """
    environment = Environment(
        loader=FileSystemLoader([template.parent, Path(__file__).parent]),
        autoescape=True,
        finalize=visible,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template.name).render(**values)


def visible(value: Any) -> Any:
    """What a ``{{ }}`` writes: text with its invisible characters escaped, and cut."""
    return printable(value, LONGEST) if type(value) is str else value


def data_uri(svg: bytes) -> Markup:
    """A plot as an inline image."""
    return Markup("data:image/svg+xml;base64,") + base64.b64encode(svg).decode("ascii")


@contextmanager
def plot_style() -> Iterator[None]:
    """The style of all plots, whatever the user's matplotlib settings."""
    from matplotlib import style  # slow, so not at every start

    with style.context(["default", _STYLE]):
        yield


def new_figure(title: str, height: float) -> Any:
    """An empty matplotlib figure with a title at its left, in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, height))
    figure.suptitle(title, x=0.01, horizontalalignment="left")
    return figure


def svg_of(figure: Any) -> bytes:
    """A figure as SVG; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()

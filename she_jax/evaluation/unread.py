"""What a policy wrote that is no chain: how much of it, why, and an example to look at."""

from she_jax.cot import Chain
from she_jax.training.files import printable

SHOWN = 120  # characters of the example


class Unread:
    """Counts the completions that cannot be read as a chain.

    Args:
      completion_length: tokens that a completion may have, for the sentence.
    """

    def __init__(self, completion_length: int):
        self._length = completion_length
        self._total = self._count = self._cut = self._unlabeled = 0
        self._example = ""

    def add(self, chain: Chain, text: str, truncated: bool) -> None:
        """Counts a completion.

        Args:
          chain: as parsed.
          text: as written.
          truncated: whether it reached the token limit before its end.
        """
        self._total += 1
        if chain.well_formed:
            return
        self._example = self._example if self._count else text
        self._count += 1
        self._cut += truncated
        self._unlabeled += chain.label is None

    @property
    def share(self) -> float:
        """Share of the completions, in [0, 1]."""
        return self._count / max(self._total, 1)

    def sentence(self, measured: bool = True) -> str:
        """What could not be read, for the screen.

        Args:
          measured: whether there are metrics, whose 0 may have its cause here.
        """
        count = "none" if self._count == self._total else f"{self._total - self._count:,}"
        cause = f"{self._cut:,} ran out of tokens (model.completion_length={self._length})"
        is_zero = measured and self._unlabeled == self._total
        zero = ", which is why all metrics are 0" if is_zero else ""
        return (
            f"{count} of {self._total:,} completions can be read as a whole chain, and "
            f"{self._total - self._unlabeled:,} have a label{zero}; {cause}. The first that "
            f'could not be read: "{printable(self._example, SHOWN)}"'
        )

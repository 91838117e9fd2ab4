"""Stage 1: a cold start on a fallible teacher's chains, then SRPO on human annotation."""

from ml_collections import ConfigDict

from configs import base


def get_config(arg: str = "") -> ConfigDict:
    """The recipe; ``arg`` is ``model=scratch|smollm2,data=shopworld|esci|wands|jsonl``."""
    return base.get_config()

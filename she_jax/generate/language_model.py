"""A language model with its prompts and devices."""

from dataclasses import dataclass
from typing import Any

from jax.sharding import Mesh

from she_jax.generate.prompts import PromptFormat
from she_jax.models.decoder import Model


@dataclass(frozen=True, kw_only=True)
class Policy:
    """A language model with all it takes to ask it: parameters, prompts, devices."""

    model: Model
    params: Any
    format: PromptFormat
    mesh: Mesh

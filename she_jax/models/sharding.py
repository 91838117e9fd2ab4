"""Device meshes, and the sharding of parameters and batches on them.

Three axes: ``data`` shards the batch, ``fsdp`` the batch and the parameters, ``tensor`` the heads,
the feed-forward width and the vocabulary. A single device is a mesh of one.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from she_jax.types import UserError

AXES = ("data", "fsdp", "tensor")

# Partition spec by the end of a parameter's path; the first match applies. The layer axis (axis 0)
# is never sharded. Parameters without a match (norms, scalars) are replicated.
RULES = (
    (r"embed", PartitionSpec("tensor", "fsdp")),
    (r"head", PartitionSpec("fsdp", "tensor")),
    (r"layers/[qkv]", PartitionSpec(None, "fsdp", "tensor", None)),
    (r"layers/[qkv]_bias", PartitionSpec(None, "tensor", None)),
    (r"layers/o", PartitionSpec(None, "tensor", None, "fsdp")),
    (r"layers/(gate|up)", PartitionSpec(None, "fsdp", "tensor")),
    (r"layers/down", PartitionSpec(None, "tensor", "fsdp")),
)


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each axis of a mesh; -1 for at most one of them, to use the rest."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


def make_mesh(
    data: int = 1, fsdp: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
    """Makes a mesh with the axes ``data``, ``fsdp`` and ``tensor``.

    Args:
      data, fsdp, tensor: devices along each axis; -1 for at most one of them, to use the rest.
      devices: the devices, which must all be used; ``jax.devices()`` by default.

    Raises:
      UserError: if the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes, count = [data, fsdp, tensor], len(devices)
    shape = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise UserError(f"mesh {shape}: expected positive sizes, and -1 for at most one of them")
    if -1 in sizes:
        known = -math.prod(sizes)
        if count % known:
            raise UserError(f"mesh {shape}: {known} does not divide the {count} devices")
        sizes[sizes.index(-1)] = count // known
    if math.prod(sizes) != count:
        raise UserError(
            f"mesh {shape} needs {math.prod(sizes)} devices, there are {count}: "
            "change a size, or give one as -1 for the rest"
        )
    return Mesh(np.asarray(devices).reshape(sizes), AXES)


def shardings(tree: Any, mesh: Mesh | AbstractMesh) -> Any:
    """The sharding of every leaf of a tree, by the end of its path.

    The path of an optimizer moment ends in its parameter's path, so both are sharded alike. An axis
    that the mesh does not divide (such as fewer key-value heads than ``tensor``) is replicated.

    Args:
      tree: parameters, or a tree that contains them (a ``TrainState``), as arrays or as shapes.
      mesh: from ``make_mesh``.

    Returns:
      A tree of ``NamedSharding`` of the same structure.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, _spec(path, leaf.shape, mesh)), tree
    )


def _spec(
    path: tuple[Any, ...], shape: tuple[int, ...], mesh: Mesh | AbstractMesh
) -> PartitionSpec:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    for pattern, spec in RULES:
        if re.search(rf"(^|/){pattern}$", name) and len(spec) == len(shape):
            axes = (
                axis if axis is None or size % mesh.shape[axis] == 0 else None
                for axis, size in zip(spec, shape, strict=True)
            )
            return PartitionSpec(*axes)
    return PartitionSpec()


def batch_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """The sharding of a batch: its rows over ``data`` and ``fsdp``."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def check_batch(
    batch_size: int, mesh: Mesh | AbstractMesh, what: str = "batch", unit: str = "rows"
):
    """Checks that a batch divides among the devices.

    Args:
      batch_size: number of rows, or of groups of rows that stay together.
      mesh: from ``make_mesh``.
      what, unit: names of the batch and of its rows, for the error message.

    Raises:
      UserError: if ``batch_size`` is no multiple of the devices along ``data`` and ``fsdp``.
    """
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % parts:
        raise UserError(
            f"{what} of {batch_size} {unit} over data x fsdp = {parts} devices: "
            f"use a multiple of {parts}, such as {math.ceil(batch_size / parts) * parts}"
        )

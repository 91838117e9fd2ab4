"""Devices as a mesh, and where each parameter lives on it.

Three axes: ``data`` shares out the batch, ``fsdp`` the batch and the parameters, ``tensor`` heads,
feed-forward and vocabulary. One device is a mesh of one.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")

# The end of a parameter's path to its specification, first match wins; the stacked layers are the
# first axis and stay whole. What matches nothing (norms, scalars) is replicated.
RULES = (
    (r"embed", PartitionSpec("tensor", "fsdp")),
    (r"head", PartitionSpec("fsdp", "tensor")),
    (r"layers/[qkv]", PartitionSpec(None, "fsdp", "tensor", None)),
    (r"layers/[qkv]_bias", PartitionSpec(None, "tensor", None)),
    (r"layers/o", PartitionSpec(None, "tensor", None, "fsdp")),
    (r"layers/(gate|up)", PartitionSpec(None, "fsdp", "tensor")),
    (r"layers/down", PartitionSpec(None, "tensor", "fsdp")),
)


def make_mesh(
    data: int = 1, fsdp: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
    """A mesh with the axes ``data``, ``fsdp`` and ``tensor``.

    Args:
      data, fsdp, tensor: devices along each axis; -1 for one of them means all that are left.
      devices: the devices, all of them in use; all of the machine's by default.

    Raises:
      ValueError: if the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes, count = [data, fsdp, tensor], len(devices)
    asked = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise ValueError(f"mesh {asked}: expected positive sizes, and -1 for at most one of them")
    if -1 in sizes:
        known = -math.prod(sizes)
        if count % known:
            raise ValueError(f"mesh {asked}: {known} does not divide the {count} devices")
        sizes[sizes.index(-1)] = count // known
    if math.prod(sizes) != count:
        raise ValueError(
            f"mesh {asked} needs {math.prod(sizes)} devices, there are {count}: "
            "change a size, or give one as -1 for the rest"
        )
    return Mesh(np.asarray(devices).reshape(sizes), AXES)


def shardings(tree: Any, mesh: Mesh | AbstractMesh) -> Any:
    """The sharding of every leaf, by the end of its path.

    An optimizer's moments end in their parameter's path and so lie beside it. An axis that the mesh
    does not divide (fewer key-value heads than ``tensor``, say) is replicated.

    Args:
      tree: parameters, or any tree that holds them (a ``TrainState``), as arrays or as shapes.
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
            fits = (
                axis if axis is None or size % mesh.shape[axis] == 0 else None
                for axis, size in zip(spec, shape, strict=True)
            )
            return PartitionSpec(*fits)
    return PartitionSpec()


def batch_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """The sharding of a batch: its rows over ``data`` and ``fsdp``."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def check_batch(
    batch_size: int, mesh: Mesh | AbstractMesh, what: str = "batch", unit: str = "rows"
):
    """Checks that a batch can be shared out.

    Args:
      batch_size: how many rows, or groups of rows that stay together.
      mesh: from ``make_mesh``.
      what, unit: of what, for the message.

    Raises:
      ValueError: if they do not divide by the devices along ``data`` and ``fsdp``.
    """
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % parts:
        raise ValueError(
            f"{what} of {batch_size} {unit} over data x fsdp = {parts} devices: "
            f"use a multiple of {parts}, such as {math.ceil(batch_size / parts) * parts}"
        )

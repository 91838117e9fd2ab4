"""Meshes, and the shardings of parameters on them; on one device or on eight."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from she_jax.models.decoder import ModelConfig, build_model, init_params
from she_jax.models.sharding import AXES, batch_sharding, check_batch, make_mesh, shardings

CONFIG = ModelConfig(
    vocab_size=64,
    dim=32,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=8,
    ffn=48,
    tie_embeddings=False,
    qkv_bias=True,
    qk_norm=True,
)
SHAPES = jax.eval_shape(lambda: init_params(CONFIG, jax.random.key(0)))
P = PartitionSpec


def abstract(data, fsdp, tensor):
    """A mesh of any size, without its devices."""
    return AbstractMesh((data, fsdp, tensor), AXES)


def specs(tree, mesh):
    return jax.tree.map(lambda sharding: sharding.spec, shardings(tree, mesh))


def test_every_parameter_has_its_axes():
    by_name = specs(SHAPES, abstract(1, 4, 2))
    layers = by_name["layers"]
    assert by_name["embed"] == P("tensor", "fsdp")
    assert by_name["head"] == P("fsdp", "tensor")
    assert by_name["norm"] == layers["attn_norm"] == layers["mlp_norm"] == P()
    assert layers["q_norm"] == layers["k_norm"] == P()
    for name in "qkv":
        assert layers[name] == P(None, "fsdp", "tensor", None)
        assert layers[f"{name}_bias"] == P(None, "tensor", None)
    assert layers["o"] == P(None, "tensor", None, "fsdp")
    assert layers["gate"] == layers["up"] == P(None, "fsdp", "tensor")
    assert layers["down"] == P(None, "tensor", "fsdp")


def test_an_axis_that_does_not_divide_is_replicated():
    """Two key-value heads over four devices: the heads are replicated, the width is sharded."""
    layers = specs(SHAPES, abstract(1, 2, 4))["layers"]
    assert layers["q"] == P(None, "fsdp", "tensor", None)
    assert layers["k"] == layers["v"] == P(None, "fsdp", None, None)
    assert layers["k_bias"] == P(None, None, None)
    assert specs(SHAPES, abstract(1, 5, 1))["embed"] == P("tensor", None)


def test_moments_are_sharded_like_their_parameters():
    """Any tree whose paths end in a parameter's; counters are replicated."""
    mesh = abstract(1, 4, 2)
    expected = jax.tree.leaves(specs(SHAPES, mesh), is_leaf=lambda x: isinstance(x, P))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    state = {
        "step": jax.ShapeDtypeStruct((), jnp.int32),
        "opt_state": jax.eval_shape(optimizer.init, SHAPES),
    }
    state_specs = specs(state, mesh)
    adam = state_specs["opt_state"][1][0]
    for moments in (adam.mu, adam.nu):
        assert jax.tree.leaves(moments, is_leaf=lambda x: isinstance(x, P)) == expected
    assert adam.count == state_specs["step"] == P()


def test_a_name_that_only_ends_like_a_parameter_is_replicated():
    tree = {"reward_head": jnp.ones((8, 8)), "layers": {"freq": jnp.ones((2, 8, 4, 8))}}
    assert specs(tree, abstract(1, 2, 2)) == {"reward_head": P(), "layers": {"freq": P()}}


@pytest.mark.parametrize("axis", AXES)
def test_minus_one_takes_the_remaining_devices(axis):
    mesh = make_mesh(**{axis: -1})
    assert mesh.axis_names == AXES
    assert mesh.shape[axis] == len(jax.devices())
    assert make_mesh(devices=jax.devices()[:1]).size == 1


def test_a_mesh_that_does_not_fit_names_both_numbers():
    count = len(jax.devices())
    with pytest.raises(ValueError, match=f"needs {3 * count} devices, there are {count}"):
        make_mesh(data=3, fsdp=count)
    with pytest.raises(ValueError, match=f"{count + 1} does not divide the {count} devices"):
        make_mesh(data=-1, tensor=count + 1)
    with pytest.raises(ValueError, match="at most one"):
        make_mesh(data=-1, fsdp=-1)
    with pytest.raises(ValueError, match="fsdp=0"):
        make_mesh(fsdp=0)


def test_a_batch_must_divide():
    mesh = abstract(2, 3, 5)
    check_batch(12, mesh)
    with pytest.raises(ValueError, match=r"batch of 10 rows over data x fsdp = 6.*such as 12"):
        check_batch(10, mesh)


def test_a_sharded_forward_equals_an_unsharded_one():
    """On all devices: with parameters and rows sharded, the model computes the same."""
    count = len(jax.devices())
    tensor = 2 if count % 2 == 0 else 1
    mesh = make_mesh(fsdp=-1, tensor=tensor)
    model, params = build_model(CONFIG), init_params(CONFIG, jax.random.key(0))
    tokens = jnp.arange(count * 5).reshape(count, 5) % CONFIG.vocab_size
    positions = jnp.tile(jnp.arange(5)[None], (count, 1))
    expected = jax.jit(model.forward)(params, tokens, positions)
    placed = jax.device_put(params, shardings(params, mesh))
    rows = batch_sharding(mesh)
    sharded = jax.jit(model.forward)(
        placed, jax.device_put(tokens, rows), jax.device_put(positions, rows)
    )
    assert placed["embed"].addressable_shards[0].data.shape == (
        CONFIG.vocab_size // tensor,
        CONFIG.dim // mesh.shape["fsdp"],
    )
    np.testing.assert_allclose(sharded.hidden, expected.hidden, atol=1e-5)

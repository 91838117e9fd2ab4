"""A decoder language model: Llama, Qwen2 (q, k, v biases) and Qwen3 (q, k norms) in one module.

Letters in shapes: B rows, T tokens, S cache slots, L layers, D width, H query heads, J key-value
heads, K head size, F feed-forward width, V vocabulary. A key-value head serves H / J query heads.

Parameters are a plain nested dict with the layers stacked on axis 0, so that compile time does not
grow with depth and any optimizer, sharding or checkpoint handles them without knowing this file::

    {"embed": [V, D],
     "layers": {"attn_norm": [L, D], "q": [L, D, H, K], "k": [L, D, J, K], "v": [L, D, J, K],
                "o": [L, H, K, D], "mlp_norm": [L, D], "gate": [L, D, F], "up": [L, D, F],
                "down": [L, F, D],
                "q_bias": [L, H, K], "k_bias": [L, J, K], "v_bias": [L, J, K],  # Qwen2 only
                "q_norm": [L, K], "k_norm": [L, K]},  # Qwen3 only
     "norm": [D],
     "head": [D, V]}  # absent where the embedding is the head too
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32, Int

from she_jax.types import LMOutput

MASKED = -1e30  # finite, so that softmax and gradient exist for a row with all keys masked


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama 3's scaling of the rotary wavelengths, see ``rotary``."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Architecture, dtype and rematerialization of a decoder.

    Attributes:
      vocab_size, dim, layers, heads, kv_heads, head_dim, ffn: sizes V, D, L, H, J, K, F.
      rope_theta: base of the rotary wavelengths.
      rope_scaling: Llama 3's scaling, or None.
      norm_eps: epsilon of every RMSNorm.
      tie_embeddings: use the embedding as the output head too.
      qkv_bias: biases on q, k and v (Qwen2).
      qk_norm: RMSNorm on each head of q and k (Qwen3).
      max_positions: longest sequence the model was trained for; no array depends on it.
      dtype: dtype of the computation; norms, softmax and rotations always run in float32.
      remat: recompute each layer in the backward pass instead of storing its activations.

    Raises:
      ValueError: if a size is not positive, head_dim is odd, or kv_heads does not divide heads.
    """

    vocab_size: int
    dim: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    qkv_bias: bool = False
    qk_norm: bool = False
    max_positions: int = 2048
    dtype: str = "float32"
    remat: bool = False

    def __post_init__(self):
        for attribute in fields(self):
            value = getattr(self, attribute.name)
            if attribute.type in (int, float, "int", "float") and not value > 0:
                raise ValueError(f"{attribute.name}={value}: expected a positive number")
        if self.heads % self.kv_heads:
            raise ValueError(
                f"heads={self.heads}, kv_heads={self.kv_heads}: kv_heads must divide heads"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim}: rotary positions need an even number")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"dtype={self.dtype!r}: expected float32, bfloat16 or float16")


def rms_norm(x: Float[Array, "*B D"], scale: Float[Array, "D"], eps: float) -> Float[Array, "*B D"]:
    """``x / sqrt(mean(x^2) + eps) * scale`` over the last axis (arXiv 1910.07467), in float32."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (x32 * jnp.broadcast_to(scale.astype(jnp.float32), x.shape)).astype(x.dtype)


def rotary(
    positions: Int[Array, "B T"], config: ModelConfig
) -> tuple[Float[Array, "B T 1 half"], Float[Array, "B T 1 half"]]:
    """Cosine and sine of the rotary angles (arXiv 2104.09864), shared by all layers and heads.

    ``angle[p, i] = p * theta^(-2i/K)``. With ``rope_scaling``, wavelengths above
    ``original_max_positions / low_freq_factor`` are multiplied by ``factor``, those below
    ``original_max_positions / high_freq_factor`` are kept, and the frequencies between the two are
    interpolated.

    Args:
      positions: position of each token; padding (-1) is treated as position 0, since it is masked.
      config: gives K, theta and the scaling.
    """
    frequency = config.rope_theta ** (
        -jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim
    )
    if (scaling := config.rope_scaling) is not None:
        rotations = scaling.original_max_positions * frequency / (2 * math.pi)
        span = scaling.high_freq_factor - scaling.low_freq_factor
        keep = jnp.clip((rotations - scaling.low_freq_factor) / span, 0.0, 1.0)
        frequency = frequency * (keep + (1.0 - keep) / scaling.factor)
    angles = jnp.maximum(positions, 0)[:, :, None, None] * frequency.reshape(1, 1, 1, -1)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: Float[Array, "B T N K"], cos: Float[Array, "B T 1 half"], sin: Float[Array, "B T 1 half"]
) -> Float[Array, "B T N K"]:
    """Rotates each pair ``(x[i], x[i + K/2])`` by its angle, as Hugging Face's weights expect."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


# Keys [N * J, K, P] and values [N * J, P, K] shared by several consecutive rows, and the mask
# [N, P] of the real ones. Of several prefixes each has its own N and P.
Prefix = tuple[Float[Array, "_ K _"], Float[Array, "_ _ K"], Bool[Array, "_ _"]]


def attention(
    q: Float[Array, "B H T K"],
    k: Float[Array, "BJ K S"],
    v: Float[Array, "BJ S K"],
    mask: Bool[Array, "B T S"],
    prefixes: Sequence[Prefix] = (),
) -> Float[Array, "B H T K"]:
    """Masked attention, ``softmax(q k^T / sqrt(K)) v``, with the softmax in float32.

    Query heads are grouped by the key-value head they share. With prefixes, rows are grouped by the
    prefix they share. So no key or value is repeated: a group of B / N rows reads the keys of its
    prompt in one product, and all rows those of an instruction that begins all prompts. A query
    with all keys masked returns a mean of values, which is finite and never used.

    Args:
      q: queries.
      k, v: keys and values, the heads of a row contiguous. With one leading batch axis and the keys
        as columns, the products copy nothing on the CPU.
      mask: which keys each query attends to.
      prefixes: further keys and values; every query attends to the real ones; each N divides B.
    """
    batch, size = q.shape[0], q.shape[-1]
    grouped = (q * size**-0.5).reshape(k.shape[0], -1, size)
    out, peak, total = _attend(grouped, k, v, mask)
    for keys, values, real in prefixes:
        count, heads = real.shape[0], keys.shape[0] // real.shape[0]
        # [N * group * J, Q, K] to [N * J, group * Q, K] and back
        by_prefix = grouped.reshape(count, batch // count, heads, -1, size).swapaxes(1, 2)
        parts = _attend(by_prefix.reshape(count * heads, -1, size), keys, values, real[:, None])
        by_row = (x.reshape(*by_prefix.shape[:-1], -1).swapaxes(1, 2) for x in parts)
        prefix_out, prefix_peak, prefix_total = (x.reshape(*grouped.shape[:-1], -1) for x in by_row)
        # The softmax over both: each part is rescaled from its own maximum to the larger one.
        top = jnp.maximum(peak, prefix_peak)
        scale, prefix_scale = jnp.exp(peak - top), jnp.exp(prefix_peak - top)
        out = out * scale + prefix_out * prefix_scale
        total = total * scale + prefix_total * prefix_scale
        peak = top
    return (out / total).reshape(q.shape).astype(v.dtype)


def _attend(
    q: Float[Array, "NJ Q K"],
    k: Float[Array, "NJ K S"],
    v: Float[Array, "NJ S K"],
    mask: Bool[Array, "N U S"],
) -> tuple[Float32[Array, "NJ Q K"], Float32[Array, "NJ Q 1"], Float32[Array, "NJ Q 1"]]:
    """Unnormalized attention output ``sum(exp(score - peak) v)``, peak, and sum of exponentials.

    Query i uses row ``i % U`` of the mask. The caller divides by the sum, after the product with v:
    that takes S / K times fewer divisions.
    """
    scores = jnp.einsum("nqk,nks->nqs", q, k, preferred_element_type=jnp.float32)
    rows, queries, slots = mask.shape
    bias = jnp.where(mask, 0.0, MASKED)[:, None, None]
    biased = scores.reshape(rows, k.shape[0] // rows, -1, queries, slots) + bias
    peak = jax.lax.stop_gradient(biased.max(axis=-1, keepdims=True))
    weights = jnp.exp(biased - peak)
    total = weights.sum(axis=-1).reshape(*q.shape[:-1], 1)
    weights = weights.reshape(scores.shape).astype(v.dtype)
    out = jnp.einsum("nqs,nsk->nqk", weights, v, preferred_element_type=jnp.float32)
    return out, peak.reshape(total.shape), total


class Layers(nnx.Module):
    """All decoder layers, stacked; the methods run one layer, after ``nnx.merge`` of a slice."""

    def __init__(self, config: ModelConfig, key: Array):
        self.config = config
        depth, dim, size, ffn = config.layers, config.dim, config.head_dim, config.ffn
        heads, kv_heads = config.heads, config.kv_heads
        keys = iter(jax.random.split(key, 7))
        std = math.sqrt(2 / (5 * dim))  # "small init", arXiv 1910.05895: 0.02 at a width of 1,000
        residual = std / math.sqrt(2 * depth)  # so that the sum over 2L branches starts small

        def normal(*shape: int, std: float) -> nnx.Param:
            return nnx.Param(std * jax.random.normal(next(keys), (depth, *shape)))

        self.attn_norm = nnx.Param(jnp.ones((depth, dim)))
        self.q = normal(dim, heads, size, std=std)
        self.k = normal(dim, kv_heads, size, std=std)
        self.v = normal(dim, kv_heads, size, std=std)
        self.o = normal(heads, size, dim, std=residual)
        if config.qkv_bias:
            self.q_bias = nnx.Param(jnp.zeros((depth, heads, size)))
            self.k_bias = nnx.Param(jnp.zeros((depth, kv_heads, size)))
            self.v_bias = nnx.Param(jnp.zeros((depth, kv_heads, size)))
        if config.qk_norm:
            self.q_norm = nnx.Param(jnp.ones((depth, size)))
            self.k_norm = nnx.Param(jnp.ones((depth, size)))
        self.mlp_norm = nnx.Param(jnp.ones((depth, dim)))
        self.gate = normal(dim, ffn, std=std)
        self.up = normal(dim, ffn, std=std)
        self.down = normal(ffn, dim, std=residual)

    def qkv(self, x: Float[Array, "B T D"], cos: Array, sin: Array) -> tuple[Array, Array, Array]:
        """Rotated queries [B, H, T, K] and keys [B * J, K, T], and values [B * J, T, K]."""
        config = self.config
        x = rms_norm(x, self.attn_norm[...], config.norm_eps)
        q, k, v = (_project(x, weight[...], 1) for weight in (self.q, self.k, self.v))
        if config.qkv_bias:
            dtype = x.dtype
            q = q + self.q_bias[None, None].astype(dtype)
            k = k + self.k_bias[None, None].astype(dtype)
            v = v + self.v_bias[None, None].astype(dtype)
        if config.qk_norm:
            q = rms_norm(q, self.q_norm[...], config.norm_eps)
            k = rms_norm(k, self.k_norm[...], config.norm_eps)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        keys = k.transpose(0, 2, 3, 1).reshape(-1, k.shape[3], k.shape[1])
        values = v.swapaxes(1, 2).reshape(-1, v.shape[1], v.shape[3])
        return q.swapaxes(1, 2), keys, values

    def after_attention(self, x: Float[Array, "B T D"], heads: Float[Array, "B H T K"]) -> Array:
        """The layer after its attention: output projection, then the gated feed-forward."""
        x = x + _project(heads.swapaxes(1, 2), self.o[...], 2)
        inner = rms_norm(x, self.mlp_norm[...], self.config.norm_eps)
        gated = jax.nn.silu(_project(inner, self.gate[...], 1)) * _project(inner, self.up[...], 1)
        return x + _project(gated, self.down[...], 1)


def _project(x: Array, weight: Array, axes: int) -> Array:
    """Contracts the last ``axes`` axes of x with the weight's first, as one 2-D product."""
    rows, shape = x.shape[: x.ndim - axes], weight.shape[axes:]
    flat = weight.reshape(math.prod(weight.shape[:axes]), -1).astype(x.dtype)
    return (x.reshape(-1, flat.shape[0]) @ flat).reshape(*rows, *shape)


class Decoder(nnx.Module):
    """A decoder: embedding, layers, final norm and output head."""

    def __init__(self, config: ModelConfig, key: Array):
        embed_key, layers_key, head_key = jax.random.split(key, 3)
        self.config = config
        shape = (config.vocab_size, config.dim)
        self.embed = nnx.Param(0.02 * jax.random.normal(embed_key, shape))
        self.layers = Layers(config, layers_key)
        self.norm = nnx.Param(jnp.ones(config.dim))
        if not config.tie_embeddings:
            self.head = nnx.Param(0.02 * jax.random.normal(head_key, shape[::-1]))

    def embed_tokens(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Embeds the tokens, in the dtype of the computation."""
        return jnp.take(self.embed[...], tokens, axis=0, mode="clip").astype(self.config.dtype)

    def output(self, x: Float[Array, "B T D"]) -> LMOutput:
        """Applies the final norm; the caller multiplies the hidden states by the head."""
        head = self.embed[...].T if self.config.tie_embeddings else self.head[...]
        hidden = rms_norm(x, self.norm[...], self.config.norm_eps)
        return LMOutput(hidden=hidden, head=head.astype(x.dtype))


@dataclass(frozen=True, kw_only=True)
class Model:
    """A decoder as pure functions of its parameters; hashable, so it may be a static argument.

    Attributes:
      config: the architecture.
      graph: graph definition of the module, without its parameters.
    """

    config: ModelConfig
    graph: Any = field(repr=False, compare=False)

    def forward(
        self,
        params: Mapping[str, Any],
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        *,
        mask: Bool[Array, "B T T"] | None = None,
        prompt_length: int = 0,
        group_size: int = 1,
    ) -> LMOutput:
        """Runs whole sequences, uncached, layers under ``lax.scan``; for training and scoring.

        Args:
          params: parameters as ``init_params`` returns them.
          tokens: token ids in [0, V).
          positions: position of each token in its sequence, -1 on padding. By default a token
            attends to the tokens at and before its index that are not padding.
          mask: which tokens each token attends to, in place of that default (padding is masked in
            any case). Lets a row hold several continuations of one text that do not attend to each
            other. Only with ``group_size=1``.
          prompt_length: number of leading tokens that the rows of a group share; static.
          group_size: rows per group, contiguous; static. Above 1, the prompt of a group is computed
            once, in the forward and in the backward pass, with the same result.

        Returns:
          Hidden states after the final norm, and the head; see ``LMOutput``.

        Raises:
          ValueError: if the rows do not divide into groups, no token follows the prompt, or a mask
            is given together with groups.
        """
        rows, length = tokens.shape
        spans = [(tokens, positions)]
        if group_size > 1:
            if mask is not None:
                raise ValueError("a mask and a shared prompt do not go together: group_size=1")
            if rows % group_size or not 0 < prompt_length < length:
                raise ValueError(
                    f"{rows} rows of {length} tokens, group_size={group_size}, prompt_length="
                    f"{prompt_length}: expected whole groups and a prompt of 1 to {length - 1}"
                )
            spans = [
                (tokens[::group_size, :prompt_length], positions[::group_size, :prompt_length]),
                (tokens[:, prompt_length:], positions[:, prompt_length:]),
            ]
        decoder = nnx.merge(self.graph, params)
        graph, stacked = nnx.split(decoder.layers)
        angles = [rotary(position_ids, self.config) for _, position_ids in spans]
        real = [position_ids >= 0 for _, position_ids in spans]
        masks = [jnp.tri(keys.shape[1], dtype=bool)[None] & keys[:, None] for keys in real]
        masks = masks if mask is None else [mask & real[0][:, None]]

        def run_layer(states, weights):
            layer = nnx.merge(graph, weights)
            outputs, prefixes = [], ()
            for x, (cos, sin), keys, mask in zip(states, angles, real, masks, strict=True):
                q, k, v = layer.qkv(x, cos, sin)
                outputs.append(layer.after_attention(x, attention(q, k, v, mask, prefixes)))
                prefixes = ((k, v, keys),)
            return outputs, None

        run_layer = jax.checkpoint(run_layer) if self.config.remat else run_layer
        states = [decoder.embed_tokens(token_ids) for token_ids, _ in spans]
        states, _ = jax.lax.scan(run_layer, states, nnx.to_pure_dict(stacked))
        repeated = [jnp.repeat(x, rows // x.shape[0], axis=0) for x in states]
        return decoder.output(jnp.concatenate(repeated, axis=1))

    def init_cache(self, batch: int, length: int) -> dict[str, Any]:
        """Returns an empty key-value cache of ``length`` slots.

        Returns:
          ``{"positions": Int[B S], "layers": ({"k": [B * J, K, S], "v": [B * J, S, K]}, ...)}``;
          a position of -1 marks an empty slot.
        """
        config = self.config
        rows, size = batch * config.kv_heads, config.head_dim
        keys = jnp.zeros((rows, size, length), config.dtype)
        values = jnp.zeros((rows, length, size), config.dtype)
        return {
            "positions": jnp.full((batch, length), -1, jnp.int32),
            "layers": tuple({"k": keys, "v": values} for _ in range(config.layers)),
        }

    def decoding_params(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the parameters in the form that ``decode`` reads fastest.

        The layers become a tuple, and all but the norm scales (used in float32) are cast to the
        dtype of the computation. Call it once before a decoding loop, so that no iteration has to
        slice or cast weights.
        """

        def cast(part: Mapping[str, Any]) -> dict[str, Any]:
            return {
                name: leaf if name.endswith("norm") else leaf.astype(self.config.dtype)
                for name, leaf in part.items()
            }

        outer = dict(params)
        stacked = cast(outer.pop("layers"))
        layers = tuple(
            {name: leaf[index] for name, leaf in stacked.items()}
            for index in range(self.config.layers)
        )
        return cast(outer) | {"layers": layers}

    def decode(
        self,
        params: Mapping[str, Any],
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        cache: Mapping[str, Any],
        slot: Int[Array, ""] | int,
        prefixes: Sequence[Mapping[str, Any]] = (),
    ) -> tuple[LMOutput, dict[str, Any]]:
        """Runs T more tokens of each row with a cache; for prefill and every decoding step.

        Args:
          params: parameters as ``init_params`` or ``decoding_params`` returns them.
          tokens: token ids in [0, V).
          positions: position of each token in its sequence, -1 on padding.
          cache: keys and values of the preceding tokens, see ``init_cache``.
          slot: cache slot of the first new token; the T slots from it on are overwritten. Traced.
          prefixes: full caches that precede ``cache``, each of N rows, N its own number, of which
            each is shared by B / N consecutive rows; read only.

        Returns:
          The output at the new tokens, and the cache with them added.
        """
        layers = params["layers"]
        if isinstance(layers, Mapping):
            params = self.decoding_params(params)
            return self.decode(params, tokens, positions, cache, slot, prefixes)
        # The graph holds structure and no sizes, so it fits a single layer as well as the stack.
        decoder = nnx.merge(self.graph, {**params, "layers": layers[0]})
        graph, _ = nnx.split(decoder.layers)
        cos, sin = rotary(positions, self.config)
        key_positions = _write(cache["positions"], positions, slot, axis=1)
        slots = slot + jnp.arange(tokens.shape[1])  # of the new tokens
        causal = jnp.arange(key_positions.shape[1])[None, :] <= slots[:, None]
        mask = causal[None] & (key_positions >= 0)[:, None]
        real = [prefix["positions"] >= 0 for prefix in prefixes]

        @jax.jit  # traced once for all layers
        def run_layer(weights, buffers, shared, x):
            layer = nnx.merge(graph, weights)
            q, k, v = layer.qkv(x, cos, sin)
            k = _write(buffers["k"], k, slot, axis=2)
            v = _write(buffers["v"], v, slot, axis=1)
            before = [(b["k"], b["v"], keys) for b, keys in zip(shared, real, strict=True)]
            return layer.after_attention(x, attention(q, k, v, mask, before)), {"k": k, "v": v}

        x = decoder.embed_tokens(tokens)
        updated = []
        before_layers = [[prefix["layers"][n] for prefix in prefixes] for n in range(len(layers))]
        for weights, buffers, shared in zip(layers, cache["layers"], before_layers, strict=True):
            x, buffers = run_layer(weights, buffers, shared, x)
            updated.append(buffers)
        return decoder.output(x), {"positions": key_positions, "layers": tuple(updated)}


def take_rows(cache: Mapping[str, Any], rows: Int[Array, "R"]) -> dict[str, Any]:
    """Selects rows of a cache, in the given order; a row may be selected several times."""
    count = cache["positions"].shape[0]

    def take(buffer: Array) -> Array:
        by_row = buffer.reshape(count, -1, *buffer.shape[1:])
        return by_row[rows].reshape(-1, *buffer.shape[1:])

    return {"positions": cache["positions"][rows], "layers": jax.tree.map(take, cache["layers"])}


def _write(buffer: Array, new: Array, slot: Array | int, axis: int) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(buffer, new.astype(buffer.dtype), slot, axis)


def build_model(config: ModelConfig) -> Model:
    """Builds the decoder of this config, as functions of its parameters."""
    abstract = nnx.eval_shape(lambda: Decoder(config, jax.random.key(0)))
    return Model(config=config, graph=nnx.split(abstract)[0])


def init_params(config: ModelConfig, key: Array) -> dict[str, Any]:
    """Initializes parameters in float32, for training from scratch.

    Normal with standard deviation ``sqrt(2 / (5 D))``, divided by ``sqrt(2 L)`` on the projections
    that write into the residual stream; embedding and head 0.02; norms 1; biases 0.

    Args:
      config: the architecture.
      key: consumed.
    """
    return nnx.to_pure_dict(nnx.split(Decoder(config, key))[1])

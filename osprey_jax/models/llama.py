"""Llama-style decoder over embeddings, with an explicit cache.

Reference: Touvron et al., Llama 2, arXiv 2307.09288; weights as Hugging Face's `LlamaForCausalLM`.
Differs: who sees whom is told by positions and segment ids, never by a token's place in the buffer. Layers
are stacked and scanned, which compiles fast, for training; for generation each has parameters of its own
(`layers.unstack`), for a scan copies the weights that a step reads.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from osprey_jax.config import DecoderConfig
from osprey_jax.lora import Lora
from osprey_jax.models.layers import Linear, RMSNorm, constrain, logical, on_shards
from osprey_jax.ops.attention import attention, visibility
from osprey_jax.ops.flash import flash_attention, suits
from osprey_jax.ops.rotary import apply_rotary
from osprey_jax.typing import Array, Bool, Float, Int


@flax.struct.dataclass
class Cache:
    """Keys and values of the tokens seen so far, in a buffer of `S` slots."""

    keys: tuple[Float[Array, "B K S H"], ...]
    """One array a layer."""
    values: tuple[Float[Array, "B K S H"], ...]
    positions: Int[Array, "B S"]
    segment_ids: Int[Array, "B S"]
    """0 for padding and for slots not yet written."""
    end: Int[Array, ""]
    """The slot that the next token takes, the same in every row."""


def init_cache(config: DecoderConfig, batch: int, slots: int, *, dtype: jnp.dtype) -> Cache:
    """An empty cache for `batch` sequences of at most `slots` tokens."""
    shape = (batch, config.num_kv_heads, slots, config.head_dim)
    empty = tuple(jnp.zeros(shape, dtype) for _ in range(config.num_layers))
    return Cache(
        keys=empty,
        values=empty,
        positions=jnp.zeros((batch, slots), jnp.int32),
        segment_ids=jnp.zeros((batch, slots), jnp.int32),
        end=jnp.zeros((), jnp.int32),
    )


KeysValues = tuple[Array, Array]

REMAT_POLICIES: Mapping[str, Callable[..., bool] | None] = {
    "full": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
"""What a layer keeps for the backward pass beside its input: nothing, or what its matrices give."""


class Place(NamedTuple):
    """What all layers are told of the tokens that they are given."""

    positions: Int[Array, "B T"]
    mask: Bool[Array, "B T S"]
    end: Int[Array, ""] | None = None
    """The cache's slot of the first token."""
    prefix_mask: Bool[Array, "B T S"] | None = None
    in_order: bool | None = None


class SelfAttention(nn.Module):
    """Grouped-query attention with rotary positions; writes its keys and values into the cache's slots."""

    config: DecoderConfig
    dtype: jnp.dtype
    quantization: str | None = None
    lora: Lora | None = None

    @nn.compact
    def __call__(
        self, x: Array, kv: KeysValues | None, prefix: KeysValues | None, place: Place
    ) -> tuple[Array, KeysValues | None]:
        c = self.config
        linear = partial(
            Linear, use_bias=False, dtype=self.dtype, quantization=self.quantization, lora=self.lora
        )
        dim, heads, kv_heads = (c.dim,), (c.num_heads, c.head_dim), (c.num_kv_heads, c.head_dim)

        def project(name: str, outputs: tuple, kind: str) -> Array:
            axes = ("embed", kind, "head_dim")
            y = linear(dim, outputs, axes, name=name)(x)
            return constrain(y, ("batch", None, f"activation_{kind}", None))

        q, k, v = (
            project("q_proj", heads, "heads"),
            project("k_proj", kv_heads, "kv_heads"),
            project("v_proj", kv_heads, "kv_heads"),
        )
        q, k = (apply_rotary(y, place.positions, theta=c.rope_theta) for y in (q, k))
        k, v = (jnp.swapaxes(y, 1, 2) for y in (k, v))
        if kv is not None and place.end is not None:
            start = (0, 0, place.end, 0)
            k = jax.lax.dynamic_update_slice(kv[0], k.astype(kv[0].dtype), start)
            v = jax.lax.dynamic_update_slice(kv[1], v.astype(kv[1].dtype), start)
            kv = (k, v)
        before = None
        if prefix is not None and place.prefix_mask is not None:
            before = prefix[0].astype(q.dtype), prefix[1].astype(q.dtype), place.prefix_mask
        k, v = k.astype(q.dtype), v.astype(q.dtype)
        if kv is None and before is None and suits(q):
            rows, keys = (
                ("batch", None, "activation_heads", None),
                ("batch", "activation_kv_heads", None, None),
            )
            axes = (rows, keys, keys, ("batch", None, None))
            out = on_shards(flash_attention, q, k, v, place.mask, axes=axes, out=rows)
        else:
            out = attention(q, k, v, place.mask, prefix=before, in_order=bool(place.in_order))
        return linear(heads, dim, ("heads", "head_dim", "embed"), name="o_proj")(out), kv


class FeedForward(nn.Module):
    """SwiGLU network."""

    config: DecoderConfig
    dtype: jnp.dtype
    quantization: str | None = None
    lora: Lora | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        dim, ffn = (self.config.dim,), (self.config.ffn_dim,)
        linear = partial(
            Linear, use_bias=False, dtype=self.dtype, quantization=self.quantization, lora=self.lora
        )
        gate = linear(dim, ffn, ("embed", "ffn"), name="gate_proj")(x)
        y = jax.nn.silu(gate) * linear(dim, ffn, ("embed", "ffn"), name="up_proj")(x)
        y = constrain(y, ("batch", None, "activation_ffn"))
        return linear(ffn, dim, ("ffn", "embed"), name="down_proj")(y)


class DecoderLayer(nn.Module):
    """Attention and feed-forward network, each behind an RMSNorm and a residual."""

    config: DecoderConfig
    dtype: jnp.dtype
    quantization: str | None = None
    lora: Lora | None = None

    @nn.compact
    def __call__(
        self, x: Array, kv: KeysValues | None, prefix: KeysValues | None, place: Place
    ) -> tuple[Array, KeysValues | None]:
        eps, how = self.config.norm_eps, (self.dtype, self.quantization, self.lora)
        attended, kv = SelfAttention(self.config, *how, name="self_attn")(
            RMSNorm(eps, name="input_layernorm")(x), kv, prefix, place
        )
        x = x + attended
        x = x + FeedForward(self.config, *how, name="mlp")(RMSNorm(eps, name="post_attention_layernorm")(x))
        return constrain(x, ("batch", None, "activation_embed")), kv


class Llama(nn.Module):
    """The decoder: `embed` ids, run the layers over embeddings, `logits` of what comes out."""

    config: DecoderConfig
    dtype: jnp.dtype = jnp.dtype("float32")
    scan_layers: bool = True
    """Whether parameters of all layers are stacked; a cache needs them apart."""
    quantization: str | None = None
    """Of the layers' matrices, a name of `quantize.SCHEMES`; embeddings, norms and head stay as they are."""
    remat: str = "none"
    """What the backward pass computes again in stacked layers: "none", or one of `REMAT_POLICIES`."""
    lora: Lora | None = None
    """Adapters of the layers' matrices, for training, where layers are stacked."""

    def setup(self) -> None:
        c, layer = self.config, (self.config, self.dtype, self.quantization, self.lora)
        self.embed_tokens = Embedding(c.vocab_size, c.dim, self.dtype)
        if self.scan_layers:
            kind: Any = DecoderLayer
            if self.remat != "none":
                # The scan is a barrier already, which keeps the compiler from merging both computations.
                kind = nn.remat(DecoderLayer, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
            self.layers: Any = nn.scan(
                kind,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(nn.broadcast, nn.broadcast, nn.broadcast),
                length=c.num_layers,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )(*layer)
        else:
            self.layers = [DecoderLayer(*layer) for _ in range(c.num_layers)]
        self.norm = RMSNorm(c.norm_eps)
        self.lm_head = Linear(
            (c.dim,),
            (c.vocab_size,),
            ("embed", "vocab"),
            use_bias=False,
            dtype=self.dtype,
            out_dtype=jnp.dtype("float32"),
        )

    def embed(self, ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Embeddings of ids in `[0, vocab_size)`."""
        return self.embed_tokens(ids)

    def __call__(
        self,
        embeddings: Float[Array, "B T D"],
        *,
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        prefix_segment_ids: Int[Array, "B T"] | None = None,
        prefix: Cache | None = None,
        cache: Cache | None = None,
        in_order: bool = False,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        """Runs the layers and the final norm.

        Args:
          embeddings: token embeddings; with a cache, of the tokens that follow those in it.
          positions: each token's position in its own sequence, for rotary angles and causality.
          segment_ids: 0 for padding; a token sees earlier positions of its own segment.
          prefix_segment_ids: one more segment that a token sees, 0 for none (see `ops.attention.visibility`).
          prefix: a cache that is only read, such as that of a prompt's beginning which many rows share. Its
            batch `P` divides `B`: row `b` reads row `b // (B / P)`, and no row is copied.
          cache: what came before in each row of its own; it must have room for `T` more slots.
          in_order: whether no token sees one in a later slot, which saves work; not for stacked layers.

        Returns:
          Hidden states of the compute dtype, and the cache with these tokens added (None without one).
        """
        see = partial(
            visibility,
            query_positions=positions,
            query_segments=segment_ids,
            prefix_segments=prefix_segment_ids,
        )
        key_positions, key_segments = positions, segment_ids
        if cache is not None:
            start = (0, cache.end)
            key_positions = jax.lax.dynamic_update_slice(cache.positions, positions, start)
            key_segments = jax.lax.dynamic_update_slice(cache.segment_ids, segment_ids, start)
        prefix_mask = None
        if prefix is not None:
            rows = positions.shape[0] // prefix.positions.shape[0]
            prefix_mask = see(
                key_positions=jnp.repeat(prefix.positions, rows, axis=0),
                key_segments=jnp.repeat(prefix.segment_ids, rows, axis=0),
            )
        place = Place(
            positions=positions,
            mask=see(key_positions=key_positions, key_segments=key_segments),
            end=None if cache is None else cache.end,
            prefix_mask=prefix_mask,
            in_order=in_order or None,
        )
        x = constrain(embeddings.astype(self.dtype), ("batch", None, "activation_embed"))
        if self.scan_layers:
            assert (cache, prefix) == (None, None), "a cache needs layers that are not scanned"
            x, _ = self.layers(x, None, None, place)
            return self.norm(x), None
        written: list[KeysValues | None] = []
        for number, layer in enumerate(self.layers):
            before, own = (None if c is None else (c.keys[number], c.values[number]) for c in (prefix, cache))
            x, own = layer(x, own, before, place)
            written.append(own)
        if cache is not None:
            keys, values = zip(*written, strict=True)
            cache = Cache(
                keys=keys,
                values=values,
                positions=key_positions,
                segment_ids=key_segments,
                end=cache.end + positions.shape[1],
            )
        return self.norm(x), cache

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Next-token logits in float32, whatever is computed in."""
        # What comes in, and so its gradient, is split over the batch: logits stay where their rows are.
        hidden = constrain(hidden, ("batch", None, "activation_embed"))
        return constrain(self.lm_head(hidden), ("batch", None, "activation_vocab"))


class Embedding(nn.Module):
    """A table of token embeddings."""

    vocab_size: int
    dim: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        init = nn.initializers.normal(0.02)
        table = self.param("embedding", logical(init, "vocab", "embed"), (self.vocab_size, self.dim))
        # Each part of the width is looked up where it is, for the rows of all devices that share the table.
        found = constrain(jnp.take(table, ids, axis=0, mode="clip"), ("table_batch", None, "table_embed"))
        return found.astype(self.dtype)

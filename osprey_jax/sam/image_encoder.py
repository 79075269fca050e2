"""SAM's image encoder: an image in, one embedding for each of its patches out.

Reference: Kirillov et al., Segment Anything, arXiv 2304.02643; Li et al., Exploring Plain Vision Transformer
Backbones, arXiv 2203.16527. As there, windows at the edges are filled with zeros, which are attended to.
Differs: channels come last, and the patches' projection is a matmul.
"""

import flax.linen as nn
import jax.numpy as jnp

from osprey_jax.models.layers import LayerNorm, Linear, PatchConv
from osprey_jax.ops.activations import gelu
from osprey_jax.ops.precision import matmul_precision
from osprey_jax.ops.relative_attention import relative_attention
from osprey_jax.sam.config import EncoderConfig
from osprey_jax.typing import Array, Float


class Attention(nn.Module):
    """Self-attention within squares of tokens, with a bias for each distance of rows and of columns."""

    config: EncoderConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "B Y X D"]) -> Array:
        """Attends within each of `B` squares."""
        c, side = self.config, x.shape[1]
        heads = c.num_heads, c.head_dim
        qkv = Linear(
            (c.dim,), (3, *heads), ("embed", "qkv", "heads", "head_dim"), dtype=self.dtype, name="qkv"
        )(x)
        tables = [
            self.param(name, nn.initializers.truncated_normal(0.02), (2 * side - 1, c.head_dim))
            for name in ("rel_pos_h", "rel_pos_w")
        ]
        q, k, v = (qkv[..., i, :, :] for i in range(3))
        out = relative_attention(q, k, v, *(table.astype(self.dtype) for table in tables))
        return Linear(heads, (c.dim,), ("heads", "head_dim", "embed"), dtype=self.dtype, name="proj")(out)


class Block(nn.Module):
    """Attention within windows, or over the whole image, and a GELU network, each behind a norm."""

    config: EncoderConfig
    windowed: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "B Y X D"]) -> Array:
        c = self.config
        y = LayerNorm(c.norm_eps, name="norm1")(x)
        attention = Attention(c, self.dtype, name="attn")
        if self.windowed:
            y = join_windows(attention(split_windows(y, c.window_size)), x.shape)
        else:
            y = attention(y)
        x = x + y
        y = LayerNorm(c.norm_eps, name="norm2")(x)
        y = Linear((c.dim,), (c.ffn_dim,), ("embed", "ffn"), dtype=self.dtype, name="fc1")(y)
        y = Linear((c.ffn_dim,), (c.dim,), ("ffn", "embed"), dtype=self.dtype, name="fc2")(gelu(y))
        return x + y


def split_windows(x: Float[Array, "B Y X D"], side: int) -> Array:
    """Windows of `side` rows and columns, `(B * windows, side, side, D)`, filled up with zeros at the end."""
    b, rows, columns, d = x.shape
    x = jnp.pad(x, ((0, 0), (0, -rows % side), (0, -columns % side), (0, 0)))
    windows = x.reshape(b, x.shape[1] // side, side, x.shape[2] // side, side, d).swapaxes(2, 3)
    return windows.reshape(-1, side, side, d)


def join_windows(windows: Float[Array, "W Y X D"], shape: tuple[int, ...]) -> Array:
    """The inverse of `split_windows` for its input's shape."""
    b, rows, columns, d = shape
    side = windows.shape[1]
    down, across = -(-rows // side), -(-columns // side)
    x = windows.reshape(b, down, across, side, side, d).swapaxes(2, 3)
    return x.reshape(b, down * side, across * side, d)[:, :rows, :columns]


class ImageEncoder(nn.Module):
    """The whole encoder."""

    config: EncoderConfig
    dtype: jnp.dtype = jnp.dtype("float32")

    @nn.compact
    def __call__(self, images: Float[Array, "B Y X 3"]) -> Array:
        """Maps normalised, padded images to embeddings `(B, grid, grid, out_dim)` of the compute dtype."""
        c = self.config
        x = PatchConv(c.patch_size, c.dim, self.dtype, name="patch_embed")(images)
        shape = (c.grid_size, c.grid_size, c.dim)
        x += self.param("pos_embed", nn.initializers.truncated_normal(0.02), shape).astype(self.dtype)[None]
        for number in range(c.num_layers):
            x = Block(c, number not in c.global_layers, self.dtype, name=f"blocks_{number}")(x)
        axes = ("embed", "channels")
        x = Linear((c.dim,), (c.out_dim,), axes, use_bias=False, dtype=self.dtype, name="neck_conv1")(x)
        x = LayerNorm(1e-6, name="neck_norm1")(x)  # as in transformers, whatever the blocks' is
        x = _Conv3x3(c.out_dim, self.dtype, name="neck_conv2")(x)
        return LayerNorm(1e-6, name="neck_norm2")(x)


class _Conv3x3(nn.Module):
    """A convolution of side 3 without bias: one matmul over shifted copies. Kernel `(3, 3, C, C')`."""

    features: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "B Y X C"]) -> Array:
        init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", in_axis=(0, 1, 2))
        kernel = self.param("kernel", init, (3, 3, x.shape[-1], self.features)).astype(self.dtype)
        rows, columns = x.shape[1:3]
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        shifted = [x[:, i : i + rows, j : j + columns] for i in range(3) for j in range(3)]
        return jnp.einsum(
            "BYXC,CD->BYXD",
            jnp.concatenate(shifted, axis=-1),
            kernel.reshape(-1, self.features),
            precision=matmul_precision(self.dtype),
        )

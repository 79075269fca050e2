"""ConvNeXt-CLIP trunk: an image in, feature maps at strides 4, 8, 16 and 32 out.

Reference: Liu et al., A ConvNet for the 2020s, arXiv 2201.03545; weights as open_clip's
`convnext_large_d_320`.
Differs: NHWC; stem and downsampling are matmuls over patches; the blocks of a stage are scanned, or apart,
which compiles longer and runs faster on CPU, where slices of stacks slow down the kernels; no head. A
fresh `gamma` is 0.5 instead of 1e-6, for only shallow towers are trained from nothing, and briefly.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from osprey_jax.config import VisionConfig
from osprey_jax.models.layers import LayerNorm, Linear, PatchConv, constrain, logical
from osprey_jax.ops.depthwise import depthwise_conv
from osprey_jax.typing import Array, Float


class DepthwiseConv(nn.Module):
    """Depthwise 7x7 convolution with bias."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "B Y X C"]) -> Array:
        channels = x.shape[-1]
        init = nn.initializers.variance_scaling(
            1.0, "fan_in", "truncated_normal", in_axis=(0, 1), out_axis=()
        )
        kernel = self.param(
            "kernel", logical(init, "kernel_rows", "kernel_columns", "channels"), (7, 7, channels)
        )
        bias = self.param("bias", logical(nn.initializers.zeros, "channels"), (channels,))
        # Split over channels it would draw the images after it, and they are larger.
        kernel = constrain(kernel.astype(self.dtype), (None, None, "activation_channels"))
        y = depthwise_conv(x, kernel)
        return y + bias.astype(self.dtype)[None, None, None, :]


class Block(nn.Module):
    """Depthwise convolution, LayerNorm, a fourfold GELU network, layer scale `gamma`, residual."""

    channels: int
    eps: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "B Y X C"], _: None = None) -> tuple[Array, None]:
        c = self.channels
        # Its kernel is small: gathering that is cheaper than moving an image's channels apart and back.
        y = constrain(
            DepthwiseConv(self.dtype, name="dwconv")(x), ("batch", None, None, "activation_channels")
        )
        y = LayerNorm(self.eps, name="norm")(y)
        y = Linear((c,), (4 * c,), ("channels", "channels_ffn"), dtype=self.dtype, name="fc1")(y)
        y = jax.nn.gelu(y, approximate=False)
        y = Linear((4 * c,), (c,), ("channels_ffn", "channels"), dtype=self.dtype, name="fc2")(y)
        gamma = self.param("gamma", logical(nn.initializers.constant(0.5), "channels"), (c,))
        return x + y * gamma.astype(self.dtype)[None, None, None, :], None


class Stage(nn.Module):
    """Optional downsampling by two, then the blocks."""

    depth: int
    channels: int
    eps: float
    dtype: jnp.dtype
    downsample: bool
    scan_blocks: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "B Y X C"]) -> Array:
        if self.downsample:
            x = LayerNorm(self.eps, name="downsample_norm")(x)
            x = PatchConv(2, self.channels, self.dtype, name="downsample_conv")(x)
        block = (self.channels, self.eps, self.dtype)
        if self.scan_blocks:
            blocks = nn.scan(
                Block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=self.depth,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            x, _ = blocks(*block, name="blocks")(x, None)
        else:
            for number in range(self.depth):
                x, _ = Block(*block, name=f"blocks_{number}")(x)
        return constrain(x, ("batch", None, None, "activation_channels"))


class ConvNeXt(nn.Module):
    """The trunk."""

    config: VisionConfig
    dtype: jnp.dtype = jnp.dtype("float32")
    scan_blocks: bool = True
    """Whether parameters of a stage's blocks are stacked."""

    @nn.compact
    def __call__(self, images: Float[Array, "B Y X 3"]) -> tuple[Array, ...]:
        """Maps normalised images to `(res2, res3, res4, res5)`, each `(B, Y, X, C)` of the compute dtype."""
        c = self.config
        x = PatchConv(4, c.dims[0], self.dtype, name="stem_conv")(images.astype(self.dtype))
        x = LayerNorm(c.norm_eps, name="stem_norm")(x)
        levels = []
        for index, (depth, dim) in enumerate(zip(c.depths, c.dims, strict=True)):
            stage = Stage(
                depth, dim, c.norm_eps, self.dtype, index > 0, self.scan_blocks, name=f"stages_{index}"
            )
            x = stage(x)
            levels.append(x)
        return tuple(levels)

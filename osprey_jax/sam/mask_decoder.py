"""SAM's mask decoder: an image's embedding and encoded prompts in, masks and their expected quality out.

Reference: Kirillov et al., Segment Anything, arXiv 2304.02643, appendix A.
Differs: what all prompts share is computed once. Where the image's tokens differ between prompts, they are
not projected to queries, keys and values: a prompt has few tokens, so these take the projections over, which
by associativity is the same and less than half of the arithmetic (`TokenToImage`, `ImageToToken`).
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from osprey_jax.models.layers import LayerNorm, Linear
from osprey_jax.ops.activations import gelu
from osprey_jax.ops.precision import matmul_precision
from osprey_jax.sam.config import DecoderConfig
from osprey_jax.typing import Array, Float


class Affine(nn.Module):
    """A kernel `inputs + outputs` and a bias `outputs`, for those who multiply in an order of their own."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    dtype: jnp.dtype

    @nn.compact
    def __call__(self) -> tuple[Array, Array]:
        """Kernel and bias in the compute dtype."""
        axes = tuple(range(len(self.inputs))), tuple(range(len(self.inputs), len(self.inputs + self.outputs)))
        init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", in_axis=axes[0], out_axis=axes[1])
        kernel = self.param("kernel", init, self.inputs + self.outputs)
        bias = self.param("bias", nn.initializers.zeros, self.outputs)
        return kernel.astype(self.dtype), bias.astype(self.dtype)


class Attention(nn.Module):
    """The parameters of attention with four projections; here, among a prompt's own tokens."""

    dim: int
    num_heads: int
    inner: int
    """Width of queries, keys and values, all heads together."""
    dtype: jnp.dtype

    def setup(self) -> None:
        heads = self.num_heads, self.inner // self.num_heads
        self.q_proj = Affine((self.dim,), heads, self.dtype)
        self.k_proj = Affine((self.dim,), heads, self.dtype)
        self.v_proj = Affine((self.dim,), heads, self.dtype)
        self.out_proj = Affine(heads, (self.dim,), self.dtype)
        self.scale = heads[1] ** -0.5
        self.einsum = partial(jnp.einsum, precision=matmul_precision(self.dtype))

    def project(self, x: Float[Array, "P T D"], affine: Affine) -> Float[Array, "P T N H"]:
        """Queries, keys or values of all heads."""
        kernel, bias = affine()
        return self.einsum("PTD,DNH->PTNH", x, kernel) + bias[None, None]

    def merge(self, x: Float[Array, "P T N H"]) -> Float[Array, "P T D"]:
        """What the heads found, in one."""
        kernel, bias = self.out_proj()
        return self.einsum("PTNH,NHD->PTD", x, kernel) + bias[None, None]

    def softmax(self, scores: Array, axis: int = -1) -> Array:
        """In float32."""
        return jax.nn.softmax(scores.astype(jnp.float32), axis=axis).astype(self.dtype)

    def __call__(self, q: Float[Array, "P T D"], k: Float[Array, "P S D"], v: Float[Array, "P S D"]) -> Array:
        """Plain attention."""
        q = self.project(q, self.q_proj) * self.scale
        scores = self.einsum("PTNH,PSNH->PNTS", q, self.project(k, self.k_proj))
        return self.merge(self.einsum("PNTS,PSNH->PTNH", self.softmax(scores), self.project(v, self.v_proj)))


class TokenToImage(Attention):
    """A prompt's tokens attend to the image's.

    Where each prompt has image tokens `x` of its own, scores are `(q W_kᵀ) xᵀ` instead of `q (x W_k)ᵀ`, and
    results `(weights x) W_v`. The keys' bias adds the same to all scores of a query, so it is left out.
    """

    def __call__(self, q: Float[Array, "P T D"], k: Float[Array, "Q S D"], v: Float[Array, "Q S D"]) -> Array:
        """Queries of `P` prompts; keys and values of each (`Q = P`) or of all (`Q = 1`)."""
        q = self.project(q, self.q_proj) * self.scale
        if len(k) == 1:
            scores = self.einsum("PTNH,SNH->PNTS", q, self.project(k, self.k_proj)[0])
            values = self.project(v, self.v_proj)[0]
            return self.merge(self.einsum("PNTS,SNH->PTNH", self.softmax(scores), values))
        p, t, n, _ = q.shape
        (key, _), (value, bias) = self.k_proj(), self.v_proj()
        q = self.einsum("PTNH,DNH->PNTD", q, key).reshape(p, n * t, self.dim)
        weights = self.softmax(self.einsum("PQD,PSD->PQS", q, k))
        found = self.einsum("PQS,PSD->PQD", weights, v).reshape(p, n, t, self.dim)
        return self.merge(self.einsum("PNTD,DNH->PTNH", found, value) + bias[None, None])


class ImageToToken(Attention):
    """The image's tokens attend to a prompt's, with the projections on the side of the prompt's."""

    def __call__(self, q: Float[Array, "Q S D"], k: Float[Array, "P T D"], v: Float[Array, "P T D"]) -> Array:
        """Queries of each of `P` prompts (`Q = P`) or of all (`Q = 1`); gives `(P, S, D)`."""
        keys, values = self.project(k, self.k_proj) * self.scale, self.project(v, self.v_proj)
        p, t, n, _ = keys.shape
        kernel, bias = self.q_proj()
        if len(q) == 1:
            scores = self.einsum("SNH,PTNH->PSNT", self.project(q, self.q_proj)[0], keys)
        else:
            keys_in = self.einsum("PTNH,DNH->PDNT", keys, kernel).reshape(p, self.dim, n * t)
            scores = self.einsum("PSD,PDK->PSK", q, keys_in).reshape(p, -1, n, t)
            scores += self.einsum("PTNH,NH->PNT", keys, bias)[:, None]
        weights = self.softmax(scores).reshape(p, -1, n * t)
        kernel, bias = self.out_proj()
        values = self.einsum("PTNH,NHD->PNTD", values, kernel).reshape(p, n * t, self.dim)
        return self.einsum("PSK,PKD->PSD", weights, values) + bias[None, None]


class Mlp(nn.Module):
    """Linear layers with ReLU between them."""

    dims: tuple[int, ...]
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Array:
        for number, (inputs, outputs) in enumerate(zip(self.dims, self.dims[1:], strict=False)):
            x = jax.nn.relu(x) if number else x
            axes = ("embed", "ffn")
            x = Linear((inputs,), (outputs,), axes, dtype=self.dtype, name=f"layers_{number}")(x)
        return x


class Layer(nn.Module):
    """The prompt's tokens among themselves, to the image and through a network; the image to them."""

    config: DecoderConfig
    dim: int
    first: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, tokens: Array, image: Array, prompt: Array, places: Array) -> tuple[Array, Array]:
        """Tokens `(P, T, D)` and image tokens `(Q, S, D)`, and the same before the first layer.

        `prompt` `(P, T, D)` and `places` `(1, S, D)` are added to queries and keys.
        """
        c = self.config
        inner = self.dim // c.attention_reduction
        x = tokens if self.first else tokens + prompt
        attended = Attention(self.dim, c.num_heads, self.dim, self.dtype, name="self_attn")(x, x, tokens)
        tokens = LayerNorm(c.norm_eps, name="norm1")(attended if self.first else tokens + attended)
        cross = TokenToImage(self.dim, c.num_heads, inner, self.dtype, name="token_to_image")
        tokens += cross(tokens + prompt, image + places, image)
        tokens = LayerNorm(c.norm_eps, name="norm2")(tokens)
        tokens += Mlp((self.dim, c.ffn_dim, self.dim), self.dtype, name="mlp")(tokens)
        tokens = LayerNorm(c.norm_eps, name="norm3")(tokens)
        back = ImageToToken(self.dim, c.num_heads, inner, self.dtype, name="image_to_token")
        image = image + back(image + places, tokens + prompt, tokens)
        return tokens, LayerNorm(c.norm_eps, name="norm4")(image)


class Upscale(nn.Module):
    """A transposed convolution of side and stride 2: a matmul, whose places stay axes of their own."""

    features: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "P Y X ... C"]) -> Float[Array, "P Y X ... 2 2 D"]:
        """Gives each place's two rows and two columns. Kernel `(C, 2, 2, D)`."""
        axes = ("channels_in", "kernel_rows", "kernel_columns", "channels")
        outputs = 2, 2, self.features
        y = Linear((x.shape[-1],), outputs, axes, use_bias=False, dtype=self.dtype, name="conv")(x)
        bias = self.param("bias", nn.initializers.zeros, (self.features,)).astype(y.dtype)
        return y + bias.reshape((1,) * (y.ndim - 1) + (-1,))


class MaskDecoder(nn.Module):
    """The whole decoder; `dim` is the width of the embeddings that it takes."""

    config: DecoderConfig
    dim: int
    dtype: jnp.dtype = jnp.dtype("float32")

    @nn.compact
    def __call__(
        self, image: Float[Array, "Q Y X D"], places: Float[Array, "Y X D"], prompt: Float[Array, "P T D"]
    ) -> tuple[Array, Array]:
        """Masks for `P` prompts about one image.

        Args:
          image: its embedding with that of mask prompts added, one for each prompt (`Q = P`), or one for all.
          places: the encoding of the patches' places.
          prompt: encoded points and boxes, of which there may be none.

        Returns: logits `(P, M, 4Y, 4X)` of the mask for clear prompts and of the `num_masks` for ambiguous
        ones, and the IoU that each expects of itself, `(P, M)`; float32.
        """
        c, dim, count = self.config, self.dim, self.config.num_masks + 1
        rows, columns = image.shape[1:3]
        normal = nn.initializers.normal(1.0)
        iou_token = self.param("iou_token", normal, (1, dim))
        mask_tokens = self.param("mask_tokens", normal, (count, dim))
        own = jnp.concatenate([iou_token, mask_tokens]).astype(self.dtype)
        own = jnp.broadcast_to(own, (len(prompt), *own.shape))
        tokens = prompt = jnp.concatenate([own, prompt], axis=1)
        image, places = image.reshape(len(image), -1, dim), places.reshape(1, -1, dim)
        for number in range(c.num_layers):
            layer = Layer(c, dim, number == 0, self.dtype, name=f"layers_{number}")
            tokens, image = layer(tokens, image, prompt, places)
        inner = dim // c.attention_reduction
        final = TokenToImage(dim, c.num_heads, inner, self.dtype, name="final_token_to_image")
        tokens += final(tokens + prompt, image + places, image)
        tokens = LayerNorm(1e-5, name="final_norm")(tokens)  # torch's default, in transformers as well

        x = image.reshape(-1, rows, columns, dim)
        x = Upscale(dim // 4, self.dtype, name="upscale_conv1")(x)
        x = gelu(LayerNorm(1e-6, name="upscale_norm")(x))
        x = gelu(Upscale(fewer := dim // 8, self.dtype, name="upscale_conv2")(x))
        weights = [
            Mlp((dim, dim, dim, fewer), self.dtype, name=f"hypernetworks_{number}")(tokens[:, 1 + number])
            for number in range(count)
        ]
        logits = jnp.einsum(
            "PYXabcdC,PMC->PMYacXbd",
            x,
            jnp.stack(weights, axis=1),
            precision=matmul_precision(self.dtype),
            preferred_element_type=jnp.float32,
        )
        logits = logits.reshape(len(prompt), count, 4 * rows, 4 * columns)
        hidden = (c.iou_dim,) * (c.iou_layers - 1)
        iou = Mlp((dim, *hidden, count), self.dtype, name="iou_head")(tokens[:, 0])
        return logits, iou.astype(jnp.float32)

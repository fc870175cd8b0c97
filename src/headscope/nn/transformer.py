"""The Transformer: an encoder, a decoder, or both, built from MultiHeadAttention (arXiv 1706.03762).

Read it from top to bottom. A text is a row of token ids. The embedding turns each id into a vector, and the position
is added to it. The layers follow one after another. In each layer, attention mixes the vectors of different positions,
then the feed-forward part transforms each vector by itself. At the end, the product of each vector with all embeddings
gives the logits of the tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from headscope.nn.cache import KVCache
from headscope.nn.multihead import MultiHeadAttention
from headscope.ops.masks import Mask, causal
from headscope.ops.positions import Alibi, Rotary, alibi, alibi_slopes, rotary, sinusoidal


@dataclass(frozen=True)
class TransformerConfig:
    """The sizes of a Transformer; the defaults are those of the paper's base model.

    Attributes:
        vocab_size: V, the number of different tokens.
        kind: "encoder-decoder" reads one text and writes another; "decoder" continues a text; "encoder" only reads.
        embed_dim: E, the width of each position's vector.
        num_heads: H, attention heads, each of size E / H.
        num_kv_heads: G, key/value heads, each shared by H / G query heads; H by default.
        num_layers: The number of layers; an encoder-decoder has as many on each side.
        ff_dim: The inner width of the feed-forward part.
        norm: "post", as in the paper, or "pre": before each part, which trains without a long warm-up
            (arXiv 2002.04745).
        position: The kind of positions: "sinusoidal", "rotary", "alibi" or "none".
        dropout_p: The share of values that are dropped in training after each part.
        max_length: The largest number of tokens in a text.
        qk_norm: Whether queries and keys are RMS-normalised per head, which bounds the logits of the attention.

    Raises:
        ValueError: numbers out of range; an embed_dim that is no multiple of num_heads.
    """

    vocab_size: int
    kind: Literal["encoder-decoder", "decoder", "encoder"] = "encoder-decoder"
    embed_dim: int = 512
    num_heads: int = 8
    num_kv_heads: int | None = None
    num_layers: int = 6
    ff_dim: int = 2048
    norm: Literal["pre", "post"] = "pre"
    position: Literal["sinusoidal", "rotary", "alibi", "none"] = "sinusoidal"
    dropout_p: float = 0.1
    max_length: int = 2048
    qk_norm: bool = False

    def __post_init__(self) -> None:
        choices = {
            "kind": ("encoder-decoder", "decoder", "encoder"),
            "norm": ("pre", "post"),
            "position": ("sinusoidal", "rotary", "alibi", "none"),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}: it is one of {', '.join(known)}.")
        for name in ("vocab_size", "embed_dim", "num_heads", "num_layers", "ff_dim", "max_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: at least 1.")
        if self.embed_dim % self.num_heads:
            raise ValueError(
                f"embed_dim {self.embed_dim} cannot be cut into {self.num_heads} heads: make it a multiple of them."
            )
        if not 0 <= self.dropout_p < 1:
            raise ValueError(
                f"dropout_p is {self.dropout_p}: the share of dropped values must be at least 0 and below 1."
            )


class Transformer(nn.Module):
    """The whole model: from tokens to logits for each position.

    Args:
        config: The sizes.

    Example:
        >>> import torch
        >>> config = TransformerConfig(vocab_size=100, embed_dim=32, num_heads=4, num_layers=2, ff_dim=64)
        >>> model = Transformer(config).eval()
        >>> source, target = torch.randint(100, (3, 9)), torch.randint(100, (3, 5))
        >>> model(target, source).shape
        torch.Size([3, 5, 100])
        >>> model.generate(target, source, max_new_tokens=4).shape
        torch.Size([3, 9])
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.embed_dim)
        nn.init.normal_(self.embedding.weight, std=config.embed_dim**-0.5)
        self.dropout = nn.Dropout(config.dropout_p)
        has_both = config.kind == "encoder-decoder"
        self.encoder = Stack(config, has_cross_attention=False) if config.kind != "decoder" else None
        self.decoder = Stack(config, has_cross_attention=has_both) if config.kind != "encoder" else None

    def forward(
        self,
        tokens: Int[Tensor, "B L"],
        source: Int[Tensor, "B S"] | None = None,
        *,
        mask: Mask | None = None,
        source_mask: Mask | None = None,
        cache: list[LayerCache] | None = None,
    ) -> Float[Tensor, "B L V"]:
        """Logits [B, L, V]: in a decoder of the next token after each position, in an encoder of the token itself.

        Args:
            tokens: [B, L]; the text to continue, or the text that an encoder reads.
            source: [B, S], the text that the encoder of an encoder-decoder reads.
            mask: which tokens are visible, such as ``masks.padding(lengths)``; a decoder is causal anyway.
            source_mask: which tokens of the source are visible.
            cache: from :meth:`new_cache`; ``tokens`` are then the next ones. Each call encodes the source, though only
                the first uses it: to encode it once, call :meth:`encode` and :meth:`decode`.

        Raises:
            ValueError: a source for a model without cross-attention, or none for a model with it; tokens outside the
                vocabulary; a text that is too long.
        """
        self._check_source(source)
        if self.decoder is None:
            return self.logits(self.encode(tokens, mask))
        memory = None if source is None else self.encode(source, source_mask)
        return self.logits(self.decode(tokens, memory, mask=mask, memory_mask=source_mask, cache=cache))

    def encode(self, tokens: Int[Tensor, "B S"], mask: Mask | None = None) -> Float[Tensor, "B S E"]:
        """The output of the encoder for a text. Raises ValueError if there is no encoder."""
        if self.encoder is None:
            raise ValueError("a Transformer of kind 'decoder' has no encoder.")
        return self.encoder(self._embed(tokens, 0), mask)

    def decode(
        self,
        tokens: Int[Tensor, "B L"],
        memory: Float[Tensor, "B S E"] | None = None,
        *,
        mask: Mask | None = None,
        memory_mask: Mask | None = None,
        cache: list[LayerCache] | None = None,
    ) -> Float[Tensor, "B L E"]:
        """The output of the decoder for a text and the encoder's output. Raises ValueError if there is no decoder."""
        if self.decoder is None:
            raise ValueError("a Transformer of kind 'encoder' has no decoder: it cannot write.")
        self._check_source(memory)
        if cache is not None and len(cache) != self.config.num_layers:
            raise ValueError(f"the cache is of {len(cache)} layers, the model has {self.config.num_layers}.")
        x = self._embed(tokens, 0 if cache is None else cache[0].self_attention.length)
        mask = causal() if mask is None else causal() & mask
        return self.decoder(x, mask, memory, memory_mask, cache)

    def logits(self, x: Float[Tensor, "*B E"]) -> Float[Tensor, "*B V"]:
        """The product of each vector with the embedding of each token."""
        return F.linear(x, self.embedding.weight)

    def new_cache(self, max_length: int | None = None) -> list[LayerCache]:
        """An empty cache for each decoder layer, for ``max_length`` positions (by default the config's)."""
        length = self.config.max_length if max_length is None else max_length
        return [LayerCache(KVCache(length), KVCache(length)) for _ in range(self.config.num_layers)]

    @torch.no_grad()
    def generate(
        self,
        tokens: Int[Tensor, "B P"],
        source: Int[Tensor, "B S"] | None = None,
        *,
        max_new_tokens: int,
        lengths: Int[Tensor, " B"] | Sequence[int] | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        stop_token: int | None = None,
        source_mask: Mask | None = None,
        generator: torch.Generator | None = None,
    ) -> Int[Tensor, "B N"]:
        """The text with up to ``max_new_tokens`` more tokens, generated one after another with a cache.

        Args:
            tokens: [B, P], the prompts; at least one token per row.
            source: [B, S], for an encoder-decoder.
            max_new_tokens: the largest number of new tokens.
            lengths: [B], the lengths of the prompts, if they are not all P; tokens after a prompt are ignored. Each row
                continues from its own end, and all end at P + ``max_new_tokens``.
            temperature: 0 takes the likeliest token; 1 samples from the model's distribution; above 1 it is flatter.
            top_p: sample from the likeliest tokens that together have this probability (arXiv 1904.09751).
            stop_token: ends a row, and fills the rest of it.
            source_mask: which tokens of the source are visible.
            generator: random numbers for sampling.

        Raises:
            ValueError: options or lengths out of range; a model without a decoder; a text that gets too long.
        """
        if not 0 <= temperature < math.inf or not 0 < top_p <= 1 or max_new_tokens < 1:
            raise ValueError(
                f"temperature {temperature}, top_p {top_p}, max_new_tokens {max_new_tokens}: they must be a number of "
                "at least 0, above 0 up to 1, and at least 1."
            )
        prompt, is_prompt = _prompt(tokens, lengths, max_new_tokens)
        self._check_tokens(prompt, prompt.shape[-1])
        memory = None if source is None else self.encode(source, source_mask)
        cache = self.new_cache(prompt.shape[1])
        done = torch.zeros(len(tokens), 1, dtype=torch.bool, device=tokens.device)
        shortest = int(is_prompt.all(0).sum())
        text = new = prompt[:, :shortest]
        for i in range(shortest, prompt.shape[1]):
            x = self.decode(new, memory, memory_mask=source_mask, cache=cache)
            new = _next_token(self.logits(x[:, -1]), temperature, top_p, generator)
            if stop_token is not None:
                new = torch.where(done, stop_token, new)
                done = done | ((new == stop_token) & ~is_prompt[:, i : i + 1])
            new = torch.where(is_prompt[:, i : i + 1], prompt[:, i : i + 1], new)
            text = torch.cat((text, new), 1)
            if bool(done.all()):
                break
        return text

    def _check_source(self, source: Tensor | None) -> None:
        if (source is None) == (self.config.kind == "encoder-decoder"):
            wanted = "needs" if source is None else "has no place for"
            raise ValueError(f"a Transformer of kind {self.config.kind!r} {wanted} a source.")

    def _embed(self, tokens: Tensor, first: int) -> Tensor:
        """Vectors [B, L, E] of tokens at the positions from ``first`` on."""
        c = self.config
        self._check_tokens(tokens, first + tokens.shape[-1])
        x = self.embedding(tokens) * math.sqrt(c.embed_dim)
        if c.position == "sinusoidal":
            x = x + sinusoidal(tokens.shape[1], c.embed_dim, first).to(x.device, x.dtype)
        return self.dropout(x)

    def _check_tokens(self, tokens: Tensor, length: int) -> None:
        """Raise ValueError unless tokens are a batch from the vocabulary and ``length`` is at most max_length."""
        c = self.config
        if tokens.dim() != 2 or tokens.shape[1] == 0:
            raise ValueError(f"tokens have shape {tuple(tokens.shape)}, wanted [batch, length], at least one token.")
        if length > c.max_length:
            raise ValueError(f"the text has {length} tokens, the model takes {c.max_length}: make max_length larger.")
        if not len(tokens):
            return
        low, high = (int(end) for end in tokens.aminmax())
        if low < 0 or high >= c.vocab_size:
            raise ValueError(f"tokens run from {low} to {high}; the vocabulary is 0 to {c.vocab_size - 1}.")


class Stack(nn.Module):
    """The layers of the encoder or decoder; with norms before the parts, one more norm follows the last layer."""

    def __init__(self, config: TransformerConfig, has_cross_attention: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(TransformerLayer(config, has_cross_attention) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.embed_dim) if config.norm == "pre" else nn.Identity()

    def forward(
        self,
        x: Float[Tensor, "B L E"],
        mask: Mask | None,
        memory: Float[Tensor, "B S E"] | None = None,
        memory_mask: Mask | None = None,
        cache: list[LayerCache] | None = None,
    ) -> Float[Tensor, "B L E"]:
        """The output of the last layer."""
        for i, layer in enumerate(self.layers):
            x = layer(x, mask, memory, memory_mask, None if cache is None else cache[i])
        return self.norm(x)


class TransformerLayer(nn.Module):
    """Attention, then the feed-forward part, each with a residual connection and a norm."""

    def __init__(self, config: TransformerConfig, has_cross_attention: bool) -> None:
        super().__init__()
        c = config
        attention = partial(
            MultiHeadAttention, c.embed_dim, c.num_heads, num_kv_heads=c.num_kv_heads, qk_norm=c.qk_norm
        )
        self.self_attention = attention(position=_position(c))
        self.cross_attention = attention(packed=False) if has_cross_attention else None
        self.feed_forward = nn.Sequential(nn.Linear(c.embed_dim, c.ff_dim), nn.ReLU(), nn.Linear(c.ff_dim, c.embed_dim))
        self.norms = nn.ModuleList(nn.LayerNorm(c.embed_dim) for _ in range(3 if has_cross_attention else 2))
        self.dropout = nn.Dropout(c.dropout_p)
        self.norm_first = c.norm == "pre"

    def forward(
        self,
        x: Float[Tensor, "B L E"],
        mask: Mask | None,
        memory: Float[Tensor, "B S E"] | None = None,
        memory_mask: Mask | None = None,
        cache: LayerCache | None = None,
    ) -> Float[Tensor, "B L E"]:
        """The layer's output; ``memory`` is the output of the encoder for the source."""
        self_attention, cross_attention = self.self_attention, self.cross_attention
        self_cache, cross_cache = (None, None) if cache is None else (cache.self_attention, cache.cross_attention)
        x = self._residual(x, self.norms[0], lambda y: self_attention(y, mask=mask, cache=self_cache))
        if cross_attention is not None:
            x = self._residual(
                x, self.norms[2], lambda y: cross_attention(y, memory, mask=memory_mask, cache=cross_cache)
            )
        return self._residual(x, self.norms[1], self.feed_forward)

    def _residual(self, x: Tensor, norm: nn.Module, part: Callable[[Tensor], Tensor]) -> Tensor:
        """The sum x + part(x), with the norm before or after."""
        if self.norm_first:
            return x + self.dropout(part(norm(x)))
        return norm(x + self.dropout(part(x)))


def _position(config: TransformerConfig) -> Rotary | Alibi | None:
    if config.position == "rotary":
        return rotary()
    return alibi(alibi_slopes(config.num_heads)) if config.position == "alibi" else None


@dataclass
class LayerCache:
    """The caches of one decoder layer: for its self-attention and for its cross-attention."""

    self_attention: KVCache
    cross_attention: KVCache


def _prompt(tokens: Tensor, lengths: Tensor | Sequence[int] | None, more: int) -> tuple[Tensor, Tensor]:
    """The prompts padded by ``more`` tokens, [B, P + more], and whether each token is one of the prompt."""
    if tokens.dim() != 2:
        raise ValueError(f"tokens have shape {tuple(tokens.shape)}, wanted [batch, length], at least one token.")
    batch, longest = tokens.shape
    lengths = torch.full((batch,), longest) if lengths is None else torch.as_tensor(lengths)
    if (
        lengths.shape != (batch,)
        or lengths.is_floating_point()
        or not bool(((lengths >= 1) & (lengths <= longest)).all())
    ):
        raise ValueError(
            f"lengths are {lengths.tolist()}, tokens have shape {tuple(tokens.shape)}: give each of the {batch} rows "
            f"a whole number from 1 to {longest}."
        )
    is_prompt = torch.arange(longest + more, device=tokens.device) < lengths.to(tokens.device)[:, None]
    return F.pad(tokens, (0, more)).masked_fill(~is_prompt, 0), is_prompt


def _next_token(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None) -> Tensor:
    """One token per row, [B, 1], from logits [B, V]."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    probabilities, order = (logits.float() / temperature).softmax(-1).sort(-1, descending=True)
    probabilities[probabilities.cumsum(-1) - probabilities >= top_p] = 0  # likelier tokens have top_p already
    return order.gather(-1, probabilities.multinomial(1, generator=generator))

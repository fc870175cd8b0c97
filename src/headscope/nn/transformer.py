"""The Transformer: an encoder, a decoder, or both, built from MultiHeadAttention (arXiv 1706.03762).

Read it from top to bottom. A text is a row of token numbers. Each number becomes a vector (the embedding), to which
its position is added. Then come the layers, one after another: in each, every position first takes from the others
what its heads attend to (attention), then works on what it has (the feed-forward part). At the end each vector is
compared with all embeddings: the scores, called logits, of what comes there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
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

__all__ = ["LayerCache", "Transformer", "TransformerConfig"]


@dataclass(frozen=True)
class TransformerConfig:
    """The sizes of a Transformer; the defaults are those of the paper's base model.

    Attributes:
        vocab_size: How many different tokens there are.
        kind: "encoder-decoder" reads one text and writes another; "decoder" writes on from a text; "encoder" reads.
        embed_dim: E, the width of each position's vector.
        num_heads: H, attention heads, each of size E / H.
        num_kv_heads: G, key/value heads shared among them; H unless given.
        num_layers: Layers; an encoder-decoder has as many on each side.
        ff_dim: The width inside the feed-forward part.
        norm: "post", as in the paper, or "pre": before each part, which trains without a long warm-up
            (arXiv 2002.04745).
        position: How positions enter: "sinusoidal", "rotary", "alibi" or "none".
        dropout_p: Share of the numbers that are dropped in training after each part.
        max_length: The longest text.
        qk_norm: Whether queries and keys are brought to one size, which keeps logits from exploding.

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
            raise ValueError(f"dropout_p is {self.dropout_p}: a share of the numbers, from 0 up to but not 1.")


@dataclass
class LayerCache:
    """What one decoder layer remembers while a text grows: its own positions, and those of the source."""

    own: KVCache
    source: KVCache


class Layer(nn.Module):
    """Attention, then the feed-forward part; each adds to what was there, and a norm keeps its size."""

    def __init__(self, config: TransformerConfig, across: bool) -> None:
        super().__init__()
        c = config
        heads = partial(MultiHeadAttention, c.embed_dim, c.num_heads, num_kv_heads=c.num_kv_heads, qk_norm=c.qk_norm)
        self.self_attention = heads(position=_position(c))
        self.cross_attention = heads() if across else None
        self.feed_forward = nn.Sequential(nn.Linear(c.embed_dim, c.ff_dim), nn.ReLU(), nn.Linear(c.ff_dim, c.embed_dim))
        self.norms = nn.ModuleList(nn.LayerNorm(c.embed_dim) for _ in range(3 if across else 2))
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
        """One layer; ``memory`` is what the encoder made of the source."""
        own, source = (None, None) if cache is None else (cache.own, cache.source)
        x = self._add(x, self.norms[0], lambda y: self.self_attention(y, mask=mask, cache=own))
        cross = self.cross_attention
        if cross is not None:
            x = self._add(x, self.norms[2], lambda y: cross(y, memory, mask=memory_mask, cache=source))
        return self._add(x, self.norms[1], self.feed_forward)

    def _add(self, x: Tensor, norm: nn.Module, part: Callable[[Tensor], Tensor]) -> Tensor:
        if self.norm_first:
            return x + self.dropout(part(norm(x)))
        return norm(x + self.dropout(part(x)))


class Stack(nn.Module):
    """One side's layers, one after another; where norms come first, the last layer's result needs one more."""

    def __init__(self, config: TransformerConfig, across: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(config, across) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.embed_dim) if config.norm == "pre" else nn.Identity()

    def forward(
        self,
        x: Float[Tensor, "B L E"],
        mask: Mask | None,
        memory: Float[Tensor, "B S E"] | None = None,
        memory_mask: Mask | None = None,
        cache: list[LayerCache] | None = None,
    ) -> Float[Tensor, "B L E"]:
        """All layers."""
        for i, layer in enumerate(self.layers):
            x = layer(x, mask, memory, memory_mask, None if cache is None else cache[i])
        return self.norm(x)


class Transformer(nn.Module):
    """The whole model: tokens in, for each position a score for each token out.

    Args:
        config: Its sizes.

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
        both = config.kind == "encoder-decoder"
        self.encoder = Stack(config, across=False) if config.kind != "decoder" else None
        self.decoder = Stack(config, across=both) if config.kind != "encoder" else None

    def forward(
        self,
        tokens: Int[Tensor, "B L"],
        source: Int[Tensor, "B S"] | None = None,
        *,
        mask: Mask | None = None,
        source_mask: Mask | None = None,
        cache: list[LayerCache] | None = None,
    ) -> Float[Tensor, "B L V"]:
        """Logits [B, L, vocab_size]: in a decoder those of the token after each position, in an encoder of its own.

        Args:
            tokens: [B, L]; the text to write on, or to read in an encoder.
            source: [B, S], the text an encoder-decoder reads.
            mask: which of the tokens may be seen, such as ``masks.padding(lengths)``; a decoder looks back only.
            source_mask: which of the source's may be seen.
            cache: from :meth:`new_cache`; ``tokens`` are then those that come next. The source is then encoded at each
                call, though only the first one's is read: give :meth:`decode` the memory that :meth:`encode` made once.

        Raises:
            ValueError: a source where none is read or none where one is; tokens that are not in the vocabulary; a
                text that is too long.
        """
        self._check_source(source)
        if self.decoder is None:
            return self.logits(self.encode(tokens, mask))
        memory = None if source is None else self.encode(source, source_mask)
        return self.logits(self.decode(tokens, memory, mask=mask, memory_mask=source_mask, cache=cache))

    def encode(self, tokens: Int[Tensor, "B S"], mask: Mask | None = None) -> Float[Tensor, "B S E"]:
        """What the encoder makes of a text. Raises ValueError if there is no encoder."""
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
        """What the decoder makes of a text and of the encoder's memory. Raises ValueError if there is no decoder."""
        if self.decoder is None:
            raise ValueError("a Transformer of kind 'encoder' has no decoder: it reads, and writes nothing.")
        self._check_source(memory)
        if cache is not None and len(cache) != self.config.num_layers:
            raise ValueError(f"the cache is of {len(cache)} layers, the model has {self.config.num_layers}.")
        x = self._embed(tokens, 0 if cache is None else cache[0].own.length)
        mask = causal() if mask is None else causal() & mask
        return self.decoder(x, mask, memory, memory_mask, cache)

    def logits(self, x: Float[Tensor, "*B E"]) -> Float[Tensor, "*B V"]:
        """Each vector against the embedding of each token."""
        return F.linear(x, self.embedding.weight)

    def new_cache(self, max_length: int | None = None) -> list[LayerCache]:
        """An empty cache for each decoder layer, with room for ``max_length`` positions (the config's)."""
        room = self.config.max_length if max_length is None else max_length
        return [LayerCache(KVCache(room), KVCache(room)) for _ in range(self.config.num_layers)]

    @torch.no_grad()
    def generate(
        self,
        tokens: Int[Tensor, "B P"],
        source: Int[Tensor, "B S"] | None = None,
        *,
        max_new_tokens: int,
        lengths: Int[Tensor, " B"] | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        stop_token: int | None = None,
        source_mask: Mask | None = None,
        generator: torch.Generator | None = None,
    ) -> Int[Tensor, "B N"]:
        """The text with up to ``max_new_tokens`` more tokens, one after another, with a cache.

        Args:
            tokens: [B, P], at least one token a row to begin with.
            source: [B, S], for an encoder-decoder.
            max_new_tokens: how many are added at most.
            lengths: [B], how many tokens of each row there are to begin with, where not all have P; what stands behind
                them is not looked at. Each row writes on from its own end, and all end at P + ``max_new_tokens``.
            temperature: 0 takes the likeliest; 1 draws from the model's own shares; above, more evenly.
            top_p: draw from the likeliest tokens that together have this share (arXiv 1904.09751).
            stop_token: a row that has written it is done; it is filled up with it.
            source_mask: which of the source's tokens may be seen.
            generator: for drawing.

        Raises:
            ValueError: options or lengths out of range; a model that cannot write; a text that gets too long.
        """
        if not 0 <= temperature < math.inf or not 0 < top_p <= 1 or max_new_tokens < 1:
            raise ValueError(
                f"temperature {temperature}, top_p {top_p}, max_new_tokens {max_new_tokens}: they must be a number of "
                "at least 0, above 0 up to 1, and at least 1."
            )
        prompt, given = _prompt(tokens, lengths, max_new_tokens)
        self._check_tokens(prompt, prompt.shape[-1])
        memory = None if source is None else self.encode(source, source_mask)
        cache = self.new_cache(prompt.shape[1])
        done = torch.zeros(len(tokens), 1, dtype=torch.bool, device=tokens.device)
        shortest = int(given.all(0).sum())
        text = new = prompt[:, :shortest]
        for i in range(shortest, prompt.shape[1]):
            x = self.decode(new, memory, memory_mask=source_mask, cache=cache)
            new = _choose(self.logits(x[:, -1]), temperature, top_p, generator)
            if stop_token is not None:
                new = torch.where(done, stop_token, new)
                done = done | ((new == stop_token) & ~given[:, i : i + 1])
            new = torch.where(given[:, i : i + 1], prompt[:, i : i + 1], new)
            text = torch.cat((text, new), 1)
            if bool(done.all()):
                break
        return text

    def _check_source(self, source: Tensor | None) -> None:
        if (source is None) == (self.config.kind == "encoder-decoder"):
            wanted = "needs" if source is None else "has no place for"
            raise ValueError(f"a Transformer of kind {self.config.kind!r} {wanted} a source.")

    def _embed(self, tokens: Tensor, first: int) -> Tensor:
        """Vectors [B, L, E] for tokens whose first stands at position ``first``."""
        c = self.config
        self._check_tokens(tokens, first + tokens.shape[-1])
        x = self.embedding(tokens) * math.sqrt(c.embed_dim)
        if c.position == "sinusoidal":
            x = x + sinusoidal(tokens.shape[1], c.embed_dim, first).to(x.device, x.dtype)
        return self.dropout(x)

    def _check_tokens(self, tokens: Tensor, length: int) -> None:
        """Raise ValueError unless they are a batch of texts in the vocabulary, and ``length`` is not too long."""
        c = self.config
        if tokens.dim() != 2 or 0 in tokens.shape:
            raise ValueError(f"tokens have shape {tuple(tokens.shape)}, wanted [batch, length], both above 0.")
        if length > c.max_length:
            raise ValueError(f"the text has {length} tokens, the model takes {c.max_length}: make max_length larger.")
        low, high = (int(end) for end in tokens.aminmax())
        if low < 0 or high >= c.vocab_size:
            raise ValueError(f"tokens run from {low} to {high}; the vocabulary is 0 to {c.vocab_size - 1}.")


def _position(config: TransformerConfig) -> Rotary | Alibi | None:
    if config.position == "rotary":
        return rotary()
    return alibi(alibi_slopes(config.num_heads)) if config.position == "alibi" else None


def _prompt(tokens: Tensor, lengths: Tensor | None, more: int) -> tuple[Tensor, Tensor]:
    """The texts with room for ``more`` tokens, [B, P + more], 0 where nothing is given; and where something is."""
    if tokens.dim() != 2:
        raise ValueError(f"tokens have shape {tuple(tokens.shape)}, wanted [batch, length], both above 0.")
    batch, longest = tokens.shape
    if lengths is None:
        lengths = torch.full((batch,), longest)
    if lengths.shape != (batch,) or not bool(((lengths >= 1) & (lengths <= longest)).all()):
        raise ValueError(
            f"lengths are {lengths.tolist()}, tokens have shape {tuple(tokens.shape)}: give each of the {batch} rows "
            f"one, from 1 to {longest}."
        )
    at = torch.arange(longest + more, device=tokens.device)
    given = at < lengths.to(tokens.device)[:, None]
    return nn.functional.pad(tokens, (0, more)).masked_fill(~given, 0), given


def _choose(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None) -> Tensor:
    """One token a row, [B, 1], from logits [B, V]."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    shares, order = (logits.float() / temperature).softmax(-1).sort(-1, descending=True)
    shares[shares.cumsum(-1) - shares >= top_p] = 0  # those before the token have top_p already
    return order.gather(-1, shares.multinomial(1, generator=generator))

"""What a link between two words is worth: the next token's distribution with and without it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from headscope.errors import EditError
from headscope.heads.effects.batched import BatchedForwards, ChangedRow, clean_forward
from headscope.heads.effects.metrics import forward_options, run_model
from headscope.watching.edits import KnockOut, edit, knock_out
from headscope.watching.hooks import AttentionCall
from headscope.watching.recording import Layers, Position

Positions = int | Iterable[int]


@dataclass(frozen=True)
class TokenChange:
    """The probability that a token comes next, with the link and without it."""

    token_id: int
    clean: float
    edited: float

    @property
    def change(self) -> float:
        """Without it minus with it."""
        return self.edited - self.clean


@dataclass(frozen=True)
class LinkEffect:
    """The effect of hiding a link.

    Attributes:
        kl: KL(with ‖ without) of the next token after the text, in nats.
        clean: the most likely next tokens with the link, as (token id, probability), the most likely first.
        edited: the same without it.
        changes: every token of the two lists, largest change of probability first.
    """

    kl: float
    clean: tuple[tuple[int, float], ...]
    edited: tuple[tuple[int, float], ...]
    changes: tuple[TokenChange, ...]


@dataclass(frozen=True, eq=False)
class LinkEffects:
    """The effects of hiding a link in each head, in each layer, and everywhere: KL(with ‖ without) in nats.

    Attributes:
        heads: [layers, H]; NaN where a site has fewer heads than others.
        layers: [layers], hidden in all heads of that site.
        everywhere: hidden in all heads of all sites.
        notes: how it was computed, where not in the usual way.
    """

    heads: Tensor
    layers: Tensor
    everywhere: LinkEffect
    notes: tuple[str, ...] = ()


def link_effect(
    model: nn.Module,
    input_ids: Tensor,
    query: Positions,
    key: Positions,
    *,
    layers: Layers = None,
    heads: Positions | None = None,
    top: int = 5,
) -> LinkEffect:
    """The next token's distribution when ``query`` may not attend to ``key``, compared with the unchanged one.

    Args:
        model: a language model; as for record().
        input_ids: [1, T].
        query: positions that may not attend to ``key``, counted from 0.
        key: positions of the hidden keys.
        layers: as for knock_out(); None means every attention site.
        heads: None means all.
        top: how many of the most likely tokens to return.

    Raises:
        EditError: a model without logits, positions or layers that are not there.
        ValueError: more than one text, or a ``top`` below 1.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=12, n_layer=2, n_head=3)).eval()
        >>> link_effect(model, torch.tensor([[1, 2, 3, 4]]), query=3, key=1).kl >= 0
        True
    """
    _check_text(input_ids)
    if top < 1:
        raise ValueError(f"top is {top}: wanted at least 1.")
    extra = forward_options(model, use_cache=False, logits_to_keep=1)
    with torch.no_grad():
        clean = _last(run_model(model, input_ids, None, extra), model)[0]
        _check_positions(input_ids, query=_tuple(query), key=_tuple(key))
        with edit(model, knock_out(_tuple(query), _tuple(key), layers=layers, heads=heads)):
            edited = _last(run_model(model, input_ids, None, extra), model)[0]
    best = [_most_likely(logs, top) for logs in (clean, edited)]
    union = dict.fromkeys(token for tokens in best for token, _ in tokens)
    changes = [TokenChange(token, float(clean[token].exp()), float(edited[token].exp())) for token in union]
    changes.sort(key=lambda token: -abs(token.change))
    return LinkEffect(float(_kl(clean, edited[None])[0]), best[0], best[1], tuple(changes))


def link_effects(
    model: nn.Module, input_ids: Tensor, query: Positions, key: Positions, *, top: int = 5, batch_bytes: int = 1 << 30
) -> LinkEffects:
    """The effects for each head alone, each layer and the whole model; heads and layers share forwards.

    Args:
        model: a language model; as for record().
        input_ids: [1, T].
        query: positions that may not attend to ``key``, counted from 0.
        key: positions of the hidden keys.
        top: how many of the most likely tokens to return.
        batch_bytes: about how much memory the rows of one forward may use.

    Raises:
        EditError: a model without logits, positions that are not there.
        ValueError: more than one text.
    """
    _check_text(input_ids)
    queries, keys = _tuple(query), _tuple(key)
    _check_positions(input_ids, query=queries, key=keys)
    everywhere = link_effect(model, input_ids, queries, keys, top=top)
    hide = knock_out(queries, keys)
    batched = BatchedForwards(
        model, lambda call, index: _hidden(hide, call), batch_bytes, forward_options(model, logits_to_keep=1)
    )
    forward = clean_forward(model, input_ids, None, batched.extra)
    clean = _last(forward.output, model)[0]
    rows = []
    for layer, site in enumerate(forward.sites):
        rows += [ChangedRow(layer, (head,)) for head in range(site.heads)]
        rows.append(ChangedRow(layer, tuple(range(site.heads))))
    table = torch.full((len(forward.sites), max(site.heads for site in forward.sites)), torch.nan, dtype=torch.float64)
    whole = torch.zeros(len(forward.sites), dtype=torch.float64)
    for group, outputs in batched.run(forward, input_ids, None, rows):
        divergences = _kl(clean, _last(outputs, model)[1:])
        for row, value in zip(group, divergences.tolist(), strict=True):
            if len(row.heads) == forward.sites[row.layer].heads:
                whole[row.layer] = value
            if len(row.heads) == 1:
                table[row.layer, row.heads[0]] = value
    return LinkEffects(table, whole, everywhere, tuple(batched.notes))


def _hidden(hide: KnockOut, call: AttentionCall) -> Tensor:
    position = Position(0 if call.is_cross else max(0, call.shape[3] - call.shape[2]), 0)
    return hide.apply(call, position).head_outputs()


def _last(logits: Tensor, model: nn.Module) -> Tensor:
    """Log-probabilities after the last position, [B, V] in float64."""
    head = getattr(model, "get_output_embeddings", None)
    if logits.dim() != 3 or (head is not None and head() is None):
        raise EditError(
            f"{type(model).__name__} gives {tuple(logits.shape)}, no logits [B, T, V] of a next token: wanted a "
            "language model, loaded with its output head."
        )
    return logits[:, -1].double().log_softmax(-1)


def _kl(clean: Tensor, edited: Tensor) -> Tensor:
    """KL(clean ‖ edited) of log-probabilities [V] and [N, V], [N] on the CPU; rounding below zero is zero."""
    probabilities = clean.exp()
    gaps = torch.where(probabilities > 0, clean - edited, torch.zeros_like(edited))
    return (probabilities * gaps).sum(-1).clamp(min=0).cpu()


def _most_likely(logs: Tensor, top: int) -> tuple[tuple[int, float], ...]:
    values, tokens = logs.exp().topk(min(top, logs.shape[0]))
    return tuple(zip(tokens.tolist(), values.tolist(), strict=True))


def _tuple(positions: Positions) -> tuple[int, ...]:
    return (positions,) if isinstance(positions, int) else tuple(positions)


def _check_text(input_ids: Tensor) -> None:
    if input_ids.dim() != 2 or input_ids.shape[0] != 1 or not input_ids.shape[1]:
        raise ValueError(f"input_ids is {tuple(input_ids.shape)}: wanted one text, [1, T], without padding.")


def _check_positions(input_ids: Tensor, **named: tuple[int, ...]) -> None:
    length = input_ids.shape[1]
    for name, positions in named.items():
        wrong = [p for p in positions if not 0 <= p < length]
        if wrong or not positions:
            raise EditError(f"{name} is {positions}: wanted positions from 0 to {length - 1}, the text's tokens.")

"""head_effects(): what every head is worth to a model on some texts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from headscope.errors import EditError, is_out_of_memory
from headscope.heads.effects.answers import Metric, away_from, next_token_loss, options, score
from headscope.heads.effects.batched import Change, Rows, SiteShape, Survey, Target, survey
from headscope.heads.effects.gradient import gate_gradients
from headscope.heads.effects.table import HeadEffects
from headscope.watching.hooks import AttentionCall

__all__ = ["head_effects"]


@dataclass(frozen=True, eq=False)
class _Question:
    """What is asked: checked arguments, and the metric for a text."""

    model: nn.Module
    input_ids: Tensor
    attention_mask: Tensor | None
    text: Tensor  # [B, T], 1 where there is text
    metric: Metric | None
    heads: tuple[tuple[int, int], ...] | None

    def metric_for(self, plain: Survey) -> tuple[Metric, str]:
        """The metric, and its unit."""
        if self.metric is not None:
            return self.metric, "the metric's"
        if self.is_encoder(plain):
            return away_from(plain.answer), "1 - cosine"
        self._check_language_model(plain)
        return next_token_loss, "nats per token"

    def is_encoder(self, plain: Survey) -> bool:
        """Whether the answer is hidden states: the model has no output head of its own."""
        head = getattr(self.model, "get_output_embeddings", None)
        hidden = getattr(getattr(self.model, "config", None), "hidden_size", None)
        return head is not None and head() is None and plain.answer.dim() == 3 and plain.answer.shape[2] == hidden

    def _check_language_model(self, plain: Survey) -> None:
        shape = tuple(plain.answer.shape)
        if len(shape) != 3 or shape[1] != self.input_ids.shape[1] or any(s.sees_ahead for s in plain.sites):
            why = "its first position sees its last" if len(shape) == 3 else f"it gives {shape} for one row of text"
            raise EditError(
                f"{type(self.model).__name__} does not predict the next token ({why}), so the default metric means "
                "nothing here: pass metric=function of (logits, input_ids, attention_mask) that gives [B]."
            )
        short = (self.text[:, 1:].bool() & self.text[:, :-1].bool()).sum(1) == 0
        if bool(short.any()):
            raise ValueError(
                f"row {int(short.nonzero()[0])} of input_ids has no two tokens of text in a row: there is no next "
                "token to predict. Leave it out, or begin it with the model's start token."
            )

    def chosen(self, sites: Sequence[SiteShape]) -> list[Target]:
        """The heads that are asked about."""
        if self.heads is None:
            return [Target(layer, (head,)) for layer, site in enumerate(sites) for head in range(site.heads)]
        for layer, head in self.heads:
            if not (0 <= layer < len(sites) and 0 <= head < sites[layer].heads):
                raise EditError(
                    f"there is no head {layer}.{head}: the model has {len(sites)} attention sites with up to "
                    f"{max(site.heads for site in sites)} heads each, both counted from 0."
                )
        return [Target(layer, (head,)) for layer, head in sorted(set(self.heads))]


def head_effects(
    model: nn.Module,
    input_ids: Tensor,
    *,
    attention_mask: Tensor | None = None,
    metric: Metric | None = None,
    method: str = "ablate",
    to: Tensor | None = None,
    heads: Iterable[tuple[int, int]] | None = None,
    batch_bytes: int = 1 << 30,
    on_progress: Callable[[int, int], None] | None = None,
) -> HeadEffects:
    """What each head is worth: the metric without it minus the metric with it, or its gate's gradient.

    Ablation (Michel et al. 2019, arXiv 1905.10650; with means Wang et al. 2022, arXiv 2211.00593) puts all heads
    into a few forwards: the batch grows by one row a head before the head's own layer. Where a model's layers do
    not allow that, whole rows are replicated, and ``notes`` say so. The gradient takes one backward pass; it is a
    first-order estimate without a sign.

    Args:
        model: in eval mode; as for record().
        input_ids: [B, T], examples.
        attention_mask: [B, T], 1 for text and 0 for padding.
        metric: (logits [N, T, V], input_ids [N, T], attention_mask [N, T]) → [N], each row by itself. None: the
            loss of the next token, in nats per token; for an encoder without an output head 1 - cosine similarity
            of its mean hidden state to that of the unchanged model.
        method: "ablate" or "gradient".
        to: for "ablate", None writes zeros; [layers, H, Dv], as head_means() gives, writes means.
        heads: (layer, head) pairs; None means all.
        batch_bytes: about what the rows of one forward may take in memory.
        on_progress: told how many heads are done, of how many, over all examples.

    Raises:
        EditError: a model in training mode, heads or means that do not fit it, no default metric for it.
        ValueError: input of another shape, an unknown method, a metric that does not give one number a row.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=12, n_layer=2, n_head=3)).eval()
        >>> effects = head_effects(model, torch.tensor([[1, 2, 3, 4]]))
        >>> effects.values.shape, effects.unit
        (torch.Size([2, 3]), 'nats per token')
    """
    _check(model, input_ids, attention_mask, metric, method, to)
    text = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    pairs = None if heads is None else tuple(heads)
    if pairs is not None and not pairs:
        raise ValueError("heads is empty: wanted (layer, head) pairs, or None for all heads.")
    question = _Question(model, input_ids, attention_mask, text, metric, pairs)
    if method == "gradient":
        return _by_gradient(question, batch_bytes, on_progress)
    return _by_ablation(question, to, batch_bytes, on_progress)


def _by_ablation(
    question: _Question, to: Tensor | None, batch_bytes: int, on_progress: Callable[[int, int], None] | None
) -> HeadEffects:
    """One example after the other; its heads in as few forwards as fit."""
    rows = Rows(question.model, _writes(to), batch_bytes)
    examples: list[Tensor] = []
    clean: list[Tensor] = []
    unit = ""
    for index in range(question.input_ids.shape[0]):
        ids, text = question.input_ids[index : index + 1], question.text[index : index + 1]
        mask = None if question.attention_mask is None else text
        plain = survey(question.model, ids, mask, rows.extra)
        metric, unit = question.metric_for(plain)
        _check_means(to, plain.sites)
        targets = question.chosen(plain.sites)
        table = torch.full((len(plain.sites), max(s.heads for s in plain.sites)), torch.nan, dtype=torch.float64)
        with torch.no_grad():
            clean.append(score(metric, plain.answer, ids, text)[0].cpu())
            done = len(targets) * index
            for group, answers in rows.run(plain, ids, mask, targets):
                found = score(metric, answers, ids, text).cpu()
                for row, target in enumerate(group, start=1):
                    table[target.layer, target.heads[0]] = found[row] - found[0]
                done += len(group)
                if on_progress is not None:
                    on_progress(done, len(targets) * question.input_ids.shape[0])
        examples.append(table)
    values = torch.stack(examples)
    return HeadEffects(values.mean(0), values, torch.stack(clean), unit, "ablate", tuple(rows.notes))


def _by_gradient(question: _Question, batch_bytes: int, on_progress: Callable[[int, int], None] | None) -> HeadEffects:
    """As many examples at a time as fit, with room for what the backward pass keeps."""
    model, ids = question.model, question.input_ids
    extra = options(model, use_cache=False)
    plain = survey(model, ids[:1], None if question.attention_mask is None else question.text[:1], extra)
    if question.metric is None and question.is_encoder(plain):
        raise EditError(
            f"{type(model).__name__} has no output head, and 1 - cosine to itself is at its minimum for the unchanged "
            "model: every gradient is zero. Use method='ablate', or pass a metric."
        )
    metric, unit = question.metric_for(plain)
    targets = question.chosen(plain.sites)
    step = min(ids.shape[0], max(1, batch_bytes // (plain.row_bytes * (4 + len(plain.sites)))))
    tables, clean, notes, start = [], [], [], 0
    while start < ids.shape[0]:
        part = slice(start, start + step)
        mask = None if question.attention_mask is None else question.text[part]
        try:
            table, values = gate_gradients(model, ids[part], mask, question.text[part], metric, extra)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or step == 1:
                raise
            notes.append(f"out of memory with {step} texts at a time: went on with {step // 2}")
            step //= 2
            continue
        tables.append(table.abs())
        clean.append(values)
        start = min(start + step, ids.shape[0])
        if on_progress is not None:
            on_progress(len(targets) * start, len(targets) * ids.shape[0])
    wanted = torch.zeros(tables[0].shape[1:], dtype=torch.bool)
    for target in targets:
        wanted[target.layer, target.heads[0]] = True
    per_example = torch.cat(tables).masked_fill(~wanted, torch.nan)
    return HeadEffects(per_example.mean(0), per_example, torch.cat(clean), unit, "gradient", tuple(notes))


def _writes(to: Tensor | None) -> Change:
    """What an ablated head writes."""

    def zero(call: AttentionCall, index: int) -> Tensor:
        return torch.zeros_like(call.head_outputs())

    def mean(call: AttentionCall, index: int) -> Tensor:
        outputs = call.head_outputs()
        assert to is not None
        return to[index].to(outputs)[None, :, None].expand_as(outputs)

    return zero if to is None else mean


def _check(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    metric: Metric | None,
    method: str,
    to: Tensor | None,
) -> None:
    if method not in ("ablate", "gradient"):
        raise ValueError(f"method is {method!r}: wanted 'ablate' or 'gradient'.")
    if method == "gradient" and to is not None:
        raise ValueError("to= says what an ablated head writes, and method is 'gradient': leave one of them out.")
    if not isinstance(input_ids, Tensor):
        raise ValueError(f"input_ids is a {type(input_ids).__name__}: wanted a tensor [B, T], as torch.tensor([ids]).")
    if input_ids.dim() != 2 or not input_ids.numel():
        raise ValueError(f"input_ids is {tuple(input_ids.shape)}: wanted [B, T] with at least one token.")
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask is {tuple(attention_mask.shape)} and input_ids {tuple(input_ids.shape)}: wanted the same "
            "shape, [B, T]."
        )
    if model.training:
        raise EditError(f"{type(model).__name__} is in training mode, where dropout is noise: call model.eval() first.")
    config = getattr(model, "config", None)
    if metric is None and options(model, decoder_input_ids=None):
        raise EditError(
            f"{type(model).__name__} does not predict the next token of what it reads, but writes another text: give "
            "model.get_encoder(), or metric=function of (logits, input_ids, attention_mask) that gives [B]."
        )
    limit = getattr(config, "max_position_embeddings", None)
    learnt = {module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding)}
    if limit in learnt and input_ids.shape[1] > limit:
        raise ValueError(
            f"input_ids has {input_ids.shape[1]} tokens, and {type(model).__name__} has {limit} positions: cut them."
        )


def _check_means(to: Tensor | None, sites: Sequence[SiteShape]) -> None:
    shapes = {(site.heads, site.head_dim) for site in sites}
    if to is None:
        return
    if len(shapes) != 1:
        raise EditError(
            f"mean ablation wants heads of one shape at all sites; this model has {sorted(shapes)}, [H, Dv]."
        )
    wanted = (len(sites), *shapes.pop())
    if tuple(to.shape) != wanted:
        raise EditError(
            f"to is {tuple(to.shape)}, and this model's heads are {wanted}, [layers, H, Dv]: take the means with "
            "head_means() of this model."
        )

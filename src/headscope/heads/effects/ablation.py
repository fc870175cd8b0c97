"""head_effects(): what every head is worth to a model on some texts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from headscope.errors import EditError, is_out_of_memory
from headscope.heads.effects.batched import BatchedForwards, Change, ChangedRow, CleanForward, SiteShape, clean_forward
from headscope.heads.effects.gradient import gate_gradients
from headscope.heads.effects.metrics import Metric, distance_from, forward_options, next_token_loss, score_rows
from headscope.heads.effects.table import HeadEffects
from headscope.watching.hooks import AttentionCall


@dataclass(frozen=True, eq=False)
class _Request:
    """Checked arguments of head_effects(), and the metric for a text."""

    model: nn.Module
    input_ids: Tensor
    attention_mask: Tensor | None
    text: Tensor  # [B, T], 1 where there is text
    metric: Metric | None
    heads: tuple[tuple[int, int], ...] | None

    def metric_for(self, clean: CleanForward) -> tuple[Metric, str]:
        """The metric, and its unit."""
        if self.metric is not None:
            return self.metric, "the metric's"
        if self.is_encoder(clean):
            return distance_from(clean.output), "1 - cosine"
        self._check_language_model(clean)
        return next_token_loss, "nats per token"

    def is_encoder(self, clean: CleanForward) -> bool:
        """Whether the output is hidden states: the model has no output head."""
        head = getattr(self.model, "get_output_embeddings", None)
        hidden = getattr(getattr(self.model, "config", None), "hidden_size", None)
        return head is not None and head() is None and clean.output.dim() == 3 and clean.output.shape[2] == hidden

    def _check_language_model(self, clean: CleanForward) -> None:
        shape = tuple(clean.output.shape)
        if len(shape) != 3 or shape[1] != self.input_ids.shape[1] or any(s.sees_ahead for s in clean.sites):
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

    def rows(self, sites: Sequence[SiteShape]) -> list[ChangedRow]:
        """A row for each head to measure."""
        if self.heads is None:
            return [ChangedRow(layer, (head,)) for layer, site in enumerate(sites) for head in range(site.heads)]
        for layer, head in self.heads:
            if not (0 <= layer < len(sites) and 0 <= head < sites[layer].heads):
                raise EditError(
                    f"there is no head {layer}.{head}: the model has {len(sites)} attention sites with up to "
                    f"{max(site.heads for site in sites)} heads each, both counted from 0."
                )
        return [ChangedRow(layer, (head,)) for layer, head in sorted(set(self.heads))]


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
    """What each head is worth: the metric without it minus the metric with it, or the gradient of its gate.

    Ablation (Michel et al. 2019, arXiv 1905.10650; with means Wang et al. 2022, arXiv 2211.00593) puts all heads
    into a few forwards: the batch grows by one row per head before that head's layer. Where a model's layers do not
    allow that, whole rows are replicated, and ``notes`` say so. The gradient needs one backward pass; it is a
    first-order estimate without a sign.

    Args:
        model: in eval mode; as for record().
        input_ids: [B, T], examples.
        attention_mask: [B, T], 1 for text and 0 for padding.
        metric: (logits [N, T, V], input_ids [N, T], attention_mask [N, T]) → [N], each row alone. None: the
            loss of the next token, in nats per token; for an encoder without an output head 1 - cosine similarity
            of its mean hidden state to that of the unchanged model.
        method: "ablate" or "gradient".
        to: for "ablate", None writes zeros; [layers, H, Dv], as head_means() gives, writes means.
        heads: (layer, head) pairs; None means all.
        batch_bytes: about how much memory the rows of one forward may use.
        on_progress: called with how many heads are done, of how many, over all examples.

    Raises:
        EditError: a model in training mode, heads or means that do not fit it, no default metric for it.
        ValueError: input of another shape, an unknown method, a metric that does not give one number per row.

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
    request = _Request(model, input_ids, attention_mask, text, metric, pairs)
    if method == "gradient":
        return _by_gradient(request, batch_bytes, on_progress)
    return _by_ablation(request, to, batch_bytes, on_progress)


def _by_ablation(
    request: _Request, to: Tensor | None, batch_bytes: int, on_progress: Callable[[int, int], None] | None
) -> HeadEffects:
    """One example after the other; its heads in as few forwards as fit."""
    batched = BatchedForwards(request.model, _replacement(to), batch_bytes)
    examples: list[Tensor] = []
    clean_scores: list[Tensor] = []
    unit = ""
    for index in range(request.input_ids.shape[0]):
        ids, text = request.input_ids[index : index + 1], request.text[index : index + 1]
        mask = None if request.attention_mask is None else text
        clean = clean_forward(request.model, ids, mask, batched.extra)
        metric, unit = request.metric_for(clean)
        _check_means(to, clean.sites)
        rows = request.rows(clean.sites)
        table = torch.full((len(clean.sites), max(s.heads for s in clean.sites)), torch.nan, dtype=torch.float64)
        with torch.no_grad():
            clean_scores.append(score_rows(metric, clean.output, ids, text)[0].cpu())
            done = len(rows) * index
            for group, outputs in batched.run(clean, ids, mask, rows):
                scores = score_rows(metric, outputs, ids, text).cpu()
                for number, row in enumerate(group, start=1):
                    table[row.layer, row.heads[0]] = scores[number] - scores[0]
                done += len(group)
                if on_progress is not None:
                    on_progress(done, len(rows) * request.input_ids.shape[0])
        examples.append(table)
    values = torch.stack(examples)
    return HeadEffects(values.mean(0), values, torch.stack(clean_scores), unit, "ablate", tuple(batched.notes))


def _by_gradient(request: _Request, batch_bytes: int, on_progress: Callable[[int, int], None] | None) -> HeadEffects:
    """As many examples at a time as fit, with memory for the activations of the backward pass."""
    model, ids = request.model, request.input_ids
    extra = forward_options(model, use_cache=False)
    clean = clean_forward(model, ids[:1], None if request.attention_mask is None else request.text[:1], extra)
    if request.metric is None and request.is_encoder(clean):
        raise EditError(
            f"{type(model).__name__} has no output head, and 1 - cosine to itself is at its minimum for the unchanged "
            "model: every gradient is zero. Use method='ablate', or pass a metric."
        )
    metric, unit = request.metric_for(clean)
    rows = request.rows(clean.sites)
    step = min(ids.shape[0], max(1, batch_bytes // (clean.row_bytes * (4 + len(clean.sites)))))
    tables, clean_scores, notes, start = [], [], [], 0
    while start < ids.shape[0]:
        part = slice(start, start + step)
        mask = None if request.attention_mask is None else request.text[part]
        try:
            table, values = gate_gradients(model, ids[part], mask, request.text[part], metric, extra)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or step == 1:
                raise
            notes.append(f"out of memory with {step} texts at a time: went on with {step // 2}")
            step //= 2
            continue
        tables.append(table.abs())
        clean_scores.append(values)
        start = min(start + step, ids.shape[0])
        if on_progress is not None:
            on_progress(len(rows) * start, len(rows) * ids.shape[0])
    chosen = torch.zeros(tables[0].shape[1:], dtype=torch.bool)
    for row in rows:
        chosen[row.layer, row.heads[0]] = True
    per_example = torch.cat(tables).masked_fill(~chosen, torch.nan)
    return HeadEffects(per_example.mean(0), per_example, torch.cat(clean_scores), unit, "gradient", tuple(notes))


def _replacement(to: Tensor | None) -> Change:
    """The output of an ablated head: zeros, or its mean."""

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
        raise EditError(f"{type(model).__name__} is in training mode, and dropout adds noise: call model.eval() first.")
    config = getattr(model, "config", None)
    if metric is None and forward_options(model, decoder_input_ids=None):
        raise EditError(
            f"{type(model).__name__} does not predict the next token of what it reads, but writes another text: give "
            "model.get_encoder(), or metric=function of (logits, input_ids, attention_mask) that gives [B]."
        )
    limit = getattr(config, "max_position_embeddings", None)
    sizes = {module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding)}
    if limit in sizes and input_ids.shape[1] > limit:
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

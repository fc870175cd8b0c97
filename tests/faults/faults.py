"""The planted faults: the subject's classic mistakes, each named by what a user would see.

To plant one: write a function that takes the original and returns the one with the mistake, name it after what a user
would see, and put `@fault(the original's module and name, a fast test that must fail)` above it. At most 40.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import Any

from tests.faults.planting import Fault, Replace

FAULTS: list[Fault] = []


def fault(target: str, test: str) -> Callable[[Replace], Replace]:
    """List a fault in the function `target`, which `test` must notice."""

    def add(function: Replace) -> Replace:
        FAULTS.append(Fault(target, test, function))
        return function

    return add


# ---------------------------------------------------------------- masks


@fault("headscope.ops.masks.ranges:causal", "ops/test_masks.py::test_mask_equals_its_rule_in_every_cell")
def a_token_attends_to_the_one_after_it(original: Any) -> Any:
    from headscope.ops.masks.ranges import window

    return lambda: window(None, 1)


@fault("headscope.ops.masks.ranges:padding", "ops/test_masks.py::test_mask_equals_its_rule_in_every_cell")
def padding_is_attended_to_and_text_is_hidden(original: Any) -> Any:
    return lambda *args, **kwargs: ~original(*args, **kwargs)


@fault(
    "headscope.ops.scores:Scores.positions",
    "ops/test_attention.py::test_causal_mask_aligns_queries_with_the_last_keys",
)
def with_a_cache_the_causal_mask_counts_from_the_top_left(original: Any) -> Any:
    return lambda self, rows: rows


# ---------------------------------------------------------------- scores


@fault("headscope.ops.kernels.fused:product", "ops/test_attention.py::test_attention_equals_its_definition")
def scores_are_not_scaled(original: Any) -> Any:
    return lambda scores, *args: original(replace(scores, scale=1.0), *args)


@fault("headscope.ops.kernels.fused:product", "ops/test_attention.py::test_attention_equals_its_definition")
def query_heads_read_the_keys_of_another_group(original: Any) -> Any:
    return lambda scores, *args: original(replace(scores, key=scores.key.flip(1)), *args)


@fault("headscope.ops.scores:Scores.bias_block", "ops/test_attention.py::test_attention_equals_its_definition")
def the_bias_is_added_twice(original: Any) -> Any:
    return lambda *args: 2 * original(*args)


@fault("headscope.ops.scores:Scores.checked", "ops/test_order.py::test_large_scores_are_exact_with_every_option")
def large_scores_are_rounded_to_float32(original: Any) -> Any:
    return lambda scores: replace(original(scores), wide=False)


@fault("headscope.ops.kernels.blockwise:stream", "ops/test_matrix.py::test_matrix_answers_equal_their_definitions")
def rows_sum_to_one_in_spite_of_a_sink(original: Any) -> Any:
    return lambda scores, *args, **kwargs: original(replace(scores, sinks=None), *args, **kwargs)


# ---------------------------------------------------------------- softmax and output


@fault("headscope.ops.kernels.differentiable:_weights_of_rows", "ops/test_matrix.py::test_product_takes_any_x")
def the_softmax_is_over_queries(original: Any) -> Any:
    def weights_of_rows(*args: Any) -> Any:
        weights, log_weights = original(*args)
        return weights / weights.sum(-2, keepdim=True).clamp(min=1e-9), log_weights

    return weights_of_rows


@fault("headscope.ops.kernels.fused:product", "nn/test_multihead.py::test_forward_is_the_articles_formula")
def heads_are_concatenated_in_another_order(original: Any) -> Any:
    return lambda *args: original(*args).flip(1)


@fault(
    "headscope.ops.kernels.fused:product", "ops/test_attention.py::test_attention_gives_the_values_worked_out_by_hand"
)
def a_query_that_sees_nothing_gets_the_mean_of_all_values(original: Any) -> Any:
    def product(scores: Any, value: Any, *args: Any) -> Any:
        output = original(scores, value, *args)
        mean = value.mean(2, keepdim=True).repeat_interleave(output.shape[1] // value.shape[1], 1)
        return output.where((output != 0).any(-1, keepdim=True), mean)

    return product


# ---------------------------------------------------------------- answers of the matrix


@fault(
    "headscope.ops.reductions.rows:Entropy.finish", "ops/test_matrix.py::test_matrix_answers_equal_their_definitions"
)
def entropy_is_in_bits(original: Any) -> Any:
    return lambda *args: original(*args) / math.log(2)


@fault(
    "headscope.ops.reductions.rows:TopK.finish",
    "ops/test_reductions.py::test_topk_returns_minus_one_past_the_visible_keys",
)
def topk_names_hidden_keys(original: Any) -> Any:
    def finish(*args: Any) -> Any:
        top = original(*args)
        return top._replace(indices=top.indices.clamp(min=0))

    return finish


@fault(
    "headscope.ops.matrix:AttentionMatrix.offsets", "ops/test_matrix.py::test_matrix_answers_equal_their_definitions"
)
def the_token_itself_is_shown_as_the_one_before(original: Any) -> Any:
    return lambda *args: original(*args).roll(-1, -1)


@fault(
    "headscope.ops.reductions.columns:Received.finish",
    "ops/test_matrix.py::test_matrix_answers_equal_their_definitions",
)
def the_mean_that_a_key_receives_counts_queries_that_cannot_see_it(original: Any) -> Any:
    return lambda self, state: state[0] / state[1].amax().clamp(min=1) if self.mean else state[0]


@fault("headscope.ops.reductions.groups:Pool.finish", "ops/test_matrix.py::test_matrix_answers_equal_their_definitions")
def tokens_of_a_word_are_averaged_over_keys_and_not_summed(original: Any) -> Any:
    def finish(self: Any, state: Any) -> Any:
        if self.how == "mass":
            self = type(self)(self.rows, self.cols, "mean")
        return original(self, state)

    return finish


# ---------------------------------------------------------------- positions


@fault("headscope.ops.positions:rotary", "nn/test_multihead.py::test_rotary_by_hand")
def rotary_turns_neighbours_where_it_should_turn_halves(original: Any) -> Any:
    return lambda *args, interleaved=False, **kwargs: original(*args, interleaved=not interleaved, **kwargs)


@fault("headscope.ops.positions:rotary", "nn/test_weights.py::test_llama")
def the_rotary_base_is_ignored(original: Any) -> Any:
    return lambda base=10_000.0, **kwargs: original(**kwargs)


@fault(
    "headscope.ops.positions:Rotary.rotate", "nn/test_cache.py::test_cache_in_chunks_of_any_size_gives_one_forward_pass"
)
def positions_restart_at_0_with_each_step_of_a_cache(original: Any) -> Any:
    return lambda self, x, first=0: original(self, x)


# ---------------------------------------------------------------- modules


@fault(
    "headscope.nn.multihead:MultiHeadAttention._split",
    "nn/test_multihead.py::test_positions_do_not_mix_with_heads",
)
def heads_are_cut_out_by_a_view_without_a_transpose(original: Any) -> Any:
    return lambda self, x: x.reshape(x.shape[0], -1, x.shape[1], self.head_dim)


@fault(
    "headscope.nn.multihead:MultiHeadAttention.forward",
    "nn/test_multihead.py::test_dropout_acts_in_training_only_and_keeps_the_mean",
)
def weights_are_dropped_in_evaluation(original: Any) -> Any:
    @wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        before, self.training = self.training, True
        try:
            return original(self, *args, **kwargs)
        finally:
            self.training = before

    return forward


@fault("headscope.nn.weights:packed_rows", "nn/test_multihead.py::test_forward_is_the_articles_formula")
def weights_of_keys_and_values_are_swapped(original: Any) -> Any:
    def rows(module: Any) -> Any:
        query, key, value = original(module)
        return query, value, key

    return rows


@fault(
    "headscope.nn.cache:SlidingWindowCache.append",
    "nn/test_cache.py::test_sliding_window_cache_stores_only_the_window",
)
def a_cache_forgets_the_oldest_token_of_its_window(original: Any) -> Any:
    def append(self: Any, *args: Any) -> Any:
        key, value = original(self, *args)
        full = key.shape[2] >= self.window > 1
        return (key[:, :, 1:], value[:, :, 1:]) if full else (key, value)

    return append


@fault("headscope.nn.transformer:Stack.forward", "nn/test_transformer.py::test_decoder_is_causal")
def a_decoder_looks_ahead(original: Any) -> Any:
    return lambda self, x, mask, *args, **kwargs: original(self, x, None, *args, **kwargs)


# ---------------------------------------------------------------- watching


@fault(
    "headscope.watching.hooks.reporting:report_call",
    "watching/test_sdpa.py::test_sdpa_of_a_nanogpt_block_gives_causal_weights",
)
def recording_changes_what_the_model_computes(original: Any) -> Any:
    from headscope.watching.hooks import with_output

    def report_call(*args: Any, **kwargs: Any) -> Any:
        call = original(*args, **kwargs)
        return with_output(call, call.head_outputs() * (1 + 1e-5))

    return report_call


@fault(
    "headscope.watching.hooks.proof:_difference",
    "watching/test_huggingface.py::test_proof_refuses_an_attention_with_another_scale_or_softcap",
)
def weights_are_shown_that_do_not_explain_the_output(original: Any) -> Any:
    return lambda *args, **kwargs: (0.0, 1.0)


@fault(
    "headscope.watching.hooks.sdpa:causal_from_the_top",
    "watching/test_sdpa.py::test_is_causal_counts_from_the_first_key",
)
def is_causal_of_sdpa_is_read_as_bottom_right(original: Any) -> Any:
    from headscope.ops.masks import causal

    return lambda shape: causal()


@fault(
    "headscope.watching.hooks.torch_nn:_read",
    "watching/test_torch_nn.py::test_fast_path_of_multihead_attention_is_taken_and_recorded",
)
def true_means_visible_in_a_mask_of_torch_nn(original: Any) -> Any:
    return lambda mask, *args: original(mask if mask is None or mask.is_floating_point() else ~mask, *args)


@fault(
    "headscope.watching.recording.site:Site._cut",
    "watching/test_generate.py::test_rejected_drafts_are_dropped",
)
def rows_of_rejected_drafts_stay_in_the_matrix(original: Any) -> Any:
    return lambda *args, **kwargs: None


@fault(
    "headscope.watching.edits:Edit.applies",
    "watching/test_edits.py::test_ablate_equals_zero_columns_of_the_output_projection",
)
def an_edit_acts_one_layer_too_late(original: Any) -> Any:
    return lambda self, index, call: original(self, index - 1, call)


@fault(
    "headscope.watching.edits:Ablate.apply",
    "watching/test_edits.py::test_ablate_equals_zero_columns_of_the_output_projection",
)
def ablating_one_head_ablates_all_of_its_layer(original: Any) -> Any:
    return lambda self, call, position: original(replace(self, heads=tuple(range(call.shape[1]))), call, position)


@fault(
    "headscope.watching.recording.tracker:Tracker.position",
    "watching/test_edits.py::test_knock_out_counts_positions_with_a_sliding_cache",
)
def a_link_is_knocked_out_at_the_wrong_place_once_a_cache_slides(original: Any) -> Any:
    def position(self: Any, call: Any, forward: Any) -> Any:
        found = original(self, call, forward)
        return replace(found, first_row=found.first_row - found.first_key, first_key=0)

    return position


# ---------------------------------------------------------------- what heads do


@fault(
    "headscope.heads.measures.measure:Visibility.text", "heads/test_measures.py::test_every_measure_is_its_definition"
)
def the_sink_counts_as_text(original: Any) -> Any:
    return property(lambda self: self.batch.valid)


@fault(
    "headscope.heads.measures.measure:Visibility.rows", "heads/test_measures.py::test_every_measure_is_its_definition"
)
def means_are_over_padded_rows_too(original: Any) -> Any:
    return property(lambda self: self.text_keys_per_query >= 2)


@fault(
    "headscope.heads.measures.sums:MeasureSums.value",
    "heads/test_roles.py::test_a_head_is_reported_on_the_half_that_did_not_pick_it",
)
def heads_are_reported_on_the_texts_that_picked_them(original: Any) -> Any:
    return lambda self, column, half=None: original(self, column)


@fault(
    "headscope.heads.statistics:cluster_bootstrap",
    "heads/test_statistics.py::test_bootstrap_interval_is_wider_for_dependent_cases",
)
def intervals_draw_tokens_and_not_documents(original: Any) -> Any:
    def bootstrap(numerators: Any, denominators: Any, *args: Any, **kwargs: Any) -> Any:
        counts = denominators.long()
        shares = numerators / denominators.clamp(min=1)
        return original(
            shares.repeat_interleave(counts, -1), (denominators > 0).double().repeat_interleave(counts), *args, **kwargs
        )

    return bootstrap


@fault("headscope.heads.statistics:holm", "heads/test_statistics.py::test_holm_gives_values_computed_by_hand")
def p_values_are_not_corrected_for_the_number_of_heads(original: Any) -> Any:
    return lambda p: list(p)


@fault(
    "headscope.heads.effects.metrics:next_token_loss", "heads/test_effects.py::test_next_token_loss_counts_text_only"
)
def the_loss_compares_each_token_with_its_own_logits(original: Any) -> Any:
    return lambda logits, *args: original(logits.roll(-1, 1), *args)


@fault(
    "headscope.models.tokens:tokenize",
    "models/test_tokens.py::test_tokenize_adds_the_start_token_once_and_not_as_a_word",
)
def the_start_token_is_left_out(original: Any) -> Any:
    return lambda text, tokenizer, *, start_token_id=None, **kwargs: original(text, tokenizer, **kwargs)

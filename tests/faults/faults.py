"""Planted faults: each is a small change to a copy of the source that some test must notice.

To add one: a text that occurs exactly once in a file of src/headscope, what to put in its place, and a fast test
that must then fail.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """One mistake, and the test that must notice it."""

    name: str
    file: str  # inside src/headscope
    old: str  # occurs exactly once
    new: str
    test: str  # a node id inside tests/, without its parameters to run them all


FAULTS = [
    Fault(
        "a mask off by one",
        "masks/ranges.py",
        "seen = ahead <= self.right",
        "seen = ahead < self.right",
        "test_masks.py::test_each_mask_is_its_rule[causal]",
    ),
    Fault(
        "a window one too wide",
        "masks/ranges.py",
        "seen & (ahead >= -self.left)",
        "seen & (ahead >= -self.left - 1)",
        "test_masks.py::test_each_mask_is_its_rule[window]",
    ),
    Fault(
        "a block called visible that is not",
        "masks/ranges.py",
        "nearest >= -self.left\n",
        "farthest >= -self.left\n",
        "test_masks.py::test_no_block_is_called_what_it_is_not[window]",
    ),
    Fault(
        "a half-hidden block called visible",
        "masks/ranges.py",
        "inside_right = self.right is None or farthest <= self.right",
        "inside_right = self.right is None or nearest <= self.right",
        "test_attention.py::test_it_is_its_definition[causal-none]",
    ),
    Fault(
        "padding hides text",
        "masks/ranges.py",
        "(kv_idx < stop) & torch.ones_like",
        "(kv_idx < stop - 1) & torch.ones_like",
        "test_masks.py::test_each_mask_is_its_rule[padding]",
    ),
    Fault(
        "queries are the first positions, not the last",
        "scores.py",
        "origin = (0, 0, shape[3] - shape[2])",
        "origin = (0, 0, 0)",
        "test_attention.py::test_a_step_with_a_cache_is_the_last_row_of_the_whole",
    ),
    Fault(
        "the fused kernel's own causal, which is top-left, where L is not S",
        "kernels.py",
        "bias is None and queries == keys > 1:",
        "bias is None:",
        "test_attention.py::test_a_step_with_a_cache_is_the_last_row_of_the_whole",
    ),
    Fault(
        "groups of heads interleaved",
        "scores.py",
        "        return part.reshape(-1, self.per_group * part.shape[2], part.shape[3])",
        "        part = part.unflatten(1, (self.per_group, -1)).transpose(1, 2)\n"
        "        return part.reshape(-1, self.per_group * part.shape[3], part.shape[4])",
        "test_matrix.py::test_every_answer_is_its_definition[plain]",
    ),
    Fault(
        "two groups of keys swapped",
        "scores.py",
        "keys = self.key[b, g, k].to(self.dtype).flatten(0, 1)",
        "keys = self.key[b, g, k].to(self.dtype).flip(1).flatten(0, 1)",
        "test_matrix.py::test_every_answer_is_its_definition[plain]",
    ),
    Fault(
        "values of grouped heads interleaved",
        "kernels.py",
        "key = key.repeat_interleave(value.shape[1] // key.shape[1], 1)",
        "key = key.repeat(1, value.shape[1] // key.shape[1], 1, 1)",
        "test_matrix.py::test_product_with_any_x[(2, 6, 11, 7)-plain]",
    ),
    Fault(
        "the scale dropped in the kernel",
        "kernels.py",
        "is_causal=causal, scale=scale,",
        "is_causal=causal,",
        "test_attention.py::test_values_worked_out_by_hand[scale 2 squares]",
    ),
    Fault(
        "the scale dropped in the pass",
        "scores.py",
        "part = self.query[b, heads, q].to(self.dtype) * self.scale",
        "part = self.query[b, heads, q].to(self.dtype)",
        "test_matrix.py::test_every_answer_is_its_definition[plain]",
    ),
    Fault(
        "sinks ignored",
        "blockwise.py",
        "total = total * (shift - higher).exp() + (logit - higher).exp()",
        "total = total * (shift - higher).exp()",
        "test_matrix.py::test_every_answer_is_its_definition[sinks True]",
    ),
    Fault(
        "sinks ignored with gradients",
        "blockwise.py",
        "total = total + (scores.sinks.to(x.dtype).view(1, -1, 1, 1) - top).exp()",
        "total = total + 0 * (scores.sinks.to(x.dtype).view(1, -1, 1, 1) - top).exp()",
        "test_matrix.py::test_product_with_any_x[(11, 5)-sinks True]",
    ),
    Fault(
        "softcap ignored",
        "scores.py",
        "scores = torch.tanh(scores / self.softcap) * self.softcap",
        "scores = scores / self.softcap * self.softcap",
        "test_matrix.py::test_every_answer_is_its_definition[softcap 0.8]",
    ),
    Fault(
        "softcap ignored cell by cell",
        "indexing.py",
        "x = torch.tanh(x / scores.softcap) * scores.softcap",
        "x = x / scores.softcap * scores.softcap",
        "test_indexing.py::test_cells_named_one_by_one_know_of_mask_bias_softcap_and_sinks",
    ),
    Fault(
        "the bias added twice",
        "scores.py",
        "scores = scores + self.bias_block(b, heads, q, k)",
        "scores = scores + 2 * self.bias_block(b, heads, q, k)",
        "test_matrix.py::test_every_answer_is_its_definition[bias [L, S]]",
    ),
    Fault(
        "entropy without the rows' sums",
        "reductions/rows.py",
        "state[block.at] -= weighted + block.weights.sum(-1) * block.offset.squeeze(-1)",
        "state[block.at] -= weighted",
        "test_matrix.py::test_every_answer_is_its_definition[plain]",
    ),
    Fault(
        "the fused kernel's sums trusted with a bias",
        "kernels.py",
        "        and scores.bias is None\n",
        "",
        "test_matrix.py::test_a_bias_keeps_the_fused_kernels_sums_out",
    ),
    Fault(
        "the largest are looked for one chunk too far",
        "reductions/rows.py",
        "indices = (where * size).unsqueeze(-1) + torch.arange(size, device=x.device)",
        "indices = (where * size).unsqueeze(-1) + torch.arange(1, size + 1, device=x.device)",
        "test_matrix.py::test_the_largest_lie_where_they_were_put[3]",
    ),
    Fault(
        "the keys after the last whole chunk forgotten",
        "reductions/rows.py",
        "better = rest.values > values",
        "better = rest.values > torch.inf",
        "test_matrix.py::test_the_largest_lie_where_they_were_put[1]",
    ),
    Fault(
        "received divided by all queries",
        "reductions/columns.py",
        "rows if seen is None else seen.expand(-1, -1, rows, -1).sum(-2)",
        "rows",
        "test_matrix.py::test_every_answer_is_its_definition[mask causal]",
    ),
    Fault(
        "offsets shifted",
        "reductions/rows.py",
        "where = block.q_idx + shifts - block.keys.start",
        "where = block.q_idx + shifts + 1 - block.keys.start",
        "test_matrix.py::test_every_answer_is_its_definition[plain]",
    ),
    Fault(
        "the blocks of a pass not joined",
        "blockwise.py",
        "total = total * (top - shift).exp() + weights.sum(-1, keepdim=True)",
        "total = weights.sum(-1, keepdim=True)",
        "test_matrix.py::test_hidden_keys_before_very_low_scores_do_no_harm",
    ),
    Fault(
        "what a row had not seen yet outweighs what it sees",
        "blockwise.py",
        "lower = (own - shift).clamp(max=0)",
        "lower = own - shift",
        "test_matrix.py::test_hidden_keys_before_very_low_scores_do_no_harm",
    ),
    Fault(
        "a query that sees nothing is even",
        "kernels.py",
        "out = out.masked_fill(blind, 0)",
        "out = out + 0",
        "test_attention.py::test_values_worked_out_by_hand[nothing visible]",
    ),
    Fault(
        "rows of the kernel's input need not be neighbours",
        "kernels.py",
        "return tensor if tensor.stride(-1) == 1 else tensor.contiguous()",
        "return tensor",
        "test_matrix.py::test_inputs_need_not_be_contiguous",
    ),
    Fault(
        "dropout does not scale the rest",
        "kernels.py",
        "weights = F.dropout(weights, dropout_p) if dropout_p else weights",
        "weights = F.dropout(weights, dropout_p) * (1 - dropout_p) if dropout_p else weights",
        "test_attention.py::test_dropout_drops_its_share_and_scales_the_rest",
    ),
    Fault(
        "a gradient that stops at the scores",
        "blockwise.py",
        "centered = x - top\n    hidden",
        "centered = x.detach() - top\n    hidden",
        "test_matrix.py::test_gradients_by_differences[mask causal-entropy]",
    ),
    Fault(
        "a part of the matrix that forgets where it stands",
        "scores.py",
        "self.origin[2] + q.start,",
        "self.origin[2],",
        "test_indexing.py::test_parts_agree_whatever_was_asked_before",
    ),
    Fault(
        "top-left causal read as bottom-right",
        "seam/sdpa.py",
        "return causal() if shape[2] == shape[3] else window(None, shape[2] - shape[3])",
        "return causal()",
        "test_seam.py::test_is_causal_counts_from_the_first_key",
    ),
    Fault(
        "a row of finfo.min read as one that sees nothing",
        "seam/inputs.py",
        "if not bool(uniform.any()):",
        "if True:",
        "test_seam.py::test_a_row_of_finfo_min_is_uniform_as_softmax_makes_it",
    ),
    Fault(
        "a torch mask read with our polarity",
        "seam/torch_nn.py",
        "seen_or_bias = ~mask if",
        "seen_or_bias = mask if",
        "test_seam.py::test_the_fast_path_of_torch_attention_is_taken_and_seen[True]",
    ),
    Fault(
        "a proof that anything passes",
        "seam/proof.py",
        "or difference <= TOLERANCE.get(",
        "or difference <= 10 + TOLERANCE.get(",
        "test_seam.py::test_an_attention_that_does_not_do_as_it_says_is_refused",
    ),
    Fault(
        "hooks left behind",
        "seam/watching.py",
        "            handle.remove()\n",
        "            pass\n",
        "test_seam.py::test_after_an_error_in_the_block_nothing_is_left_behind",
    ),
    Fault(
        "a mode left behind by an interrupt",
        "seam/watching.py",
        "            self._local.forward = None\n            ways_leave()\n\n    def _hooks",
        "            self._local.forward = None\n\n    def _hooks",
        "test_seam.py::test_after_an_error_in_the_model_nothing_is_left_behind[KeyboardInterrupt]",
    ),
    Fault(
        "a forward that failed taken for a run",
        "seam/watching.py",
        "forward.failed = sys.exception() is not forward.handling",
        "forward.failed = False",
        "test_seam.py::test_a_forward_that_failed_and_was_caught_is_no_run",
    ),
    Fault(
        "autocast ignored",
        "seam/watching.py",
        "    if not torch.is_autocast_enabled(device):\n",
        "    if True:\n",
        "test_seam.py::test_autocast_queries_and_keys_are_as_the_kernel_received_them",
    ),
    Fault(
        "our computations shown to the user's mode",
        "seam/watching.py",
        "with torch._C.DisableTorchFunction(), _disable_current_modes():",
        "with torch._C.DisableTorchFunction():",
        "test_seam.py::test_a_mode_of_the_users_own_sees_what_it_sees_without_us[torch.nn-True-Ops]",
    ),
    Fault(
        "a mask changed in place not read again",
        "seam/watching.py",
        "key = (key, _version(keep))",
        "key = (key, 0)",
        "test_seam.py::test_a_mask_changed_in_place_between_calls_is_read_again",
    ),
    Fault(
        "a checkpoint's recomputation taken for a call",
        "seam/watching.py",
        "if torch._C._current_graph_task_id() != -1:",
        "if False:",
        "test_seam.py::test_what_a_checkpoint_computes_again_is_not_a_second_call",
    ),
    Fault(
        "torch's fast path switched off by our mode",
        "seam/torch_nn.py",
        "undo.enter_context(suspended())",
        "pass",
        "test_seam.py::test_the_fast_path_of_torch_attention_is_taken_and_seen[False]",
    ),
    Fault(
        "what a cache writes into later not copied",
        "recording/site.py",
        "return tensor.clone() if reused else tensor",
        "return tensor",
        "test_recording.py::test_what_is_written_into_later_was_copied",
    ),
    Fault(
        "positions of a sliding cache lost",
        "recording/site.py",
        'first_key = 0 if how == "cross" else self.num_gone',
        "first_key = 0",
        "test_generate.py::test_a_sliding_window_keeps_its_positions[4-None]",
    ),
    Fault(
        "rejected drafts kept",
        "recording/site.py",
        '        if how == "cut":\n',
        "        if False:\n",
        "test_generate.py::test_drafts_that_were_rejected_are_dropped",
    ),
    Fault(
        "the same text twice joined into one run",
        "recording/site.py",
        "return None if again else how",
        "return how",
        "test_recording.py::test_a_part_that_ran_before_the_whole_is_a_run_of_its_own",
    ),
]

"""How answers about an attention matrix are computed: fused, blockwise, differentiable, by index."""

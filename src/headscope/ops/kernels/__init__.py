"""How answers of an attention matrix are computed: fused, blockwise, differentiable, indexing."""

"""Examples of a head's largest and smallest weights, collected while it is measured."""

import torch

from headscope.heads.corpus import Piece, TextBatch, batches
from headscope.heads.examples import TokenExamples


def batch_of(*texts: tuple[str, ...]) -> TextBatch:
    """Pieces of three tokens each, with these texts or none."""
    pieces = [Piece((5, 6, 7), (False,) * 3, (False,) * 3, f"text {n}", 0, texts=t) for n, t in enumerate(texts)]
    (batch,) = batches(pieces)
    return batch


def test_token_examples_leave_out_pieces_without_texts() -> None:
    batch = batch_of(("the", " cat", " sat"), ())
    weights = torch.tensor([[[0.3, 0.5, 0.7]], [[0.9, 0.9, 0.9]]])
    keys = torch.tensor([[[0, 0, 1]], [[0, 1, 2]]])
    examples = TokenExamples()
    examples.add(batch, 4, weights, keys, torch.ones(2, 3, dtype=torch.bool))
    largest = examples.largest[4, 0]
    assert [(e.token, e.target, e.distance, e.document) for e in largest][:1] == [("sat", "cat", -1, "text 0")]
    assert {e.document for e in largest} == {"text 0"}

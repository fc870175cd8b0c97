"""What a running model attends to: record(), edit() and monitor(), and the hooks by which they get into a model.

The model runs unchanged. `hooks/` holds one file for each way in: transformers, torch's function, torch.nn, our own.
"""

from headscope.watching.edits import ablate, edit, knock_out, patch
from headscope.watching.monitoring import HeadWarning, monitor
from headscope.watching.recording import Recording, record

__all__ = ["HeadWarning", "Recording", "ablate", "edit", "knock_out", "monitor", "patch", "record"]

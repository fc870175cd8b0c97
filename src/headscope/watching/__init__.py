"""What a running model attends to: record(), edit() and monitor(), for any model, unchanged."""

from headscope.watching.edits import ablate, edit, knock_out, patch
from headscope.watching.monitoring import HeadWarning, monitor
from headscope.watching.recording import Recording, record

__all__ = ["HeadWarning", "Recording", "ablate", "edit", "knock_out", "monitor", "patch", "record"]

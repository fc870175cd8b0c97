"""What a running model attended to: record(model), and the recording it gives."""

from headscope.watching.recording.recorder import Recording, record
from headscope.watching.recording.run import Answer, Call, Layers, Run, layers_of
from headscope.watching.recording.site import Site
from headscope.watching.recording.tracker import Position, Tracker

__all__ = ["Answer", "Call", "Layers", "Position", "Recording", "Run", "Site", "Tracker", "layers_of", "record"]

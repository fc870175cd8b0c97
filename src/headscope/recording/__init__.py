"""What a running model attended to: record(model), and the recording it gives."""

from headscope.recording.place import Place, Tracker
from headscope.recording.recorder import Recording, record
from headscope.recording.run import Answer, Call, Layers, Run, Site, layers_of

__all__ = ["Answer", "Call", "Layers", "Place", "Recording", "Run", "Site", "Tracker", "layers_of", "record"]

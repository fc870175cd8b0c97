"""What a running model attended to: record(model), and the recording it gives."""

from headscope.recording.place import Place, Tracker
from headscope.recording.record import Answer, Call, Recording, Run, Site, record

__all__ = ["Answer", "Call", "Place", "Recording", "Run", "Site", "Tracker", "record"]

"""The guest agent: PID 1 of every VM (and of the machine). Standard library only; imports nothing of ``fcvm``."""

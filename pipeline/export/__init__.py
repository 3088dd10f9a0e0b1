"""The files that a finished run hands over, and what they cost in bytes and milliseconds."""

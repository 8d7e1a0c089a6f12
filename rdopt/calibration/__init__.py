"""Room 5, calibration: text to token batches; the parts of the text that may and may not be looked at."""

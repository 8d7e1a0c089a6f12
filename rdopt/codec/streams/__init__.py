"""The streams of a file, each with its pack and its unpack side by side."""

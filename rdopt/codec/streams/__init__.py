"""The streams of a file, each with pack and unpack side by side. `container.STREAMS` lists them: add one there."""

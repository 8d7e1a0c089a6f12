"""Room `integrations`: compressed files in other tools: transformers' torch models, model cards.

A file for another program, such as GGUF, would be a module here, made block by block from
`codec.decoder.open_file(...).tensors()`, and a choice of `run_decode` in `cli/commands.py`.
"""

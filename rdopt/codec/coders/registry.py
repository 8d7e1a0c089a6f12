"""The entropy coders of trellis indices by the name that `encode.coder` gives them.

A new one is a class beside these with their three methods, an entry at the end, since a file holds the number of its
coder (codec/FORMAT.md), and a word of `config.schema.EntropyCoder`.
"""

from rdopt.codec.coders.adaptive import Binary
from rdopt.codec.coders.huffman import Huffman
from rdopt.codec.coders.rans import Rans
from rdopt.config.schema import EntropyCoder

CODERS: dict[EntropyCoder, type[Rans] | type[Huffman] | type[Binary]] = {
    "rans": Rans, "huffman": Huffman, "binary": Binary,
}

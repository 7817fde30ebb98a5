"""Layers with quantized weights, and embeddings whose optimizer state stays in 32 bits."""

from qcore.nn.convert import convert_module_to_linear4bit, convert_module_to_linear8bit
from qcore.nn.embedding import Embedding, Embedding4bit, Embedding8bit, EmbeddingFP4, EmbeddingNF4, StableEmbedding
from qcore.nn.int4_params import Int4Params
from qcore.nn.int8_params import Int8Params, Params8bit
from qcore.nn.linear4bit import Linear4bit, LinearFP4, LinearNF4
from qcore.nn.linear8bit import Linear8bitLt
from qcore.nn.linear_int4 import LinearInt4
from qcore.nn.params import Params4bit

__all__ = [
    "Embedding",
    "Embedding4bit",
    "Embedding8bit",
    "EmbeddingFP4",
    "EmbeddingNF4",
    "Int4Params",
    "Int8Params",
    "Linear4bit",
    "Linear8bitLt",
    "LinearFP4",
    "LinearInt4",
    "LinearNF4",
    "Params4bit",
    "Params8bit",
    "StableEmbedding",
    "convert_module_to_linear4bit",
    "convert_module_to_linear8bit",
]

"""Encoders to train: a released one, or a small BERT from nothing."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from tokenizers import BertWordPieceTokenizer
from transformers import BertConfig, BertModel, BertTokenizerFast

from dystress_plugin.frameworks.sentence_transformers.head import TrainingHead

POOLINGS = ("cls", "mean", "max", "lasttoken")


def encoder(name_or_path: str, *, pooling: str = "cls", max_length: int = 32, head: bool = True) -> SentenceTransformer:
    """A transformer with pooling, as SimCSE has it.

    Args:
        name_or_path: a released model's name on Hugging Face, or a folder.
        pooling: "cls", "mean", "max" or "lasttoken".
        max_length: tokens that are read of a sentence.
        head: whether to train with `TrainingHead`.

    Raises:
        ValueError: for a pooling that there is not.
    """
    if pooling not in POOLINGS:
        raise ValueError(f"pooling='{pooling}' must be one of {', '.join(POOLINGS)}.")
    transformer = Transformer(name_or_path, max_seq_length=max_length)
    dim = transformer.get_embedding_dimension()
    return SentenceTransformer(
        modules=[transformer, Pooling(dim, pooling), *([TrainingHead(dim, dim)] if head else [])],
        similarity_fn_name="cosine",
    )


def without_head(model: SentenceTransformer) -> SentenceTransformer:
    """The same model, of the same parameters, without `TrainingHead`; in evaluation they are equal."""
    kept = [module for module in model if not isinstance(module, TrainingHead)]
    return SentenceTransformer(modules=kept, similarity_fn_name="cosine")


def random_bert(
    sentences: Iterable[str],
    folder: str | Path,
    *,
    vocabulary: int = 8000,
    dim: int = 128,
    layers: int = 2,
    heads: int = 4,
    max_length: int = 64,
) -> str:
    """Writes a BERT of random weights, with a WordPiece tokenizer of these sentences, for `encoder(folder)`.

    Weights are drawn from torch's global random numbers: seed them before.

    Args:
        sentences: text to find word pieces in.
        folder: where model and tokenizer go; made if it is not there.
        vocabulary: word pieces at most.
        dim: numbers per token.
        layers: of the transformer.
        heads: of each layer; they divide `dim`.
        max_length: tokens at most.

    Returns:
        The folder.
    """
    found = BertWordPieceTokenizer(lowercase=True)
    found.train_from_iterator(sentences, vocab_size=vocabulary, show_progress=False)
    tokenizer = BertTokenizerFast(tokenizer_object=found._tokenizer, model_max_length=max_length)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=dim,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * dim,
        max_position_embeddings=max_length,
    )
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)

"""Encoders to train: a released one, or a small BERT from nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from tokenizers import BertWordPieceTokenizer
from transformers import BertConfig, BertModel, BertTokenizerFast  # type: ignore[attr-defined]

from dystress_plugin.frameworks.sentence_transformers.head import TrainingHead

POOLINGS = ("cls", "mean", "max", "lasttoken")


def encoder(name_or_path: str, *, pooling: str = "cls", max_length: int = 32, head: bool = True) -> SentenceTransformer:
    """A transformer with pooling, as SimCSE has it.

    Args:
        name_or_path: a released model's name on Hugging Face, or a folder that transformers or sentence-transformers
            saved; of the latter the transformer is read, not its pooling and what follows.
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
    dropout: float = 0.1,
    max_length: int = 64,
) -> str:
    """Writes a BERT of random weights, and a WordPiece tokenizer of the characters and frequent words of sentences.

    `encoder(folder)` reads both. Weights are drawn from torch's global random numbers: seed them before.

    Args:
        sentences: text to find words in.
        folder: where model and tokenizer go; made if it is not there.
        vocabulary: word pieces at most.
        dim: numbers per token.
        layers: of the transformer.
        heads: of each layer; they divide `dim`.
        dropout: probability that a number is left out, in training.
        max_length: tokens at most.

    Returns:
        The folder.
    """
    numbers = {piece: number for number, piece in enumerate(_pieces(sentences, vocabulary))}
    found = BertWordPieceTokenizer(numbers, lowercase=True)
    tokenizer = BertTokenizerFast(tokenizer_object=found._tokenizer, model_max_length=max_length)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=dim,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * dim,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        max_position_embeddings=max_length,
    )
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def _pieces(sentences: Iterable[str], size: int) -> list[str]:
    """The characters, and the most frequent words.

    Not the pieces that the library's trainer finds: it breaks ties by chance, also with a seed, and numbers them by it,
    so that no two runs would begin with the same model.
    """
    empty = BertWordPieceTokenizer(lowercase=True)
    counts = Counter(
        word
        for sentence in sentences
        for word, _ in empty.pre_tokenizer.pre_tokenize_str(empty.normalizer.normalize_str(sentence))
    )
    letters = sorted({letter for word in counts for letter in word})
    words = sorted(counts, key=lambda word: (-counts[word], word))
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    return list(dict.fromkeys([*special, *letters, *(f"##{letter}" for letter in letters), *words]))[:size]

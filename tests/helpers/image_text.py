"""Image-text data set whose labels need both inputs, and a text encoder."""

from pathlib import Path

import datasets
import numpy as np
from helpers.images import colored_image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

WORDS = ("a", "picture", "taken", "at", "dawn", "dusk", "in", "town")
CLASSES = ["same", "other"]


def tokenizer(pad: str | None = "[PAD]") -> PreTrainedTokenizerFast:
    """Create a tokenizer with one token per word and none for an empty text."""
    vocabulary = {word: index for index, word in enumerate(("[PAD]", "[UNK]", *WORDS))}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token=pad, unk_token="[UNK]")


def write_encoder(folder: Path, pad: str | None = "[PAD]") -> Path:
    """Create a micro BERT for up to 16 tokens."""
    config = BertConfig(
        vocab_size=len(WORDS) + 2, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    tokenizer(pad).save_pretrained(folder)
    return folder


def split(rows: int, seed: int) -> datasets.Dataset:
    """Create the data set: `same` for a red image of dawn or a blue image of dusk."""
    rng = np.random.default_rng(seed)
    color, hour = np.arange(rows) % 2, np.arange(rows) // 2 % 2
    texts = [f"a picture taken at {'dusk' if late else 'dawn'}" for late in hour]
    texts = [f"{text} in town" if rng.random() < 0.5 else text for text in texts]
    features = {"image": datasets.Image(), "caption": datasets.Value("string")}
    features["label"] = datasets.ClassLabel(names=CLASSES)
    columns = {"image": [colored_image(2 * c, rng) for c in color], "caption": texts, "label": color ^ hour}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def write_set(folder: Path) -> Path:
    for name, rows, seed in (("train", 128, 1), ("validation", 40, 2), ("test", 80, 3)):
        split(rows, seed).to_parquet(folder / "data" / f"{name}-00000-of-00001.parquet")
    return folder

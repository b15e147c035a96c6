"""Tokenize a text column."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from hfvit.errors import DataError, ModelError, wrap_library_errors
from hfvit.utils.hub_ids import folder_or_hub_id

TEXT_INPUTS = ("input_ids", "attention_mask")  # inputs of an image and text model besides pixel_values
CHUNK = 1000


@dataclass
class TokenTable:
    """Token ids of many texts: text i is `ids[starts[i] : starts[i + 1]]`."""

    ids: np.ndarray
    starts: np.ndarray
    pad_id: int

    def __len__(self) -> int:
        return len(self.starts) - 1

    def batch(self, rows: np.ndarray) -> dict[str, torch.Tensor]:
        """Return `input_ids` and `attention_mask`, int64 `(rows, tokens)`.

        Shorter texts are padded on the right.
        """
        starts, ends = self.starts[rows], self.starts[rows + 1]
        lengths = ends - starts
        mask = np.arange(max(1, lengths.max(initial=0))) < lengths[:, None]
        ids = np.full(mask.shape, self.pad_id, dtype=np.int64)
        for row, (start, end) in enumerate(zip(starts, ends, strict=True)):
            ids[row, : end - start] = self.ids[start:end]
        # A text without tokens attends to one padding token, since a softmax over no tokens is NaN.
        mask[lengths == 0, 0] = True
        return {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask.astype(np.int64))}


def tokenize(texts: Sequence[str | None], tokenizer, max_length: int) -> TokenTable:
    """Tokenize texts.

    Args:
        texts: texts; None is an empty text.
        tokenizer: tokenizer of transformers.
        max_length: largest number of tokens; longer texts are truncated.
    """
    ids = [np.empty(0, np.int32)]
    lengths = [0]
    for start in range(0, len(texts), CHUNK):
        chunk = [text or "" for text in texts[start : start + CHUNK]]
        found = tokenizer(chunk, truncation=True, max_length=max_length)["input_ids"]
        lengths += [len(tokens) for tokens in found]
        ids.append(np.fromiter((token for tokens in found for token in tokens), dtype=np.int32))
    return TokenTable(np.concatenate(ids), np.cumsum(lengths), tokenizer.pad_token_id)


class TextReader:
    """Converts texts to the inputs of an image and text model.

    Args:
        tokenizer: tokenizer of transformers.
        max_length: largest number of tokens; longer texts are truncated.
    """

    def __init__(self, tokenizer, max_length: int):
        self.tokenizer = tokenizer
        self.max_length = max_length

    def __call__(self, texts: Sequence[str | None]) -> dict[str, np.ndarray]:
        """Return `input_ids` and `attention_mask`, int64 `(texts, tokens)`."""
        tokens = tokenize(texts, self.tokenizer, self.max_length).batch(np.arange(len(texts)))
        return {name: values.numpy() for name, values in tokens.items()}

    @property
    def key(self) -> str:
        """Return a key that is equal for readers with equal results."""
        vocabulary = json.dumps(self.tokenizer.get_vocab(), sort_keys=True)
        return f"{type(self.tokenizer).__name__} {hashlib.sha256(vocabulary.encode()).hexdigest()} {self.max_length}"

    def save(self, folder: str | Path) -> list[str]:
        """Save the tokenizer and return the names of its files."""
        return sorted(Path(path).name for path in self.tokenizer.save_pretrained(folder) if Path(path).is_file())


def split_texts(splits, tokenizer, max_length: int) -> tuple[dict[str, TokenTable], str]:
    """Tokenize the texts of each split.

    The numbers of empty and of long texts are added to the metadata of the splits.

    Args:
        splits: `data.splits.ImageSplits` with a text column.
        tokenizer: tokenizer of the model's text encoder.
        max_length: largest number of tokens; longer texts are truncated.

    Returns:
        The tokens by role, and a line for the log.

    Raises:
        DataError: all training texts are empty.
    """
    column = splits.metadata["text_column"]
    tables, total, empty, full = {}, 0, 0, 0
    for role in splits.metadata["splits"]:
        texts = splits[role]["text"][:]
        blank = sum(not (text or "").strip() for text in texts)
        if role == "train" and blank == len(texts):
            raise DataError(f"text_column: all {blank:,} training texts of column '{column}' are empty.")
        tables[role] = tokenize(texts, tokenizer, max_length)
        longest = int((np.diff(tables[role].starts) >= max_length).sum())
        splits.metadata["splits"][role] |= {"empty_texts": blank, "longest_texts": longest}
        total, empty, full = total + len(texts), empty + blank, full + longest
    return tables, (
        f"{total:,} texts from column '{column}', {empty:,} of them empty; {full:,} have or were truncated to"
        f" {max_length} tokens (max_text_length)"
    )


def load_tokenizer(source: str | Path, vocabulary: int, revision: str | None = None, **kwargs: Any):
    """Load the tokenizer that is saved with a text encoder.

    Args:
        source: folder or Hub id of the text encoder.
        vocabulary: vocabulary size of the encoder.
        revision: branch, tag or commit on the Hub.
        **kwargs: further arguments of `AutoTokenizer.from_pretrained`.

    Raises:
        ModelError: there is no tokenizer, it has no pad token, or its vocabulary is larger than the encoder's.
    """
    source = folder_or_hub_id(source, ModelError, "text_encoder")
    hub = {"revision": revision} if revision else {}
    with wrap_library_errors(ModelError, f"{source} has no tokenizer that can be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(source, **{"trust_remote_code": False, **hub, **kwargs})
    if tokenizer.pad_token_id is None:
        raise ModelError(
            f"text_encoder: the tokenizer of {source} must have a pad token. Set one and save it:"
            f" tokenizer.pad_token = tokenizer.eos_token; tokenizer.save_pretrained({str(source)!r})."
        )
    if len(tokenizer) > vocabulary:
        raise ModelError(
            f"text_encoder: the tokenizer of {source} has {len(tokenizer):,} tokens, but the encoder's vocabulary has"
            f" {vocabulary:,}."
        )
    return tokenizer

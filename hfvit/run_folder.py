"""What a run leaves in its output folder, by name; beside it there may be files of a user's own."""

EXAMPLES_FILE = "examples.npz"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
WEIGHT_FILES = (*WEIGHTS, "model-*-of-*.safetensors")
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt",
    "vocab.json", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model",
)  # fmt: skip
ADAPTER_FOLDER = "adapter"  # of a LoRA run
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")

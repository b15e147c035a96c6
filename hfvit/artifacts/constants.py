"""File names in run and export folders."""

EXAMPLES_FILE = "examples.npz"
MISTAKES_FILE = "mistakes.csv"
PREDICTIONS_FILE = "predictions.parquet"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
WEIGHT_FILES = (*WEIGHTS, "model-*-of-*.safetensors")
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt",
    "vocab.json", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model",
)  # fmt: skip
ADAPTER_FOLDER = "adapter"  # of a LoRA run
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")

# Files next to a model's weights or ONNX file.
CONFIG_FILE = "config.json"
ENGINE_RECORD_FILE = "engine.json"
EXPORT_FILE = "export.json"
PREPROCESSOR_FILE = "preprocessor_config.json"
PRETRAINED_CFG = "pretrained_cfg"  # key of PREPROCESSOR_FILE with timm's preprocessing, which stock classes ignore
RECIPE_FILE = "recipe.yaml"

MANIFEST = "checkpoint.json"
STATE_FILE = "trainer_state.json"
TRACKERS_FILE = "trackers.json"  # runs of the experiment trackers, written with report_to
STAGING = ".saving"  # in the output folder, not listed by checkpoints()
OVERWRITING = ".overwriting"  # in the output folder while its model card is that of an overwritten run

RUN_FILE = "run.json"
MULTIRUN_FILE = "multirun.json"  # in the folder of several runs
OUT_OF_FOLD_FILE = "out_of_fold.parquet"  # and of folds
LABEL_ERRORS_FILE = "label_errors.csv"
CARD_FILE = "README.md"

"""Helpers that read the option and the values of error messages."""

import pytest
from helpers.messages import assert_names, last_error, option_of


@pytest.mark.parametrize(
    ("message", "option"),
    [
        ("lora_rank: must be positive, got 0.", "lora_rank"),
        ("hfvit: error: /a b/my recipe.yaml: x", None),
        ("hfvit: error: /a/recipe.yaml: lora_rank: must be positive.", "lora_rank"),
        ("usage: hfvit predict [-h]\nhfvit predict: error: argument --top_k: 0 is wrong", "top_k"),
        ("a.py: error: argument -m/--model: expected one argument", "model"),
        ("--dtype fp8: not here", "dtype"),
        ("--min_batch 9, --max_batch 4: must rise", "min_batch, max_batch"),
        ("mixup_alpha, cutmix_alpha: need pairs", "mixup_alpha, cutmix_alpha"),
        ("/tmp/model.onnx: lora_rank: x", None),
        ("The loss is not finite: lower learning_rate.", None),
    ],
)
def test_option_of_returns_the_options_at_the_start(message, option):
    assert option_of(message) == option


def test_assert_names_matches_complete_words_and_numbers():
    assert_names("/tmp/run-7/model.onnx: row 12 of 1,000 (0.5)", "model.onnx", 12, 0.5, "1,000", "/tmp/run-7")
    for missing in (7, 1, 2, 5, 1000, "model", "onnx", "mode"):
        with pytest.raises(AssertionError):
            assert_names("/tmp/run-7/model.onnx: row 12 of 1,000 (0.5)", missing)


def test_last_error_is_the_last_error_line():
    assert last_error("hfvit: error: one\nTraceback\nhfvit: stopped: two\nmore") == "hfvit: stopped: two"
    with pytest.raises(AssertionError):
        last_error("all is well")

"""The console command: fast, lazy, and clear about mistakes."""

import dataclasses
import sys

import pytest
from helpers.commands import run_command
from helpers.messages import assert_names

import hfvit
from hfvit.recipe.files import shipped_recipes


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["recipes"],
        *(
            [name, "--help"]
            for name in ("train", "sweep", "recipes", "validate", "verify", "predict", "push", "report")
        ),
    ],
)
def test_help_never_imports_torch(words):
    probe = (
        "import sys\nfrom hfvit.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as stop:\n    assert not stop.code, stop.code\n"
        "heavy = {'torch', 'transformers', 'timm', 'datasets', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    result = run_command(sys.executable, "-c", probe, *words)
    assert result.returncode == 0, result.stderr
    assert result.stdout


def test_importing_hfvit_is_lazy():
    result = run_command(sys.executable, "-c", "import hfvit, sys; assert 'torch' not in sys.modules")
    assert result.returncode == 0, result.stderr


def test_public_names_resolve():
    for name in hfvit.__all__:
        assert getattr(hfvit, name) is not None
    with pytest.raises(AttributeError, match="'nothing'"):
        hfvit.nothing  # noqa: B018


def test_help_teaches_every_field_of_hfvit():
    text = run_command("hfvit", "train", "--help").stdout
    for section in (hfvit.ModelArguments, hfvit.DataArguments, hfvit.AugmentationArguments, hfvit.RunArguments):
        for field in dataclasses.fields(section):
            assert f"--{field.name} " in text


def test_the_options_that_help_shows_are_accepted():
    from hfvit.cli.train import EPILOG
    from hfvit.recipe.loader import load_recipe

    shown = [line.split() for line in EPILOG.splitlines() if line.startswith("  --")]
    for words in shown:
        load_recipe(["quickstart", "--use_cpu", "true", *words])


def test_recipes_are_listed_and_printed():
    listing = run_command("hfvit", "recipes").stdout
    assert [line.split()[0] for line in listing.splitlines()] == list(shipped_recipes())
    printed = run_command("hfvit", "recipes", "quickstart").stdout
    assert printed == shipped_recipes()["quickstart"].read_text()


@pytest.mark.parametrize(
    ("words", "data"),
    [
        (["train", "quickstrat"], ["'quickstrat'", "'quickstart'"]),
        (["recipes", "vit_bse"], ["'vit_bse'", "'vit_base'"]),
        (["train", "recipes"], ["RECIPE", "recipes"]),
        (["validate", "outputs/no/such"], ["outputs/no/such"]),
        (["push", "outputs", "datasets/user/x", "--dry-run"], ["datasets/user/x", "user/name"]),
        (["predict", "./no.onnx", "a.png"], ["./no.onnx"]),
    ],
)
def test_a_wrong_name_is_one_message(words, data):
    result = run_command("hfvit", *words)
    assert result.returncode == (5 if words[0] == "push" else 2)
    assert result.stderr.startswith("hfvit: error: ")
    assert len(result.stderr.splitlines()) == 1
    assert_names(result.stderr, *data)


def test_unknown_options_of_other_commands_are_refused():
    result = run_command("hfvit", "recipes", "--color")
    assert result.returncode == 2
    assert_names(result.stderr.partition(" error: ")[2], "--color")

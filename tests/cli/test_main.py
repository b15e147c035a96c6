"""The `hfvit` command: lazy imports, help texts, listings, error messages and exit codes."""

import dataclasses
import re
import shlex
import sys

import pytest
from helpers.commands import ROOT, run_command
from helpers.messages import assert_names

import hfvit
from hfvit.artifacts.run_record import command_line
from hfvit.cli import EXPORT_COMMANDS, OTHER_COMMANDS, build_parser, build_parsers, main
from hfvit.cli.train import DESCRIPTION, GROUPS
from hfvit.errors import EXIT_CODES, HFViTError
from hfvit.recipe.arguments import RunArguments, TrainerArguments
from hfvit.recipe.files import shipped_recipes
from hfvit.recipe.loader import _FIELDS, _SECTIONS, load_recipe


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["recipes"],
        *(
            [name, "--help"]
            for name in (
                "train",
                "sweep",
                "recipes",
                "validate",
                "verify",
                "predict",
                "push",
                "report",
                "demo",
                "doctor",
            )
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
    result = run_command(sys.executable, "-c", probe, *words, new_process=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout


def test_importing_hfvit_is_lazy():
    code = "import hfvit, sys; assert 'torch' not in sys.modules"
    result = run_command(sys.executable, "-c", code, new_process=True)
    assert result.returncode == 0, result.stderr


def test_public_names_resolve():
    for name in dir(hfvit):
        assert getattr(hfvit, name) is not None
    with pytest.raises(AttributeError, match="'nothing'"):
        hfvit.nothing  # noqa: B018


def test_help_describes_every_field_of_hfvit():
    text = run_command("hfvit", "train", "--help").stdout
    for section in (*_SECTIONS[:-1], RunArguments, TrainerArguments):
        for field in dataclasses.fields(section):
            assert re.search(rf"^  --{field.name}\s", text, re.MULTILINE)


def test_the_options_that_help_shows_are_accepted():
    shown = [shlex.split(line)[3:] for line in DESCRIPTION.splitlines() if line.startswith("  hfvit train my_recipe")]
    assert shown
    for words in shown:
        load_recipe(["quickstart", "--use_cpu", "true", *words])


def test_recipes_are_listed_and_printed():
    listing = run_command("hfvit", "recipes").stdout
    entries = {entry.partition(":")[0]: entry for entry in listing.split("\n\n")}
    assert list(entries) == list(shipped_recipes())
    for name, entry in entries.items():
        keys = re.findall(r"^  (\w+)", entry, re.MULTILINE)
        assert [key for key in keys if key != "on"] == ["model", "size", "image", "data", "time", "accuracy", "run"]
        assert entry.rstrip().endswith(f"hfvit train {name}")
    (accuracy,) = re.findall(r"^# Accuracy: ([\d.]+ %)", shipped_recipes()["quickstart"].read_text(), re.MULTILINE)
    assert_names(entries["quickstart"], "vit_tiny_patch16_224", "0.6 million parameters", "32 px", "digits", accuracy)
    assert re.search(r"time +not measured\n +accuracy +not measured\n +run", entries["vit_base"])
    printed = run_command("hfvit", "recipes", "quickstart").stdout
    assert printed == shipped_recipes()["quickstart"].read_text()


@pytest.mark.parametrize(
    ("words", "data"),
    [
        (["train", "quickstrat"], ["'quickstrat'", "'quickstart'"]),
        (["recipes", "vit_bse"], ["'vit_bse'", "'vit_base'"]),
        (["train", "recipes"], ["no images", "recipes", "README.md"]),
        (["validate", "outputs/no/such"], ["outputs/no/such"]),
        (["push", "outputs", "datasets/user/x", "--dry_run"], ["datasets/user/x", "user/name"]),
        (["push", "no/such/folder", "user/x", "--dry_run"], ["OUTPUT_DIR: no folder no/such/folder"]),
        (["predict", "no/such/model", "a.png"], ["no/such/model"]),
        (["report", "no/such/folder"], ["no/such/folder"]),
        (["verify", "no/such/folder"], ["no/such/folder"]),
        (["sweep", "quickstrat", "space.yaml"], ["'quickstrat'", "'quickstart'"]),
        (["sweep", "quickstart", "no_space.yaml"], ["no_space.yaml"]),
        (["demo", "no/such/model"], ["no/such/model"]),
        (["demo", "no/such/model", "--static", "page"], ["no/such/model"]),
        (["predict", "./no.onnx", "a.png"], ["./no.onnx"]),
    ],
)
def test_unknown_name_is_a_one_line_error(words, data, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stop:
        main(words)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith("hfvit: error: ")
    assert len(error.splitlines()) == 1
    assert_names(error, *data)


@pytest.mark.parametrize("words", [["doctor", "me"], ["recipes", "--color"], ["validate"], ["trian"], ["--color"]])
def test_wrong_argument_is_a_one_line_error(words):
    result = run_command("hfvit", *words)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert_names(result.stderr.partition(" error: ")[2], "REFERENCE" if words == ["validate"] else words[-1])


def test_hfvit_alone_shows_the_help_and_fails():
    result = run_command("hfvit")
    assert result.returncode == 2
    assert result.stderr == run_command("hfvit", "--help").stdout
    assert result.stdout == ""


def test_version():
    assert run_command("hfvit", "--version").stdout == f"hfvit {hfvit.__version__}\n"


def test_the_table_of_exit_codes_is_complete_and_documented():
    def subclasses(kind):
        return [kind, *(deeper for below in kind.__subclasses__() for deeper in subclasses(below))]

    import hfvit.training.distributed  # noqa: F401 - defines one

    assert {kind.exit_code for kind in subclasses(HFViTError)} <= EXIT_CODES.keys()
    table = re.findall(r"^\| (\d+) \| (.*) \|$", (ROOT / "docs" / "reliability.md").read_text(), re.MULTILINE)
    assert {int(code): meaning for code, meaning in table} == EXIT_CODES
    help_text = build_parser().format_help()
    assert all(f"{code:<3} {meaning}" in help_text for code, meaning in EXIT_CODES.items())


COMMAND_PARSERS = build_parsers()[1]


@pytest.mark.parametrize("name", COMMAND_PARSERS)
def test_every_option_has_a_help_text_and_is_accepted_with_dashes(name):
    parser = COMMAND_PARSERS[name]
    for action in parser._actions:
        assert action.help
        for option in action.option_strings:
            assert "-" not in option[2:]  # one style is shown
            assert parser._option_string_actions[option.replace("_", "-")] is action
    assert "exit codes:" in parser.format_help()


def test_check_misspelled_accepts_every_recipe_option():
    for name in ("train", "sweep"):
        COMMAND_PARSERS[name].check_misspelled([f"--{key}" for key in _FIELDS])


@pytest.mark.parametrize(("typed", "meant"), [("val", "'validate'"), ("tune", "'sweep'"), ("export", "optimum-cli")])
def test_command_of_another_library_names_hfvits(typed, meant, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([typed, "outputs/run"])
    assert stopped.value.code == 2
    assert meant in capsys.readouterr().err


def test_other_commands_are_none_but_name_one():
    assert not set(COMMAND_PARSERS) & {*OTHER_COMMANDS, *EXPORT_COMMANDS}
    assert set(OTHER_COMMANDS.values()) <= set(COMMAND_PARSERS)


@pytest.mark.parametrize(("typed", "hint"), [("--save-gird", "'--save_grid'"), ("--conf", None)])
def test_unknown_option_suggests_a_similar_one_only(typed, hint, capsys):
    with pytest.raises(SystemExit):
        main(["predict", "outputs/run", "image.png", typed, "1"])
    error = capsys.readouterr().err
    assert hint in error if hint else "'--" not in error


def test_help_of_train_lists_common_options_first():
    text = run_command("hfvit", "train", "--help").stdout
    options = re.findall(r"^  --(\w+)", text, re.MULTILINE)
    assert len(options) == len(set(options))
    order = ["dataset_name", "output_dir", "model_name_or_path", "num_train_epochs", "learning_rate", "mixup_alpha"]
    order += ["finetuning", "eval_strategy", "resume_from_checkpoint", "bf16", "push_to_hub", "nan_policy"]
    assert sorted(order, key=options.index) == order
    assert all(name in _FIELDS for names in GROUPS.values() for name in names.split())


def test_module_runs_as_the_command():
    result = run_command(sys.executable, "-m", "hfvit", "--version", new_process=True)
    assert (result.returncode, result.stdout) == (0, f"hfvit {hfvit.__version__}\n")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["/site-packages/hfvit/__main__.py", "train", "x y"], "hfvit train 'x y'"),
        (["/home/user/my_tool/__main__.py"], "my_tool"),
        ([""], ""),
    ],
    ids=["module", "other module", "interactive"],
)
def test_command_line_of_module_and_interpreter(monkeypatch, words, expected):
    monkeypatch.setattr(sys, "argv", words)
    assert command_line() == expected

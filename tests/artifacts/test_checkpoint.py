"""Checkpoint validation, choice of the checkpoint to resume from, and cleanup of the output folder."""

import json
import re

import pytest
from helpers.messages import assert_logged, assert_names
from helpers.micro_trainer import make_checkpoint

from hfvit.artifacts.checkpoint import checkpoint_error, newest_checkpoint, remove_checkpoints
from hfvit.artifacts.output_dir import check_inputs_are_kept, claim_output_dir, clear_run, is_finished, mark_finished
from hfvit.errors import RecipeError


def test_checkpoint_error_finds_missing_and_changed_files(tmp_path):
    checkpoint = make_checkpoint(tmp_path)
    assert checkpoint_error(checkpoint, read=True) is None
    file = checkpoint / "trainer_state.json"
    file.write_text("[]")
    assert checkpoint_error(checkpoint) is None
    assert_names(checkpoint_error(checkpoint, read=True), "trainer_state.json")
    file.write_text("{")
    assert_names(checkpoint_error(checkpoint), "trainer_state.json", 1, 2)
    file.unlink()
    assert_names(checkpoint_error(checkpoint), "trainer_state.json")
    manifest = checkpoint / "checkpoint.json"
    for text in ("", "[]", "{}", '{"files": [1]}', '{"files": {"rng_state.pth": {}}}', '{"files": {"a": 1}}'):
        manifest.write_text(text)
        assert checkpoint_error(checkpoint) is not None
    manifest.write_text('{"files": {}}')
    assert_names(checkpoint_error(checkpoint), "save_only_model")
    manifest.unlink()
    assert_names(checkpoint_error(checkpoint), "checkpoint.json")


def test_auto_takes_the_newest_valid_checkpoint_and_logs_skipped_ones(tmp_path, caplog):
    for step in (8, 9, 10):
        make_checkpoint(tmp_path, f"checkpoint-{step}")
    (tmp_path / "checkpoint-10" / "rng_state.pth").write_text("{")
    (tmp_path / "broken-checkpoint-10" / "plots").mkdir(parents=True)  # of an earlier resume
    (tmp_path / ".saving" / "checkpoint-12").mkdir(parents=True)
    for name in (".run.12345.json", ".README.12345.md", ".recipe.12345.yaml", ".examples.12345.npz"):
        (tmp_path / name).write_text("half")
    other = claim_output_dir(str(tmp_path), "auto", overwrite=False, is_main=False)  # reads sizes, touches nothing
    assert other == str(tmp_path / "checkpoint-9")
    assert (tmp_path / "checkpoint-10").exists()
    (tmp_path / "checkpoint-9" / "rng_state.pth").write_text("[]")
    assert claim_output_dir(str(tmp_path), "auto", overwrite=False) == str(tmp_path / "checkpoint-8")
    assert_logged(caplog, "WARNING", "checkpoint-10", "broken-checkpoint-10", "rng_state.pth", 1)
    assert_logged(caplog, "WARNING", "checkpoint-9", "broken-checkpoint-9", "rng_state.pth")
    assert not (tmp_path / ".saving").exists()
    remove_checkpoints(tmp_path)
    assert not list(tmp_path.iterdir())


def test_auto_skips_a_checkpoint_without_training_state(tmp_path, caplog):
    make_checkpoint(tmp_path, "checkpoint-3")
    alone = make_checkpoint(tmp_path, "checkpoint-6")  # with trainer_state.json, as of `save_only_model`
    manifest = json.loads((alone / "checkpoint.json").read_text())
    del manifest["files"]["rng_state.pth"]
    (alone / "checkpoint.json").write_text(json.dumps(manifest))
    assert claim_output_dir(str(tmp_path), "auto", overwrite=False) == str(tmp_path / "checkpoint-3")
    assert alone.exists()
    assert_logged(caplog, "WARNING", alone, "save_only_model")


def test_clear_run_deletes_nothing_in_a_folder_without_a_run(tmp_path):
    files = [tmp_path / name for name in ("config.json", "model.safetensors", "tokenizer.json", "README.md")]
    for file in files:
        file.touch()
    clear_run(tmp_path)
    assert all(file.exists() for file in files)
    make_checkpoint(tmp_path)
    clear_run(tmp_path)
    mark_finished(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]  # a user may have edited the card


def test_run_that_overwrites_another_is_finished_by_its_own_card(tmp_path):
    for name in ("run.json", "README.md"):
        (tmp_path / name).touch()
    assert is_finished(tmp_path)
    clear_run(tmp_path)
    (tmp_path / "run.json").touch()  # of the new run, which is killed before its card
    assert not is_finished(tmp_path)
    mark_finished(tmp_path)
    assert is_finished(tmp_path)


def test_card_of_an_overwritten_run_does_not_stop_a_new_start(tmp_path):
    (tmp_path / "README.md").touch()
    with pytest.raises(RecipeError, match=r"^output_dir: "):
        claim_output_dir(str(tmp_path), "auto", overwrite=False)
    clear_run(tmp_path)  # and killed before its first checkpoint
    assert claim_output_dir(str(tmp_path), "auto", overwrite=False) is None


def test_overwrite_keeps_checkpoints_that_the_run_reads(tmp_path):
    checkpoint = make_checkpoint(tmp_path)
    for path in (tmp_path, checkpoint):
        with pytest.raises(RecipeError, match=r"^teacher: ") as caught:
            check_inputs_are_kept(str(tmp_path), {"model_name_or_path": "timm/vit", "teacher": str(path)})
        assert_names(caught.value, path, "--overwrite_output_dir")
    (tmp_path / "mine").mkdir()
    check_inputs_are_kept(str(tmp_path), {"model_name_or_path": str(tmp_path / "mine"), "teacher": None})


def test_resume_from_an_older_checkpoint_needs_overwrite(tmp_path):
    for step in (3, 6, 9):
        make_checkpoint(tmp_path, f"checkpoint-{step}")
    older = str(tmp_path / "checkpoint-6")
    with pytest.raises(RecipeError, match=r"^resume_from_checkpoint: ") as caught:
        claim_output_dir(str(tmp_path), older, overwrite=False)
    assert_names(caught.value, "checkpoint-6", "checkpoint-9")
    assert claim_output_dir(str(tmp_path), older, overwrite=True) == older
    assert newest_checkpoint(tmp_path).name == "checkpoint-9"  # nothing is deleted before the run begins
    clear_run(tmp_path, older)
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["checkpoint-3", "checkpoint-6"]


def test_resume_from_a_checkpoint_with_changed_content_raises(tmp_path):
    checkpoint = make_checkpoint(tmp_path)
    (checkpoint / "rng_state.pth").write_text("[]")  # as many bytes
    with pytest.raises(RecipeError, match=r"^resume_from_checkpoint: .*\brng_state\.pth\b"):
        claim_output_dir(str(tmp_path), str(checkpoint), overwrite=False)


def test_checkpoint_of_a_step_that_was_saved_before_replaces_it(tmp_path):
    (make_checkpoint(tmp_path) / "more").touch()
    assert not (make_checkpoint(tmp_path) / "more").exists()


def test_resume_of_true_names_auto(tmp_path):
    with pytest.raises(RecipeError, match=r"^resume_from_checkpoint: ") as caught:
        claim_output_dir(str(tmp_path), "True", overwrite=False)
    assert_names(caught.value, "True", "auto")


def test_checkpoints_of_another_program_are_not_changed(tmp_path):
    foreign = tmp_path / "checkpoint-500"
    foreign.mkdir()
    (foreign / "model.safetensors").touch()
    for resume, overwrite in ((None, False), (None, True), ("auto", True)):
        with pytest.raises(RecipeError, match=r"^output_dir: .*\bcheckpoint-500\b"):
            claim_output_dir(str(tmp_path), resume, overwrite)
    assert [path.name for path in foreign.iterdir()] == ["model.safetensors"]


def test_hidden_file_of_the_user_is_kept(tmp_path):
    for name in (".README.draft.md", ".README.123.md"):
        (tmp_path / name).touch()
    claim_output_dir(str(tmp_path), None, overwrite=False)
    assert [path.name for path in tmp_path.iterdir()] == [".README.draft.md"]


def test_linked_checkpoint_is_unlinked(tmp_path):
    moved = make_checkpoint(tmp_path / "large_disk")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "checkpoint-5").symlink_to(moved)
    (tmp_path / "out" / "checkpoint-6").touch()  # no folder
    clear_run(tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["checkpoint-6"]
    assert checkpoint_error(moved) is None


@pytest.mark.parametrize("name", ["vocab.txt", "run.json", "model-00001-of-00002.safetensors"])
def test_file_that_a_run_would_replace_is_named(name, tmp_path):
    (tmp_path / name).touch()
    (tmp_path / "notes.md").touch()
    with pytest.raises(RecipeError, match=rf"^output_dir: .*\b{re.escape(name)}\b") as caught:
        claim_output_dir(str(tmp_path), None, overwrite=False)
    assert "notes.md" not in str(caught.value)


def test_recipe_in_the_output_folder_is_kept(tmp_path):
    make_checkpoint(tmp_path)
    recipe = tmp_path / "recipe.yaml"
    recipe.touch()
    clear_run(tmp_path, recipe=tmp_path / ".." / tmp_path.name / "recipe.yaml")
    assert list(tmp_path.iterdir()) == [recipe]
    make_checkpoint(tmp_path)
    clear_run(tmp_path, recipe=tmp_path.parent)
    assert not list(tmp_path.iterdir())

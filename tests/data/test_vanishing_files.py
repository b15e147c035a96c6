"""What a run reads may be deleted under it."""

import shutil

import datasets
from helpers.micro_trainer import losses, make_trainer
from transformers import TrainerCallback


class Deletes(TrainerCallback):
    """Empties the cache of `datasets`, the decoded pictures in it, before the first evaluation."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            shutil.rmtree(datasets.config.HF_DATASETS_CACHE)


def test_a_cache_that_vanishes_changes_nothing(tmp_path):
    for workers in (0, 1):
        trainers = [
            make_trainer(tmp_path / f"{name}{workers}", callbacks, dataloader_num_workers=workers)
            for name, callbacks in (("kept", []), ("gone", [Deletes()]))
        ]
        for trainer in trainers:
            trainer.train()
        assert not datasets.config.HF_DATASETS_CACHE.exists()
        assert losses(trainers[0]) == losses(trainers[1])
        scores = [[e["eval_loss"] for e in t.state.log_history if "eval_loss" in e] for t in trainers]
        assert len(scores[0]) == 2
        assert scores[0] == scores[1]

"""Cache files may be deleted during a run."""

import shutil

import datasets
from helpers.micro_trainer import losses, make_trainer
from transformers import TrainerCallback


class Deletes(TrainerCallback):
    """Deletes the cache of `datasets`, with the decoded images, before the first evaluation."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            shutil.rmtree(datasets.config.HF_DATASETS_CACHE)


def test_deleted_cache_does_not_affect_the_run(tmp_path):
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

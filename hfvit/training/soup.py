"""Soup of the checkpoints of a run."""

import logging
from pathlib import Path

from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file

from hfvit.artifacts.checkpoint import MODEL_ONLY, checkpoint_error, checkpoints, step_of
from hfvit.artifacts.run_sections import Soup
from hfvit.models.soup import Weights, cook_soup

logger = logging.getLogger(__name__)


def average_checkpoints(trainer, kind: str, averaged_file: str | None) -> Soup | None:
    """Average the kept checkpoints.

    The mean is used if it is at least as good as the model on the validation split. Must be called by every process,
    with the final weights in the model.

    Args:
        trainer: the `HFViTTrainer` after training.
        kind: "greedy" or "uniform", see `cook_soup`.
        averaged_file: name of the averaged weights of checkpoints of a run with EMA or SWA, which then are averaged.

    Returns:
        Members and scores; None if there is no checkpoint.
    """
    args = trainer.args
    found = [None]
    if args.process_index == 0:
        found = [complete_checkpoints(args.output_dir, trainer.state.global_step)]
    broadcast_object_list(found)
    names = found[0]
    if not names:
        logger.warning("soup: no checkpoint to average in %s.", args.output_dir)
        return None
    model = trainer.accelerator.unwrap_model(trainer.model)
    final = {name: value.clone() for name, value in model.state_dict().items()}
    names_in_model = {model.saved_name(name): name for name in final}
    metric = (args.metric_for_best_model or "loss").removeprefix("eval_")
    sign = 1 if args.greater_is_better else -1

    def read(name: str) -> Weights:
        folder = Path(args.output_dir) / name
        if averaged_file:
            return load_file(folder / averaged_file)
        weights: Weights = {}
        for file in folder.glob("model*.safetensors"):
            weights |= load_file(file)
        return {names_in_model[key]: value for key, value in weights.items()}

    def score(weights: Weights, _: str | None = None) -> float:
        model.load_state_dict(weights)
        return trainer.predict(trainer.eval_dataset, metric_key_prefix="eval").metrics[f"eval_{metric}"]

    before = score(final)
    soup, weights = cook_soup(kind, names, read, score, metric=metric, greater_is_better=bool(args.greater_is_better))
    soup.before = before
    soup.is_used = sign * soup.score >= sign * before
    model.load_state_dict(weights if soup.is_used else final)
    logger.info(
        "%s soup of %d of %d checkpoints: validation %s %.4f, before %.4f; %s",
        kind.capitalize(),
        len(soup.used),
        len(names),
        metric,
        soup.score,
        before,
        "used" if soup.is_used else "not used",
    )
    return soup


def complete_checkpoints(output_dir: str, last_step: int) -> list[str]:
    """Return the names of the complete checkpoints after step 0, oldest first.

    Args:
        output_dir: folder of the run.
        last_step: last step of the run.
    """
    return [
        folder.name
        for folder in checkpoints(output_dir)
        if 0 < step_of(folder) <= last_step and checkpoint_error(folder, read=True) in (None, MODEL_ONLY)
    ]

"""Tasks of EleutherAI's lm-evaluation-harness, with the model in this process.

The program ``lm_eval --model hf`` would load the weights alone: an input longer than the window would not be read into
a memory, and of an adapter it knows nothing.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

BOOTSTRAPS = 1000  # for the errors of scores that are no means


def find_tasks(tasks: Sequence[str], include_path: Path | None) -> Any:
    """A task manager that knows all of these, from a folder or from the package.

    Raises:
        ImportError: the package is missing.
        ValueError: a name that is no task, group or tag.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError(f"fot eval harness needs {error.name}: pip install 'fot[harness]'") from error
    folder = None if include_path is None else str(include_path)
    if folder is not None:  # the package has thousands of files, which take long to find
        manager = TaskManager(include_path=folder, include_defaults=False)
        if set(tasks) <= set(manager.all_tasks):
            return manager
    manager = TaskManager(include_path=folder)
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise ValueError(
            f"there is no task {unknown[0]!r}: lm_eval ls tasks lists those of the harness, and --include-path names a "
            "folder of others"
        )
    return manager


def run(
    model: Any,
    tasks: Sequence[str],
    manager: Any,
    *,
    limit: int | None = None,
    shots: int | None = None,
    batch_size: int = 1,
    max_length: int | None = None,
) -> dict[str, Any]:
    """Scores of a model in tasks of the harness, at temperature 0 and with the harness's own seeds.

    Args:
        model: a ``FoTForCausalLM`` with its tokenizer.
        tasks: names of tasks, groups or tags.
        manager: of ``find_tasks``.
        limit: documents of each task; None for all.
        shots: examples before each; None for what the task says.
        batch_size: inputs at once. Padding moves the windows of inputs that are longer than one.
        max_length: tokens of an input, from its end; what does not fit the window is read into a memory. None for the
            model's ``max_position_embeddings``.

    Returns:
        ``{"results": [{"task", "version", "shots", "documents", "metrics": {name: {"value", "stderr"}}}, ...],
        "interrupted": bool}``; a group's tasks come beside it. Ctrl-C ends the run and keeps the finished tasks.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval.models.huggingface").addFilter(_is_no_reproach)
    wrapped = HFLM(pretrained=model, tokenizer=model.tokenizer, max_length=max_length, batch_size=batch_size)
    found: list[dict[str, Any]] = []
    interrupted = False
    try:
        for task in tasks:
            scores = simple_evaluate(
                wrapped,
                tasks=[task],
                task_manager=manager,
                limit=limit,
                num_fewshot=shots,
                log_samples=False,
                bootstrap_iters=BOOTSTRAPS,
            )
            found += [task_scores(name, scores) for name in scores["results"]]
    except KeyboardInterrupt:
        interrupted = True
    return {"results": found, "interrupted": interrupted}


def _is_no_reproach(record: logging.LogRecord) -> bool:
    """Not the warning that the model is loaded already, which is the point."""
    return "`pretrained` model kwarg is not of type `str`" not in record.getMessage()


def task_scores(name: str, scores: dict[str, Any]) -> dict[str, Any]:
    """The scores of one task; the harness names them ``metric,filter``, and their errors ``metric_stderr,filter``."""
    numbers = {key: value for key, value in scores["results"][name].items() if "," in key}
    metrics = {}
    for key, value in numbers.items():
        metric, _, filtered = key.partition(",")
        if not metric.endswith("_stderr"):
            error = numbers.get(f"{metric}_stderr,{filtered}")
            label = metric if filtered == "none" else f"{metric} ({filtered})"
            metrics[label] = {"value": value, "stderr": error if isinstance(error, float) else None}
    return {
        "task": name,
        "version": scores.get("versions", {}).get(name),
        "shots": scores.get("n-shot", {}).get(name),
        "documents": scores.get("n-samples", {}).get(name, {}).get("effective"),
        "metrics": metrics,
    }

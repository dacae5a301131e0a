"""``quantkit eval``: task scores by lm-evaluation-harness (the extra ``eval``), of the model as
quantkit loads it: what is scored is what runs."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from quantkit.core import provenance
from quantkit.core.source import resolve
from quantkit.errors import QuantkitError, UsageError
from quantkit.runtime.load import load

_SEPARATOR = ","  # lm-eval calls a metric "acc,none": its name, and the filter of the answers


@dataclass(frozen=True)
class Score:
    """``error`` is lm-eval's standard error, None where it has none."""

    task: str
    metric: str
    filter: str
    value: float
    error: float | None


@dataclass
class Evaluation:
    """``few_shot``, ``samples``: by task, examples in front of each question, and questions."""

    model: str
    scores: list[Score]
    few_shot: dict[str, int]
    samples: dict[str, int]
    settings: dict[str, Any]

    def described(self) -> dict[str, Any]:
        """Plain numbers and text, for JSON."""
        return {**vars(self), "scores": [vars(score) for score in self.scores]}


def evaluate(
    model: str,
    *,
    tasks: str | list[str],
    limit: int | None = None,
    batch_size: int = 1,
    num_fewshot: int | None = None,
    include_path: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
) -> Evaluation:
    """Score ``model`` on tasks of lm-eval.

    tasks         names, or one text with commas between them
    limit         only so many questions of each task
    num_fewshot   examples in front of each question; by default what the task says
    include_path  a folder with tasks of one's own (YAML files)

    Raises UsageError for a task that there is not, QuantkitError when lm-eval is missing, or when
    the model or a task's data cannot be loaded.
    """
    names = _named(tasks)
    for name, value in (("limit", limit), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise UsageError(f"{name} {value} leaves nothing to do", "give at least 1")
    if num_fewshot is not None and num_fewshot < 0:
        raise UsageError(f"{num_fewshot} examples cannot be given", "give 0 or more")
    if find_spec("lm_eval") is None:
        raise QuantkitError("lm-eval is not installed", "pip install 'quantkit[eval]'")
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=_folder(include_path))
    _refuse_unknown(names, manager.all_tasks)
    source = resolve(model, revision)
    loaded, tokenizer = load(model, device=device, dtype=dtype, revision=revision)
    try:
        found = lm_eval.simple_evaluate(
            model=HFLM(pretrained=loaded, tokenizer=tokenizer, batch_size=batch_size),
            tasks=names,
            limit=limit,
            num_fewshot=num_fewshot,
            task_manager=manager,
            log_samples=False,
        )
    except OSError as error:  # of datasets: no network, no such repository, no such file
        raise QuantkitError(
            f"the data of {', '.join(names)} cannot be read: {error}",
            "tasks download their data from the Hub; tasks of your own: --include-path",
        ) from error
    settings = {
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "device": provenance.machine(loaded.device),
        "versions": {**provenance.versions(), "lm_eval": lm_eval.__version__},
    }
    samples = {name: some["effective"] for name, some in found["n-samples"].items()}
    return Evaluation(source.name, _scores(found), dict(found["n-shot"]), samples, settings)


def _named(tasks: str | list[str]) -> list[str]:
    given = tasks.split(",") if isinstance(tasks, str) else tasks
    names = [name.strip() for name in given if name.strip()]
    if not names:
        raise UsageError("there is no task to score", "name some, such as --tasks hellaswag")
    return names


def _folder(include_path: str | None) -> str | None:
    if include_path is not None and not Path(include_path).is_dir():
        raise UsageError(f"{include_path} is no folder", "--include-path takes one with YAML files")
    return include_path


def _refuse_unknown(names: list[str], known: list[str]) -> None:
    for name in names:
        if name not in known:
            raise UsageError(
                f"lm-eval has no task '{name}'",
                "'lm-eval ls tasks' lists them; tasks of your own: --include-path",
            )


def _scores(found: dict[str, Any]) -> list[Score]:
    """Of every task and group, its metrics in lm-eval's order."""
    scores = []
    for task, results in found["results"].items():
        for key, value in results.items():
            metric, separator, kind = key.partition(_SEPARATOR)
            if not separator or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = results.get(f"{metric}_stderr{_SEPARATOR}{kind}")
            known = float(error) if isinstance(error, int | float) else None
            scores.append(Score(task, metric, kind, float(value), known))
    return scores

"""The end of a quantization: what goes beside the weights, and the step that makes it whole."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from quantkit.core import calibration, card_data, provenance
from quantkit.core.checkpoint import Checkpoint, ShardWriter, write_json, write_text
from quantkit.core.source import Source
from quantkit.formats.older_names import with_older_names
from quantkit.workflows import card, card_use, inspect, legacy
from quantkit.workflows.output import Output
from quantkit.workflows.plan import stored_dtype

if TYPE_CHECKING:
    from quantkit.workflows.task import Report, Task


def seal(
    report: "Report",
    output: Output,
    writer: ShardWriter,
    task: "Task",
    hashes: dict[str, str],
) -> None:
    """Write everything beside the tensors, look at the whole once more, and rename the folder."""
    plan, folder = report.plan, output.partial
    output.copy_companions(plan.source)
    config = plan.source.read_json("config.json") or {}
    config.pop("torch_dtype", None)
    config.pop("_name_or_path", None)  # often a path of whoever saved the original
    config["dtype"] = str(stored_dtype(plan)).removeprefix("torch.")
    config = with_older_names(config) | plan.configuration()
    write_json(folder / "config.json", config)
    for file, beside in plan.packer.beside(config, plan.source.name).items():
        write_json(folder / file, beside)
    writer.close()
    legacy.add(folder, task.legacy_name)
    told(_provenance(report, [*task.calib], hashes), plan.source, folder, config)
    output.complete()


def told(content: dict[str, Any], source: Source, folder: Path, config: dict[str, Any]) -> None:
    """quantkit.json and the model card of a folder whose weights are written. ``config``: of the
    model, for the memory that it takes."""
    content["size"]["kv_bytes_per_token"] = card_use.kv_bytes(config)
    content["card"] = content.get("card") or card_data.inherited(source.folder)
    content["readers"] = inspect.readers(source.name, folder)
    content.pop("file", None)  # of the model that this was converted from
    if single := next(folder.glob("*.gguf"), None):
        content["file"] = single.name
    write_json(folder / provenance.FILE, content)
    write_text(folder / card_data.CARD, card.model_card(content))


def _provenance(report: "Report", sources: list[str], hashes: dict[str, str]) -> dict[str, Any]:
    plan, rows = report.plan, report.calibration
    jobs = plan.layout.all_jobs()
    return {
        "method": plan.method.name,
        "source": {
            "name": plan.source.name,
            "revision": plan.source.revision,
            "files": hashes,
            "bytes": cast(Checkpoint, plan.skeleton.checkpoint).nbytes,
        },
        "settings": plan.resolved(),
        "size": {
            "bytes": plan.output_bytes,
            "bits_per_weight": round(plan.bits_per_weight, 4),
            "quantized_weights": sum(job.out * job.width for job in jobs),
            "linears": len(jobs),
        },
        "calibration": {
            "sources": [calibration.public_name(source) for source in sources],
            "rows": len(rows.rows),
            "tokens": sum(len(row) for row in rows.rows),
            "tokens_by_label": dict(rows.tokens),
            "documents_used": rows.used,
            "documents_left": rows.left,
            "sha256": rows.digest,
            "notes": rows.notes,
        },
        "budget": report.budget,
        "measured": None if report.measured is None else report.measured.described(),
        "layers": report.layers,
        **({"scaled": pairs} if (pairs := report.pairs()) else {}),
        "fallbacks": report.fallbacks,
        "memory": {"mode": str(plan.way), "backoffs": report.backoffs},
        "dropped_tensors": plan.layout.dropped,
        "versions": provenance.versions(),
        "machine": provenance.machine(plan.skeleton.device, report.ranks),
        "seconds": {phase: round(spent, 2) for phase, spent in report.seconds.items()},
    }

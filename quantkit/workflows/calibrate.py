"""From ``--calib`` to rows of token ids that the model can be run on."""

import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from quantkit.core import calibration
from quantkit.core.calibration import Calibration, Document
from quantkit.core.progress import Progress, Step
from quantkit.core.source import Source
from quantkit.errors import QuantkitError, UsageError
from quantkit.runtime.skeleton import Skeleton

SAMPLED_AT_ONCE = 16  # texts


def longest_row(skeleton: Skeleton) -> int | None:
    """Tokens that the model can take at once, if its configuration says."""
    longest: int | None = getattr(
        skeleton.config.get_text_config(), "max_position_embeddings", None
    )
    return longest


def calibrate(
    source: Source,
    tokenizer: Any,
    specifications: list[str],
    *,
    rows: int,
    seqlen: int,
    longest: int | None,
    seed: int,
    device: torch.device,
    progress: Progress | None = None,
) -> Calibration:
    """Rows for calibration. ``rows`` limits them where the specifications name no number;
    ``seqlen`` is cut to ``longest``, what the model can take."""
    if rows < 1 or seqlen < 2:
        raise UsageError("calibration needs at least one row of two tokens")
    result = Calibration()
    if longest is not None and longest < seqlen:
        result.notes.append(f"rows are {longest} tokens, the longest that the model can take")
        seqlen = longest
    parts = [part for text in specifications for part in calibration.parse(text)]
    open_ended = sum(part.rows is None for part in parts)
    fixed = sum(part.rows or 0 for part in parts)
    cap = max(1, (rows - fixed) // max(1, open_ended))
    for part in parts:
        if part.source == "self":
            if any(not (source.folder / name).exists() for name in source.remote):
                raise UsageError(
                    "--calib self needs the whole model on this disk",
                    "leave out --low-disk, or calibrate on other text",
                )
            wanted = cap if part.rows is None else part.rows
            documents: Any = _sampled(
                source, tokenizer, wanted, seqlen, seed, device, progress or Progress()
            )
        else:
            documents = calibration.read(part.source, seed)
        packed = calibration.pack(documents, tokenizer, part.rows, seqlen, cap)
        name = calibration.public_name(part.source)
        packed.short = [f"calibration {name}: {text}" for text in packed.short]
        result.extend(packed)
    too_long = max(len(row) for row in result.rows)
    if longest is not None and too_long > longest:
        raise QuantkitError(
            f"a row of input_ids has {too_long} tokens, the model takes {longest} at most"
        )
    return result


def _sampled(
    source: Source,
    tokenizer: Any,
    rows: int,
    length: int,
    seed: int,
    device: torch.device,
    progress: Progress,
) -> list[Document]:
    """Rows that the model writes itself, from nothing but the start token, at temperature 1. The
    whole model is in memory while it does."""
    from quantkit.runtime.load import load

    start = tokenizer.bos_token_id
    if start is None:
        start = tokenizer.eos_token_id
    if start is None:
        raise QuantkitError("the tokenizer has no start token to sample calibration text from")
    model, _ = load(str(source.folder), device=str(device))
    torch.manual_seed(seed)
    stream: list[int] = []
    at_once = min(rows, SAMPLED_AT_ONCE)
    progress.begin("letting the model write calibration text", rows)
    while len(stream) < rows * length:
        started = time.perf_counter()
        written = model.generate(
            torch.full((at_once, 1), start, device=model.device),
            attention_mask=torch.ones(at_once, 1, dtype=torch.long, device=model.device),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=length - 1,
            pad_token_id=start,
        )
        for row in written.tolist():
            stream += _until(row, tokenizer.eos_token_id)
        done = min(rows, len(stream) // length)
        spent = time.perf_counter() - started
        progress.step(Step(done, rows, f"{len(stream):,} tokens", None, spent))
    progress.end()
    cut = [stream[i : i + length] for i in range(0, rows * length, length)]
    return [Document("self", ids=tuple(row)) for row in cut]


def _until(row: list[int], end: int | None) -> list[int]:
    """The row up to its first end token behind the start (what follows that is padding)."""
    return row[: row.index(end, 1) + 1] if end in row[1:] else row


def shared(rows: list[list[int]], tokens: int, ranks: int) -> list[Tensor]:
    """The micro-batches of so many ranks together: those of one, but smaller where there would not
    be two for each."""
    found = batches(rows, tokens)
    while ranks > 1 and len(found) < min(2 * ranks, len(rows)):
        tokens //= 2
        found = batches(rows, tokens)
    return found


def check_enough(rows: Calibration, ranks: int) -> None:
    """Raises UsageError when some of the ranks would have nothing to do."""
    if len(rows.rows) < ranks:
        raise UsageError(
            f"{ranks} processes need at least {ranks} rows of calibration text, not "
            f"{len(rows.rows)}",
            "start fewer processes, or use more --calib-rows",
        )


def too_few(rows: Calibration, widest: int) -> str | None:
    """What is to be said where there are fewer tokens than a Hessian has rows: it is singular, and
    directions that no token has are only damped. In words, None when there are enough."""
    tokens = rows.tokens.total()
    if tokens >= widest:
        return None
    return (
        f"calibration has {tokens:,} tokens, fewer than the {widest:,} inputs of the widest "
        "linear, whose statistics are incomplete: give more text (--calib) or rows (--calib-rows)"
    )


def check_known(rows: Iterable[list[int]], skeleton: Skeleton) -> None:
    """Raises QuantkitError for rows with tokens that the model has no embedding of."""
    known = skeleton.model.get_input_embeddings().weight.shape[0]
    largest = max((token for row in rows for token in row), default=0)
    if largest >= known:
        raise QuantkitError(
            f"the tokenizer of {skeleton.source.name} makes token {largest}, and the model knows "
            f"{known} tokens",
            "give the model the tokenizer that it was trained with",
        )


def batches(rows: list[list[int]], tokens: int) -> list[Tensor]:
    """Rows as int64 [rows, tokens] micro-batches of about ``tokens`` tokens; a batch's rows are
    equally long."""
    result: list[Tensor] = []
    for length in dict.fromkeys(len(row) for row in rows):
        same = torch.tensor([row for row in rows if len(row) == length])
        result += same.split(max(1, tokens // length))
    return result

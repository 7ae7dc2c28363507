"""Compression from end to end: a training run and a recipe become another run, if the gate lets it pass.

    <out>                    run.json, best.safetensors, compression.json: a run like any other, for `rankd build`;
                             int8.json with the scales of int8, if the recipe quantizes
    .<out>.compressing       while it is made: begun.json, and what `smaller_model.py` and `int8_tuning.py` go on from

An interrupted compression goes on when the same command is run again. <out> appears whole, and only if the gate passed;
the run that was compressed, and what is built of it, are never touched.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from rankd.build.int8_graphs import Int8Plan
from rankd.compress.accuracy_gate import AccuracyGate, gate_days
from rankd.compress.calibration import Calibration, calibration_of
from rankd.compress.compression_recipe import CompressionRecipe, check_recipe
from rankd.compress.int8_tuning import float_folder, tidy_tuning, tune_in_int8, tuning_of
from rankd.compress.quantization import Judged, check_int8, quantize_and_judge, read_plan, write_plan
from rankd.compress.record_files import read_record, write_record
from rankd.compress.smaller_model import WEIGHTS, Original, Start, make_smaller, tidy_start
from rankd.errors import BuildError, ConfigError, GateRefused, RankdError
from rankd.gate_record import Compression, GateRecord, Searched
from rankd.train.evaluation import Progress
from rankd.train.run import file_sha256, open_run
from rankd.train.samples import Dataset

RECORD = "compression.json"


class Begun(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an unfinished compression is of."""

    recipe: CompressionRecipe
    original_sha256: str
    data_sha256: str
    calibration_sha256: str = ""


@dataclass(frozen=True, slots=True)
class Passed:
    """A model that the gate let pass, of which a run can be made; `search` says how a search came to its recipe."""

    recipe: CompressionRecipe
    start: Start
    gate: GateRecord
    int8: Judged | None = None
    search: Searched | msgspec.UnsetType = msgspec.UNSET


def compress(
    run: Path,
    recipe: CompressionRecipe,
    out: Path,
    data: Path | None = None,
    progress: Progress = lambda done, total, line: None,
    calibrate: Path | None = None,
) -> Compression:
    """Make a smaller version of a trained run in the folder `out`, or go on with it.

    `calibrate` is a file of requests for int8 (`calibration.py`); without it they are the log's.

    Raises:
        ConfigError: `out` exists, or a compression of something else was begun for it; a bad recipe; a run that is a
            compression itself.
        DataError: the log is not the one that the run was trained on, no days or users to judge by, or requests that
            nothing can be calibrated on.
        BuildError: a step that cannot be done, or a budget that cannot be met.
        GateRefused: the model keeps less than the recipe's bounds; nothing is left in `out` or beside it.
    """
    check_recipe(recipe)
    if out.exists():
        raise ConfigError(f"{out} exists; name another folder with --out, or remove it")
    if (run / RECORD).exists():
        raise ConfigError(
            f"{run} is a compression itself, and a gate on it would not see what it has lost already; compress the "
            "run that it was made from, with the steps of both"
        )
    original = Original(run, *open_run(run, data))
    gate = AccuracyGate(original.model, original.dataset, recipe.gate)
    calibration = _calibration(original.dataset, recipe, calibrate)
    work = out.with_name(f".{out.name}.compressing")
    digest = "" if calibration is None else calibration.sha256
    _begin(work, Begun(recipe, file_sha256(run / WEIGHTS), original.run.data_sha256, digest))
    try:
        passed = _carry_out(work, original, recipe, gate, calibration, progress)
    except RankdError as error:  # it would end so again; what was only interrupted stays
        shutil.rmtree(work)
        if isinstance(error, GateRefused):
            raise GateRefused(f"{error}; nothing was written to {out}") from error
        raise
    return finish(work, out, original, passed)


def _carry_out(
    work: Path,
    original: Original,
    recipe: CompressionRecipe,
    gate: AccuracyGate,
    calibration: Calibration | None,
    progress: Progress,
) -> Passed:
    start, subject = make_smaller(float_folder(work, recipe), original, recipe, progress)
    found = None
    if calibration is not None and tuning_of(recipe) is not None:
        subject, found = tune_in_int8(work, original, recipe, subject, calibration, progress)
    floats = gate.judge(subject.model, progress)
    if not floats.passed:
        raise GateRefused(f"the compressed model is refused: {refusal(floats)}")
    if calibration is None:
        return Passed(recipe, start, floats)
    int8 = quantize_and_judge(gate, subject, recipe, calibration, found, progress)
    if not int8.record.gate.passed:
        raise GateRefused(
            f"the model is refused in int8: {refusal(int8.record.gate)}; scales were found on "
            f"{int8.record.num_requests} requests ({int8.record.calibration}), on which int8 changes a logit by "
            f"{int8.record.error:.3g} of their spread"
        )
    return Passed(recipe, start, floats, int8)


def finish(work: Path, out: Path, original: Original, passed: Passed) -> Compression:
    """Write the run of a model that passed and its record, and move the folder to its place."""
    start, int8 = passed.start, passed.int8
    made = Compression(
        recipe=_without_nothing(passed.recipe),
        original_sha256=file_sha256(original.folder / WEIGHTS),
        weights_sha256=file_sha256(work / WEIGHTS),
        flops=start.flops,
        parameters=start.parameters,
        gate=passed.gate,
        ms=start.ms,
        price_error=start.price_error,
        search=passed.search,
        int8=msgspec.UNSET if int8 is None else int8.record,
    )
    recipe = msgspec.structs.replace(original.run.recipe, model=start.choice)
    write_record(work / "run.json", msgspec.structs.replace(original.run, recipe=recipe))
    if int8 is not None:
        write_plan(work, int8.plan)
    write_record(work / RECORD, made)
    tidy(work)
    work.rename(out)
    return made


def tidy(work: Path) -> None:
    """Remove what only an unfinished compression needs."""
    tidy_start(work)
    tidy_tuning(work)
    (work / "begun.json").unlink(missing_ok=True)


def read_compression(folder: Path) -> Compression | None:
    """How a run folder came from `rankd compress`; None for one that did not.

    Raises:
        ConfigError: the record cannot be read, did not pass, or is not of the weights beside it.
    """
    if not (folder / RECORD).exists():
        return None
    made = read_record(folder / RECORD, Compression)
    if not made.gate.passed:
        raise ConfigError(f"{folder / RECORD}: {refusal(made.gate)}; a model that did not pass is not built")
    if made.weights_sha256 != file_sha256(folder / WEIGHTS):
        raise ConfigError(f"{folder / WEIGHTS} is not what the gate has judged (its checksum differs); compress again")
    return made


def read_int8(folder: Path, made: Compression | None) -> Int8Plan | None:
    """The scales of a run folder that was quantized; None for one that was not.

    Raises:
        ConfigError: they cannot be read, or are not what the gate has judged. BuildError: it refused them.
    """
    if made is None or isinstance(made.int8, msgspec.UnsetType):
        return None
    if not made.int8.gate.passed:
        raise BuildError("the gate did not let the model pass in int8; build it in bf16 or fp32")
    return read_plan(folder, made.int8)


def served_gate(made: Compression) -> GateRecord:
    """The decision on what is served by default: on the quantized graphs, if there are any."""
    return made.gate if isinstance(made.int8, msgspec.UnsetType) else made.int8.gate


def refusal(gate: GateRecord) -> str:
    """The metrics that did not pass, with their figures."""
    return "; ".join(
        f"{name} keeps {one.kept:.4f} of the original (95%: {one.low:.4f} to {one.high:.4f}), allowed is {one.bound:g} "
        f"at the lower end"
        for name, one in gate.metrics.items()
        if not one.passed
    )


def _calibration(dataset: Dataset, recipe: CompressionRecipe, file: Path | None) -> Calibration | None:
    """The requests for int8, if the recipe quantizes."""
    if recipe.quantize is None:
        if file is not None:
            raise ConfigError(f"{file} is for int8, and the recipe has no [quantize]; add it, or leave the file out")
        return None
    check_int8()
    return calibration_of(dataset, recipe.quantize, gate_days(dataset, recipe.gate)[0], recipe.gate.sampled, file)


def _begin(work: Path, begun: Begun) -> None:
    """Make the work folder, or see that it is of the same compression."""
    if (work / "begun.json").exists():
        if read_record(work / "begun.json", Begun) != begun:
            raise ConfigError(
                f"{work} holds an unfinished compression with another recipe, model or log; remove it, or name "
                "another folder with --out"
            )
        return
    work.mkdir(parents=True, exist_ok=True)
    write_record(work / "begun.json", begun)


def _without_nothing(recipe: CompressionRecipe) -> dict[str, Any]:
    """The recipe as a document without nulls, which TOML does not have."""

    def without(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: without(one) for name, one in value.items() if one is not None}
        return [without(one) for one in value] if isinstance(value, list) else value

    document: dict[str, Any] = without(msgspec.json.decode(msgspec.json.encode(recipe)))
    return document

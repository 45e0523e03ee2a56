"""The process that trains: reads one job, does it, leaves its outcome, and ends.

    python -m edge_client.train.trainer WORK_FOLDER
    python -m edge_client.train.trainer --serve          one job for each line on stdin, until it is closed (`--resident`)
    python -m edge_client.train.trainer --check ENGINE

Whatever the runtime does, an abort, a segmentation fault, the kernel's out-of-memory killer, ends this process alone.
"""

import signal
import sys
import zlib
from pathlib import Path

from edge_client import versions
from edge_client.engines import load_engine
from edge_client.engines.base import Engine, LoadedProgram
from edge_client.job import Job, ProgramFile
from edge_client.process.memory import die_with_parent, offer_to_the_memory_killer, peak_bytes
from edge_client.process.outcome import JOB, UPDATE, write_outcome
from edge_client.process.supervisor import STORE_STATUS
from edge_client.process.watchdog import Watchdog
from edge_client.progress import Say, say
from edge_client.rows.feature_cache import FeatureCache, FeaturesLostError
from edge_client.rows.row_files import RowFile, RowSource
from edge_client.train.epochs import Evaluated, Inputs, Trained, epoch_inputs, evaluate, fresh_optimizer, shuffler, train_round
from edge_client.train.heartbeat import Lease
from edge_client.train.stage_model import StageModel
from lamina.encoding.tensors import encode
from lamina.errors import LaminaError, StoreError, shown
from lamina.files import disk_errors_named, write_durably
from lamina.names import LABEL


def do_job(job: Job, say: Say = say, lease: Lease | None = None) -> None:
    """Does a job and writes its outcome; an error that lamina names is an outcome as well.

    Raises StoreError if the disk does not even take the outcome.
    """
    folder = Path(job.work_folder)
    lease = lease or Lease(job, say)
    with disk_errors_named(folder):
        try:
            with disk_errors_named(folder):
                _do(job, folder, say, lease)
        except FeaturesLostError as error:
            write_outcome(folder, "again", reason=f"features of {error} have to be made again")
        except LaminaError as error:
            write_outcome(folder, "error", code=error.code, message=error.message)
        except MemoryError as error:
            write_outcome(folder, "died", how=f"memory ran out: {error}"[:200])


def _do(job: Job, folder: Path, say: Say, lease: Lease) -> None:
    engine = load_engine(job.engine)
    views = features(job, engine, say, lease)
    model = stage_model(job, engine)
    try:
        result = work(model, views, job, say, lease)
    finally:
        model.close()
    if isinstance(result, Evaluated):
        write_outcome(folder, "evaluated", **vars(result))
        return
    model.subtract_weights()
    update = update_file(model, job)
    write_durably(folder / UPDATE, update)
    write_outcome(folder, "trained", **vars(result), peak_bytes=peak_bytes(), update_crc=zlib.crc32(update))


def features(job: Job, engine: Engine, say: Say, lease: Lease) -> list[Inputs]:
    """The inputs of the active segments, one for each view, and nothing for a view that this round does not take.

    What is not on disk is computed now, before the model is there.
    """
    cache = FeatureCache(Path(job.feature_folder), engine, job.feature_encoding, say)
    cache.keep_only(job.keep_keys)
    label = job.label
    views: list[Inputs] = []
    count = max((len(plan.keys) for plan in job.features), default=1)
    taken = versions.of_epochs(job.epochs, count, job.takes_pairs_of_views)
    for view in range(count):
        if view not in taken:
            views.append({})
            continue
        inputs: dict[str, RowSource] = {
            plan.modality: cache.rows(plan, view % len(plan.keys), job.stored_examples, lease.keep)
            for plan in job.features
            if job.examples
        }
        if label is not None:
            inputs[LABEL] = RowFile(Path(label.path), label.offset, label.source, label.identity)
        views.append(inputs)
    cache.keep_only(job.keep_keys)
    return views


def stage_model(job: Job, engine: Engine) -> StageModel:
    def open_program(program: ProgramFile) -> LoadedProgram:
        return engine.load(Path(program.path), program)

    model = StageModel(
        job.where,
        job.active,
        job.programs,
        job.limits,
        job.micro_batch,
        open_program,
        teacher=job.teacher,
        keep_start=job.trains and job.proximal > 0,
    )
    model.load_weights()
    return model


def work(model: StageModel, views: list[Inputs], job: Job, say: Say, lease: Lease) -> Trained | Evaluated:
    """Trains, and leaves the state that the device keeps for its next round of the stage; or evaluates."""
    if not job.trains:
        return evaluate(model, epoch_inputs(views, job, 0), job, say, lease.keep)
    optimizer = fresh_optimizer(job, model.parameters.size)
    moments = {name: [vector] for name, vector in optimizer.moments().items()} if job.keep_optimizer else {}
    previous = model.previous
    keeps = bool(job.kept_folder and (moments or previous is not None))
    if not keeps and not (job.kept_folder and Path(job.kept_folder).is_dir()):
        return train_round(model, views, job, say, lease.keep, optimizer=optimizer)
    from edge_client.train.kept import KeptState  # here, because most plans keep nothing

    kept = KeptState(job, keeps, say)
    if keeps:
        found = kept.load(moments if previous is None else {**moments, "previous": [previous.values]})
        if found is not None and moments:
            optimizer.steps = found
    result = train_round(model, views, job, say, lease.keep, optimizer=optimizer)
    if keeps:
        kept.save(moments if previous is None else {**moments, "previous": previous.originals()}, optimizer.steps)
    return result


def update_file(model: StageModel, job: Job) -> bytes:
    """The parameters as a tensor file. int8 is rounded up or down by chance, so that the mean over devices is exact."""
    if job.upload_encoding != "int8":
        return encode(model.tensors(), job.upload_encoding)
    import numpy as np

    random = np.random.Generator(np.random.Philox(key=shuffler(job).getrandbits(128)))
    return encode(model.tensors(), "int8", random)


def main() -> int:
    """Status 1 if `--check ENGINE` finds that the engine cannot run here; a job's own errors are in its outcome."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if sys.argv[1] == "--check":
        try:
            load_engine(sys.argv[2])  # type: ignore[arg-type]
        except LaminaError as error:
            sys.stderr.write(shown(error))
            return 1
        return 0
    offer_to_the_memory_killer()
    if sys.argv[1] == "--serve":
        for line in sys.stdin:
            if status := _do_watched(Path(line.strip())):
                return status
            sys.stdout.write("done\n")
            sys.stdout.flush()
        return 0
    return _do_watched(Path(sys.argv[1]))


def _do_watched(work_folder: Path) -> int:
    """Does the job of a folder, with an eye on the time. STORE_STATUS if the disk did not take its outcome."""
    job = Job.read(work_folder / JOB)
    watchdog = Watchdog(job.stall_seconds)
    try:
        do_job(job, lease=Lease(job, say, on_step=watchdog.fed))
    except StoreError as error:
        sys.stderr.write(shown(error))
        return STORE_STATUS
    finally:
        watchdog.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())

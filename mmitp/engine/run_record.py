"""What a training was started with and what it took, as a file beside its log."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mmengine.dist import is_main_process
from mmengine.runner import Runner

from mmitp.engine.results import plain, provenance
from mmitp.engine.run import device_of
from mmitp.files import write_whole

__all__ = ["RECORD", "recorded"]

#: name of the file in the folder of the run's log, ``WORK_DIR/TIMESTAMP``
RECORD = "run.json"


@contextmanager
def recorded(runner: Runner, config: str | os.PathLike[str]) -> Iterator[None]:
    """Writes ``WORK_DIR/TIMESTAMP/run.json`` around a training.

    Command, config, device and versions are there from the start; ``wall_seconds`` and ``processor_seconds`` (of the
    main process: data loaders in processes of their own are not in it) once the training has ended or failed. A
    training that was killed has none.

    Args:
        runner: about to train.
        config: its name or path.
    """
    if not is_main_process():
        yield
        return
    file = Path(runner.work_dir) / runner.timestamp / RECORD
    content = provenance(config=config, device=device_of(runner.model), seed=runner.seed)
    _write(file, content)
    wall, processor = time.perf_counter(), time.process_time()
    try:
        yield
    finally:
        seconds = dict(
            wall_seconds=round(time.perf_counter() - wall, 2),
            processor_seconds=round(time.process_time() - processor, 2),
        )
        _write(file, content | seconds)


def _write(file: Path, content: dict) -> None:
    write_whole(file, json.dumps(plain(content), indent=1))

"""What is shown while a study runs."""

import io
import json
import os
import time
from concurrent.futures import Future

from rich.console import Console

from lightning_znorm.compare.live import Progress, watch
from lightning_znorm.compare.one_run import Outcome
from lightning_znorm.compare.study import Run

TESTED = json.dumps(
    {
        "checkpoint": {"path": "best.ckpt", "epoch": 3, "monitor": "val/accuracy", "value": 0.6},
        "metrics": {"test/accuracy": 0.5},
    }
)


def runs(folder, number: int = 4) -> list[Run]:
    return [Run("znorm", seed, folder / str(seed)) for seed in range(number)]


def share(run: Run, value: float) -> None:
    run.folder.mkdir(parents=True, exist_ok=True)
    run.progress_file.write_text(json.dumps({"share": value, "epoch": 4}))


def test_states(tmp_path):
    kept, running, failed, waiting = runs(tmp_path)
    kept.folder.mkdir()
    kept.fit_file.write_text("{}")
    kept.test_file.write_text(TESTED)
    progress = Progress([kept, running, failed, waiting], 1, "test/accuracy")
    progress.running.add(running)
    assert progress.state(running) == "starts"
    share(running, 0.0)
    assert progress.state(running) == "runs, epoch 5"  # of a run whose end is not a number of epochs or steps
    share(running, 0.25)
    progress.outcomes[failed] = Outcome(failed, "it broke", 3.0)
    states = [progress.state(run) for run in progress.runs]
    assert states == ["done before", "runs, 25%", "failed", "waits"]
    text = io.StringIO()
    Console(file=text, width=80).print(progress.table())
    for word in ("1 of 4 runs done, 1 failed", "znorm", "0.5000", "runs, 25%", "waits"):
        assert word in text.getvalue()


def test_time_left(tmp_path):
    a, b, c, d = runs(tmp_path)
    progress = Progress([a, b, c, d], 2, "m")
    assert progress.seconds_left() is None
    progress.outcomes[a] = Outcome(a, seconds=100.0)
    progress.running.add(b)
    share(b, 0.5)
    assert progress.seconds_left() == 100 * 2.5 / 2  # half of b, c and d, two at a time
    progress.outcomes |= {b: Outcome(b, seconds=100.0), c: Outcome(c, "it broke", 1.0)}
    assert progress.seconds_left() == 100
    progress.outcomes[d] = Outcome(d, seconds=100.0)
    assert progress.seconds_left() == 0


def test_time_left_of_as_many_as_a_cluster_has_place_for(tmp_path):
    a, b, c = runs(tmp_path, 3)
    progress = Progress([a, b, c], 1, "m")
    progress.outcomes[a] = Outcome(a, seconds=100.0)
    progress.running |= {b, c}
    assert progress.seconds_left() == 100


def test_a_run_of_an_earlier_studys_process_is_seen(tmp_path):
    (a,) = runs(tmp_path, 1)
    share(a, 0.5)
    os.utime(a.progress_file, (1, 1))
    progress = Progress([a], 1, "m")
    assert not progress.has_begun(a)
    share(a, 0.75)
    assert progress.has_begun(a)


def test_time_left_before_any_has_ended(tmp_path):
    (a,) = runs(tmp_path, 1)
    progress = Progress([a], 1, "m")
    progress.running.add(a)
    progress._start = time.time() - 10
    share(a, 0.5)
    assert 9 < progress.seconds_left() < 12


def test_lines_where_there_is_no_terminal(tmp_path):
    a, b = runs(tmp_path, 2)
    futures = {Future(): a, Future(): b}
    first, second = futures
    first.set_result(Outcome(a, seconds=5.0))
    second.set_exception(OSError("the disk is full"))
    progress = Progress([a, b], 1, "m")
    text = io.StringIO()
    watch(futures, progress, Console(file=text, width=200))
    assert "znorm-0: done in 0:00:05" in text.getvalue()
    assert "znorm-1: failed" in text.getvalue()
    assert progress.outcomes[b].error == "OSError: the disk is full"


def test_live_table(tmp_path):
    (a,) = runs(tmp_path, 1)
    future: Future = Future()
    future.set_result(Outcome(a, seconds=5.0))
    text = io.StringIO()
    watch({future: a}, Progress([a], 1, "m"), Console(file=text, force_terminal=True, width=100))
    assert "done in 0:00:05" in text.getvalue()
    assert "1 of 1 runs done" in text.getvalue()

"""What is shown while a study runs."""

import io
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import pytest
from rich.console import Console

from lightning_znorm.compare import progress as progress_module
from lightning_znorm.compare.progress import Progress, watch
from lightning_znorm.compare.study import Outcome, Run

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


def finish(run: Run) -> None:
    run.folder.mkdir(parents=True, exist_ok=True)
    run.fit_file.write_text("{}")
    run.test_file.write_text(TESTED)


def terminal(width: int = 80, height: int = 24) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, height=height, color_system=None)


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def printed(progress: Progress, console: Console | None = None) -> str:
    console = console or terminal()
    console.print(progress.table(console))
    return written(console)


def scripted(monkeypatch: pytest.MonkeyPatch, steps: Sequence[Callable[[], object]]) -> None:
    """Let steps happen, one each time that the display waits, and end all runs after them."""
    remaining = list(steps)

    def wait(futures: set, timeout: float, return_when: str) -> tuple[set, set]:
        if remaining:
            remaining.pop(0)()
        else:
            for future in futures:
                if not future.done():
                    future.set_result(Outcome(Run("ended", 0, None), seconds=1.0))
        ended = {future for future in futures if future.done()}
        return ended, futures - ended

    monkeypatch.setattr(progress_module, "wait", wait)


def test_states(tmp_path):
    kept, running, failed, waiting = runs(tmp_path)
    finish(kept)
    progress = Progress([kept, running, failed, waiting], 1, "test/accuracy")
    progress.running.add(running)
    assert progress.state(running) == "starts"
    share(running, 0.0)
    assert progress.state(running) == "runs, epoch 5"  # of a run whose end is not a number of epochs or steps
    share(running, 0.25)
    progress.outcomes[failed] = Outcome(failed, "it broke", 3.0)
    states = [progress.state(run) for run in progress.runs]
    assert states == ["done before", "runs, 25%", "failed", "waits"]
    text = printed(progress)
    for word in ("1 of 4 runs done, 1 failed", "znorm", "0.5000", "runs, 25%", "waits"):
        assert word in text


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


def test_clocks_of_other_machines_do_not_count(tmp_path):
    """A shared folder may be of a server whose clock is late, or early."""
    late, early = runs(tmp_path, 2)
    share(early, 0.5)
    os.utime(early.progress_file, (2**32, 2**32))
    progress = Progress([late, early], 1, "m")
    assert not progress.has_begun(early)
    share(late, 0.5)
    os.utime(late.progress_file, (1, 1))
    assert progress.has_begun(late)


def test_time_left_before_any_has_ended(tmp_path):
    (a,) = runs(tmp_path, 1)
    progress = Progress([a], 1, "m")
    progress.running.add(a)
    progress._start -= 10
    share(a, 0.5)
    assert 9 < progress.seconds_left() < 12


@pytest.mark.parametrize(
    "content",
    [
        "",
        '{"share": 0.5, "epo',
        "null",
        "[]",
        "{}",
        '{"share": "half", "epoch": 4}',
        '{"share": null, "epoch": null}',
        '{"share": NaN, "epoch": 4}',
        '{"share": 1e-320, "epoch": 4}',
        '{"share": -3, "epoch": -7}',
        '{"share": 0.5}',
        "\0\0\0",
        "a folder",
    ],
)
def test_damaged_files_end_no_study(tmp_path, content):
    """They are shown as what was known before, and the run itself says what is wrong with them."""
    kept, running, begun = runs(tmp_path, 3)
    for run, name in ((kept, "test.json"), (kept, "fit.json"), (running, "progress.json"), (begun, "progress.json")):
        run.folder.mkdir(exist_ok=True)
        if content == "a folder":
            (run.folder / name).mkdir()
        else:
            (run.folder / name).write_bytes(content.encode())
    progress = Progress([kept, running, begun], 1, "test/accuracy")
    progress.running |= {running, begun}
    text = printed(progress)
    assert text.count("znorm") == 3
    assert "nan" not in text
    progress.seconds_left()
    if content != "a folder":
        share(begun, 0.25)
        assert progress.state(begun) == "runs, 25%"
        begun.progress_file.write_text('{"share": 0.')
        assert progress.state(begun) == "runs, 25%"


def test_a_name_is_no_markup(tmp_path):
    names = ("[red]a[/blue]", ":tada:", "a\x1b[2J", "not \udcff UTF-8")
    for encoding in ("utf-8", "ascii"):
        for is_terminal in (True, False):
            raw = io.BytesIO()
            console = Console(
                file=io.TextIOWrapper(raw, encoding=encoding, newline=""),
                force_terminal=is_terminal,
                width=120,
                height=30,
                color_system=None,
            )
            named = [Run(f"{name} ü", 0, tmp_path / str(i)) for i, name in enumerate(names)]
            futures: dict[Future, Run] = {Future(): run for run in named}
            for future, run in futures.items():
                future.set_result(Outcome(run, seconds=1.0))
            watch(futures, Progress(named, 1, "[b]m[/c]"), console)
            console.file.flush()
            text = raw.getvalue().decode(encoding)
            shown = ("[red]a[/blue]", ":tada:", "␛[2J" if encoding == "utf-8" else "\\u241b[2J", "\\udcff")
            for name in shown:
                assert name in text, (encoding, is_terminal)
            assert "\x1b[2J" not in text


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
    assert progress.outcomes[b].error == f"OSError: the disk is full. There is nothing new in {b.log}."


def test_lines_where_a_terminal_cannot_move_its_cursor(tmp_path, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    (a,) = runs(tmp_path, 1)
    future: Future = Future()
    future.set_result(Outcome(a, seconds=5.0))
    console = terminal()
    watch({future: a}, Progress([a], 1, "m"), console)
    assert written(console).startswith("znorm-0: done in 0:00:05")


def test_a_run_that_was_lost_says_what_it_printed(tmp_path):
    (a,) = runs(tmp_path, 1)
    a.folder.mkdir()
    a.log.write_text("an earlier try\n")
    progress = Progress([a], 1, "m")
    with a.log.open("a") as log:
        log.write("epoch 1\nepoch 2\n")
    future: Future = Future()
    future.set_exception(OSError("the disk is full"))
    watch({future: a}, progress, Console(file=io.StringIO()))
    assert progress.outcomes[a].error == f"OSError: the disk is full. The end of {a.log}:\nepoch 1\nepoch 2"


def test_live_table(tmp_path):
    (a,) = runs(tmp_path, 1)
    future: Future = Future()
    future.set_result(Outcome(a, seconds=5.0))
    console = terminal(100)
    watch({future: a}, Progress([a], 1, "m"), console)
    assert "done in 0:00:05" in written(console)
    assert "1 of 1 runs done" in written(console)


class TestManyRuns:
    """200 runs, of which a terminal of 24 lines cannot show all."""

    @pytest.fixture
    def progress(self, tmp_path) -> Progress:
        the_runs = runs(tmp_path, 200)
        for run in the_runs[:10]:
            finish(run)
        progress = Progress(the_runs, 4, "test/accuracy")
        for run in the_runs[10:100]:
            error = "it broke" if run.seed in (50, 70) else ""
            progress.outcomes[run] = Outcome(run, error, 60.0)
        progress.running |= set(the_runs[100:104])
        return progress

    @pytest.mark.parametrize("height", [10, 24, 40])
    def test_what_matters_is_within_the_screen(self, progress, height):
        text = printed(progress, terminal(height=height))
        lines = text.splitlines()
        assert len(lines) <= height
        assert "98 of 200 runs done, 2 failed" in lines[0]
        shown = [int(seed) for seed in re.findall(r"znorm +\D? ?(\d+)", text)]
        assert shown == sorted(shown)
        if height > 10:
            assert {100, 101, 102, 103, 50, 70} <= set(shown)  # run, and have failed
            assert set(shown) - {50, 70} == set(range(100 - (height - 13), 104))  # and the newest that have ended
        else:
            assert shown == [100, 101, 102]
        hidden = Counter(re.findall(r"(\d+) (wait|done|failed|run)", lines[-1]))
        assert sum(int(number) for number, _ in hidden) + len(shown) == 200
        assert "96 wait" in lines[-1]

    def test_all_that_fit_are_shown_in_order(self, tmp_path):
        progress = Progress(runs(tmp_path, 18), 1, "m")
        lines = printed(progress).splitlines()
        assert len(lines) <= 24
        assert [int(seed) for seed in re.findall(r"znorm +\D? ?(\d+)", "\n".join(lines))] == list(range(18))
        assert "wait" not in lines[-1]

    @pytest.mark.parametrize("width", [20, 40, 80])
    def test_a_narrow_terminal_breaks_no_line(self, tmp_path, width):
        progress = Progress(
            [Run("a_method_with_a_long_name" * 3, i, tmp_path) for i in range(200)], 1, "test/" + "m" * 60
        )
        assert len(printed(progress, terminal(width=width)).splitlines()) <= 24

    def test_nothing_is_done_where_nothing_changes(self, progress, monkeypatch):
        """Neither is the screen written to, nor a file read."""
        reads: Counter[str] = Counter()
        for name in ("read_progress", "read_test"):
            monkeypatch.setattr(progress_module, name, counting(getattr(progress_module, name), reads))
        console = terminal()
        sizes: list[tuple[int, int]] = []
        the_runs = progress.runs

        def look() -> None:
            sizes.append((len(written(console)), sum(reads.values())))

        def moves(run: Run, value: float) -> Callable[[], None]:
            return lambda: (look(), share(run, value))[0]

        share(the_runs[100], 0.25)
        left = {Future(): run for run in the_runs[100:]}
        running = next(iter(left))

        def ends() -> None:
            look()
            finish(the_runs[100])
            running.set_result(Outcome(the_runs[100], seconds=9.0))

        scripted(monkeypatch, [*[look] * 6, moves(the_runs[101], 0.5), *[look] * 6, ends, *[look] * 6])
        watch(left, progress, console)
        first, idle = sizes[0], sizes[1:7]
        assert first[0] > 0  # the table is there before anything happens
        assert len(set(idle)) == 1
        moved = sizes[7:14]
        assert len(set(moved)) == 1
        assert moved[0][0] > idle[0][0]
        assert moved[0][1] == idle[0][1] + 1  # one file, of the one that has moved
        ended = sizes[14:]
        assert len(set(ended)) == 1
        assert ended[0][0] > moved[0][0]
        assert ended[0][1] == moved[0][1] + 1  # its test
        last = written(console)[moved[0][0] :]
        assert "99 of 200 runs done, 2 failed" in last
        assert "0.5000" in last

    def test_a_screen_that_changes_is_drawn_anew(self, progress, monkeypatch):
        console = terminal()

        def resized() -> None:
            console.height = 40

        sizes: list[int] = []

        def look() -> None:
            sizes.append(len(written(console)))

        scripted(monkeypatch, [look, resized, look])
        watch({Future(): run for run in progress.runs[100:]}, progress, console)
        assert sizes[1] > sizes[0]


def counting(function: Callable, calls: Counter[str]) -> Callable:
    def counted(run: Run) -> object:
        calls[f"{function.__name__} {run.name}"] += 1
        return function(run)

    return counted

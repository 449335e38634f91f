"""Start processes as copies of one that has imported PyTorch and Lightning, because the imports take ten seconds.

A copy is a process of its own: it shares nothing with the others, and a crash ends it alone. Copies are made on Linux.
On other systems, libraries that PyTorch loads do not work in a copy.
"""

import gc
import json
import os
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

CAN_FORK = sys.platform == "linux" and hasattr(os, "memfd_create")
_NUMBER = struct.Struct("q")
_COMMAND = "lightning_znorm"


class ForkServer:
    """The process that has the imports, and copies itself. It is started at once, and imports in the background.

    Args:
        environment: Its environment variables.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._socket, theirs = socket.socketpair()
        self._lock = threading.Lock()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=environment,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # a signal for this process's group is not for it
            )

    def start(
        self, args: Sequence[str], environment: Mapping[str, str], options: Mapping[str, Any], seconds: float | None
    ) -> "ForkedProcess | None":
        """Start a copy, which runs ``python -m lightning_znorm``, in a process group of its own.

        Args:
            args: Its arguments.
            environment: All of its environment variables.
            options: ``stdout``, ``stderr`` and ``pass_fds``, as `subprocess.Popen` takes them.
            seconds: Longest time to wait for it, while the server imports.

        Returns:
            The process; ``None`` if the server cannot make copies.

        Raises:
            subprocess.TimeoutExpired: If the server takes too long.
        """
        ours, theirs = socket.socketpair()
        process = ForkedProcess(args, ours, options)
        try:
            with theirs, self._lock:
                files = [theirs.fileno(), *process.outputs, *options.get("pass_fds", ())]
                socket.send_fds(self._socket, [b"\0"], files)
            request = json.dumps({"args": list(args), "environment": dict(environment)}).encode()
            ours.sendall(_NUMBER.pack(len(request)) + request)
            if process.find_pid(seconds):
                return process
        except OSError:  # the server has died, or is closed
            pass
        except BaseException:
            process.close_outputs()
            self.close()  # otherwise it starts the process later
            raise
        process.close_outputs()
        return None

    def close(self) -> None:
        """End the server. Copies that run go on, but nobody learns how they end."""
        if self._process.poll() is None:  # otherwise its id may be another's by now
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        with self._lock:
            self._socket.close()


class ForkedProcess:
    """A copy of the server, used like a `subprocess.Popen`.

    Args:
        args: Its arguments.
        connection: Where the server says its id, and how it ended.
        options: ``stdout`` and ``stderr``, as `subprocess.Popen` takes them.
    """

    def __init__(self, args: Sequence[str], connection: socket.socket, options: Mapping[str, Any]) -> None:
        self.args = args
        self.pid = 0
        self.returncode: int | None = None
        self._connection = connection
        weakref.finalize(self, connection.close)  # several threads may wait for the process
        # Files in memory in place of pipes: nobody has to read them while the process runs.
        self.stdout = _memory_file() if options["stdout"] == subprocess.PIPE else None
        self.stderr = _memory_file() if options["stderr"] == subprocess.PIPE else None
        out = (self.stdout or options["stdout"]).fileno()
        err = out if options["stderr"] == subprocess.STDOUT else (self.stderr or options["stderr"]).fileno()
        self.outputs = (out, err)

    def find_pid(self, seconds: float | None) -> bool:
        """Wait for the process's id; return False if the server has ended instead."""
        self._wait_for_number(seconds)
        content = self._connection.recv(_NUMBER.size)
        if content:
            (self.pid,) = _NUMBER.unpack(content)
        return bool(content)

    def poll(self) -> int | None:
        """Return the exit code; ``None`` while the process runs."""
        with suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end of the process, and return its exit code; negative after a signal.

        Raises:
            subprocess.TimeoutExpired: If it takes too long.
        """
        if self.returncode is None:
            self._wait_for_number(timeout)
            try:
                content = self._connection.recv(_NUMBER.size, socket.MSG_PEEK)  # also for other threads that wait
            except ConnectionResetError:
                content = b""
            # If somebody has killed the server, nobody knows how it ended.
            self.returncode = _NUMBER.unpack(content)[0] if content else -signal.SIGKILL
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[bytes, bytes]:
        """Wait for the end of the process, and return what it printed on stdout and stderr.

        Raises:
            subprocess.TimeoutExpired: If it takes too long.
        """
        self.wait(timeout)
        printed = []
        for file in (self.stdout, self.stderr):
            if file is not None:
                file.seek(0)
            printed.append(b"" if file is None else file.read())
        return printed[0], printed[1]

    def close_outputs(self) -> None:
        """Close the files that stand for pipes."""
        for file in (self.stdout, self.stderr):
            if file is not None:
                file.close()

    def _wait_for_number(self, seconds: float | None) -> None:
        poll = select.poll()
        poll.register(self._connection.fileno(), select.POLLIN)
        if not poll.poll(None if seconds is None else max(0.0, seconds) * 1000):
            raise subprocess.TimeoutExpired(list(self.args), seconds or 0)


def _memory_file() -> IO[bytes]:
    return open(os.memfd_create(_COMMAND), "w+b")


def autograd_works_in_copies() -> bool:
    """Return whether a copy of this process can train, by a backward pass in one.

    It cannot after a backward pass in this process that has started threads: autograd has one for each GPU that it
    sees, also where the computation is on a CPU, or where the GPU only pretends, as in PyTorch's fake tensors.
    """
    import torch

    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            torch.autograd.backward(torch.ones((), requires_grad=True))
            code = 0
        finally:
            os._exit(code)
    return os.waitpid(pid, 0)[1] == 0


def _serve(connection: socket.socket) -> tuple[socket.socket, list[int]] | None:
    """Copy this process upon each request. Return ``None`` once nobody is left to ask; in a copy, its own files."""
    running: dict[int, socket.socket] = {}
    wakeup, wake = socket.socketpair()
    wake.setblocking(False)
    wakeup.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    before = signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
    while True:
        ready, _, _ = select.select([connection, wakeup], [], [])
        if wakeup in ready:
            with suppress(BlockingIOError):
                wakeup.recv(1024)
            _reap(running)
        if connection not in ready:
            continue
        content, files, _, _ = socket.recv_fds(connection, 1, 8)
        if not content:
            return None
        channel = socket.socket(fileno=files[0])
        try:
            pid = os.fork()
        except OSError:  # too many processes, or too little memory: who has asked starts one of its own
            for file in (channel.detach(), *files[1:]):
                os.close(file)
            continue
        if pid == 0:
            os.setsid()
            signal.set_wakeup_fd(before)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for other in (*running.values(), connection, wakeup, wake):
                other.close()
            return channel, files[1:]
        for file in files[1:]:
            os.close(file)
        running[pid] = channel
        _say(channel, pid)


def _reap(running: dict[int, socket.socket]) -> None:
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            return
        if (channel := running.pop(pid, None)) is not None:  # None for a process that an import has started
            with channel:
                _say(channel, os.waitstatus_to_exitcode(status))


def _say(channel: socket.socket, number: int) -> None:
    with suppress(BrokenPipeError, ConnectionResetError):  # who has asked is gone
        channel.sendall(_NUMBER.pack(number))


def _receive(channel: socket.socket, size: int) -> bytes:
    content = b""
    while len(content) < size:
        part = channel.recv(size - len(content))
        if not part:
            sys.exit(1)  # who has asked is gone
        content += part
    return content


def _become(channel: socket.socket, files: Sequence[int]) -> None:
    """Give a copy its files, environment variables, arguments and number of threads.

    Variables that Python or a library reads only when it starts, such as PYTHONHASHSEED, stay as the server had them.

    Args:
        channel: Where the arguments and environment variables come from.
        files: Those that it prints to; others, such as a lock, stay open.
    """
    with channel:
        request = json.loads(_receive(channel, _NUMBER.unpack(_receive(channel, _NUMBER.size))[0]))
    for target, file in enumerate(files[:2], start=1):
        os.dup2(file, target)
        os.close(file)
    threads = os.environ.get("OMP_NUM_THREADS")
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.argv[1:] = request["args"]
    torch: Any = sys.modules.get("torch")
    if (
        torch is not None and torch.cuda._is_in_bad_fork()
    ):  # an import has counted GPUs: only a process of its own can use them now
        for file in files[2:]:
            os.set_inheritable(file, True)
        os.execv(sys.executable, [sys.executable, "-m", _COMMAND, *request["args"]])
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if torch is not None and asked != threads and asked.isdecimal():
        torch.set_num_threads(int(asked))  # torch has read the variable when it was loaded


def _import() -> bool:
    """Import what every command needs; return whether the process can be copied now."""
    # PyTorch then counts GPUs without a start of CUDA, which does not work in a copy any more.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    from torch.cuda import is_initialized

    import lightning_znorm.cli.run
    import lightning_znorm.compare.recorder  # noqa: F401
    from lightning_znorm.cli.classes import import_classes

    import_classes()  # once, instead of in every copy

    gc.collect()
    gc.freeze()  # a collection in a copy would write to, and so copy, the memory that all share
    started: bool = is_initialized()  # type: ignore[no-untyped-call]
    return not started and threading.active_count() == 1 and autograd_works_in_copies()


def _main() -> None:
    connection = socket.socket(fileno=int(sys.argv[1]))
    asked = _serve(connection) if _import() else None
    if asked is not None:
        _become(*asked)
        sys.argv[0] = str(Path(__file__).parents[1] / "__main__.py")
        # As `-m` does: Lightning starts further processes by the name of the main module.
        runpy.run_module(_COMMAND, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _main()

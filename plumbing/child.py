"""A process apart for code that a hostile file could crash, hang or blow up: then nothing but this process is lost.

    child = Child("data.clips")
    for answer in child.ask(request):  # what data.clips.answers(request) yields there, as it comes

Requests and answers are bytes behind their length (8 bytes); nothing is unpickled on either side.  The child cannot
write files, prints nowhere, and ends when the process that started it does.
"""

import atexit
import contextlib
import ctypes
import importlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
END = b"\xff" * 8  # behind the last answer to a request, and once when the child is ready
OUT_OF_MEMORY = 77  # exit code
START = 120.0  # seconds to import a module, at most
PIPE = 1 << 20  # bytes that may wait in the pipe of the answers, where this can be asked for


class ChildFailed(Exception):
    """The child could not answer, and is gone; the message says why."""


class TooSlow(ChildFailed):
    pass


class TooLarge(ChildFailed):
    pass


class Child:
    """Runs a module's `answers(request: bytes) -> Iterator[bytes]`, within so many bytes of memory and so many seconds
    for each answer.  It starts when it is first asked something, and again after it has failed."""

    def __init__(self, module: str, memory: int = 2 << 30, seconds: float = 60):
        self.module, self.memory, self.seconds = module, memory, seconds
        self.process, self.owner, self.busy = None, 0, False
        atexit.register(self.close)

    def ask(self, request: bytes) -> Iterator[bytearray]:
        """The answers to one request, as they come.  To ask anew or to drop this iterator ends it, and costs a start.
        Errors: ChildFailed."""
        if self.process is None or self.owner != os.getpid() or self.busy or self.process.poll() is not None:
            self.start()
        process, self.busy = self.process, True
        try:
            self.send(len(request).to_bytes(8) + request)
            while (answer := self.receive(self.seconds)) is not None:
                yield answer
                if self.process is not process:
                    raise ChildFailed("was asked something else meanwhile")
            self.busy = False
        except BaseException:
            if self.process is process:
                self.close()
            raise

    def start(self) -> None:
        self.close()
        arguments = [sys.executable, "-m", "plumbing.child", self.module, str(self.memory)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(arguments, cwd=ROOT, bufsize=0, **pipes)
        self.owner, self.busy = os.getpid(), False
        for pipe in (self.process.stdin, self.process.stdout):
            os.set_blocking(pipe.fileno(), False)
        with contextlib.suppress(ImportError, AttributeError, OSError):
            import fcntl

            fcntl.fcntl(self.process.stdout, fcntl.F_SETPIPE_SZ, PIPE)
        try:
            self.receive(START)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the child, unless it is another process's, inherited by a fork."""
        if self.process is None:
            return
        if self.owner == os.getpid():
            self.process.kill()
            self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()
        self.process = None

    def send(self, message: bytes) -> None:
        left, deadline = memoryview(message), time.monotonic() + self.seconds
        while left:
            self.wait(self.process.stdin, select.POLLOUT, deadline, self.seconds)
            try:
                left = left[os.write(self.process.stdin.fileno(), left) :]
            except BrokenPipeError:
                raise self.failure() from None

    def receive(self, seconds: float) -> bytearray | None:
        """The next answer; None behind the last."""
        deadline = time.monotonic() + seconds
        head = self.exactly(8, deadline, seconds)
        if head == END:
            return None
        if (length := int.from_bytes(head)) > self.memory:
            raise ChildFailed("speaks nonsense")
        return self.exactly(length, deadline, seconds)

    def exactly(self, length: int, deadline: float, seconds: float) -> bytearray:
        data = bytearray(length)
        left = memoryview(data)
        while left:
            self.wait(self.process.stdout, select.POLLIN, deadline, seconds)
            count = os.readv(self.process.stdout.fileno(), [left])
            if count == 0:
                raise self.failure()
            left = left[count:]
        return data

    def wait(self, pipe, event: int, deadline: float, seconds: float) -> None:
        poll = select.poll()
        poll.register(pipe, event)
        if not poll.poll(max(0, 1000 * (deadline - time.monotonic()))):
            raise TooSlow(f"took longer than {seconds:g} seconds")

    def failure(self) -> ChildFailed:
        """Why the pipes of a child are closed."""
        try:
            code = self.process.wait(5)
        except subprocess.TimeoutExpired:
            code = 0
        if code == OUT_OF_MEMORY:
            return TooLarge(f"took more memory than {self.memory >> 20} MiB")
        return ChildFailed(f"was killed by signal {-code}" if code < 0 else f"ended with code {code}")


# --- in the child ---------------------------------------------------------------------------------------------------


def serve(answers: Callable[[bytes], Iterator[bytes]], memory: int) -> None:
    """Answer what comes from standard input, until it ends."""
    source, sink = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # libraries print
    confine(memory)
    sink.write(END)
    sink.flush()
    while len(head := source.read(8)) == 8:
        try:
            for answer in answers(source.read(int.from_bytes(head))):
                sink.write(len(answer).to_bytes(8))
                sink.write(answer)
                sink.flush()
        except MemoryError:
            os._exit(OUT_OF_MEMORY)
        sink.write(END)
        sink.flush()


def confine(memory: int) -> None:
    """Limits to this process, as far as the system has them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: even where it computes and reads no pipe
    with contextlib.suppress(ImportError):
        import resource

        for name, limit in (("RLIMIT_AS", memory), ("RLIMIT_CORE", 0), ("RLIMIT_FSIZE", 0)):
            with contextlib.suppress(AttributeError, ValueError, OSError):
                resource.setrlimit(getattr(resource, name), (limit, limit))


if __name__ == "__main__":
    serve(importlib.import_module(sys.argv[1]).answers, int(sys.argv[2]))

"""One thread of the process that waits for all of its control connections and listeners: `start`, `Task`.

What waits is written as steps: a generator that yields a `Wait` where a blocking program would sleep. The same steps
run in the reactor, with thousands of others, or to their end in the caller's thread (`run`).
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import logging
import os
import select
import selectors
import threading
import time
from collections import deque
from collections.abc import Callable, Generator
from typing import Any, NamedTuple, TypeVar

from hetkv.errors import ControlError, ControlTimeoutError, PeerLostError

T = TypeVar("T")
_log = logging.getLogger(__name__)


class Wait(NamedTuple):
    """What the steps need before they go on."""

    descriptor: int
    """Of a socket; -1: only time passes."""
    event: int
    """`select.POLLIN` or `select.POLLOUT`."""
    deadline: float | None
    """`time.monotonic()` seconds, `None` for no limit. After it the steps go on with a `ControlTimeoutError`."""
    late: str = ""
    """The text of that error."""


Steps = Generator[Wait, None, T]
Done = Callable[[Any, "BaseException | None"], None]


def run(steps: Steps[T]) -> T:
    """Run the steps in this thread, asleep where they wait."""
    try:
        wait = next(steps)
        while True:
            remaining = None if wait.deadline is None else wait.deadline - time.monotonic()
            poll = select.poll()
            poll.register(wait.descriptor, wait.event)
            if (remaining is None or remaining > 0) and poll.poll(None if remaining is None else remaining * 1000):
                wait = next(steps)
            else:
                wait = steps.throw(ControlTimeoutError(wait.late))
    except StopIteration as stop:
        value: T = stop.value
        return value


def with_own_descriptor(steps: Steps[T]) -> Steps[T]:
    """The same steps, waiting at a descriptor of their own, as the reactor has each once: for what writes to a socket
    that other steps read. Raises `PeerLostError` where there is no descriptor left."""
    copy = -1
    try:
        wait = next(steps)
        while True:
            if copy < 0:
                copy = os.dup(wait.descriptor)
            try:
                yield wait._replace(descriptor=copy)
            except ControlTimeoutError as error:
                wait = steps.throw(error)
            else:
                wait = next(steps)
    except StopIteration as stop:
        value: T = stop.value
        return value
    except OSError as error:
        if isinstance(error, ControlError):
            raise
        raise PeerLostError(f"no descriptor to write with: {error.strerror}", errno=error.errno) from None
    finally:
        if copy >= 0:
            os.close(copy)


LOOK_S = 0.01


class Task:
    """Steps that the reactor runs. `done(result, error)` is called in its thread once they have ended, not where they
    were stopped."""

    def __init__(self, steps: Steps[Any], done: Done) -> None:
        self.steps, self.done = steps, done
        self.wait: Wait | None = None
        self.stopped = False
        self.ended = threading.Event()


class Reactor:
    """Its thread lives while there are tasks."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._last: threading.Thread | None = None
        self._commands: deque[Callable[[], None]] = deque()
        self._tasks: set[Task] = set()
        self._late: list[tuple[float, int, Task, Wait]] = []
        self._order = itertools.count()

    def start(self, steps: Steps[Any], done: Done) -> Task:
        """Run the steps in the reactor's thread. Called in that thread, it returns when they wait."""
        task = Task(steps, done)
        if self.in_thread():
            self._begin(task)
        else:
            self._post(lambda: self._begin(task))
        return task

    def stop(self, task: Task) -> None:
        """Let the steps go no further: they end where they are. When this returns nothing of the task runs any more,
        except where it was called in the reactor's thread."""
        if self.in_thread():
            self._drop(task)
            return
        self._post(lambda: self._drop(task))
        task.ended.wait()
        while (last := self._last) is not None and last.is_alive() and not (self._tasks or self._commands):
            last.join(LOOK_S)  # it ends now, unless others start something meanwhile, with which it goes on

    def end(self) -> None:
        """Stop all tasks and wait for the thread: before the interpreter ends, in which it would crash."""
        if self.in_thread():
            return
        while (last := self._last) is not None and last.is_alive():
            self._post(self._drop_all)
            last.join(LOOK_S)

    def in_thread(self) -> bool:
        """Whether the caller is a callback, which must not wait."""
        return threading.current_thread() is self._thread

    def _post(self, command: Callable[[], None]) -> None:
        with self._lock:
            self._commands.append(command)
            if self._thread is None:
                self._selector = selectors.DefaultSelector()
                self._wake_read, self._wake_write = os.pipe()
                os.set_blocking(self._wake_write, False)
                self._selector.register(self._wake_read, selectors.EVENT_READ)
                self._thread = self._last = threading.Thread(target=self._run, name="hetkv-control", daemon=True)
                self._thread.start()
            else:
                with contextlib.suppress(BlockingIOError):  # full: it wakes anyway
                    os.write(self._wake_write, b"x")

    def _run(self) -> None:
        """Body of the thread."""
        while True:
            while self._commands:
                self._commands.popleft()()
            with self._lock:
                if self._commands:
                    continue
                if not self._tasks:
                    self._end()
                    return
            timeout = max(0.0, self._late[0][0] - time.monotonic()) if self._late else None
            for key, _ in self._selector.select(timeout):
                if key.fileobj == self._wake_read:
                    os.read(self._wake_read, 4096)
                elif key.data in self._tasks:
                    self._resume(key.data, None)
            now = time.monotonic()
            while self._late and self._late[0][0] <= now:
                _, _, task, wait = heapq.heappop(self._late)
                if task in self._tasks and task.wait is wait:
                    self._resume(task, ControlTimeoutError(wait.late) if wait.descriptor >= 0 else None)

    def _end(self) -> None:
        self._selector.close()
        os.close(self._wake_read)
        os.close(self._wake_write)
        self._late.clear()
        self._thread = None

    def _begin(self, task: Task) -> None:
        if not task.stopped:
            self._tasks.add(task)
            self._resume(task, None)

    def _resume(self, task: Task, late: ControlTimeoutError | None) -> None:
        """The task's next step, up to where it waits again or ends."""
        self._forget(task)
        result, error = None, None
        try:
            wait = next(task.steps) if late is None else task.steps.throw(late)
        except StopIteration as stop:
            result = stop.value
        except BaseException as raised:
            error = raised
        else:
            task.wait = wait
            if wait.descriptor >= 0:
                event = selectors.EVENT_READ if wait.event == select.POLLIN else selectors.EVENT_WRITE
                self._selector.register(wait.descriptor, event, task)
            if wait.deadline is not None:
                heapq.heappush(self._late, (wait.deadline, next(self._order), task, wait))
            return
        self._tasks.discard(task)
        if not task.stopped:
            call(task.done, result, error)
        task.ended.set()

    def _forget(self, task: Task) -> None:
        if task.wait is not None and task.wait.descriptor >= 0:
            self._selector.unregister(task.wait.descriptor)
        task.wait = None

    def _drop(self, task: Task) -> None:
        task.stopped = True
        if task in self._tasks and task.wait is not None:  # otherwise it is what runs now, and ends by itself
            self._forget(task)
            self._tasks.discard(task)
            task.steps.close()
        if task not in self._tasks:
            task.ended.set()

    def _drop_all(self) -> None:
        for task in list(self._tasks):
            self._drop(task)


def call(callback: Callable[..., object], *arguments: object) -> None:
    """A user's callback: what it raises, even what would end a thread, is logged and harms nothing else."""
    try:
        callback(*arguments)
    except BaseException:
        _log.exception("a callback failed")


_reactor = Reactor()


def shared() -> Reactor:
    """The process's reactor."""
    return _reactor


def _reset() -> None:
    """A forked child has no threads."""
    global _reactor
    _reactor = Reactor()


os.register_at_fork(after_in_child=_reset)

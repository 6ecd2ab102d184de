"""Who writes the shards: this process, or several on this machine."""

import logging
import multiprocessing
import os
import signal
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from configs import LonghaulError
from data_pipeline.ingest.plan import Task
from data_pipeline.ingest.shard import Executor, ShardReport, WriteShard

_MAX_DEATHS = 3  # of processes that were at the same shard
_TOLD_EVERY = 16  # images
_WORTH_A_PROCESS = 1_000  # images, which take as long as starting it


def in_this_process(work: WriteShard, tasks: Sequence[Task], progress: Callable[[int], None]) -> Iterator[ShardReport]:
    """An executor: one task after the other."""
    before = 0
    for task in tasks:
        yield work(task, lambda images, before=before: progress(before + images))  # type: ignore[misc]
        before += task.images


def local_processes(jobs: int) -> Executor:
    """An executor on `jobs` processes of this machine (0: one for each core, but none for a few images), or in this
    one where a single process is enough.

    A process that dies (killed, out of memory) is replaced and its shard written anew, three times at most.
    """

    def run(work: WriteShard, tasks: Sequence[Task], progress: Callable[[int], None]) -> Iterator[ShardReport]:
        wanted = jobs or min(len(os.sched_getaffinity(0)), sum(task.images for task in tasks) // _WORTH_A_PROCESS)
        count = min(wanted, len(tasks))
        if count <= 1:
            return in_this_process(work, tasks, progress)
        return _Pool(work, tasks).run(count, progress)

    return run


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection
    task: Task
    images: int = 0


@dataclass
class _Failure:
    """What went wrong in a worker: a sentence for people, or a traceback."""

    sentence: str | None
    trace: str = field(repr=False)


class _Pool:
    """Hands tasks to processes, one each at a time, and survives their deaths.

    The processes are spawned, so that they inherit nothing of this one; each has a pipe of its own, so that the death
    of one disturbs no other, and that of this process is noticed by all.
    """

    def __init__(self, work: WriteShard, tasks: Sequence[Task]) -> None:
        self._work = work
        self._waiting = deque(tasks)
        self._workers: dict[Connection, _Worker] = {}
        self._deaths: Counter[str] = Counter()

    def run(self, count: int, progress: Callable[[int], None]) -> Iterator[ShardReport]:
        finished = 0
        try:
            for _ in range(count):
                self._start(self._waiting.popleft())
            while self._workers:
                for ready in wait(list(self._workers)):
                    worker = self._workers[ready]  # type: ignore[index]
                    message = self._receive(worker)
                    if isinstance(message, ShardReport):
                        finished += worker.task.images
                        self._next(worker)
                        yield message
                    elif isinstance(message, int):
                        worker.images = message
                    progress(finished + sum(worker.images for worker in self._workers.values()))
        finally:
            for worker in self._workers.values():
                worker.process.terminate()
            for worker in self._workers.values():
                worker.process.join()

    def _start(self, task: Task) -> None:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, self._work), daemon=True)
        process.start()
        theirs.close()  # so that the pipe ends when the process does
        self._workers[ours] = _Worker(process, ours, task)
        self._send(ours, task)

    @staticmethod
    def _send(connection: Connection, task: Task | None) -> None:
        with suppress(BrokenPipeError):  # its death will be seen when it is listened to
            connection.send(task)

    def _next(self, worker: _Worker) -> None:
        """Give a worker that is done its next task, or let it go."""
        if self._waiting:
            worker.task, worker.images = self._waiting.popleft(), 0
            self._send(worker.connection, worker.task)
        else:
            del self._workers[worker.connection]
            self._send(worker.connection, None)
            worker.process.join()

    def _receive(self, worker: _Worker) -> ShardReport | int | None:
        """A report, a number of images, or None where the worker has died and was replaced."""
        try:
            message = worker.connection.recv()
        except (EOFError, ConnectionResetError):
            self._replace(worker)
            return None
        if isinstance(message, _Failure):
            if message.sentence is not None:
                raise LonghaulError(message.sentence)
            raise RuntimeError(f"in the process that wrote {worker.task.file}:\n{message.trace}")
        return message

    def _replace(self, worker: _Worker) -> None:
        del self._workers[worker.connection]
        worker.process.join()
        code, file = worker.process.exitcode, worker.task.file
        self._deaths[file] += 1
        how = f"killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
        if self._deaths[file] >= _MAX_DEATHS:
            raise LonghaulError(
                f"{_MAX_DEATHS} processes that wrote {file} died, the last {how}: if memory ran out, give a smaller "
                f"--jobs; what is finished is kept, and the same command goes on."
            )
        logging.getLogger(__name__).warning("A process that wrote %s died (%s); another takes over.", file, how)
        self._start(worker.task)


def _serve(connection: Connection, work: WriteShard) -> None:
    """A worker's life: tasks until None comes or the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends us

    def tell(images: int) -> None:
        if images % _TOLD_EVERY == 0:
            connection.send(images)

    try:
        while (task := connection.recv()) is not None:
            try:
                outcome: ShardReport | _Failure = work(task, tell)
            except (EOFError, BrokenPipeError, ConnectionResetError):
                return
            except Exception as error:
                sentence = str(error) if isinstance(error, LonghaulError) else None
                outcome = _Failure(sentence, traceback.format_exc())
            connection.send(outcome)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return

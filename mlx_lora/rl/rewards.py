"""Scoring while the next rows decode: each group in a thread, with a limit on its time.

The threads are daemons: a reward that hangs ends in an error, and does not hold the process.
"""

import contextlib
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue

from mlx_lora.errors import RewardError
from mlx_lora.rewards.score import about, crashed, of, score_all
from mlx_lora.types import Reward, Sample, Task


@dataclass
class Job:
    """One group on its way. `began` is on the monotonic clock."""

    sample: Sample
    texts: Sequence[str]
    began: float | None = None
    rewards: list[Reward] | None = None
    error: RewardError | None = None

    @property
    def over(self) -> bool:
        return self.rewards is not None or self.error is not None


@dataclass
class Scorer:
    """Groups in, rewards out in the order of their numbers. Use as a context manager.

    What a reward prints goes to stderr: stdout is for results.
    """

    task: Task
    seconds: float  # that one group may take
    jobs: dict[int, Job] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.queue: SimpleQueue[Job | None] = SimpleQueue()
        self.changed = threading.Condition()
        self.threads = 0
        self.prints = contextlib.redirect_stdout(sys.stderr)

    def __enter__(self) -> "Scorer":
        self.prints.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        for _ in range(self.threads):
            self.queue.put(None)
        self.prints.__exit__(None, None, None)

    def submit(self, p: int, sample: Sample, texts: Sequence[str]) -> None:
        """Score the completions of prompt p; returns at once."""
        assert p not in self.jobs, f"prompt {p} came twice"
        self.jobs[p] = job = Job(sample, texts)
        if self.threads < self.task.threads:
            self.threads += 1
            threading.Thread(target=self.work, daemon=True, name="rewards").start()
        self.queue.put(job)

    def results(self) -> list[list[Reward]]:
        """Rewards of every group submitted, by prompt number.

        RewardError for the first group whose reward failed or took longer than `seconds`.
        """
        jobs = [self.jobs[p] for p in sorted(self.jobs)]
        with self.changed:
            while not all(job.over for job in jobs):
                if any(job.error for job in jobs):
                    break
                self.changed.wait(self.left(jobs))
        for job in jobs:
            if job.error:
                raise job.error
        return [job.rewards or [] for job in jobs]

    def left(self, jobs: Sequence[Job]) -> float:
        """Seconds until the next limit. Marks the groups that are past theirs. Holds the lock."""
        now, left = time.monotonic(), self.seconds
        for job in jobs:
            if job.began is None or job.over:
                continue
            rest = job.began + self.seconds - now
            if rest <= 0:
                job.error = late(self.task, job, self.seconds)
            left = min(left, max(rest, 0.0))
        return left

    def work(self) -> None:
        """A thread: one group after the other until there is no more."""
        while (job := self.queue.get()) is not None:
            with self.changed:
                job.began = time.monotonic()
                self.changed.notify_all()
            found: list[Reward] | None = None
            error: RewardError | None = None
            try:
                found = score_all(self.task, job.sample, job.texts)
            except RewardError as failed:
                error = failed
            except BaseException as failed:  # SystemExit too: it would end the thread in silence
                error = crashed(self.task, job.sample, job.texts[0], failed)
            with self.changed:
                job.rewards, job.error = found, job.error or error
                self.changed.notify_all()


def late(task: Task, job: Job, seconds: float) -> RewardError:
    return RewardError(
        f"{about(task)} took longer than {seconds:g} s {of(job.sample, job.texts[0])}",
        "Raise rollout.reward_seconds, or put a limit on what the reward waits for.",
    )

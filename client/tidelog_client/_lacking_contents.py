"""
Lacking contents: what objects refer to, is not here, and is wanted with them.

It is looked up as it is downloaded, and never all in memory. What could not be had is
reported, and not tried twice in one synchronization.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Collection, Container, Iterable, Iterator
from itertools import groupby, islice, takewhile
from typing import TYPE_CHECKING

from tidelog_client._file_wishes import FileMode
from tidelog_client._files import Needed
from tidelog_client._report import Skipped, SkipReason
from tidelog_client._transfer import ASKED_OBJECTS_MAX, Downloading

if TYPE_CHECKING:
    from tidelog._keys import ObjectKey
    from tidelog_client._file_wishes import FileWishes
    from tidelog_client._files import Files, Missing
    from tidelog_client._report import Report


class LackingContents:
    """
    What is to be downloaded.

    Args:
        files: The replica's contents.
        wishes: Which contents the replica wants.
        report: Told of what is not downloaded.
    """

    def __init__(self, files: Files, wishes: FileWishes, report: Report) -> None:
        self._files = files
        self._wishes = wishes
        self._report = report
        # What could not be downloaded, and is not tried twice.
        self._tried: set[Needed] = set()
        # What came damaged, and is not asked for this time, with the reasons.
        self._put_off = files.put_off()

    def jobs(self, keys: Collection[ObjectKey] | None, apart: Container[Needed]) -> Iterator[Downloading]:
        """
        Yield what is to be downloaded, the smallest first.

        Args:
            keys: The objects that lack it. None: all.
            apart: Contents that come for something else.
        """
        wanted: Iterator[Missing]
        if keys is None:
            wanted = heapq.merge(*map(self._wanted_of, self._files.missing_entities()))
        else:
            missing = sorted(one for key in keys for one in self._files.missing_of(key))
            wanted = (one for one in missing if self._wishes.of(one.key[0]).wants(one.size))
        for (size, sha256), same in groupby(wanted, key=lambda one: one[:2]):
            if (content := Needed(sha256, size)) in self._tried or content in apart:
                continue
            asked = [one.key for one in islice(same, ASKED_OBJECTS_MAX)]
            job = Downloading(content, asked, Counter(one.key[0] for one in same))
            if sha256 in self._put_off:
                self.pass_over(job, f"{self._put_off[sha256]}; it is asked for again later")
            else:
                yield job

    def _wanted_of(self, entity: str) -> Iterator[Missing]:
        wish = self._wishes.of(entity)
        if wish.mode is FileMode.EAGER:  # else there may be many to look at for nothing
            yield from takewhile(lambda one: wish.wants(one.size), self._files.missing(entity))

    def pass_over(self, job: Downloading, why: str) -> None:
        """Report what is not downloaded, and do not try it any more."""
        self._tried.add(job.content)
        self._report.skipped += [Skipped(*key, SkipReason.FILE_NOT_DOWNLOADED, why) for key in job.keys]
        self._report.skipped += [
            Skipped(entity, "", SkipReason.FILE_NOT_DOWNLOADED, why, count=count)
            for entity, count in job.other_counts.items()
        ]

    def take_back(self) -> None:
        """Report nothing of objects that lack no content any more: they have changed since."""
        self._report.skipped[:] = [
            one
            for one in self._report.skipped
            if one.reason is not SkipReason.FILE_NOT_DOWNLOADED
            or not one.id
            or any(True for _ in self._files.missing_of((one.entity, one.id)))
        ]

    def give_up(self, jobs: Iterable[Downloading]) -> None:
        """Report what was not even begun."""
        left: Counter[str] = Counter()
        for job in jobs:
            left.update(entity for entity, _ in job.keys)
            left.update(job.other_counts)
        self._report.skipped += [
            Skipped(
                entity, "", SkipReason.FILE_NOT_DOWNLOADED, f"files for which no time was left: {count}", count=count
            )
            for entity, count in left.items()
        ]

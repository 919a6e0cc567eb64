"""The service's task list read from its newest task backwards, without a gap.

The list is asked for by place, and places shift: down when tasks are made meanwhile, up when an answer comes
from a copy that does not know the newest ones yet. Whoever then goes on at the next place passes over tasks
that nobody has seen, may take one of them for never made, and buy it again. So each page must show the task
that the one before ended with; one that does not is asked for again at another place.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from batchrun.model import Task
from batchrun.rules.pages import PAGE

#: So often in a row a page may not go on where the one before ended, or may show nothing else.
MAX_GAPS = 20


class Backwards:
    """One reading of the list."""

    def __init__(self, page: Callable[[int], Awaitable[list[Task]]]) -> None:
        """`page` gives up to PAGE tasks from a place on, newest first."""
        #: What was read so far, by id.
        self.tasks: dict[str, Task] = {}
        #: The list was read to its end.
        self.is_at_end = False
        self._page = page
        self._start = 0
        self._last: str | None = None
        self._gaps = 0

    async def more(self) -> list[Task] | None:
        """The tasks that the next page adds, perhaps none; None when the list ends, or no way on is found.

        Raises what `page` raises.
        """
        while self._gaps <= MAX_GAPS:
            found = await self._page(self._start)
            if not found and self._start == 0:
                self.is_at_end = True
                return None
            news = [task for task in found if task.id not in self.tasks]
            if self._last is not None and all(task.id != self._last for task in found):
                self._gaps += 1
                further, back = self._start + len(found) - 1, max(0, self._start - PAGE // 2)
                self._start = further if len(news) < len(found) else back
                continue
            if not news and len(found) < PAGE and not await self._page(self._start + len(found)):
                self.is_at_end = True
                return None
            self._gaps = 0 if news else self._gaps + 1
            self.tasks |= {task.id: task for task in news}
            self._last = found[-1].id
            self._start += len(found) - 1  # a page may be shorter than asked for
            return news
        return None

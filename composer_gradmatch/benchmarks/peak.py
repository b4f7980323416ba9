"""Peak memory of a piece of work, by torch's own count of what it allocates."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from types import TracebackType

import torch
from torch.profiler import ProfilerActivity, profile

__all__ = ["PeakMemory"]


class PeakMemory:
    """A context whose ``bytes``, once it is closed, are the most it held at once beyond what was held before.

    On a GPU by the allocator's own statistics, on the CPU by the profiler's record of each allocation; memory
    that libraries allocate themselves (workspaces of a convolution, say) is not in it.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self._profiler: profile | None = None
        self._before = 0

    def __enter__(self) -> PeakMemory:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            self._before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        else:
            self._profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self._profiler.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._profiler is None:
            torch.cuda.synchronize()
            self.bytes = torch.cuda.max_memory_allocated() - self._before
            return
        self._profiler.__exit__(kind, error, traceback)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "trace.json")
            self._profiler.export_chrome_trace(str(path))
            events = json.loads(path.read_text())["traceEvents"]
        changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]")
        held = 0
        for _, change in changes:
            held += change
            self.bytes = max(self.bytes, held)

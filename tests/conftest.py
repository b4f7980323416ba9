from __future__ import annotations

from hypothesis import settings

# The same examples in every run: a red build is the change's doing, not the draw's.
settings.register_profile("deterministic", derandomize=True, deadline=None)
settings.load_profile("deterministic")

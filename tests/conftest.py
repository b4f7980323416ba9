from __future__ import annotations

import os

from hypothesis import settings

# No test may reach a network; read by HuggingFace's libraries when they are first imported.
os.environ["HF_HUB_OFFLINE"] = "1"

# The same examples in every run: a red build is the change's doing, not the draw's.
settings.register_profile("deterministic", derandomize=True, deadline=None)
settings.load_profile("deterministic")

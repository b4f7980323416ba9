"""Where a study's runs are made: in processes of this machine, or on a Ray cluster."""

__all__ = ["ENGINES"]

#: The names for ``--engine``.
ENGINES = ("local", "ray")

"""All that a patched upstream may call. Without ``FLATPATCH_RUN`` in the environment every hook does nothing.

Importing this package needs the standard library alone; torch is used only once a hook has work to do.
"""

from flatpatch.hooks.trainer import attach_trainer

__all__ = ["attach_trainer"]

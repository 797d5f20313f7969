"""Flatness measured inside runs and afterwards: what to measure, on which sample, and the files it leaves.

Loading this package costs nothing; its modules that measure load torch. For hooks, :class:`~flatpatch.measurement.
in_run.Measurer` is the way in; :mod:`~flatpatch.measurement.files` says what the files hold.
"""

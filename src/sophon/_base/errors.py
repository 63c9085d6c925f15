"""Errors a user can act on: each message names the offending value and the remedy."""

from __future__ import annotations


class SophonError(Exception):
    """Base of every error raised on purpose; `exit_code` is what the command line returns.

    `told` says that another process of the same run tells it.
    """

    exit_code = 2
    told = False


class SpecError(SophonError):
    """A specification (TOML, `--set` or a spec object) is not valid."""


class DataError(SophonError):
    """A domain cannot be loaded or cannot be used with this model or specification."""


class UnsupportedModelError(SophonError):
    """A model cannot be built, its head cannot be found, or it cannot take the images."""


class CheckpointError(SophonError):
    """A checkpoint, run folder or store is damaged, foreign or cannot be written."""


class LockedError(CheckpointError):
    """Another process is writing to a folder, in which nothing is wrong."""


class AuditError(SophonError):
    """An audit cannot be run or its record cannot be judged."""


class IntactnessError(SophonError):
    """No weights met the tolerance on the original domain; every file of the run is kept."""

    exit_code = 3


class NonFiniteError(SophonError):
    """A loss or gradient became NaN or infinite while protecting; what was written is kept."""

    exit_code = 4


class ControlError(SophonError):
    """A model whose answer is known was not found out: audits made like this prove nothing."""

    exit_code = 5


class RanksError(SophonError):
    """Another process of the same run failed, ended, or holds other weights."""

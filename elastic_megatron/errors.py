"""The errors that users see, each with the exit status of the command that ends with it."""

from __future__ import annotations

import errno

BAD_INPUT = 2
"""Exit status of bad input: the same command fails again. Final for a chain of jobs."""

DIVERGED = 3
"""Exit status of training that diverged: the same command diverges again. Final for a chain of jobs."""

AGAIN = 75
"""Exit status of a job that wants to be continued: it saved on SIGUSR1, or the file system failed for a while.
EX_TEMPFAIL of <sysexits.h>."""


class UserError(ValueError):
    """Bad input: a recipe, a file, a name or a size that cannot work.

    The message is one line saying what is wrong, where, and what to do; the command line prints it
    after ``error:`` and exits with ``status``, without a traceback.
    """

    status = BAD_INPUT


class RetryableError(UserError):
    """Nobody's mistake: a full disk, a file server that does not answer. The same command may succeed later."""

    status = AGAIN


class DivergedError(UserError):
    """Training diverged, and what was good is kept."""

    status = DIVERGED


# a disk or a quota that is full, a device or a file server that failed: what passes, or what somebody mends
_RETRYABLE = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EREMOTEIO, errno.ESTALE, errno.EBUSY, errno.ENOLCK,
    errno.ENOTCONN, errno.ESHUTDOWN, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN,
    errno.ENETUNREACH,
}  # fmt: skip
# a path at which the file system never lets this user write
_REFUSED = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG,
    errno.ELOOP,
}  # fmt: skip


def failure_in(error: BaseException) -> BaseException:
    """What went wrong on a rank, of torch's ``CheckpointException``, which wraps it; another error is itself.

    torch wraps interruptions too: these are raised.
    """
    inner = next((failure for failure, _ in getattr(error, "failures", {}).values()), error)
    if isinstance(inner, KeyboardInterrupt | SystemExit):
        raise inner
    return inner


def of_os_error(error: OSError, what: str = "") -> UserError | None:
    """What people are told about a failure of the file system; ``None`` where it may be a defect of this code.

    Args:
        what: could not be done; begins the message.
    """
    reason = ": ".join(part for part in (str(error.filename or ""), error.strerror or "") if part)
    said = f"{what} ({reason})" if what else reason or "output"
    if error.errno in _RETRYABLE:
        return RetryableError(f"{said}; free space or mend the file system, then run the same command again")
    if error.errno in _REFUSED:
        return UserError(f"{said}; choose another path or correct its permissions")
    return None

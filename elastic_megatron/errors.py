"""The one exception that users see."""


class UserError(ValueError):
    """Bad input: a recipe, a file, a name or a size that cannot work.

    The message is one line saying what is wrong, where, and what to do; the command line prints it
    after ``error:`` and exits with status 2, without a traceback.
    """


AGAIN = 75
"""Exit status of a job that saved on SIGUSR1 and wants to be continued: EX_TEMPFAIL of <sysexits.h>."""

"""The one error of Scepsy that is meant for its user."""


class ScepsyError(Exception):
    """Something the user gave cannot be used.

    The message is complete by itself: what is wrong, where, and what to do. The command line prints it alone, without
    a traceback, and exits with 2.
    """

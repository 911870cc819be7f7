"""Checks of an environment, a config and a folder of pictures before a run.

Nothing but the standard library is imported here, nor by the checks of packages and of
the machine, so that they also tell what is wrong where densessl cannot be imported.
"""

"""
Configuration of every script: defaults in the script < config files < --key=value.

    python train.py config/train_11.py --attn_type=SM --max_iters=500

A script declares its keys as a dataclass: type, default, and a trailing comment that `--help` shows.
Config files are Python that assigns those keys; they are run, so they are trusted like the script
itself. Values on the command line are data: they are parsed by the key's type, never evaluated.
Later ones win. Anything wrong is a UserError: one line on stderr, exit code 2.
"""


class UserError(Exception):
    """A mistake that the user can repair. Its text is one line: what was given, what is allowed,
    and the command that repairs it."""

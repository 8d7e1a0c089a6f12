"""The one exception that is shown to a user as a sentence.

Every refusal in the package is a `UserError`: it names the value, the limit and the mend, and the command
line prints it without a traceback.
"""


class UserError(Exception):
    """A mistake the user can mend: one clear sentence naming the value, the limit and the mend."""

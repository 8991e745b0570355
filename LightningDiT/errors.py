"""The one exception that the library raises for what a user can cause and mend."""


class LightningDiTError(Exception):
    """A wrong file, value or setting, said in one line.

    Args:
        message: names the value that is wrong and what was expected instead.
        mend: the command or edit that puts it right, shown behind the message.
    """

    def __init__(self, message: str, mend: str | None = None) -> None:
        self.message = message
        self.mend = mend
        super().__init__(f"{message}; mend: {mend}" if mend else message)

"""The one exception that the library raises for what a user can cause and fix."""


class LightningDiTError(Exception):
    """A wrong file, value or setting, said in one line.

    Args:
        message: names the value that is wrong and what was expected instead.
        fix: the command or edit that puts it right, shown behind the message.
    """

    def __init__(self, message: str, fix: str | None = None) -> None:
        self.message = message
        self.fix = fix
        super().__init__(f"{message}; fix: {fix}" if fix else message)

"""Mistakes of users: errors that know which parameters are at fault, several of them at once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence


class Mistake(ValueError):
    """A mistake in one line.

    Attributes:
      names: gin's names of the parameters at fault (`Run.batch_size`), where the message does not
        say them.
    """

    def __init__(self, message: str, names: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.names = tuple(names)


class Mistakes(ValueError):
    """Several mistakes; each is a line of its own where they are told.

    Attributes:
      errors: the mistakes.
    """

    def __init__(self, errors: Sequence[ValueError | OSError]) -> None:
        super().__init__("; ".join(map(describe, errors)))
        self.errors = tuple(errors)


class Collected:
    """The mistakes of parts that do not need each other, so that all of them are told at once."""

    def __init__(self) -> None:
        self.errors: list[ValueError | OSError] = []

    @contextlib.contextmanager
    def part(self, *names: str) -> Iterator[None]:
        """Keeps what a part refuses; `names` are the parameters that it is about."""
        try:
            yield
        except Mistakes as error:
            self.errors += error.errors
        except Mistake as error:
            self.errors.append(error)
        except (ValueError, OSError) as error:
            # Errors of the system become lines here, for they are told beside others.
            message = describe(error) if isinstance(error, OSError) else str(error)
            found = Mistake(message, names)
            found.__cause__ = error
            self.errors.append(found)

    def tell(self, where: str = "") -> None:
        """Raises what was kept: `Mistakes`, or the one that there is; `where` goes before each."""
        errors = list({describe(error): error for error in self.errors}.values())
        self.errors = []
        if where:
            errors = [Mistake(where + describe(error)) for error in errors]
        if len(errors) == 1:
            raise errors[0]
        if errors:
            raise Mistakes(errors)


def describe(error: BaseException) -> str:
    """An error in one line; of the system's, the file and what is wrong with it."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())


def reason(error: BaseException) -> str:
    """What a library says, in one line; the kind of its error where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__

"""An object in its own process, which is called one method at a time.

    with Apart(Counter, "aab") as counter:
        counter("most_common", 1)

Each has its own fresh interpreter, so that neither memory nor imports of one affect another (some
peers patch transformers at import).
"""

import multiprocessing
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any


class ApartError(RuntimeError):
    """An exception of the object in its process: `kind` is the class's name."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


class Apart:
    """`make(*args)` in a fresh process, until it is closed."""

    def __init__(self, make: Callable[..., Any], *args: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, args), daemon=True)
        self._process.start()
        theirs.close()
        self._waits = True  # for `make`: others can start meanwhile

    def ready(self) -> "Apart":
        """Wait until the object is created."""
        if self._waits:
            self._waits = False
            self._answer()
        return self

    def __call__(self, method: str, *args: Any) -> Any:
        """The result of the object's method; ApartError for whatever it raises."""
        self.ready()
        self._pipe.send((method, args))
        return self._answer()

    def _answer(self) -> Any:
        try:
            error, value = self._pipe.recv()
        except EOFError:
            self._process.join()
            code = self._process.exitcode
            raise ApartError("killed", f"the process ended with exit code {code}") from None
        if error:
            raise ApartError(*value)
        return value

    def close(self) -> None:
        """End the process, which frees its memory."""
        with suppress(OSError):
            self._pipe.send(None)
        self._pipe.close()
        self._process.join()

    def __enter__(self) -> "Apart":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()


def _serve(pipe: Connection, make: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """Answer with (False, value) or (True, (kind of error, its traceback)), until the pipe sends
    None."""
    try:
        made = make(*args)
        pipe.send((False, None))
    except Exception as error:
        pipe.send((True, (type(error).__name__, traceback.format_exc())))
        return
    while (told := pipe.recv()) is not None:
        method, given = told
        try:
            pipe.send((False, getattr(made, method)(*given)))
        except Exception as error:
            pipe.send((True, (type(error).__name__, traceback.format_exc())))

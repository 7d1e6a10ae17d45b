"""A time limit for what may never end, such as a call to a file system whose server is gone."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

Result = TypeVar("Result")


def finished_in_time(function: Callable[[], Result], seconds: float) -> Result | None:
    """Calls a function and returns its result, or None if it has not ended in time.

    Its thread is then left behind, and does not keep the process from ending.

    Args:
        function: A function that does not return None.
        seconds: Time limit.
    """
    future: Future[Result] = Future()

    def call() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=call, name="limited", daemon=True).start()
    try:
        return future.result(seconds)
    except TimeoutError:
        if future.done():  # the function itself has raised it
            raise
        return None

"""Renders conversations with a model's chat template, in a child process with bounds on CPU time and memory.

A chat template is a program that comes with the model. transformers runs it in Jinja's sandbox, which bounds neither
time nor memory.
"""

from __future__ import annotations

import gc
import os
import resource
import signal
import warnings
from collections.abc import Sequence
from multiprocessing.connection import Connection, Pipe
from typing import TYPE_CHECKING

from fipo_megatron.storage.json_files import one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CPU_SECONDS = 1.0
"""CPU time for one conversation."""
_MEMORY_BYTES = 512 << 20
_LONGEST_TEXT = 8 << 20
_SECONDS_WITHOUT_TEXT = 60.0
_RENDERED, _FAILED = b"+", b"-"


class ChatTemplateError(ValueError):
    """Raised if a chat template cannot render a conversation; the message is one line.

    Attributes:
        index: Index of the conversation.
    """

    def __init__(self, index: int, message: str) -> None:
        super().__init__(message)
        self.index = index


def render_conversations(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Sequence[dict[str, str]]]
) -> list[str]:
    """Returns the text of each conversation for the model to continue.

    The child process is a fork of this one, so it needs no import; it runs nothing but the template.

    Args:
        tokenizer: Tokenizer that holds the template.
        conversations: Messages with ``role`` and ``content``.

    Raises:
        ChatTemplateError: The template raises, does not parse, or needs too much time or memory.
    """
    receiver, sender = Pipe(duplex=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 on forks of processes with threads
        child = os.fork()
    if not child:
        try:
            receiver.close()
            _render_all(tokenizer, conversations, sender)
        finally:
            os._exit(0)
    sender.close()
    texts: list[str] = []
    failure = ""
    try:
        with receiver:
            while len(texts) < len(conversations) and not failure:
                failure = _receive(receiver, texts)
    finally:
        os.kill(child, signal.SIGKILL)  # it is a zombie at most until it is waited for
        _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGPROF:
        failure = f"needs more than {CPU_SECONDS:g} s of CPU time"
    if failure:
        raise ChatTemplateError(len(texts), failure)
    return texts


def _receive(receiver: Connection, texts: list[str]) -> str:
    """Appends the next text, or returns why there is none."""
    if not receiver.poll(_SECONDS_WITHOUT_TEXT):
        return f"renders nothing within {_SECONDS_WITHOUT_TEXT:g} s"
    try:
        message = receiver.recv_bytes()
    except (EOFError, OSError):
        return "ended its process"
    if message[:1] == _FAILED:
        return message[1:].decode()
    texts.append(message[1:].decode())
    return ""


def _render_all(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Sequence[dict[str, str]]], sender: Connection
) -> None:
    """Renders and sends each conversation; SIGPROF ends the process at the limit of CPU time."""
    gc.freeze()  # garbage of the parent stays: a process group, for one, would wait for threads that are not here
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with open("/proc/self/statm", encoding="ascii") as statm:
        pages = int(statm.read().split()[0])
    limit = pages * resource.getpagesize() + _MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for conversation in conversations:
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        try:
            text = tokenizer.apply_chat_template([*conversation], add_generation_prompt=True, tokenize=False)
            if not isinstance(text, str) or len(text) > _LONGEST_TEXT:
                raise ValueError(f"renders more than {_LONGEST_TEXT} characters")
            message = _RENDERED + text.encode()
        except MemoryError:
            message = _FAILED + b"needs more than %d MiB of memory" % (_MEMORY_BYTES >> 20)
        except Exception as error:
            message = _FAILED + f"{type(error).__name__}: {one_line(error)}".encode(errors="replace")
        sender.send_bytes(message)
        if message[:1] == _FAILED:
            return

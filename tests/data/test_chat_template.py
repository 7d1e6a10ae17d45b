"""The child process that renders a chat template; tests/trainer/test_input_errors.py tries hostile templates."""

import gc
import os
import signal
from types import SimpleNamespace

from fipo_megatron.data.chat_template import render_conversations


class NeedsItsProcess:
    """An object in a cycle, such as a process group, whose end needs threads of the process that made it."""

    def __init__(self):
        self.itself, self.process = self, os.getpid()

    def __del__(self):
        if os.getpid() != self.process:
            os.kill(os.getpid(), signal.SIGSEGV)


def collect_and_render(messages, **options):
    gc.collect()
    return messages[0]["content"]


def test_garbage_of_the_parent_is_not_collected_in_the_child():
    gc.collect()
    gc.disable()
    try:
        NeedsItsProcess()
        tokenizer = SimpleNamespace(apply_chat_template=collect_and_render)
        assert render_conversations(tokenizer, [[{"role": "user", "content": "1 + 1"}]]) == ["1 + 1"]
    finally:
        gc.enable()

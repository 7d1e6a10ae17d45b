"""Damage of checkpoints: found before anything is loaded, and raised as :class:`WeightsError` on all ranks."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from fipo_megatron.checkpoint import manifest
from fipo_megatron.checkpoint.manifest import Manifest
from fipo_megatron.storage import checksums
from fipo_megatron.storage.atomic import partial_of
from fipo_megatron.weights import torch_dist
from fipo_megatron.weights.hf_directory import WeightsError, first_line

logger = logging.getLogger(__name__)
VALUE_ERRORS = (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError)
"""Errors of values that are not as expected; those of devices and other processes are not among them."""
_UNFINISHED = re.compile(r"\.step-[0-9]{6,}(\.again)?\.partial")


@contextmanager
def damage_on_all_ranks() -> Iterator[None]:
    """Raises WeightsError on all ranks if the block raises it on any. A collective.

    Other errors are raised as they are; the block ends on all ranks if it fails on one (:func:`.raise_on_all_ranks`).
    """
    own: Exception | None = None
    try:
        yield
    except Exception as error:
        own = error
    found: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, str(own) if isinstance(own, WeightsError) else None)
    if texts := list(dict.fromkeys(text for text in found if text is not None)):
        raise WeightsError("\n".join(texts)) from own
    if own is not None:
        raise own


@contextmanager
def damage_in(path: Path, kinds: tuple[type[Exception], ...] = (Exception,)) -> Iterator[None]:
    """Turns errors of reading a damaged file, which can be of any type, into WeightsError with one sentence.

    Args:
        path: The file, or the directory of the checkpoint.
        kinds: Types of errors that mean damage. A lack of memory never does.
    """
    try:
        yield
    except (WeightsError, MemoryError):
        raise
    except kinds as error:
        raise WeightsError(f"{path}: is damaged: {first_line(error)}") from error


def read_manifest(checkpoint: Path) -> Manifest:
    """Reads the manifest after its checksum was compared.

    Raises:
        WeightsError: It is missing or damaged.
    """
    try:
        return Manifest.read_verified(checkpoint)
    except ValueError as error:
        raise WeightsError(str(error)) from error


def check_listed(checkpoint: Path, saved: Manifest) -> None:
    """Checks that every file that a checkpoint consists of has a checksum. Files without one would not be missed.

    Raises:
        WeightsError: A file is missing in the checksums; one line each.
    """
    ranks = range(saved.world_size)
    needed = [manifest.FILE, torch_dist.COMMON, torch_dist.METADATA, torch_dist.BACKEND]
    needed += sorted({info.relative_path for info in torch_dist.read_metadata(checkpoint).storage_data.values()})
    needed += [f"run/random-{rank}.pt" for rank in ranks]
    needed += [f"run/sampler-{leader}.npz" for leader in range(saved.leaders)]
    if saved.prefetched:
        needed += [f"run/step-{saved.step:06}.json", *(f"run/step-{saved.step:06}-{rank}.npz" for rank in ranks)]
    known = checksums.read(checkpoint)
    if lost := [name for name in needed if name not in known]:
        raise WeightsError("\n".join(f"{checkpoint / name}: missing in {checksums.FILE}" for name in lost))


def remove_unfinished(directory: Path) -> None:
    """Removes what killed runs left of checkpoints that they were writing; leaves foreign files alone."""
    for path in sorted(directory.glob(".*.partial")):
        if _UNFINISHED.fullmatch(path.name) is None:
            logger.warning("%s: is no checkpoint of this run; left as it is", path)
        elif path.is_dir() and not path.is_symlink():
            logger.warning("%s: was never finished; removed", path)
            shutil.rmtree(path)
        else:
            logger.warning("%s: is not a directory; removed, because a checkpoint needs its name", path)
            path.unlink()


def remove(checkpoint: Path) -> None:
    """Removes a checkpoint so that it disappears as a whole; of a link, only the link is removed."""
    if checkpoint.is_symlink():
        checkpoint.unlink()
        return
    hidden = partial_of(checkpoint)
    checkpoint.rename(hidden)
    shutil.rmtree(hidden)

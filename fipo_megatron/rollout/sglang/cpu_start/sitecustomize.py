"""Lets SGLang 0.5.23 start on a machine without CUDA. Python imports this module if its directory is on PYTHONPATH.

SGLang's sources stay unmodified. Two of its imports fail without a GPU, and this module makes both succeed:

- ``torchvision`` from the registry is built for CUDA. Its operators do not load beside a CPU build of torch, and
  registering their shapes fails because they are not declared. They are declared here; they are never called.
- ``triton`` has no build for machines without a GPU driver. SGLang has stand-ins for it, which it installs on macOS
  only; they are installed here as well.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import pathlib
import sys


class _DeclareVisionOperators(importlib.abc.MetaPathFinder):
    """Declares two operators right before torchvision asks for them."""

    library = None

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision._meta_registrations" and self.library is None:
            import torch

            self.library = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                self.library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


class _TritonModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Resolves every import below ``triton`` to one of SGLang's stand-ins."""

    def __init__(self, stubs):
        self.stubs = stubs

    def find_spec(self, name, path=None, target=None):
        if name.startswith("triton."):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return sys.modules.get(spec.name) or self.stubs._MockModule(spec.name)

    def exec_module(self, module):
        pass


class _ConstExpr:
    """``triton.language.constexpr``, which is called in default arguments."""

    def __init__(self, value=None):
        self.value = value


def _install_triton():
    sglang = importlib.util.find_spec("sglang")
    if sglang is None or sglang.origin is None or importlib.util.find_spec("triton") is not None:
        return
    source = pathlib.Path(sglang.origin).with_name("_platform_stubs.py")
    spec = importlib.util.spec_from_file_location("_sglang_platform_stubs", source)
    stubs = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(stubs)
    sys.meta_path.insert(0, _TritonModules(stubs))
    triton = stubs._make_mock("triton")
    triton.__version__ = "3.0.0"
    triton.cdiv, triton.next_power_of_2, triton.Config = stubs._cdiv, stubs._next_power_of_2, stubs._Config
    triton.language = stubs._make_mock("triton.language")
    triton.language.constexpr = _ConstExpr


sys.meta_path.insert(0, _DeclareVisionOperators())
_install_triton()

"""A stand-in for SGLang's CUDA kernels: its CPU path imports some by name, and calls none in plain serving."""


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*args, **kwargs):
        raise NotImplementedError(f"sgl_kernel.{name} needs a GPU")

    return missing

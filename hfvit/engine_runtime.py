"""A serialised engine on its GPU, through `tensorrt` or `tensorrt_rtx`: where the two differ, they differ here alone.

Nothing of this can run without a GPU but the check of an engine's head. Everything is called with the engine's GPU as
the current one, on which TensorRT puts what it makes.
"""

import logging
from pathlib import Path

from hfvit.errors import ModelError
from hfvit.export.trt_backends import Backend
from hfvit.export.trt_watch import message_log
from hfvit.paths import temporary_file

logger = logging.getLogger(__name__)


class EngineRuntime:
    """A deserialised engine; `context()` gives what runs it.

    `cache` is a file for kernels that TensorRT for RTX compiled for this GPU: it is read here, and written by `keep`.
    Raises `ModelError` with the backend's own reason when the engine cannot be loaded.

    `allow_code` lets an engine bring code for the processor, as version-compatible ones do: their own runtime.
    """

    def __init__(self, backend: Backend, file: Path, cache: Path | None = None, allow_code: bool = False):
        self.trt, self.file, self.cache_file = backend.module, file, cache
        self.log = message_log(self.trt, verbose=False)
        runtime = self.trt.Runtime(self.log)
        runtime.engine_host_code_allowed = allow_code
        blob = file.read_bytes()
        if problem := invalidity(self.trt, runtime, blob, self.log):
            raise ModelError(f"{file}: {backend.title} does not take the engine here: {problem}.")
        self.runtime = runtime  # it must outlive its engine
        self.engine = runtime.deserialize_cuda_engine(blob)
        if self.engine is None:
            raise ModelError(f"{file}: {backend.title} cannot load the engine: {self.log.reason()}")
        self.is_jit = backend.builds_without_gpu
        self._config, self._cache, self._kept = None, None, 0
        if self.is_jit:
            self._compile_at_once()

    def _compile_at_once(self) -> None:
        """Kernels for a new batch size before its first run, not beside it: a CUDA graph must not hold the ones that
        are to be replaced. What was compiled before is taken from the cache, if it is of this GPU and version."""
        config = self.engine.create_runtime_config()
        config.dynamic_shapes_kernel_specialization_strategy = self.trt.DynamicShapesKernelSpecializationStrategy.EAGER
        self._cache = config.create_runtime_cache()
        if self.cache_file is not None and self.cache_file.is_file():
            known = self.cache_file.read_bytes()
            if self._cache.deserialize(known):
                self._kept = len(known)
        config.set_runtime_cache(self._cache)
        self._config = config

    def context(self):
        """A new execution context, with memory of its own."""
        given = () if self._config is None else (self._config,)
        made = self.engine.create_execution_context(*given)
        if made is None:
            raise ModelError(f"{self.file}: no memory for the engine: {self.log.reason()}")
        return made

    def is_capturable(self, context, stream: int) -> bool:
        """Whether a CUDA graph can hold what `context` does on the stream with the handle `stream`."""
        return not self.is_jit or context.is_stream_capturable(stream)

    def keep(self) -> None:
        """Write what was compiled since it was read; a folder that takes no file only makes the next start slower."""
        if self._cache is None or self.cache_file is None:
            return
        compiled = memoryview(self._cache.serialize())
        if compiled.nbytes == self._kept:
            return
        try:
            with temporary_file(self.cache_file) as temporary:
                temporary.write_bytes(compiled)
        except OSError as error:
            logger.warning("%s cannot be written: %s", self.cache_file, error.strerror or error)
        self._kept = compiled.nbytes


def invalidity(trt, runtime, blob: bytes, log) -> str | None:
    """Why the engine cannot run here by its head alone, which TensorRT for RTX can tell; None when it can."""
    if not hasattr(runtime, "get_engine_validity"):
        return None
    validity, flags = runtime.get_engine_validity(blob)
    if validity != trt.EngineValidity.INVALID:
        return None
    found = [
        name.lower().replace("_", " ")
        for name, flag in trt.EngineInvalidityDiagnostics.__members__.items()
        if int(flags) & int(flag.value)
    ]
    return ", ".join(found) or log.reason()

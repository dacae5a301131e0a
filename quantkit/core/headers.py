"""The names, dtypes and shapes of a model's tensors, and none of their data.

On this machine they are those of its files. On the Hub the headers of safetensors files are asked
for by range requests, and the only files that come here are small ones: config.json, the index.
"""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from quantkit.core.checkpoint import DTYPES, Checkpoint, TensorSpec
from quantkit.core.source import Source, is_remote, resolve, told_by_the_hub
from quantkit.errors import QuantkitError

_SMALL = ("config.json", "quantize_config.json", "quant_config.json", "*.index.json")


class Headers(Checkpoint):
    """The safetensors files of a repository, of which only the headers come here. Raises
    QuantkitError when there are none, and when data is asked for."""

    def __init__(self, source: Source) -> None:
        assert source.revision is not None
        self.folder = source.folder
        found = _of_repository(source.name, source.revision)
        self.files = sorted(found)
        self._open = {file: _Header(source.name, found[file].tensors) for file in self.files}
        self._where = {name: file for file in self.files for name in self._open[file].names()}

    @property
    def nbytes(self) -> int:
        return sum(self.spec(name).nbytes for name in self)


class _Header:
    """One file's header, as huggingface_hub reads it."""

    def __init__(self, repository: str, tensors: dict[str, Any]) -> None:
        self._repository, self._tensors = repository, tensors

    def names(self) -> Iterable[str]:
        return self._tensors

    def spec(self, name: str) -> TensorSpec:
        info = self._tensors[name]
        dtype = DTYPES.get(info.dtype)
        if dtype is None:
            raise QuantkitError(
                f"tensor {name} has the dtype {info.dtype}, which quantkit does not read"
            )
        return TensorSpec(dtype, tuple(info.shape))

    def get(self, name: str) -> Tensor:
        raise QuantkitError(
            f"the shapes of {self._repository} do not say enough: what {name} holds is needed",
            "download it, and give its folder",
        )

    def release(self) -> None:
        """Nothing is held."""


def look(model: str, revision: str | None = None) -> tuple[Source, Checkpoint]:
    """``model`` (``demo``, a folder, a safetensors file or a Hub repository) and its tensors, whose
    data is not read and never fetched. Raises QuantkitError when there is no such model, or when
    its weights are not in safetensors (here: or .bin) files that can be told apart."""
    if is_remote(model):
        source = resolve(model, revision, _SMALL)
        return source, Headers(source)
    source = resolve(model, revision)
    if (source.file or "").endswith(".gguf"):
        raise QuantkitError(
            f"{source.name} is a GGUF file, which cannot be planned with",
            "give the model that it was made from",
        )
    return source, Checkpoint(source.folder, [source.file] if source.file else None)


def _of_repository(repository: str, revision: str) -> dict[str, Any]:
    """File -> its header, by huggingface_hub."""
    from huggingface_hub import HfApi, errors

    api = HfApi()
    with told_by_the_hub(repository, revision, "reading the headers of"):
        try:
            return api.get_safetensors_metadata(repository, revision=revision).files_metadata
        except errors.NotASafetensorsRepoError:
            pass
        # files with names of their own, as AutoGPTQ wrote them
        names = [n for n in api.list_repo_files(repository, revision=revision) if "/" not in n]
        found = [name for name in names if name.endswith(".safetensors")]
        if len(found) != 1:
            raise QuantkitError(
                f"{repository} has no safetensors weights that could be planned with"
                if not found
                else f"{repository} holds several sets of weights: {', '.join(sorted(found))}",
                "download it, and give its folder",
            )
        header = api.parse_safetensors_file_metadata(repository, found[0], revision=revision)
        return {found[0]: header}

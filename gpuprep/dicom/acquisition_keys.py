"""Defines the attributes by which the acquisitions of a series are separated."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass

from gpuprep.core.series import SliceHeader, unpacked


@dataclass(frozen=True, slots=True)
class Key:
    """Attribute that can separate the images at one position."""

    value: Callable[[SliceHeader], Hashable]
    """Returns the value for an image; None or "" if absent."""
    unit: str | None = None
    """Text after the value in messages; None if the value is a hash, which messages do not show."""


def _phase(name: str, unit: str) -> Key:
    return Key(lambda s: unpacked(s.phase, name) if s.phase else "", unit)


def _other(name: str) -> Key:
    return Key(lambda s: unpacked(s.other, name))


ACQUISITION: dict[str, Key] = {
    "series UID": _other("uid"),
    "temporal position": Key(lambda s: s.temporal_position, ""),
    "temporal offset": _phase("offset", " s"),
    "respiratory phase": _phase("respiratory", " %"),
    "cardiac phase": _phase("cardiac", " %"),
    "cardiac trigger delay": _phase("delay", " ms"),
    "respiratory trigger delay": _phase("respiratory-delay", " ms"),
    "trigger time": _phase("trigger", " ms"),
    "energy": _phase("energy", " keV"),
    "acquisition number": Key(lambda s: s.acquisition_number, ""),
    "reconstruction": Key(lambda s: s.reconstruction),
    "acquisition time": Key(lambda s: s.acquisition_time),
}
"""Attributes that identify the acquisition of an image, in the order in which they are tried."""


EXPLICIT = (
    "series UID", "temporal position", "temporal offset", "respiratory phase", "cardiac phase", "cardiac trigger delay",
    "respiratory trigger delay", "energy",
)  # fmt: skip
"""Attributes that always mean different acquisitions, whatever the instance numbers are. The other attributes can vary
within one scan: acquisition number and time by rotation, trigger time by heartbeat."""


LAST_RESORT: dict[str, Key] = {
    "scan options": _other("options"),
    "series time": _other("series"),
    "content time": _other("content"),
    "instance": Key(lambda s: (s.path, s.member) if s.frames > 1 else ""),
}
"""Attributes that also vary within an acquisition. They are tried last and must assign every image to a volume."""

"""Lists the attributes that tell one acquisition of a series from another."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass

from gpuprep.core.series import SliceHeader, unpacked


@dataclass(frozen=True, slots=True)
class Key:
    """An attribute that tells images at one place apart."""

    of: Callable[[SliceHeader], Hashable]
    """Its value; None or "" where there is none."""
    unit: str | None = None
    """What follows the value in a message; None: the value is a hash, and not for people."""


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
"""Attributes that say of which acquisition an image is, in the order in which they are tried."""


EXPLICIT = (
    "series UID", "temporal position", "temporal offset", "respiratory phase", "cardiac phase", "cardiac trigger delay",
    "respiratory trigger delay", "energy",
)  # fmt: skip
"""Attributes that name what an image shows: no order of instances says otherwise. A scan has numbers and times of its
rotations, a trigger time of each heartbeat, and is one all the same."""


LAST_RESORT: dict[str, Key] = {
    "scan options": _other("options"),
    "series time": _other("series"),
    "content time": _other("content"),
    "instance": Key(lambda s: (s.path, s.member) if s.frames > 1 else ""),
}
"""Attributes that vary for other reasons too: they are tried last, and have to explain every image."""

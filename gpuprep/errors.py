"""Every error gpuprep raises on purpose.

::

    GpuprepError
    ├── InputError              one series: what is on disk cannot be converted
    │   ├── MissingTagError     an attribute the conversion needs is absent or unreadable
    │   ├── GeometryError       the slices do not form a regular grid
    │   ├── IntensityError      the stored values cannot be called HU
    │   ├── DecodeError         the pixel data cannot be read
    │   └── SegmentationError   a segmentation file cannot be read, or its place is not clear
    │       └── NotASegmentationError   it is something else
    ├── PlanError               one series: it does not fit what the recipe asks
    ├── OutputError             one series: its folder cannot be written
    ├── RequestError            the whole run: what was asked makes no sense
    │   ├── RecipeError         … in the recipe
    │   └── NothingFoundError   … or is not there
    └── BackendError            the whole run: the engine cannot start
        ├── DeviceMemoryError   one series: it does not fit on the device
        └── DeviceLostError     one series: the device failed under it

Errors of one series end up in the manifest with their text, and the cohort goes on; the others end the run.
`exit_code` is what the command line returns when the error ends a run.
"""


class GpuprepError(Exception):
    """Base of every error below."""

    exit_code = 1


class InputError(GpuprepError):
    """What is on disk cannot be converted truthfully.

    `code` is the reason in one word, for programs; the text says the rest.
    """

    code = "input"

    def __init__(self, text: str, code: str | None = None) -> None:
        super().__init__(text)
        if code is not None:
            self.code = code


class MissingTagError(InputError):
    """An attribute the conversion needs is absent or unreadable."""

    code = "missing-tag"


class GeometryError(InputError):
    """The slices do not form a regular grid."""

    code = "geometry"


class IntensityError(InputError):
    """The stored values cannot be called HU."""

    code = "not-hu"


class DecodeError(InputError):
    """The pixel data of a file cannot be read."""

    code = "pixels"


class SegmentationError(InputError):
    """A segmentation file cannot be read, or not be placed on its series.

    A file that cannot be read may still say whose it is: what it names, as far as that could be read, is in
    `series_uids`, `frame_of_reference_uid` and `sop_uids`.
    """

    code = "mask"
    series_uids: tuple[str, ...] = ()
    frame_of_reference_uid: str = ""
    sop_uids: frozenset[str] = frozenset()


class NotASegmentationError(SegmentationError):
    """A file is something else than a segmentation, as it may well lie among some."""

    code = "mask-not"


class PlanError(GpuprepError):
    """The series does not fit what the recipe asks."""


class OutputError(GpuprepError):
    """A series' folder, or what belongs to the whole run, cannot be written.

    `code` is the reason in one word, for programs.
    """

    def __init__(self, text: str, code: str | None = None) -> None:
        super().__init__(text)
        self.code = code or "error"


class RequestError(GpuprepError):
    """What was asked makes no sense."""

    exit_code = 2


class RecipeError(RequestError, ValueError):
    """A recipe holds an unknown key or an impossible value."""


class NothingFoundError(RequestError):
    """There is no such series where it was looked for."""

    exit_code = 3


class BackendError(GpuprepError):
    """The asked-for backend cannot run here."""

    exit_code = 4


class DeviceMemoryError(BackendError):
    """A volume does not fit into the memory of the device, for now or at all."""


class DeviceLostError(BackendError):
    """The device failed, and nothing more can be computed on it in this process."""


def nested_too_deeply(exc: BaseException | None) -> bool:
    """Whether an error means that something is nested deeper than Python can follow.

    A library may raise an error of its own in place of the RecursionError: pydicom does if it is met while the head of
    an item is read. How deep that is depends on the version of Python and on who calls.
    """
    while exc is not None:
        if isinstance(exc, RecursionError):
            return True
        exc = exc.__cause__ or exc.__context__
    return False

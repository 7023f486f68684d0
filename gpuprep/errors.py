"""Defines all errors that gpuprep raises.

::

    GpuprepError
    ├── InputError              one series: its files cannot be converted
    │   ├── MissingTagError     a required attribute is absent or unreadable
    │   ├── GeometryError       the slices do not form a regular grid
    │   ├── IntensityError      the stored values cannot be converted to HU
    │   ├── DecodeError         the pixel data cannot be read
    │   ├── SegmentationError   a segmentation file cannot be read or not be placed on its series
    │   │   └── NotASegmentationError   the file is not a segmentation
    │   └── PredictionError     a prediction cannot be read or does not fit the output of its series
    ├── PlanError               one series: the recipe cannot be applied to it
    ├── OutputError             one series: its folder cannot be written
    ├── RequestError            the whole run: the request is invalid
    │   ├── RecipeError         the recipe is invalid
    │   └── NothingFoundError   the requested series is not found
    └── BackendError            the whole run: the backend cannot start
        ├── DeviceMemoryError   one series: it does not fit on the device
        └── DeviceLostError     one series: the device failed

Errors of one series are recorded in the manifest with their text, and the cohort continues; the others end the run.
`exit_code` is the exit code of the command line if the error ends a run.
"""


class GpuprepError(Exception):
    """Base class of all errors of gpuprep."""

    exit_code = 1


class InputError(GpuprepError):
    """The files of a series cannot be converted truthfully.

    `code` is the reason in one word, for programs; the text has the details.
    """

    code = "input"

    def __init__(self, text: str, code: str | None = None) -> None:
        super().__init__(text)
        if code is not None:
            self.code = code


class MissingTagError(InputError):
    """A required attribute is absent or unreadable."""

    code = "missing-tag"


class GeometryError(InputError):
    """The slices do not form a regular grid."""

    code = "geometry"


class IntensityError(InputError):
    """The stored values cannot be converted to HU."""

    code = "not-hu"


class DecodeError(InputError):
    """The pixel data of a file cannot be read."""

    code = "pixels"


class SegmentationError(InputError):
    """A segmentation file cannot be read or not be placed on its series.

    `series_uids`, `frame_of_reference_uid` and `sop_uids` hold its references, as far as they could be read, so that an
    unreadable file can still be matched to its series.
    """

    code = "mask"
    series_uids: tuple[str, ...] = ()
    frame_of_reference_uid: str = ""
    sop_uids: frozenset[str] = frozenset()


class NotASegmentationError(SegmentationError):
    """A file is not a segmentation, which is common in folders of segmentations."""

    code = "mask-not"


class PredictionError(InputError):
    """A prediction cannot be read, or does not fit the output of its series."""

    code = "prediction"


class PlanError(GpuprepError):
    """The recipe cannot be applied to the series.

    `code` is the reason in one word, for programs.
    """

    code = "plan"

    def __init__(self, text: str, code: str | None = None) -> None:
        super().__init__(text)
        if code is not None:
            self.code = code


class OutputError(GpuprepError):
    """The folder of a series, or a file of the whole run, cannot be written.

    `code` is the reason in one word, for programs.
    """

    def __init__(self, text: str, code: str | None = None) -> None:
        super().__init__(text)
        self.code = code or "error"


class RequestError(GpuprepError):
    """The request is invalid."""

    exit_code = 2


class RecipeError(RequestError, ValueError):
    """A recipe holds an unknown key or an invalid value."""


class NothingFoundError(RequestError):
    """No series, or not the requested one, is found."""

    exit_code = 3


class BackendError(GpuprepError):
    """The requested backend cannot run on this machine."""

    exit_code = 4


class DeviceMemoryError(BackendError):
    """A volume does not fit into the free memory of the device."""


class DeviceLostError(BackendError):
    """The device failed, and this process can no longer use it."""


def nested_too_deeply(exc: BaseException | None) -> bool:
    """Return whether an error results from nesting beyond Python's recursion limit.

    A library may raise another error from the RecursionError: pydicom does if it occurs while it reads the head of an
    item. The depth at which it occurs depends on the version of Python and on the caller.
    """
    while exc is not None:
        if isinstance(exc, RecursionError):
            return True
        exc = exc.__cause__ or exc.__context__
    return False

"""Reports which backends and decoders work on this machine, and what to install for the others."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

from gpuprep.compute.backend import import_loops, numba_works, open_gpus
from gpuprep.compute.gpu_checks import Phantoms, examine_gpus
from gpuprep.compute.gpu_findings import GpuReport
from gpuprep.core.recipe import REQUIRED_PACKAGES, Recipe
from gpuprep.core.versions import RECORDED_GPU_PACKAGES, versions
from gpuprep.dicom.decode import available_decoders
from gpuprep.dicom.uids import syntax_name
from gpuprep.errors import BackendError, RecipeError, RequestError
from gpuprep.executors.cores import usable_cores
from gpuprep.output.dicom_seg import imported_highdicom
from gpuprep.testing import thorax_volume

COMPRESSED_SYNTAXES = (
    "1.2.840.10008.1.2.5",  # RLE Lossless
    "1.2.840.10008.1.2.4.50",  # JPEG Baseline
    "1.2.840.10008.1.2.4.51",  # JPEG Extended
    "1.2.840.10008.1.2.4.53",  # JPEG Spectral Selection, retired
    "1.2.840.10008.1.2.4.55",  # JPEG Full Progression, retired
    "1.2.840.10008.1.2.4.57",  # JPEG Lossless
    "1.2.840.10008.1.2.4.70",  # JPEG Lossless, first-order prediction
    "1.2.840.10008.1.2.4.80",  # JPEG-LS Lossless
    "1.2.840.10008.1.2.4.81",  # JPEG-LS Near-Lossless
    "1.2.840.10008.1.2.4.90",  # JPEG 2000 Lossless
    "1.2.840.10008.1.2.4.91",  # JPEG 2000
    "1.2.840.10008.1.2.4.201",  # HTJ2K Lossless
    "1.2.840.10008.1.2.4.202",  # HTJ2K Lossless RPCL
    "1.2.840.10008.1.2.4.203",  # HTJ2K
    "1.2.840.10008.1.2.4.110",  # JPEG XL Lossless
    "1.2.840.10008.1.2.4.111",  # JPEG XL JPEG Recompression
    "1.2.840.10008.1.2.4.112",  # JPEG XL
    "1.2.840.10008.1.2.8.1",  # Deflated Image Frame Compression
    "1.2.840.10008.1.2.1.98",  # Encapsulated Uncompressed
)
"""Compressed transfer syntaxes in which CT occurs."""

SMALL_PHANTOM = (24, 96, 96), (3.0, 1.8, 1.8)
"""Shape and spacing in mm of the phantom for comparisons of a GPU with the host."""

PHANTOM = (108, 512, 512), (3.0, 0.6816, 0.6816)
"""Shape and spacing in mm of the phantom for times and memory."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report."""

    topic: str
    name: str
    ok: bool
    detail: str
    """Version, device or decoders; or what is missing and what to install."""


def examine() -> list[Finding]:
    """Return findings about backends, decoders, formats and versions."""
    findings = [Finding("backend", "cpu", True, f"NumPy, SciPy and scikit-image on {usable_cores()} cores")]
    findings.append(_loops())
    try:
        findings += [Finding("backend", "gpu", True, f"CuPy and cuCIM on {gpu.device}") for gpu in open_gpus()]
    except BackendError as exc:
        findings.append(Finding("backend", "gpu", False, str(exc)))
    for syntax in COMPRESSED_SYNTAXES:
        decoders = available_decoders(syntax)
        detail = ", ".join(decoders) or "no decoder: reinstall gpuprep with its dependencies"
        findings.append(Finding("decoder", syntax_name(syntax), bool(decoders), detail))
    for format_ in REQUIRED_PACKAGES:
        try:
            Recipe.from_dict({"format": format_}).check_installed()
            findings.append(Finding("format", format_, True, "its packages are installed"))
        except RecipeError as exc:
            findings.append(Finding("format", format_, False, str(exc)))
    try:
        highdicom = imported_highdicom()
        findings.append(Finding("format", "seg", True, f"highdicom {highdicom.__version__} writes DICOM SEG"))
    except RequestError as exc:
        findings.append(Finding("format", "seg", False, str(exc)))
    for package, version in versions(gpu=True).items():
        findings.append(Finding("version", package, True, version))
    if not any(f.name in RECORDED_GPU_PACKAGES for f in findings):
        findings.append(Finding("version", "cupy, cucim", False, "pip install 'gpuprep[cuda12]' or 'gpuprep[cuda13]'"))
    return findings


def _loops() -> Finding:
    """Return whether Numba can compile the CPU loops, which are twice as fast as the alternative."""
    if not numba_works():
        reason = (
            "NUMBA_DISABLE_JIT is set" if find_spec("numba") else "Numba is not installed: pip install 'gpuprep[fast]'"
        )
        return Finding("backend", "cpu loops", False, f"{reason}; without compiled loops, the CPU takes twice as long")
    try:
        loops = import_loops()
    except BackendError as exc:
        return Finding("backend", "cpu loops", False, str(exc))
    if loops.uncached.is_set():
        return Finding("backend", "cpu loops", True, f"compiled by Numba again in each run: {loops.why_uncached()}")
    return Finding("backend", "cpu loops", True, "compiled by Numba")


def examine_gpu() -> GpuReport:
    """Examine all visible GPUs by phantoms."""
    return examine_gpus(lambda: Phantoms(thorax_volume(*SMALL_PHANTOM), thorax_volume(*PHANTOM)), usable_cores())


def gpu_lines(report: GpuReport) -> list[Finding]:
    """Return the findings about GPUs as lines of the report."""
    return [Finding(f.topic, f.title, f.ok, f.detail) for f in report.findings]


def gpu_verdict(report: GpuReport) -> str:
    """Return a sentence that says whether results of the GPU can be trusted."""
    if not report.failed:
        return "results of the GPU can be trusted: all comparisons with the host passed"
    failed = [f"{f.topic}, {f.title}: {f.detail}" for f in report.failed]
    if not report.devices:
        return f"no GPU can be used: {report.failed[0].detail}"
    more = f" (and {len(failed) - 1} more checks)" if len(failed) > 1 else ""
    return f"results of the GPU cannot be trusted: {failed[0]}{more}"

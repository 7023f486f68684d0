"""Lists terms of acquisition attributes that name nobody: defined terms of DICOM, and those of common scanners.

Any other text, although it should be a code, might be a name, so it is replaced where outputs are pseudonymised.

References
----------
DICOM PS3.3, C.8.2.1 (CT Image), C.8.15 (Enhanced CT), C.7.3.1.1.2 (Patient Position); PS3.16, annex L (Body Part
Examined).
"""

from __future__ import annotations

import re

ANOTHER = "another"

_TERMS = {
    "image_type": "ORIGINAL DERIVED MIXED PRIMARY SECONDARY AXIAL LOCALIZER VOLUME MPR REFORMATTED AVERAGE MAX_IP "
    "MIN_IP MAX MIN MEAN NONE RESAMPLED HELIX HELICAL SPI SEQ CT_SOM5 CT_SOM7 CT_SOM8 OTHER ADDITION SUBTRACTION "
    "MULTIPLICATION DIVISION FILTERED QUANTITY MAT_SPECIFIC MAT_VALUE_BASED MAT_FRACTIONAL MAT_REMOVED MAT_MODIFIED "
    "VMI ENERGY_PROP_WT ELECTRON_DENSITY EFF_ATOMIC_NUM",
    "patient_position": "HFP HFS HFDR HFDL FFDR FFDL FFP FFS LFP LFS RFP RFS AFDR AFDL PFDR PFDL",
    "acquisition_type": "SEQUENCED SPIRAL CONSTANT_ANGLE STATIONARY FREE",
    "scan_options": "AXIAL HELICAL HELIX SPIRAL SEQUENCE CINE SCOUT SURVIEW HELICAL_CT VOLUME",
    "body_part": "ABDOMEN ABDOMENPELVIS ADRENAL ANKLE AORTA ARM AXILLA BACK BLADDER BRAIN BREAST BRONCHUS CALF CAROTID "
    "CHEST CHESTABDOMEN CHESTABDPELVIS CLAVICLE COCCYX COLON CSPINE EAR ELBOW EXTREMITY EYE FACE FEMUR FINGER FOOT "
    "FOREARM HAND HEAD HEADNECK HEART HIP HUMERUS IAC JAW KIDNEY KNEE LEG LIVER LSPINE LUNG MANDIBLE MAXILLA "
    "MEDIASTINUM NECK NECKCHEST NECKCHESTABDOMEN NECKCHESTABDPELV ORBIT PANCREAS PELVIS PROSTATE RIB SHOULDER SINUS "
    "SKULL SPINE SPLEEN SSPINE STERNUM STOMACH THIGH THORAX TIBIA TLSPINE TOE TRUNK TSPINE UTERUS VESSEL WHOLEBODY "
    "WRIST",
    "kernel": "SOFT STANDARD STND LUNG BONE BONEPLUS DETAIL CHEST CHST EDGE ULTRA A B C D E F L U UA UB YA YB YC YD "
    "YE YF",
    "manufacturer": "SIEMENS SIEMENS_HEALTHINEERS GE GE_MEDICAL_SYSTEMS GE_HEALTHCARE PHILIPS PHILIPS_MEDICAL_SYSTEMS "
    "PHILIPS_HEALTHCARE TOSHIBA TOSHIBA_MEDICAL_SYSTEMS CANON CANON_MEDICAL_SYSTEMS CANON_MEDICAL_SYSTEMS_CORPORATION "
    "HITACHI HITACHI_MEDICAL_CORPORATION NEUSOFT NEUSOFT_MEDICAL UIH UNITED_IMAGING VARIAN VARIAN_MEDICAL_SYSTEMS "
    "ELEKTA ELSCINT PICKER SAMSUNG NEUROLOGICA IMATRON SHIMADZU MARCONI PNMS_(PHILIPS)",
}
_KNOWN = {name: frozenset(terms.split()) for name, terms in _TERMS.items()}
_KERNEL = re.compile(r"([ABDHIJQSTUV][A-Z]?|FC|FL|IMR)[0-9]{1,3}[A-Z]?|[0-9]")
"""Kernels of Siemens (B30f, Br40d, I31f; the strength of an iterative reconstruction after a backslash) and Canon
(FC08)."""


def known_terms(name: str, value: str | None) -> str | None:
    """Return a value of a column with every term that is not known replaced by "another".

    Parameters
    ----------
    name : str
        A column of `gpuprep.output.columns.FACTS`; of one that is not listed here, nothing is known.
    value : str, optional
        Its terms, separated by backslashes.
    """
    if value is None:
        return None
    known = _KNOWN.get(name, frozenset())
    return "\\".join(
        term
        if term.upper().replace(" ", "_") in known or (name == "kernel" and _KERNEL.fullmatch(term.upper()))
        else ANOTHER
        for term in (part.strip() for part in value.split("\\"))
    )
